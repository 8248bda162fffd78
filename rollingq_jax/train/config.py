"""The configuration of a run: its fields, their defaults and what they may hold."""

from typing import Any

from ml_collections import ConfigDict, config_dict

from rollingq_jax.errors import ConfigError
from rollingq_jax.models.fields import FLAG, Rule, as_mapping, integer, one_of, read_fields, real

OPTIMIZERS = ("sgd", "adam")
PARALLEL = ("jit", "pmap")


def _at_least(low: float) -> Rule:
    return real(f"a number >= {low:g}", lambda v: v >= low)


TEXT = Rule("a string", lambda v: isinstance(v, str), str)

RULES = {
    "": {
        "seed": integer(0),
        "epochs": integer(1),
        "batch_size": integer(1),
        "log_every": integer(1),
        "parallel": one_of(PARALLEL),
        "vit_weights": TEXT,
    },
    "optimizer": {
        "name": one_of(OPTIMIZERS),
        "learning_rate": real("a number > 0", lambda v: v > 0),
        "momentum": real("a number in [0, 1)", lambda v: 0 <= v < 1),
        "weight_decay": _at_least(0),
        "warmup_epochs": _at_least(0),
        "clip_norm": _at_least(0),
    },
    "rolling": {
        "enabled": FLAG,
        "beta": _at_least(0),
        "rho": _at_least(0),
        "max_rotations": integer(0),
        "check_every": integer(0),
        "window": real("a number in (0, 1]", lambda v: 0 < v <= 1),
        "method": one_of(("geodesic", "svd")),
        "joint": FLAG,
    },
    "checkpoint": {"every_epochs": integer(1), "keep": integer(1)},
    "upstream_compat": {
        "last_batch_air": FLAG,
        "statistics_pass": FLAG,
        "extra_schedule_step": FLAG,
        "unclipped_cosine": FLAG,
    },
}

# What may differ between a run and its continuation, since it does not change the result.
FREE_FIELDS = (
    "log_every",
    "parallel",
    "checkpoint.",
    "data.cache_dir",
    "data.path",
    "data.prefetch",
)


def default_config() -> ConfigDict:
    """Every field with its default; a file in `configs/` changes what its experiment needs.

    Learning rate and decay are those of the paper's runs (upstream `main.py`); the model is small.
    """
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 30,
            "batch_size": 64,
            "log_every": 10,  # steps between rows of metrics.jsonl
            "parallel": "jit",
            "vit_weights": "",  # file of an ImageNet-21k ViT-B/16 from which the encoders start
            "optimizer": {
                "name": "sgd",
                "learning_rate": 1e-3,
                "momentum": 0.9,
                "weight_decay": 1e-4,  # added to the gradient, with sgd alone
                "warmup_epochs": 2.5,
                "clip_norm": 0.0,  # of the global gradient; 0: none
            },
            "rolling": {
                "enabled": True,
                "beta": 0.0,
                "rho": 1.0,
                "max_rotations": 1,
                "check_every": 0,  # steps; 0: at each epoch's end
                "window": 0.25,  # last part of that period, in which sums are taken
                "method": "geodesic",
                "joint": False,  # all heads decide together
            },
            "checkpoint": {"every_epochs": 1, "keep": 2},
            "upstream_compat": {
                "last_batch_air": False,
                "statistics_pass": False,
                "extra_schedule_step": False,
                "unclipped_cosine": False,
            },
            "data": {"name": "av_digits", "path": "", "cache_dir": "", "prefetch": 2},
            "model": {
                "fusion": "attention",
                "modality": config_dict.placeholder(str),
                "num_classes": 0,  # 0: as the data have
                "dim": 64,
                "depth": 2,
                "num_heads": 4,
                "fusion_heads": 1,
                "mlp_ratio": 4.0,
                "dropout": 0.2,
                "encoder_dropout": 0.0,
                "gelu": "exact",
                "dtype": "float32",
                "fusion_token_scale": 0.02,
                "mbt_layers": 2,
                "mbt_tokens": 4,
                "mbt_head": "attention",
                "scan_layers": False,
                "remat": False,
                "encoders": {},  # empty, or a part of the fields: the rest as the data say
            },
        }
    )


def check_config(config: Any) -> None:
    """Checks the fields that the training loop reads; the model and the data check their own.

    Raises:
      ConfigError: a field is unknown or missing, or its value is not allowed; the message says which.
    """
    fields = as_mapping(config, "config")
    sections = [name for name in RULES if name] + ["data", "model"]
    top = {name: value for name, value in fields.items() if name not in sections}
    _complete(read_fields(top, RULES[""], "config"), RULES[""], "config")
    for name in sections:
        if name not in fields:
            raise ConfigError(f"config.{name} is missing; allowed: a mapping of fields")
        section = as_mapping(fields[name], f"config.{name}")
        if name in RULES:
            where = f"config.{name}"
            _complete(read_fields(section, RULES[name], where), RULES[name], where)
    warmup, epochs = fields["optimizer"]["warmup_epochs"], fields["epochs"]
    if warmup >= epochs:
        raise ConfigError(
            f"config.optimizer.warmup_epochs is {warmup}; "
            f"allowed: less than epochs, which is {epochs}"
        )


def _complete(fields: dict[str, Any], rules: dict[str, Rule], where: str) -> None:
    for name in rules:
        if name not in fields:
            raise ConfigError(f"{where}.{name} is missing; allowed: {rules[name].allowed}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}} -> {"a.b": 1}`, with lists as tuples so that JSON compares equal."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = tuple(value) if isinstance(value, list | tuple) else value
    return flat


def differing_fields(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs: `{field: (ours, theirs)}`."""
    first, second = flatten(ours), flatten(theirs)
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not name.startswith(FREE_FIELDS)
    }
