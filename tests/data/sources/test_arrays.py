"""Own arrays: values against NumPy, each mistake one clear line, any bytes a DataError."""

import io
import os
import pickle
import tracemalloc
import types
import zipfile

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.data.dataset import ArraySource, groups_of, ids_of, labels_of
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.sources import arrays as module
from rollingq_jax.data.sources.arrays import from_arrays, load
from rollingq_jax.errors import ConfigError, DataError
from tests.data.media_files import refuses


def make_arrays(num_train=60, num_test=20, num_classes=3, seed=0, **modalities):
    """{"train/<m>": ..., ...} with the shapes given as modality=(shape, dtype)."""
    rng = np.random.default_rng(seed)
    arrays = {}
    modalities = modalities or {"audio": ((7, 4), "float32"), "visual": ((6, 5, 3), "uint8")}
    for split, count in (("train", num_train), ("test", num_test)):
        arrays[f"{split}/label"] = np.arange(count) % num_classes
        for name, (shape, dtype) in modalities.items():
            if np.dtype(dtype).kind == "f":
                values = rng.normal(3.0, 2.0, (count, *shape))
            else:
                values = rng.integers(0, 2 if dtype == "bool" else 9, (count, *shape))
            arrays[f"{split}/{name}"] = values.astype(dtype)
    return arrays


def save(path, arrays):
    np.savez(path, **arrays)
    return types.SimpleNamespace(name="arrays", path=str(path))


