"""A data set: its types, automatic splits, fingerprint, and the model that its shapes suggest."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.data.dataset import (
    MAX_TOKENS,
    SAMPLED,
    ArraySource,
    Changed,
    Dataset,
    ModalityInfo,
    Source,
    Subset,
    check_tags,
    complete_splits,
    fingerprint,
    first_difference,
    groups_of,
    hold_out_groups,
    ids_of,
    infer_encoders,
    infer_model,
    infer_patch,
    labels_of,
    num_tokens,
    stratified_split,
    warn_of_shared_groups,
    with_test,
    with_valid,
    without_valid,
)
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.sources.arrays import from_arrays
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import build_model


def test_modalities_are_checked_and_in_alphabetical_order():
    with pytest.raises(DataError, match="kind 'smell' is not one of"):
        ModalityInfo("nose", "smell", (3,))
    with pytest.raises(DataError, match="'visual'.*4 axes"):
        ModalityInfo("visual", "video", (8, 8, 3))
    infos = {n: ModalityInfo(n, "vector", (3,)) for n in ("visual", "audio")}
    source = ArraySource({"label": np.zeros(2, np.int32)})
    dataset = Dataset({"train": source, "test": source}, infos, num_classes=2)
    assert list(dataset.modalities) == ["audio", "visual"]
    with pytest.raises(DataError, match="class_names: 1 names for 2 classes"):
        Dataset({}, infos, num_classes=2, class_names=("a",))


def test_sources_fit_the_protocol():
    source = ArraySource({"label": np.zeros(2, np.int32)})
    assert isinstance(source, Source)
    assert isinstance(Subset(source, [0]), Source)


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.6, 0.15, 0.25)])
def test_a_stratified_split_divides_every_class_in_proportion(fractions):
    labels = np.random.default_rng(0).integers(0, 7, 500)
    parts = stratified_split(labels, fractions, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(500))
    for part, fraction in zip(parts, fractions, strict=True):
        assert (np.diff(part) > 0).all()
        for label in range(7):
            want = fraction * (labels == label).sum()
            assert abs((labels[part] == label).sum() - want) <= 1
    again, other = (stratified_split(labels, fractions, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])


def make_source(labels, groups=None, ids=None):
    source = ArraySource({"label": np.asarray(labels, np.int32)})
    source.groups, source.ids = groups, ids
    return source


def divide(labels, groups=None, *, seed=0):
    """Train, valid and test of one table, by nothing but the public functions."""
    return complete_splits({"train": make_source(labels, groups)}, seed=seed)


def spare(labels, groups):
    """The groups without which every label still occurs, by taking each away in turn."""
    return [g for g in set(groups) if set(labels[groups != g]) == set(labels)]


@settings(max_examples=120, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_examples=st.integers(2, 120),
    num_groups=st.integers(1, 40),
    num_classes=st.integers(2, 6),
    names=st.booleans(),
)
def test_a_group_never_stands_on_two_sides(seed, num_examples, num_groups, num_classes, names):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, num_classes, num_examples).astype(np.int32)
    groups = rng.integers(-3, num_groups - 3, num_examples)
    if names:
        groups = np.char.add("speaker ", groups.astype(str))
    try:
        valid = with_valid({"train": make_source(labels, groups)}, seed=seed)
    except DataError:
        assert not spare(labels, groups)
        return
    train, valid = valid["train"], valid["valid"]
    assert sorted([*train.indices, *valid.indices]) == list(range(num_examples))
    assert len(valid) and not set(groups_of(train)) & set(groups_of(valid))
    assert set(labels_of(train)) == set(labels)
    try:
        splits = divide(labels, groups, seed=seed)
    except DataError:
        return
    seen = [set(groups_of(source)) for source in splits.values()]
    assert list(splits) == ["train", "valid", "test"] and all(map(len, splits.values()))
    assert sum(map(len, seen)) == len(set(groups)) and sum(map(len, splits.values())) == len(labels)
    assert set(labels_of(splits["train"])) == set(labels)


@pytest.mark.parametrize("seed", range(5))
def test_the_size_is_as_near_to_the_fraction_as_groups_allow(seed):
    labels = np.arange(100) % 2
    for sizes, best in (
        ([5] * 20, 10),
        ([19] + [1] * 81, 10),
        ([50, 50], 50),
        ([93, 7], 7),
        ([30, 30, 30, 4, 3, 3], 10),
        ([1] * 100, 10),
    ):
        groups = np.repeat(np.arange(len(sizes)), sizes)
        assert len(hold_out_groups(labels, groups, 0.1, seed=seed)) == best


@pytest.mark.parametrize("seed", range(5))
def test_classes_keep_their_shares_where_groups_allow(seed):
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat([0, 1, 2], [600, 300, 100]))
    groups = rng.integers(0, 100, 1000)
    chosen = hold_out_groups(labels, groups, 0.2, seed=seed)
    np.testing.assert_allclose(np.bincount(labels[chosen]), [120, 60, 20], atol=6)
    again, other = (hold_out_groups(labels, groups, 0.2, seed=s) for s in (seed, seed + 1))
    assert chosen.tolist() == again.tolist() != other.tolist()


def test_groups_of_one_label_each_are_taken_from_several_labels():
    groups = np.arange(20).repeat(5)
    labels = groups % 4  # as patients, of whom each has one diagnosis
    chosen = hold_out_groups(labels, groups, 0.2, seed=0)
    assert np.bincount(labels[chosen]).tolist() == [5, 5, 5, 5]


def test_what_is_left_for_validation_is_thought_of_when_the_test_is_chosen():
    labels, groups = np.array([0, 1, 0, 1]), np.array(["a", "b", "c", "c"])
    # Without c, neither a nor b could be spared.
    assert {name: len(source) for name, source in divide(labels, groups).items()} == {
        "train": 2,
        "valid": 1,
        "test": 1,
    }


def test_many_groups_take_little_time():
    rng = np.random.default_rng(0)
    labels, groups = rng.integers(0, 50, 50_000), rng.integers(0, 20_000, 50_000)
    assert abs(len(hold_out_groups(labels, groups, 0.1, seed=0)) - 5000) < 100


@pytest.mark.parametrize(
    ("groups", "words"),
    [(np.zeros(6, int), "a single group"), (np.array([0, 0, 0, 1, 1, 1]), "a label of its own")],
)
def test_groups_that_cannot_be_parted_are_named(groups, words):
    labels = np.array([0, 0, 0, 1, 1, 1])
    with pytest.raises(DataError, match=rf"train/group: .*{words}.*give valid/\*"):
        with_valid({"train": make_source(labels, groups)}, seed=0)
    with pytest.raises(DataError, match=r"give test/\*"):
        with_test({"train": make_source(labels, groups)})


def test_without_groups_a_table_is_divided_class_by_class():
    labels = np.repeat([0, 1, 2], [50, 30, 1]).astype(np.int32)
    splits = divide(labels, seed=3)
    assert np.bincount(labels_of(splits["test"]), minlength=3).tolist() == [10, 6, 0]
    assert np.bincount(labels_of(splits["valid"]), minlength=3).tolist() == [4, 2, 0]
    assert np.bincount(labels_of(splits["train"])).tolist() == [36, 22, 1]
    other = divide(labels, seed=4)
    assert other["test"].indices.tolist() == splits["test"].indices.tolist()
    assert other["valid"].indices.tolist() != splits["valid"].indices.tolist()
    train, valid = stratified_split(labels, [0.9, 0.1], seed=3)
    whole = with_valid({"train": make_source(labels)}, seed=3)
    assert whole["valid"].indices.tolist() == valid.tolist()
    assert whole["train"].indices.tolist() == train.tolist()


def test_tags_are_found_behind_subsets_and_wrappers():
    source = make_source([0, 1, 2], np.array(["a", "b", "c"]), np.array([7, 8, 9]))
    inner = Subset(Changed(Subset(source, [2, 0, 1]), lambda example, _: example), [2, 0])
    assert groups_of(inner).tolist() == ["b", "c"] and ids_of(inner).tolist() == [8, 9]
    assert groups_of(Subset(make_source([0]), [0])) is None and ids_of([{}]) is None


def test_the_validation_part_can_be_trained_on():
    train = make_source([0, 1, 2], np.array(["a", "b", "c"]), np.array([7, 8, 9]))
    parts = {"train": Subset(train, [2, 0]), "valid": Subset(train, [1]), "test": train}
    info = ModalityInfo("a", "vector", (5,))
    joined = without_valid(Dataset(parts, {"a": info}, 3))
    whole = joined.splits["train"]
    assert list(joined.splits) == ["train", "test"] and len(whole) == 3
    assert [whole[i]["label"] for i in range(3)] == labels_of(whole).tolist() == [2, 0, 1]
    assert groups_of(whole).tolist() == ["c", "a", "b"] and ids_of(whole).tolist() == [9, 7, 8]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array(["x", "yy"]), ["x", "yy"]),
        (np.array([b"x", "ü".encode(), b"\xff"]), ["x", "ü", "\\xff"]),
        (np.array([3, 4], np.uint8), [3, 4]),
    ],
)
def test_tags_are_integers_or_strings(values, expected):
    assert check_tags(values, "train/group").tolist() == expected


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (np.array([0.5, 1]), "float64"),
        (np.zeros((2, 1), int), r"\[2, 1\]"),
        (np.array(["a", ""]), "example 1"),
        (np.array([2**64 - 1], np.uint64), "too large"),
        (np.array([True]), "bool"),
    ],
)
def test_other_tags_are_refused(values, words):
    with pytest.raises(DataError, match=f"^train/group: .*{words}"):
        check_tags(values, "train/group")


def test_groups_in_two_splits_are_counted(caplog):
    groups = {"train": ["a", "b", "c"], "valid": ["d"], "test": ["c", "b", "e"]}
    warn_of_shared_groups({split: np.array(names) for split, names in groups.items()})
    (record,) = caplog.records
    assert "2 groups stand in both train and test (such as 'b')" in record.message


def made(seed=0, count=20, **columns):
    rng = np.random.default_rng(seed)
    split = {"a": rng.normal(size=(count, 5)).astype(np.float32), "label": np.arange(count) % 3}
    splits = {name: ArraySource(split | columns) for name in ("train", "test")}
    return Dataset(splits, {"a": ModalityInfo("a", "vector", (5,))}, 3)


def test_numbers_are_mean_absolute_values_of_evenly_spaced_examples():
    values = np.arange(71, dtype=np.float32)[:, None] * np.array([1, -1, 1, -1, 1.0])
    found = fingerprint(made(count=71, a=values))["train"]
    assert found["a"] == list(range(0, 71, 2)) and len(found["a"]) == SAMPLED
    assert found["label"] == [place % 3 for place in found["a"]]


def test_labels_are_hashed_whole():
    """SHA-256 of 0, 1, 2, 0, ... as little-endian int32."""
    expected = hashlib.sha256(b"".join(bytes([n % 3, 0, 0, 0]) for n in range(1000))).hexdigest()
    assert fingerprint(made(count=1000))["test"]["label/sha256"] == expected


def changed(data, split, places):
    """The data with the labels of some places moved on by one."""
    labels = data.splits[split].columns["label"].copy()
    labels[places] = (labels[places] + 1) % 3
    splits = data.splits | {split: ArraySource(data.splits[split].columns | {"label": labels})}
    return dataclasses.replace(data, splits=splits)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("place", [1, 437, 998])
def test_one_label_of_many_that_has_changed(split, place):
    ours = fingerprint(made(count=1000))
    other = fingerprint(changed(made(count=1000), split, [place]))
    assert first_difference(ours, json.loads(json.dumps(other))) == f"{split}/label"


def test_labels_of_part_of_another_source_and_of_a_wrapped_one():
    class Wrapped:
        def __init__(self, source):
            self.source = source

        def __len__(self):
            return len(self.source)

        def __getitem__(self, index):
            return self.source[index]

    class Unknown(Wrapped):
        def __len__(self):
            return len(self.source) - 1  # its labels are not those of the source, place by place

    data = made(count=50)
    places = np.arange(0, 50, 3)  # all of class 0
    expected = hashlib.sha256(bytes(4 * len(places))).hexdigest()
    subset = Subset(Wrapped(data.splits["train"]), places)
    splits = {"train": subset, "test": Unknown(data.splits["test"])}
    found = fingerprint(dataclasses.replace(data, splits=splits))
    assert found["train"]["label/sha256"] == expected and "label/sha256" not in found["test"]


@pytest.mark.parametrize("count", [0, 1, 3, 8, 20, 35, 36, 37, 200])
def test_records_of_earlier_versions_are_compared_by_their_own_rule(count):
    """Eight examples at i (N - 1) // 7, and no hash."""
    places = sorted({i * (count - 1) // 7 for i in range(8)} if count else ())

    def earlier(data):
        return {
            split: {
                "a": [float(np.abs(source.columns["a"][p]).mean()) for p in places],
                "label": [float(source.columns["label"][p]) for p in places],
            }
            if places
            else {}
            for split, source in data.splits.items()
        }

    data = made(count=count)
    assert first_difference(fingerprint(data), earlier(data)) == ""
    if count > 3:
        assert first_difference(fingerprint(data), earlier(changed(data, "test", [places[1]])))
        assert first_difference(fingerprint(data), earlier(made(seed=1, count=count))) == "test/a"


@pytest.mark.parametrize(
    "odd", [[], None, {"train": 3}, {"train": {"a": "x"}}, {"train": {"a": [None], "label": {}}}]
)
def test_a_record_of_odd_content_is_of_other_data(odd):
    assert first_difference(fingerprint(made()), odd) != ""


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_examples(count):
    found = fingerprint(made(count=count))["test"]
    assert all(len(values) == count for name, values in found.items() if "/" not in name)


def test_through_json_and_with_other_last_bits_it_is_the_same():
    ours = fingerprint(made())
    values = made().splits["train"].columns["a"] * np.float32(1 + 1e-6)
    assert first_difference(ours, json.loads(json.dumps(fingerprint(made(a=values))))) == ""


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (made(seed=1), "test/a"),
        (made(label=np.arange(20) % 2), "test/label"),
        (made(a_mask=np.ones(20, bool)), "test/a_mask"),
    ],
)
def test_what_differs_is_named(other, where):
    assert first_difference(fingerprint(made()), fingerprint(other)) == where


