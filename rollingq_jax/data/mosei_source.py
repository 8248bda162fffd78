"""CMU-MOSEI's prepared arrays as examples, and its labels as classes."""

from pathlib import Path

import numpy as np

from rollingq_jax.data.types import Example
from rollingq_jax.errors import DataError

# Rule of a label -> class names. "positive" is MultiBench's and counts 0 as not positive;
# "non_negative" is BalanceBenchmark's; accuracies under different rules cannot be compared.
LABEL_RULES = {
    "positive": ("not positive", "positive"),
    "non_negative": ("negative", "not negative"),
    "seven": ("-3", "-2", "-1", "0", "+1", "+2", "+3"),
}


class SentenceSource:
    """Sentences of one split from memory-mapped arrays.

    Args:
      folder: of the arrays.
      split: "train", "valid" or "test".
      modalities: those to give.
      labels: int32 [N].
    """

    def __init__(
        self,
        folder: Path,
        split: str,
        modalities: tuple[str, ...],
        labels: np.ndarray,
    ) -> None:
        self.labels = labels
        self._sequences = {
            m: open_array(folder / f"{split}_{m}.npy", len(labels)) for m in modalities
        }
        self._masks = {
            m: open_array(folder / f"{split}_{m}_mask.npy", len(labels)) for m in modalities
        }

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"label": self.labels[index]}
        for name, sequences in self._sequences.items():
            example[name] = np.array(sequences[index])
            example[f"{name}_mask"] = np.array(self._masks[name][index])
        return example


def open_array(path: Path, count: int) -> np.ndarray:
    """A memory-mapped array of ``count`` rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: missing or damaged ({str(error)[:100]})") from None
    if len(array) != count:
        raise DataError(f"{path}: {len(array)} rows instead of {count}; prepare it again")
    return array


def classify(sentiment: np.ndarray, rule: str) -> np.ndarray:
    """Sentiment from -3 to 3, float [N] -> class numbers int32 [N].

    "positive": y > 0; "non_negative": y >= 0; "seven": rounded to the nearest of -3 .. 3 (halves to
    the even number), plus 3.
    """
    if rule == "positive":
        return (sentiment > 0).astype(np.int32)
    if rule == "non_negative":
        return (sentiment >= 0).astype(np.int32)
    return (np.clip(np.rint(sentiment), -3, 3) + 3).astype(np.int32)
