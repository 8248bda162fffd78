"""Checks of labels, groups and names; validation and test splits for data that have none."""

import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollingq_jax.data.splits import hold_out_groups, stratified_split
from rollingq_jax.data.types import ArraySource, Source, Subset
from rollingq_jax.errors import DataError

MAX_CLASSES = 100_000
VALID_FRACTION = 0.1
TEST_FRACTION = 0.2
RESERVED_NAMES = ("example", "group", "id", "label", "split")


def check_name(name: str, where: str) -> str:
    """The modality's name, if it can be a key of a batch and of a configuration.

    Raises:
      DataError: it is not an identifier, or means something else in a batch.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise DataError(
            f"{where}: modality name {name!r}; must be letters, digits and _, a letter first"
        )
    if name in RESERVED_NAMES or name.endswith("_mask") or name.startswith(("quality_", "mask_")):
        raise DataError(f"{where}: modality name {name!r} has a meaning of its own; rename it")
    return name


def check_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int32 [N]; floats that are whole numbers are read as such.

    Raises:
      DataError: they are of another task (regression, multi-label classification), have not one
        axis, are not numbers, negative, none, or too large to be class numbers.
    """
    labels = np.asarray(labels)
    _check_task(labels, where)
    if labels.ndim != 1:
        hint = ""
        if labels.ndim == 2:
            hint = "; ravel it" if labels.shape[1] == 1 else "; take the argmax of one-hot rows"
        raise DataError(f"{where}: shape {list(labels.shape)}; must be [N] class numbers{hint}")
    if labels.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: dtype {labels.dtype}; must be integers from 0, or in every split names"
        )
    if len(labels) == 0:
        raise DataError(f"{where}: no examples; at least 1")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{where}: labels from {low} to {high}; class numbers go from 0 to at most "
            f"{MAX_CLASSES - 1} (regression is not supported)"
        )
    return labels.astype(np.int32)


def _check_task(labels: np.ndarray, where: str) -> None:
    """Refuses the labels of a task that is not the choice of one class."""
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError(f"{where}: NaN or infinite labels; must be class numbers")
        if (labels != np.floor(labels)).any():
            several = " or of a distribution over classes" if labels.ndim > 1 else ""
            raise DataError(
                f"{where}: values such as {labels[labels != np.floor(labels)][0]:g}; regression is "
                f"not supported, nor is learning of scores{several}; must be class numbers or names"
            )
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        ones = (labels == 1).sum(axis=1)
        if not np.isin(labels, (0, 1)).all() or (ones != 1).any():
            raise DataError(
                f"{where}: shape {list(labels.shape)}, and not one 1 in every row; multi-label "
                "classification and several targets are not supported; must be [N] class numbers"
            )


