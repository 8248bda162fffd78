"""Predictions of a trained run, its rotation in place."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rollingq_jax.analysis.predictions import class_probabilities
from rollingq_jax.data.media_arrays import MediaSizes, read_value
from rollingq_jax.data.preprocessing import InputSpec, Preprocessing
from rollingq_jax.data.types import ModalityInfo
from rollingq_jax.errors import DataError, UserError
from rollingq_jax.train.restore import load_run

Batch = Mapping[str, Any]
POSITIONS = ("sequence", "tokens")  # kinds whose positions can be masked one by one


class Prediction(NamedTuple):
    """A model's answers on N examples.

    Attributes:
      probabilities: `[N, C]` float32.
      attention_share: `{m: [N, n H]}` float32, how much of a head's attention a modality got, for
        the H heads of n fusion layers; sums to 1 over the modalities. Empty for a fusion without a
        class query.
    """

    probabilities: np.ndarray
    attention_share: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Predictor:
    """A model, ready to answer; `predictor(batch)` is `predictor.predict(batch)`.

    Attributes:
      model: from `build_model`.
      params: its parameters.
      rotation: `[H, d_h, d_h]`, or None.
      inputs: how raw arrays become the model's input, and the names of the classes.
      max_batch_size: the most examples that are computed at once; a power of two.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    inputs: InputSpec
    max_batch_size: int = 256

    def __post_init__(self) -> None:
        check_batch_size(self.max_batch_size)

    @property
    def preprocessing(self) -> dict[str, Preprocessing]:
        """Of the modalities that the model reads, in alphabetical order."""
        return {m: self.inputs.modalities[m] for m in self.model.spec.modalities}

    @property
    def modalities(self) -> dict[str, ModalityInfo]:
        """What the model reads, when raw arrays have been preprocessed."""
        return {m: one.info for m, one in self.preprocessing.items()}

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class; empty where the data set has none."""
        return self.inputs.class_names

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(answer_function(self.model))

    def predict(self, batch: Batch, *, standardized: bool = False) -> Prediction:
        """Class probabilities, and which modality the class query looked at.

        Compiled for batch sizes that are powers of two, up to `max_batch_size`; other batches are
        padded or cut into such parts, so that any number of examples costs few compilations.

        Args:
          batch: `"<m>"` `[N, ...]` for each modality: raw arrays, as they stood in the training
            file (`preprocessing` has their shapes), or, where the model was trained on media files,
            a list of N paths (of strings for a column of text; None where there is none).
            Where examples lack a modality, `"<m>_mask"` `[N]` bool is False for them, and what the
            array holds there does not matter; where all of them lack it, `"<m>"` can be left out.
            `"<m>_mask"` `[N, L]` marks real positions, as in training. `"mask_<m>"`, as own data
            have it, is the same. Other keys are not read.
          standardized: the arrays are what the model reads (`modalities` has their shapes):
            preprocessed already.

        Raises:
          DataError: the batch is empty, holds no modality, or an array or a file does not fit.
        """
        inputs = complete(self.read(batch), self.preprocessing, standardized)
        parts = [
            self._part(part, rows, standardized)
            for part, rows in chunks(inputs, self.max_batch_size)
        ]
        probabilities = np.concatenate([part.probabilities for part in parts])
        names = parts[0].attention_share
        shares = {m: np.concatenate([part.attention_share[m] for part in parts]) for m in names}
        return Prediction(probabilities, shares)

    __call__ = predict

    def read(self, batch: Batch) -> dict[str, Any]:
        """The batch with raw arrays, and their masks, in the place of lists of files.

        An exported function takes such arrays.

        Raises:
          DataError: a file cannot be read, or the model was not trained on files.
        """
        found = dict(batch)
        for m, one in self.preprocessing.items():
            if m in batch and is_list_of_files(batch[m]):
                found |= read_files(m, batch[m], one)
        return found

    def _part(self, part: dict[str, np.ndarray], rows: int, standardized: bool) -> Prediction:
        if not standardized:
            part = part | {
                m: one.apply(part[m], part.get(f"{m}_mask"))
                for m, one in self.preprocessing.items()
            }
        probabilities, shares = jax.device_get(self._apply(self.params, self.rotation, part))
        return Prediction(probabilities[:rows], {m: x[:rows] for m, x in shares.items()})


def check_batch_size(size: int) -> None:
    """Batches are cut into powers of two, so that the largest part is one.

    Raises:
      UserError: it is not.
    """
    if not isinstance(size, int) or size < 1 or size & (size - 1):
        raise UserError(f"max_batch_size is {size!r}; allowed: a power of two")


def answer_function(model: Any) -> Any:
    """`(params, rotation, batch) -> (probabilities [B, C], share {m: [B, n H]})`, pure."""

    def answer(params: Any, rotation: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
        logits, out = model.apply({"params": params}, batch, rotation=rotation)
        return class_probabilities(logits), out.get("attention_share", {})

    return answer


def is_list_of_files(value: Any) -> bool:
    """Whether a modality comes as paths or texts and not as numbers."""
    if isinstance(value, np.ndarray):
        return value.dtype.kind in "UO"
    items = value if isinstance(value, list | tuple) else ()
    return any(isinstance(item, str | os.PathLike) for item in items)


def read_files(name: str, cells: Any, one: Preprocessing) -> dict[str, np.ndarray]:
    """Raw arrays `"<m>"` and `"<m>_mask"` `[N]` from N paths or texts; None or "" is missing.

    Raises:
      DataError: the model was not trained on files, or one cannot be read.
    """
    if one.media is None:
        raise DataError(
            f"{name} holds {cells[0]!r}; allowed: numbers, since the model was trained on arrays"
        )
    fields = dict(one.media)
    kind = fields.pop("type")
    sizes = MediaSizes(**fields)
    present = np.array([cell is not None and os.fspath(cell) != "" for cell in cells], bool)
    raw = np.zeros((len(cells), *one.raw_shape), one.raw_dtype)
    for index in np.flatnonzero(present):
        cell = cells[index] if kind == "string" else Path(cells[index])
        raw[index] = read_value(cell, kind, sizes)
    return {name: raw, f"{name}_mask": present}


def complete(
    batch: Batch, modalities: Mapping[str, Preprocessing], standardized: bool = False
) -> dict[str, np.ndarray]:
    """The arrays that the model needs, checked; a modality that is left out is filled and masked.

    Args:
      batch: as `Predictor.predict`, without lists of files.
      modalities: how raw arrays become the model's input.
      standardized: whether the arrays are the model's input already.

    Raises:
      DataError: as `Predictor.predict`.
    """
    present = {
        m: as_input(batch[m], one, standardized) for m, one in modalities.items() if m in batch
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
        if m not in present:
            inputs[m] = np.zeros((size, *expected_shape(one, standardized)), one.info.dtype)
            inputs[f"{m}_mask"] = np.zeros(size, bool)
        elif mask is not None:
            mask = np.asarray(mask)
            if mask.dtype.kind in "iu" and np.isin(mask, (0, 1)).all():
                mask = mask.astype(bool)  # as own data may have it
            allowed = [
                (size,),
                *([(size, one.info.shape[0])] if one.info.kind in POSITIONS else []),
            ]
            if mask.dtype != np.bool_ or mask.shape not in allowed:
                raise DataError(
                    f"{m}_mask has shape {mask.shape} and dtype {mask.dtype}; allowed: "
                    f"{' or '.join(map(str, allowed))}, bool"
                )
            inputs[f"{m}_mask"] = mask
        check_values(inputs[m], inputs.get(f"{m}_mask"), one.info)
    return inputs


def check_values(array: np.ndarray, mask: np.ndarray | None, info: ModalityInfo) -> None:
    """What is not masked out is finite as float32, and an id is in the vocabulary.

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


