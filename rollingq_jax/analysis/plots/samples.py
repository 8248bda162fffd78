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
    width = 7.2 if columns == 1 else 4.0 * columns
    figure = style.new_figure(width, 4.1 * -(-len(arms) // columns) + 0.4)
    panels = style.panels(figure, len(arms), columns, sharex=True, sharey=True)
    for i, ((name, (share, quality)), axes) in enumerate(zip(arms.items(), panels, strict=True)):
        shown = sorted(share)[0] if modality is None else modality
        contrast, values = metrics.quality_contrast(quality)[shown], np.asarray(share[shown])
        known = np.isfinite(contrast) & np.isfinite(values)
        _scatter(axes, contrast[known], values[known].astype(np.float64))
        last = (i + 1) % columns == 0 or i + 1 == len(arms)  # in its line
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
            ylabel=f"attention share of\n{label} (0 to 1)" if i % columns == 0 else "",
        )
    style.heading(
        figure,
        "Does attention follow quality? A point is a sample, the line the mean of each tenth",
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
            noised = [point for run in runs for point in run if point["modality"] == name]
            levels = [float(point["level"]) for point in noised]
            _noise_line(grid[0, column], levels, [shown.scale * p[metric] for p in noised], i)
            if with_share:
                shares = [point.get("attention_share", {}).get(name) for point in noised]
                _noise_line(grid[1, column], levels, shares, i)
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
    style.heading(figure, "What noise in one modality does" + _seeds(arms))
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
    style.heading(figure, "Does attention do good or harm?")
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
        style.scatter(axes, true[known, k], found[known, k])
        ends = [f(true[:, k]) for f in (np.min, np.max)]
        axes.plot(ends, ends, color=style.MUTED, linewidth=1)
        title = style.plain(style.shorten(names[k])) if names else f"target {k}" * (count > 1)
        style.style_axes(axes, title=title, xlabel="true value", ylabel="predicted value")
    style.heading(figure, "Predicted and true values, test data")
    return figure


def _scatter(axes: Axes, contrast: Array, share: Array) -> None:
    if not len(contrast):
        style.empty_note(axes, "no example has both")
        return
    style.scatter(axes, contrast, share)
    from scipy import stats  # most of a second: what draws no such figure does without it

    edges = np.unique(np.quantile(contrast, np.linspace(0, 1, 11)))
    if len(edges) > 2:
        means = stats.binned_statistic(contrast, [contrast, share], bins=edges).statistic
        x, y = means[:, np.isfinite(means[0])]
        axes.plot(x, y, color=style.color(1), marker="s", markersize=5, linewidth=2)
    axes.set_ylim(-0.02, 1.02)


def _noise_line(axes: Axes, levels: Sequence[float], values: Sequence[Any], index: int) -> None:
    by_level: dict[float, list[float]] = {}
    for level, value in zip(levels, values, strict=True):
        if is_number(value):
            by_level.setdefault(level, []).append(float(value))
    known = sorted(by_level)
    style.mean_line(axes, known, [by_level[level] for level in known], index, markersize=5)


def _seeds(arms: Mapping[str, Sequence]) -> str:
    count = max((len(runs) for runs in arms.values()), default=0)
    return f": mean of {count} seeds, band ± 1 standard deviation" if count > 1 else ""


def _correlations(contrast: Array, share: Array) -> str:
    r, rho = metrics.pearson(contrast, share), metrics.spearman(contrast, share)
    shown = [style.signed(value, "+.2f") for value in (r, rho)]
    return f"Pearson r = {shown[0]}, Spearman ρ = {shown[1]}"
