"""Pictures of how attention and accuracy answer to noise."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rollingq_jax.analysis import metrics
from rollingq_jax.analysis.plots import style
from rollingq_jax.analysis.plots.style import is_number
from rollingq_jax.analysis.tasks import METRICS

Array = np.ndarray
MOST_TARGETS = 3  # that have a panel
Shares = Mapping[str, Array]


def share_quality_figure(
    arms: Mapping[str, tuple[Shares, Shares]],
    *,
    modality: str | None = None,
    even: Mapping[str, float] | None = None,
) -> Figure:
    """Attention share of a modality against how much better its quality is, a point a sample.

    Args:
      arms: name -> (share {m: [N]}, quality {m: [N]}); a panel each, one arm for a single run
        (its name may be empty). NaN is what an example lacks: it is no point.
      modality: the one to show; the first in alphabetical order by default. With two modalities
        the other is the same picture turned by half.
      even: modality -> its share under uniform attention; equal shares by default.

    Returns:
      A figure whose panels give Pearson's and Spearman's correlation and the mean share of each
      tenth of the samples, from lowest to highest quality.
    """
    columns = min(len(arms), 3)
    rows = -(-len(arms) // columns)
    width = 7.2 if columns == 1 else 4.0 * columns
    figure = style.new_figure(width, 4.1 * rows + 0.4)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    panels = grid.flat
    for (name, (share, quality)), axes in zip(arms.items(), panels, strict=False):
        shown = sorted(share)[0] if modality is None else modality
        contrast, values = metrics.quality_contrast(quality)[shown], np.asarray(share[shown])
        known = np.isfinite(contrast) & np.isfinite(values)
        _scatter(axes, contrast[known], values[known].astype(np.float64))
        last = axes in grid[:, -1] or axes is list(grid.flat)[len(arms) - 1]
        uniform = (even or {}).get(shown, 1 / len(share))
        style.reference_line(axes, uniform, "even\nshare" if last else "")
        label = style.named(shown)
        other = style.named(next(m for m in sorted(share) if m != shown))
        minus = other if len(share) == 2 else "mean of the others"
        heading = _correlations(contrast, share[shown])
        style.style_axes(
            axes,
            title=f"{style.plain(style.shorten(name))}\n{heading}" if name else heading,
            xlabel=f"quality of {label}\nminus that of {minus} (training-set std)",
            ylabel=f"attention share of\n{label} (0 to 1)" if axes in grid[:, 0] else "",
        )
    for axes in list(panels):
        axes.set_visible(False)
    figure.suptitle(
        "Does attention follow quality? A point is a sample, the line the mean of each tenth",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    return figure


def noise_figure(
    arms: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]],
    *,
    metric: str = "accuracy",
    even: Mapping[str, float] | None = None,
) -> Figure:
    """Accuracy, and the noised modality's attention share, while one modality turns to noise.

    Args:
      arms: name -> runs (one for each seed) -> points {"modality", "level", "accuracy",
        "attention_share": {m: mean}} as `probes.corruption_curve` gives them.
      metric: the field of a point for the upper row, a key of `tasks.METRICS`.
      even: modality -> its share under uniform attention; equal shares by default.

    Returns:
      A column for each modality; lines are means over runs, bands one standard deviation. The row
      of shares is left out if no arm has attention.
    """
    shown = METRICS[metric]
    points = [point for runs in arms.values() for run in runs for point in run]
    names = sorted({point["modality"] for point in points})
    with_share = any(point.get("attention_share") for point in points)
    width = min(4.4 * len(names), 11.6)
    figure = style.new_figure(width + 0.2, 3.2 * (1 + with_share) + 0.7)
    grid = figure.subplots(
        1 + with_share, len(names), squeeze=False, sharex="col", sharey="row"
    )  # fmt: skip
    for column, name in enumerate(names):
        label = style.named(name, int(11 * width / len(names)) - 8)
        for i, runs in enumerate(arms.values()):
            _noise_line(grid[0, column], runs, name, i, lambda p: shown.scale * p[metric])
            if with_share:
                share = lambda p, m=name: p.get("attention_share", {}).get(m)  # noqa: E731
                _noise_line(grid[1, column], runs, name, i, share)
        style.style_axes(grid[0, column], title=f"{label} noised")
        style.style_axes(grid[-1, column])
        grid[-1, column].set_xlabel(f"noise in {label}\n(training-set std)", fontsize=10.5)
    grid[0, 0].set_ylabel(shown.axis, fontsize=10.5)
    if with_share:
        grid[1, 0].set_ylabel("attention share of the\nnoised modality (0 to 1)", fontsize=10.5)
        grid[1, 0].set_ylim(0, 1)
        equal = 1 / max(len(point.get("attention_share", {})) for point in points)
        for axes, name in zip(grid[1], names, strict=True):
            uniform = (even or {}).get(name, equal)
            style.reference_line(axes, uniform, "even\nshare" if axes is grid[1, -1] else "")
    figure.suptitle(
        "What noise in one modality does" + _seeds(arms), fontsize=11.5, x=0.01, ha="left"
    )
    labels = [style.plain(style.shorten(name)) for name in arms]
    if any(labels):
        style.legend_below(figure, grid[0, 0].lines, labels)
    return figure


def attention_scale_figure(
    points: Sequence[Mapping[str, Any]], *, metric: str = "accuracy"
) -> Figure:
    """Accuracy, and each modality's attention share, over factors of the trained query.

    Args:
      points: {"scale", "accuracy", "attention_share": {m: mean}}, in the order of their factors, as
        `probes.attention_scale_curve` gives them; factors stand at even distances.
      metric: the field of a point for the upper panel, a key of `tasks.METRICS`.
    """
    shown = METRICS[metric]
    figure = style.new_figure(5.4, 5.0)
    top, bottom = figure.subplots(2, 1, sharex=True)
    places = list(range(len(points)))
    look = {"color": style.INK, "marker": "o", "linewidth": 2}
    top.plot(places, [shown.scale * point[metric] for point in points], **look)
    names = sorted({m for point in points for m in point["attention_share"]})
    for i, name in enumerate(names):
        shares = [point["attention_share"].get(name) for point in points]
        known = [np.nan if share is None else share for share in shares]
        bottom.plot(places, known, label=style.named(name), linewidth=2, **style.line_style(i))
    style.style_axes(top, ylabel=shown.axis)
    style.style_axes(bottom, xlabel="the trained query times", ylabel="attention share")
    bottom.set_ylim(0, 1)
    labels = [f"{p['scale']:g}" for p in points]
    even = {"0": "0\n(even)", "1": "1\n(as trained)"}
    bottom.set_xticks(places, [even.get(label, label) for label in labels])
    style.legend_below(figure, bottom.lines, [str(line.get_label()) for line in bottom.lines])
    figure.suptitle("Does attention do good or harm?", fontsize=11.5, x=0.01, ha="left")
    return figure


def values_figure(predictions: metrics.Predictions, names: Sequence[str] = ()) -> Figure:
    """Predicted against true values, a panel for each target; the line is where both are equal.

    Args:
      predictions: answers of a regression, `[N, K]`.
      names: of the targets; their numbers where there are none.
    """
    true, found = np.asarray(predictions.label, np.float64), predictions.probabilities
    count = min(true.shape[1], MOST_TARGETS)
    figure = style.new_figure(4.6 * count, 4.6)
    for k, axes in enumerate(figure.subplots(1, count, squeeze=False)[0]):
        known = np.isfinite(found[:, k])
        axes.scatter(
            true[known, k], found[known, k], s=12, color=style.color(0), alpha=0.35, linewidths=0,
            rasterized=True,
        )  # fmt: skip
        ends = [f(true[:, k]) for f in (np.min, np.max)]
        axes.plot(ends, ends, color=style.MUTED, linewidth=1)
        title = style.plain(style.shorten(names[k])) if names else f"target {k}" * (count > 1)
        style.style_axes(axes, title=title, xlabel="true value", ylabel="predicted value")
    figure.suptitle("Predicted and true values, test data", fontsize=11.5, x=0.01, ha="left")
    return figure


def _scatter(axes: Axes, contrast: Array, share: Array) -> None:
    if not len(contrast):
        style.empty_note(axes, "no example has both")
        return
    axes.scatter(
        contrast, share, s=12, color=style.color(0), alpha=0.35, linewidths=0, rasterized=True
    )
    edges = np.unique(np.quantile(contrast, np.linspace(0, 1, 11)))
    if len(edges) > 2:
        where = np.clip(np.searchsorted(edges, contrast, side="right") - 1, 0, len(edges) - 2)
        counts = np.bincount(where, minlength=len(edges) - 1)
        keep = counts > 0
        x, y = (
            np.bincount(where, v, len(edges) - 1)[keep] / counts[keep] for v in (contrast, share)
        )
        axes.plot(x, y, color=style.color(1), marker="s", markersize=5, linewidth=2)
    axes.set_ylim(-0.02, 1.02)


def _noise_line(axes: Axes, runs: Sequence, modality: str, index: int, value: Any) -> None:
    by_level: dict[float, list[float]] = {}
    for run in runs:
        for point in run:
            if point["modality"] == modality and is_number(value(point)):
                by_level.setdefault(float(point["level"]), []).append(float(value(point)))
    levels = sorted(by_level)
    mean = np.array([np.mean(by_level[level]) for level in levels])
    look = style.line_style(index)
    axes.plot(levels, mean, linewidth=2, markersize=5, **look)
    if levels and min(len(by_level[level]) for level in levels) > 1:
        deviation = np.array([np.std(by_level[level], ddof=1) for level in levels])
        axes.fill_between(
            levels, mean - deviation, mean + deviation, color=look["color"], alpha=0.16, linewidth=0
        )


def _seeds(arms: Mapping[str, Sequence]) -> str:
    count = max((len(runs) for runs in arms.values()), default=0)
    return f": mean of {count} seeds, band ± 1 standard deviation" if count > 1 else ""


def _correlations(contrast: Array, share: Array) -> str:
    r, rho = metrics.pearson(contrast, share), metrics.spearman(contrast, share)
    shown = [style.signed(value, "+.2f") for value in (r, rho)]
    return f"Pearson r = {shown[0]}, Spearman ρ = {shown[1]}"
