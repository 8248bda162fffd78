"""Checkpoints: to the last bit, verified, kept by rule, when they are due."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rollingq_jax import rolling_query
from rollingq_jax.errors import CheckpointError, DataError, NonFiniteError
from rollingq_jax.train import checkpoint
from rollingq_jax.train.checkpoint import (
    Checkpoints,
    CheckpointSchedule,
    DamagedError,
    check_room,
    checksums,
    convert_save_errors,
    record_digest,
    to_host,
    with_last_checkpoint,
)
from rollingq_jax.train.train_state import TrainState
from rollingq_jax.train.workdir import (
    convert_io_errors,
    reason_of,
)

RECORD = {"best": {"step": -1}, "sums": {"loss": 1 / 3, "cosine/a": [0.1, 1e-30]}}


def make_state(step, *, seed=0, width=4, rolling=True):
    """A state with awkward numbers, of which resuming must not lose a bit."""
    values = np.random.default_rng((seed, step)).normal(size=(3, width)).astype(np.float32)
    values[0, 0], values[1, 1] = 1e-45, np.finfo(np.float32).max
    return TrainState(
        step=jnp.array(step, jnp.int32),
        params={"fusion": {"cls": jnp.asarray(values)}, "head": jnp.asarray(values[0])},
        opt_state=({"trace": jnp.asarray(-values)}, (), {"count": jnp.array(step, jnp.int32)}),
        rolling=rolling_query().init(2, width, 2) if rolling else None,
        rng=jax.random.key(seed + 7),
    )


def record(best=-1):
    return RECORD | {"best": {"step": best}}


def assert_same(first, second):
    ours, theirs = (jax.tree_util.tree_leaves_with_path(to_host(s)) for s in (first, second))
    for (path, one), (other, two) in zip(ours, theirs, strict=True):
        assert path == other and one.dtype == two.dtype and one.tobytes() == two.tobytes()


@pytest.fixture
def folder(tmp_path):
    """Checkpoints of the steps 1, 2 and 3."""
    path = epath.Path(tmp_path) / "checkpoints"
    with Checkpoints(path, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(make_state(step), record())
    return path


@pytest.mark.parametrize("rolling", [True, False])
def test_round_trip_to_the_last_bit(tmp_path, rolling):
    state = make_state(5, rolling=rolling)
    like = make_state(0, seed=3, rolling=rolling)
    with Checkpoints(epath.Path(tmp_path) / "c", keep=1) as checkpoints:
        checkpoints.save(state, record())
        checkpoints.wait()
        for template in (like, jax.eval_shape(lambda: like)):
            found, kept = checkpoints.restore(5, template)
            assert_same(found, state)
            assert kept["sums"] == RECORD["sums"]
    assert found.rolling is None or isinstance(found.rolling, type(state.rolling))
    same = jax.random.normal(found.rng, (3,)) == jax.random.normal(state.rng, (3,))
    assert bool(same.all())


def test_newest_and_best_stay(tmp_path):
    path = epath.Path(tmp_path) / "c"
    with Checkpoints(path, keep=2) as checkpoints:
        for step, best in ((1, 1), (2, 2), (3, 2), (4, 2), (5, 2)):
            checkpoints.save(make_state(step), record(best))
        checkpoints.wait()
        assert checkpoints.steps() == [5, 4, 2] and checkpoints.newest == 5
    with Checkpoints(path, keep=2) as checkpoints:  # goes on: the best is known from the record
        checkpoints.restore_newest(make_state(0))
        checkpoints.save(make_state(6), record(2))
        checkpoints.wait()
        assert checkpoints.steps() == [6, 5, 2]
        checkpoints.save(make_state(7), record(7))
        checkpoints.wait()
        assert checkpoints.steps() == [7, 6]


def test_no_checkpoint_yet(tmp_path):
    with Checkpoints(epath.Path(tmp_path) / "c", keep=2) as checkpoints:
        assert checkpoints.newest is None and checkpoints.steps() == []
        assert checkpoints.restore_newest(make_state(0)) is None


def test_saving_a_step_twice_keeps_the_first(folder):
    with Checkpoints(folder, keep=3) as checkpoints:
        checkpoints.save(make_state(3, seed=9), record())
        checkpoints.wait()
        assert_same(checkpoints.restore(3, make_state(0))[0], make_state(3))


def flip_a_byte(step_folder):
    """In the index that a read begins with; the processes' own folders hold what it replaced."""
    (index,) = Path(step_folder).glob("state/d/*")
    content = bytearray(index.read_bytes())
    content[len(content) // 2] ^= 1
    index.write_bytes(bytes(content))


def test_a_flipped_byte_is_found_and_the_one_before_is_used(folder, caplog):
    flip_a_byte(folder / "3")
    with Checkpoints(folder, keep=3) as checkpoints:
        state, _ = checkpoints.restore_newest(make_state(0))
        assert_same(state, make_state(2))
        assert "checkpoint 3" in caplog.text and "trying the one before" in caplog.text
        assert (folder / "3.damaged").exists()  # nothing is deleted
        checkpoints.save(make_state(3), record())  # and the step can be saved again
        checkpoints.wait()
        assert_same(checkpoints.restore_newest(make_state(0))[0], make_state(3))


def test_a_changed_value_does_not_pass_the_checksum(folder, monkeypatch):
    """As if a byte had changed below Orbax's own checks."""
    read = Checkpoints._read

    def changed(self, step, item, args):
        tree = read(self, step, item, args)
        if item == "state":
            tree["params"]["head"] = np.nextafter(tree["params"]["head"], np.float32(9))
        return tree

    monkeypatch.setattr(Checkpoints, "_read", changed)
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match="3 is damaged: its checksum of params/head"):
            checkpoints.restore(3, make_state(0))


