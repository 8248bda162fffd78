"""CMU-MOSEI's arrays: whether they fit together, which sentences can be used, where each begins."""

import dataclasses
from typing import Any

import numpy as np

from rollingq_jax.errors import DataError

MODALITIES = ("audio", "text", "vision")
SPLITS = ("train", "valid", "test")


@dataclasses.dataclass(frozen=True)
class Tidied:
    """The sentences of one split that can be used.

    Attributes:
      sequences: {modality: float32 [N, L, D]}, real positions first, then zeros.
      masks: {modality: bool [N, L]}, True where a position is real.
      labels: float32 [N], from -3 to 3.
      unreadable: {sentence: what is wrong with it}.
      without_text: how many were left out because their text is all zero.
    """

    sequences: dict[str, np.ndarray]
    masks: dict[str, np.ndarray]
    labels: np.ndarray
    unreadable: dict[str, str]
    without_text: int


def check_distribution(data: Any, where: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a distribution's file, after their names, shapes and dtypes have been checked.

    Args:
      data: what the pickle held.
      where: it came from, for the messages.

    Returns:
      {split: {"audio", "text", "vision": [N, L, D]; "labels": [N]; "id": [N] of str}}.

    Raises:
      DataError: a split or an array is missing, is not numeric, or does not fit the others.
    """
    checked = {}
    for split in SPLITS:
        part = data.get(split) if isinstance(data, dict) else None
        if not isinstance(part, dict):
            keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise DataError(
                f"{where}: no {split!r} (holds {keys[:100]}); must hold train, valid and test"
            )
        arrays = {}
        for name in (*MODALITIES, "labels"):
            array = part.get(name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                found = (
                    "nothing" if array is None else getattr(array, "dtype", type(array).__name__)
                )
                raise DataError(f"{where}: {split}/{name} must be an array of numbers, is {found}")
            arrays[name] = array
        _check_shapes(arrays, f"{where}: {split}")
        arrays["labels"] = arrays["labels"].reshape(-1)
        arrays["id"] = np.array(_names(part.get("id"), len(arrays["labels"])))
        checked[split] = arrays
    for name in MODALITIES:
        shapes = {split: checked[split][name].shape[1:] for split in SPLITS}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{split} {list(shape)}" for split, shape in shapes.items())
            raise DataError(f"{where}: {name} differs between splits: {found}")
    return checked


def _check_shapes(arrays: dict[str, np.ndarray], where: str) -> None:
    for name in MODALITIES:
        if arrays[name].ndim != 3 or 0 in arrays[name].shape[1:]:
            raise DataError(
                f"{where}/{name}: shape {list(arrays[name].shape)}; must be [sentences, positions, "
                "features]"
            )
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where}: different numbers of sentences: {found}")
    if arrays["labels"].size != counts["labels"]:
        raise DataError(
            f"{where}/labels: shape {list(arrays['labels'].shape)}; must be one number a sentence"
        )


def _names(ids: Any, count: int) -> list[str]:
    """A name for each sentence: the first column of its id, and its number."""
    names = []
    for number in range(count):
        try:
            first = np.ravel(np.asarray(ids[number], dtype=object))[0]
        except (TypeError, IndexError, KeyError):
            first = ""
        first = first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
        names.append(f"{number} {first}".strip())
    return names


def tidy(arrays: dict[str, np.ndarray], split: str, strict: bool) -> Tidied:
    """Leaves out what cannot be used, and moves each sentence to the front of its sequence.

    Args:
      arrays: of one split, from :func:`check_distribution`.
      split: its name, for the messages.
      strict: raise for a sentence that cannot be used.

    Raises:
      DataError: ``strict``, and a sentence holds NaN or infinite features, or a label outside of
        -3 .. 3.
    """
    count = len(arrays["labels"])
    problems = _problems(arrays, split)
    if strict and problems:
        raise DataError(problems[min(problems)])
    usable = np.array([number not in problems for number in range(count)], bool)
    has_text = np.array([bool(np.any(row)) for row in arrays["text"]], bool)
    sequences = {name: arrays[name][usable & has_text].astype(np.float32) for name in MODALITIES}
    sequences["audio"][np.isneginf(sequences["audio"])] = 0
    aligned = len({arrays[name].shape[1] for name in MODALITIES}) == 1
    starts = {name: _starts(sequences["text" if aligned else name]) for name in MODALITIES}
    masks = {}
    for name, rows in sequences.items():
        length = rows.shape[1]
        for row, start in zip(rows, starts[name], strict=True):
            row[: length - start] = row[start:].copy()
            row[length - start :] = 0
        masks[name] = np.arange(length)[None] < (length - starts[name])[:, None]
    return Tidied(
        sequences,
        masks,
        arrays["labels"][usable & has_text].astype(np.float32),
        {f"{split}/{arrays['id'][number]}": why for number, why in problems.items()},
        int(np.sum(usable & ~has_text)),
    )


def _starts(sequences: np.ndarray) -> np.ndarray:
    """[N, L, D] -> int64 [N]: the first position that is not all zero; L where every one is."""
    real = np.array([np.any(sequence != 0, axis=1) for sequence in sequences], bool)
    real = real.reshape(sequences.shape[:2])
    return np.where(real.any(axis=1), real.argmax(axis=1), sequences.shape[1])


def _problems(arrays: dict[str, np.ndarray], split: str) -> dict[int, str]:
    """{number of the sentence: why it cannot be used}."""
    problems = {}
    for number, label in enumerate(arrays["labels"]):
        where = f"{split}, sentence {arrays['id'][number]}"
        if not -3 <= label <= 3:  # false for NaN too
            problems[number] = f"{where}: label {label}; must be from -3 to 3"
            continue
        for name in MODALITIES:
            values = arrays[name][number]
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(values.astype(np.float32))
            if name == "audio":
                bad &= ~np.isneginf(values)  # the distribution has them: they become 0
            if bad.any():
                first = values[bad][0]
                problems[number] = f"{where}: {int(bad.sum())} values of {name} are {first}"
                break
    return problems
