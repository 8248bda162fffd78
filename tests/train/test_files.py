"""What a run writes into its folder: rows, events, locks, and what happens when it cannot."""

import errno
import fcntl
import io
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from etils import epath
from train_cases import files

from rollingq_jax.errors import CheckpointError, ConfigError, DataError
from rollingq_jax.train import schedule
from rollingq_jax.train.events import EventLog
from rollingq_jax.train.lock import locked
from rollingq_jax.train.schedule import SaveSchedule
from rollingq_jax.train.snapshot import load_snapshots, save_snapshot
from rollingq_jax.train.storage import check_room, explained, reason_of, saving, writing
from rollingq_jax.train.summary import print_summary, read_summary
from rollingq_jax.train.workdir import check_workdir, read_config
from rollingq_jax.train.writer import MetricsWriter, as_json, json_ready, read_rows, write_whole


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


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, "old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert files(tmp_path).keys() == {"config.json"} and path.read_text() == "old"


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
    assert values == [(8, "train/loss", 0.5), (8, "train/accuracy", 0.25), (9, "train/loss", 0.125)]


def test_tensorboards_own_reader_agrees(tmp_path):
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    log = EventLog(str(tmp_path), 0)
    log.write([row(1, loss=0.5)])
    (path,) = tmp_path.glob("events.*")
    events = list(EventFileLoader(str(path)).Load())
    assert [v.tag for e in events for v in e.summary.value] == ["train/loss"]


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_correlation_that_is_not_defined_is_a_dash(value, tmp_path, capsys):
    summary = {
        "best": {"epoch": 2, "accuracy": 0.5},
        "test_accuracy": 0.5,
        "test_macro_f1": 0.5,
        "probe_accuracy": {},
        "quality_correlation": value,
        "rotations": None,
    }
    print_summary(summary, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"correlation of share and quality +-\n", printed) and "nan" not in printed


def test_two_parts_of_a_run_in_one_second_have_two_event_files(tmp_path):
    for step in (0, 6):
        EventLog(str(tmp_path), step)
    assert len(list(tmp_path.glob("events.*"))) == 2


