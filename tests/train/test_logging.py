"""Rows, events, rotations and their pictures: written, read back, and odd ones refused."""

import contextlib
import errno
import io
import math
import random
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rollingq_jax import rolling_query
from rollingq_jax.errors import CheckpointError
from rollingq_jax.rotation import MAX_DRIFT, orthogonality_error
from rollingq_jax.train.config import default_config
from rollingq_jax.train.logging import (
    Console,
    EventLog,
    MetricAccumulator,
    MetricsWriter,
    as_json,
    epoch_line,
    load_snapshots,
    read_rows,
    save_snapshot,
)
from rollingq_jax.train.steps import RollRecord
from rollingq_jax.train.workdir import (
    json_ready,
)
from tests.train.train_cases import files

HEADS, WIDTH = 2, 6


def rolled(drift):
    """State and check of a roll of both heads, from a rotation of which the first is stretched."""
    roller = rolling_query(beta=0.0, rho=1.0)
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(HEADS, WIDTH)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 3, HEADS, WIDTH)), jnp.float32)
    state = roller.init(2, WIDTH, HEADS)
    stretched = state.rotation.at[0, 2].multiply(1 + drift)
    state = roller.observe(state._replace(rotation=stretched), query, keys)
    state, info = roller.update(state, query)
    nothing = jnp.zeros(HEADS)
    return state, jax.device_get(RollRecord(info, query, nothing, nothing))


@pytest.fixture
def meter():
    return MetricAccumulator(
        {}, {}, get=lambda x: x, epoch_steps=4, learning_rate=lambda step: 0.0, skip_nonfinite=False
    )


