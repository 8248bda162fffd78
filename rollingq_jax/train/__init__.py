"""Training: pure steps, their layout over devices, checkpoints and the loop.

Examples:
  >>> import rollingq_jax as rq
  >>> config = rq.train.default_config()
  >>> config.rolling.max_rotations
  1
  >>> summary = rq.train.train_and_evaluate(config, "runs/demo")  # doctest: +SKIP
"""

from typing import Any

from rollingq_jax.errors import import_or_say

__all__ = ["default_config", "load_run", "train_and_evaluate"]

_HOME = {
    "default_config": "rollingq_jax.train.config",
    "load_run": "rollingq_jax.train.loop",
    "train_and_evaluate": "rollingq_jax.train.loop",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:  # on first use: the loop needs Orbax and Grain, the configuration does not
        return getattr(import_or_say(_HOME[name]), name)
    raise AttributeError(f"module 'rollingq_jax.train' has no attribute {name!r}")
