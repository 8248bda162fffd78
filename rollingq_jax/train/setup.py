"""From a configuration to the parts of a run."""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from rollingq_jax.baselines.build import build_baseline
from rollingq_jax.baselines.hooks import Baseline
from rollingq_jax.data.dataset import Dataset, infer_model
from rollingq_jax.data.pipeline import collate, steps_per_epoch
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import build_model
from rollingq_jax.models.fields import INT32_MAX
from rollingq_jax.rolling import RollingQuery, rolling_query
from rollingq_jax.train.optimizer import learning_rate_schedule, make_optimizer
from rollingq_jax.train.state import TrainState, create_state
from rollingq_jax.train.steps import RollSchedule


class Setup(NamedTuple):
    """The parts of a run, and its lengths in steps."""

    model: Any
    tx: optax.GradientTransformation
    roller: RollingQuery
    roll_schedule: RollSchedule | None  # None: nothing rolls
    learning_rate: optax.Schedule
    epoch_steps: int
    total_steps: int
    baseline: Baseline

    def initial_state(
        self, config: Any, dataset: Dataset, report: Callable[[str], None]
    ) -> TrainState:
        """The state at step 0; encoders start from `config.vit_weights` where that is set.

        `report` is told which of its tensors were used.
        """
        state = self._drawn_state(config, dataset)
        if config.vit_weights:
            from rollingq_jax.convert import load_vit

            params, used = load_vit(config.vit_weights, state.params)
            report(f"{config.vit_weights}: {used}")
            state = state.replace(params=params, opt_state=self.tx.init(params))
        return state

    def abstract_state(self, config: Any, dataset: Dataset) -> TrainState:
        """Shapes and dtypes of every state of the run."""
        return jax.eval_shape(lambda: self._drawn_state(config, dataset))

    def _drawn_state(self, config: Any, dataset: Dataset) -> TrainState:
        return create_state(
            self.model,
            self.tx,
            self.roller,
            seed=config.seed,
            batch=example_batch(dataset),
            baseline=self.baseline.init(),
        )


def example_batch(dataset: Dataset, size: int = 2) -> dict[str, np.ndarray]:
    """A small batch of the training data, for shapes."""
    source = dataset.splits["train"]
    example = source[0]
    for transform in dataset.eval_transforms:
        example = transform.map(example)
    return collate([example] * size)


def resolve_config(config: Any, dataset: Dataset) -> Any:
    """A copy of the configuration in which `config.model` is complete: as the data have it.

    Raises:
      ConfigError: `config.model` does not fit the data.
    """
    resolved = copy.deepcopy(config)
    given = resolved.model.to_dict()
    with resolved.unlocked():
        resolved.model = infer_model(dataset, given)
    return resolved


def _check_upstream_choices(compat: Any, fusion_layers: int) -> None:
    """Upstream has one fusion layer, and one process."""
    if compat.statistics_pass and jax.process_count() > 1:
        raise ConfigError(
            f"config.upstream_compat.statistics_pass is True; allowed in {jax.process_count()} "
            "processes: False, since each would roll by its own examples"
        )
    chosen = [name for name, value in compat.items() if value]
    if fusion_layers > 1 and chosen:
        raise ConfigError(
            f"config.upstream_compat.{chosen[0]} is True; allowed with model.fusion_layers "
            f"{fusion_layers}: False, since upstream has one layer"
        )


def build(config: Any, dataset: Dataset) -> Setup:
    """Builds the parts of a run from a resolved configuration.

    Raises:
      ConfigError: a field of `config.model` is not allowed, or a size does not fit the data.
    """
    model = build_model(config.model)
    _check_upstream_choices(config.upstream_compat, model.spec.fusion_layers)
    examples = len(dataset.splits["train"])
    if config.batch_size > examples:
        raise ConfigError(
            f"config.batch_size is {config.batch_size}; "
            f"allowed: at most the number of training examples, which is {examples}"
        )
    epoch_steps = steps_per_epoch(examples, config.batch_size)
    total_steps = epoch_steps * config.epochs
    if total_steps > INT32_MAX:
        raise ConfigError(
            f"config.epochs is {config.epochs}; allowed with {epoch_steps} steps an epoch: at most "
            f"{INT32_MAX // epoch_steps:,}"
        )
    learning_rate = learning_rate_schedule(
        config.optimizer.learning_rate,
        epoch_steps,
        config.epochs,
        warmup_epochs=config.optimizer.warmup_epochs,
        extra_step=config.upstream_compat.extra_schedule_step,
        clip=not config.upstream_compat.unclipped_cosine,
    )
    rolling = config.rolling
    roll_schedule = None
    if rolling.enabled and model.spec.scores_attention and len(model.spec.modalities) > 1:
        period = rolling.check_every or epoch_steps
        roll_schedule = RollSchedule.from_fraction(period, rolling.window)
    baseline = build_baseline(config.baseline, model.spec, epoch_steps, total_steps)
    tx = make_optimizer(config.optimizer, learning_rate)
    return Setup(
        model=model,
        tx=tx if baseline.transform is None else optax.chain(baseline.transform, tx),
        roller=rolling_query(
            rolling.beta,
            rolling.rho,
            rolling.max_rotations,
            rolling.method,
            rolling.joint,
            layers=model.spec.fusion_layers,
        ),
        roll_schedule=roll_schedule,
        learning_rate=learning_rate,
        epoch_steps=epoch_steps,
        total_steps=total_steps,
        baseline=baseline,
    )
