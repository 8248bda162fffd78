"""What tells one data set from another of the same shapes: a few of its examples in numbers."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollingq_jax.data.types import Dataset

SAMPLED = 8  # examples of a split, evenly spaced

Signature = dict[str, dict[str, list[float]]]


def signature(dataset: Dataset) -> Signature:
    """`{split: {array: numbers}}`: mean absolute values in a few examples, as JSON can hold them.

    Means and not hashes, since decoders and resamplers of another machine may differ in last bits.

    Raises:
      DataError: an example cannot be read.
    """
    found: Signature = {}
    for split, source in dataset.splits.items():
        count = len(source)
        places = sorted({i * (count - 1) // (SAMPLED - 1) for i in range(SAMPLED)} if count else ())
        examples = [source[place] for place in places]
        names = sorted(examples[0]) if examples else []
        found[split] = {name: [_size(example[name]) for example in examples] for name in names}
    return found


def difference(ours: Signature, theirs: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """The first `split/array` in which two signatures differ; empty if they do not."""
    for split, arrays in sorted(ours.items()):
        before = theirs.get(split, {})
        for name in sorted(arrays.keys() | before.keys()):
            first, second = arrays.get(name, []), before.get(name, [])
            if len(first) != len(second) or not np.allclose(first, second, rtol=1e-3, atol=1e-6):
                return f"{split}/{name}"
    return ""


def _size(value: Any) -> float:
    """Mean absolute value; of encoded frames, of their bytes."""
    if isinstance(value, list):
        value = np.frombuffer(b"".join(value), np.uint8)
    size = np.mean(np.abs(np.asarray(value, np.float64))) if np.size(value) else 0.0
    return float(np.nan_to_num(size))