def test_encoded_frames():
    def frames(*contents):
        data = made()
        source = [{"v": list(contents), "label": np.int32(0)}]
        return fingerprint(Dataset({"train": source}, data.modalities, 3))

    assert frames(b"\x02\x04", b"\x06")["train"]["v"] == [4.0]
    assert first_difference(frames(b"ab", b"c"), frames(b"ab", b"z")) == "train/v"


@pytest.mark.parametrize(
    ("kind", "shape", "patch"),
    [
        ("image", (28, 28, 1), (4, 4)),
        ("image", (8, 8, 1), (2, 2)),
        ("image", (32, 32, 3), (4, 4)),
        ("image", (1, 50, 3), (1, 2)),
        ("image", (1, 1, 3), (1, 1)),
        ("spectrogram", (20, 200, 1), (10, 10)),
        ("video", (3, 224, 224, 3), (1, 28, 28)),
        ("video", (8, 64, 64, 3), (1, 16, 16)),
        ("sequence", (50, 35), None),
        ("tokens", (50,), None),
        ("vector", (50,), None),
    ],
)
def test_patches(kind, shape, patch):
    assert infer_patch(ModalityInfo("m", kind, shape)) == patch


@pytest.mark.parametrize("kind", ["image", "spectrogram", "video"])
def test_there_are_some_tokens_and_not_too_many(kind):
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 1200, 2).tolist()
        shape = (height, width, 1) if kind != "video" else (5, height, width, 1)
        info = ModalityInfo("m", kind, shape)
        patch = infer_patch(info)
        assert 1 <= num_tokens(info, patch) <= MAX_TOKENS[kind]


