"""CMU-MOSEI from small pickles of its layout: values against MultiBench's steps, and refusals."""

import itertools
import pickle

import numpy as np
import pytest
from ml_collections import ConfigDict

from rollingq_jax import prepare
from rollingq_jax.data.dataset import labels_of
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import train_batches
from rollingq_jax.data.sources import cmu_mosei
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.train.cli import run_command
from tests.data.media_files import refuses

DIMS = {"vision": 35, "audio": 74, "text": 300}
COUNTS = {"train": 12, "valid": 4, "test": 5}


def config(path, **fields):
    return ConfigDict({"name": "cmu_mosei", "path": str(path), "cache_dir": "", **fields})


def make_data(lengths=None, counts=COUNTS, dtype=np.float32):
    """Sentence i of a split begins at position i of 50 (of its own length, if not aligned)."""
    lengths = lengths or dict.fromkeys(DIMS, 50)
    rng = np.random.default_rng(0)
    data = {}
    for split, count in counts.items():
        part = {}
        for name, dim in DIMS.items():
            part[name] = rng.normal(1.0, 2.0, (count, lengths[name], dim)).astype(dtype)
            for i in range(count):
                part[name][i, :i] = 0
        part["labels"] = np.linspace(-3, 3, count).reshape(count, 1, 1).astype(dtype)
        part["id"] = np.array([[f"video{i}", "0.0", "1.0"] for i in range(count)])
        data[split] = part
    return data


def write(path, data, protocol=4):
    path.write_bytes(pickle.dumps(data, protocol))
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mosei")
    data = make_data()
    data["train"]["audio"][3, 10, :5] = -np.inf
    data["train"]["text"][5] = 0  # this sentence has no text
    cmu_mosei.prepare(write(folder / "mosei_senti_data.pkl", data), folder)
    return folder


def multibench(data, split):
    """MultiBench's steps, a sentence at a time, written from their description."""
    for number in range(len(data[split]["labels"])):
        text = data[split]["text"][number]
        if not text.any():
            continue
        start = next(i for i in range(50) if text[i].any())
        yield {
            name: np.where(
                np.isneginf(data[split][name][number]), 0, data[split][name][number]
            )[start:]
            for name in DIMS
        }, float(data[split]["labels"][number, 0, 0])  # fmt: skip


def test_sentences_equal_multibenchs(data_dir):
    data = make_data()
    data["train"]["audio"][3, 10, :5] = -np.inf
    data["train"]["text"][5] = 0
    dataset = load_dataset(config(data_dir), seed=0)
    for split in COUNTS:
        expected = list(multibench(data, split))
        source = dataset.splits[split]
        assert len(source) == len(expected)
        for number, (sequences, label) in enumerate(expected):
            example = source[number]
            assert example["label"] == (label > 0) and example["label"].dtype == np.int32
            for name, sequence in sequences.items():
                real = len(sequence)
                assert example[name].shape == (50, DIMS[name]) and example[name].dtype == np.float32
                np.testing.assert_array_equal(example[name][:real], sequence)
                np.testing.assert_array_equal(example[name][real:], 0)
                np.testing.assert_array_equal(example[f"{name}_mask"], np.arange(50) < real)
    assert "1 sentences without text" in dataset.description
    assert "label rule: positive" in dataset.description


def test_the_data_set(data_dir):
    dataset = load_dataset(config(data_dir), seed=0)
    assert list(dataset.modalities) == ["audio", "text", "vision"]
    assert {m: info.shape for m, info in dataset.modalities.items()} == {
        "audio": (50, 74), "text": (50, 300), "vision": (50, 35),
    }  # fmt: skip
    assert all(info.kind == "sequence" for info in dataset.modalities.values())
    batch = next(train_batches(dataset.splits["train"], batch_size=4, seed=0, num_steps=1))
    assert batch["text"].shape == (4, 50, 300) and batch["text_mask"].dtype == bool