def test_a_changed_record_is_found(folder):
    path = folder / "3" / "record" / "metadata"
    content = json.loads(path.read_text())
    content["record"]["best"]["step"] = 2
    path.write_text(json.dumps(content))
    with Checkpoints(folder, read_only=True) as checkpoints:
        with pytest.raises(DamagedError, match="its record is not as it was saved"):
            checkpoints.restore(3, make_state(0))


def test_read_only_leaves_everything(folder):
    flip_a_byte(folder / "3")
    (folder / "4.orbax-checkpoint-tmp").mkdir()  # a live run is saving
    before = sorted(path.name for path in folder.iterdir())
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_newest(make_state(0))[0], make_state(2))
    assert sorted(path.name for path in folder.iterdir()) == before


def test_what_an_interrupted_save_left_is_removed(folder):
    left = folder / "4.orbax-checkpoint-tmp"
    left.mkdir()
    (left / "part").write_text("x")
    with Checkpoints(folder, keep=3) as checkpoints:
        assert checkpoints.restore_newest(make_state(0))[0].step == 3
        checkpoints.save(make_state(4), record())
    assert not left.exists() and (folder / "4").exists()


def test_none_intact_is_an_error_and_nothing_is_renamed(folder):
    for step in (1, 2, 3):
        flip_a_byte(folder / str(step))
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match=r"none of .* is intact: \[3, 2, 1\]"):
            checkpoints.restore_newest(make_state(0))
        assert checkpoints.steps() == [3, 2, 1]


def test_another_model_is_refused_by_name(folder):
    with Checkpoints(folder, keep=3) as checkpoints:
        line = r"checkpoint 3 is of another model: opt_state/0/trace is float32\[3, 4\]; allowed"
        with pytest.raises(CheckpointError, match=line):
            checkpoints.restore_newest(make_state(0, width=5))
        with pytest.raises(CheckpointError, match="rolling/.* is .*; allowed: absent"):
            checkpoints.restore_newest(make_state(0, rolling=False))
        assert checkpoints.steps() == [3, 2, 1]


def test_another_format_is_refused(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "READABLE", (1, 3))
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match="has format version 2; allowed: 1, 3"):
            checkpoints.restore_newest(make_state(0))


def test_a_record_that_is_not_the_runs_is_refused(folder):
    def check(record):
        raise CheckpointError(f"holds {sorted(record)}")

    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(CheckpointError, match="holds .*'arrays', 'best', 'format_version'"):
            checkpoints.restore_newest(make_state(0), check)


def test_a_state_that_is_not_finite_is_not_saved(folder):
    state = make_state(4)
    bad = {"trace": state.opt_state[0]["trace"].at[2, 0].set(jnp.nan)}
    state = state.replace(opt_state=(bad, *state.opt_state[1:]))
    with Checkpoints(folder, keep=3) as checkpoints:
        with pytest.raises(NonFiniteError, match="step 4: opt_state/0/trace is not finite"):
            checkpoints.save(state, record())
        assert checkpoints.steps() == [3, 2, 1]


def test_checksums_see_values_shapes_dtypes_and_names():
    tree = {"a": np.zeros((2, 3), np.float32)}
    others = [
        {"b": np.zeros((2, 3), np.float32)},
        {"a": np.zeros((3, 2), np.float32)},
        {"a": np.zeros((2, 3), np.int32)},
        {"a": np.full((2, 3), -0.0, np.float32)},
    ]
    sums = {str(checksums(other)) for other in [tree, *others]}
    assert len(sums) == 5 and checksums({"a": np.zeros((2, 3), np.float32)}) == checksums(tree)