def test_a_long_video_keeps_one_patch_a_frame():
    info = ModalityInfo("m", "video", (300, 20, 20, 3))
    assert num_tokens(info, infer_patch(info)) == 300


INFO = {
    "audio": ModalityInfo("audio", "spectrogram", (32, 32, 1)),
    "visual": ModalityInfo("visual", "image", (8, 8, 1), "uint8", mean=(0.5,), std=(0.2,)),
}


def test_overrides_win_field_by_field():
    encoders = infer_encoders(INFO, {"visual": {"patch": (8, 8), "depth": 3, "mean": None}})
    assert encoders["visual"] == {
        "kind": "image", "patch": (8, 8), "depth": 3, "mean": (0.5,), "std": (0.2,),
    }  # fmt: skip
    assert encoders["audio"] == {"kind": "spectrogram", "patch": (4, 4)}
    assert infer_encoders(INFO, {"audio": {"kind": "image"}})["audio"]["kind"] == "image"


def test_impossible_overrides():
    with pytest.raises(ConfigError, match="model.encoders.text.*audio, visual"):
        infer_encoders(INFO, {"text": {}})
    with pytest.raises(ConfigError, match="model.encoders.audio.kind.*2 axes"):
        infer_encoders(INFO, {"audio": {"kind": "sequence"}})


