"""Corruptions by name: what ``--corrupt`` and ``data.corruptions`` say, put onto a data set.

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
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from rollingq_jax.data.labels import labels_of
from rollingq_jax.data.masking import FrameBlanking, ModalityDropout, TimeMasking
from rollingq_jax.data.measure import Moments, evenly
from rollingq_jax.data.transforms import (
    GaussianNoise,
    Replace,
    SignalToNoise,
    positions,
    to_float,
)
from rollingq_jax.data.types import Dataset, Example, ModalityInfo, Source
from rollingq_jax.errors import ConfigError, DataError

NAMES = ("noise", "snr", "drop", "blank", "timemask", "replace", "misalign")
FORM = (
    "must be modality=NUMBER (noise in training-set standard deviations), modality=LOW..HIGH, each "
    "also with @SHARE of the examples behind it, or modality=NAME:NUMBER with NAME one of "
    + ", ".join(NAMES)
)
UNIT_EXAMPLES = 256


class Corruption(NamedTuple):
    """One corruption of one modality; ``amount`` is None where the specification has no number."""

    modality: str
    name: str
    amount: float | tuple[float, float] | None
    share: float = 1.0  # of the examples, for noise


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
        share = 1.0
        if name == "noise" and "@" in number:
            number, _, text = number.partition("@")
            share = _number(part, text)
        corruptions.append(Corruption(modality, name, _amount(part, name, number), share))
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
      corruptions: a specification, or what :func:`parse_corruptions` made of one.
      train: whether the training split is corrupted; else all others are.
      seed: of which examples are misaligned, and with which; everything else is drawn by the
        pipeline's generator.
      encoders: ``config.model.encoders``; a ``mean`` and ``std`` there say how the model normalises
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
    for modality, name, amount, noised in corruptions:
        info = _as_normalised(dataset.modalities[modality], (encoders or {}).get(modality))
        if name == "misalign":
            share: Any = 1.0 if amount is None else amount
            for split in targets:
                splits[split] = Misaligned(splits[split], modality, share=share, seed=seed)
            continue
        made = _TRANSFORMS[name](dataset, info, amount)
        transforms.append(made if noised == 1.0 else dataclasses.replace(made, share=noised))
    field = "train_transforms" if train else "eval_transforms"
    changed: dict[str, Any] = {field: (*getattr(dataset, field), *transforms)}
    return dataclasses.replace(dataset, splits=splits, **changed)


def _as_normalised(info: ModalityInfo, encoder: Any) -> ModalityInfo:
    if encoder is None or not encoder.get("mean") or not encoder.get("std"):
        return info
    return dataclasses.replace(info, mean=tuple(encoder["mean"]), std=tuple(encoder["std"]))


def _drop(dataset: Dataset, info: ModalityInfo, amount: float | None) -> ModalityDropout:
    others = tuple(name for name in dataset.modalities if name != info.name)
    return ModalityDropout(info, others, 1.0 if amount is None else amount)


def _replace(dataset: Dataset, info: ModalityInfo, amount: float | None) -> Replace:
    unit = 1.0 if info.kind == "tokens" else training_deviation(dataset, info)
    return Replace(info, 1.0 if amount is None else amount, unit)


def _noise(kind: Callable[..., Any]) -> Callable[[Dataset, ModalityInfo, Any], Any]:
    def make(dataset: Dataset, info: ModalityInfo, amount: Any) -> Any:
        checked = kind(info, amount)  # before the data are read
        return dataclasses.replace(checked, unit=training_deviation(dataset, info))

    return make


_TRANSFORMS: dict[str, Callable[[Dataset, ModalityInfo, Any], grain.transforms.RandomMap]] = {
    "noise": _noise(GaussianNoise),
    "snr": _noise(SignalToNoise),
    "drop": _drop,
    "blank": lambda dataset, info, amount: FrameBlanking(info, amount),
    "timemask": lambda dataset, info, amount: TimeMasking(info, amount),
    "replace": _replace,
}


def training_deviation(dataset: Dataset, info: ModalityInfo) -> float:
    """The standard deviation of a modality over the training split, all features together.

    ``info.unit`` where the data set states it; else measured over at most 256 examples, evenly
    spaced, of the floats that the model sees, real positions alone.
    """
    if info.unit is not None:
        return info.unit
    if "train" not in dataset.splits:
        raise DataError(
            f"noise in {info.name!r} is in standard deviations of the training data, which are not "
            "known; allowed: the data that the run was trained on, or another corruption"
        )
    source, moments = dataset.splits["train"], Moments(1)
    for index in evenly(len(source), UNIT_EXAMPLES):
        example = source[index]
        for transform in dataset.eval_transforms:
            if isinstance(transform, grain.transforms.Map):
                example = transform.map(example)
        value = to_float(example[info.name], info)
        real = np.broadcast_to(positions(example, info.name), value.shape)
        moments.add(value[real].reshape(-1, 1))
    return float(moments.mean_and_std()[1][0])


class Misaligned:
    """A source in which one modality of some examples is that of an example of another class.

    What belongs to the modality (its mask, its quality) comes along; the label stays. The seed and
    the example's number alone decide which examples and which partners.

    Args:
      source: to read from.
      modality: to exchange.
      share: of the examples.
      seed: of the choice.

    Raises:
      ConfigError: the share is not in [0, 1].
      DataError: the source has one class only.
    """

    def __init__(self, source: Source, modality: str, *, share: float = 1.0, seed: int = 0) -> None:
        if not 0.0 <= share <= 1.0:
            raise ConfigError(f"misalign of {modality!r}: {share!r}; must be between 0 and 1")
        self.source, self.modality, self.share, self.seed = source, modality, share, seed
        self.labels = labels_of(source)
        if len(np.unique(self.labels)) < 2:
            raise DataError(f"misalign of {modality!r}: all examples are of one class")

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        example = dict(self.source[index])
        rng = np.random.default_rng((self.seed, index))
        if rng.random() >= self.share:
            return example
        others = np.flatnonzero(self.labels != self.labels[index])
        partner = self.source[int(rng.choice(others))]
        for key in (self.modality, f"{self.modality}_mask", f"quality_{self.modality}"):
            if key in example:
                example[key] = partner[key]
        return example
