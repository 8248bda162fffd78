"""Settings that every arm is tried with, and which of them an arm gets: by validation alone."""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from rollingq_jax.errors import CheckpointError, ConfigError
from rollingq_jax.train.config import flatten

Setting = dict[str, Any]


def settings_of(grid: Any) -> list[Setting]:
    """Every combination of the grid's values, `{"optimizer.learning_rate": 0.02}`.

    Args:
      grid: `config.compare.grid`: fields of the configuration, nested as there, each with a tuple
        of values. Empty: one setting that changes nothing.

    Raises:
      ConfigError: a field has something else than values.
    """
    fields = flatten(grid)
    for field, values in fields.items():
        if not isinstance(values, tuple) or not values:
            raise ConfigError(
                f"config.compare.grid.{field} is {values!r}; allowed: a tuple of values to try"
            )
    return [
        dict(zip(fields, values, strict=True)) for values in itertools.product(*fields.values())
    ]


def setting_name(number: int, setting: Setting) -> str:
    """Name of its folder."""
    if not setting:
        return "fixed"
    text = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in setting.items())
    return f"{number}-" + re.sub(r"[^\w.+=,-]", "_", text)[:80]


def choose(accuracies: Sequence[Sequence[float | None]]) -> int | None:
    """Number of the setting with the best mean validation accuracy, the first of equals.

    A setting in which a run failed (None) is out; None if all are.
    """
    means = [
        -math.inf if any(a is None for a in row) else float(np.mean([float(a or 0) for a in row]))
        for row in accuracies
    ]
    best = int(np.argmax(means))
    return None if means[best] == -math.inf else best


def selected(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    accuracies: Sequence[Sequence[float | None]],
    arm: str,
) -> dict[str, Any]:
    """An arm's entry in `selection.json`.

    Args:
      settings: all that were tried.
      seeds: on which.
      accuracies: best validation accuracy of each setting and seed; None where training failed.
      arm: name, for the message.

    Raises:
      ConfigError: no setting could be trained with.
    """
    best = choose(accuracies)
    if best is None:
        raise ConfigError(
            f"arm {arm!r}: loss or gradient is NaN or infinite with every setting of "
            "config.compare.grid; allowed: a grid with a setting that trains"
        )
    tried = [
        {"setting": setting, "validation_accuracy": list(row)}
        for setting, row in zip(settings, accuracies, strict=True)
    ]
    return {
        "chosen": best,
        "setting": settings[best],
        "settings_tried": len(settings),
        "runs": len(settings) * len(seeds),
        "seeds": list(seeds),
        "tried": tried,
    }


def fixed(setting: Setting) -> dict[str, Any]:
    """The entry where there is nothing to choose."""
    return {
        "chosen": 0,
        "setting": setting,
        "settings_tried": 0,
        "runs": 0,
        "seeds": [],
        "tried": [],
    }


def search_line(selection: Mapping[str, Any]) -> str:
    """How much was tried before the tests, arm by arm: `{arm: entry}` of `selection.json`."""
    counts = {arm: len(entry["tried"]) for arm, entry in selection.items()}
    seeds = sorted({seed for entry in selection.values() for seed in entry["seeds"]})
    if not seeds:
        return "No settings were searched: each arm ran with those of the configuration."
    runs = sum(len(entry["tried"]) * len(entry["seeds"]) for entry in selection.values())
    each = sorted(set(counts.values()))
    words = str(each[0]) if len(each) == 1 else ", ".join(f"{a} {n}" for a, n in counts.items())
    return (
        f"Settings tried for each arm: {words}, on validation data of seeds "
        f"{', '.join(map(str, seeds))}; {runs} runs in all."
    )


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; None where there is none.

    Raises:
      CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is damaged; allowed: a JSON object, or no file")
    return content
