"""From raw arrays to what the model reads: measured on the training split, saved with the model.

A raw array is one as it stood in the training file, or as a media file gave it; `Preprocessing`
turns it into the model's input, and `InputSpec` is all that a trained model has to know of its
data. Both go through JSON, into each checkpoint's record, `summary.json` and the model card, so
that inference needs no data set.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from rollingq_jax.data.dataset import (
    REGRESSION,
    SINGLE_LABEL,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    labels_of,
)
from rollingq_jax.errors import DataError
from rollingq_jax.models.spec import KINDS

# Standardized features are cut off here: a feature that is almost constant in training and not so
# later would otherwise reach hundreds of standard deviations.
CLIP = 10.0
# Kinds whose positions can be masked one by one.
POSITIONS = tuple(kind for kind, axes in KINDS.items() if axes[0] == "position")


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """The way from one modality's raw arrays to what the model reads.

    Attributes:
      info: the modality as the model reads it.
      raw_shape: of one raw example; `info.shape`, or that without its last axis of size 1.
      raw_dtype: of the raw arrays, as they are stored.
      mean, std: one number for each entry of the last axis of `info.shape`, in the raw array's
        units; None leaves the values as they are.
      clip: the largest standardized magnitude; None for no limit. Not used where `mean` is None.
      media: for files, what `read_value` needs to make a raw array
        of one: "type" and the fields of `MediaSizes`; None for data that come as arrays.
    """

    info: ModalityInfo
    raw_shape: tuple[int, ...]
    raw_dtype: str
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    clip: float | None = CLIP
    media: Mapping[str, Any] | None = None

    @functools.cached_property
    def _scale(self) -> tuple[np.ndarray, np.ndarray]:
        return np.asarray(self.mean, np.float64), np.asarray(self.std, np.float64)

    def apply(self, raw: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """`[..., *raw_shape]` -> `[..., *info.shape]` in `info.dtype`; 0 where the mask is False.

        Args:
          raw: one example or a batch; the computation is in float64.
          mask: bool, over the first axes of `raw`; what stands where it is False may be anything.
        """
        raw = np.asarray(raw)
        value = raw.reshape(raw.shape[: raw.ndim - len(self.raw_shape)] + self.info.shape)
        if self.mean is not None:
            mean, std = self._scale
            limit = math.inf if self.clip is None else self.clip
            with np.errstate(invalid="ignore", over="ignore"):  # masked positions hold anything
                value = np.clip((value - mean) / std, -limit, limit)
        if mask is not None:
            value = np.where(mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim)), value, 0)
        return np.ascontiguousarray(value, dtype=self.info.dtype)

    def apply_traced(self, raw: Array, mask: Array) -> Array:
        """`apply` of a batch `[B, *raw_shape]` under `jit`, in float32.

        float32 holds `mean` to 7 digits, so what is left of it is subtracted after it. Arrays that
        are stored as float64 are rounded to float32 before they come here.
        """
        value = raw.reshape(raw.shape[0], *self.info.shape)
        if self.mean is not None:
            mean, std = (x.reshape((1,) * (value.ndim - 1) + x.shape) for x in self._scale)
            limit = math.inf if self.clip is None else self.clip
            first = mean.astype(np.float32)
            rest = (mean - first).astype(np.float32)
            value = jnp.clip(
                ((value.astype(jnp.float32) - first) - rest) / std.astype(np.float32),
                -limit,
                limit,
            )
        real = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
        return jnp.where(real, value, jnp.zeros([], value.dtype)).astype(self.info.dtype)

    def lost_digits(self) -> float:
        """The largest error, in standard deviations, of rounding the raw array to float32."""
        if self.mean is None or np.dtype(self.raw_dtype).itemsize <= 4:
            return 0.0
        mean, std = self._scale
        return float(np.max(np.abs(mean) / std, initial=0.0) * np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """All that a trained model has to know of its data.

    Attributes:
      modalities: name -> `Preprocessing`, in alphabetical order.
      num_classes: labels are 0 .. num_classes - 1; of other tasks the length of a label.
      class_names: one for each class, or number of a label; empty where the data set has none.
      description: of the training data.
      task: one of `rollingq_jax.data.dataset.TASKS`.
      target_mean, target_std: of a regression, `[K]` over the training split; else empty.
    """

    modalities: Mapping[str, Preprocessing]
    num_classes: int
    class_names: tuple[str, ...] = ()
    description: str = ""
    task: str = SINGLE_LABEL
    target_mean: tuple[float, ...] = ()
    target_std: tuple[float, ...] = ()

    @property
    def classes(self) -> tuple[str, ...]:
        """A name for each class; its number where the data set has none."""
        return self.class_names or tuple(map(str, range(self.num_classes)))

    def with_outputs(self, num_classes: int) -> "InputSpec":
        """With a class, and where there are names a name, for each output of a model with more."""
        if num_classes <= self.num_classes:
            return self
        more = tuple(f"class {number}" for number in range(self.num_classes, num_classes))
        names = self.class_names + more if self.class_names else ()
        return dataclasses.replace(self, num_classes=num_classes, class_names=names)

    def with_tokenizer(self, path: str) -> "InputSpec":
        """With the tokenizer, where texts have one, at another place; its checksum stays."""
        modalities = {}
        for name, one in self.modalities.items():
            _, mark, checksum = str((one.media or {}).get("tokenizer", "")).partition("#")
            if mark:
                media = {**(one.media or {}), "tokenizer": f"{path}#{checksum}"}
                one = dataclasses.replace(one, media=media)
            modalities[name] = one
        return dataclasses.replace(self, modalities=modalities)

    def to_json(self) -> dict[str, Any]:
        """A JSON object from which `from_json` makes an equal `InputSpec`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "InputSpec":
        """Reads what `to_json` wrote, after a passage through a file.

        Raises:
          DataError: a field is missing or of another type.
        """
        try:
            return cls(
                {name: _modality(value) for name, value in sorted(content["modalities"].items())},
                int(content["num_classes"]),
                tuple(map(str, content["class_names"])),
                str(content["description"]),
                str(content.get("task", SINGLE_LABEL)),  # older records have no other
                *(tuple(map(float, content.get(f"target_{n}", ()))) for n in ("mean", "std")),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"preprocessing in a run's record cannot be read ({error!r})") from None


