"""Means and standard deviations of the training split, and their use."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from rollingq_jax.data.preprocessing import Preprocessed, Preprocessing
from rollingq_jax.data.types import Source


class Moments:
    """Running mean and variance of rows in float64, merged block by block (Chan et al. 1979)."""

    def __init__(self, width: int) -> None:
        self._count = 0
        self._mean = np.zeros(width)
        self._squares = np.zeros(width)

    def add(self, rows: np.ndarray) -> None:
        """Takes in rows [n, width]."""
        if len(rows) == 0:
            return
        mean = rows.mean(axis=0, dtype=np.float64)
        squares = np.square(rows - mean).sum(axis=0)
        total = self._count + len(rows)
        delta = mean - self._mean
        self._squares += squares + np.square(delta) * (self._count * len(rows) / total)
        self._mean += delta * (len(rows) / total)
        self._count = total

    def mean_and_std(self, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
        """Both divided by ``scale``; 1 takes the place of the deviation of a constant feature."""
        mean = self._mean / scale
        std = np.sqrt(self._squares / max(self._count, 1)) / scale
        constant = std <= 1e-6 * np.abs(mean)  # nothing but rounding; holds for 0 and 0 too
        return mean, np.where(constant, 1.0, std)


def evenly(count: int, most: int) -> list[int]:
    """At most ``most`` numbers, evenly spaced in ``range(count)``."""
    return np.unique(np.linspace(0, count - 1, min(count, most)).astype(int)).tolist()


def standardize(
    splits: Mapping[str, Source],
    modalities: Mapping[str, Preprocessing],
    *,
    most: int,
    floats: bool = True,
) -> tuple[dict[str, Source], dict[str, Preprocessing]]:
    """Gives every modality but tokens mean 0 and standard deviation 1 along its last axis.

    Args:
      splits: sources of raw examples.
      modalities: what they hold, without statistics.
      most: how many training examples are read at most, evenly spaced, to measure.
      floats: whether float modalities are standardized; if not, they stay as they are.

    Returns:
      The splits, float modalities standardized, and the modalities: with `mean` and `std` where
      they are standardized, and those of the pixels in `info` where they are uint8 (the model
      normalizes those).
    """
    train = splits["train"]
    moments = {
        name: Moments(one.info.shape[-1])
        for name, one in modalities.items()
        if one.info.kind != "tokens" and (floats or one.info.dtype == "uint8")
    }
    for index in evenly(len(train), most):
        example = train[index]
        for name, of_modality in moments.items():
            values, mask = example[name], example.get(f"{name}_mask", np.True_)
            of_modality.add(values[mask].reshape(-1, values.shape[-1]))
    measured = dict(modalities)
    for name, of_modality in moments.items():
        one = modalities[name]
        pixels = one.info.dtype == "uint8"
        scale = 255.0 if pixels else 1.0
        mean, std = (tuple(v.tolist()) for v in of_modality.mean_and_std(scale))
        if pixels:
            info = dataclasses.replace(one.info, mean=mean, std=std)
            measured[name] = dataclasses.replace(one, info=info)
        else:
            info = dataclasses.replace(one.info, unit=1.0)
            measured[name] = dataclasses.replace(one, info=info, mean=mean, std=std)
    return preprocessed(splits, measured), measured


def preprocessed(
    splits: Mapping[str, Source], modalities: Mapping[str, Preprocessing]
) -> dict[str, Source]:
    """The splits, with the modalities standardized that have statistics."""
    scaled = {name: one for name, one in modalities.items() if one.mean is not None}
    if not scaled:
        return dict(splits)
    return {split: Preprocessed(source, scaled) for split, source in splits.items()}
