"""Gathers what the steps return until a row of `metrics.jsonl` is due.

Steps run ahead of the host: their sums stay on the device until then.
"""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from rollingq_jax.train.metrics import add_sums, finish
from rollingq_jax.train.parallel import Parallel
from rollingq_jax.train.setup import Setup
from rollingq_jax.train.steps import Roll
from rollingq_jax.train.writer import Row


class Meter:
    """Sums since the last row, rolls since the last epoch's end, and where the time went."""

    def __init__(self, parallel: Parallel, setup: Setup, sums: Mapping[str, Any]) -> None:
        """`sums` are those that a checkpoint in the middle of a row holds."""
        self._parallel, self._setup = parallel, setup
        self._sums: dict[str, Any] = dict(sums)
        self._on_device: list[Any] = []
        self._checks: list[tuple[int, Any]] = []
        self._last_roll: Roll | None = None
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._began, self._waited, self._examples = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, step: int, sums: Any, roll: Any) -> None:
        """Takes what step number `step` returned; `roll` is None where nothing was checked."""
        self._on_device.append(sums)
        if roll is not None:
            self._checks.append((step, roll))

    def flush(self) -> dict[str, Any]:
        """The sums since the last row, in host memory, as JSON holds them."""
        for sums in jax.device_get([self._parallel.get(sums) for sums in self._on_device]):
            self._sums = add_sums(self._sums, sums)
            self._examples += float(sums["weight"])
        self._on_device = []
        return {name: np.asarray(value).tolist() for name, value in self._sums.items()}

    def rows(self, step: int) -> list[Row]:
        """The training row at `step`, and a row for each head that has rolled since the last."""
        self.flush()
        row = self._labels(step, "train") | finish(self._sums)
        row["learning_rate"] = float(self._setup.learning_rate(step - 1))
        self._sums = {}
        rolls = []
        for at, on_device in self._checks:
            roll = jax.device_get(self._parallel.get(on_device))
            if np.any(roll.info.rolled):
                self._last_roll = roll
                rolls += self.roll_rows(at, roll)
        self._checks = []
        return [row, *rolls]

    def roll_rows(self, step: int, roll: Roll) -> list[Row]:
        """A row for each head that rolled after `step`."""
        return [
            self._labels(step, "roll")
            | {
                "head": int(head),
                "imbalance_window": float(roll.info.imbalance[head]),
                "imbalance_before": float(roll.imbalance_before[head]),
                "imbalance_after": float(roll.imbalance_after[head]),
                "angle_degrees": math.degrees(roll.info.angle[head]),
            }
            for head in np.flatnonzero(roll.info.rolled)
        ]

    def take_roll(self) -> Roll | None:
        """The last roll of the epoch, in host memory; None if there was none."""
        roll, self._last_roll = self._last_roll, None
        return roll

    def timing(self) -> Row:
        """Where the epoch's time went: seconds, examples a second, and the part spent on input."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        timing = {
            "seconds": seconds,
            "examples_per_second": self._examples / seconds,
            "input_wait": self._waited / seconds,
        }
        self._restart_clock()
        return timing

    def _labels(self, step: int, split: str) -> Row:
        return {"step": step, "epoch": -(-step // self._setup.epoch_steps), "split": split}
