"""Other data of the same shapes are told apart; the same data are not, on another machine too."""

import json

import numpy as np
import pytest

from rollingq_jax.data.signature import SAMPLED, difference, signature
from rollingq_jax.data.types import ArraySource, Dataset, ModalityInfo


def made(seed=0, count=20, **columns):
    rng = np.random.default_rng(seed)
    split = {"a": rng.normal(size=(count, 5)).astype(np.float32), "label": np.arange(count) % 3}
    splits = {name: ArraySource(split | columns) for name in ("train", "test")}
    return Dataset(splits, {"a": ModalityInfo("a", "vector", (5,))}, 3)


def test_numbers_are_mean_absolute_values_of_evenly_spaced_examples():
    data = made(a=np.arange(20, dtype=np.float32)[:, None] * np.array([1, -1, 1, -1, 1.0]))
    found = signature(data)["train"]
    assert found["a"] == [0, 2, 5, 8, 10, 13, 16, 19] and len(found["a"]) == SAMPLED
    assert found["label"] == [place % 3 for place in found["a"]]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_few_examples(count):
    found = signature(made(count=count))["test"]
    assert all(len(numbers) == count for numbers in found.values())


def test_through_json_and_with_other_last_bits_it_is_the_same():
    ours = signature(made())
    values = made().splits["train"].columns["a"] * np.float32(1 + 1e-6)
    assert difference(ours, json.loads(json.dumps(signature(made(a=values))))) == ""


@pytest.mark.parametrize(
    ("other", "where"),
    [
        (made(seed=1), "test/a"),
        (made(label=np.arange(20) % 2), "test/label"),
        (made(a_mask=np.ones(20, bool)), "test/a_mask"),
    ],
)
def test_what_differs_is_named(other, where):
    assert difference(signature(made()), signature(other)) == where


def test_encoded_frames():
    def frames(*contents):
        data = made()
        source = [{"v": list(contents), "label": np.int32(0)}]
        return signature(Dataset({"train": source}, data.modalities, 3))

    assert frames(b"\x02\x04", b"\x06")["train"]["v"] == [4.0]
    assert difference(frames(b"ab", b"c"), frames(b"ab", b"z")) == "train/v"
