"""Reading the fields of a configuration: unknown, ill-typed and out-of-range ones are refused."""

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from rollingq_jax.errors import ConfigError

INT32_MAX = 2**31 - 1  # a step number and a count of rotations are int32


class Rule(NamedTuple):
    """What a field may hold: in words, as a test, and how the value is kept."""

    allowed: str
    accepts: Callable[[Any], bool]
    keep: Callable[[Any], Any]


def is_integer(value: Any) -> bool:
    """Python's or NumPy's integer; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_real(value: Any) -> bool:
    """Python's or NumPy's finite integer or float; True and False are not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that float64 does not hold
        return False


def integer(low: int, high: int = INT32_MAX) -> Rule:
    """An integer of at least `low` and at most `high`."""
    words = f"an integer >= {low} and at most {high:,}"
    return Rule(words, lambda v: is_integer(v) and low <= v <= high, int)


def real(words: str, accepts: Callable[[float], bool]) -> Rule:
    """A number for which `accepts` holds."""
    return Rule(words, lambda v: is_real(v) and accepts(v), float)


def one_of(names: Iterable[str]) -> Rule:
    """One of the names."""
    names = tuple(names)
    return Rule(", ".join(names), lambda v: isinstance(v, str) and v in names, str)


def several(item: Callable[[Any], bool], keep: type, words: str) -> Rule:
    """A non-empty tuple or list, or nothing."""

    def accepts(value: Any) -> bool:
        return value is None or (
            isinstance(value, tuple | list) and len(value) > 0 and all(map(item, value))
        )

    return Rule(words, accepts, lambda v: None if v is None else tuple(map(keep, v)))


RATE = real("a number in [0, 1)", lambda v: 0 <= v < 1)
FLAG = Rule("True or False", lambda v: isinstance(v, bool), bool)


def as_mapping(config: Any, where: str) -> dict[str, Any]:
    """A dict of the fields of a mapping, an `ml_collections.ConfigDict` or a namespace.

    Raises:
      ConfigError: `config` is none of them.
    """
    if isinstance(config, Mapping) or (hasattr(config, "items") and hasattr(config, "keys")):
        return dict(config.items())
    if hasattr(config, "__dict__") and not isinstance(config, type):
        return dict(vars(config))
    raise ConfigError(f"{where} is {config!r}; allowed: a mapping of fields")


def read_fields(fields: Mapping[str, Any], rules: Mapping[str, Rule], where: str) -> dict[str, Any]:
    """The fields as their rules keep them.

    Raises:
      ConfigError: a field is unknown, or its value is not what its rule allows.
    """
    kept = {}
    for field, value in fields.items():
        if field not in rules:
            names = ", ".join(sorted(rules))
            raise ConfigError(f"{where}.{field} is not a field; allowed: {names}")
        rule = rules[field]
        if not rule.accepts(value):
            raise ConfigError(f"{where}.{field} is {value!r}; allowed: {rule.allowed}")
        kept[field] = rule.keep(value)
    return kept
