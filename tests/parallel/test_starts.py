"""Two processes that are not started alike, or of which one fails: one line in both, and an end."""

import os
import re
import shutil
import subprocess
import sys
import time

import pytest

from tests.parallel.processes import ROOT, environment, free_address
from tests.train.train_cases import write_arrays

SECONDS = 60
CONFIG = """
import os
from tests.train.train_cases import tiny_config

def get_config():
    return tiny_config(os.environ["DATA"])
"""

pytestmark = pytest.mark.slow


@pytest.fixture
def both(tmp_path):
    """Starts two processes as they are told; returns the line with which each of them ends."""
    (tmp_path / "config.py").write_text(CONFIG)
    write_arrays(tmp_path / "tiny.npz")
    shutil.copy(tmp_path / "tiny.npz", tmp_path / "same.npz")  # another place is no difference
    flags = [f"--coordinator={free_address()}", "--num_processes=2"]

    def run(first=(), second=(), data=("tiny.npz", "same.npz"), workdirs=("w", "w"), join=None):
        began, processes = time.monotonic(), []
        for number, arguments in enumerate((first, second)):
            told = {"DATA": str(tmp_path / data[number]), **(join(number) if join else {})}
            command = [sys.executable, ROOT / "train.py", f"--config={tmp_path / 'config.py'}"]
            command += ["--workdir", tmp_path / workdirs[number], *arguments]
            command += ["--distributed"] if join else [*flags, f"--process_id={number}"]
            processes.append(
                subprocess.Popen(
                    command, env=environment(8) | told, stderr=subprocess.PIPE, text=True
                )
            )
        printed = [process.communicate(timeout=2 * SECONDS)[1] for process in processes]
        assert time.monotonic() - began < SECONDS
        assert [process.returncode for process in processes] == [2, 2], printed
        # Who waits says so every five seconds, which a slow machine may come to.
        lines = [re.sub(r"(?m)^waiting for .*\n", "", text) for text in printed]
        assert all(re.fullmatch(r"error: [^\n]*\n", line) for line in lines), lines
        assert not any((tmp_path / workdir).exists() for workdir in workdirs)
        return [line.removeprefix("error: ").rstrip("\n") for line in lines]

    return run


def slurm(number):
    """What Slurm tells each of two tasks on this machine."""
    return {
        "SLURM_JOB_ID": str(os.getpid()),  # the port comes from it
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(number),
        "SLURM_LOCALID": str(number),
    }


def test_all_that_differs_is_said_in_both(both, tmp_path):
    write_arrays(tmp_path / "other.npz", seed=1)
    first, second = both(
        second=[
            "--config.checkpoint.every_steps=3",
            "--config.log_every=2",
            "--config.optimizer.learning_rate=0.3",
        ],
        data=("tiny.npz", "other.npz"),
        join=slurm,
    )
    assert first == second
    found = first.split("; ")
    assert [re.sub(r" is .* in process 0 and ", " ", line) for line in found[:3]] == [
        "config.checkpoint.every_steps 3 in process 1",
        "config.log_every 2 in process 1",
        "config.optimizer.learning_rate 0.3 in process 1",
    ]
    assert found[-2].startswith("the data's t") and "has other values in process 1" in found[-2]
    assert found[-1] == "allowed: the same in all processes"


def test_a_workdir_that_is_not_shared(both, tmp_path):
    first, second = both(workdirs=("a", "b"))
    assert first == second
    assert first.startswith(f"workdir {tmp_path / 'b'} in process 1 is not the folder {tmp_path}/a")


def test_a_wrong_field_in_one(both):
    first, second = both(second=["--config.sede=1"])
    assert second.startswith("config.sede is not a field (did you mean ")
    assert first == f"process 1 has ended: {second}"


def test_data_that_are_missing_in_one(both, tmp_path):
    first, second = both(data=("none.npz", "tiny.npz"))
    assert str(tmp_path / "none.npz") in first
    assert second == f"process 0 has ended: {first}"
