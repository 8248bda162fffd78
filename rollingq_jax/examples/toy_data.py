"""Two modalities that both tell the class, one far more plainly than the other."""

from collections.abc import Iterator
from typing import Any

import numpy as np

from rollingq_jax.rolling import RollInfo

Data = dict[str, np.ndarray]


def make_data(num_examples: int = 512, num_classes: int = 4, seed: int = 0) -> Data:
    """Token sequences in which each class has a pattern of its own, in noise.

    Args:
      num_examples: N.
      num_classes: C.
      seed: of patterns, labels and noise.

    Returns:
      "audio" `[N, 6, 8]` and "visual" `[N, 9, 5]`, float32; "label" `[N]`, int32. The pattern is
      three times as strong in the audio.
    """
    rng = np.random.default_rng(seed)
    label = rng.integers(num_classes, size=num_examples, dtype=np.int32)
    data: Data = {"label": label}
    for modality, shape, strength in (("audio", (6, 8), 1.5), ("visual", (9, 5), 0.5)):
        pattern = rng.normal(size=(num_classes, *shape))
        noise = rng.normal(size=(num_examples, *shape))
        data[modality] = (strength * pattern[label] + noise).astype(np.float32)
    return data


def batches(data: Data, batch_size: int, epoch: int) -> Iterator[Data]:
    """One epoch's batches, in an order of its own; what does not fill a batch is left out."""
    order = np.random.default_rng(epoch).permutation(len(data["label"]))
    for start in range(0, len(order) - batch_size + 1, batch_size):
        rows = order[start : start + batch_size]
        yield {name: column[rows] for name, column in data.items()}


def report(epoch: int, loss: Any, info: RollInfo) -> float:
    """Prints what an epoch's end has seen and done; returns the loss."""
    imbalance = np.array2string(np.asarray(info.imbalance), precision=2)
    print(f"epoch {epoch}: loss {float(loss):.3f}, imbalance {imbalance}, rolled {info.rolled}")
    return float(loss)
