"""Corruptions by name: what `--corrupt` and `data.corruptions` say, put onto a data set.

A specification is "modality=corruption" or several of them separated by commas, applied in order:

================== ==============================================================================
audio=1.0          Gaussian noise of 1 training-set standard deviation
audio=0.5..2       the same, drawn uniformly from the range for each example
audio=0..3@0.3     the same in 30 % of the examples; "audio=0.5, audio=0..3@0.3" adds it to the rest
audio=snr:10       Gaussian noise 10 dB under the example's own power
audio=drop:0.3     the modality is missing in 30 % of the examples (no number: in all)
audio=blank:0.3    30 % of the frames or positions are blank (video, sequence, tokens)
audio=timemask:0.3 a stretch of up to 30 % of the time is blank
audio=replace:0.3  noise takes the place of the modality in 30 % of the examples (no number: in all)
audio=misalign:0.3 in 30 % of the examples the modality is that of an example of another class
================== ==============================================================================

All but the last are seeded Grain transformations, frozen dataclasses whose draws depend only on the
generator that the pipeline passes for the example. Where an example has `"<m>_mask"` over
positions, noise changes only real positions. uint8 pixels become the floats that the model would
have made of them, (x / 255 - mean) / std, before noise is added.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from rollingq_jax.data.dataset import (
    KEPT,
    Changed,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    labels_of,
)
from rollingq_jax.data.preprocessing import RunningStats, evenly_spaced
from rollingq_jax.errors import ConfigError, DataError

NAMES = ("noise", "snr", "drop", "blank", "timemask", "replace", "misalign")
FORM = (
    "allowed: modality=NUMBER (noise in training-set standard deviations), modality=LOW..HIGH, "
    "each also with @SHARE of the examples behind it, or modality=NAME:NUMBER with NAME one of "
    + ", ".join(NAMES)
)
UNIT_EXAMPLES = 256


class Corruption(NamedTuple):
    """One corruption of one modality; `amount` is None where the specification has no number."""

    modality: str
    name: str
    amount: float | tuple[float, float] | None
    prob: float = 1.0  # that an example gets it, for noise


def parse_corruptions(text: str, modalities: Iterable[str]) -> tuple[Corruption, ...]:
    """Reads a specification as in this module's docstring.

    Args:
      text: the specification; empty for no corruption.
      modalities: the names that may occur.

    Raises:
      ConfigError: the text is not of that form, or names a modality that is not there.
    """
    known = sorted(modalities)
    corruptions = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        modality, equals, rest = (piece.strip() for piece in part.partition("="))
        name, colon, number = (piece.strip() for piece in rest.partition(":"))
        if not equals or not rest:
            raise ConfigError(f"corruption {part!r}: {FORM}")
        if modality not in known:
            raise ConfigError(
                f"corruption {part!r}: no modality {modality!r}; there are {', '.join(known)}"
            )
        if not colon and name not in NAMES:
            name, number = "noise", rest
        if name not in NAMES:
            raise ConfigError(f"corruption {part!r}: {FORM}")
        prob = 1.0
        if name == "noise" and "@" in number:
            number, _, fraction = number.partition("@")
            prob = _number(part, fraction)
        corruptions.append(Corruption(modality, name, _amount(part, name, number), prob))
    return tuple(corruptions)


def _amount(part: str, name: str, number: str) -> float | tuple[float, float] | None:
    if not number and name in ("drop", "replace", "misalign"):
        return None
    low, dots, high = number.partition("..")
    if dots and name == "noise":
        return _number(part, low), _number(part, high)
    return _number(part, number)


def _number(part: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"corruption {part!r}: {FORM}") from None


def corrupt(
    dataset: Dataset,
    corruptions: str | Iterable[Corruption],
    *,
    train: bool = False,
    seed: int = 0,
    encoders: Mapping[str, Any] | None = None,
) -> Dataset:
    """The data set with corruptions after its own transformations.

    Args:
      dataset: to corrupt.
      corruptions: a specification, or what `parse_corruptions` made of one.
      train: whether the training split is corrupted; else all others are.
      seed: of which examples are misaligned, and with which; everything else is drawn by the
        pipeline's generator.
      encoders: `config.model.encoders`; a `mean` and `std` there say how the model normalizes
        pixels, where they differ from the data set's.

    Raises:
      ConfigError: the specification is malformed, or does not fit the modality's kind.
      DataError: misalignment finds no two classes in a split.
    """
    if isinstance(corruptions, str):
        corruptions = parse_corruptions(corruptions, dataset.modalities)
    splits = dict(dataset.splits)
    targets = ["train"] if train else [split for split in splits if split != "train"]
    transforms: list[grain.transforms.RandomMap] = []
    for modality, name, amount, prob in corruptions:
        info = _as_normalized(dataset.modalities[modality], (encoders or {}).get(modality))
        if name == "misalign":
            swapped: Any = 1.0 if amount is None else amount
            for split in targets:
                splits[split] = misalign(splits[split], modality, prob=swapped, seed=seed)
            continue
        made = _transform(dataset, info, name, amount)
        transforms.append(made if prob == 1.0 else dataclasses.replace(made, prob=prob))
    field = "train_transforms" if train else "eval_transforms"
    changed: dict[str, Any] = {field: (*getattr(dataset, field), *transforms)}
    return dataclasses.replace(dataset, splits=splits, **changed)


def _as_normalized(info: ModalityInfo, encoder: Any) -> ModalityInfo:
    if encoder is None or not encoder.get("mean") or not encoder.get("std"):
        return info
    return dataclasses.replace(info, mean=tuple(encoder["mean"]), std=tuple(encoder["std"]))


@dataclasses.dataclass(frozen=True)
class GaussianNoise(grain.transforms.RandomMap):
    """Adds white noise, and lowers `"quality_<m>"` by it.

    Attributes:
      info: the modality.
      scale: standard deviation of the noise, in training-set standard deviations; or (low, high),
        of which one is drawn uniformly for each example.
      unit: one training-set standard deviation in the units of the floats that the model sees.
      prob: that an example gets it.

    Raises:
      ConfigError: the scale is negative, `prob` is not in [0, 1], or the modality holds token ids.
    """

    info: ModalityInfo
    scale: float | tuple[float, float]
    unit: float = 1.0
    prob: float = 1.0

    def __post_init__(self) -> None:
        _refuse_tokens(self.info)
        _check_fraction(f"noise of {self.info.name!r}", self.prob)
        low, high = self.scale if isinstance(self.scale, tuple) else (self.scale, self.scale)
        if not 0 <= low <= high < np.inf:
            raise ConfigError(f"noise of {self.info.name!r}: {self.scale!r}; allowed: 0 or more")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with noise."""
        scale = rng.uniform(*self.scale) if isinstance(self.scale, tuple) else self.scale
        if self.prob < 1.0 and rng.random() >= self.prob:
            scale = 0.0
        return _with_noise(element, self.info, scale, scale * self.unit, rng)


