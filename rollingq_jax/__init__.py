"""RollingQ in JAX: keep a multimodal Transformer's attention looking at the sample.

The method of Ni et al., "RollingQ: Reviving the Cooperation Dynamics in Multimodal Transformer"
(ICML 2025, arXiv 2506.11465), as pure functions and thin Flax modules.
"""

import importlib
from typing import TYPE_CHECKING, Any

from rollingq_jax.errors import import_or_say

if TYPE_CHECKING:  # for type checkers, editors and the documentation
    from rollingq_jax import convert, models, train
    from rollingq_jax.attention import (
        attention_share,
        class_token_attention,
        mean_key,
        reference_attention,
        segment_mean_keys,
        uniform_share,
    )
    from rollingq_jax.errors import CheckpointError, ConfigError, DataError, UserError
    from rollingq_jax.inference import load
    from rollingq_jax.models import build_model
    from rollingq_jax.rolling import (
        RollInfo,
        RollingQuery,
        RollingState,
        attention_imbalance_rate,
        cosine_scores,
        imbalance,
        rebalance_anchor,
        rebalance_weights,
        rolling_query,
    )
    from rollingq_jax.rotation import fold_rotation, rotate, rotation_between
    from rollingq_jax.watching import report

    textbook_attention = reference_attention  # its former name

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
    "reference_attention",
    "report",
    "rolling_query",
    "rotate",
    "rotation_between",
    "segment_mean_keys",
    "textbook_attention",
    "train",
    "uniform_share",
]

# Where each name is, to be imported on first use: the help of a command needs no JAX, and the core
# neither Orbax nor files of weights.
_HOME = {
    name: module
    for module, names in {
        "attention": (
            "attention_share",
            "class_token_attention",
            "mean_key",
            "reference_attention",
            "segment_mean_keys",
            "uniform_share",
        ),
        "errors": ("CheckpointError", "ConfigError", "DataError", "UserError"),
        "models": ("build_model",),
        "rolling": (
            "RollInfo",
            "RollingQuery",
            "RollingState",
            "attention_imbalance_rate",
            "cosine_scores",
            "imbalance",
            "rebalance_anchor",
            "rebalance_weights",
            "rolling_query",
        ),
        "rotation": ("fold_rotation", "rotate", "rotation_between"),
        "inference": ("load",),
        "watching": ("report",),
    }.items()
    for name in names
}


def __getattr__(name: str) -> Any:
    if name in ("convert", "models", "train"):
        return importlib.import_module(f"rollingq_jax.{name}")
    if name == "textbook_attention":
        name = "reference_attention"
    if name not in _HOME:
        raise AttributeError(f"module 'rollingq_jax' has no attribute {name!r}")
    return getattr(import_or_say(f"rollingq_jax.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
