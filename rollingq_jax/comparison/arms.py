"""Arms of a comparison: names for changes of a configuration."""

import ast
import copy
import re
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from rollingq_jax.errors import ConfigError
from rollingq_jax.train.config import allowed_in, default_config, flatten

Overrides = dict[str, Any]

# An arm changes what it names and nothing else: a method of `config.baseline` stays, so that each
# fusion is compared with the losses that the configuration asks for.
PLAIN = {"rolling.enabled": False, "model.modality": None}
STATIC = PLAIN | {"model.fusion_layers": 1}  # they have no class token that attends
CONCAT = STATIC | {"model.fusion": "concat"}

ATTENTION = PLAIN | {"model.fusion": "attention"}
ROLLINGQ = ATTENTION | {"rolling.enabled": True}

# The methods of comparison stand on concat, as the paper has them; on another fusion they are
# written as NAME=FUSION:baseline.name=METHOD.
ARMS: dict[str, Overrides] = {
    "sum": STATIC | {"model.fusion": "sum"},
    "concat": CONCAT,
    "film": STATIC | {"model.fusion": "film"},
    "gated": STATIC | {"model.fusion": "gated"},
    "attention": ATTENTION,
    "uniform": ATTENTION | {"model.attention_scale": 0.0},
    "rollingq": ROLLINGQ,
    "rollingq-once": ROLLINGQ | {"rolling.max_rotations": 1},
    "rollingq-epoch": ROLLINGQ | {"rolling.max_rotations": None, "rolling.check_every": 0},
    "mbt": PLAIN | {"model.fusion": "mbt"},
    "mbt+rollingq": PLAIN
    | {"model.fusion": "mbt", "model.mbt_head": "attention", "rolling.enabled": True},
    "ogm": CONCAT | {"baseline.name": "ogm"},
    "ogm-ge": CONCAT | {"baseline.name": "ogm_ge"},
    "pmr": CONCAT | {"baseline.name": "pmr"},
    "modality_dropout": CONCAT | {"baseline.name": "modality_dropout"},
    "joint": CONCAT | {"baseline.name": "joint"},
    "config": {},  # the configuration as it is, to build own arms on
}
FRESH_BASES = ("concat", "attention", "uniform", "rollingq")
FORM = "NAME, or NAME=BASE:FIELD=VALUE:FIELD=VALUE with BASE the name of an arm"


def known_arms(modalities: tuple[str, ...]) -> dict[str, Overrides]:
    """The arms by name, with a unimodal one for each modality."""
    # No method against imbalance fits one modality, whose loss is its own in any case.
    alone = STATIC | {"model.fusion": "unimodal", "baseline.name": ""}
    noise = {"data.corruptions": fresh_noise(modalities)}
    fresh = {f"{base}-fresh": ARMS[base] | noise for base in FRESH_BASES}
    return {m: alone | {"model.modality": m} for m in modalities} | ARMS | fresh


def fresh_noise(modalities: tuple[str, ...]) -> str:
    """Light noise in every modality, drawn anew in each epoch of training, so that it is not
    learned by heart: .5 for audio and .3 else, with up to 3 and 1.5 more in 30 % of the examples.
    """
    levels = {m: (0.5, 3.0) if m == "audio" else (0.3, 1.5) for m in modalities}
    return ", ".join(f"{m}={low}, {m}=0..{high}@0.3" for m, (low, high) in levels.items())


def parse_arms(text: str, modalities: tuple[str, ...]) -> dict[str, Overrides]:
    """Arms from a command line: `"concat,rollingq,fast=rollingq:rolling.beta=0.1"`.

    Args:
      text: arms with commas between; each a name, or `NAME=BASE:FIELD=VALUE...`, an arm `BASE`
        with fields of the configuration changed.
      modalities: of the data; each names the arm that sees it alone.

    Returns:
      Name -> fields of the configuration and their values.

    Raises:
      ConfigError: an arm is unknown, named twice or malformed; says which.
    """
    known, arms = known_arms(modalities), {}
    for item in _parts(text, ","):
        name, equals, rest = item.partition("=")
        base, *changes = _parts(rest, ":") if equals else (name,)
        check_name(name)
        if name in arms:
            raise ConfigError(f"--arms: {name!r} is there twice; allowed: once")
        if base not in known:
            raise ConfigError(f"--arms: {base!r} is no arm; allowed: {', '.join(known)}")
        arms[name] = known[base] | dict(_change(item, change) for change in changes)
    return arms


def check_name(name: str) -> None:
    """An arm's name can be that of a folder.

    Raises:
      ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,60}", name):
        raise ConfigError(
            f"an arm has the name {name!r}; allowed: letters, digits, and _ . + - after the first"
        )


def _change(item: str, text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ConfigError(f"--arms: {item!r} has the part {text!r}; allowed: FIELD=VALUE")
    return field.removeprefix("config."), read_value(value)


def read_value(text: str) -> Any:
    """A value as Python writes it (`0.5`, `(8, 8)`, `true` too), else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: a dict with an unhashable key
        return text


def _parts(text: str, mark: str) -> Iterator[str]:
    """The text between marks that are outside brackets, stripped; at least one part."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def resets(config: ConfigDict, arms: Mapping[str, Overrides]) -> list[str]:
    """A line for each field in which an arm has another value than the configuration's own.

    Own are values that differ from `default_config()`. What an arm is by its name, the fusion and
    whether it rolls, is not told.
    """
    ours, defaults = flatten(config), flatten(default_config())
    return [
        f"arm {arm}: config.{field} is {value!r} and not {ours[field]!r}"
        for arm, fields in arms.items()
        for field, value in fields.items()
        if field not in ("model.fusion", "rolling.enabled")
        and field in ours
        and ours[field] not in (value, defaults.get(field))
    ]


def with_fields(config: ConfigDict, fields: Mapping[str, Any], where: str) -> ConfigDict:
    """A copy of the configuration with some fields changed.

    Args:
      config: a whole configuration.
      fields: `{"rolling.beta": 0.1}`.
      where: what asks for it, for messages.

    Raises:
      ConfigError: there is no such field, or the value has another type.
    """
    changed = copy.deepcopy(config)
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        node: Any = changed
        for part in section.split(".") if section else ():
            node = node[part] if isinstance(node, ConfigDict) and part in node else None
        if not isinstance(node, ConfigDict) or name not in node:
            there = ", ".join(sorted(node.keys())) if isinstance(node, ConfigDict) else "no fields"
            raise ConfigError(f"{where}: config.{field} is not a field; allowed there: {there}")
        try:
            if value is None:
                with changed.ignore_type():
                    node[name] = None
            else:
                node[name] = value
        except TypeError:
            allowed = allowed_in(field, config)
            raise ConfigError(f"{where}: config.{field} is {value!r}; allowed: {allowed}") from None
    return changed
