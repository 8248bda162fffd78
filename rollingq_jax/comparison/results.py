"""From finished runs to a table, its files and pictures, and what may be concluded."""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rollingq_jax.analysis import plots
from rollingq_jax.analysis.metrics import (
    Predictions,
    bootstrap_mean,
    detectable_difference,
    paired_difference,
)
from rollingq_jax.analysis.plots import style
from rollingq_jax.analysis.report import HOW_TO_READ, ReportFigure, save_figures, write_report
from rollingq_jax.analysis.report import Table as ReportTable
from rollingq_jax.analysis.tasks import HEADLINES, MAIN, Metric, task_name
from rollingq_jax.analysis.tasks import METRICS as SCORES

Row = Mapping[str, Any]
Run = dict[str, Any]
Table = dict[str, dict[str, dict[str, Any]]]

# What an arm is judged by. Of the tests the comparison has those that the runs' task begins with:
# the first metric of a table is the main one.
METRICS = {
    f"test_{name}": metric._replace(words=f"test {metric.words}") for name, metric in SCORES.items()
}
METRICS["quality_correlation"] = Metric("correlation of share and quality")
# Below this many pairs no interval counts: a bootstrap of two pairs excludes 0 whenever both have
# the same sign, which chance alone gives every other time; of five, once in 16.
MIN_PAIRS = 5
POWER = 0.8  # with which a difference of the size of "detectable" would be shown


def run_record(arm: str, seed: int, setting: Mapping[str, Any], summary: Mapping[str, Any]) -> Run:
    """What the comparison keeps of one run's `summary.json`."""
    rotations, best = summary["rotations"], summary["best"]
    main = MAIN[task_name(summary)]
    record = {
        "arm": arm,
        "seed": seed,
        "setting": dict(setting),
        f"validation_{main}": best[main],
        "best_epoch": best["epoch"],
        "rotations": None if rotations is None else int(np.sum(rotations)),
        "num_parameters": summary["num_parameters"],
    }
    found = [f"test_{name}" for name in SCORES if name != "loss"]
    record |= {name: summary[name] for name in found if name in summary}
    record["quality_correlation"] = summary.get("quality_correlation")
    for kind in ("attention_share", "uniform_share", f"probe_{main}"):
        record |= {f"{kind}/{m}": value for m, value in summary.get(kind, {}).items()}
    counts = summary.get("modality_examples", {})
    record |= {f"examples/{m}": count for m, count in counts.items()}
    if "test_nonfinite" in summary:
        record["test_nonfinite"] = summary["test_nonfinite"]
    return record


def metrics_of(runs: Sequence[Run]) -> dict[str, str]:
    """The metrics of the table, with their words; the share of each modality has its own."""
    names = {name for run in runs for name in run}
    shares = sorted(name for name in names if name.startswith("attention_share/"))
    shown = (*judged_by(names), "quality_correlation", *shares)
    return {name: metric_of(name).words for name in shown}


def metric_of(name: str) -> Metric:
    """One of `METRICS`, or a modality's share of attention, of which more counts as better."""
    return METRICS.get(name) or Metric(f"attention share of {name.partition('/')[2]}")


def judged_by(names: Collection[str]) -> list[str]:
    """Of the names in records, the metrics of tests that a table has, the main one first."""
    tests = ([f"test_{name}" for name in headlines] for headlines in HEADLINES.values())
    return next(([n for n in found if n in names] for found in tests if found[0] in names), [])


def main_of(table: Mapping[str, Any]) -> str:
    """The main metric of a table."""
    return next(iter(judged_by(table)), "test_accuracy")


def values_of(runs: Sequence[Run], arm: str, metric: str) -> dict[int, float]:
    """Seed -> value, of the arm's runs that have one."""
    found = {run["seed"]: run.get(metric) for run in runs if run["arm"] == arm}
    return {s: float(v) for s, v in sorted(found.items()) if v is not None and np.isfinite(v)}


def make_table(runs: Sequence[Run], arms: Sequence[str], against: str) -> Table:
    """metric -> arm -> mean, standard deviation, and the paired difference to the arm `against`.

    Returns:
      For each metric the arms that have it: "mean", "mean_low", "mean_high" (its bootstrap 95 %
      interval) and "sd" (None for one run), "runs", and for all but `against` "difference",
      "low", "high" (bootstrap 95 % interval, None for one pair),
      "pairs", "wins", "losses", and "detectable", the difference that as many pairs with the same
      spread would show with probability `POWER` (None for one pair).
    """
    table: Table = {}
    for metric in metrics_of(runs):
        reference = values_of(runs, against, metric)
        lines = {}
        for arm in arms:
            values = values_of(runs, arm, metric)
            if values:
                paired = None if arm == against else reference
                lines[arm] = make_line(values, paired, metric_of(metric).higher_is_better)
        if lines:
            table[metric] = lines
    return table