@dataclasses.dataclass(frozen=True)
class SignalToNoise(grain.transforms.RandomMap):
    """Adds white noise at a given ratio to the example's own power, and lowers its quality.

    noise power = mean square of the example's real values / 10^(decibels / 10).

    Attributes:
      info: the modality.
      decibels: signal-to-noise ratio; 0 is as much noise as signal.
      unit: as in `GaussianNoise`.

    Raises:
      ConfigError: the ratio is not finite, or the modality holds token ids.
    """

    info: ModalityInfo
    decibels: float
    unit: float = 1.0

    def __post_init__(self) -> None:
        _refuse_tokens(self.info)
        if not np.isfinite(self.decibels):
            raise ConfigError(f"noise of {self.info.name!r}: {self.decibels!r} dB; allowed: finite")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with noise."""
        name = self.info.name
        value = to_float(element[name], self.info)
        real = np.broadcast_to(positions(element, name), value.shape)
        power = float(np.mean(np.square(value, dtype=np.float64), where=real)) if real.any() else 0
        deviation = np.sqrt(power) * 10 ** (-self.decibels / 20)
        return _with_noise(element, self.info, deviation / self.unit, deviation, rng)


@dataclasses.dataclass(frozen=True)
class Replace(grain.transforms.RandomMap):
    """Replaces the modality by noise: nothing of the example is left.

    Floats become N(0, unit^2) around 0, pixels the same after normalization, token ids uniform over
    the vocabulary. `"quality_<m>"` is dropped, since no finite amount of noise does this.

    Attributes:
      info: the modality.
      prob: that an example is replaced.
      unit: as in `GaussianNoise`.

    Raises:
      ConfigError: `prob` is not in [0, 1].
    """

    info: ModalityInfo
    prob: float = 1.0
    unit: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(f"replace of {self.info.name!r}", self.prob)

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example, or only noise under the modality's name."""
        name = self.info.name
        rest = {key: value for key, value in element.items() if key != f"quality_{name}"}
        chosen = rng.random() < self.prob
        if self.info.kind == "tokens":
            ids = np.asarray(element[name])
            drawn = rng.integers(1, self.info.vocab_size or 2, ids.shape).astype(ids.dtype)
            return rest | {name: np.where(ids != 0, drawn, ids) if chosen else ids}
        value = to_float(element[name], self.info)
        noise = rng.standard_normal(value.shape, np.float32) * np.float32(self.unit)
        return rest | {name: np.where(positions(element, name), noise, value) if chosen else value}