def _modality(content: Mapping[str, Any]) -> Preprocessing:
    info = {name: _tuple(value) for name, value in content["info"].items()}
    fields = {name: _tuple(value) for name, value in content.items() if name != "info"}
    return Preprocessing(info=ModalityInfo(**info), **fields)


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def input_spec(dataset: Dataset) -> InputSpec:
    """The specification of a data set; a modality of which it says nothing is taken as it is."""
    unchanged = {
        name: Preprocessing(info, info.shape, info.dtype)
        for name, info in dataset.modalities.items()
    }
    targets: dict[str, tuple[float, ...]] = {}
    if dataset.task == REGRESSION:
        values = labels_of(dataset.splits["train"]).astype(np.float64)
        moments = {"mean": values.mean(axis=0), "std": values.std(axis=0)}
        targets = {f"target_{name}": tuple(x.tolist()) for name, x in moments.items()}
    return InputSpec(
        unchanged | dict(dataset.preprocessing),
        dataset.num_classes,
        tuple(dataset.class_names),
        dataset.description,
        dataset.task,
        **targets,
    )


class RunningStats:
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
        """Both divided by `scale`; 1 takes the place of the deviation of a constant feature."""
        mean = self._mean / scale
        std = np.sqrt(self._squares / max(self._count, 1)) / scale
        constant = std <= 1e-6 * np.abs(mean)  # nothing but rounding; holds for 0 and 0 too
        return mean, np.where(constant, 1.0, std)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` numbers, evenly spaced in `range(count)`."""
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
        name: RunningStats(one.info.shape[-1])
        for name, one in modalities.items()
        if one.info.kind != "tokens" and (floats or one.info.dtype == "uint8")
    }
    # Example by example: the sources may decode files, and all of them need not fit into memory.
    for index in evenly_spaced(len(train), most):
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


class Preprocessed:
    """A source of raw examples, with `apply_all` on each of them."""

    def __init__(self, source: Source, modalities: Mapping[str, Preprocessing]) -> None:
        self.source, self.modalities = source, dict(modalities)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return apply_all(self.modalities, self.source[index])


def apply_all(modalities: Mapping[str, Preprocessing], example: Example) -> Example:
    """The example with `Preprocessing.apply` on each of the modalities given."""
    done = {m: one.apply(example[m], example.get(f"{m}_mask")) for m, one in modalities.items()}
    return {**example, **done}


def complete(
    batch: Mapping[str, Any], modalities: Mapping[str, Preprocessing], standardized: bool = False
) -> dict[str, np.ndarray]:
    """The arrays that the model needs, checked; a modality that is left out is filled and masked.

    Args:
      batch: `"<m>"` `[N, ...]`, for at least one of them; `"<m>_mask"` (or `"mask_<m>"`) `[N]`, or
        `[N, L]` of a sequence or tokens: bool, or integers 0 and 1.
      modalities: how raw arrays become the model's input.
      standardized: whether the arrays are the model's input already.

    Raises:
      DataError: there is no modality, or an array does not fit.
    """
    present = {
        m: _as_input(batch[m], one, standardized) for m, one in modalities.items() if m in batch
    }
    if not present:
        names, found = ", ".join(modalities), ", ".join(map(str, batch)) or "nothing"
        raise DataError(f"the batch has {found}; allowed: at least one of {names}")
    sizes = {m: len(x) for m, x in present.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        counts = ", ".join(f"{m} {size}" for m, size in sizes.items())
        raise DataError(f"numbers of examples: {counts}; allowed: one number, 1 or more")
    size = next(iter(sizes.values()))
    inputs = dict(present)
    for m, one in modalities.items():
        mask = batch.get(f"{m}_mask", batch.get(f"mask_{m}"))
        if m not in present:  # the model's shapes want it all the same
            shape = one.info.shape if standardized else one.raw_shape
            inputs[m] = np.zeros((size, *shape), one.info.dtype)
            inputs[f"{m}_mask"] = np.zeros(size, bool)
        elif mask is not None:
            mask = np.asarray(mask)
            if mask.dtype.kind in "iu" and np.isin(mask, (0, 1)).all():
                mask = mask.astype(bool)  # as own data may have it
            allowed: list[tuple[int, ...]] = [(size,)]
            if one.info.kind in POSITIONS:
                allowed.append((size, one.info.shape[0]))
            if mask.dtype != np.bool_ or mask.shape not in allowed:
                raise DataError(
                    f"{m}_mask has shape {mask.shape} and dtype {mask.dtype}; allowed: "
                    f"{' or '.join(map(str, allowed))}, bool"
                )
            inputs[f"{m}_mask"] = mask
        _check_values(inputs[m], inputs.get(f"{m}_mask"), one.info)
    return inputs


def _check_values(array: np.ndarray, mask: np.ndarray | None, info: ModalityInfo) -> None:
    """Checks that what is not masked out is finite as float32, and an id in the vocabulary.

    Raises:
      DataError: it is not; the answer would be NaN without a word.
    """
    if mask is not None and mask.shape == array.shape[: mask.ndim]:
        array = array[mask]
    if array.dtype.kind == "f":
        with np.errstate(over="ignore"):
            finite = np.isfinite(array.astype(np.float32)).all()
        if not finite:
            raise DataError(
                f"{info.name} holds NaN or infinity; allowed: finite numbers, or a mask"
            )
    if info.vocab_size is not None and array.size:
        low, high = array.min(), array.max()
        if low < 0 or high >= info.vocab_size:
            wrong = low if low < 0 else high
            raise DataError(f"{info.name} holds {wrong}; allowed: 0 to {info.vocab_size - 1}")


def _as_input(value: Any, one: Preprocessing, standardized: bool) -> np.ndarray:
    """An array of a modality, with the shape and a dtype that its preprocessing takes.

    A raw array may have the last axis of size 1 that preprocessing adds, or lack it. Integers and
    booleans count as numbers where the model reads floats, as they do in training.

    Raises:
      DataError: the shape is another, or the dtype means something else.
    """
    info = one.info
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{info.name} is not an array: {error}") from None
    wanted = np.dtype(info.dtype)
    shape = tuple(info.shape if standardized else one.raw_shape)
    if wanted.kind == "i":
        fits, words = array.dtype.kind in "iu", "integer"
    elif wanted.kind == "u":
        fits, words = array.dtype == wanted, "uint8"
    else:
        counts = not standardized and array.dtype.kind in "biu"
        fits, words = counts or jnp.issubdtype(array.dtype, jnp.floating), "float"
    if array.ndim and array.shape[1:] in ((*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape):
        array = array.reshape(len(array), *shape)
    if array.ndim == 0 or array.shape[1:] != shape or not fits:
        allowed = ", ".join(map(str, ("N", *shape)))
        raise DataError(
            f"{info.name} has shape {array.shape} and dtype {array.dtype}; "
            f"allowed: [{allowed}], {words}"
        )
    if array.dtype.kind not in "biuf":  # bfloat16 and its like, which NumPy cannot compute with
        array = array.astype(np.float32)
    return array.astype(wanted, copy=False) if standardized or wanted.kind == "i" else array
