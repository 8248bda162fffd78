"""From `config.baseline` to the hooks of a method of comparison."""

from collections.abc import Callable
from typing import Any

from rollingq_jax.baselines.hooks import NO_BASELINE, Baseline
from rollingq_jax.baselines.joint import joint_baseline
from rollingq_jax.baselines.modality_dropout import modality_dropout_baseline
from rollingq_jax.baselines.ogm import ogm_baseline
from rollingq_jax.baselines.pmr import pmr_baseline
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.spec import ModelSpec


def _ogm(noise: bool) -> Callable[..., Baseline]:
    def build(config: Any, spec: ModelSpec, epoch_steps: int, active_steps: int) -> Baseline:
        if spec.head not in ("concat", "sum"):
            raise ConfigError(
                f"config.baseline.name is {config.name!r}, which needs each modality's part in the "
                f"logits, and config.model.fusion is {spec.fusion!r}; allowed: concat, sum, or mbt "
                "with one of them as mbt_head"
            )
        return ogm_baseline(spec, config.ogm_alpha, noise=noise, active_steps=active_steps)

    return build


def _pmr(config: Any, spec: ModelSpec, epoch_steps: int, active_steps: int) -> Baseline:
    return pmr_baseline(
        spec,
        config.pmr_alpha,
        config.pmr_momentum,
        epoch_steps=epoch_steps,
        active_steps=active_steps,
    )


BUILDERS: dict[str, Callable[..., Baseline]] = {
    "": lambda config, spec, epoch_steps, active_steps: NO_BASELINE,
    "ogm": _ogm(noise=False),
    "ogm_ge": _ogm(noise=True),
    "pmr": _pmr,
    "modality_dropout": lambda config, spec, *_: modality_dropout_baseline(
        spec.modalities, config.drop_rate
    ),
    "joint": lambda config, spec, *_: joint_baseline(spec.modalities, config.joint_weight),
}


def build_baseline(config: Any, spec: ModelSpec, epoch_steps: int, total_steps: int) -> Baseline:
    """The hooks of `config.baseline`, checked; nothing for an empty name.

    Args:
      config: `config.baseline`.
      spec: of the model.
      epoch_steps, total_steps: lengths of an epoch and of the run.

    Raises:
      ConfigError: the method does not fit the model's fusion.
    """
    if config.name and len(spec.modalities) < 2:
        raise ConfigError(
            f"config.baseline.name is {config.name!r} and the model has one modality; "
            "allowed there: an empty name"
        )
    active_steps = config.epochs * epoch_steps if config.epochs else total_steps
    return BUILDERS[config.name](config, spec, epoch_steps, active_steps)
