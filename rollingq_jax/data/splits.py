"""Splits that keep the proportions of the classes."""

from collections.abc import Sequence

import numpy as np


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], *, seed: int
) -> list[np.ndarray]:
    """Divides examples into parts, each with its share of every class.

    Args:
      labels: [N] integers.
      fractions: of each part; they sum to 1.
      seed: of the choice.

    Returns:
      For each part its examples' numbers, in ascending order, int64; together they are 0 .. N - 1
      without repetition. In a class of n examples each part has its fraction of n to within 1.
    """
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(fractions)[:-1]
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, chosen in zip(
            parts, np.split(members, np.rint(bounds * len(members)).astype(int)), strict=True
        ):
            part.append(chosen)
    return [np.sort(np.concatenate(chosen)).astype(np.int64) for chosen in parts]
