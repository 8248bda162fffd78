"""SIGTERM and SIGINT save and leave within seconds, a second one at once; one run a folder."""

import re
import signal
import time
from pathlib import Path

import pytest

from tests.faults.fault_cases import ONE_LINE, end, files, result, size, steps_saved, until

SECONDS = 20  # of a machine that other tests keep busy; about 1 on one that has nothing else to do
ROWS = 1200  # bytes of metrics.jsonl: two rows and more


def stop(process, number):
    """Exit code, and the seconds until it came."""
    began = time.monotonic()
    process.send_signal(number)
    return end(process, SECONDS), time.monotonic() - began


def test_stopped_twice_a_run_ends_as_if_it_had_not_been(command, undisturbed, tmp_path):
    workdir = tmp_path / "run"
    metrics = workdir / "metrics.jsonl"
    for number in (signal.SIGTERM, signal.SIGINT):
        enough = size(metrics) + ROWS
        process = command.start(workdir, STEP_SECONDS="0.3")
        assert until(lambda enough=enough: size(metrics) > enough, process)
        code, _ = stop(process, number)
        assert code == 75
        saved = max(steps_saved(workdir))
        line = f"stopped at step {saved}, which is saved; the same command goes on from there\n"
        assert Path(f"{workdir}.err").read_text() == line
    assert command.run(workdir, json=workdir / "config.json") == (0, "")  # data, not code
    assert result(workdir) == undisturbed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_before_the_first_step_there_is_nothing_to_save(command, tmp_path, number):
    """While the first step is compiled, where Python's own handlers do not run."""
    workdir = tmp_path / "run"
    no_cache = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "empty")}
    process = command.start(workdir, **no_cache)
    assert until(lambda: (workdir / "metrics.jsonl").exists(), process)  # written empty
    code, seconds = stop(process, number)
    assert code == 75 and seconds < 5
    line = "stopped with nothing to save; the same command goes on from there\n"
    assert Path(f"{workdir}.err").read_text() == line
    assert steps_saved(workdir) == [] and size(workdir / "metrics.jsonl") == 0


def test_a_second_signal_does_not_wait(command, undisturbed, tmp_path):
    """For the checkpoint, that is, which takes a minute here."""
    workdir = tmp_path / "run"
    process = command.start(workdir, STEP_SECONDS="0.5", WAIT_SECONDS="60")
    assert until(lambda: size(workdir / "metrics.jsonl") > ROWS, process)
    process.send_signal(signal.SIGTERM)
    time.sleep(2)
    assert process.poll() is None  # it waits for its checkpoint
    code, seconds = stop(process, signal.SIGINT)
    assert code == 128 + signal.SIGINT and seconds < 5
    assert command.run(workdir) == (0, "")
    assert result(workdir) == undisturbed


def test_a_folder_has_one_live_run(command, undisturbed, tmp_path):
    workdir, other = tmp_path / "run", tmp_path / "other"
    first = command.start(workdir, STEP_SECONDS="1")
    assert until(lambda: size(workdir / "metrics.jsonl") > 0, first)
    before = files(workdir)["config.json"]
    other.symlink_to(workdir)  # by another name
    code, printed = command.run(other)
    assert code == 2 and re.fullmatch(ONE_LINE, printed)
    assert f"in use by another run (process {first.pid} on " in printed
    assert files(workdir)["config.json"] == before
    first.kill()  # leaves no lock behind
    first.wait()
    assert command.run(workdir) == (0, "")
    assert result(workdir) == undisturbed