def test_a_file_and_a_folder_give_the_same(tmp_path):
    arrays = make_arrays()
    config = save(tmp_path / "d.npz", arrays)
    for key, array in arrays.items():
        (tmp_path / "d" / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(tmp_path / "d" / f"{key}.npy", array)
    from_file = load(config, seed=1)
    from_folder = load({"path": str(tmp_path / "d")}, seed=1)
    assert from_file.modalities == from_folder.modalities
    assert isinstance(from_folder.splits["test"].arrays["audio"], np.memmap)
    for split in ("train", "valid", "test"):
        a, b = from_file.splits[split], from_folder.splits[split]
        assert len(a) == len(b)
        for index in range(len(a)):
            for key, value in a[index].items():
                np.testing.assert_array_equal(value, b[index][key])
                assert type(b[index][key]) is not np.memmap
    assert [len(from_file.splits[s]) for s in ("train", "valid", "test")] == [54, 6, 20]
    assert from_file.num_classes == 3 and list(from_file.modalities) == ["audio", "visual"]


KINDS = [
    ((2, 4, 5, 3), "uint8", "video", (2, 4, 5, 3), "uint8"),
    ((2, 4, 5, 3), "float64", "video", (2, 4, 5, 3), "float32"),
    ((4, 5, 3), "uint8", "image", (4, 5, 3), "uint8"),
    ((4, 5, 1), "uint8", "image", (4, 5, 1), "uint8"),
    ((4, 5), "uint8", "image", (4, 5, 1), "uint8"),
    ((4, 5, 1), "float32", "spectrogram", (4, 5, 1), "float32"),
    ((4, 5, 3), "float32", "image", (4, 5, 3), "float32"),
    ((4, 5), "float16", "sequence", (4, 5), "float32"),
    ((4, 5), "int64", "sequence", (4, 5), "float32"),
    ((9,), "int64", "tokens", (9,), "int32"),
    ((9,), "uint8", "tokens", (9,), "int32"),
    ((9,), "float64", "vector", (9,), "float32"),
    ((9,), "bool", "vector", (9,), "float32"),
    ((), "float32", "vector", (1,), "float32"),
    ((), "int32", "tokens", (1,), "int32"),
]


@pytest.mark.parametrize(("shape", "dtype", "kind", "example_shape", "example_dtype"), KINDS)
def test_kinds_follow_from_shapes(shape, dtype, kind, example_shape, example_dtype):
    dataset = from_arrays(make_arrays(m=(shape, dtype)), modalities=("m",))
    info = dataset.modalities["m"]
    assert (info.kind, info.shape, info.dtype) == (kind, example_shape, example_dtype)
    example = dataset.splits["train"][0]
    assert (example["m"].shape, str(example["m"].dtype)) == (example_shape, example_dtype)
    assert example["label"].dtype == np.int32
    next(iter(eval_batches(dataset.splits["test"], batch_size=8)))


@pytest.mark.parametrize(
    ("shape", "dtype", "kind", "example_shape"),
    [
        ((4, 5), "float32", "spectrogram", (4, 5, 1)),
        ((4, 5), "float32", "image", (4, 5, 1)),
        ((4, 5), "uint8", "sequence", (4, 5)),
        ((3, 4, 5), "uint8", "video", (3, 4, 5, 1)),
        ((9,), "float32", "sequence", (9, 1)),
        ((9,), "int32", "vector", (9,)),
        ((4, 5, 1), "float32", "image", (4, 5, 1)),
    ],
)
def test_a_kind_can_be_stated(tmp_path, shape, dtype, kind, example_shape):
    arrays = make_arrays(m=(shape, dtype))
    config = save(tmp_path / "d.npz", {**arrays, "kind/m": np.array(kind)})
    assert load(config, seed=0).modalities["m"].shape == example_shape
    by_argument = from_arrays({**arrays, "kind/m": np.array("vector")}, kinds={"m": kind})
    assert by_argument.modalities["m"].kind == kind


def test_standardization_matches_numpy_and_covers_all_splits():
    arrays = make_arrays(m=((7, 4), "float64"), v=((5,), "float64"), s=((6, 3, 1), "float64"))
    arrays["train/m"] *= np.array([1e-6, 1.0, 1e6, 1.0])
    arrays["train/v"][:, 2] = 8.0  # constant
    arrays["valid/label"] = arrays["test/label"]
    for name in "mvs":
        arrays[f"valid/{name}"] = arrays[f"test/{name}"]
    dataset = from_arrays(arrays)
    source = dataset.splits["train"]
    for name, axes in (("m", (0, 1)), ("v", (0,)), ("s", (0, 1, 2))):
        got = np.stack([source[i][name] for i in range(len(source))])
        train = arrays[f"train/{name}"]
        std = train.std(axis=axes)
        expected = (train - train.mean(axis=axes)) / np.where(std == 0, 1, std)
        np.testing.assert_allclose(got, expected, atol=2e-5)
        test = arrays[f"test/{name}"][3]
        expected = (test - train.mean(axis=axes)) / np.where(std == 0, 1, std)
        got = dataset.splits["test"][3][name]
        np.testing.assert_allclose(got, np.clip(expected, -10, 10), atol=2e-5)
    raw = from_arrays(arrays, standardize=False).splits["test"][3]["v"]
    np.testing.assert_array_equal(raw, arrays["test/v"][3].astype(np.float32))


def test_pixels_stay_and_their_statistics_go_to_the_model():
    arrays = make_arrays(visual=((6, 5, 3), "uint8"))
    dataset = from_arrays(arrays)
    info, train = dataset.modalities["visual"], arrays["train/visual"] / 255
    np.testing.assert_allclose(info.mean, train.mean(axis=(0, 1, 2)))
    np.testing.assert_allclose(info.std, train.std(axis=(0, 1, 2)))
    np.testing.assert_array_equal(dataset.splits["test"][2]["visual"], arrays["test/visual"][2])


def test_large_arrays_are_read_in_blocks(monkeypatch):
    arrays = make_arrays(m=((7, 4), "float32"))
    whole = from_arrays(arrays).splits["test"][0]["m"]
    monkeypatch.setattr(module, "BLOCK_BYTES", 400)
    np.testing.assert_allclose(from_arrays(arrays).splits["test"][0]["m"], whole, atol=1e-6)


def test_masked_positions_do_not_count():
    arrays = make_arrays(m=((7, 4), "float32"))
    for split in ("train", "test"):
        mask = (
            np.arange(7)
            < np.random.default_rng(1).integers(1, 8, len(arrays[f"{split}/m"]))[:, None]
        )
        arrays[f"{split}/mask_m"] = mask.astype(np.int64)
        arrays[f"{split}/m"][~mask] = np.nan
    dataset = from_arrays(arrays)
    real = arrays["train/m"][arrays["train/mask_m"] == 1].astype(np.float64)
    example, stored = dataset.splits["test"][4], arrays["test/m"][4]
    mask = example["m_mask"]
    assert mask.dtype == np.bool_ and mask.sum() == arrays["test/mask_m"][4].sum()
    assert not example["m"][~mask].any()
    expected = (stored[mask] - real.mean(axis=0)) / real.std(axis=0)
    np.testing.assert_allclose(example["m"][mask], expected, atol=1e-5)


def test_a_mask_of_examples_marks_a_missing_modality():
    arrays = make_arrays(m=((4, 5, 3), "float32"), n=((3,), "float32"))
    for split in ("train", "test"):
        arrays[f"{split}/mask_m"] = np.arange(len(arrays[f"{split}/m"])) % 4 > 0
        arrays[f"{split}/m"][::4] = np.inf
    example = from_arrays(arrays).splits["test"][0]
    assert example["m_mask"].shape == () and not example["m_mask"] and not example["m"].any()


def test_quality_and_class_names_pass_through(tmp_path):
    arrays = make_arrays()
    arrays["test/quality_audio"] = -np.arange(20)
    arrays["class_names"] = np.array(["a", "b", "c"])
    dataset = load(save(tmp_path / "d.npz", arrays), seed=0)
    assert dataset.splits["test"][7]["quality_audio"] == np.float32(-7)
    assert "quality_audio" not in dataset.splits["train"][0]
    assert dataset.class_names == ("a", "b", "c")


def test_valid_is_stratified_seeded_and_disjoint():
    arrays = make_arrays(num_train=203, num_classes=4)
    a, b = (from_arrays(arrays, seed=seed).splits for seed in (1, 1))
    other = from_arrays(arrays, seed=2).splits
    np.testing.assert_array_equal(a["valid"].indices, b["valid"].indices)
    assert a["valid"].indices.tolist() != other["valid"].indices.tolist()
    assert sorted([*a["valid"].indices, *a["train"].indices]) == list(range(203))
    assert np.bincount(labels_of(a["valid"])).tolist() == [5, 5, 5, 5]


@pytest.mark.parametrize(
    ("labels", "valid"),
    [([0] * 40 + [1] * 40 + [2], [4, 4, 0]), ([0, 0, 1, 1, 2], [1, 1, 0])],
)
def test_valid_with_classes_of_one_example(labels, valid):
    arrays = {
        "train/m": np.random.default_rng(0).normal(size=(len(labels), 2)),
        "train/label": np.array(labels),
        "test/m": np.zeros((1, 2)),
        "test/label": [0],
    }
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    splits = from_arrays(arrays).splits
    assert np.bincount(labels_of(splits["valid"]), minlength=3).tolist() == valid
    assert set(labels_of(splits["train"]).tolist()) == set(labels)
    single = arrays | {"train/m": np.zeros((2, 2)), "train/label": np.array([0, 1])}
    refuses(lambda: from_arrays(single), "single example", "valid/*")


def test_modalities_can_be_picked():
    arrays = make_arrays(a=((3,), "f4"), b=((4,), "f4"), c=((5,), "f4"))
    assert list(from_arrays(arrays, modalities=("c", "a")).modalities) == ["a", "c"]
    refuses(lambda: from_arrays(arrays, modalities=("d",)), "'d'", "a, b, c")


def changed(**changes):
    """Arrays with some keys (written with __ for /) replaced, or dropped where None."""
    arrays = make_arrays(audio=((7, 4), "float32"), ids=((5,), "int64"))
    for key, value in changes.items():
        key = key.replace("__", "/")
        if value is None:
            del arrays[key]
        else:
            arrays[key] = value(arrays.get(key)) if callable(value) else value
    return arrays


def put(index, value):
    def edit(array):
        array = array.copy()
        array[index] = value
        return array

    return edit


BAD = [
    (dict(test__label=None), "test/label", "missing"),
    (dict(test__audio=None), "test/audio", "missing"),
    (dict(train__audio=None, train__label=None, train__ids=None), "no train/*", "<modality>"),
    (dict(test__audio=lambda a: a[:-1]), "test/audio: 19 examples", "test/label has 20"),
    (dict(train__audio=put((5, 0, 1), np.nan)), "train/audio", "NaN", "example 5", "mask_audio"),
    (dict(test__audio=put((3, 0, 1), np.inf)), "test/audio", "infinite", "example 3"),
    (dict(train__audio=lambda a: a.astype("f8") * 1e300), "train/audio", "infinite"),
    (dict(train__label=put(3, -1)), "train/label", "-1"),
    (dict(train__label=put(3, 10**9)), "train/label", "1000000000"),
    (dict(test__label=put(3, 3)), "test/label", "3 never occurs in train/label"),
    (dict(train__label=lambda a: a - 2.0), "train/label", "-2", "set data.task to regression"),
    (dict(train__label=lambda a: a * np.nan), "train/label", "NaN"),
    (dict(train__label=lambda a: a.astype("U3")), "train/label", "<U3", "names"),
    (dict(train__label=lambda a: a.astype("c8")), "train/label", "complex64", "integers"),
    (dict(train__label=lambda a: a.astype("M8[s]")), "train/label", "datetime64", "integers"),
    (dict(train__label=lambda a: np.eye(3)[a]), "train/label", "[60, 3]", "argmax"),
    (dict(train__label=lambda a: np.eye(3, dtype=bool)[a]), "train/label", "argmax"),
    (dict(train__label=lambda a: a[:, None] + [0.2, 0.4]), "train/label", "0.2", "data.task"),
    (dict(train__label=lambda a: np.eye(3)[a] * (a > 0)[:, None]), "with data.task multi_label"),
    (dict(train__label=lambda a: np.stack([a, a], 1)), "train/label", "with data.task regression"),
    (dict(train__label=lambda a: a + np.where(a > 1, np.inf, 0.5)), "train/label", "infinite"),
    (dict(class_names=np.array(["a", "b", "a"])), "class_names", "'a' names class 0 and class 2"),
    (dict(class_names=np.array(["a", "b", "a "])), "class_names", "'a' names class 0 and class 2"),
    (dict(class_names=np.array(["a", " ", "c"])), "class_names", "class 1 is empty"),
    (dict(class_names=np.arange(3)), "class_names", "int64[3]", "strings"),
    (dict(train__group=np.arange(59)), "train/group: 59 examples", "train/label has 60"),
    (dict(train__group=np.arange(60.0)), "train/group", "float64[60]", "integers or strings"),
    (dict(train__id=np.array(["x", ""] * 30)), "train/id", "example 1"),
    (dict(train__speaker=np.arange(60.0)), "train/speaker: float64[60]", "train/group"),
    (dict(train__speaker=np.arange(60)), "train/speaker: int64[60]", "kind/speaker", "train/id"),
    (dict(train__speaker=np.array(["x"] * 60)), "train/speaker: <U1[60]", "data.modalities"),
    (dict(train__audio=lambda a: a.astype("M8[s]")), "train/audio", "datetime64[s]", "seconds"),
    (dict(train__audio=lambda a: a.view("V1")[..., 0]), "'train/audio'", "|V1", "float8"),
    (dict(train__audio=lambda a: a.view("V4")), "'train/audio'", "|V4", "raw bytes"),
    (dict(train__audio=lambda a: a.view([("x", "<f4")])), "'train/audio'", "structured array"),
    ({"train/a\x1b[31m": np.ones((60, 2))}, "'train/a\\x1b[31m'", "letters"),
    (dict(train__label=lambda a: a[:, None]), "train/label", "[60, 1]", "ravel"),
    (dict(train__label=lambda a: a * 0, test__label=lambda a: a * 0), "only the label 0"),
    (dict(test__audio=lambda a: a[:, :6]), "test/audio", "[6, 4]", "[7, 4]"),
    (dict(train__audio=lambda a: a.astype("c8")), "complex64"),
    (dict(train__audio=lambda a: a.astype("U4")), "<U4"),
    (dict(train__ids=put((0, 0), -4)), "train/ids", "-4", "float32"),
    (dict(test__ids=put((0, 0), 2 * 10**6)), "test/ids", "2000000"),
    (dict(train__audio=np.zeros((60, 2, 2, 2, 2, 2))), "at most 4 axes"),
    (dict(train__audio=np.zeros((60, 0, 2)), test__audio=np.zeros((20, 0, 2))), "length 0"),
    (dict(train__audio=np.float32(1)), "train/audio", "single number"),
    (dict(x_train=np.zeros(3)), "'x_train'", "train/<modality>"),
    (dict(tarin__audio=np.zeros(3)), "'tarin/audio'", "not known"),
    (dict(kind__audio=np.array("sound")), "'sound'", "spectrogram"),
    (dict(kind__audio=np.array("video")), "audio", "'video'", "4 axes"),
    (dict(kind__audio=np.array(3)), "kind/audio"),
    (dict(kind__text=np.array("tokens")), "'text'", "audio, ids"),
    (dict(kind__audio=np.array("tokens")), "audio"),
    (dict(train__mask_audio=np.ones((60, 7), bool)), "mask_audio", "all splits"),
    (dict(train__mask_audio=np.ones((60, 9), bool)), "train/mask_audio", "[60, 9]", "[60, 7]"),
    (dict(train__mask_audio=np.full((60, 7), 2)), "train/mask_audio", "0 and 1"),
    (dict(train__mask_text=np.ones((60, 7))), "train/mask_text", "no modality 'text'"),
    (dict(train__quality_audio=np.ones((60, 2))), "train/quality_audio", "one number"),
    (dict(train__quality_audio=np.full(60, np.nan)), "train/quality_audio", "NaN"),
    (dict(train__example=np.ones((60, 2))), "'example'"),
    (dict(class_names=np.array(["a", "b"])), "class_names", "2 names"),
    ({"train/bad name": np.ones((60, 2))}, "'bad name'", "letters"),
    (dict(train__a_mask=np.ones((60, 2))), "'a_mask'", "rename"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: ",".join(case[0]))
def test_mistakes_are_named(tmp_path, case):
    changes, *words = case
    config = save(tmp_path / "d.npz", changed(**changes))
    refuses(lambda: load(config, seed=0), *words)


def test_labels_of_whole_numbers_may_be_floats():
    arrays = make_arrays()
    as_floats = {k: a.astype("f8") if k.endswith("label") else a for k, a in arrays.items()}
    for split, source in from_arrays(as_floats).splits.items():
        expected = labels_of(from_arrays(arrays).splits[split])
        np.testing.assert_array_equal(labels_of(source), expected)


@pytest.mark.parametrize(
    ("label", "task", "found", "width"),
    [
        (lambda a: a + 0.5, "auto", "regression", 1),
        (lambda a: a[:, None] - 0.5, "auto", "regression", 1),
        (lambda a: a - 2, "regression", "regression", 1),
        (lambda a: a[:, None] + [0.2, 0.4], "regression", "regression", 2),
        (lambda a: a[:, None] < [1, 2], "auto", "multi_label", 2),
        (lambda a: np.eye(3)[a], "multi_label", "multi_label", 3),
        (lambda a: np.array(["dog|cat", "|", "ant;cat"])[a], "multi_label", "multi_label", 3),
    ],
)
def test_labels_of_other_tasks(label, task, found, width):
    arrays = {k: label(a) if k.endswith("label") else a for k, a in make_arrays().items()}
    dataset = from_arrays(arrays, task=task)
    assert (dataset.task, dataset.num_classes) == (found, width)
    again = from_arrays(arrays, task=task)
    for split, source in dataset.splits.items():
        labels = labels_of(source)
        assert labels.shape == (len(source), width)
        assert labels.dtype == (np.float32 if found == "regression" else np.int32)
        np.testing.assert_array_equal(source[1]["label"], labels[1])
        np.testing.assert_array_equal(labels, labels_of(again.splits[split]))
    train, valid = (labels_of(dataset.splits[s]) for s in ("train", "valid"))
    # 10 % of each stratum, here of each different label.
    for value in np.unique(train, axis=0):
        counts = [(labels == value).all(axis=1).sum() for labels in (train, valid)]
        assert counts[1] == pytest.approx(sum(counts) / 10, abs=1)


NAMES = np.array(["dog", "ant", "cat"])


@pytest.mark.parametrize("as_bytes", [False, True])
@pytest.mark.parametrize("order", [None, ("dog", "ant", "cat"), ("cat", "dog", "emu", "ant")])
def test_labels_may_be_names(tmp_path, as_bytes, order):
    arrays = make_arrays()
    names = {split: NAMES[arrays[f"{split}/label"]] for split in ("train", "test")}
    for split in names:
        arrays[f"{split}/label"] = names[split].astype("S") if as_bytes else names[split]
    if order:
        arrays["class_names"] = np.array(order)
    dataset = load(save(tmp_path / "d.npz", arrays), seed=0)
    assert dataset.class_names == (order or ("ant", "cat", "dog"))
    got = [dataset.class_names[label] for label in labels_of(dataset.splits["test"])]
    assert got == names["test"].tolist()


def test_names_that_do_not_fit_are_named():
    arrays = make_arrays()
    arrays |= {f"{split}/label": NAMES[arrays[f"{split}/label"]] for split in ("train", "test")}
    other = arrays | {"test/label": np.array(["ant", "yak"] * 10)}
    refuses(lambda: from_arrays(other), "test/label: 'yak' never occurs in train")
    order = arrays | {"class_names": np.array(["ant", "cat"])}
    refuses(lambda: from_arrays(order), "train/label: 'dog' is not in class_names")
    empty = arrays | {"train/label": np.array(["ant", ""] * 30)}
    refuses(lambda: from_arrays(empty), "train/label", "empty")
    numbers = arrays | {
        "train/label": np.array(["10", "2"] * 30),
        "test/label": np.array(["2"] * 20),
    }
    assert labels_of(from_arrays(numbers).splits["test"]).tolist() == [2] * 20  # as in a manifest


@pytest.mark.parametrize(
    ("labels", "names", "words"),
    [
        ([1, 2, 3], (), "labels 1 to 3: class 0 never occurs; the model gets 4 outputs for 3"),
        ([0, 99_999], (), "labels 0 and 99,999: 99,998 classes never occur"),
        ([0, 99_999], (), "the model gets 100,000 outputs for 2 classes"),
        ([0, 1, 3], (), "class 2 never occurs; the model gets 4 outputs"),
        ([0, 1], ("a", "b", "c"), "class 2 ('c') never occurs"),
        ([0, 1, 2], (), None),
    ],
)
def test_classes_that_never_occur_are_pointed_out(labels, names, words, caplog):
    arrays = make_arrays(num_classes=len(labels))
    for split in ("train", "test"):
        arrays[f"{split}/label"] = np.array(labels)[arrays[f"{split}/label"]]
    if names:
        arrays["class_names"] = np.array(names)
    from_arrays(arrays)
    assert [words in record.message for record in caplog.records] == ([True] if words else [])


def test_groups_and_ids_stand_beside_the_examples(tmp_path, caplog):
    arrays = make_arrays(num_train=90)
    speakers = np.array([f"s{n}" for n in np.random.default_rng(0).integers(0, 15, 90)])
    arrays |= {"train/group": speakers.astype("S"), "test/group": np.array(["s3", "x"] * 10)}
    arrays |= {"train/id": np.arange(90) + 1000, "test/id": np.arange(20)}
    splits = load(save(tmp_path / "d.npz", arrays), seed=0).splits
    assert set(splits["train"][0]) == {"audio", "visual", "label"}
    for split in ("train", "valid"):
        numbers = ids_of(splits[split]) - 1000
        np.testing.assert_array_equal(groups_of(splits[split]), speakers[numbers])
        np.testing.assert_array_equal(labels_of(splits[split]), numbers % 3)
    assert not set(groups_of(splits["train"])) & set(groups_of(splits["valid"]))
    (record,) = caplog.records
    assert "1 group stands in both train and test (such as 's3')" in record.message


@pytest.mark.parametrize("prefix", ["", "train/"])
def test_a_single_table_is_divided(tmp_path, prefix):
    given = make_arrays(num_train=100, num_test=1, num_classes=4)
    arrays = {
        prefix + key.removeprefix("train/"): array
        for key, array in given.items()
        if key.startswith("train/")
    }
    arrays[f"{prefix}quality_audio"] = -np.arange(100.0)
    arrays[f"{prefix}group"] = np.arange(100) // 5
    config = save(tmp_path / "d.npz", arrays)
    splits, other = load(config, seed=0).splits, load(config, seed=1).splits
    assert {name: len(source) for name, source in splits.items()} == {
        "train": 70,
        "valid": 10,
        "test": 20,
    }
    groups = [set(groups_of(source)) for source in splits.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 20
    rows = {n: [-s[i]["quality_audio"] for i in range(len(s))] for n, s in splits.items()}
    assert sorted(sum(rows.values(), [])) == list(range(100))
    assert rows["test"] == [-other["test"][i]["quality_audio"] for i in range(20)]
    assert labels_of(splits["test"]).tolist() == [row % 4 for row in rows["test"]]


def test_splits_and_a_single_table_do_not_mix(tmp_path):
    config = save(tmp_path / "d.npz", make_arrays() | {"extra": np.ones((60, 2))})
    refuses(lambda: load(config, seed=0), "'extra'", "not known")


def test_one_number_an_example_is_a_modality_where_it_is_said_to_be():
    arrays = make_arrays(m=((3,), "float32"), age=((), "float32"))
    assert list(from_arrays(arrays, modalities=("m",)).modalities) == ["m"]
    for said in (
        from_arrays(arrays, kinds={"age": "vector"}),
        from_arrays(arrays, modalities=("age", "m")),
        from_arrays(arrays | {"kind/age": np.array("vector")}),
    ):
        assert said.modalities["age"].shape == (1,)


@pytest.mark.parametrize("folder", [False, True])
def test_bfloat16_is_read_as_it_is(tmp_path, folder):
    arrays = make_arrays(m=((5, 2), "float32"))
    short = {key: a.astype(jnp.bfloat16) if "m" in key else a for key, a in arrays.items()}
    config = save(tmp_path / "d.npz", short)
    if folder:
        for key, array in short.items():
            (tmp_path / "d" / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(tmp_path / "d" / f"{key}.npy", array)
        config = {"path": str(tmp_path / "d")}
    dataset = load(config, seed=0)
    as_floats = {key: np.asarray(a, np.float32) if "m" in key else a for key, a in short.items()}
    expected = from_arrays(as_floats, seed=0)
    assert dataset.preprocessing == expected.preprocessing
    for index in range(20):
        np.testing.assert_array_equal(
            dataset.splits["test"][index]["m"], expected.splits["test"][index]["m"]
        )


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        ((3, 8, 9), "9 channels last; if the channels come first"),
        ((5, 3, 8, 9), "9 channels last"),
        ((3000,), "3000 numbers become one token; if it is a waveform"),
        ((8, 9, 3), None),
        ((3, 9, 3), None),
        ((300, 5), None),
    ],
)
def test_doubtful_shapes_give_a_warning(shape, words, caplog):
    arrays = make_arrays(num_train=20, num_test=4, m=(shape, "float32"))
    info = from_arrays(arrays).modalities["m"]
    assert [words in record.message for record in caplog.records] == ([True] if words else [])
    caplog.clear()
    from_arrays(arrays, kinds={"m": info.kind})  # stated: no doubt
    assert not caplog.records


def test_a_mask_of_positions_needs_positions():
    arrays = make_arrays(m=((4, 5, 3), "float32"))
    for split in ("train", "test"):
        arrays[f"{split}/mask_m"] = np.ones(arrays[f"{split}/m"].shape[:2], bool)
    refuses(lambda: from_arrays(arrays), "mask_m", "'image'", "[N]")


def test_missing_and_foreign_files(tmp_path, monkeypatch):
    refuses(lambda: load({"path": ""}, seed=0), "data.path: not given")
    monkeypatch.chdir(tmp_path)
    refuses(lambda: load({"path": "."}, seed=0), "data.path: .: the folder holds no .npy")
    refuses(lambda: load({"path": str(tmp_path / "a.npz")}, seed=0), "no such file")
    refuses(lambda: load({"path": str(tmp_path)}, seed=0), "no .npy files")
    refuses(lambda: load({"path": 3}, seed=0), "data.path", "3", error=ConfigError)
    np.save(tmp_path / "one.npy", np.zeros(3))
    refuses(lambda: load({"path": str(tmp_path / "one.npy")}, seed=0), "a single array")
    (tmp_path / "empty.npz").write_bytes(b"")
    refuses(lambda: load({"path": str(tmp_path / "empty.npz")}, seed=0), "damaged")
    good = tmp_path / "good.npz"
    save(good, make_arrays())
    (tmp_path / "cut.npz").write_bytes(good.read_bytes()[:-200])
    refuses(lambda: load({"path": str(tmp_path / "cut.npz")}, seed=0), "cut.npz", "damaged")


class Hostile:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_refused_and_not_run(tmp_path):
    bomb = tmp_path / "bomb"
    objects = make_arrays() | {"train/audio": np.array([Hostile(bomb)] * 60, object)}
    config = save(tmp_path / "d.npz", objects)
    refuses(lambda: load(config, seed=0), "train/audio", "Python objects", "refused")
    plain = tmp_path / "p.npz"
    plain.write_bytes(pickle.dumps(Hostile(bomb)))
    refuses(lambda: load({"path": str(plain)}, seed=0), "p.npz", "refused")
    (tmp_path / "f" / "train").mkdir(parents=True)
    np.save(tmp_path / "f" / "train" / "audio.npy", objects["train/audio"], allow_pickle=True)
    refuses(lambda: load({"path": str(tmp_path / "f")}, seed=0), "train/audio", "refused")
    assert not bomb.exists()


def test_member_names_cannot_leave_anything_behind(tmp_path):
    path = tmp_path / "inner" / "d.npz"
    path.parent.mkdir()
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((60, 2)))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../train/audio.npy", buffer.getvalue())
    refuses(lambda: load({"path": str(path)}, seed=0), "'../train/audio'", "not known")
    assert [p.name for p in tmp_path.rglob("*")] == ["inner", "d.npz"]


@settings(max_examples=150, deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x93NUMPY\x01\x00", b"\x80\x04"]),
)
def test_any_bytes_raise_only_data_errors(tmp_path_factory, data, start):
    path = tmp_path_factory.getbasetemp() / "fuzzed.npz"
    path.write_bytes(start + data)
    with pytest.raises(DataError):
        load({"path": str(path)}, seed=0)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_damaged_archive_raises_only_data_errors(tmp_path_factory, data):
    """Bytes flipped anywhere: the checksum of the zip finds it, or the checks here, or it reads."""
    buffer = io.BytesIO()
    np.savez(buffer, **make_arrays(num_train=12, num_test=6, a=((2,), "float32")))
    content = bytearray(buffer.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        where = data.draw(st.integers(0, len(content) - 1))
        content[where] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "flipped.npz"
    path.write_bytes(bytes(content))
    try:
        load({"path": str(path)}, seed=0)
    except DataError as error:
        assert "\n" not in str(error)


@settings(max_examples=100, deadline=None)
@given(
    header=st.text(max_size=80),
    body=st.binary(max_size=40),
)
def test_any_array_header_raises_only_data_errors(tmp_path_factory, header, body):
    text = header.encode("latin1", "replace")
    member = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + body
    path = tmp_path_factory.getbasetemp() / "header.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train/audio.npy", member)
    with pytest.raises(DataError):
        load({"path": str(path)}, seed=0)


def save_member(path, name, descr, shape, body=b"", level=9):
    """An archive of one array whose header says what it likes."""
    head = io.BytesIO()
    header = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(head, header)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=level) as archive:
        with archive.open(name, "w", force_zip64=True) as file:
            file.write(head.getvalue())
            for _ in range(8):
                file.write(body)
    return {"path": str(path)}


