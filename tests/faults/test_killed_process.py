"""One of two processes is killed: the other ends in one line, and both together go on."""

import re
import time
from pathlib import Path

from tests.faults.fault_cases import end, result, size, steps_saved, until

SECONDS = 60
EVERY_STEP = "--config.checkpoint.every_steps=1"
GONE = {
    0: r"process 0 has ended, or cannot be reached any more",
    1: r"process 1 has ended: no sign of life for \d+ s",
}


def killed(command, workdir, number, condition):
    """Kills a process when the condition comes true; checks how the other one ends."""
    processes = command.start_two(workdir, EVERY_STEP, STEP_SECONDS="0.3")
    assert until(condition, processes[number])
    began = time.monotonic()
    processes[number].kill()
    assert end(processes[1 - number], SECONDS) == 75
    assert time.monotonic() - began < SECONDS
    processes[number].wait()
    printed = Path(f"{(workdir, workdir.parent / 'second')[1 - number]}.err").read_text()
    line = rf"error: {GONE[number]}; what is saved stays, and the same command in all [^\n]*\n"
    assert re.fullmatch(line, printed), printed


def test_killed_in_a_step_and_in_a_save_a_run_ends_as_if_it_had_not_been(command, tmp_path):
    whole, workdir = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    for folder in (whole, workdir):
        folder.parent.mkdir()
    assert [end(process) for process in command.start_two(whole, EVERY_STEP)] == [0, 0]
    metrics = workdir / "metrics.jsonl"
    killed(command, workdir, 1, lambda: size(metrics) > 900)
    enough, saved = size(metrics) + 900, steps_saved(workdir)

    def saving():
        return size(metrics) > enough and any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))

    killed(command, workdir, 0, saving)
    assert steps_saved(workdir) >= saved
    assert [end(process) for process in command.start_two(workdir, EVERY_STEP)] == [0, 0]
    assert result(workdir) == result(whole)
