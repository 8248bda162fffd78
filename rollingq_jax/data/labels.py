"""Checks of labels and modality names, and the validation split for data that have none."""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from rollingq_jax.data.splits import stratified_split
from rollingq_jax.data.types import ArraySource, Source, Subset
from rollingq_jax.errors import DataError

MAX_CLASSES = 100_000
VALID_FRACTION = 0.1
RESERVED_NAMES = ("example", "label", "split")


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
    """Labels as int32 [N].

    Raises:
      DataError: not one axis, not integers, negative, empty, or too large to be class numbers.
    """
    labels = np.asarray(labels)
    if labels.ndim != 1:
        hint = ""
        if labels.ndim == 2:
            hint = "; ravel it" if labels.shape[1] == 1 else "; take the argmax of one-hot rows"
        raise DataError(f"{where}: shape {list(labels.shape)}; must be [N] class numbers{hint}")
    if labels.dtype.kind not in "biu":
        hint = "names can be used in a manifest" if labels.dtype.kind in "SU" else "use astype(int)"
        raise DataError(f"{where}: dtype {labels.dtype}; must be integers from 0 ({hint})")
    if len(labels) == 0:
        raise DataError(f"{where}: no examples; at least 1")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{where}: labels from {low} to {high}; class numbers go from 0 to at most "
            f"{MAX_CLASSES - 1}"
        )
    return labels.astype(np.int32)


def count_classes(labels: Mapping[str, np.ndarray], class_names: Sequence[str] = ()) -> int:
    """One more than the largest label, or the number of class names where there are any.

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
    return len(class_names) or num_classes


def with_valid(
    splits: Mapping[str, Source], train_labels: np.ndarray, *, seed: int
) -> dict[str, Source]:
    """The splits, with 10 % of train as "valid" where there is none.

    Each class gives 10 % of its examples, rounded; where that comes to nothing at all (few examples
    of every class), each class with two or more gives one. No class is left without a training
    example.

    Raises:
      DataError: every class has a single example, so that none can be spared.
    """
    if "valid" in splits:
        return dict(splits)
    train, valid = stratified_split(train_labels, [1 - VALID_FRACTION, VALID_FRACTION], seed=seed)
    if len(valid) == 0:
        order = np.random.default_rng(seed).permutation(len(train_labels))
        classes, first, counts = np.unique(
            train_labels[order], return_index=True, return_counts=True
        )
        valid = np.sort(order[first[counts > 1]])
        train = np.setdiff1d(np.arange(len(train_labels)), valid)
    if len(valid) == 0:
        raise DataError(
            "train/label: every class has a single example, so none can be set aside for "
            "validation; give valid/*"
        )
    source = splits["train"]
    others = {name: other for name, other in splits.items() if name != "train"}
    return {"train": Subset(source, train), "valid": Subset(source, valid), **others}


def labels_of(source: Source) -> np.ndarray:
    """All labels of a source, int32 [N]; without reading the other fields where it can be done."""
    if isinstance(source, Subset):
        return labels_of(source.source)[source.indices]
    if isinstance(source, ArraySource):
        return np.asarray(source.columns["label"], np.int32)
    if hasattr(source, "labels"):
        return np.asarray(source.labels, np.int32)
    return np.array([source[index]["label"] for index in range(len(source))], np.int32)