def expected_shape(one: Preprocessing, standardized: bool) -> tuple[int, ...]:
    """The shape of one example, raw or as the model reads it."""
    return tuple(one.info.shape if standardized else one.raw_shape)


def as_input(value: Any, one: Preprocessing, standardized: bool = False) -> np.ndarray:
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
    kinds = {"f": "float", "u": "uint8", "i": "integer"}
    wanted = np.dtype(info.dtype)
    shape = expected_shape(one, standardized)
    if wanted.kind == "i":
        fits = array.dtype.kind in "iu"
    elif wanted.kind == "u":
        fits = array.dtype == wanted
    else:
        fits = jnp.issubdtype(array.dtype, jnp.floating) or (
            not standardized and array.dtype.kind in "biu"
        )
    if array.ndim and array.shape[1:] in ((*shape, 1), shape[:-1] if shape[-1:] == (1,) else shape):
        array = array.reshape(len(array), *shape)
    if array.ndim == 0 or array.shape[1:] != shape or not fits:
        allowed = ", ".join(map(str, ("N", *shape)))
        raise DataError(
            f"{info.name} has shape {array.shape} and dtype {array.dtype}; "
            f"allowed: [{allowed}], {kinds[wanted.kind]}"
        )
    if array.dtype.kind not in "biuf":  # bfloat16 and its like, which NumPy cannot compute with
        array = array.astype(np.float32)
    return array.astype(wanted, copy=False) if standardized or wanted.kind == "i" else array


def chunks(
    inputs: Mapping[str, np.ndarray], max_batch_size: int
) -> Iterator[tuple[dict[str, np.ndarray], int]]:
    """Parts of a batch, each with its number of real rows; the last row fills up the last part.

    Sizes are `max_batch_size`, and for what is left over the next power of two.
    """
    total = len(next(iter(inputs.values())))
    for start in range(0, total, max_batch_size):
        rows = min(max_batch_size, total - start)
        padding = (1 << (rows - 1).bit_length()) - rows
        part = {name: x[start : start + rows] for name, x in inputs.items()}
        if padding:
            part = {n: np.concatenate([x, np.repeat(x[-1:], padding, 0)]) for n, x in part.items()}
        yield part, rows


def load(workdir: epath.PathLike, *, max_batch_size: int = 256) -> Predictor:
    """The trained model in a run's folder, to predict with; the run's data need not be there.

    The parameters and the rotation are those of the best checkpoint by validation accuracy, and raw
    arrays are preprocessed as the training data were.

    Args:
      workdir: the run's folder.
      max_batch_size: the most examples that are computed at once; a power of two.

    Returns:
      A `Predictor`; calling it with a batch gives `(probabilities, attention_share)`.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder, or it was written by a
        version that did not record its preprocessing.
      ConfigError: its configuration cannot be used any more.

    Example:
      >>> predict = load("runs/demo")  # doctest: +SKIP
      >>> probabilities, attention_share = predict({"audio": audio})  # doctest: +SKIP
    """
    check_batch_size(max_batch_size)
    run = load_run(workdir)
    return Predictor(run.model, run.params, run.rotation, run.inputs, max_batch_size)
