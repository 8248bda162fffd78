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

from rollingq_jax.errors import NonFiniteError
from rollingq_jax.train.metrics import add_sums, finish
from rollingq_jax.train.numerics import NONFINITE, flag_names, offending
from rollingq_jax.train.parallel import Parallel
from rollingq_jax.train.setup import Setup
from rollingq_jax.train.snapshot import Turn, turn_of
from rollingq_jax.train.steps import Roll
from rollingq_jax.train.writer import Row


class Meter:
    """Sums since the last row, rolls since the last epoch's end, and where the time went.

    Args:
      parallel, setup: of the run.
      params: for the names of parameters.
      record: of the checkpoint from which the run goes on, `pending()` in it.
      skip: whether a step with a loss or gradient that is not finite is counted rather than an
        error.
    """

    def __init__(
        self, parallel: Parallel, setup: Setup, params: Any, record: Mapping[str, Any], skip: bool
    ) -> None:
        self._parallel, self._setup, self._skip = parallel, setup, skip
        self._names = flag_names(params)
        sums = record.get("sums", {})  # older versions counted otherwise; theirs cannot be added to
        self._sums: dict[str, Any] = dict(sums) if "unscored" in sums else {}
        self._turn: Turn | None = record.get("turn")
        self._on_device: list[tuple[int, Any]] = []
        self._checks: list[tuple[int, Any]] = []
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
        self._on_device.append((step, sums))
        if roll is not None:
            self._checks.append((step, roll))

    def _flush(self) -> None:
        """Takes the steps' sums to host memory.

        Raises:
          NonFiniteError: the loss or the gradient of a step was not finite.
        """
        on_device = [self._parallel.get(sums) for _, sums in self._on_device]
        for (step, _), sums in zip(self._on_device, jax.device_get(on_device), strict=True):
            names = offending(sums.pop(NONFINITE), self._names)
            if names and not self._skip:
                others = f" and {len(names) - 1} others" if len(names) > 1 else ""
                raise NonFiniteError(f"step {step}: {names[0]}{others} is NaN or infinite")
            if self._skip:
                sums["skipped"] = len(names) > 0
            self._sums = add_sums(self._sums, sums)
            self._examples += float(sums["weight"])
        self._on_device = []

    def pending(self) -> tuple[list[Row], dict[str, Any]]:
        """What a checkpoint in the middle of an epoch needs.

        Returns:
          The rows of the rolls since the last row, which are to be written now; and a record of
          the sums since the last row and of the last rotation since the last epoch's end.
        """
        self._flush()
        sums = {name: np.asarray(value).tolist() for name, value in self._sums.items()}
        return self._take_checks(), {"sums": sums, "turn": self._turn}

    def rows(self, step: int) -> list[Row]:
        """A row for each head that has rolled since the last time, and the training row."""
        self._flush()
        row = self._labels(step, "train") | finish(self._sums)
        row["learning_rate"] = float(self._setup.learning_rate(step - 1))
        self._sums = {}
        return [*self._take_checks(), row]

    def _take_checks(self) -> list[Row]:
        rows = []
        for step, on_device in self._checks:
            rows += self.roll_rows(step, jax.device_get(self._parallel.get(on_device)))
        self._checks = []
        return rows

    def roll_rows(self, step: int, roll: Roll) -> list[Row]:
        """A row for each head that rolled after `step`."""
        self._turn = turn_of(roll) or self._turn
        rows = []
        for head in np.flatnonzero(roll.info.rolled):
            row = self._labels(step, "roll") | {
                "head": int(head),
                "imbalance_window": float(roll.info.imbalance[head]),
                "imbalance_before": float(roll.imbalance_before[head]),
                "imbalance_after": float(roll.imbalance_after[head]),
                "angle_degrees": math.degrees(roll.info.angle[head]),
            }
            if roll.info.mended[head]:
                row["mended"] = True
            rows.append(row)
        return rows

    def take_turn(self) -> Turn | None:
        """The first head's last rotation in the epoch; None if there was none."""
        turn, self._turn = self._turn, None
        return turn

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
