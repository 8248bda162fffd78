"""The configuration of a run: its fields, their defaults and what they may hold."""

import contextlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict, config_dict

from rollingq_jax.data.options import check_fields, fields_of
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.fields import Rule, as_mapping, read_fields
from rollingq_jax.models.spec import ENCODER_RULES, MODEL_RULES
from rollingq_jax.train.rules import DATA_RULES, RULES

# What may differ between a run and its continuation, since it does not change the result.
FREE_FIELDS = (
    "log_every",
    "parallel",
    "nonfinite",
    "plain_twin",
    "compare",
    "checkpoint.",
    "data.cache_dir",
    "data.path",
    "data.prefetch",
)


def default_config() -> ConfigDict:
    """Every field with its default; a file in `configs/` changes what its experiment needs.

    Learning rate and decay are those of the paper's runs (upstream `main.py`); the model is small.

    Example:
      >>> config = default_config()
      >>> config.rolling.beta = 0.2
      >>> config.optimizer.name, config.parallel
      ('sgd', 'jit')
    """
    return ConfigDict(
        {
            "seed": 0,
            "epochs": 30,
            "batch_size": 64,
            "log_every": 10,  # steps between rows of metrics.jsonl
            "parallel": "jit",
            "vit_weights": "",  # file of an ImageNet-21k ViT-B/16 from which the encoders start
            "plain_twin": False,  # also train without rotations, in `plain/`, for the figures
            "nonfinite": "stop",  # at a loss or gradient that is NaN or infinite; "skip": no update
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
                # 0 is upstream's default; the paper's own settings for its data sets are not known.
                "rho": 0.0,
                "max_rotations": _optional(1),  # None: without a limit; 0: never
                "check_every": 0,  # steps; 0: at each epoch's end
                "window": 0.25,  # last part of that period, in which sums are taken
                "method": "geodesic",
                "joint": False,  # all heads decide together
            },
            "baseline": {
                "name": "",  # a method that the paper compares with, beside any fusion it fits
                "epochs": 0,  # the first, in which OGM and PMR are active; 0: all
                "ogm_alpha": 0.8,
                "pmr_alpha": 1.0,
                "pmr_momentum": 0.2,
                "drop_rate": 0.2,
                "joint_weight": 1.0,
            },
            "compare": {
                "tune_seeds": 2,  # seeds on which the settings of the grid are tried
                "grid": {},  # as `{"optimizer": {"learning_rate": (0.01, 0.02)}}`; empty: no search
            },
            "checkpoint": {
                "every_epochs": 1,
                "every_steps": 0,  # also within an epoch; 0: not by steps
                "every_minutes": 0.0,  # likewise, by the clock
                "keep": 2,  # of the newest, beside the best
            },
            "upstream_compat": {
                "last_batch_air": False,
                "statistics_pass": False,
                "extra_schedule_step": False,
                "unclipped_cosine": False,
            },
            "data": {
                "name": "av_digits",
                "path": "",
                "cache_dir": "",
                "corruptions": "",  # of training, fresh in every epoch: "audio=0.5"
                "prefetch": 2,  # batches made ahead, each by a thread of its own
            },
            "model": {
                "fusion": "attention",
                "modality": config_dict.placeholder(str),
                "num_classes": 0,  # 0: as the data have
                "dim": 64,
                "depth": 2,
                "num_heads": 4,
                "fusion_heads": 1,
                "fusion_layers": 1,  # 2 and more roll one layer after the other
                "mlp_ratio": 4.0,
                "dropout": 0.2,
                "encoder_dropout": 0.0,
                "gelu": "exact",
                "dtype": "float32",
                "fusion_token_scale": 0.02,
                "attention_scale": 1.0,  # on the class token's logits; 0: every token counts alike
                "mbt_layers": 2,
                "mbt_tokens": 4,
                "mbt_head": "attention",
                "scan_layers": False,
                "remat": False,
                "encoders": {},  # empty, or a part of the fields: the rest as the data say
            },
        }
    )


def _optional(value: int) -> config_dict.FieldReference:
    """A field that holds an integer or None, from the command line too (`=None`); a rule checks."""
    return config_dict.FieldReference(value, field_type=object)


def check_config(config: Any) -> None:
    """Checks the fields that the training loop and the data read; the model checks its own.

    Raises:
      ConfigError: a field is unknown or missing, or its value is not allowed; says which.
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
        elif name == "data":
            shared = {field: value for field, value in section.items() if field in DATA_RULES}
            _complete(read_fields(shared, DATA_RULES, "config.data"), DATA_RULES, "config.data")
            check_fields(section)
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


def allowed_in(field: str, config: Any) -> str:
    """What a field may hold, in words: by its rule, or else by the type of its value."""
    section, _, name = field.rpartition(".")
    rules = RULES.get(section, {})
    if section == "data":
        rules = DATA_RULES
        described = fields_of(config.data.get("name", "")).get(name)
        if name not in rules and described is not None:
            return described.allowed
    elif section == "model":
        rules = MODEL_RULES
    elif section.startswith("model.encoders."):
        rules = ENCODER_RULES
    if name in rules:
        return rules[name].allowed
    value = config
    for part in field.split("."):
        value = value[part] if hasattr(value, "keys") and part in value else None
    return "a mapping of fields" if hasattr(value, "keys") else f"a {type(value).__name__}"


def from_json(content: Mapping[str, Any]) -> ConfigDict:
    """A configuration from JSON: lists become tuples, as configurations have them.

    A field that is missing, as in the file of an older version, gets its default.

    Raises:
      ConfigError: a name cannot be a field's.
    """

    def fields(section: Mapping[str, Any]) -> dict[str, Any]:
        return {n: fields(v) if isinstance(v, Mapping) else _tuples(v) for n, v in section.items()}

    try:
        references = default_config().to_dict(preserve_field_references=True)
        return ConfigDict(with_defaults(fields(content), references))
    except (TypeError, ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"config is not a mapping of fields ({reason})") from None


def with_defaults(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """`given`, with the fields that only `defaults` has, in every section that both have.

    A default that is a reference takes the given value where its type allows it, so that a field
    that may be None can still be set on the command line.
    """
    filled = {**defaults, **given}
    for name, value in defaults.items():
        if isinstance(value, Mapping) and isinstance(filled[name], Mapping):
            filled[name] = with_defaults(filled[name], value)
        elif isinstance(value, config_dict.FieldReference) and filled[name] is not value:
            with contextlib.suppress(TypeError):  # of another type: a rule tells it
                value.set(filled[name])
                filled[name] = value
    return filled


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}} -> {"a.b": 1}`, with lists as tuples so that JSON compares equal."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items"):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = _tuples(value)
    return flat


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


def differing_fields(ours: Any, theirs: Any) -> dict[str, tuple[Any, Any]]:
    """Fields that make two configurations different runs: `{field: (ours, theirs)}`."""
    first, second = flatten(ours), flatten(theirs)
    return {
        name: (first.get(name), second.get(name))
        for name in sorted(first.keys() | second.keys())
        if first.get(name) != second.get(name) and not name.startswith(FREE_FIELDS)
    }
