"""A comparison shown: figures and the report."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rollingq_jax.analysis import narrative, plots
from rollingq_jax.analysis.plots import style
from rollingq_jax.analysis.predictions import Predictions
from rollingq_jax.analysis.report import ReportFigure, Table, write_report
from rollingq_jax.comparison import results as numbers

Row = Mapping[str, Any]
SHOWN = ("test_accuracy", "quality_correlation")


def differences_figure(table: numbers.Table, against: str) -> Figure | None:
    """Each arm's paired difference to one arm, with its interval; None if nothing is paired.

    Args:
      table: from `results.make_table`.
      against: the arm at zero.
    """
    panels = [m for m in SHOWN if any("difference" in v for v in table.get(m, {}).values())]
    if not panels:
        return None
    names = list(dict.fromkeys(a for m in panels for a, v in table[m].items() if "difference" in v))
    figure = style.new_figure(4.6 * len(panels) + 0.6, 0.42 * len(names) + 1.5)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, metric in zip(grid, panels, strict=True):
        scale = 100 if metric in numbers.IN_PERCENT else 1
        axes.axvline(0, color=style.MUTED, linewidth=1)
        for place, name in enumerate(names):
            line = table[metric].get(name, {})
            if "difference" not in line:
                continue
            look = {"color": style.color(0), "linewidth": 2}
            if line["low"] is not None:
                axes.plot([scale * line["low"], scale * line["high"]], [place, place], **look)
            axes.plot(scale * line["difference"], place, "o", markersize=7, color=style.color(0))
        axes.xaxis.set_major_locator(MaxNLocator(6))
        unit = " (points)" if scale == 100 else ""
        style.style_axes(axes, xlabel=f"{numbers.METRICS[metric]}{unit}")
    grid[0].set_yticks(range(len(names)), [style.plain(style.shorten(name)) for name in names])
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    figure.suptitle(
        f"Difference to {style.plain(against)}, seed by seed: mean and 95 % interval",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    return figure


def all_figures(
    result: Mapping[str, Any],
    rows: Mapping[str, Sequence[Sequence[Row]]],
    samples: Mapping[str, Predictions],
    noise: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> Iterator[tuple[str, ReportFigure]]:
    """Names of files and figures.

    Args:
      result: what `results.json` holds.
      rows: arm -> rows of `metrics.jsonl` of each of its runs.
      samples: arm -> answers on the test split, of one run.
      noise: arm -> points of `probes.corruption_curve` of each of its runs.
    """
    against = result["reference"]
    differences = differences_figure(result["table"], against)
    if differences is not None:
        words = result["conclusion"]
        yield "differences", ReportFigure(f"Against {against}", differences, words)
    how = narrative.HOW_TO_READ
    accuracy = plots.arms_figure(rows, fields={"accuracy": "validation accuracy (0 to 1)"})
    alt = "Validation accuracy of each arm over training."
    yield "accuracy", ReportFigure("Accuracy over training", accuracy, alt, how["arms"])
    if any("imbalance" in row for runs in rows.values() for one in runs for row in one):
        alt = "Imbalance and attention share of each arm over training."
        figure = plots.arms_figure(rows)
        yield "dynamics", ReportFigure("Imbalance and share", figure, alt, how["arms"])
    if samples:
        found = {arm: (p.shares(), p.quality) for arm, p in samples.items()}
        alt = "Attention share of each test example against its quality, an arm a panel."
        text = how["share_quality"] + " One run of each arm."
        figure = plots.share_quality_figure(found)
        yield "share_quality", ReportFigure("Does attention follow quality?", figure, alt, text)
    if noise:
        alt = "Accuracy and attention share while one modality turns to noise, an arm a line."
        figure = plots.noise_figure(noise)
        yield "noise", ReportFigure("Accuracy against noise", figure, alt, how["noise"])


def report_tables(result: Mapping[str, Any]) -> list[Table]:
    """A table for each metric, the settings, and the test accuracy against a second arm."""
    against = result["reference"]
    words = numbers.metrics_of(result["runs"])
    tables = [
        _metric_table(f"{words[metric].capitalize()}, difference to {against}", lines)
        for metric, lines in result["table"].items()
    ]
    second = result["second_table"]
    if second is not None:
        title = f"Test accuracy, difference to {result['second_reference']}"
        tables.insert(1, _metric_table(title, second["test_accuracy"]))
    settings = [
        (arm, ", ".join(f"{f}={v}" for f, v in chosen["setting"].items()), len(chosen["tried"]))
        for arm, chosen in result["selection"].items()
    ]
    text = f"{result['search']} The choice was made before any test set was read."
    return [*tables, Table("Settings", ("arm", "setting", "settings tried"), settings, text)]


def _metric_table(title: str, lines: Mapping[str, Mapping[str, Any]]) -> Table:
    interval = ("95 % from", "to")
    columns = ("arm", "mean", *interval, "standard deviation", "runs", "difference", *interval)
    own, paired = ("mean", "mean_low", "mean_high", "sd", "runs"), ("difference", "low", "high")
    fields = (*own, *paired, "wins", "losses", "detectable")
    rows = [(arm, *(line.get(field) for field in fields)) for arm, line in lines.items()]
    detects = f"detects with probability {numbers.POWER:g}"
    return Table(title, (*columns, "wins", "losses", detects), rows)


def write_pictures(
    folder: epath.Path,
    result: Mapping[str, Any],
    rows: Mapping[str, Sequence[Sequence[Row]]],
    samples: Mapping[str, Predictions],
    noise: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> None:
    """Writes `figures/*.png` and `report.html`; see `all_figures` for the arguments."""
    figures = []
    for name, figure in all_figures(result, rows, samples, noise):
        drawn = figure.drawn()
        (folder / "figures").mkdir(parents=True, exist_ok=True)
        plots.save_png(drawn.figure, folder / "figures" / f"{name}.png")
        figures.append(drawn)
    accuracy = result["table"]["test_accuracy"]
    write_report(
        folder / "report.html",
        title=f"Comparison: {result['config']['data']['name']}, {len(result['seeds'])} seeds",
        lead=result["conclusion"],
        key_numbers={f"test accuracy, {arm}": line["mean"] for arm, line in accuracy.items()},
        figures=figures,
        tables=report_tables(result),
        data=result["data"],
        config=result["config"],
        versions=result["versions"] | {"device": result["device"]},
    )