def test_lock_is_exclusive_and_gone_with_its_holder(tmp_path):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.write('process 7 on elsewhere'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    line = r"in use by another run \(process 7 on elsewhere\); allowed: a folder that no live run"
    with pytest.raises(CheckpointError, match=line), locked(epath.Path(tmp_path)):
        pass
    holder.kill()  # as a crash would: nothing is left to clean up
    holder.wait()
    with locked(epath.Path(tmp_path)):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with locked(epath.Path(tmp_path)):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(epath.Path(tmp_path)):
        assert "cannot be locked: [Errno" in caplog.text


def test_of_several_processes_the_first_holds_the_lock(tmp_path, monkeypatch):
    with locked(epath.Path(tmp_path)):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with locked(epath.Path(tmp_path)):
            pass


def test_saves_by_steps():
    saves = SaveSchedule(3, 0.0, log_every=10)
    assert [step for step in range(1, 10) if saves.due(step)] == [3, 6, 9]
    assert not SaveSchedule(0, 0.0, log_every=1).due(5)


def test_saves_by_minutes_count_from_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saves = SaveSchedule(0, 2.0, log_every=10)
    found = []
    for step in range(1, 10):
        now[0] += 50.0
        if saves.due(step):
            saves.saved()
            found.append(step)
    assert found == [3, 6, 9]  # 150 s are the first multiple of 50 s past two minutes


def test_several_processes_ask_the_first_ones_clock_where_a_row_is_due(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        schedule.multihost_utils, "broadcast_one_to_all", lambda x: asked.append(bool(x)) or True
    )
    saves = SaveSchedule(0, 60.0, log_every=4)
    assert [step for step in range(1, 10) if saves.due(step)] == [4, 8]
    assert asked == [False, False]  # this process's own clock does not decide


def test_room_for_a_checkpoint(tmp_path, monkeypatch):
    check_room(epath.Path(tmp_path), 1000)
    check_room("gs://bucket/run", 10**18)
    usage = type("Usage", (), {"free": 1_500_000})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(epath.Path(tmp_path), 100_000)
    with pytest.raises(OSError, match="1,948,576 bytes are wanted and 1,500,000 are free"):
        check_room(epath.Path(tmp_path), 800_000)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device", "/run/x"), "No space left on device: /run/x"),
        (ValueError("INTERNAL: file 13: No space left on device [os_error_code='28']"), "No space"),
        (ValueError("RESOURCE: Disk quota exceeded [a]\n [b]"), "Disk quota exceeded"),
        (RuntimeError("what\nelse"), "what else"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_reasons(tmp_path, error, reason):
    assert reason_of(error).startswith(reason)
    with pytest.raises(CheckpointError, match=f"a checkpoint in .* is not saved \\({reason}"):
        with saving(epath.Path(tmp_path)):
            raise error


def test_errors_say_what_is_left(tmp_path):
    with pytest.raises(DataError, match="^gone; the last good checkpoint is of step 5$"):
        with explained(lambda: 5):
            raise DataError("gone")
    line = r"cannot be written \(Read-only file system: /run/x\); there is no checkpoint yet"
    with pytest.raises(CheckpointError, match=line):
        with explained(lambda: None), writing(tmp_path):
            raise OSError(30, "Read-only file system", "/run/x")


def test_a_folder_is_checked_without_being_made(tmp_path):
    before = files(tmp_path)
    path = check_workdir(tmp_path / "a" / "b" / "c")
    assert path == epath.Path(tmp_path / "a" / "b" / "c")
    assert files(tmp_path) == before and list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="allowed: a folder that can be written"):
        check_workdir("/proc/nothing/here")


def test_numbers_that_are_not_defined_become_null():
    value = {"a": (math.nan, np.float32(0.5)), 1: np.int64(3), "inf": math.inf, "flag": np.True_}
    assert json_ready(value) == {"a": [None, 0.5], "1": 3, "inf": None, "flag": True}


def test_a_folder_in_the_place_of_the_rows_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl cannot be read \(Is a directory\)"):
        read_rows(tmp_path / "metrics.jsonl")


ODD_OBJECTS = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("\udcff", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("null", "holds NoneType; allowed: a JSON object"),
    ("[]", "holds list; allowed: a JSON object"),
    ('{"a": ' * 400 + "1" + "}" * 400, "is nested too deep; allowed: at most 50 levels"),
    (None, "cannot be read (Is a directory)"),
]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize(("content", "line"), ODD_OBJECTS)
def test_odd_content_in_the_place_of_a_runs_json(tmp_path, name, content, line):
    read = {"config.json": read_config, "summary.json": read_summary}[name]
    assert read(epath.Path(tmp_path)) is None
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=f"{name} .*{re.escape(line)}"):
        read(epath.Path(tmp_path))


SUMMARY = {
    "best": {"step": 6, "epoch": 1, "accuracy": 0.25},
    "test_accuracy": 0.5,
    "test_macro_f1": 0.75,
    "probe_accuracy": {"a": 0.125},
    "attention_share": {"a": 0.375},
    "quality_correlation": 0.0625,
    "rotations": [1, 2],
}
ABSENT = ...
ODD_VALUES = [None, [], {}, "x", True, -1, 10**400, {"a": None}, {"a": []}, [None], [[1]], ABSENT]


def put(summary, name, value):
    """The summary with a field replaced, or without it."""
    summary = json.loads(json.dumps(summary))
    *outer, last = name.split(".")
    place = summary
    for part in outer:
        place = place[part]
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    return summary


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_a_summary_of_odd_content_is_refused_in_one_line_or_shown(tmp_path, capsys, value):
    """Field by field; what is still there is shown."""
    names = [*SUMMARY, *(f"best.{name}" for name in SUMMARY["best"]), "modality_examples"]
    for name in names:
        if name == "modality_examples" and value is ABSENT:
            continue
        (tmp_path / "summary.json").write_text(json.dumps(put(SUMMARY, name, value)))
        try:
            summary = read_summary(epath.Path(tmp_path))
        except CheckpointError as error:
            assert "summary.json is damaged" in str(error)
            assert name in ("best", "best.step", "best.epoch", "best.accuracy", "test_accuracy")
        else:
            print_summary(summary, tmp_path)
            printed = capsys.readouterr().out
            for field, shown in (("test_macro_f1", "0.750"), ("probe_accuracy", "0.125")):
                assert name in (field, "modality_examples") or shown in printed


def test_a_best_epoch_whose_accuracy_is_not_known_is_shown(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(put(SUMMARY, "best.accuracy", None)))
    print_summary(read_summary(epath.Path(tmp_path)), tmp_path)
    assert re.search(r"best epoch by validation +1 \(-\)\n", capsys.readouterr().out)


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