def splitmix64(state):
    """Output number `state` + 1 of the generator that is seeded with 0, in Python's integers."""
    z = (state + 1) * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(24, dtype=np.int32).reshape(2, 3, 4) - 7,
        np.array([1.5, -0.0, 1e-45], np.float32),
        np.array([[2**63, 5]], np.uint64),
        np.array([True, False, True]),
        np.float32(3),
        np.zeros((0, 4), np.float32),
        np.ones((300, 250), np.float32),  # more than one block
    ],
    ids=lambda a: f"{a.dtype}{list(np.shape(a))}",
)
def test_a_checksum_is_the_sum_of_its_definition(array):
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's published first output
    bits = np.ravel(array).view(f"u{array.dtype.itemsize}").tolist()
    total = sum(b * (splitmix64(i) | 1) for i, b in enumerate(bits)) % 2**64
    expected = f"{array.dtype}{list(np.shape(array))} {total:016x}"
    assert checksums({"a": array})["a"].told == expected


ODD_NAMES = [
    "[lr=0.1]",
    "a?b",
    "a*b",
    "**",
    "[!x]",
    "x[",
    "{a,b}",
    "a b",
    "\u65e5\u672c",
    "a#b",
    "%20",
]


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.parametrize("place", ["itself", "a parent"])
def test_a_folder_whose_name_reads_as_a_pattern(tmp_path, name, place):
    path = epath.Path(tmp_path / name / ("checkpoints" if place == "itself" else "run/checkpoints"))
    with Checkpoints(path, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(make_state(step), record())
    with Checkpoints(path, read_only=True) as checkpoints:
        assert_same(checkpoints.restore_newest(make_state(0))[0], make_state(2))
    shutil.move(path.parent, tmp_path / "plain")  # nothing in it depends on the name
    with Checkpoints(epath.Path(tmp_path) / "plain" / "checkpoints", read_only=True) as checkpoints:
        assert_same(checkpoints.restore(1, make_state(0))[0], make_state(1))


def test_glob_reads_the_pattern_and_not_the_folder(tmp_path):
    folder = checkpoint.LiteralPath(tmp_path) / "[a]*"
    for name in ("x/one.txt", "x/two.json", "y/one.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")
    (checkpoint.LiteralPath(tmp_path) / "a").mkdir()  # what the folder's name would match
    found = [str(path.relative_to(folder)) for path in folder.glob("*/one.*")]
    assert found == ["x/one.txt", "y/one.txt"] and list(folder.glob("z*")) == []
    assert list((folder / "nowhere").glob("*")) == []


def test_the_first_save_is_read_back(tmp_path, monkeypatch):
    """On a storage that loses the arrays."""
    path = epath.Path(tmp_path) / "c"
    read = Checkpoints._read

    def lossy(self, step, item, args):
        shutil.rmtree(path / str(step) / "state" / "d", ignore_errors=True)
        return read(self, step, item, args)

    monkeypatch.setattr(Checkpoints, "_read", lossy)
    with Checkpoints(path, keep=2) as checkpoints:
        with pytest.raises(CheckpointError, match="the first checkpoint in .* cannot be read back"):
            checkpoints.save(make_state(1), record())
    monkeypatch.undo()
    assert [p.name for p in path.iterdir()] == ["1.damaged"]
    with Checkpoints(path, keep=2) as checkpoints:  # and the folder can be used again
        assert checkpoints.restore_newest(make_state(0)) is None
        checkpoints.save(make_state(1), record())
        assert_same(checkpoints.restore_newest(make_state(0))[0], make_state(1))


def test_other_random_numbers_are_named_by_their_setting(folder, monkeypatch):
    with jax.default_prng_impl("rbg"), Checkpoints(folder, read_only=True) as checkpoints:
        line = "JAX_DEFAULT_PRNG_IMPL is rbg and was threefry2x32; allowed: JAX_DEFAULT_PRNG_IMPL=t"
        with pytest.raises(CheckpointError, match=line):
            checkpoints.restore_newest(make_state(0))


def test_random_numbers_of_a_checkpoint_of_an_older_version(tmp_path):
    """Its record does not name them; the key's width does."""
    path = epath.Path(tmp_path) / "c"
    with jax.default_prng_impl("rbg"), Checkpoints(path, keep=1) as checkpoints:
        checkpoints.save(make_state(1), record())
    file = path / "1" / "record" / "metadata"
    older = json.loads(file.read_text())["record"]
    assert older.pop("key_type") == "rbg"
    file.write_text(json.dumps({"record": older, "sha256": record_digest(older)}))
    with Checkpoints(path, read_only=True) as checkpoints:
        with pytest.raises(
            CheckpointError, match="JAX_DEFAULT_PRNG_IMPL is threefry2x32 and was r"
        ):
            checkpoints.restore_newest(make_state(0))
        with jax.default_prng_impl("rbg"):
            assert_same(checkpoints.restore_newest(make_state(0))[0], make_state(1))


def flipped(content, draw):
    """One bit, a run of zeros, an end cut off, or bytes put in between."""
    content, place = bytearray(content), draw.randrange(len(content))
    kind = draw.choice(["bit", "bit", "bit", "zeros", "cut", "more"])
    if kind == "bit":
        content[place] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        content[place : place + 16] = bytes(len(content[place : place + 16]))
    elif kind == "cut":
        del content[place:]
    else:
        content[place:place] = draw.randbytes(5)
    return bytes(content)


def test_whatever_is_damaged_the_state_is_right_or_refused(folder):
    """In `_METADATA`, which no checksum of Orbax covers, more often than elsewhere."""
    draw = random.Random(0)
    paths = [Path(path) for path in sorted(Path(folder / "3").rglob("*")) if path.is_file()]
    paths = [path for path in paths if path.stat().st_size]
    assert len(paths) > 8
    structure = next(path for path in paths if path.name == "_METADATA")
    refused = 0
    for path in [*paths, *[structure] * 40]:
        before = path.read_bytes()
        path.write_bytes(flipped(before, draw))
        with Checkpoints(folder, read_only=True) as checkpoints:
            try:
                state, _ = checkpoints.restore(3, make_state(0))
            except DamagedError:
                refused += 1
            else:
                assert_same(state, make_state(3))
        path.write_bytes(before)
    assert refused > 20


def test_an_empty_node_that_has_become_another_changes_nothing(folder):
    """The arrays are right, and where they belong follows from the state that they are for."""
    path = folder / "3" / "state" / "_METADATA"
    text = path.read_text()
    assert "opt_state" in text and '"1"' in text
    content = json.loads(text)
    (empty,) = [n for n in content["tree_metadata"] if n == "('opt_state', '1')"]
    entry = content["tree_metadata"].pop(empty)
    entry["key_metadata"][1]["key"] = "7"
    content["tree_metadata"]["('opt_state', '7')"] = entry
    path.write_text(json.dumps(content))
    with Checkpoints(folder, read_only=True) as checkpoints:
        assert_same(checkpoints.restore(3, make_state(0))[0], make_state(3))


def test_damage_read_from_python_prints_nothing(folder):
    """Not what Orbax's event loop says when it is closed, either."""
    flip_a_byte(folder / "3")
    (folder / "2" / "state" / "manifest.ocdbt").write_bytes(b"")
    code = f"""
import gc, logging, sys, time
logging.getLogger("absl").setLevel(logging.CRITICAL)
logging.getLogger("rollingq_jax").setLevel(logging.CRITICAL)
sys.path[:0] = {[str(Path(__file__).parents[2])]!r}
from etils import epath
from tests.train.test_checkpoint import Checkpoints, make_state
with Checkpoints(epath.Path({str(folder)!r}), read_only=True) as checkpoints:
    for _ in range(3):
        state, _ = checkpoints.restore_newest(make_state(0))
gc.collect()
time.sleep(0.2)
print(int(state.step))
"""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert done.stdout == "1\n" and done.stderr == ""


def test_saves_by_steps():
    saves = CheckpointSchedule(3, 0.0, log_every=10)
    assert [step for step in range(1, 10) if saves.is_due(step)] == [3, 6, 9]
    assert not CheckpointSchedule(0, 0.0, log_every=1).is_due(5)


def test_saves_by_minutes_count_from_the_last(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    saves = CheckpointSchedule(0, 2.0, log_every=10)
    found = []
    for step in range(1, 10):
        now[0] += 50.0
        if saves.is_due(step):
            saves.mark_saved()
            found.append(step)
    assert found == [3, 6, 9]  # 150 s are the first multiple of 50 s past two minutes


def test_several_processes_ask_the_first_ones_clock_where_a_row_is_due(monkeypatch):
    asked = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(
        checkpoint.multihost_utils, "broadcast_one_to_all", lambda x: asked.append(bool(x)) or True
    )
    saves = CheckpointSchedule(0, 60.0, log_every=4)
    assert [step for step in range(1, 10) if saves.is_due(step)] == [4, 8]
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
        with convert_save_errors(epath.Path(tmp_path)):
            raise error


def test_errors_say_what_is_left(tmp_path):
    with pytest.raises(DataError, match="^gone; the last good checkpoint is of step 5$"):
        with with_last_checkpoint(lambda: 5):
            raise DataError("gone")
    line = r"cannot be written \(Read-only file system: /run/x\); there is no checkpoint yet"
    with pytest.raises(CheckpointError, match=line):
        with with_last_checkpoint(lambda: None), convert_io_errors(tmp_path):
            raise OSError(30, "Read-only file system", "/run/x")