def test_a_rotation_that_has_drifted_is_mended_and_told(meter, capsys):
    state, roll = rolled(drift=1e-3)
    assert roll.info.rolled.tolist() == [True, True]
    assert roll.info.mended.tolist() == [True, False]
    # A Newton step squares the error, 2e-3 here.
    assert float(orthogonality_error(state.rotation).max()) < 5e-6
    rows = meter.roll_rows(6, roll)
    assert [row.get("mended", False) for row in rows] == [True, False]
    assert [(row["step"], row["epoch"], row["head"]) for row in rows] == [(6, 2, 0), (6, 2, 1)]
    console = object.__new__(Console)
    console._first, console._rotations_shown = True, 0
    console.show(rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 80
    first, second = " ".join(out.split()).split(" epoch 2, head 1: rotated the query by ")
    assert first.endswith("; R had drifted from orthogonal and is mended")
    assert not second.endswith("mended")


def test_an_epoch_is_one_line_of_what_fits_the_terminal(monkeypatch):
    fields = {"accuracy": 0.829, "imbalance": 0.022, "rotations": 127, "loss": 0.9467}
    fields |= {"attention_share/audio": 0.514, "attention_share/visual": 0.486}
    fields |= {"seconds": 2.06, "examples_per_second": 1203.4, "input_wait": 0.01}
    line = "epoch 24: accuracy 0.829, imbalance 0.022, audio 0.51 visual 0.49, 127 rotations"
    monkeypatch.setenv("COLUMNS", "80")
    assert epoch_line({"epoch": 24} | fields) == line
    waiting = epoch_line({"epoch": 24} | fields | {"input_wait": 0.61})
    assert len(waiting) <= 80 and "61% of the time waiting for input" in waiting
    monkeypatch.setenv("COLUMNS", "120")
    assert epoch_line({"epoch": 24} | fields) == f"{line}, loss 0.947, 2.1 s, 1,203 examples/s"


def test_a_rotation_within_rounding_stays(meter):
    _, roll = rolled(drift=MAX_DRIFT / 10)
    assert roll.info.mended.tolist() == [False, False]
    assert not any("mended" in row for row in meter.roll_rows(6, roll))


def test_the_last_turn_of_the_first_head_is_kept_until_it_is_taken(meter):
    _, roll = rolled(drift=0.0)
    meter.roll_rows(6, roll)
    turn = meter.pop_last_rotation()
    np.testing.assert_array_equal(np.asarray(turn["query"], np.float32), roll.query[0])
    np.testing.assert_array_equal(np.asarray(turn["anchor"], np.float32), roll.info.anchor[0])
    assert meter.pop_last_rotation() is None
    rolled_second = roll._replace(info=roll.info._replace(rolled=np.array([False, True])))
    assert len(meter.roll_rows(7, rolled_second)) == 1 and meter.pop_last_rotation() is None


def row(step, split="train", **fields):
    return {"step": step, "epoch": 1, "split": split, **fields}


def test_rows_are_on_disk_at_once_and_read_back(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    rows = [row(1, loss=1 / 3), row(2, "valid", accuracy=0.1)]
    writer.write(rows[:1])
    writer.write(rows[1:])
    assert read_rows(tmp_path / "metrics.jsonl") == rows == writer.rows


def test_rows_past_the_restored_step_are_cut(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write([row(2), row(4), row(4, "valid"), row(6)])
    again = MetricsWriter(tmp_path, 4)
    assert [(r["step"], r["split"]) for r in again.rows] == [
        (2, "train"),
        (4, "train"),
        (4, "valid"),
    ]
    again = MetricsWriter(tmp_path, 4, validate=True)  # that validation comes anew
    assert [(r["step"], r["split"]) for r in again.rows] == [(2, "train"), (4, "train")]


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(as_json(row(1)) + "\n" + as_json(row(2))[:-3])
    assert [r["step"] for r in read_rows(path)] == [1]


ODD_ROWS = [
    "{",
    "3",
    "[]",
    "null",
    "\xff",
    "[" * 5000,
    '{"split": "train"}',
    '{"step": "x", "split": "train"}',
    '{"step": true, "split": "train"}',
    '{"step": NaN, "split": "train"}',
    '{"step": -1, "split": "train"}',
    '{"step": 1e300, "split": "train"}',
    f'{{"step": {10**30}, "split": "train"}}',
    '{"step": 1, "split": ["train"]}',
    '{"step": 1, "split": "train", "loss": {"a": 1}}',
    f'{{"step": 1, "split": "train", "loss": {10**400}}}',
    '{"step": 1, "split": "roll"}',
    '{"step": 1, "split": "roll", "epoch": 1, "head": 0, "imbalance_before": 1, '
    '"imbalance_after": 1, "angle_degrees": null}',
]


@pytest.mark.parametrize("line", ODD_ROWS, ids=lambda line: line[:60])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    content = f"{as_json(row(1))}\n{line}\n{as_json(row(2))}\n"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(CheckpointError, match="metrics.jsonl line 2 is "):
        read_rows(path)


def test_numbers_that_json_does_not_have_become_null():
    assert as_json({"a": float("nan"), "b": float("inf"), "c": 1.5, "d": None, "e": 3}) == (
        '{"a": null, "b": null, "c": 1.5, "d": null, "e": 3}'
    )


def test_events_are_what_tensorboard_reads(tmp_path):
    from tensorboardX.proto.event_pb2 import Event

    log = EventLog(str(tmp_path / "tensorboard"), 6)
    log.write([row(8, loss=0.5, accuracy=0.25, rotations=2), row(9, loss=0.125)])
    (path,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content, events = path.read_bytes(), []
    while content:  # length, its checksum, data, its checksum
        length = int.from_bytes(content[:8], "little")
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert events[1].session_log.status == 1 and events[1].step == 7  # hides older later steps
    values = [(e.step, v.tag, v.simple_value) for e in events[2:] for v in e.summary.value]
    first = [(8, "train/loss", 0.5), (8, "train/accuracy", 0.25), (8, "train/rotations", 2.0)]
    assert values == [*first, (9, "train/loss", 0.125)]


def test_the_recipes_for_trackers_run(tmp_path, monkeypatch):
    """The documentation's code, with modules that have the calls of W&B, MLflow and CLU."""
    told = []

    def module(name, **names):
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(**names))

    def take(who):
        return lambda scalars, step: told.append((who, step, scalars))

    def init(project, id, resume, config):
        assert config["seed"] == 0 and resume == "allow"
        return SimpleNamespace(log=take("wandb"), finish=lambda: None)

    module("wandb", init=init)
    module(
        "mlflow",
        start_run=lambda run_name: contextlib.nullcontext(),
        log_params=lambda params: told.append(("params", params["optimizer.name"])),
        log_metrics=take("mlflow"),
    )
    writer = SimpleNamespace(
        write_scalars=lambda step, scalars: told.append(("clu", step, scalars)),
        flush=lambda: told.append(("flushed",)),
    )
    module("clu", metric_writers=SimpleNamespace(create_default_writer=lambda folder: writer))

    def train_and_evaluate(config, workdir, callbacks):
        rows = MetricsWriter(tmp_path, 0, callbacks=callbacks)
        rows.write([{"step": 6, "epoch": 1, "split": "valid", "accuracy": 0.5, "rotations": 2}])

    page = Path(__file__).parents[2] / "docs" / "howto" / "training.md"
    blocks = re.findall(r"```py\n(.*?)```", page.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, {"config": default_config(), "train_and_evaluate": train_and_evaluate})
    row = 6, {"valid/accuracy": 0.5, "valid/rotations": 2.0}
    expected = [("wandb", *row), ("params", "sgd"), ("mlflow", *row), ("clu", *row), ("flushed",)]
    assert told == expected


def test_tensorboards_own_reader_agrees(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    log = EventLog(str(tmp_path), 0)
    log.write([row(1, loss=0.5)])
    (path,) = tmp_path.glob("events.*")
    events = list(EventFileLoader(str(path)).Load())
    assert [v.tag for e in events for v in e.summary.value] == ["train/loss"]


def test_two_parts_of_a_run_in_one_second_have_two_event_files(tmp_path):
    for step in (0, 6):
        EventLog(str(tmp_path), step)
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_numbers_that_are_not_defined_become_null():
    value = {"a": (math.nan, np.float32(0.5)), 1: np.int64(3), "inf": math.inf, "flag": np.True_}
    assert json_ready(value) == {"a": [None, 0.5], "1": 3, "inf": None, "flag": True}


def test_a_folder_in_the_place_of_the_rows_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be read \(Is a directory\)"):
        read_rows(tmp_path / "metrics.jsonl")


@pytest.fixture
def rotations(tmp_path):
    """Pictures of the rotations at the steps 6, 12 and 18."""
    keys = {f"mean_keys/{m}": np.ones((5, 3), np.float32) for m in "ab"}
    columns = keys | {"present": np.ones((5, 2), np.float32)}
    for step in (6, 12, 18):
        turn = {"query": [1.0, 0.0, 0.0], "anchor": [0.0, 1.0, 0.0]}
        save_snapshot(epath.Path(tmp_path), step, step // 6, turn, columns)
    return tmp_path / "rotations"


def npz(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


VECTOR = np.ones(3, np.float32)
DAMAGED = {
    "empty": b"",
    "noise": bytes(range(256)) * 4,
    "of other arrays": npz(a=VECTOR),
    "of other widths": npz(
        step=12, epoch=2, query=VECTOR, anchor=VECTOR[:2], **{"mean_keys/a": np.ones((5, 3))}
    ),
    "of no numbers": npz(
        step=12, epoch=2, query=VECTOR, anchor=VECTOR, **{"mean_keys/a": np.array([["x"] * 3])}
    ),
    "not finite": npz(
        step=12, epoch=2, query=VECTOR * np.nan, anchor=VECTOR, **{"mean_keys/a": np.ones((5, 3))}
    ),
    "without an axis": npz(step=12, epoch=2, query=np.float32(1), anchor=VECTOR),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_picture_of_a_rotation_is_left_out_with_a_warning(rotations, caplog, content):
    (rotations / "12.npz").write_bytes(content)
    (rotations / "99999999999999999999.npz").write_bytes(b"")
    found = load_snapshots(epath.Path(rotations.parent), 18)
    assert [snapshot.step for snapshot in found] == [6, 18]
    assert re.search(r"12\.npz is damaged, and not drawn \(", caplog.text)


def test_wherever_a_picture_is_cut_or_flipped_it_is_left_out_or_right(rotations, caplog):
    path = rotations / "12.npz"
    content = path.read_bytes()
    whole = load_snapshots(epath.Path(rotations.parent), 12)[1]
    draw = random.Random(0)
    for _ in range(300):
        broken, place = bytearray(content), draw.randrange(len(content))
        if draw.random() < 0.5:
            del broken[place:]
        else:
            broken[place] ^= 1 << draw.randrange(8)
        path.write_bytes(bytes(broken))
        for snapshot in load_snapshots(epath.Path(rotations.parent), 12)[1:]:
            np.testing.assert_equal(snapshot, whole)


def test_a_folder_or_file_in_the_place_of_pictures(rotations, caplog):
    (rotations / "12.npz").unlink()
    (rotations / "12.npz").mkdir()
    assert [s.step for s in load_snapshots(epath.Path(rotations.parent), 18)] == [6, 18]
    shutil.rmtree(rotations)
    rotations.write_text("")
    assert load_snapshots(epath.Path(rotations.parent), 18) == []


def test_a_picture_is_written_whole(rotations, monkeypatch):
    before = files(rotations)

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(rotations)), "write_bytes", full)
    turn = {"query": [1.0, 0.0, 0.0], "anchor": [0.0, 1.0, 0.0]}
    columns = {"mean_keys/a": np.ones((5, 3)), "present": np.ones((5, 1))}
    with pytest.raises(OSError):
        save_snapshot(epath.Path(rotations.parent), 12, 2, turn, columns)
    assert files(rotations) == before
