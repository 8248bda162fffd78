"""Record sets: exact bytes, interruption at any point, never half a set taken for a whole one."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rollingq_jax.data.records import Recipe, open_records, write_records
from rollingq_jax.errors import DataError

FEATURES = {
    "clip": tfds.features.Text(),
    "audio": tfds.features.Tensor(shape=(2, 3), dtype=np.float32, encoding="bytes"),
    "frames": tfds.features.Sequence(tfds.features.Text()),
    "label": tfds.features.Scalar(np.int64),
}


def frames_of(number):
    """Bytes of every value, some of them not UTF-8, a different number for each clip."""
    return [bytes([number, 0, 255, 128, i]) for i in range(number % 4)]


class Maker:
    """Makes clips "0", "1", ... and counts; clips in ``bad`` are unreadable."""

    def __init__(self, bad=(), interrupt_at=None):
        self.bad, self.interrupt_at, self.made = set(bad), interrupt_at, []

    def __call__(self, item):
        if item == self.interrupt_at:
            raise KeyboardInterrupt
        if item in self.bad:
            raise DataError(f"clip {item}.wav: truncated")
        self.made.append(item)
        number = int(item)
        audio = np.full((2, 3), number, np.float32)
        record = {"clip": item, "audio": audio, "frames": frames_of(number), "label": number % 2}
        return record, {"clip": item, "label": number % 2}


def recipe(make, count=10, **settings):
    items = tuple(str(i) for i in range(count))
    return Recipe("toy", items, FEATURES, make, {"version": 1, **settings}, "toys")


def write(folder, make, count=10, settings=None, **options):
    lines = []
    options = {"shard_size": 3, "log": lines.append} | options
    return write_records(folder, recipe(make, count, **(settings or {})), **options), lines


def test_records_come_back_exactly(tmp_path):
    records, _ = write(tmp_path / "toy", Maker())
    assert [row["clip"] for row in records.rows] == [str(i) for i in range(10)]
    source = records.source()
    assert len(source) == 10
    for number in (9, 0, 4):
        record = source[number]
        assert record["clip"] == str(number).encode()
        assert list(record["frames"]) == frames_of(number)
        np.testing.assert_array_equal(record["audio"], np.full((2, 3), number, np.float32))
        assert record["audio"].dtype == np.float32 and record["label"] == number % 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["toy"]


def test_tfds_reads_the_folder_itself(tmp_path):
    write(tmp_path / "toy", Maker())
    builder = tfds.builder_from_directory(tmp_path / "toy")
    assert builder.info.splits["clips"].num_examples == 10
    assert len(builder.as_data_source(split="clips[:50%]")) == 5


def test_threads_change_nothing(tmp_path):
    one, _ = write(tmp_path / "a" / "toy", Maker(), workers=1)
    four, _ = write(tmp_path / "b" / "toy", Maker(), workers=4)
    assert one.rows == four.rows
    for name in (path.name for path in one.folder.glob("*array_record*")):
        assert (one.folder / name).read_bytes() == (four.folder / name).read_bytes()


def test_an_interrupted_preparation_goes_on(tmp_path):
    first = Maker(interrupt_at="7")
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "toy", first)
    assert not (tmp_path / "toy").exists()
    with pytest.raises(DataError, match="not finished; prepare it"):
        open_records(tmp_path / "toy", "prepare it")
    second = Maker()
    records, _ = write(tmp_path / "toy", second)
    assert second.made == ["6", "7", "8", "9"]  # the shard that was interrupted, and those after
    fresh, _ = write(tmp_path / "other" / "toy", Maker())
    assert records.rows == fresh.rows
    for path in fresh.folder.iterdir():
        if "array_record" in path.name:
            assert (records.folder / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("when", ["metadata", "index", "rename"])
def test_interruption_at_the_end(tmp_path, when, monkeypatch):
    """Between the last shard and the folder's name."""
    from rollingq_jax.data import records

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if when == "metadata":
            patch.setattr(tfds.folder_dataset, "write_metadata", stop)
        elif when == "index":
            write_whole = records.write_whole
            patch.setattr(
                records,
                "write_whole",
                lambda path, text: stop() if path.name == "index.json" else write_whole(path, text),
            )
        else:
            patch.setattr(Path, "rename", stop)
        with pytest.raises(KeyboardInterrupt):
            write(tmp_path / "toy", Maker())
    assert not (tmp_path / "toy").exists()
    second = Maker()
    records, _ = write(tmp_path / "toy", second)
    assert second.made == [] and len(records.source()) == 10
    names = {path.name for path in (tmp_path / "toy").iterdir()}
    assert not any(name.endswith(".tmp") or "record-" in name and ".json" in name for name in names)


