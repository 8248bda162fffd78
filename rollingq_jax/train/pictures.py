"""The figures and the report that a finished run leaves in its folder."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from rollingq_jax.analysis.plots.geometry import PolarPanel, polar_panels
from rollingq_jax.analysis.plots.samples import share_quality_figure
from rollingq_jax.analysis.plots.style import save_png
from rollingq_jax.analysis.plots.training import accuracy_figure, dynamics_figure
from rollingq_jax.analysis.report import ReportFigure, Table, write_report
from rollingq_jax.train.evaluation import Columns, by_modality
from rollingq_jax.train.run import Run
from rollingq_jax.train.snapshot import Snapshot, load_snapshots
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.steps import current_query
from rollingq_jax.train.writer import Row

MAX_ROTATIONS_DRAWN = 2


def panels_of(snapshot: Snapshot) -> list[PolarPanel]:
    """Before and after one rotation."""
    when = f"epoch {snapshot.epoch}"
    return [
        PolarPanel(f"{when}, before the rotation", snapshot.keys, snapshot.query, snapshot.anchor),
        PolarPanel(f"{when}, after it", snapshot.keys, snapshot.anchor, snapshot.anchor),
    ]


def geometry_figure(run: Run, state: TrainState, columns: Columns) -> Figure | None:
    """Keys around the query at the first and the last rotation, or at the end if there is none."""
    snapshots = load_snapshots(run.workdir, run.setup.total_steps)
    if len(snapshots) > MAX_ROTATIONS_DRAWN:
        snapshots = [snapshots[0], snapshots[-1]]
    panels = [panel for snapshot in snapshots for panel in panels_of(snapshot)]
    keys = {n.partition("/")[2]: v for n, v in columns.items() if n.startswith("mean_keys/")}
    if not panels and len(keys) > 1:
        query = np.asarray(current_query(run.setup.model, state)[0])
        panels = [PolarPanel("best checkpoint, test data", keys, query)]
    return polar_panels(panels) if panels else None


def report_figures(
    run: Run, state: TrainState, columns: Columns, rows: list[Row]
) -> dict[str, ReportFigure]:
    """Every figure by the name of its file, with its words."""
    figures = {}
    if any("imbalance" in row for row in rows):
        figures["dynamics"] = ReportFigure(
            "Imbalance and attention share",
            dynamics_figure(rows, beta=run.config.rolling.beta),
            "Curves of the attention imbalance and of each modality's attention share by epoch.",
            "Where the imbalance passes the threshold the query is rotated (vertical lines), and "
            "the attention is dealt out anew.",
        )
    figures["accuracy"] = ReportFigure(
        "Accuracy",
        accuracy_figure(rows, chance=1 / run.config.model.num_classes),
        "Curves of the accuracy of the model and of each modality's probe by epoch.",
        "A probe sees one modality's class token and sends no gradient back: it shows what that "
        "encoder has learned so far.",
    )
    geometry = geometry_figure(run, state, columns)
    if geometry is not None:
        figures["geometry"] = ReportFigure(
            "Keys around the query",
            geometry,
            "Polar plots of the mean keys of each modality around the class query.",
            "Angles are those between the query and each validation example's mean keys, in the "
            "plane of the query and of the difference of the modalities; the rotation takes the "
            "query to the anchor.",
        )
    modalities = run.setup.model.spec.modalities
    share = by_modality(modalities, columns, "attention_share")
    quality = by_modality(modalities, columns, "quality")
    if share and quality:
        figures["share_quality"] = ReportFigure(
            "Attention share against quality",
            share_quality_figure({"": (share, quality)}),
            "Scatter plot of attention share against the difference of the modalities' quality.",
            "If attention looked at the sample, a modality that is noised in it would get less.",
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
        lines = [[row[field] for field in fields] for row in rolls]
        tables.insert(
            0,
            Table(
                "Rotations",
                columns,
                lines,
                "Imbalance over the batch of the step, with the query before and after.",
            ),
        )
    return tables


def draw(
    run: Run, state: TrainState, summary: dict[str, Any], columns: Columns, rows: list[Row]
) -> None:
    """Writes `figures/*.png` and `report.html`."""
    figures = report_figures(run, state, columns, rows)
    folder = run.workdir / "figures"
    folder.mkdir(exist_ok=True)
    for name, figure in figures.items():
        save_png(figure.figure, folder / f"{name}.png")
    numbers = {
        "test accuracy": summary["test_accuracy"],
        "test macro F1": summary["test_macro_f1"],
        "rotations": None if summary["rotations"] is None else sum(summary["rotations"]),
        "correlation of share and quality": summary.get("quality_correlation"),
    }
    best = summary["best"]
    write_report(
        run.workdir / "report.html",
        title=f"RollingQ: {run.config.data.name}, {run.config.model.fusion}",
        lead=f"{summary['data']} The best epoch by validation accuracy is {best['epoch']} "
        f"({best['accuracy']:.3f}); the test data were read once, with its parameters.",
        key_numbers={name: value for name, value in numbers.items() if value is not None},
        figures=list(figures.values()),
        tables=report_tables(summary, rows),
        config=summary["config"],
        versions=summary["versions"] | {"device": summary["device"]},
    )
