"""The class query and the keys around it, as in the paper's overview."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.projections.polar import PolarAxes

from rollingq_jax.analysis.plots import style

Array = np.ndarray
_ANCHOR: dict[str, Any] = {"color": style.TURN, "linewidth": 2, "linestyle": (0, (4, 2))}


class PolarPanel(NamedTuple):
    """What one polar plot shows.

    Attributes:
      title: above the plot.
      keys: modality -> mean key of each sample, [N, d] or [N, H, d].
      query: the class query, [d] or [H, d], as the attention uses it (already rotated).
      anchor: the rebalance anchor, [d] or [H, d]: where the rotation sends the query.
    """

    title: str
    keys: Mapping[str, Array]
    query: Array
    anchor: Array | None = None


class PlaneView(NamedTuple):
    """Unit vectors seen in the plane of the query and the difference of two modalities' keys.

    A point is (along, across): along is the cosine to the query, exactly; across is the component
    along the rest of the difference.
    """

    points: dict[str, Array]  # modality -> [N, 2]
    means: dict[str, Array]  # modality -> [2]
    anchor: Array | None  # [2]
    cosines: dict[str, float]  # modality -> its cosine score


def project(keys: Mapping[str, Array], query: Array, anchor: Array | None = None) -> PlaneView:
    """Projects keys {m: [N, d]}, query [d] and anchor [d] on the plane that tells the story.

    With unit vectors k/|k| and q/|q|, and mu_m the mean of a modality's unit keys, the plane is
    spanned by q and mu_a - mu_b, where a and b are the modalities of the highest and the lowest
    cosine score mean_i cos(q, k_i). So the first coordinate of a point is cos(q, k), and the second
    separates the two. Where q and the difference are parallel, or no two modalities have a sample,
    the second axis is any direction.
    """
    query, names = _unit(query), sorted(m for m in keys if len(keys[m]))
    unit = {m: _unit(keys[m]) for m in names}
    mean = {m: unit[m].mean(axis=0) for m in names}
    cosines = {m: float(mean[m] @ query) for m in names}
    across = np.zeros_like(query)
    if names:
        most, least = max(names, key=cosines.__getitem__), min(names, key=cosines.__getitem__)
        # The alphabetically first of the two is on the left, before and after a rotation alike.
        first, second = sorted((most, least))
        across = mean[second] - mean[first]
    across = across - (across @ query) * query
    if np.linalg.norm(across) < 1e-9:
        across = np.eye(len(query))[np.argmin(np.abs(query))]
        across = across - (across @ query) * query
    axes = np.stack([query, _unit(across)], axis=-1)
    return PlaneView(
        {m: unit[m] @ axes for m in names},
        {m: mean[m] @ axes for m in names},
        None if anchor is None else _unit(anchor) @ axes,
        cosines,
    )


def view(
    keys: Mapping[str, Array], query: Array, anchor: Array | None = None, *, head: int | None = None
) -> PlaneView:
    """`project` for arrays that may have a head axis: keys [N, H, d], query and anchor [H, d]."""
    return project(
        {m: _one_head(values, head) for m, values in keys.items()},
        _one_head(query, head, lead=0),
        None if anchor is None else _one_head(anchor, head, lead=0),
    )


def polar_figure(
    keys_before: Mapping[str, Array],
    query_before: Array,
    keys_after: Mapping[str, Array],
    query_after: Array,
    *,
    anchor: Array | None = None,
    head: int | None = None,
    titles: tuple[str, str] = ("before the rotation", "after the rotation"),
) -> Figure:
    """Keys of each modality around the class query, before and after a rotation.

    Args:
      keys_before: modality -> mean key of each sample, [N, d] or [N, H, d].
      query_before: the class query as used then, [d] or [H, d].
      keys_after: as before; the same mapping where only the query changed.
      query_after: as before.
      anchor: [d] or [H, d], drawn in both panels; `query_after` where it is not given.
      head: which head to show of arrays that have them; heads are put side by side as one long
        vector where it is None.
      titles: of the two panels.
    """
    anchor = query_after if anchor is None else anchor
    panels = [
        PolarPanel(titles[0], keys_before, query_before, anchor),
        PolarPanel(titles[1], keys_after, query_after, anchor),
    ]
    return polar_panels(panels, head=head)


def polar_panels(panels: Sequence[PolarPanel], *, head: int | None = None) -> Figure:
    """Any number of `PolarPanel`s, two in a row; `head` as in `polar_figure`."""
    views = [view(panel.keys, panel.query, panel.anchor, head=head) for panel in panels]
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    names = sorted({m for shown in views for m in shown.points})
    entries = 1 if max(map(len, map(style.named, names)), default=0) > 14 else 2  # in a line
    figure = style.new_figure(4.5 * columns, (5.1 + 0.22 * -(-len(names) // entries)) * rows + 0.9)
    figure.set_layout_engine("constrained", wspace=0.08, h_pad=0.12)  # room for angles
    plots = style.panels(figure, len(panels), columns, subplot_kw={"projection": "polar"})
    for panel, shown, axes in zip(panels, views, plots, strict=True):
        _draw(axes, shown, names, panel.title)
        if shown.points:
            place: dict[str, Any] = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.1)}
            sizes: dict[str, Any] = {"fontsize": 10, "title_fontsize": 10, "handlelength": 2.2}
            axes.legend(title="cosine score", ncols=entries, frameon=False, **place, **sizes)
    which = "" if head is None else f" (head {head})"
    style.heading(
        figure,
        f"Mean keys of the samples around the class query{which}: unit vectors, projected on one\n"
        "plane that contains the query; large: their means. The height is the cosine to the query.",
    )
    lines = {"class query": Line2D([], [], color=style.INK, linewidth=2)}
    if any(shown.anchor is not None for shown in views):
        lines["rebalance anchor"] = Line2D([], [], **_ANCHOR)
    style.legend_below(figure, list(lines.values()), list(lines))
    figure.draw_without_rendering()  # the layout of round axes needs a second pass, in saving
    return figure


def _draw(axes: PolarAxes, shown: PlaneView, names: Sequence[str], title: str) -> None:
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    style.style_axes(axes)
    for i, name in enumerate(names):
        if name not in shown.points:
            continue
        color, marker = style.color(i), style.MARKERS[i % len(style.MARKERS)]
        theta, radius = _to_polar(shown.points[name])
        style.scatter(axes, theta, radius, s=9, color=color, marker=marker)
        theta, radius = _to_polar(shown.means[name])
        axes.plot([theta, theta], [0, radius], color=color, linewidth=2.2, solid_capstyle="butt")
        axes.plot(
            [theta], [radius], color=color, marker=marker, markersize=9, linestyle="none",
            markeredgecolor="white", markeredgewidth=1.2,
            label=f"{style.named(name)} {style.signed(shown.cosines[name])}",
        )  # fmt: skip
    if shown.anchor is not None:
        theta, _ = _to_polar(shown.anchor)
        axes.plot([theta, theta], [0, 1], **_ANCHOR)
        axes.plot([theta], [1], color=style.TURN, marker="*", markersize=13, linestyle="none",
                  clip_on=False, zorder=5)  # fmt: skip
    axes.annotate(
        "", (0, 1), (0, 0), zorder=4,
        arrowprops={"arrowstyle": "-|>", "color": style.INK, "linewidth": 2, "shrinkA": 0,
                    "shrinkB": 0},
    )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_yticks([0.25, 0.5, 0.75, 1.0], [])
    axes.set_xticks(np.deg2rad(np.arange(0, 360, 45)))
    axes.set_xticklabels(["0°", "45°", "90°", "135°", "180°", "−135°", "−90°", "−45°"])
    axes.spines["polar"].set_color(style.MUTED)
    axes.set_title(title, fontsize=11.5, color=style.INK, y=1.1)  # over the angle


def _to_polar(points: Array) -> tuple[Any, Any]:
    """Points [..., 2] of (along, across) as angle from the query and length."""
    return np.arctan2(points[..., 1], points[..., 0]), np.linalg.norm(points, axis=-1)


def _one_head(array: Array, head: int | None, lead: int = 1) -> Array:
    """[.., H, d] to [.., d] of one head, or [.., H * d]; arrays without a head axis stay."""
    array = np.asarray(array, np.float64)
    if array.ndim == lead + 1:
        return array
    return array.reshape(*array.shape[:lead], -1) if head is None else array[..., head, :]


def _unit(vectors: Array) -> Array:
    """Vectors [..., d] of length 1; zero stays zero."""
    vectors = np.asarray(vectors, np.float64)
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return vectors / np.where(norm > 1e-12, norm, 1.0)