def make_line(
    values: Mapping[int, float],
    reference: Mapping[int, float] | None = None,
    higher_is_better: bool = True,
) -> dict[str, Any]:
    """An arm's line of `make_table` from seed -> value, paired with a reference if there is one."""
    numbers = np.array(list(values.values()))
    mean = bootstrap_mean(numbers)
    line: dict[str, Any] = {
        "mean": mean.mean,
        "mean_low": finite_or_none(mean.low),
        "mean_high": finite_or_none(mean.high),
        "sd": float(numbers.std(ddof=1)) if len(numbers) > 1 else None,
        "runs": len(numbers),
    }
    common = sorted(values.keys() & (reference or {}).keys())
    if reference and common:
        pairs = [values[s] for s in common], [reference[s] for s in common]
        line |= difference(*pairs, higher_is_better)
    return line


def finite_or_none(value: float) -> float | None:
    """What JSON has for a number that is not defined."""
    return value if np.isfinite(value) else None


def difference(
    first: Sequence[float], second: Sequence[float], higher_is_better: bool = True
) -> dict[str, Any]:
    """The paired difference in the words of the table."""
    found = paired_difference(np.asarray(first), np.asarray(second))
    gaps = np.asarray(first) - np.asarray(second)
    deviation = float(gaps.std(ddof=1)) if len(gaps) > 1 else float("nan")
    wins, losses = (found.wins, found.losses) if higher_is_better else (found.losses, found.wins)
    return {
        "difference": found.mean,
        "low": finite_or_none(found.low),
        "high": finite_or_none(found.high),
        "pairs": found.size,
        "wins": wins,
        "losses": losses,
        "detectable": finite_or_none(detectable_difference(deviation, found.size, power=POWER)),
    }


def verdict(metric: str, line: Mapping[str, Any]) -> str:
    """What a difference shows: a gain or a loss where its interval excludes 0, else neither.

    Nothing with fewer than `MIN_PAIRS` pairs. A share of attention is neither good nor bad: it is
    higher or lower.
    """
    if line["pairs"] < MIN_PAIRS or line["low"] is None:
        return "too few pairs to count"
    more, less = ("a gain", "a loss") if metric in METRICS else ("higher", "lower")
    if not metric_of(metric).higher_is_better:
        more, less = less, more
    if line["low"] > 0:
        return more
    return less if line["high"] < 0 else "no difference is shown"


def even_shares(runs: Sequence[Run], modalities: Sequence[str]) -> dict[str, float]:
    """Each modality's share under uniform attention, the mean over the runs that tell it.

    Equal shares where none does, as in comparisons of earlier versions.
    """
    found = {}
    for m in modalities:
        told = [run.get(f"uniform_share/{m}") for run in runs]
        known = [float(share) for share in told if share is not None]
        found[m] = float(np.nanmean(known)) if known else 1 / len(modalities)
    return found


def verdicts(table: Table, runs: Sequence[Run], reference: str) -> list[str]:
    """Is attention biased, did the rolls last, did accuracy follow? A sentence each, with numbers.

    Attention is biased where the 95 % interval of a modality's share excludes the even one, that of
    uniform attention; the rolls lasted where that share is nearer to it. Empty where the reference
    has no attention.

    Args:
      table: from `make_table`, against the reference.
      runs: from `run_record`; an arm rolls where one of its runs was rotated.
      reference: the arm without rolls.
    """
    shares = {
        name: lines
        for name, lines in table.items()
        if name.startswith("attention_share/") and reference in lines
    }
    if len(shares) < 2:
        return []
    evens = even_shares(runs, [name.partition("/")[2] for name in shares])
    excess = {m: shares[f"attention_share/{m}"][reference]["mean"] - evens[m] for m in evens}
    modality = max(excess, key=excess.__getitem__)
    even, biased = evens[modality], f"attention_share/{modality}"
    line = shares[biased][reference]
    if line["mean_low"] is None or line["runs"] < MIN_PAIRS:
        answer = "Too few seeds to say"
    else:
        answer = "Yes" if line["mean_low"] > even else "Not shown"
    said = [
        f"Is attention biased? {answer}: {reference} gives {modality} "
        f"{written_mean(biased, line)} of its attention; even is {even:.3f}."
    ]
    rolled = {run["arm"] for run in runs if run.get("rotations")}
    for arm, line in shares[biased].items():
        if arm in rolled and "difference" in line:
            nearer = {"lower": "Yes", "higher": "No"}.get(verdict(biased, line), "Not shown")
            # Farther from even than it was, on the other side.
            if nearer == "Yes" and even - line["mean"] > excess[modality]:
                nearer = "No, they went too far"
            said.append(
                f"Did the rolls last? {nearer}: {arm} gives {modality} "
                f"{written_mean(biased, line)}, {written_difference(biased, line)}."
            )
            main = main_of(table)
            gain, words = table[main][arm], SCORES[main.removeprefix("test_")].words
            answer = {"a gain": "Yes", "a loss": "No"}.get(verdict(main, gain), "Not shown")
            said.append(f"Did {words} follow? {answer}: {arm} {written_difference(main, gain)}.")
    return said