@dataclasses.dataclass(frozen=True)
class ModalityDropout(grain.transforms.RandomMap):
    """Marks the modality as missing: `"<m>_mask"` False, which the model leaves out.

    The last modality that an example has is never dropped; `"kept/<m>"`, a bool scalar, says
    where it would have been.

    Attributes:
      info: the modality.
      others: names of the other modalities.
      prob: that an example is chosen.

    Raises:
      ConfigError: `prob` is not in [0, 1], or there are no others.
    """

    info: ModalityInfo
    others: tuple[str, ...]
    prob: float = 1.0

    def __post_init__(self) -> None:
        _check_fraction(f"drop of {self.info.name!r}", self.prob)
        if not self.others:
            raise ConfigError(f"drop of {self.info.name!r}: it is the only modality")

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with the mask set, whether dropped or not."""
        key = f"{self.info.name}_mask"
        mask = np.asarray(element.get(key, True))
        left = any(has_modality(element, name) for name in self.others)
        chosen = rng.random() < self.prob and has_modality(element, self.info.name)
        kept = (chosen and not left) or bool(element.get(KEPT + self.info.name, False))
        return element | {
            key: np.zeros_like(mask) if chosen and left else mask,
            KEPT + self.info.name: np.asarray(kept),
        }


def has_modality(example: Example, name: str) -> bool:
    """Tells if an example has a modality, as the model sees it: token id 0 is padding."""
    mask = np.asarray(example.get(f"{name}_mask", True))
    value = np.asarray(example[name])
    return bool(np.any(mask & (value != 0) if value.dtype.kind == "i" else mask))


@dataclasses.dataclass(frozen=True)
class FrameBlanking(grain.transforms.RandomMap):
    """Blanks frames of a video, positions of a sequence or tokens, each with the same probability.

    Blank is the training mean (0 after normalization), or the padding id 0 for tokens.

    Attributes:
      info: the modality.
      prob: of each frame or position.

    Raises:
      ConfigError: `prob` is not in [0, 1], or the kind has no frames.
    """

    info: ModalityInfo
    prob: float

    def __post_init__(self) -> None:
        _check_fraction(f"blank of {self.info.name!r}", self.prob)
        if self.info.kind not in ("video", "sequence", "tokens"):
            raise ConfigError(
                f"blank of {self.info.name!r}: kind {self.info.kind!r}; allowed: video, sequence "
                "or tokens"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with blank frames."""
        value = element[self.info.name]
        blank = rng.random(len(value)) < self.prob
        return element | {self.info.name: _blanked(value, blank, 0, self.info)}


@dataclasses.dataclass(frozen=True)
class TimeMasking(grain.transforms.RandomMap):
    """Blanks one stretch of time, of a length uniform up to `fraction` of the whole.

    Time is the second axis of a spectrogram [F, T, 1] (as in Park et al., SpecAugment, 2019) and
    the first of a video, a sequence or tokens. Blank as in `FrameBlanking`.

    Attributes:
      info: the modality.
      fraction: of the whole, the longest stretch.

    Raises:
      ConfigError: the fraction is not in [0, 1], or the kind has no time axis.
    """

    info: ModalityInfo
    fraction: float

    def __post_init__(self) -> None:
        _check_fraction(f"timemask of {self.info.name!r}", self.fraction)
        if self.info.kind in ("image", "vector"):
            raise ConfigError(
                f"timemask of {self.info.name!r}: kind {self.info.kind!r} has no time axis"
            )

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """The example with a blank stretch."""
        value, axis = element[self.info.name], int(self.info.kind == "spectrogram")
        steps = value.shape[axis]
        length = int(rng.integers(0, int(self.fraction * steps) + 1))
        start = int(rng.integers(0, steps - length + 1))
        blank = (np.arange(steps) >= start) & (np.arange(steps) < start + length)
        return element | {self.info.name: _blanked(value, blank, axis, self.info)}


def _blanked(value: np.ndarray, blank: np.ndarray, axis: int, info: ModalityInfo) -> np.ndarray:
    """Sets the places of `axis` where `blank` holds to the training mean."""
    fill: np.ndarray | float = 0
    if value.dtype == np.uint8:
        fill = np.rint(255 * np.asarray(info.mean or 0.0, np.float32))
    shape = [1] * value.ndim
    shape[axis] = -1
    return np.where(blank.reshape(shape), np.asarray(fill, value.dtype), value)