@pytest.mark.parametrize(
    "modalities",
    [m for n in (1, 2, 3) for m in itertools.combinations(("audio", "text", "vision"), n)],
)
def test_any_subset_of_the_modalities(data_dir, modalities):
    dataset = load_dataset(config(data_dir, modalities=modalities), seed=0)
    assert tuple(dataset.modalities) == modalities
    names = {name for m in modalities for name in (m, f"{m}_mask")}
    assert set(dataset.splits["test"][0]) == names | {"label"}


@pytest.mark.parametrize(
    ("rule", "num_classes", "labels"),
    # the test labels are -3, -1.5, 0, 1.5, 3; halves round to even
    [("positive", 2, [0, 0, 0, 1, 1]), ("non_negative", 2, [0, 0, 1, 1, 1]),
     ("three", 3, [0, 0, 1, 2, 2]), ("seven", 7, [0, 1, 3, 5, 6]),
     ("regression", 1, [[-3], [-1.5], [0], [1.5], [3]])],
)  # fmt: skip
def test_label_rules(data_dir, rule, num_classes, labels):
    dataset = load_dataset(config(data_dir, label_rule=rule), seed=0)
    assert labels_of(dataset.splits["test"]).tolist() == labels
    assert dataset.num_classes == num_classes == len(dataset.class_names)
    assert f"label rule: {rule}" in dataset.description
    assert dataset.task == ("regression" if rule == "regression" else "single_label")


@pytest.mark.parametrize(
    ("sentiment", "expected"), [(-2.6, 0), (-0.4, 3), (0.5, 3), (0.51, 4), (1.5, 5), (2.99, 6)]
)
def test_seven_classes(sentiment, expected):
    assert cmu_mosei.classify(np.float32([sentiment]), "seven").tolist() == [expected]


def test_standardize(data_dir):
    dataset = load_dataset(config(data_dir, standardize=True), seed=0)
    examples = [dataset.splits["train"][i] for i in range(len(dataset.splits["train"]))]
    for name in DIMS:
        real = np.concatenate([e[name][e[f"{name}_mask"]] for e in examples])
        np.testing.assert_allclose(real.mean(axis=0), 0, atol=1e-4)
        np.testing.assert_allclose(real.std(axis=0), 1, atol=1e-4)
        assert all(not e[name][~e[f"{name}_mask"]].any() for e in examples)
        assert examples[0][name].dtype == np.float32


def test_modalities_that_are_not_aligned(tmp_path):
    """Each begins at its own first row; an audio of zeros alone is a missing modality."""
    data = make_data({"vision": 60, "audio": 80, "text": 50})
    data["test"]["vision"][2, :30] = 0
    data["test"]["audio"][1] = 0
    data["test"]["audio"][3, :10] = -np.inf
    path = write(tmp_path / "mosei_senti_data_noalign.pkl", data)
    cmu_mosei.prepare(path, tmp_path)
    dataset = load_dataset(config(tmp_path), seed=0)
    assert dataset.modalities["vision"].shape == (60, 35)
    example = dataset.splits["test"][2]
    assert example["vision_mask"].sum() == 30 and example["audio_mask"].sum() == 78
    np.testing.assert_array_equal(example["vision"][:30], data["test"]["vision"][2, 30:])
    assert not dataset.splits["test"][1]["audio_mask"].any()
    assert dataset.splits["test"][3]["audio_mask"].sum() == 70


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_pickle_protocols_and_precisions(tmp_path, protocol, dtype):
    path = write(tmp_path / "m.pkl", make_data(dtype=dtype), protocol)
    cmu_mosei.prepare(path, tmp_path)
    example = load_dataset(config(tmp_path), seed=0).splits["train"][0]
    expected = make_data(dtype=dtype)["train"]["vision"][0].astype(np.float32)
    np.testing.assert_array_equal(example["vision"], expected)


def test_identifiers_may_be_anything(tmp_path):
    for number, ids in enumerate(
        [[[b"a"]] * 12, np.array([["x", 1.0]] * 12, dtype=object), None, [[]] * 12]
    ):
        data = make_data()
        data["train"]["id"] = ids
        prepared = cmu_mosei.prepare(write(tmp_path / "m.pkl", data), tmp_path / str(number))
        assert prepared.counts == COUNTS


