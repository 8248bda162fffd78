"""Predictions of a trained run, its rotation in place."""

import dataclasses
import functools
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rollingq_jax.analysis.metrics import PredictFn, predict_fn
from rollingq_jax.analysis.probes import Probe
from rollingq_jax.analysis.tasks import Task, task_of
from rollingq_jax.data.dataset import Dataset, ModalityInfo
from rollingq_jax.data.preprocessing import InputSpec, Preprocessing, complete
from rollingq_jax.data.sources.media_folder import MediaSizes, read_value
from rollingq_jax.errors import DataError, UserError
from rollingq_jax.quality import QualityState, model_variables
from rollingq_jax.train.loop import LoadedRun, load_run

Batch = Mapping[str, Any]


class Prediction(NamedTuple):
    """A model's answers on N examples.

    Attributes:
      probabilities: `[N, C]` float32: of each class; of each label, where an example may have any
        number of them; of a regression the values, in the unit of the training labels.
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
      quality: sums behind the norm bias's statistics; None for a model without one.
      batch_stats: running averages of resnet18 encoders; None for a model without one.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    inputs: InputSpec
    max_batch_size: int = 256
    quality: QualityState | None = None
    batch_stats: Any = None

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

    @functools.cached_property
    def task(self) -> Task:
        """What the model has learned."""
        return task_of(self.inputs)

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class, label or value; empty where the data set has none."""
        return self.inputs.class_names

    @functools.cached_property
    def _predict(self) -> PredictFn:
        variables = model_variables(self.params, self.quality, self.batch_stats)
        return predict_fn(self.model, variables, self.rotation, self.task.answer)

    def predict(self, batch: Batch, *, standardized: bool = False) -> Prediction:
        """Class probabilities, or the task's answers, and which modality the class query looked at.

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
        found = jax.device_get(self._predict(part))
        shares = {m: share[:rows] for m, share in found["attention_share"].items()}
        return Prediction(found["probabilities"][:rows], shares)


def check_batch_size(size: int) -> None:
    """Batches are cut into powers of two, so that the largest part is one.

    Raises:
      UserError: it is not.
    """
    if not isinstance(size, int) or size < 1 or size & (size - 1):
        raise UserError(f"max_batch_size is {size!r}; allowed: a power of two")


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
    texts = [_cell(name, cell, strip=kind == "string") for cell in cells]
    present = np.array([text != "" for text in texts], bool)
    raw = np.zeros((len(cells), *one.raw_shape), one.raw_dtype)
    for index in np.flatnonzero(present):
        cell = texts[index] if kind == "string" else Path(texts[index])
        raw[index] = read_value(cell, kind, sizes)
    return {name: raw, f"{name}_mask": present}


def _cell(name: str, cell: Any, *, strip: bool) -> str:
    """A path, or a text without the spaces around it, as in a manifest; "" where there is none."""
    if cell is None:
        return ""
    if not isinstance(cell, str | os.PathLike):
        raise DataError(f"{name} holds {cell!r}; allowed: paths or texts, or None")
    text = str(os.fspath(cell))
    return text.strip() if strip else text


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

    The parameters and the rotation are those of the best checkpoint by validation, and raw
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

    Examples:
      >>> predict = load("runs/demo")  # doctest: +SKIP
      >>> probabilities, attention_share = predict({"audio": audio})  # doctest: +SKIP
    """
    check_batch_size(max_batch_size)
    return predictor_of(load_run(workdir), max_batch_size)


def predictor_of(run: LoadedRun, max_batch_size: int) -> Predictor:
    """The predictor of a run that has been read."""
    learned = {"quality": run.quality, "batch_stats": run.batch_stats}
    return Predictor(run.model, run.params, run.rotation, run.inputs, max_batch_size, **learned)


def probe_of(run: LoadedRun, dataset: Dataset | None = None, **fields: Any) -> Probe:
    """A run that has been read and its test split, or that of other data.

    Args:
      run: from `load_run`.
      dataset: by default the run's own.
      fields: of `Probe`, which would be the run's.
    """
    own = {"batch_size": run.config.batch_size, "seed": run.config.seed}
    return Probe(
        predict_fn(run.model, run.variables, run.rotation, run.task.answer),
        run.dataset if dataset is None else dataset,
        encoders=run.config.model.encoders,
        task=run.task,
        **own | fields,
    )