def test_a_damaged_unfinished_shard_is_made_again(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "toy", Maker(interrupt_at="7"))
    shards = sorted((tmp_path / "toy.partial").glob("*.array_record-*-of-00004"))
    assert len(shards) == 2
    shards[0].write_bytes(shards[0].read_bytes()[:-10])
    shards[1].with_name(shards[1].name + ".json").write_text("{")
    (tmp_path / "toy.partial" / "leftover.tmp").write_text("x")
    second = Maker()
    records, _ = write(tmp_path / "toy", second)
    assert len(second.made) == 10 and len(records.source()) == 10


def test_other_settings_or_clips_start_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "toy", Maker(interrupt_at="7"))
    second = Maker()
    _, lines = write(tmp_path / "toy", second, settings={"version": 2})
    assert len(second.made) == 10 and "starting anew" in lines[0]


def test_a_finished_set_is_left_alone(tmp_path):
    write(tmp_path / "toy", Maker())
    second = Maker()
    records, lines = write(tmp_path / "toy", second)
    assert second.made == [] and len(records.rows) == 10
    assert lines == [f"{tmp_path / 'toy'}: already prepared; remove it to prepare it again"]
    with pytest.raises(DataError, match="made with another version; remove it"):
        write(tmp_path / "toy", second, settings={"version": 2})
    with pytest.raises(DataError, match="made with another list of clips; remove"):
        write(tmp_path / "toy", second, count=11)


def test_attachments_are_kept_and_belong_to_the_settings(tmp_path):
    def with_note(note):
        return dataclasses.replace(recipe(Maker()), attachments={"note.txt": note})

    records = write_records(tmp_path / "toy", with_note("first"))
    assert (records.folder / "note.txt").read_text() == "first"
    write_records(tmp_path / "toy", with_note("first"))
    with pytest.raises(DataError, match="another note.txt"):
        write_records(tmp_path / "toy", with_note("second"))


def test_unreadable_clips_are_left_out_and_listed(tmp_path, capfd):
    records, _ = write(tmp_path / "toy", Maker(bad=["0", "4"]))
    assert [row["clip"] for row in records.rows] == ["1", "2", "3", "5", "6", "7", "8", "9"]
    assert records.unreadable == {"0": "clip 0.wav: truncated", "4": "clip 4.wav: truncated"}
    assert [int(r["clip"]) for r in map(records.source().__getitem__, range(8))] == [
        int(row["clip"]) for row in records.rows
    ]
    assert "unreadable: clip 4.wav: truncated" in capfd.readouterr().err


def test_files_that_the_system_refuses_are_unreadable(tmp_path):
    def make(item):
        if item == "2":
            raise PermissionError(13, "Permission denied", "2.wav")
        return Maker()(item)

    records, _ = write(tmp_path / "toy", make)
    assert records.unreadable == {"2": "2.wav: cannot be read (Permission denied)"}


def test_a_shard_of_unreadable_clips_alone(tmp_path):
    records, _ = write(tmp_path / "toy", Maker(bad=["3", "4", "5"]))
    source = records.source()
    assert [int(source[i]["clip"]) for i in range(len(source))] == [0, 1, 2, 6, 7, 8, 9]


def test_strict_stops_at_the_first(tmp_path):
    make = Maker(bad=["4"])
    with pytest.raises(DataError, match="clip 4.wav"):
        write(tmp_path / "toy", make, strict=True)
    assert not (tmp_path / "toy").exists() and "9" not in make.made


def test_strict_also_stops_at_what_an_earlier_run_left_out(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "toy", Maker(bad=["1"], interrupt_at="7"))
    with pytest.raises(DataError, match="clip 1.wav"):
        write(tmp_path / "toy", Maker(bad=["1"]), strict=True)
    records, _ = write(tmp_path / "toy", Maker(), strict=True)  # the user mended the file
    assert len(records.rows) == 10 and not records.unreadable