def test_a_folder_as_source(tmp_path):
    write(tmp_path / "mosei_senti_data.pkl", make_data())
    cmu_mosei.prepare(tmp_path, tmp_path / "data")
    write(tmp_path / "mosei_senti_data_noalign.pkl", make_data())
    refuses(lambda: cmu_mosei.prepare(tmp_path, tmp_path / "b"), "pass one of the files")


def test_prepared_once(tmp_path, capsys):
    path = write(tmp_path / "m.pkl", make_data())
    first = cmu_mosei.prepare(path, tmp_path)
    path.unlink()
    assert cmu_mosei.prepare(path, tmp_path) == first
    assert "already prepared" in capsys.readouterr().out


def test_an_interrupted_preparation_begins_anew(tmp_path, monkeypatch):
    path = write(tmp_path / "m.pkl", make_data())
    save, calls = np.save, itertools.count()

    def stop(*args, **kwargs):
        if next(calls) == 9:
            raise KeyboardInterrupt
        return save(*args, **kwargs)

    monkeypatch.setattr(np, "save", stop)
    with pytest.raises(KeyboardInterrupt):
        cmu_mosei.prepare(path, tmp_path)
    refuses(lambda: load_dataset(config(tmp_path), seed=0), "no prepared CMU-MOSEI")
    cmu_mosei.prepare(path, tmp_path)
    assert len(load_dataset(config(tmp_path), seed=0).splits["train"]) == 12
    assert not (tmp_path / "cmu_mosei.partial").exists()


# What can be wrong, each with its line.


def test_missing_file_says_what_to_get(tmp_path):
    refuses(
        lambda: cmu_mosei.prepare(tmp_path / "none.pkl", tmp_path),
        "none.pkl: no such file", "mosei_senti_data.pkl", "MultiBench", "--source",
    )  # fmt: skip
    (tmp_path / "notes.txt").write_text("")
    refuses(lambda: cmu_mosei.prepare(tmp_path, tmp_path / "data"), "holds notes.txt")
    refuses(lambda: load_dataset(config(""), seed=0), "data.path: not given")
    refuses(
        lambda: load_dataset(config(tmp_path), seed=0),
        "python -m rollingq_jax.prepare cmu_mosei --source mosei_senti_data.pkl --data_dir",
    )


def set_part(name, value, split="train"):
    def change(data):
        data[split][name] = value(data[split][name])

    return change