def make_dataset():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 9)):
        arrays |= {
            f"{split}/label": np.arange(count) % 3,
            f"{split}/clip": rng.integers(0, 255, (count, 2, 9, 8, 3)).astype("u1"),
            f"{split}/photo": rng.integers(0, 255, (count, 9, 8)).astype("u1"),
            f"{split}/sound": rng.normal(size=(count, 12, 9, 1)),
            f"{split}/steps": rng.normal(size=(count, 6, 5)),
            f"{split}/mask_steps": rng.integers(0, 2, (count, 6)),
            f"{split}/table": rng.normal(size=(count, 4)) * 1e5,
            f"{split}/words": rng.integers(0, 20, (count, 7)),
        }
    return from_arrays(arrays)


def test_every_kind_runs_in_the_inferred_model():
    dataset = make_dataset()
    fields = infer_model(dataset, {"dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0})
    assert fields["num_classes"] == 3
    model = build_model(fields)
    batch = next(iter(eval_batches(dataset.splits["test"], batch_size=4)))
    (logits, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    assert logits.shape == (4, 3)
    assert sorted(out["tokens"]) == ["clip", "photo", "sound", "steps", "table", "words"]
    for name, info in dataset.modalities.items():
        expected = 1 + num_tokens(info, fields["encoders"][name].get("patch"))
        assert out["tokens"][name].shape[1] == expected


def test_model_overrides():
    dataset = make_dataset()
    assert infer_model(dataset)["dim"] == 64
    fields = infer_model(dataset, {"dropout": 0.0, "num_classes": 5, "modality": None})
    assert fields["dropout"] == 0.0 and fields["num_classes"] == 5 and "modality" not in fields
    with pytest.raises(ConfigError, match="model.num_classes: 2; the data have 3"):
        infer_model(dataset, {"num_classes": 2})
