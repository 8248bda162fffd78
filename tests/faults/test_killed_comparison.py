"""A comparison that is killed and started again ends with the table of an undisturbed one."""

import random
import subprocess
import sys

from tests.faults.fault_cases import end, size, until

FILES = ("selection.json", "results.json", "results.csv")
KILLS = 4


def start(command, workdir):
    """Two arms on two seeds, slow enough to be hit in a run."""
    with open(f"{workdir}.log", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "rollingq_jax.compare"]
            + [f"--config={command.folder / 'config.py'}", f"--workdir={workdir}"]
            + ["--arms=attention,rollingq", "--seeds=2"],
            env=command.environment | {"STEP_SECONDS": "0.02"},
            stdout=log,
            stderr=log,
        )


def written(workdir):
    """Bytes of all rows of all runs; no walk through checkpoints, which the run is renaming."""
    return sum(size(path) for path in workdir.glob("runs/*/*/seed_*/metrics.jsonl"))


def test_killed_anywhere_it_ends_with_the_same_table(command, tmp_path):
    whole, out, rng = tmp_path / "whole", tmp_path / "out", random.Random(0)
    assert end(start(command, whole)) == 0
    step = written(whole) // (KILLS + 2)  # a late kill must not come after the end
    for _ in range(KILLS):
        process, goal = start(command, out), written(out) + step + rng.randrange(step // 4)
        alive = until(lambda goal=goal: written(out) > goal, process)
        process.kill()
        process.wait()
        assert alive and not (out / "results.json").exists()
    assert end(start(command, out)) == 0
    for name in FILES:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
