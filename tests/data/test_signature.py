"""Other data of the same shapes are told apart; the same data are not, on another machine too."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest

from rollingq_jax.data.dataset import (
    SAMPLED,
    ArraySource,
    Dataset,
    ModalityInfo,
    Subset,
    fingerprint,
    first_difference,
)


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
