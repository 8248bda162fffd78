"""Means and standard deviations of the training split, and their use."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from rollingq_jax.data.labels import labels_of
from rollingq_jax.data.types import Example, ModalityInfo, Source

# Standardised features are cut off here: a feature that is almost constant in training and not so
# later would otherwise reach hundreds of standard deviations.
CLIP = 10.0

Scale = tuple[np.ndarray, np.ndarray]


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
    modalities: Mapping[str, ModalityInfo],
    *,
    most: int,
    floats: bool = True,
) -> tuple[dict[str, Source], dict[str, ModalityInfo]]:
    """Gives every modality but tokens mean 0 and standard deviation 1 along its last axis.

    Args:
      splits: sources that are not standardised.
      modalities: what they hold.
      most: how many training examples are read at most, evenly spaced, to measure.
      floats: whether float modalities are standardised; if not, they stay as they are.

    Returns:
      The splits, float modalities standardised, and the modalities, with ``mean`` and ``std`` where
      they are uint8 (the model normalises those) and ``unit`` where they are standardised.
    """
    train = splits["train"]
    moments = {
        name: Moments(info.shape[-1])
        for name, info in modalities.items()
        if info.kind != "tokens" and (floats or info.dtype == "uint8")
    }
    for index in evenly(len(train), most):
        example = train[index]
        for name, of_modality in moments.items():
            values, mask = example[name], example.get(f"{name}_mask", np.True_)
            of_modality.add(values[mask].reshape(-1, values.shape[-1]))
    infos, scales = dict(modalities), {}
    for name, of_modality in moments.items():
        if infos[name].dtype == "uint8":
            mean, std = (tuple(v.tolist()) for v in of_modality.mean_and_std(scale=255.0))
            infos[name] = dataclasses.replace(infos[name], mean=mean, std=std)
        else:
            infos[name] = dataclasses.replace(infos[name], unit=1.0)
            scales[name] = of_modality.mean_and_std()
    if not scales:
        return dict(splits), infos
    return {split: Standardized(source, scales) for split, source in splits.items()}, infos


def zero_masked(value: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
    """0 where the mask, over the first axes of ``value``, is False."""
    if mask is None:
        return value
    return np.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0)


class Standardized:
    """A source with (x - mean) / std in place of the modalities in ``scales``; 0 where masked."""

    def __init__(self, source: Source, scales: Mapping[str, Scale]) -> None:
        self.source, self.scales = source, dict(scales)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = dict(self.source[index])
        for name, (mean, std) in self.scales.items():
            value = np.clip((example[name] - mean) / std, -CLIP, CLIP).astype(np.float32)
            mask = example.get(f"{name}_mask")
            if mask is not None:
                value = np.where(
                    mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0
                )
            example[name] = value.astype(np.float32)
        return example

    @property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]."""
        return labels_of(self.source)