BROKEN = {
    "not a dict": (lambda data: [1, 2], "no 'train' (holds list)"),
    "no test": (lambda data: {"train": data["train"], "valid": data["valid"]}, "no 'test'"),
    "no audio": (set_part("audio", lambda a: None), "train/audio", "is nothing"),
    "text as words": (set_part("text", lambda t: np.full((12, 50, 3), "a")), "train/text", "<U1"),
    "different numbers": (
        set_part("audio", lambda a: a[:7]),
        "train: different numbers of sentences: audio 7, text 12, vision 12, labels 12",
    ),
    "no positions": (set_part("vision", lambda v: v[:, 0]), "train/vision: shape [12, 35]"),
    "two labels": (set_part("labels", lambda y: np.zeros((12, 2))), "one number a sentence"),
    "dims of a split": (
        set_part("text", lambda t: t[:, :, :10], "test"),
        "text differs between splits", "test [50, 10]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_arrays_that_do_not_fit(tmp_path, kind):
    change, *words = BROKEN[kind]

    def with_default(data):
        result = change(data)
        return data if result is None else result

    path = write(tmp_path / "m.pkl", with_default(make_data()))
    refuses(lambda: cmu_mosei.prepare(path, tmp_path), "m.pkl", *words)
    assert not (tmp_path / "cmu_mosei").exists()


UNUSABLE = {
    "NaN": (("text", (2, 40, 7), np.nan), "1 values of text are nan"),
    "inf": (("audio", (2, 40, 7), np.inf), "1 values of audio are inf"),
    "-inf in vision": (("vision", (2, 40, 7), -np.inf), "1 values of vision are -inf"),
    "label of 4": (("labels", (2, 0, 0), 4.0), "label 4.0; allowed: from -3 to 3"),
    "label of NaN": (("labels", (2, 0, 0), np.nan), "label nan; allowed: from -3 to 3"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_sentences_that_cannot_be_used_are_left_out_by_name(tmp_path, kind, capsys):
    (name, place, value), message = UNUSABLE[kind]
    data = make_data()
    data["valid"][name][place] = value
    path = write(tmp_path / "m.pkl", data)
    command = ["cmu_mosei", "--source", str(path), "--data_dir"]
    assert run_command(prepare.command, ["prepare", *command, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    assert "12 train, 3 valid, 5 test" in printed.out
    assert f"valid/2 video2: valid, sentence 2 video2: {message}" in printed.err
    assert "1 unreadable, left out" in printed.err
    assert run_command(prepare.command, ["prepare", *command, str(tmp_path / "b"), "--strict"]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert not (tmp_path / "b" / "cmu_mosei").exists()
    assert run_command(prepare.command, ["prepare", *command, str(tmp_path / "a"), "--strict"]) == 2
    assert message in capsys.readouterr().err


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return eval, (f"open({self.marker!r}, 'w').close()",)


@pytest.mark.parametrize("place", ["top", "id", "object array"])
def test_a_hostile_pickle_is_refused_and_nothing_runs(tmp_path, place, capsys):
    marker = tmp_path / "executed"
    hostile = Hostile(str(marker))
    data = make_data()
    if place == "top":
        data = hostile
    elif place == "id":
        data["train"]["id"] = [hostile] * 12
    else:
        data["train"]["vision"] = np.array([hostile], dtype=object)
    path = write(tmp_path / "m.pkl", data)
    assert (
        run_command(
            prepare.command,
            ["prepare", "cmu_mosei", "--source", str(path), "--data_dir", str(tmp_path)],
        )
        == 2
    )
    error = capsys.readouterr().err.splitlines()[-1]
    assert "refused" in error and "nothing in it was executed" in error
    assert not marker.exists() and not (tmp_path / "cmu_mosei").exists()


def test_a_truncated_pickle(tmp_path):
    path = write(tmp_path / "m.pkl", make_data())
    path.write_bytes(path.read_bytes()[:5000])
    refuses(lambda: cmu_mosei.prepare(path, tmp_path), "m.pkl: damaged")


@pytest.mark.parametrize("damage", ["cut", "missing", "rows", "info", "format"])
def test_damaged_arrays(tmp_path, damage):
    cmu_mosei.prepare(write(tmp_path / "m.pkl", make_data()), tmp_path)
    file = tmp_path / "cmu_mosei" / "train_text.npy"
    info = tmp_path / "cmu_mosei" / "info.json"
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:1000])
    elif damage == "missing":
        file.unlink()
    elif damage == "rows":
        np.save(file, np.zeros((3, 50, 300), np.float32))
    elif damage == "info":
        info.write_text("{")
    else:
        info.write_text(info.read_text().replace('"format_version": 1', '"format_version": 0'))
    refuses(lambda: load_dataset(config(tmp_path), seed=0), str(tmp_path / "cmu_mosei"))


@pytest.mark.parametrize(
    ("field", "value"),
    [("modalities", ("smell",)), ("modalities", 3), ("label_rule", "3"), ("standardize", 1)],
)
def test_bad_fields(data_dir, field, value):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        load_dataset(config(data_dir, **{field: value}), seed=0)


def test_folders_of_other_people_are_not_touched(tmp_path):
    (tmp_path / "cmu_mosei.partial").mkdir()
    (tmp_path / "cmu_mosei.partial" / "thesis.txt").write_text("all I have")
    with pytest.raises(DataError, match="move it away"):
        cmu_mosei.prepare(write(tmp_path / "m.pkl", make_data()), tmp_path)