def _check_fraction(where: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(f"{where}: {value!r}; allowed: between 0 and 1")


def _refuse_tokens(info: ModalityInfo) -> None:
    if info.kind == "tokens":
        raise ConfigError(f"noise of {info.name!r}: token ids cannot take noise; drop or replace")


def to_float(value: np.ndarray, info: ModalityInfo) -> np.ndarray:
    """Pixels as the model normalizes them; other arrays as float32."""
    if value.dtype != np.uint8:
        return value.astype(np.float32)
    mean, std = (np.asarray(v, np.float32) for v in (info.mean or (0.0,), info.std or (1.0,)))
    return (value.astype(np.float32) / np.float32(255) - mean) / std


def positions(example: Mapping[str, np.ndarray], name: str) -> np.ndarray:
    """`"<m>_mask"`, shaped so that it multiplies `"<m>"`; all True where there is none."""
    value, mask = example[name], np.asarray(example.get(f"{name}_mask", True))
    return mask.reshape(mask.shape + (1,) * (np.ndim(value) - mask.ndim))


def _with_noise(
    element: Example, info: ModalityInfo, scale: Any, deviation: Any, rng: np.random.Generator
) -> Example:
    """The example with noise of this deviation, and the quality after one of `scale` units.

    Independent noises add in variance: with noise of q before, -sqrt(q^2 + scale^2).
    """
    name = info.name
    value = to_float(element[name], info)
    noise = rng.standard_normal(value.shape, np.float32) * np.float32(deviation)
    before = min(float(element.get(f"quality_{name}", 0.0)), 0.0)
    return element | {
        name: np.where(positions(element, name), value + noise, value),
        f"quality_{name}": np.asarray(0.0 - np.hypot(before, scale), np.float32),  # not -0.0
    }


def _transform(
    dataset: Dataset, info: ModalityInfo, name: str, amount: Any
) -> grain.transforms.RandomMap:
    """The transformation of this name; without an amount all examples get it."""
    amount = 1.0 if amount is None else amount
    if name == "drop":
        return ModalityDropout(info, tuple(m for m in dataset.modalities if m != info.name), amount)
    if name == "blank":
        return FrameBlanking(info, amount)
    if name == "timemask":
        return TimeMasking(info, amount)
    kinds: dict[str, Any] = {"noise": GaussianNoise, "snr": SignalToNoise, "replace": Replace}
    made = kinds[name](info, amount)  # which checks the amount, before the data are read
    if info.kind == "tokens":
        return made
    return dataclasses.replace(made, unit=training_deviation(dataset, info))


def training_deviation(dataset: Dataset, info: ModalityInfo) -> float:
    """The standard deviation of a modality over the training split, all features together.

    `info.unit` where the data set states it; else measured over at most 256 examples, evenly
    spaced, of the floats that the model sees, only real positions.
    """
    if info.unit is not None:
        return info.unit
    if "train" not in dataset.splits:
        raise DataError(
            f"noise in {info.name!r} is in standard deviations of the training data, which are not "
            "known; allowed: the data that the run was trained on, or another corruption"
        )
    source, moments = dataset.splits["train"], RunningStats(1)
    for index in evenly_spaced(len(source), UNIT_EXAMPLES):
        example = source[index]
        for transform in dataset.eval_transforms:
            if isinstance(transform, grain.transforms.Map):
                example = transform.map(example)
        value = to_float(example[info.name], info)
        real = np.broadcast_to(positions(example, info.name), value.shape)
        moments.add(value[real].reshape(-1, 1))
    return float(moments.mean_and_std()[1][0])


class SwappedModality(Changed):
    """A source in which one modality of some examples is that of another example.

    What belongs to the modality (its mask, its quality) comes along; the label stays.

    Args:
      source: to read from.
      modality: to swap.
      partner: number of an example -> that of the example whose modality it gets, or None to keep
        its own.
    """

    def __init__(self, source: Source, modality: str, partner: Callable[[int], int | None]) -> None:
        def swap(example: Example, index: int) -> Example:
            other = partner(index)
            if other is None:
                return example
            names = (modality, f"{modality}_mask", f"quality_{modality}")
            theirs = source[other]
            return {**example, **{name: theirs[name] for name in names if name in example}}

        super().__init__(source, swap)


def misalign(source: Source, modality: str, *, prob: float = 1.0, seed: int = 0) -> SwappedModality:
    """Gives some examples the modality of an example of another class, or with another label.

    Only the seed and the example's number decide which examples, and which partners.

    Args:
      source: to read from.
      modality: to swap.
      prob: that an example is chosen.
      seed: of the choice.

    Raises:
      ConfigError: `prob` is not in [0, 1].
      DataError: the source has one class only.
    """
    _check_fraction(f"misalign of {modality!r}", prob)
    labels = labels_of(source)
    if len(np.unique(labels, axis=0)) < 2:
        raise DataError(f"misalign of {modality!r}: all examples are of one class")

    def partner(index: int) -> int | None:
        rng = np.random.default_rng((seed, index))
        if rng.random() >= prob:
            return None
        other = (labels != labels[index]).reshape(len(labels), -1).any(axis=1)
        return int(rng.choice(np.flatnonzero(other)))

    return SwappedModality(source, modality, partner)
