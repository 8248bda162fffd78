"""Rows of ``metrics.jsonl`` as curves over epochs.

A row is a dict with at least "step" and "split"; see the fields of the training loop: "accuracy",
"loss", "imbalance", "attention_share/<m>", "probe_accuracy/<m>", and, in rows of split "roll",
"head", "imbalance_before", "imbalance_after", "angle_degrees".
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

Row = Mapping[str, Any]


class Curve(NamedTuple):
    """A field over training: x [N] in epochs and y [N], float64."""

    x: np.ndarray
    y: np.ndarray


class Roll(NamedTuple):
    """One moment at which at least one head's query was rotated (means over those heads)."""

    epoch: float
    heads: int
    imbalance_before: float
    imbalance_after: float
    angle_degrees: float


def steps_per_epoch(rows: Sequence[Row]) -> float:
    """Steps between validation rows, which are written once an epoch (1 if there are none)."""
    steps = np.unique([row["step"] for row in rows if row["split"] == "valid"])
    steps = steps[steps > 0]
    if len(steps) == 0:
        return 1.0
    return float(np.median(np.diff(steps))) if len(steps) > 1 else float(steps[0])


def curve(rows: Sequence[Row], split: str, field: str) -> Curve:
    """The field over epochs in one split; rows that lack it or hold no number are left out.

    Of several rows of one step the last counts.
    """
    scale = steps_per_epoch(rows)
    points = {
        row["step"]: float(row[field])
        for row in rows
        if row["split"] == split and is_number(row.get(field))
    }
    steps = sorted(points)
    return Curve(np.array(steps, np.float64) / scale, np.array([points[s] for s in steps]))


def rolls(rows: Sequence[Row]) -> list[Roll]:
    """The rotations in order, heads that rolled at the same step taken together."""
    scale = steps_per_epoch(rows)
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        if row["split"] == "roll":
            by_step.setdefault(row["step"], []).append(row)
    fields = ("imbalance_before", "imbalance_after", "angle_degrees")
    return [
        Roll(
            step / scale, len(group), *(_mean(row.get(field) for row in group) for field in fields)
        )
        for step, group in sorted(by_step.items())
    ]


def used_up(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The first epoch at whose end no rotations were left while imbalance stood above beta.

    Returns:
      Its "epoch" and "imbalance", or None where there was no such epoch.
    """
    found = [row for row in rows if row["split"] == "valid" and row.get("rotations_used_up")]
    return {name: found[0][name] for name in ("epoch", "imbalance")} if found else None


def modalities(rows: Sequence[Row], prefix: str) -> list[str]:
    """The names that follow ``prefix + "/"`` in any row, in alphabetical order."""
    return sorted({k.split("/", 1)[1] for row in rows for k in row if k.startswith(prefix + "/")})


def is_number(value: Any) -> bool:
    """Whether value is a finite number (None, NaN, bool and text are not)."""
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)):
        return False
    return math.isfinite(value)


def _mean(values: Any) -> float:
    values = [float(value) for value in values if is_number(value)]
    return float(np.mean(values)) if values else float("nan")
