"""Training over time: rows of `metrics.jsonl` as curves, pictures of one run and of many.

A row is a dict with at least "step" and "split"; see the fields of the training loop: "accuracy",
"loss", "imbalance", "attention_share/<m>", "probe_accuracy/<m>", and, in rows of split "roll",
"head", "imbalance_before", "imbalance_after", "angle_degrees".
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from rollingq_jax.analysis.plots import style
from rollingq_jax.analysis.plots.style import is_number
from rollingq_jax.analysis.tasks import METRICS

Row = Mapping[str, Any]
_ROLL_LINE: dict[str, Any] = {"color": style.TURN, "linewidth": 1.6, "alpha": 0.8, "zorder": 1.5}
MANY_ROLLS = 16  # more are drawn faintly, and without their angles


class Curve(NamedTuple):
    """A field over training: x [N] in epochs and y [N], float64."""

    x: np.ndarray
    y: np.ndarray


class Roll(NamedTuple):
    """One moment at which at least one head's query was rotated (means over those heads)."""

    epoch: float
    heads: int
    imbalance_before: float
    imbalance_after: float
    angle_degrees: float


def steps_per_epoch(rows: Sequence[Row]) -> float:
    """Steps between validation rows, which are written once an epoch (1 if there are none)."""
    steps = np.unique([row["step"] for row in rows if row["split"] == "valid"])
    steps = steps[steps > 0]
    if len(steps) == 0:
        return 1.0
    return float(np.median(np.diff(steps))) if len(steps) > 1 else float(steps[0])


def curve(rows: Sequence[Row], split: str, field: str) -> Curve:
    """The field over epochs in one split; rows that lack it or hold no number are left out.

    Of several rows of one step the last counts.
    """
    scale = steps_per_epoch(rows)
    points = {
        row["step"]: float(row[field])
        for row in rows
        if row["split"] == split and is_number(row.get(field))
    }
    steps = sorted(points)
    return Curve(np.array(steps, np.float64) / scale, np.array([points[s] for s in steps]))


def rolls(rows: Sequence[Row]) -> list[Roll]:
    """The rotations in order, heads that rolled at the same step taken together."""
    scale = steps_per_epoch(rows)
    by_step: dict[int, list[Row]] = {}
    for row in rows:
        if row["split"] == "roll":
            by_step.setdefault(row["step"], []).append(row)
    fields = ("imbalance_before", "imbalance_after", "angle_degrees")
    return [
        Roll(
            step / scale, len(group), *(_mean(row.get(field) for row in group) for field in fields)
        )
        for step, group in sorted(by_step.items())
    ]


def used_up(rows: Sequence[Row]) -> dict[str, Any] | None:
    """The first epoch at whose end no rotations were left while imbalance stood above beta.

    Returns:
      Its "epoch" and "imbalance", or None where there was no such epoch.
    """
    found = [row for row in rows if row["split"] == "valid" and row.get("rotations_used_up")]
    return {name: found[0][name] for name in ("epoch", "imbalance")} if found else None


def modalities(rows: Sequence[Row], prefix: str) -> list[str]:
    """The names that follow `prefix + "/"` in any row, in alphabetical order."""
    return sorted({k.split("/", 1)[1] for row in rows for k in row if k.startswith(prefix + "/")})


def _mean(values: Any) -> float:
    values = [float(value) for value in values if is_number(value)]
    return float(np.mean(values)) if values else float("nan")


def even_shares(rows: Sequence[Row], names: Sequence[str]) -> dict[str, float]:
    """Each modality's share under uniform attention, from the last validation row.

    Equal shares where the rows do not hold it, as those of earlier versions.
    """
    known = {name: curve(rows, "valid", f"uniform_share/{name}").y for name in names}
    return {name: float(y[-1]) if len(y) else 1 / len(names) for name, y in known.items()}


