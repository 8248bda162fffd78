"""From `config.baseline` to the hooks of a method of comparison."""

from collections.abc import Callable
from typing import Any

from rollingq_jax.baselines.agm import agm_baseline
from rollingq_jax.baselines.arl import arl_baseline
from rollingq_jax.baselines.cggm import cggm_baseline
from rollingq_jax.baselines.dgl import dgl_baseline
from rollingq_jax.baselines.gblend import gblend_baseline
from rollingq_jax.baselines.hooks import NO_BASELINE, Baseline, Setting
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

BUILDERS: dict[str, Callable[[Setting], Baseline]] = {
    "": lambda setting: NO_BASELINE,
    "ogm": ogm_baseline,
    "ogm_ge": ogm_baseline,
    "pmr": pmr_baseline,
    "modality_dropout": modality_dropout_baseline,
    "joint": joint_baseline,
    "mmpareto": mmpareto_baseline,
    "agm": agm_baseline,
    "gblend": gblend_baseline,
    "dgl": dgl_baseline,
    "lfm": lfm_baseline,
    "arl": arl_baseline,
    "opm": opm_baseline,
    "inforeg": inforeg_baseline,
    "cggm": cggm_baseline,
    "qmf": qmf_baseline,
    "umt": umt_baseline,
}

# Methods that ask for losses alone. All others read the probability of an example's class, or
# compare classes: they are not defined for sets of labels and for values.
ANY_TASK = ("", "modality_dropout", "joint", "mmpareto", "gblend", "dgl", "umt")


def build_baseline(
    config: Any, spec: ModelSpec, epoch_steps: int, total_steps: int, task: str = SINGLE_LABEL
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
    return BUILDERS[config.name](Setting(config, spec, epoch_steps, active_steps))
