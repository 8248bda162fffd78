"""A finished or stopped run, read back from its folder."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.types import Dataset
from rollingq_jax.errors import CheckpointError, said
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.config import check_config, from_json
from rollingq_jax.train.setup import build
from rollingq_jax.train.summary import read_summary
from rollingq_jax.train.workdir import absolute, check_same_run, read_config


class LoadedRun(NamedTuple):
    """What a run has learned, and on what.

    Attributes:
      model: from `build_model`.
      params: of the best checkpoint by validation accuracy.
      rotation: `[H, d_h, d_h]`, or None for a fusion without a class query.
      config: the run's configuration, complete.
      dataset: its data.
      step: of the checkpoint.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    config: ConfigDict
    dataset: Dataset
    step: int


def load_run(workdir: epath.PathLike) -> LoadedRun:
    """Reads back the best checkpoint of a run.

    Args:
      workdir: the run's folder.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder.
      ConfigError, DataError: its configuration or its data cannot be used any more.

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
    dataset = load_dataset(config.data, seed=config.seed, encoders=config.model.encoders)
    setup = build(config, dataset)
    like = setup.abstract_state(config, dataset)
    summary = read_summary(path)

    def check(record: Mapping[str, Any]) -> None:
        check_same_run(config, from_json(record["config"]), f"a checkpoint in {path}")

    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.restore_newest(like, check)
        if newest is None:
            raise CheckpointError(f"workdir {path} holds no checkpoint yet")
        state, record = newest
        best = (summary or record)["best"]["step"]
        if best not in (-1, int(state.step)):
            state, _ = checkpoints.restore(best, like, check)
    return LoadedRun(
        setup.model, state.params, state.rotation, config, dataset, int(np.asarray(state.step))
    )