def encode_labels(
    labels: Mapping[str, np.ndarray], class_names: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Class numbers as they are; names as their numbers.

    Args:
      labels: {split: [N]}, integers, or in every split strings (bytes count as such). Strings that
        all are numbers are read as class numbers, unless they are among the class names.
      class_names: in the order of the numbers; without them, names are numbered in alphabetical
        order of those in train.

    Returns:
      {split: int32 [N]}, and the class names, () where the data have none.

    Raises:
      DataError: as :func:`check_labels` and :func:`check_class_names`; names beside numbers, an
        empty name, or one that is not known.
    """
    class_names = check_class_names(class_names)
    for split, values in labels.items():
        _check_task(np.asarray(values), f"{split}/label")
    if not all(np.asarray(v).dtype.kind in "SUT" and v.ndim == 1 for v in labels.values()):
        return {s: check_labels(v, f"{s}/label") for s, v in labels.items()}, class_names
    names = {
        split: np.array([as_text(value).strip() for value in values.tolist()], str)
        for split, values in labels.items()
    }
    every = {name for of_split in names.values() for name in of_split.tolist()}
    if every and all(map(is_class_number, every)) and not every <= set(class_names):
        numbers = {split: of_split.astype(np.int64) for split, of_split in names.items()}
        return {s: check_labels(v, f"{s}/label") for s, v in numbers.items()}, class_names
    known = class_names or check_class_names(np.unique(names["train"]).tolist(), "train/label")
    number_of = {name: number for number, name in enumerate(known)}
    for split, of_split in names.items():
        if unknown := [name for name in of_split.tolist() if name not in number_of]:
            why = (
                "is not in class_names"
                if class_names
                else "never occurs in train, so it cannot be learnt; put examples of it into train "
                "or leave it out"
            )
            raise DataError(f"{split}/label: {unknown[0][:60]!r} {why}")
    return {
        split: check_labels(
            np.array([number_of[name] for name in of_split.tolist()], np.int32), f"{split}/label"
        )
        for split, of_split in names.items()
    }, tuple(known)


def is_class_number(label: str) -> bool:
    """Whether a label is written as a number."""
    return re.fullmatch(r"-?[0-9]{1,9}", label) is not None


def check_class_names(names: Sequence[str], where: str = "class_names") -> tuple[str, ...]:
    """The names, without spaces around them, if they tell the classes apart.

    Raises:
      DataError: one is empty, or two are the same.
    """
    stripped = tuple(name.strip() for name in names)
    seen: dict[str, int] = {}
    for number, name in enumerate(stripped):
        if not name:
            raise DataError(f"{where}: the name of class {number} is empty")
        if (first := seen.setdefault(name, number)) < number:
            raise DataError(
                f"{where}: {name[:60]!r} names class {first} and class {number}; each needs a name "
                "of its own"
            )
    return stripped


def count_classes(labels: Mapping[str, np.ndarray], class_names: Sequence[str] = ()) -> int:
    """One more than the largest label, or the number of class names where there are any.

    A number that no training example has is an output without use: it gets a warning.

    Args:
      labels: {split: int32 [N]}.
      class_names: what the data say the classes are called.

    Raises:
      DataError: a label in another split never occurs in train (the model could not learn it; move
        some of its examples), fewer than two classes, or fewer names than classes.
    """
    known = set(np.unique(labels["train"]).tolist())
    for split, values in labels.items():
        if unknown := sorted(set(np.unique(values).tolist()) - known):
            shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise DataError(
                f"{split}/label: {shown} never occurs in train/label, so it cannot be learnt; put "
                "examples of it into train or leave it out"
            )
    if len(known) < 2:
        raise DataError(f"train/label: only the label {known.pop()}; at least 2 classes are needed")
    num_classes = max(known) + 1
    if class_names and len(class_names) < num_classes:
        raise DataError(
            f"class_names: {len(class_names)} names, but labels go up to {num_classes - 1}"
        )
    num_classes = len(class_names) or num_classes
    if line := _unused_classes(known, num_classes, class_names):
        logging.getLogger(__name__).warning(line)
    return num_classes


def _unused_classes(known: set[int], num_classes: int, class_names: Sequence[str]) -> str:
    """A line on classes that no training example has; empty where all occur."""
    unused = num_classes - len(known)
    if not unused:
        return ""
    first = next(number for number in range(num_classes) if number not in known)
    low, high = min(known), max(known)
    found = f"{low} and {high:,}" if len(known) == 2 else f"{low} to {high:,}"
    named = f" ({class_names[first]!r})" if class_names else ""
    never = f"class {first}{named} never occurs"
    if unused > 1:
        never = f"{unused:,} classes never occur, the first of them {first}{named}"
    if class_names:
        hint = "give examples of every class, or leave its name out"
    elif low == 1 and unused == 1:
        hint = "subtract 1 if the labels are meant to begin at 1"
    else:
        hint = f"number the classes from 0 to {len(known) - 1}, or give names as labels"
    return (
        f"train/label: labels {found}: {never}; the model gets {num_classes:,} outputs for "
        f"{len(known):,} classes; {hint}"
    )


def with_valid(
    splits: Mapping[str, Source],
    train_labels: np.ndarray,
    *,
    seed: int,
    groups: np.ndarray | None = None,
) -> dict[str, Source]:
    """The splits, with 10 % of train as "valid" where there is none.

    Without groups each class gives 10 % of its examples, rounded; where that comes to nothing at
    all (few examples of every class), each class with two or more gives one. Groups are kept whole,
    so that the sizes are as near to that as they allow. No class is left without a training
    example.

    Args:
      splits: with "train".
      train_labels: int32 [N], of train.
      seed: of the choice.
      groups: [N] integers or strings: which of train's examples must not be parted.

    Raises:
      DataError: none can be spared: every class has a single example, or every group a class that
        no other has.
    """
    if "valid" in splits:
        return dict(splits)
    valid = _hold_out(train_labels, VALID_FRACTION, seed, groups, "validation; give valid/*")
    return _divided(splits, valid, "valid")


def with_test(
    splits: Mapping[str, Source], train_labels: np.ndarray, *, groups: np.ndarray | None = None
) -> dict[str, Source]:
    """The splits, with 20 % of train as "test" where there is none; for data in a single table.

    The choice is as in :func:`with_valid`, but always the same: whatever is chosen by training with
    several seeds, no run has seen another's test examples. What is left in train has to serve
    :func:`with_valid`, with `labels_of` and `groups_of` it.

    Raises:
      DataError: as :func:`with_valid`.
    """
    if "test" in splits:
        return dict(splits)
    further = "valid" not in splits
    test = _hold_out(train_labels, TEST_FRACTION, 0, groups, "the test; give test/*", further)
    return _divided(splits, test, "test")


def _hold_out(
    labels: np.ndarray,
    fraction: float,
    seed: int,
    groups: np.ndarray | None,
    purpose: str,
    further: bool = False,
) -> np.ndarray:
    """The numbers of the examples to set aside, in ascending order."""
    if groups is not None:
        chosen = hold_out_groups(labels, groups, fraction, seed=seed, further=further)
        if len(chosen) == 0:
            count = len(np.unique(groups))
            why = "every group has a label of its own" if count > 1 else "there is a single group"
            raise DataError(
                f"train/group: {why} ({count} group{'s' * (count > 1)}), so none can be set aside "
                f"whole for {purpose}"
            )
        return chosen
    _, chosen = stratified_split(labels, [1 - fraction, fraction], seed=seed)
    if len(chosen) == 0:
        order = np.random.default_rng(seed).permutation(len(labels))
        _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
        chosen = np.sort(order[first[counts > 1]])
    if len(chosen) == 0:
        raise DataError(
            f"train/label: every class has a single example, so none can be set aside for {purpose}"
        )
    return chosen


def _divided(splits: Mapping[str, Source], chosen: np.ndarray, name: str) -> dict[str, Source]:
    """The splits, the chosen examples of train under a name of their own."""
    source = splits["train"]
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    parts = {**splits, "train": Subset(source, rest), name: Subset(source, chosen)}
    return {split: parts[split] for split in ("train", "valid", "test") if split in parts}


def check_tags(values: np.ndarray, where: str) -> np.ndarray:
    """Groups or ids: int64 [N], or strings [N] (bytes are decoded).

    Raises:
      DataError: not one axis, neither integers nor strings, or an empty string.
    """
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuSUT":
        raise DataError(
            f"{where}: {values.dtype}{list(values.shape)}; must be [N] integers or strings"
        )
    if values.dtype.kind in "iu":
        if len(values) and values.max() > np.iinfo(np.int64).max:
            raise DataError(f"{where}: {values.max()} is too large for a 64-bit signed integer")
        return values.astype(np.int64)
    values = np.array([as_text(value) for value in values.tolist()], str)
    if len(empty := np.flatnonzero(values == "")):
        raise DataError(f"{where}: example {empty[0]} has an empty one; give every example its own")
    return values


def as_text(value: Any) -> str:
    """A string, or bytes in UTF-8; other bytes are written as escapes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def warn_of_shared_groups(groups: Mapping[str, np.ndarray]) -> None:
    """Logs, for each two splits, how many groups have examples in both of them."""
    for first, second in itertools.combinations(groups, 2):
        shared = np.intersect1d(groups[first], groups[second])
        if len(shared):
            stand = "groups stand" if len(shared) > 1 else "group stands"
            logging.getLogger(__name__).warning(
                f"{len(shared)} {stand} in both {first} and {second} (such as "
                f"{shared[0].item()!r}): what is learnt of a group by heart counts as success there"
            )


def groups_of(source: Source) -> np.ndarray | None:
    """The group of each example of a source, int64 or strings [N]; None where it has none."""
    return _tags_of(source, "groups")


def ids_of(source: Source) -> np.ndarray | None:
    """The id of each example of a source, int64 or strings [N]; None where it has none."""
    return _tags_of(source, "ids")


def _tags_of(source: Any, name: str) -> np.ndarray | None:
    """The attribute of a source, or of the one that it stands around."""
    tags = getattr(source, name, None)
    if tags is not None:
        return np.asarray(tags)
    if not hasattr(source, "source"):
        return None
    tags = _tags_of(source.source, name)
    return tags[source.indices] if isinstance(source, Subset) and tags is not None else tags


def labels_of(source: Source) -> np.ndarray:
    """All labels of a source, int32 [N]; without reading the other fields where it can be done."""
    if isinstance(source, Subset):
        return labels_of(source.source)[source.indices]
    if isinstance(source, ArraySource):
        return np.asarray(source.columns["label"], np.int32)
    if hasattr(source, "labels"):
        return np.asarray(source.labels, np.int32)
    return np.array([source[index]["label"] for index in range(len(source))], np.int32)
