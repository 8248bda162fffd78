"""Automatic splits: groups whole, sizes near their fractions, every label left in train."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.data.dataset import (
    ArraySource,
    Subset,
    check_tags,
    complete_splits,
    groups_of,
    hold_out_groups,
    ids_of,
    labels_of,
    stratified_split,
    warn_of_shared_groups,
    with_test,
    with_valid,
)
from rollingq_jax.data.preprocessing import Preprocessed
from rollingq_jax.errors import DataError


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
    inner = Subset(Preprocessed(Subset(source, [2, 0, 1]), {}), [2, 0])
    assert groups_of(inner).tolist() == ["b", "c"] and ids_of(inner).tolist() == [8, 9]
    assert groups_of(Subset(make_source([0]), [0])) is None and ids_of([{}]) is None


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
