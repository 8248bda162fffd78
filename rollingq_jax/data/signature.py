"""What tells one data set from another of the same shapes: all labels, some examples in numbers."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollingq_jax.data.labels import labels_of
from rollingq_jax.data.types import ArraySource, Dataset, Source, Subset

SAMPLED = 36  # examples of a split, evenly spaced; every fifth is one of the EARLIER
EARLIER = 8  # as many were taken by versions that did not hash the labels
LABELS = "label/sha256"

Signature = dict[str, dict[str, Any]]


def signature(dataset: Dataset) -> Signature:
    """`{split: {array: numbers}}`: mean absolute values in some examples, as JSON can hold them.

    Means and not hashes, since decoders and resamplers of another machine may differ in last bits.
    Labels have no last bits: "label/sha256" is the hash of all of them as int32, where they are
    known without reading the examples.

    Raises:
      DataError: an example cannot be read.
    """
    found: Signature = {}
    for split, source in dataset.splits.items():
        count = len(source)
        examples = [source[place] for place in _places(count, SAMPLED)]
        names = sorted(examples[0]) if examples else []
        found[split] = {name: [_size(example[name]) for example in examples] for name in names}
        labels = _known_labels(source)
        if labels is not None:
            found[split][LABELS] = hashlib.sha256(labels.astype("<i4").tobytes()).hexdigest()
    return found


def difference(ours: Signature, theirs: Mapping[str, Any]) -> str:
    """The first `split/array` in which two signatures differ; empty if they do not.

    `theirs` may be of an earlier version, with fewer examples and without the hash of the labels.
    """
    for split, arrays in sorted(ours.items()):
        before = theirs.get(split, {}) if isinstance(theirs, Mapping) else {}
        if not isinstance(before, Mapping):
            return split
        hashes = arrays.get(LABELS), before.get(LABELS)
        if None not in hashes and hashes[0] != hashes[1]:
            return f"{split}/label"
        for name in sorted((arrays.keys() | before.keys()) - {LABELS}):
            first, second = arrays.get(name, []), before.get(name, [])
            earlier = [first[place] for place in _places(len(first), EARLIER)]
            if not (_close(first, second) or (LABELS not in before and _close(earlier, second))):
                return f"{split}/{name}"
    return ""


def _places(count: int, most: int) -> list[int]:
    """Numbers of at most so many examples, evenly spaced, the first and the last among them."""
    return sorted({i * (count - 1) // (most - 1) for i in range(most)}) if count else []


def _known_labels(source: Source) -> np.ndarray | None:
    """All labels, `[N]`; None where that would mean to read every example."""
    if isinstance(source, Subset):
        known = _known_labels(source.source)
        return None if known is None else known[source.indices]
    if isinstance(source, ArraySource) or hasattr(source, "labels"):
        return labels_of(source)
    inner = getattr(source, "source", None)  # a source that changes another one's examples
    return _known_labels(inner) if inner is not None and len(inner) == len(source) else None


def _close(first: Any, second: Any) -> bool:
    try:
        first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-3, atol=1e-6)


def _size(value: Any) -> float:
    """Mean absolute value; of encoded frames, of their bytes."""
    if isinstance(value, list):
        value = np.frombuffer(b"".join(value), np.uint8)
    size = np.mean(np.abs(np.asarray(value, np.float64))) if np.size(value) else 0.0
    return float(np.nan_to_num(size))
