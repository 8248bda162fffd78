"""From `config.baseline` to the hooks of a method of comparison."""

from collections.abc import Callable
from typing import Any

from rollingq_jax.baselines.agm import agm_baseline
from rollingq_jax.baselines.arl import arl_baseline
from rollingq_jax.baselines.cggm import cggm_baseline
from rollingq_jax.baselines.dgl import dgl_baseline
from rollingq_jax.baselines.gblend import gblend_baseline
from rollingq_jax.baselines.hooks import NO_BASELINE, Baseline
from rollingq_jax.baselines.inforeg import inforeg_baseline
from rollingq_jax.baselines.joint import joint_baseline
from rollingq_jax.baselines.lfm import lfm_baseline
from rollingq_jax.baselines.mmpareto import mmpareto_baseline
from rollingq_jax.baselines.modality_dropout import modality_dropout_baseline
from rollingq_jax.baselines.ogm import ogm_baseline
from rollingq_jax.baselines.opm import opm_baseline
from rollingq_jax.baselines.pmr import pmr_baseline
from rollingq_jax.baselines.qmf import qmf_baseline
from rollingq_jax.baselines.umt import umt_baseline
from rollingq_jax.data.dataset import SINGLE_LABEL
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


def _qmf(config: Any, spec: ModelSpec, epoch_steps: int, active_steps: int) -> Baseline:
    if spec.fusion != "qmf":
        raise ConfigError(
            f"config.baseline.name is 'qmf', which ranks the weights of that fusion, and "
            f"config.model.fusion is {spec.fusion!r}; allowed: qmf"
        )
    return qmf_baseline(spec.modalities, config.qmf_weight)


def _umt(config: Any, spec: ModelSpec, epoch_steps: int, active_steps: int) -> Baseline:
    if spec.fusion == "mbt":
        raise ConfigError(
            "config.baseline.name is 'umt', whose teachers see one modality each, and "
            "config.model.fusion is 'mbt', whose class tokens have seen all; allowed: other fusions"
        )
    if spec.has_batch_stats:
        raise ConfigError(
            "config.baseline.name is 'umt', which keeps its teachers' parameters, and an encoder "
            "is of kind 'resnet18', whose running averages it does not keep; allowed: other kinds"
        )
    return umt_baseline(spec.modalities, config.umt_weight)


BUILDERS: dict[str, Callable[..., Baseline]] = {
    "": lambda config, spec, epoch_steps, active_steps: NO_BASELINE,
    "ogm": _ogm(noise=False),
    "ogm_ge": _ogm(noise=True),
    "pmr": _pmr,
    "modality_dropout": lambda config, spec, *_: modality_dropout_baseline(
        spec.modalities, config.drop_rate
    ),
    "joint": lambda config, spec, *_: joint_baseline(spec.modalities, config.joint_weight),
    "mmpareto": lambda config, spec, _, active_steps: mmpareto_baseline(
        spec.modalities, config.mmpareto_gamma, active_steps
    ),
    "agm": lambda config, spec, _, active_steps: agm_baseline(
        spec.modalities, config.agm_alpha, active_steps
    ),
    "gblend": lambda config, spec, *_: gblend_baseline(
        spec.modalities, config.gblend_weights, config.gblend_every
    ),
    "dgl": lambda config, spec, *_: dgl_baseline(spec.modalities, config.dgl_weight),
    "lfm": lambda config, spec, _, active_steps: lfm_baseline(spec.modalities, active_steps),
    "arl": lambda config, spec, epoch_steps, active_steps: arl_baseline(
        spec.modalities,
        config.arl_gamma,
        config.arl_temperature,
        start_step=config.start_epoch * epoch_steps,
        active_steps=active_steps,
    ),
    "opm": lambda config, spec, epoch_steps, active_steps: opm_baseline(
        spec,
        config.opm_base,
        config.opm_strength,
        config.opm_chance,
        start_step=config.start_epoch * epoch_steps,
        active_steps=active_steps,
    ),
    "inforeg": lambda config, spec, epoch_steps, active_steps: inforeg_baseline(
        spec, config.inforeg_beta, epoch_steps=epoch_steps, active_steps=active_steps
    ),
    "cggm": lambda config, spec, _, active_steps: cggm_baseline(
        spec.modalities, config.cggm_rho, config.cggm_decay, active_steps
    ),
    "qmf": _qmf,
    "umt": _umt,
}


# Methods that ask for losses alone. All others read the probability of an example's class, or
# compare classes: they are not defined for sets of labels and for values.
ANY_TASK = ("", "modality_dropout", "joint", "mmpareto", "gblend", "dgl", "umt")


def build_baseline(
    config: Any,
    spec: ModelSpec,
    epoch_steps: int,
    total_steps: int,
    task: str = SINGLE_LABEL,
) -> Baseline:
    """The hooks of `config.baseline`, checked; nothing for an empty name.

    Args:
      config: `config.baseline`.
      spec: of the model.
      epoch_steps, total_steps: lengths of an epoch and of the run.
      task: one of `rollingq_jax.data.dataset.TASKS`.

    Raises:
      ConfigError: the method does not fit the model's fusion, or the task.
    """
    if task != SINGLE_LABEL and config.name not in ANY_TASK:
        raise ConfigError(
            f"config.baseline.name is {config.name!r}, which needs the probability of an example's "
            f"class, and the data's task is {task}; allowed there: an empty name or one of "
            f"{', '.join(filter(None, ANY_TASK))}"
        )
    if config.name and len(spec.modalities) < 2:
        raise ConfigError(
            f"config.baseline.name is {config.name!r} and the model has one modality; "
            "allowed there: an empty name"
        )
    active_steps = config.epochs * epoch_steps if config.epochs else total_steps
    return BUILDERS[config.name](config, spec, epoch_steps, active_steps)
