"""The parts of one run put together: data, steps over all devices, evaluation."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.types import Dataset
from rollingq_jax.train import parallel as parallel_lib
from rollingq_jax.train.evaluation import Columns, evaluate
from rollingq_jax.train.setup import Setup, build, resolve_config
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.steps import make_eval_step, make_train_step


class Run:
    """What stays the same from the first step to the summary.

    Attributes:
      config: the configuration, `config.model` completed from the data.
      dataset: the data.
      workdir: the run's folder.
      setup: model, optimiser, lengths.
      parallel: the steps over all devices.

    Raises:
      ConfigError: the configuration does not fit the data or the devices.
    """

    def __init__(self, config: Any, dataset: Dataset, workdir: epath.Path) -> None:
        self.config = resolve_config(config, dataset)
        self.dataset, self.workdir = dataset, workdir
        self.setup: Setup = build(self.config, dataset)
        parallel_lib.check_batch_size(config.batch_size)
        compat = self.config.upstream_compat
        train_step = make_train_step(
            self.setup.model,
            self.setup.tx,
            self.setup.roller,
            self.setup.roll_schedule,
            check=not compat.statistics_pass,
            last_batch_scores=compat.last_batch_air,
        )
        wrap = parallel_lib.WRAPPERS[config.parallel]
        self.parallel = wrap(train_step, make_eval_step(self.setup.model))

    @property
    def rolls_after_epoch(self) -> bool:
        """Whether the trigger is checked between epochs, as upstream does, and not in the step."""
        return self.setup.roll_schedule is not None and self.config.upstream_compat.statistics_pass

    @property
    def selection_split(self) -> str:
        """The split that chooses the best checkpoint."""
        return "valid" if "valid" in self.dataset.splits else "train"

    def checks_after(self, step: int) -> bool:
        """Whether the training step that ended with `step` updates checked the trigger."""
        schedule = self.setup.roll_schedule
        return schedule is not None and not self.rolls_after_epoch and schedule.checks(step - 1)

    def initial_state(self) -> TrainState:
        """The state at step 0, on one device."""
        return self.setup.initial_state(self.config, self.dataset)

    def batches(self, start_step: int, num_steps: int) -> Iterator[dict[str, np.ndarray]]:
        """Training batches of the steps `start_step .. num_steps - 1`, this process's rows."""
        return train_batches(
            self.dataset.splits["train"],
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            start_step=start_step,
            num_steps=num_steps,
            transforms=self.dataset.train_transforms,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            prefetch=self.config.data.prefetch,
        )

    def evaluate(self, state: TrainState, split: str) -> tuple[dict[str, float], Columns]:
        """Means over a split, and each of its examples' outputs (see `evaluation.evaluate`)."""
        batches = eval_batches(
            self.dataset.splits[split],
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            transforms=self.dataset.eval_transforms,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            prefetch=self.config.data.prefetch,
        )
        return evaluate(self.parallel, state, batches)

    def record(self, best: dict[str, Any], sums: dict[str, Any]) -> dict[str, Any]:
        """What a checkpoint holds beside the state, as JSON: the best so far, the sums of the row
        of `metrics.jsonl` under way, and the configuration."""
        return {"best": best, "sums": sums, "config": self.config.to_dict()}
