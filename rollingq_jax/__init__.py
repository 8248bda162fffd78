"""RollingQ in JAX: keep a multimodal Transformer's attention looking at the sample.

The method of Ni et al., "RollingQ: Reviving the Cooperation Dynamics in Multimodal Transformer"
(ICML 2025, arXiv 2506.11465), as pure functions and thin Flax modules.
"""

import importlib
from typing import Any

from rollingq_jax import models
from rollingq_jax.attention import (
    attention_share,
    class_token_attention,
    mean_key,
    textbook_attention,
)
from rollingq_jax.errors import CheckpointError, ConfigError, DataError, UserError
from rollingq_jax.folding import fold_rotation
from rollingq_jax.imbalance import (
    attention_imbalance_rate,
    cosine_scores,
    imbalance,
    rebalance_anchor,
    rebalance_weights,
)
from rollingq_jax.models import build_model
from rollingq_jax.observing import RollingState
from rollingq_jax.rolling import RollInfo, RollingQuery, rolling_query
from rollingq_jax.rotation import rotate, rotation_between

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "RollInfo",
    "RollingQuery",
    "RollingState",
    "UserError",
    "attention_imbalance_rate",
    "attention_share",
    "build_model",
    "class_token_attention",
    "convert",
    "cosine_scores",
    "fold_rotation",
    "imbalance",
    "load",
    "mean_key",
    "models",
    "rebalance_anchor",
    "rebalance_weights",
    "rolling_query",
    "rotate",
    "rotation_between",
    "textbook_attention",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("convert", "train"):  # on first use: files of weights, and runs, are not the core
        return importlib.import_module(f"rollingq_jax.{name}")
    if name == "load":  # on first use: reading a run needs Orbax
        return importlib.import_module("rollingq_jax.inference").load
    raise AttributeError(f"module 'rollingq_jax' has no attribute {name!r}")