def conclude(
    table: Table, second: Table | None, against: str, second_against: str, num_seeds: int
) -> str:
    """What the data do and do not support, in a paragraph.

    Args:
      table: differences to the arm `against`.
      second: differences of the main metric to the arm `second_against`, or None.
    """
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds"
    few = f": too few for any difference to count; {MIN_PAIRS} are the least"
    parts = [f"{seeds}{few if num_seeds < MIN_PAIRS else ''}."]
    main = main_of(table)
    for metric in (main, "quality_correlation"):
        parts += _sentence(table, metric, against)
    parts += _power(table, against)
    if second is not None:
        parts += _sentence(second, main, second_against)
    parts.append(
        "A gain or a loss counts when its 95 % bootstrap interval excludes 0; what is not shown "
        "may be there all the same. The intervals hold for one comparison each and are not "
        "corrected for their number. They cover the chance in initial values, in the order of the "
        "data and, where the data are drawn from the seed, in the data; not the choice of data set "
        "and model."
    )
    return " ".join(parts)


def _power(table: Table, against: str) -> list[str]:
    """What the seeds can detect in the main metric, an estimate."""
    main = main_of(table)
    claims = [
        f"{written(main, line['detectable'], 'points')} for {arm}"
        for arm, line in table.get(main, {}).items()
        if line.get("detectable") is not None and line["pairs"] >= MIN_PAIRS
    ]
    if not claims:
        return []
    return [
        f"With as many seeds and the spread seen here, a difference to {against} in "
        f"{METRICS[main].words} is detected with probability {POWER:g} from {', '.join(claims)} on."
    ]


def _sentence(table: Table, metric: str, against: str) -> list[str]:
    lines = {a: v for a, v in table.get(metric, {}).items() if "difference" in v}
    if not lines:
        return []
    reference = table[metric].get(against)
    level = f" ({written_mean(metric, reference)})" if reference else ""
    claims = [f"{arm} {written_difference(metric, line)}" for arm, line in lines.items()]
    return [f"{METRICS[metric].title} against {against}{level}: {'; '.join(claims)}."]


def written(metric: str, value: float, unit: str = "%") -> str:
    """A value as text; the unit is of metrics in percent."""
    return f"{100 * value:.1f} {unit}" if metric_of(metric).percent else f"{value:.3f}"


def written_mean(metric: str, line: Mapping[str, Any]) -> str:
    """A mean as text, with its interval."""
    if line["mean_low"] is None:
        return written(metric, line["mean"])
    low, high = (written(metric, line[end]) for end in ("mean_low", "mean_high"))
    return f"{written(metric, line['mean'])} [{low}, {high}]"