def test_strict_on_a_set_that_lacks_clips(tmp_path):
    write(tmp_path / "toy", Maker(bad=["1"]))
    with pytest.raises(DataError, match="without unreadable clips; the first: clip 1.wav"):
        write(tmp_path / "toy", Maker(), strict=True)


def test_nothing_readable(tmp_path):
    with pytest.raises(DataError, match="none of 2 clips is readable; the first: clip 0.wav"):
        write(tmp_path / "toy", Maker(bad=["0", "1"]), count=2)
    assert not (tmp_path / "toy").exists()
    with pytest.raises(DataError, match="no clips"):
        write(tmp_path / "toy", Maker(), count=0)


@pytest.mark.parametrize("damage", ["cut", "missing", "index", "format"])
def test_damage_to_a_finished_set_is_found(tmp_path, damage):
    write(tmp_path / "toy", Maker())
    shard = sorted((tmp_path / "toy").glob("*.array_record-00001*"))[0]
    index = tmp_path / "toy" / "index.json"
    if damage == "cut":
        shard.write_bytes(shard.read_bytes()[:100])
    elif damage == "missing":
        shard.unlink()
    elif damage == "index":
        index.write_text(index.read_text()[:50])
    else:
        index.write_text(json.dumps({**json.loads(index.read_text()), "format_version": 0}))
    with pytest.raises(DataError) as error:
        open_records(tmp_path / "toy", "prepare it")
    assert "\n" not in str(error.value) and str(tmp_path / "toy") in str(error.value)


def test_a_flipped_bit_in_a_record_is_found_when_it_is_read(tmp_path):
    write(tmp_path / "toy", Maker())
    shard = sorted((tmp_path / "toy").glob("*.array_record-00000*"))[0]
    whole = shard.read_bytes()
    found = 0
    for position in range(100, 500, 23):
        data = bytearray(whole)
        data[position] ^= 1
        shard.write_bytes(data)
        try:
            source = open_records(tmp_path / "toy", "").source()
            audio = [source[i]["audio"] for i in range(3)]
        except DataError as error:
            assert "damaged" in str(error) and "\n" not in str(error)
            found += 1
        else:  # a byte that no record uses
            np.testing.assert_array_equal(audio, [np.full((2, 3), i) for i in range(3)])
    assert found


def test_folders_of_other_people_are_not_touched(tmp_path):
    (tmp_path / "toy.partial").mkdir()
    (tmp_path / "toy.partial" / "thesis.txt").write_text("all I have")
    with pytest.raises(DataError, match="move it away"):
        write(tmp_path / "toy", Maker())
    assert (tmp_path / "toy.partial" / "thesis.txt").exists()
    (tmp_path / "own").mkdir()
    with pytest.raises(DataError, match="not a record set"):
        write(tmp_path / "own", Maker())


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        write(tmp_path / "file" / "toy", Maker())


def read_all(records):
    source = records.source()
    return [source[i] for i in range(len(source))]


SLOW_SCRIPT = """
import sys, time
sys.path.insert(0, {tests!r})
from tests.data import test_records as t
class Slow(t.Maker):
    def __call__(self, item):
        time.sleep(0.02)
        return super().__call__(item)
print("go", flush=True)
t.write(t.Path({folder!r}), Slow(), count=30)
"""


@pytest.mark.faults
@pytest.mark.parametrize("delay", [0.05, 0.3, 0.5, 0.62])
def test_kill_at_any_moment(tmp_path, delay):
    script = SLOW_SCRIPT.replace("t.Path", "__import__('pathlib').Path").format(
        tests=str(Path(__file__).resolve().parents[2]), folder=str(tmp_path / "toy")
    )
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    if (tmp_path / "toy").exists():
        assert len(open_records(tmp_path / "toy", "").source()) == 30
    else:
        records, _ = write(tmp_path / "toy", Maker(), count=30)
        fresh, _ = write(tmp_path / "fresh" / "toy", Maker(), count=30)
        assert records.rows == fresh.rows
        # Not the bytes: the order of a record's fields differs between processes.
        for record, expected in zip(read_all(records), read_all(fresh), strict=True):
            np.testing.assert_equal(record, expected)
