"""A finished or stopped run, read back from its folder without its data."""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rollingq_jax.data.dataset import Dataset
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.errors import CheckpointError, said
from rollingq_jax.models import build_model
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.config import check_config, from_json
from rollingq_jax.train.summary import read_summary
from rollingq_jax.train.workdir import absolute, check_same_run, read_config


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """What a run has learned, and what its model takes.

    Attributes:
      model: from `build_model`.
      params: of the best checkpoint by validation accuracy.
      rotation: `[H, d_h, d_h]`, or None for a fusion without a class query.
      config: the run's configuration, complete.
      inputs: what the model has to know of its data: preprocessing, and a class for each output.
      step: of the checkpoint.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    config: ConfigDict
    inputs: InputSpec
    step: int

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data that the run was trained on, read when it is first asked for.

        Raises:
          ConfigError, DataError: they are not there any more, or cannot be used.
        """
        config = self.config
        return load_dataset(config.data, seed=config.seed, encoders=config.model.encoders)


def load_run(workdir: epath.PathLike) -> LoadedRun:
    """Reads back the best checkpoint of a run; its data need not be there.

    Args:
      workdir: the run's folder.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder, or it was written by a
        version that did not record how the data became the model's input.
      ConfigError: its configuration cannot be used any more.

    Example:
      >>> run = load_run("runs/demo")  # doctest: +SKIP
      >>> query = run.model.apply(
      ...     {"params": run.params}, run.rotation, method="class_query"
      ... )  # doctest: +SKIP
    """
    allowed = (
        f"workdir is {str(workdir)!r}; allowed: the folder of a run, with config.json and "
        "checkpoints"
    )
    try:
        path = absolute(workdir)
        found = (path / "config.json").exists() and (path / "checkpoints").exists()
    except Exception as error:  # of the system, or whatever a client of gs:// raises
        raise CheckpointError(f"{allowed} ({said(error)})") from None
    stored = read_config(path) if found else None
    if stored is None:
        raise CheckpointError(allowed)
    config = from_json(stored)
    check_config(config)
    model = build_model(config.model)
    summary = read_summary(path) or {}

    def like(record: Mapping[str, Any]) -> Any:
        check_same_run(config, from_json(record["config"]), f"a checkpoint in {path}")
        return abstract_params(model, recorded_inputs(record, summary, path))

    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.restore_newest_params(like)
        if newest is None:
            raise CheckpointError(f"workdir {path} holds no checkpoint yet")
        learned, record = newest
        best = (summary or record)["best"]["step"]
        if best not in (-1, learned.step):
            learned, record = checkpoints.restore_params(best, like)
    inputs = recorded_inputs(record, summary, path).with_outputs(config.model.num_classes)
    return LoadedRun(model, learned.params, learned.rotation, config, inputs, learned.step)


def recorded_inputs(
    record: Mapping[str, Any], summary: Mapping[str, Any], workdir: epath.Path
) -> InputSpec:
    """How the run's data became its model's input, from a checkpoint's record or the summary.

    Raises:
      CheckpointError: neither says so.
      DataError: what is recorded cannot be read.
    """
    found = record.get("inputs") or summary.get("inputs")
    if found is None:
        raise CheckpointError(
            f"workdir {workdir} was written by an older version, which did not record how the data "
            "became the model's input; allowed: such a run after `python train.py --config_json "
            f"{workdir / 'config.json'} --workdir {workdir}` with its data in place, which adds "
            "that and trains nothing anew"
        )
    return InputSpec.from_json(found)


def abstract_params(model: Any, inputs: InputSpec) -> Any:
    """Shapes and dtypes of a model's parameters.

    Raises:
      CheckpointError: the model reads a modality of which the inputs do not tell.
    """
    batch = {}
    for m in model.spec.modalities:
        if m not in inputs.modalities:
            raise CheckpointError(
                f"modality {m!r} of the model is not recorded; recorded: "
                f"{', '.join(inputs.modalities)}"
            )
        info = inputs.modalities[m].info
        batch[m] = jax.ShapeDtypeStruct((1, *info.shape), np.dtype(info.dtype))
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