def written_difference(metric: str, line: Mapping[str, Any]) -> str:
    """A difference as text, with its interval and what it shows."""
    scale, digits, unit = (100, 1, " points") if metric_of(metric).percent else (1, 3, "")
    text = f"{scale * line['difference']:+.{digits}f}{unit}"
    if line["low"] is not None:
        low, high = (f"{scale * line[end]:+.{digits}f}" for end in ("low", "high"))
        text += f" [{low}, {high}]"
    return f"{text}, {line['wins']} won and {line['losses']} lost: {verdict(metric, line)}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def as_csv(runs: Sequence[Run]) -> str:
    """One line a run; the fields of its setting are columns too, empty where there is no value."""
    flat = [
        {k: v for k, v in run.items() if k != "setting"}
        | {f"setting/{field}": value for field, value in run["setting"].items()}
        for run in runs
    ]
    columns = list(dict.fromkeys(name for line in flat for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def differences_figure(table: Table, against: str) -> Figure | None:
    """Each arm's paired difference to one arm, with its interval; None if nothing is paired."""
    shown = (main_of(table), "quality_correlation")
    panels = [m for m in shown if any("difference" in v for v in table.get(m, {}).values())]
    if not panels:
        return None
    names = list(dict.fromkeys(a for m in panels for a, v in table[m].items() if "difference" in v))
    figure = style.new_figure(4.6 * len(panels) + 0.6, 0.42 * len(names) + 1.5)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, metric in zip(grid, panels, strict=True):
        scale = METRICS[metric].scale
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
        style.style_axes(axes, xlabel=f"{METRICS[metric].words}{unit}")
    grid[0].set_yticks(range(len(names)), [style.plain(style.shorten(name)) for name in names])
    grid[0].set_ylim(len(names) - 0.4, -0.6)
    style.heading(
        figure, f"Difference to {style.plain(against)}, seed by seed: mean and 95 % interval"
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
    main = main_of(result["table"]).removeprefix("test_")
    metric = SCORES[main]
    label = f"validation {metric.words}" + " (0 to 1)" * metric.percent
    alt = f"Validation {metric.words} of each arm over training."
    figure = plots.arms_figure(rows, fields={main: label})
    yield main, ReportFigure(f"{metric.title} over training", figure, alt, HOW_TO_READ["arms"])
    if any("imbalance" in row for runs in rows.values() for one in runs for row in one):
        alt = "Imbalance and attention share of each arm over training."
        figure = plots.arms_figure(rows)
        yield "dynamics", ReportFigure("Imbalance and share", figure, alt, HOW_TO_READ["arms"])
    shares = [name for run in result["runs"] for name in run if name.startswith("attention_share/")]
    even = even_shares(result["runs"], sorted({name.partition("/")[2] for name in shares}))
    if samples:
        found = {arm: (p.shares(), p.quality) for arm, p in samples.items()}
        alt = "Attention share of each test example against its quality, an arm a panel."
        text = HOW_TO_READ["share_quality"] + " One run of each arm."
        figure = plots.share_quality_figure(found, even=even)
        yield "share_quality", ReportFigure("Does attention follow quality?", figure, alt, text)
    if noise:
        alt = (
            f"{metric.title} and attention share while one modality turns to noise, an arm a line."
        )
        title, text = f"{metric.title} against noise", HOW_TO_READ["noise"]
        figure = plots.noise_figure(noise, metric=main, even=even)
        yield "noise", ReportFigure(title, figure, alt, text)


def report_tables(result: Mapping[str, Any]) -> list[ReportTable]:
    """A table for each metric, the settings, and the test accuracy against a second arm."""
    against = result["reference"]
    words = metrics_of(result["runs"])
    tables = [
        _metric_table(f"{Metric(words[metric]).title}, difference to {against}", lines)
        for metric, lines in result["table"].items()
    ]
    main = main_of(result["table"])
    second = result["second_table"]
    if second is not None:
        title = f"{METRICS[main].title}, difference to {result['second_reference']}"
        tables.insert(1, _metric_table(title, second[main]))
    settings = [
        (arm, ", ".join(f"{f}={v}" for f, v in chosen["setting"].items()), len(chosen["tried"]))
        for arm, chosen in result["selection"].items()
    ]
    text = f"{result['search']} The choice was made before any test set was read."
    return [*tables, ReportTable("Settings", ("arm", "setting", "settings tried"), settings, text)]


def _metric_table(title: str, lines: Mapping[str, Mapping[str, Any]]) -> ReportTable:
    interval = ("95 % from", "to")
    columns = ("arm", "mean", *interval, "standard deviation", "runs", "difference", *interval)
    own, paired = ("mean", "mean_low", "mean_high", "sd", "runs"), ("difference", "low", "high")
    fields = (*own, *paired, "wins", "losses", "detectable")
    rows = [(arm, *(line.get(field) for field in fields)) for arm, line in lines.items()]
    detects = f"detects with probability {POWER:g}"
    return ReportTable(title, (*columns, "wins", "losses", detects), rows)


def write_pictures(
    folder: epath.Path,
    result: Mapping[str, Any],
    rows: Mapping[str, Sequence[Sequence[Row]]],
    samples: Mapping[str, Predictions],
    noise: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
) -> None:
    """Writes `figures/*.png` and `report.html`; see `all_figures` for the arguments."""
    figures = all_figures(result, rows, samples, noise)
    main = main_of(result["table"])
    words, lines = METRICS[main].words, result["table"][main]
    write_report(
        folder / "report.html",
        title=f"Comparison: {result['config']['data']['name']}, {len(result['seeds'])} seeds",
        verdicts=result["verdicts"],
        lead=result["conclusion"],
        key_numbers={f"{words}, {arm}": line["mean"] for arm, line in lines.items()},
        figures=save_figures(folder / "figures", figures),
        tables=report_tables(result),
        data=result["data"],
        config=result["config"],
        versions=result["versions"] | {"device": result["device"]},
    )
