"""Pictures of many runs: arms against each other, with bands over seeds."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from rollingq_jax.analysis import curves
from rollingq_jax.analysis.curves import Curve, Row
from rollingq_jax.analysis.plots import style


def arms_figure(
    arms: Mapping[str, Sequence[Sequence[Row]]], *, fields: Mapping[str, str] | None = None
) -> Figure:
    """Validation curves of many arms: mean over seeds, with a band of one standard deviation.

    Args:
      arms: name of the arm -> the rows of each of its runs (one run for each seed).
      fields: field of the rows -> label of its panel. By default the imbalance, and the attention
        share of each modality (of the first alone where there are two: the other is 1 minus it).

    Returns:
      A figure with a panel for each field. Arms without that field (a fusion without attention)
      are left out of the panel, and out of the legend if no panel has them.
    """
    if fields is None:
        fields = _default_fields([row for runs in arms.values() for rows in runs for row in rows])
    columns = min(len(fields), 2)
    lines = -(-len(fields) // columns)
    width = 4.4 * columns + 0.2 if columns > 1 else 6.8  # the title takes that much
    figure = style.new_figure(width, 3.6 * lines + 0.5)
    panels = figure.subplots(lines, columns, squeeze=False).flat
    handles: dict[str, Line2D] = {}  # by the arm's whole name: cut short, two may look alike
    for axes, (field, label) in zip(panels, fields.items(), strict=False):
        for i, (name, runs) in enumerate(arms.items()):
            line = _band(axes, [curves.curve(rows, "valid", field) for rows in runs], i)
            if line is not None:
                handles.setdefault(name, line)
        if not axes.lines:
            style.empty_note(axes, "no arm has this")
        if field.startswith("attention_share/"):
            axes.set_ylim(0, 1)
        elif field == "imbalance":
            axes.set_ylim(bottom=0)
        style.style_axes(axes, xlabel="training (epochs)", ylabel=label)
    for axes in list(panels):
        axes.set_visible(False)
    seeds = sorted({len(runs) for runs in arms.values()})
    count = "–".join(str(n) for n in (seeds[:1] + seeds[-1:] if len(seeds) > 1 else seeds))
    figure.suptitle(
        f"Validation data over training: mean of {count} seeds, band ± 1 standard deviation",
        fontsize=11.5,
        x=0.01,
        ha="left",
    )
    labels = [style.plain(style.shorten(name)) for name in handles]
    style.legend_below(figure, list(handles.values()), labels)
    return figure


def _default_fields(rows: Sequence[Row]) -> dict[str, str]:
    names = curves.modalities(rows, "attention_share")
    shown = names[:1] if len(names) == 2 else names
    fields = {"imbalance": "imbalance of cosine scores (0 to 2)"}
    return fields | {
        f"attention_share/{m}": f"attention share of {style.plain(m)} (0 to 1)" for m in shown
    }


def _band(axes: Axes, series: Sequence[Curve], index: int) -> Line2D | None:
    """Mean line and band over the epochs that every run has; None if there are none."""
    common = set.intersection(*(set(np.round(c.x, 4)) for c in series)) if series else set()
    if not common:
        return None
    x = np.array(sorted(common))
    y = np.stack([c.y[np.isin(np.round(c.x, 4), x)] for c in series])
    look = style.line_style(index)
    every = max(1, len(x) // 8)
    (line,) = axes.plot(x, y.mean(0), linewidth=2, markersize=4.5, markevery=every, **look)
    if len(series) > 1:
        deviation = y.std(0, ddof=1)
        low, high = y.mean(0) - deviation, y.mean(0) + deviation
        axes.fill_between(x, low, high, color=look["color"], alpha=0.16, linewidth=0)
    return line
