"""Predictions of a trained run, its rotation in place."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rollingq_jax.data.types import ModalityInfo
from rollingq_jax.errors import DataError, UserError
from rollingq_jax.train.restore import load_run

Batch = Mapping[str, Any]


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
      modalities: what an example looks like, in alphabetical order.
      class_names: one for each class; empty where the data set has none.
      max_batch_size: the most examples that are computed at once; a power of two.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    modalities: Mapping[str, ModalityInfo]
    class_names: tuple[str, ...] = ()
    max_batch_size: int = 256

    def __post_init__(self) -> None:
        check_batch_size(self.max_batch_size)

    @functools.cached_property
    def _apply(self) -> Any:
        return jax.jit(answer_function(self.model))

    def predict(self, batch: Batch) -> Prediction:
        """Class probabilities, and which modality the class query looked at.

        Compiled for batch sizes that are powers of two, up to `max_batch_size`; other batches are
        padded or cut into such parts, so that any number of examples costs few compilations.

        Args:
          batch: `"<m>"` `[N, ...]` for each modality, as in training (`modalities` has the shapes).
            Where examples lack a modality, `"<m>_mask"` `[N]` bool is False for them, and what the
            array holds there does not matter; where all of them lack it, `"<m>"` can be left out.
            `"<m>_mask"` `[N, L]` marks real positions, as in training. Other keys are not read.

        Raises:
          DataError: the batch is empty, holds no modality, or an array does not fit.
        """
        inputs = complete(batch, self.modalities)
        parts = [self._part(part, rows) for part, rows in chunks(inputs, self.max_batch_size)]
        probabilities = np.concatenate([part.probabilities for part in parts])
        names = parts[0].attention_share
        shares = {m: np.concatenate([part.attention_share[m] for part in parts]) for m in names}
        return Prediction(probabilities, shares)

    __call__ = predict

    def _part(self, part: dict[str, np.ndarray], rows: int) -> Prediction:
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
        return jax.nn.softmax(logits, axis=-1), out.get("attention_share", {})

    return answer


def complete(batch: Batch, modalities: Mapping[str, ModalityInfo]) -> dict[str, np.ndarray]:
    """The arrays that the model reads, checked; a modality that is left out is filled and masked.

    Raises:
      DataError: as `Predictor.predict`.
    """
    present = {m: as_input(batch[m], info) for m, info in modalities.items() if m in batch}
    if not present:
        names, found = ", ".join(modalities), ", ".join(map(str, batch)) or "nothing"
        raise DataError(f"the batch has {found}; allowed: at least one of {names}")
    sizes = {m: len(x) for m, x in present.items()}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        counts = ", ".join(f"{m} {size}" for m, size in sizes.items())
        raise DataError(f"numbers of examples: {counts}; allowed: one number, 1 or more")
    size = next(iter(sizes.values()))
    inputs = dict(present)
    for m, info in modalities.items():
        if m not in present:
            inputs[m] = np.zeros((size, *info.shape), info.dtype)
            inputs[f"{m}_mask"] = np.zeros(size, bool)
        elif f"{m}_mask" in batch:
            mask = np.asarray(batch[f"{m}_mask"])
            if mask.dtype != np.bool_ or mask.ndim not in (1, 2) or len(mask) != size:
                raise DataError(
                    f"{m}_mask has shape {mask.shape} and dtype {mask.dtype}; allowed: bool, "
                    f"[{size}] or [{size}, positions]"
                )
            inputs[f"{m}_mask"] = mask
        check_values(inputs[m], inputs.get(f"{m}_mask"), info)
    return inputs


def check_values(array: np.ndarray, mask: np.ndarray | None, info: ModalityInfo) -> None:
    """What is not masked out is finite, and an id is in the vocabulary.

    Raises:
      DataError: it is not; the answer would be NaN without a word.
    """
    if mask is not None and mask.shape == array.shape[: mask.ndim]:
        array = array[mask]
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise DataError(f"{info.name} holds NaN or infinity; allowed: finite numbers, or a mask")
    if info.vocab_size is not None and array.size:
        low, high = array.min(), array.max()
        if low < 0 or high >= info.vocab_size:
            wrong = low if low < 0 else high
            raise DataError(f"{info.name} holds {wrong}; allowed: 0 to {info.vocab_size - 1}")


def as_input(value: Any, info: ModalityInfo) -> np.ndarray:
    """An array of a modality in the dtype that the model was trained with.

    Raises:
      DataError: the shape is another, or the dtype means something else.
    """
    try:
        array = np.asarray(value)
    except ValueError as error:  # rows of different lengths
        raise DataError(f"{info.name} is not an array: {error}") from None
    kinds = {"f": "float", "u": "uint8", "i": "integer"}
    wanted = np.dtype(info.dtype)
    if wanted.kind == "i":
        fits = array.dtype.kind in "iu"
    elif wanted.kind == "u":
        fits = array.dtype == wanted
    else:
        fits = jnp.issubdtype(array.dtype, jnp.floating)
    if array.shape[1:] != tuple(info.shape) or array.ndim == 0 or not fits:
        shape = ", ".join(map(str, ("N", *info.shape)))
        raise DataError(
            f"{info.name} has shape {array.shape} and dtype {array.dtype}; "
            f"allowed: [{shape}], {kinds[wanted.kind]}"
        )
    return array.astype(wanted, copy=False)


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
    """The trained model in a run's folder, to predict with.

    The parameters and the rotation are those of the best checkpoint by validation accuracy. The
    run's data set has to be there, as for every command that reads a run; where it is not, serve
    an exported function (`python -m rollingq_jax.export --stablehlo`).

    Args:
      workdir: the run's folder.
      max_batch_size: the most examples that are computed at once; a power of two.

    Returns:
      A `Predictor`; calling it with a batch gives `(probabilities, attention_share)`.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder.
      ConfigError, DataError: its configuration or its data cannot be used any more.

    Example:
      >>> predict = load("runs/demo")  # doctest: +SKIP
      >>> probabilities, attention_share = predict({"audio": audio})  # doctest: +SKIP
    """
    check_batch_size(max_batch_size)
    run = load_run(workdir)
    names = run.model.spec.modalities
    return Predictor(
        run.model,
        run.params,
        run.rotation,
        {m: run.dataset.modalities[m] for m in names},
        tuple(run.dataset.class_names),
        max_batch_size,
    )
