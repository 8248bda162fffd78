"""The two stages of a comparison: choosing settings on validation data, then the tests."""

from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from rollingq_jax.comparison import runs as running
from rollingq_jax.comparison import selection as choosing
from rollingq_jax.comparison.results import Run, run_record
from rollingq_jax.comparison.runs import Plan
from rollingq_jax.train.interrupt import Interruption
from rollingq_jax.train.writer import write_json


class Progress:
    """A bar over runs, and a line for each that has ended. A context manager."""

    def __init__(self, plan: Plan) -> None:
        tuning = len(plan.settings) * len(plan.tune_seeds)
        self.total = len(plan.arms) * (tuning + len(plan.seeds))
        self.done = 0

    def __enter__(self) -> "Progress":
        self._bar = tqdm(total=self.total, unit="run", disable=None, dynamic_ncols=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def begin(self, text: str) -> None:
        """A run is under way."""
        self._bar.set_postfix_str(text)

    def end(self, text: str, runs: int = 1) -> None:
        """Runs have ended."""
        self.done += runs
        self._bar.update(runs)
        tqdm.write(f"{self.done}/{self.total}  {text}")


def tune_arms(plan: Plan, interruption: Interruption, progress: Progress) -> dict[str, Any]:
    """Chooses each arm's setting on validation data and writes `selection.json`.

    An arm that has its setting already keeps it.

    Returns:
      Arm -> its entry (`selection.selected`).
    """
    path = plan.folder / "selection.json"
    selection = dict(choosing.read_json(path) or {})
    for arm in plan.arms:
        if arm in selection:
            runs = len(plan.settings) * len(plan.tune_seeds)
            if runs:
                progress.end(f"{arm}: has its setting already", runs)
            continue
        accuracies: list[list[float | None]] = [[] for _ in plan.settings]
        for seed in plan.tune_seeds:
            for number, setting in enumerate(plan.settings):
                words = ", ".join(f"{field}={value}" for field, value in setting.items())
                progress.begin(f"{arm}, {words}, seed {seed}")
                found = running.tuned_accuracy(plan, arm, number, seed, interruption)
                accuracies[number].append(found)
                what = "not finite" if found is None else f"validation accuracy {found:.3f}"
                progress.end(f"{arm}, {words}, seed {seed}: {what}")
        if plan.tune_seeds:
            selection[arm] = choosing.selected(plan.settings, plan.tune_seeds, accuracies, arm)
        else:
            selection[arm] = choosing.fixed(plan.settings[0])
    write_json(path, selection)
    return selection


def run_tests(
    plan: Plan, selection: Mapping[str, Any], interruption: Interruption, progress: Progress
) -> list[Run]:
    """Every arm and seed with the chosen setting, seed by seed, so that pairs come together.

    Returns:
      A record of each run, arm by arm.
    """
    records = []
    for seed in plan.seeds:
        for arm in plan.arms:
            number = selection[arm]["chosen"]
            progress.begin(f"{arm}, seed {seed}")
            summary = running.tested_summary(plan, arm, number, seed, interruption)
            records.append(run_record(arm, seed, plan.settings[number], summary))
            progress.end(f"{arm}, seed {seed}: test accuracy {summary['test_accuracy']:.3f}")
    order = list(plan.arms)
    return sorted(records, key=lambda run: (order.index(run["arm"]), run["seed"]))
