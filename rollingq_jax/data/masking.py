"""Modalities, frames and stretches of time taken away: seeded Grain transformations.

As those of :mod:`rollingq_jax.data.transforms`; nothing is added here, and no quality changes.
"""

import dataclasses

import grain
import numpy as np

from rollingq_jax.data.transforms import check_share
from rollingq_jax.data.types import KEPT, Example, ModalityInfo
from rollingq_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class ModalityDropout(grain.transforms.RandomMap):
    """Marks the modality as missing: ``"<m>_mask"`` False, which the model leaves out.

    The last modality that an example has is never dropped; ``"kept/<m>"``, a bool scalar, says
    where it would have been.

    Attributes:
      info: the modality.
      others: names of the other modalities.
      share: of the examples.

    Raises:
      ConfigError: the share is not in [0, 1], or there are no others.
    """

    info: ModalityInfo
    others: tuple[str, ...]
    share: float = 1.0

    def __post_init__(self) -> None:
        check_share(f"drop of {self.info.name!r}", self.share)
        if not self.others:
            raise ConfigError(f"drop of {self.info.name!r}: it is the only modality")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with the mask set, whether dropped or not."""
        key = f"{self.info.name}_mask"
        mask = np.asarray(element.get(key, True))
        left = any(has_modality(element, name) for name in self.others)
        chosen = rng.random() < self.share and has_modality(element, self.info.name)
        kept = (chosen and not left) or bool(element.get(KEPT + self.info.name, False))
        return element | {
            key: np.zeros_like(mask) if chosen and left else mask,
            KEPT + self.info.name: np.asarray(kept),
        }


def has_modality(example: Example, name: str) -> bool:
    """Whether an example has a modality, as the model sees it: token id 0 is padding."""
    mask = np.asarray(example.get(f"{name}_mask", True))
    value = np.asarray(example[name])
    return bool(np.any(mask & (value != 0) if value.dtype.kind == "i" else mask))


@dataclasses.dataclass(frozen=True)
class FrameBlanking(grain.transforms.RandomMap):
    """Blanks frames of a video, positions of a sequence or tokens, each with the same probability.

    Blank is the training mean (0 after normalisation), or the padding id 0 for tokens.

    Attributes:
      info: the modality.
      share: probability of each frame or position.

    Raises:
      ConfigError: the share is not in [0, 1], or the kind has no frames.
    """

    info: ModalityInfo
    share: float

    def __post_init__(self) -> None:
        check_share(f"blank of {self.info.name!r}", self.share)
        if self.info.kind not in ("video", "sequence", "tokens"):
            raise ConfigError(
                f"blank of {self.info.name!r}: kind {self.info.kind!r}; must be video, sequence or "
                "tokens"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with blank frames."""
        value = element[self.info.name]
        blank = rng.random(len(value)) < self.share
        return element | {self.info.name: _blanked(value, blank, 0, self.info)}


@dataclasses.dataclass(frozen=True)
class TimeMasking(grain.transforms.RandomMap):
    """Blanks one stretch of time, of a length uniform up to ``share`` of the whole.

    Time is the second axis of a spectrogram [F, T, 1] (as in Park et al., SpecAugment, 2019) and
    the first of a video, a sequence or tokens. Blank as in :class:`FrameBlanking`.

    Attributes:
      info: the modality.
      share: the longest stretch, as a fraction.

    Raises:
      ConfigError: the share is not in [0, 1], or the kind has no time axis.
    """

    info: ModalityInfo
    share: float

    def __post_init__(self) -> None:
        check_share(f"timemask of {self.info.name!r}", self.share)
        if self.info.kind in ("image", "vector"):
            raise ConfigError(
                f"timemask of {self.info.name!r}: kind {self.info.kind!r} has no time axis"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with a blank stretch."""
        value, axis = element[self.info.name], int(self.info.kind == "spectrogram")
        steps = value.shape[axis]
        length = int(rng.integers(0, int(self.share * steps) + 1))
        start = int(rng.integers(0, steps - length + 1))
        blank = (np.arange(steps) >= start) & (np.arange(steps) < start + length)
        return element | {self.info.name: _blanked(value, blank, axis, self.info)}


def _blanked(value: np.ndarray, blank: np.ndarray, axis: int, info: ModalityInfo) -> np.ndarray:
    """``value`` with the places of ``axis`` where ``blank`` at the training mean."""
    fill: np.ndarray | float = 0
    if value.dtype == np.uint8:
        fill = np.rint(255 * np.asarray(info.mean or 0.0, np.float32))
    shape = [1] * value.ndim
    shape[axis] = -1
    return np.where(blank.reshape(shape), np.asarray(fill, value.dtype), value)
