"""Pictures of one training run: the cycle and its breaking, and accuracy with the probes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rollingq_jax.analysis import curves
from rollingq_jax.analysis.curves import Row
from rollingq_jax.analysis.plots import style

_ROLL_LINE: dict[str, Any] = {"color": style.TURN, "linewidth": 1.6, "alpha": 0.8, "zorder": 1.5}
MANY_ROLLS = 16  # more are drawn faintly, and without their angles


def dynamics_figure(
    rows: Sequence[Row], *, beta: float | None = None, plain: Sequence[Row] = ()
) -> Figure:
    """Attention share of each modality and imbalance over training, rotations marked.

    Args:
      rows: of metrics.jsonl: "train" rows give thin lines, "valid" rows thick ones, "roll" rows
        the vertical lines.
      beta: the threshold above which a head rolls; drawn where given.
      plain: those of the same run without rotations, drawn in broken lines; of its shares only the
        one that ends highest.

    Returns:
      A figure of two panels above each other; each says so if there is nothing to show.
    """
    figure = style.new_figure(8.0, 5.6)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
    names = curves.modalities(rows, "attention_share")
    for i, name in enumerate(names):
        _train_and_valid(top, rows, f"attention_share/{name}", style.plain(name), i)
    if names:
        style.reference_line(top, 1 / len(names), "even\nshare")
        top.set_ylim(-0.02, 1.02)
        _plain_share(top, plain, names)
    else:
        style.empty_note(top, "this fusion has no attention")
    _train_and_valid(bottom, rows, "imbalance", "imbalance", None)
    _plain_curve(bottom, plain, "imbalance", style.INK)
    if not bottom.lines:
        style.empty_note(bottom, "no imbalance was recorded")
    elif beta is not None:
        style.reference_line(bottom, beta, f"β = {beta:g}")
    bottom.set_ylim(bottom=min(0.0, bottom.get_ylim()[0]))
    _mark_rolls(top, bottom, curves.rolls(rows))
    style.style_axes(top, ylabel="attention share\n(sums to 1)")
    style.style_axes(
        bottom, xlabel="training (epochs)", ylabel="imbalance of cosine\nscores (0 to 2)"
    )
    _title_over_legend(
        top, "Attention share and imbalance over training (thick: validation, thin: training)"
    )
    return figure


def accuracy_figure(rows: Sequence[Row], *, chance: float | None = None) -> Figure:
    """Validation accuracy of the model and of each modality's probe, test values at the right.

    Args:
      rows: of metrics.jsonl, splits "valid" and "test".
      chance: accuracy of guessing, drawn as a line where given.
    """
    figure = style.new_figure(8.0, 4.2)
    axes = figure.subplots()
    series: list[tuple[str, str, str, Any, str]] = [
        ("accuracy", "whole model", style.INK, "-", "o")
    ]
    for i, name in enumerate(curves.modalities(rows, "probe_accuracy")):
        label = f"probe on {style.plain(name)} alone"
        series.append(
            (
                f"probe_accuracy/{name}",
                label,
                style.color(i),
                (0, (5, 1.6)),
                style.MARKERS[(i + 1) % len(style.MARKERS)],
            )
        )
    ends = []
    for field, label, colour, dashes, marker in series:
        x, y = curves.curve(rows, "valid", field)
        options: dict[str, Any] = {
            "color": colour,
            "linestyle": dashes,
            "marker": marker,
            "markersize": 4,
        }
        axes.plot(x, 100 * y, label=label, linewidth=2, **options)
        test = curves.curve(rows, "test", field)
        if len(test.y):
            ends.append((100 * test.y[-1], colour, marker))
    if not axes.lines:
        style.empty_note(axes, "no epoch has been evaluated yet")
    if chance is not None:
        style.reference_line(axes, 100 * chance, "chance")
    style.style_axes(axes, xlabel="training (epochs)", ylabel="accuracy (%)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _mark_test_values(axes, ends)
    _title_over_legend(axes, "Accuracy on validation data, and on test data at the end")
    return figure


def _train_and_valid(
    axes: Axes, rows: Sequence[Row], field: str, label: str, index: int | None
) -> None:
    """A thin line for the training rows and a thick one with markers for validation."""
    look = {"color": style.INK, "marker": "o"} if index is None else style.line_style(index)
    train, valid = (curves.curve(rows, split, field) for split in ("train", "valid"))
    if len(train.x):
        axes.plot(train.x, train.y, color=look["color"], alpha=0.35, linewidth=1)
    if len(valid.x):
        axes.plot(valid.x, valid.y, label=label, linewidth=2.2, markersize=4, **look)


def _plain_share(axes: Axes, plain: Sequence[Row], names: Sequence[str]) -> None:
    """The share of the modality that attention without rotations ends up with."""
    ends = {}
    for name in names:
        values = curves.curve(plain, "valid", f"attention_share/{name}").y
        if len(values):
            ends[name] = values[-1]
    if ends:
        favored = max(ends, key=lambda name: ends[name])
        color = style.color(names.index(favored))
        _plain_curve(axes, plain, f"attention_share/{favored}", color)


def _plain_curve(axes: Axes, plain: Sequence[Row], field: str, color: str) -> None:
    """A broken line for the validation rows of the run without rotations, named at its end."""
    curve = curves.curve(plain, "valid", field)
    if not len(curve.x):
        return
    axes.plot(curve.x, curve.y, color=color, linestyle=(0, (4, 2)), linewidth=2)
    axes.annotate(
        "without rotations",
        (curve.x[-1], curve.y[-1]),
        xytext=(0, 6),
        textcoords="offset points",
        ha="right",
        fontsize=9.5,
        color=color,
    )


def _mark_rolls(top: Axes, bottom: Axes, rolls: Sequence[curves.Roll]) -> None:
    many = len(rolls) > MANY_ROLLS
    words = f"{len(rolls)} rotations of the query" if many else "rotation of the query"
    look = _ROLL_LINE | ({"alpha": 0.25, "linewidth": 1} if many else {})
    for axes in (top, bottom):
        for i, roll in enumerate(rolls):
            label = words if i == 0 and axes is top else None
            axes.axvline(roll.epoch, label=label, **look)
    # Angles are written out while they have room.
    left, right = top.get_xlim()
    gaps = np.diff([roll.epoch for roll in rolls] + [right]) / (right - left)
    for roll, gap in zip(rolls, gaps, strict=True):
        if gap > 0.055 and np.isfinite(roll.angle_degrees):
            top.annotate(
                f"{roll.angle_degrees:.0f}°",
                (roll.epoch, 1),
                xycoords=("data", "axes fraction"),
                xytext=(3, -11),
                textcoords="offset points",
                fontsize=9.5,
                color=style.TURN,
            )


def _mark_test_values(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Large hollow markers behind the last epoch, each with its number, numbers kept apart."""
    if not ends:
        return
    left, right = axes.get_xlim()
    at = right + 0.02 * (right - left)
    axes.axvspan(right, right + 0.14 * (right - left), color="#f1f1f1", linewidth=0, zorder=0)
    values = np.array([value for value, _, _ in ends])
    low, high = axes.get_ylim()
    low, high = min(low, values.min()), max(high, values.max())
    texts = _spread(values, 0.062 * (high - low))
    # Room for the numbers where they were pushed beyond the curves' range.
    margin = 0.05 * (high - low)
    low, high = min(low, texts.min() - margin), max(high, texts.max() + margin)
    for (value, colour, marker), text in zip(ends, texts, strict=True):
        axes.plot(
            [at], [value], marker=marker, markersize=9, color=colour, markerfacecolor="none",
            markeredgewidth=2, linestyle="none", clip_on=False,
        )  # fmt: skip
        axes.text(
            at + 0.022 * (right - left), text, f"{value:.1f} %", color=colour, fontsize=10,
            va="center", fontweight="bold",
        )  # fmt: skip
    axes.text(
        right + 0.07 * (right - left), 1.0, "test", transform=axes.get_xaxis_transform(),
        ha="center", va="bottom", fontsize=10, color=style.MUTED,
    )  # fmt: skip
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.set_xlim(left, right + 0.14 * (right - left))
    axes.set_ylim(low, high)


def _spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Positions near the values, in the same order, at least ``gap`` apart."""
    order = np.argsort(values, kind="stable")
    placed = values[order].astype(float)
    for _ in range(50):
        overlap = gap - np.diff(placed)
        if not (overlap > 1e-9).any():
            break
        for i in np.flatnonzero(overlap > 1e-9):
            push = max(gap - (placed[i + 1] - placed[i]), 0) / 2
            placed[i] -= push
            placed[i + 1] += push
    result = np.empty_like(placed)
    result[order] = placed
    return result


def _title_over_legend(axes: Axes, title: str) -> None:
    """Title in a line of its own, the legend below it and above the axes."""
    style.legend(
        axes,
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=4,
        borderaxespad=0.2,
        columnspacing=1.6,
    )
    axes.set_title(title, fontsize=11.5, color=style.INK, loc="left", pad=25)
