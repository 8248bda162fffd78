"""Corruptions of one modality, for training and for probes: seeded Grain transformations.

All are frozen dataclasses; what they draw depends on the generator that the pipeline passes for the
example, and on nothing else. :func:`rollingq_jax.data.corruption.corrupt` makes them from a
specification and measures the training set's standard deviation for them. Where an example has
``"<m>_mask"`` over positions, only real positions change. uint8 pixels become the floats that the
model would have made of them, (x / 255 - mean) / std, before anything is added.
"""

import dataclasses
from collections.abc import Mapping

import grain
import numpy as np

from rollingq_jax.data.types import Example, ModalityInfo
from rollingq_jax.errors import ConfigError


def check_share(where: str, value: float) -> None:
    """A share is in [0, 1].

    Raises:
      ConfigError: it is not.
    """
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{where}: {value!r}; must be between 0 and 1")


def _refuse_tokens(info: ModalityInfo, what: str) -> None:
    if info.kind == "tokens":
        raise ConfigError(f"{what} of {info.name!r}: token ids cannot take noise; drop or replace")


def to_float(value: np.ndarray, info: ModalityInfo) -> np.ndarray:
    """Pixels as the model normalises them; other arrays as float32."""
    if value.dtype != np.uint8:
        return value.astype(np.float32)
    mean, std = (np.asarray(v, np.float32) for v in (info.mean or (0.0,), info.std or (1.0,)))
    return (value.astype(np.float32) / np.float32(255) - mean) / std


def positions(example: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """``"<m>_mask"``, shaped so that it multiplies ``"<m>"``; all True where there is none."""
    value, mask = example[name], np.asarray(example.get(f"{name}_mask", True))
    return mask.reshape(mask.shape + (1,) * (np.ndim(value) - mask.ndim))


def lowered_quality(example: Mapping[str, np.ndarray], name: str, scale: float) -> np.ndarray:
    """The quality after noise of standard deviation ``scale``.

    Independent noises add in variance: with noise of q before, -sqrt(q^2 + scale^2).
    """
    before = min(float(example.get(f"quality_{name}", 0.0)), 0.0)
    return np.asarray(0.0 - np.hypot(before, scale), np.float32)  # not -0.0


@dataclasses.dataclass(frozen=True)
class GaussianNoise(grain.transforms.RandomMap):
    """Adds white noise, and lowers ``"quality_<m>"`` by it.

    Attributes:
      info: the modality.
      scale: standard deviation of the noise, in training-set standard deviations; or (low, high),
        of which one is drawn uniformly for each example.
      unit: one training-set standard deviation in the units of the floats that the model sees.
      share: of the examples that get it.

    Raises:
      ConfigError: the scale is negative, the share is not in [0, 1], or the modality holds token
        ids.
    """

    info: ModalityInfo
    scale: float | tuple[float, float]
    unit: float = 1.0
    share: float = 1.0

    def __post_init__(self) -> None:
        _refuse_tokens(self.info, "noise")
        check_share(f"noise of {self.info.name!r}", self.share)
        low, high = self.scale if isinstance(self.scale, tuple) else (self.scale, self.scale)
        if not 0 <= low <= high < np.inf:
            raise ConfigError(f"noise of {self.info.name!r}: {self.scale!r}; must be 0 or more")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with noise."""
        name = self.info.name
        scale = rng.uniform(*self.scale) if isinstance(self.scale, tuple) else self.scale
        if self.share < 1.0 and rng.random() >= self.share:
            scale = 0.0
        value = to_float(element[name], self.info)
        noise = rng.standard_normal(value.shape, np.float32) * np.float32(scale * self.unit)
        return element | {
            name: np.where(positions(element, name), value + noise, value),
            f"quality_{name}": lowered_quality(element, name, scale),
        }


@dataclasses.dataclass(frozen=True)
class SignalToNoise(grain.transforms.RandomMap):
    """Adds white noise at a given ratio to the example's own power, and lowers its quality.

    noise power = mean square of the example's real values / 10^(decibels / 10).

    Attributes:
      info: the modality.
      decibels: signal-to-noise ratio; 0 is as much noise as signal.
      unit: as in :class:`GaussianNoise`.

    Raises:
      ConfigError: the ratio is not finite, or the modality holds token ids.
    """

    info: ModalityInfo
    decibels: float
    unit: float = 1.0

    def __post_init__(self) -> None:
        _refuse_tokens(self.info, "noise")
        if not np.isfinite(self.decibels):
            raise ConfigError(f"noise of {self.info.name!r}: {self.decibels!r} dB; must be finite")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with noise."""
        name = self.info.name
        value = to_float(element[name], self.info)
        real = np.broadcast_to(positions(element, name), value.shape)
        power = float(np.mean(np.square(value, dtype=np.float64), where=real)) if real.any() else 0
        deviation = np.sqrt(power) * 10 ** (-self.decibels / 20)
        noise = rng.standard_normal(value.shape, np.float32) * np.float32(deviation)
        return element | {
            name: np.where(real, value + noise, value),
            f"quality_{name}": lowered_quality(element, name, deviation / self.unit),
        }


@dataclasses.dataclass(frozen=True)
class Replace(grain.transforms.RandomMap):
    """Puts noise in place of the modality: nothing of the example is left.

    Floats become N(0, unit^2) around 0, pixels the same after normalisation, token ids uniform over
    the vocabulary. ``"quality_<m>"`` is dropped, since no finite amount of noise does this.

    Attributes:
      info: the modality.
      share: of the examples.
      unit: as in :class:`GaussianNoise`.

    Raises:
      ConfigError: the share is not in [0, 1].
    """

    info: ModalityInfo
    share: float = 1.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        check_share(f"replace of {self.info.name!r}", self.share)

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example, or the example with noise alone."""
        name = self.info.name
        rest = {key: value for key, value in element.items() if key != f"quality_{name}"}
        chosen = rng.random() < self.share
        if self.info.kind == "tokens":
            ids = np.asarray(element[name])
            drawn = rng.integers(1, self.info.vocab_size or 2, ids.shape).astype(ids.dtype)
            return rest | {name: np.where(ids != 0, drawn, ids) if chosen else ids}
        value = to_float(element[name], self.info)
        noise = rng.standard_normal(value.shape, np.float32) * np.float32(self.unit)
        return rest | {name: np.where(positions(element, name), noise, value) if chosen else value}
