"""The figures and the report that a finished run leaves in its folder."""

from typing import Any

import numpy as np

from rollingq_jax.analysis import report
from rollingq_jax.analysis.metrics import Predictions
from rollingq_jax.analysis.plots import (
    PolarPanel,
    accuracy_figure,
    attention_figure,
    dynamics_figure,
    polar_panels,
    save_png,
    share_quality_figure,
)
from rollingq_jax.analysis.report import (
    ReportFigure,
    Table,
    attention_examples,
    choose_examples,
    write_report,
)
from rollingq_jax.train.run import Run
from rollingq_jax.train.snapshot import Snapshot, load_snapshots
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.writer import Row, read_rows

MAX_ROTATIONS_DRAWN = 2


def panels_of(snapshot: Snapshot) -> list[PolarPanel]:
    """Before and after one rotation."""
    when = f"epoch {snapshot.epoch}"
    return [
        PolarPanel(f"{when}, before the rotation", snapshot.keys, snapshot.query, snapshot.anchor),
        PolarPanel(f"{when}, after it", snapshot.keys, snapshot.anchor, snapshot.anchor),
    ]


def rotation_panels(run: Run) -> list[PolarPanel]:
    """The first and the last rotation; none where the query was never rotated."""
    snapshots = load_snapshots(run.workdir, run.setup.total_steps)
    if len(snapshots) > MAX_ROTATIONS_DRAWN:
        snapshots = [snapshots[0], snapshots[-1]]
    return [panel for snapshot in snapshots for panel in panels_of(snapshot)]


def report_figures(
    run: Run, state: TrainState, predictions: Predictions, rows: list[Row]
) -> dict[str, ReportFigure]:
    """Every figure by the name of its file, with its words."""
    figures = {
        "accuracy": ReportFigure(
            "Accuracy of the model and of its probes",
            accuracy_figure(rows, chance=1 / run.config.model.num_classes),
            report.describe_accuracy(rows),
            report.HOW_TO_READ["accuracy"],
        )
    }
    if not predictions.attention_share:
        return figures
    plain = read_rows(run.workdir / "plain" / "metrics.jsonl") if run.config.plain_twin else []
    figures["dynamics"] = ReportFigure(
        "Imbalance and attention share",
        dynamics_figure(rows, beta=run.config.rolling.beta, plain=plain),
        report.describe_dynamics(rows, plain),
        report.HOW_TO_READ["dynamics"],
    )
    panels = rotation_panels(run)
    if panels:
        figures["rotation"] = ReportFigure(
            "Keys around the query, before and after a rotation",
            polar_panels(panels),
            report.describe_rolls(rows),
            report.HOW_TO_READ["polar"],
        )
    if predictions.quality:
        figures["share_quality"] = ReportFigure(
            "Does attention follow quality?",
            share_quality_figure({"": (predictions.shares(), predictions.quality)}),
            "Scatter plot of attention share against the difference in quality, test data.",
            report.HOW_TO_READ["share_quality"],
        )
    examples = attention_examples(
        run.setup.model,
        state.params,
        state.rotation,
        run.dataset,
        "test",
        choose_examples(predictions),
        seed=run.config.seed,
    )
    figures["attention"] = ReportFigure(
        "What the class token looks at",
        attention_figure(examples),
        "Attention weights drawn over the inputs of some test examples.",
        report.HOW_TO_READ["attention"],
    )
    return figures


def report_tables(summary: dict[str, Any], rows: list[Row]) -> list[Table]:
    """Rotations and classes."""
    rolls = [row for row in rows if row["split"] == "roll"]
    fields = ("epoch", "head", "imbalance_before", "imbalance_after", "angle_degrees")
    classes = [
        (name, score["examples"], score["accuracy"], score["f1"])
        for name, score in summary["per_class"].items()
    ]
    tables = [Table("Classes, test data", ("class", "examples", "accuracy", "F1"), classes)]
    if rolls:
        columns = ("epoch", "head", "imbalance before", "imbalance after", "angle (degrees)")
        lines = [[row.get(field) for field in fields] for row in rolls]
        words = "Imbalance over the batch of the step, with the query before and after."
        tables.insert(0, Table("Rotations", columns, lines, words))
    return tables


def key_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """What stands at the top of the report."""
    rotations = summary["rotations"]
    numbers = {
        "test accuracy": summary["test_accuracy"],
        "test macro F1": summary["test_macro_f1"],
        "rotations": None if rotations is None else int(np.sum(rotations)),
        "correlation of share and quality": summary.get("quality_correlation"),
    }
    return {name: value for name, value in numbers.items() if value is not None}


def draw(
    run: Run,
    state: TrainState,
    summary: dict[str, Any],
    predictions: Predictions,
    rows: list[Row],
) -> None:
    """Writes `figures/*.png` and `report.html`."""
    figures = {
        name: figure.drawn()
        for name, figure in report_figures(run, state, predictions, rows).items()
    }
    folder = run.workdir / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure.figure, folder / f"{name}.png")
    best = summary["best"]
    chosen = "" if best["accuracy"] is None else f" ({best['accuracy']:.3f})"
    write_report(
        run.workdir / "report.html",
        title=f"RollingQ: {run.config.data.name}, {run.config.model.fusion}",
        lead=f"The best epoch by validation accuracy is {best['epoch']}{chosen}; the test data "
        "were read once, with its parameters.",
        key_numbers=key_numbers(summary),
        figures=list(figures.values()),
        tables=report_tables(summary, rows),
        data=summary["data"],
        config=summary["config"],
        versions=summary["versions"] | {"device": summary["device"]},
    )
