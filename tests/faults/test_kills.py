"""`kill -9` at any moment costs nothing that was committed, and changes nothing."""

import random

from tests.faults.fault_cases import result, size, steps_saved, until

KILLS = 20
LONGER = "--config.epochs=12"  # 72 steps, of which each of the runs makes a few
ROW = 450  # bytes of a row of metrics.jsonl, about


def moment(workdir, kind, rng):
    """A condition that comes true in a random moment of the kind."""
    checkpoints, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    written, saved = size(metrics), len(steps_saved(workdir))
    rows, polls, patience = rng.randrange(1, 4), iter(range(10**9)), rng.randrange(20, 1000)

    def has_rows():
        return size(metrics) > written + ROW * rows

    def saving():
        return any(checkpoints.glob("*.orbax-checkpoint-tmp"))

    return {
        "starting": lambda: next(polls) > patience,
        "after some rows": has_rows,
        "in a save": lambda: has_rows() and saving(),
        "after a save": lambda: has_rows() and len(steps_saved(workdir)) != saved,
    }[kind]


def test_twenty_kills(command, tmp_path):
    """Saves at every step, so that a run is saving most of the time."""
    assert command.run(tmp_path / "undisturbed", LONGER) == (0, "")
    expected = result(tmp_path / "undisturbed")
    rng, workdir = random.Random(0), tmp_path / "run"
    kinds = ["starting"] * 3 + ["after some rows"] * 6 + ["in a save"] * 8 + ["after a save"] * 3
    rng.shuffle(kinds)
    unfinished_saves, progress = 0, []
    for kind in kinds:
        process = command.start(
            workdir, LONGER, "--config.checkpoint.every_steps=1", STEP_SECONDS="0.02"
        )
        alive = until(moment(workdir, kind, rng), process)
        process.kill()
        process.wait()
        assert alive, f"the run ended before kill {len(progress) + 1}"
        unfinished_saves += any(workdir.glob("checkpoints/*.orbax-checkpoint-tmp"))
        progress.append(max(steps_saved(workdir), default=0))
    assert len(progress) == KILLS and progress == sorted(progress)  # nothing committed is lost
    assert unfinished_saves >= 5, progress
    assert command.run(workdir, LONGER) == (0, "")
    found = result(workdir)
    for name, value in expected.items():
        assert found[name] == value, name
    steps = [row["step"] for row in found["rows"] if row["split"] == "train"]
    assert steps == list(range(1, found["last"] + 1))  # each once