@pytest.mark.parametrize(
    ("name", "descr", "words"),
    [
        ("x/train.npy", "<f4", "not known"),
        ("train/audio.npy", "|O", "refused"),
        ("train/audio.npy", "<M8[s]", "label: missing"),
        ("train/audio", "<f4", "not an array"),
    ],
)
def test_what_is_wrong_is_seen_before_anything_is_unpacked(tmp_path, name, descr, words):
    body = bytes(2**24)
    items = 8 * len(body) // np.dtype(descr).itemsize
    config = save_member(tmp_path / "d.npz", name, descr, (items // 4, 4), body)
    tracemalloc.start()
    try:
        refuses(lambda: load(config, seed=0), words)
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("shape", [(2**40, 2), (2, 3), (10**30,), (-1, -8)])
def test_an_array_that_claims_another_size_is_refused(tmp_path, shape):
    config = save_member(tmp_path / "d.npz", "train/audio.npy", "<f4", shape, b"1234")
    refuses(lambda: load(config, seed=0), "'train/audio'", "damaged")


def test_more_than_the_memory_is_refused(tmp_path, monkeypatch):
    config = save(tmp_path / "d.npz", make_arrays())
    memory = {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": 2000}
    monkeypatch.setattr(os, "sysconf", memory.get)
    refuses(lambda: load(config, seed=0), "GiB", "memory", "folder of .npy")


def test_a_git_lfs_pointer_is_named(tmp_path):
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"
    (tmp_path / "d.npz").write_bytes(pointer)
    refuses(lambda: load({"path": str(tmp_path / "d.npz")}, seed=0), "git lfs pull")
    (tmp_path / "f" / "train").mkdir(parents=True)
    (tmp_path / "f" / "train" / "m.npy").write_bytes(pointer)
    refuses(lambda: load({"path": str(tmp_path / "f")}, seed=0), "git lfs pull")


def test_an_archive_with_two_arrays_of_a_name_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive, pytest.warns(UserWarning):
        archive.writestr("train/m.npy", b"")
        archive.writestr("train/m.npy", b"")
    refuses(lambda: load({"path": str(tmp_path / "d.npz")}, seed=0), "two arrays", "train/m")


@pytest.fixture
def blocks_read(monkeypatch):
    """The numbers of the blocks of values that are read in order to check or to measure them."""
    read, blocks = [], module._blocks

    def counted(array):
        for start, block in blocks(array):
            read.append(start)
            yield start, block

    monkeypatch.setattr(module, "_blocks", counted)
    return read


@pytest.mark.parametrize("folder", [True, False])
def test_measurements_are_kept(tmp_path, monkeypatch, blocks_read, folder):
    monkeypatch.setattr(module, "LARGE", 1)
    arrays = make_arrays(m=((7, 4), "float32"), t=((5,), "int64"), v=((4, 4, 3), "uint8"))
    path = tmp_path / ("d" if folder else "d.npz")

    def write():
        if not folder:
            save(path, arrays)
        for key, array in arrays.items() if folder else ():
            (path / key).parent.mkdir(parents=True, exist_ok=True)
            np.save(path / f"{key}.npy", array)

    def loaded(**fields):
        blocks_read.clear()
        config = {"path": str(path), "cache_dir": str(tmp_path / "cache")} | fields
        return load(config, seed=0), len(blocks_read)

    write()
    first, num_first = loaded()
    again, num_again = loaded()
    assert num_first and not num_again
    assert again.preprocessing == first.preprocessing and again.modalities == first.modalities
    for index in range(20):
        for key, value in first.splits["test"][index].items():
            np.testing.assert_array_equal(again.splits["test"][index][key], value)
    for fields in ({"standardize": False}, {"modalities": "m"}, {"kinds": "t=vector"}):
        other, read = loaded(**fields)
        assert read and other.preprocessing != first.preprocessing
        assert loaded(**fields)[1] == 0
    for file in (tmp_path / "cache").rglob("*.json"):
        file.write_bytes(file.read_bytes()[:-5])
    mended, read = loaded()
    assert read == num_first and mended.preprocessing == first.preprocessing
    arrays["train/m"][3] += 1
    write()
    changed, read = loaded()
    assert read and changed.preprocessing["m"].mean != first.preprocessing["m"].mean


def test_a_cache_that_cannot_be_written_does_not_matter(tmp_path):
    np.savez(tmp_path / "unpack.npz", **make_arrays())
    with zipfile.ZipFile(tmp_path / "unpack.npz") as archive:
        archive.extractall(tmp_path / "d")
    (tmp_path / "cache").write_text("a file")
    config = {"path": str(tmp_path / "d"), "cache_dir": str(tmp_path / "cache")}
    assert len(load(config, seed=0).splits["test"]) == 20


def test_labels_of_any_source():
    source = ArraySource({"m": np.zeros((3, 2)), "label": np.array([2, 0, 1])})
    assert labels_of(source).tolist() == [2, 0, 1]
    assert labels_of([{"label": np.int32(4)}, {"label": np.int32(1)}]).tolist() == [4, 1]


@pytest.mark.parametrize(
    ("dtypes", "raw"),
    [((">f4", "<f4"), "float32"), ((">i2", ">i2"), "int16"), (("int32", "float64"), "float64")],
)
def test_the_raw_dtype_holds_every_splits_values_in_this_machines_order(dtypes, raw):
    arrays = make_arrays(m=((4, 5), "float32"))
    for split, dtype in zip(("train", "test"), dtypes, strict=True):
        arrays[f"{split}/m"] = arrays[f"{split}/m"].astype(dtype)
    found = from_arrays(arrays, kinds={"m": "sequence"}).preprocessing["m"].raw_dtype
    assert found == raw
