"""What the user sees in the terminal while a run goes on. Only the first process prints."""

import collections
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from rollingq_jax.analysis.metrics import written
from rollingq_jax.data.dataset import KEPT, Dataset
from rollingq_jax.train.setup import Setup
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.writer import Row, table

ROTATIONS_SHOWN = 5  # where the trigger is checked every few steps there may be hundreds


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def parameter_table(params: Any) -> str:
    """Parameters of each part of the model, and in all."""
    rows = [(name, f"{count(params[name]):,}") for name in sorted(params)]
    return table([*rows, ("parameters in all", f"{count(params):,}")])


def device_line() -> str:
    """The devices in words: `8 x cpu (cpu), 1 process`."""
    device = jax.devices()[0]
    processes = jax.process_count()
    plural = "" if processes == 1 else "es"
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{processes} process{plural}, jax {jax.__version__}"
    )


class Console:
    """A header, a progress bar, a line for each rotation and one for each epoch; or nothing."""

    def __init__(
        self, setup: Setup, state: TrainState, dataset: Dataset, quiet: bool = False
    ) -> None:
        self._first = jax.process_index() == 0 and not quiet
        self._state, self._dataset, self._setup = state, dataset, setup
        self._bar: Any = None
        self._kept: collections.Counter[str] = collections.Counter()
        self._kept_said = False
        self._rotations_shown = 0
        self._used_up_said = False

    def __enter__(self) -> "Console":
        step = int(self._state.step)
        self._print(f"devices: {device_line()}")
        sizes = ", ".join(f"{len(s):,} {name}" for name, s in self._dataset.splits.items())
        self._print(f"data: {sizes} examples, {self._dataset.num_classes} classes")
        self._print(parameter_table(self._state.params))
        if step:
            self._print(f"continuing from step {step} of {self._setup.total_steps}")
        self._bar = tqdm(
            total=self._setup.total_steps,
            initial=step,
            disable=None if self._first else True,  # None: where the output is no terminal
            unit="step",
            dynamic_ncols=True,
            mininterval=0.5,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def _print(self, text: str) -> None:
        if self._first:
            tqdm.write(text)

    def advance(self) -> None:
        """One step is under way."""
        self._bar.update()

    def _count_kept(self, row: Row) -> None:
        """Adds up, over the first epoch that is seen, what `data.corruptions` could not drop."""
        if self._kept_said:
            return
        for name, count in row.items():
            if name.startswith(KEPT):
                self._kept[name.removeprefix(KEPT)] += count
        if row["step"] % self._setup.epoch_steps:
            return
        self._kept_said = True
        for modality, count in sorted(self._kept.items()):
            self._print(
                f"data.corruptions: in epoch {row['epoch']}, {count} examples keep {modality}, "
                "which was to be dropped, because it is their last modality"
            )

    def show(self, rows: Iterable[Row]) -> None:
        """Puts training rows on the bar; prints validation and rotations on lines of their own."""
        for row in rows:
            if row["split"] == "train":
                names = ("loss", "accuracy", "imbalance")
                self._bar.set_postfix({n: written(row[n]) for n in names if n in row})
                self._count_kept(row)
                if row.get("skipped"):
                    self._print(
                        f"epoch {row['epoch']}, step {row['step']}: skipped {row['skipped']} "
                        "updates whose loss or gradient was NaN or infinite"
                    )
            elif row["split"] == "roll":
                self._rotations_shown += 1
                if self._rotations_shown > ROTATIONS_SHOWN:
                    continue
                mended = "; R had drifted from orthogonal and is mended"
                self._print(
                    f"epoch {row['epoch']}, head {row['head']}: rotated the query by "
                    f"{row['angle_degrees']:.1f} degrees; imbalance "
                    f"{written(row['imbalance_before'])} -> {written(row['imbalance_after'])}"
                    f"{mended if row.get('mended') else ''}"
                )
                if self._rotations_shown == ROTATIONS_SHOWN:
                    self._print("further rotations are counted in the epochs' lines alone")
            else:
                self._print(epoch_line(row))
                if row.get("rotations_used_up") and not self._used_up_said:
                    self._used_up_said = True
                    self._print(
                        f"epoch {row['epoch']}: no rotations are left, and imbalance stands above "
                        f"config.rolling.beta at {written(row['imbalance'])}; "
                        "--config.rolling.max_rotations=None sets no limit"
                    )


def epoch_line(row: Row) -> str:
    """An epoch's validation in one line; says so where the run waits for its input."""
    parts = [f"epoch {row['epoch']}: validation loss {written(row['loss'])}"]
    parts.append(f"accuracy {written(row['accuracy'])}")
    if "imbalance" in row:
        parts.append(f"imbalance {written(row['imbalance'])}")
    shares = [
        f"{n[16:]} {written(v, '.2f')}" for n, v in row.items() if n.startswith("attention_share/")
    ]
    if shares:
        parts.append("attention " + " ".join(shares))
    if row.get("rotations"):
        parts.append(f"rotations {row['rotations']}")
    parts.append(f"{row['seconds']:.1f} s, {row['examples_per_second']:,.0f} examples/s")
    parts.append(f"{row['input_wait']:.0%} waiting for input")
    if row["input_wait"] > 0.5:
        parts.append("(input-bound)")
    return ", ".join(parts)