def dynamics_figure(
    rows: Sequence[Row], *, beta: float | None = None, plain: Sequence[Row] = ()
) -> Figure:
    """Attention share of each modality and imbalance over training, rotations marked.

    The even share is that of uniform attention, a line for each modality where they differ.

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
    names = modalities(rows, "attention_share")
    for i, name in enumerate(names):
        _train_and_valid(top, rows, f"attention_share/{name}", style.named(name), i)
    if names:
        style.even_lines(top, even_shares(rows, names))
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
    _mark_rolls([top, bottom], rolls(rows))  # behind the curves, whose range says what has room
    style.style_axes(top, ylabel="attention share\n(sums to 1)")
    style.style_axes(
        bottom, xlabel="training (epochs)", ylabel="imbalance of cosine\nscores (0 to 2)"
    )
    _title_and_legend(
        top, "Attention share and imbalance over training (thick: validation, thin: training)"
    )
    return figure


def key_gap_figure(rows: Sequence[Row], *, plain: Sequence[Row] = ()) -> Figure:
    """Gap of the modalities' key distributions over training, rotations marked.

    Args:
      rows: of metrics.jsonl; "valid" rows give the line, "roll" rows the vertical lines.
      plain: those of the same run without rotations, drawn in broken lines.
    """
    figure = style.new_figure(8.0, 3.4)
    axes = figure.subplots()
    _train_and_valid(axes, rows, "key_gap", "gap of the keys", None)
    _plain_curve(axes, plain, "key_gap", style.INK)
    if not axes.lines:
        style.empty_note(axes, "no keys were recorded")
    axes.set_ylim(0, 1.2 * axes.get_ylim()[1])  # names of lines have room below the angles
    _mark_rolls([axes], rolls(rows))
    style.style_axes(axes, xlabel="training (epochs)", ylabel="distance of mean keys\n(spreads)")
    _title_and_legend(axes, "Gap between the modalities' key distributions, validation data")
    return figure


def accuracy_figure(
    rows: Sequence[Row],
    *,
    score: str = "accuracy",
    chance: float | None = None,
    majority: float | None = None,
    constant: float | None = None,
) -> Figure:
    """Validation accuracy of the model and of each modality's probe, test values at the right.

    Args:
      rows: of metrics.jsonl, splits "valid" and "test".
      score: in place of the accuracy, a key of `tasks.METRICS`.
      chance: accuracy of guessing, drawn as a line where given.
      majority: accuracy of always naming the most frequent class, likewise.
      constant: error of the best constant, likewise.
    """
    metric = METRICS[score]
    figure = style.new_figure(8.0, 4.2)
    axes = figure.subplots()
    series: dict[str, tuple[str, dict[str, Any]]] = {
        score: ("whole model", {"color": style.INK, "linestyle": "-", "marker": "o"})
    }
    for i, name in enumerate(modalities(rows, f"probe_{score}")):
        marker = style.MARKERS[(i + 1) % len(style.MARKERS)]
        series[f"probe_{score}/{name}"] = (
            f"probe on {style.named(name)} alone",
            {"color": style.color(i), "linestyle": (0, (5, 1.6)), "marker": marker},
        )
    ends = []
    for field, (label, look) in series.items():
        x, y = curve(rows, "valid", field)
        axes.plot(x, metric.scale * y, label=label, linewidth=2, markersize=4, **look)
        test = curve(rows, "test", field).y
        if len(test):
            ends.append((metric.scale * test[-1], look["color"], look["marker"]))
    if not axes.lines:
        style.empty_note(axes, "no epoch has been evaluated yet")
    style.style_axes(axes, xlabel="training (epochs)", ylabel=metric.axis)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    # In this order: the test values widen the range, and whether guesses are near is a part of it.
    _mark_test_values(axes, ends, "{:.1f} %" if metric.percent else "{:.3g}")
    guesses = {"chance": chance, "majority\nclass": majority, "best\nconstant": constant}
    _guesses(axes, guesses, metric.scale)
    _title_and_legend(axes, f"{metric.title} on validation data, and on test data at the end")
    return figure


def arms_figure(
    arms: Mapping[str, Sequence[Sequence[Row]]], *, fields: Mapping[str, str] | None = None
) -> Figure:
    """Validation curves of many arms: mean over seeds, with a band of one standard deviation.

    Args:
      arms: name of the arm -> the rows of each of its runs (one run for each seed).
      fields: field of the rows -> label of its panel. By default the imbalance, the gap of the
        keys where it is recorded, and the attention share of each modality (of the first alone
        where there are two: the other is 1 minus it).

    Returns:
      A figure with a panel for each field. Arms without that field (a fusion without attention)
      are left out of the panel, and out of the legend if no panel has them.
    """
    if fields is None:
        fields = _default_fields([row for runs in arms.values() for rows in runs for row in rows])
    columns = min(len(fields), 2)
    width = 4.4 * columns + 0.2 if columns > 1 else 6.8  # the title takes that much
    figure = style.new_figure(width, 3.6 * -(-len(fields) // columns) + 0.5)
    panels = style.panels(figure, len(fields), columns)
    handles: dict[str, Line2D] = {}  # by the arm's whole name: cut short, two may look alike
    for (field, label), axes in zip(fields.items(), panels, strict=True):
        for i, (name, runs) in enumerate(arms.items()):
            line = _band(axes, [curve(rows, "valid", field) for rows in runs], i)
            if line is not None:
                handles.setdefault(name, line)
        if not axes.lines:
            style.empty_note(axes, "no arm has this")
        if field.startswith("attention_share/"):
            axes.set_ylim(0, 1)
        elif field == "imbalance":
            axes.set_ylim(bottom=0)
        style.style_axes(axes, xlabel="training (epochs)", ylabel=label)
    seeds = sorted({len(runs) for runs in arms.values()})
    count = "–".join(str(n) for n in (seeds[:1] + seeds[-1:] if len(seeds) > 1 else seeds))
    style.heading(
        figure, f"Validation data over training: mean of {count} seeds, band ± 1 standard deviation"
    )
    labels = [style.plain(style.shorten(name)) for name in handles]
    style.legend_below(figure, list(handles.values()), labels)
    return figure


def _default_fields(rows: Sequence[Row]) -> dict[str, str]:
    names = modalities(rows, "attention_share")
    shown = names[:1] if len(names) == 2 else names
    fields = {"imbalance": "imbalance of cosine scores (0 to 2)"}
    if any("key_gap" in row for row in rows):
        fields["key_gap"] = "distance of the modalities'\nmean keys (spreads)"
    return fields | {
        f"attention_share/{m}": f"attention share of\n{style.named(m)} (0 to 1)" for m in shown
    }


def _band(axes: Axes, series: Sequence[Curve], index: int) -> Line2D | None:
    """Mean line and band over the epochs that every run has; None if there are none."""
    common = set.intersection(*(set(np.round(c.x, 4)) for c in series)) if series else set()
    if not common:
        return None
    x = np.array(sorted(common))
    y = np.stack([c.y[np.isin(np.round(c.x, 4), x)] for c in series], axis=1)
    every = max(1, len(x) // 8)
    return style.mean_line(axes, x, y, index, markersize=4.5, markevery=every)


def _train_and_valid(
    axes: Axes, rows: Sequence[Row], field: str, label: str, index: int | None
) -> None:
    """A thin line for the training rows and a thick one with markers for validation."""
    look = {"color": style.INK, "marker": "o"} if index is None else style.line_style(index)
    train, valid = (curve(rows, split, field) for split in ("train", "valid"))
    if len(train.x):
        axes.plot(train.x, train.y, color=look["color"], alpha=0.35, linewidth=1)
    if len(valid.x):
        axes.plot(valid.x, valid.y, label=label, linewidth=2.2, markersize=4, **look)


def _plain_share(axes: Axes, plain: Sequence[Row], names: Sequence[str]) -> None:
    """The share of the modality that attention without rotations ends up with."""
    shares = {name: curve(plain, "valid", f"attention_share/{name}").y for name in names}
    ends = {name: share[-1] for name, share in shares.items() if len(share)}
    if ends:
        favored = max(ends, key=lambda name: ends[name])
        color = style.color(names.index(favored))
        _plain_curve(axes, plain, f"attention_share/{favored}", color)


def _plain_curve(axes: Axes, plain: Sequence[Row], field: str, color: str) -> None:
    """A broken line for the validation rows of the run without rotations, named at its end."""
    points = curve(plain, "valid", field)
    if not len(points.x):
        return
    axes.plot(points.x, points.y, color=color, linestyle=(0, (4, 2)), linewidth=2)
    end = points.x[-1], points.y[-1]
    style.note(axes, "without rotations", end, (0, 6), color, ha="right")


def _mark_rolls(panels: Sequence[Axes], rolls: Sequence[Roll]) -> None:
    """A line in each panel, named in the first; `rolls` with room have their angle above it."""
    top = panels[0]
    many = len(rolls) > MANY_ROLLS
    words = f"{len(rolls)} rotations of the query" if many else "rotation of the query"
    look = _ROLL_LINE | ({"alpha": 0.25, "linewidth": 1} if many else {})
    for axes in panels:
        for i, roll in enumerate(rolls):
            label = words if i == 0 and axes is top else None
            axes.axvline(roll.epoch, label=label, **look)
    if many:
        return
    # Angles are written out while they have room.
    left, right = top.get_xlim()
    gaps = np.diff([roll.epoch for roll in rolls] + [right]) / (right - left)
    for roll, gap in zip(rolls, gaps, strict=True):
        if gap > 0.055 and np.isfinite(roll.angle_degrees):
            # Over the panel, where no curve and no name can be.
            where, angle = {"xycoords": ("data", "axes fraction")}, f"{roll.angle_degrees:.0f}°"
            style.note(top, angle, (roll.epoch, 1), (0, 2), style.TURN, ha="center", **where)


def _mark_test_values(axes: Axes, ends: Sequence[tuple[float, str, str]], form: str) -> None:
    """Large hollow markers behind the last epoch, each with its number, numbers kept apart."""
    if not ends:
        return
    left, right = axes.get_xlim()
    # The strip is a part of the curves' range: the limits are set at the end, when the ticks that
    # belong to it are known.
    at = right + 0.02 * (right - left)
    axes.axvspan(right, right + 0.14 * (right - left), color="#f1f1f1", linewidth=0, zorder=0)
    values = np.array([value for value, _, _ in ends])
    low, high = axes.get_ylim()
    low, high = min(low, values.min()), max(high, values.max())
    texts = _spread(values, 0.062 * (high - low))
    # Room for the numbers where they were pushed beyond the curves' range.
    margin = 0.05 * (high - low)
    low, high = min(low, texts.min() - margin), max(high, texts.max() + margin)
    for (value, color, marker), text in zip(ends, texts, strict=True):
        axes.plot(
            [at], [value], marker=marker, markersize=9, color=color, markerfacecolor="none",
            markeredgewidth=2, linestyle="none", clip_on=False,
        )  # fmt: skip
        axes.text(
            at + 0.022 * (right - left), text, form.format(value), color=color, fontsize=10,
            va="center", fontweight="bold",
        )  # fmt: skip
    axes.text(
        right + 0.07 * (right - left), 1.0, "test", transform=axes.get_xaxis_transform(),
        ha="center", va="bottom", fontsize=10, color=style.MUTED,
    )  # fmt: skip
    axes.set_xticks([tick for tick in axes.get_xticks() if left <= tick <= right])
    axes.set_xlim(left, right + 0.14 * (right - left))
    axes.set_ylim(low, high)


def _guesses(axes: Axes, guesses: Mapping[str, float | None], scale: float) -> None:
    """A line for each score that needs no model; lines too near for two names share one."""
    given = {name: scale * value for name, value in guesses.items() if value is not None}
    for value in given.values():
        style.reference_line(axes, value)
    low, high = axes.get_ylim()
    low, high = min([low, *(v - scale / 50 for v in given.values())]), max([high, *given.values()])
    axes.set_ylim(low, high)
    apart = np.ptp(list(given.values())) > 0.12 * (high - low) if given else False
    named = given if apart else {",\n".join(given): next(iter(given.values()))} if given else {}
    for name, value in named.items():
        style.reference_line(axes, value, name)


def _spread(values: np.ndarray, gap: float) -> np.ndarray:
    """Positions near the values, in the same order, at least `gap` apart."""
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


def _title_and_legend(axes: Axes, title: str) -> None:
    """The title over the figure, and the legend under it in as many rows as it takes."""
    figure = axes.figure.get_figure(root=True)
    assert figure is not None
    style.heading(figure, title, color=style.INK)
    style.legend_below(figure, *axes.get_legend_handles_labels())
