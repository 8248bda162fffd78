"""Attention drawn over what it looks at."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from rollingq_jax.analysis import tokens
from rollingq_jax.analysis.plots import style

Array = np.ndarray
_HEAT = "viridis"


class ModalityView(NamedTuple):
    """One modality of an example and the attention its tokens get.

    Attributes:
      name: the modality.
      kind: "image", "spectrogram", "video", "sequence", "tokens" or "vector".
      values: the input as the model gets it, without a batch axis.
      weights: [L_m] attention weights, the modality's class token first.
      patch: the patch size of a patched kind.
    """

    name: str
    kind: str
    values: Array
    weights: Array
    patch: tuple[int, ...] | None = None


class AttentionExample(NamedTuple):
    """An example with its caption (class, prediction, noise) and its modalities."""

    caption: str
    views: tuple[ModalityView, ...]


def attention_figure(examples: Sequence[AttentionExample]) -> Figure:
    """Attention of the class token over the input of chosen examples, a row each.

    Two pictures for each modality: the input, and the input under its token weights. A weight is
    shown as a multiple of the even one, 1 / (number of tokens of all modalities); the fusion class
    token is left out, and the modality's class token, which belongs to no place, is in the share
    above the picture but not in the picture.
    """
    columns = 2 * max(len(example.views) for example in examples)
    ratios = [_aspect(view) for view in examples[0].views for _ in range(2)]
    width = min(1.6 * sum(ratios), 9.5)
    height = (width / sum(ratios) + 0.3) * len(examples) + 0.4
    figure = style.new_figure(width + 1.9, height)
    grid = figure.subplots(len(examples), columns, squeeze=False, width_ratios=ratios)
    relative = [_relative_weights(example) for example in examples]
    places = np.concatenate([weights[1:] for row in relative for weights in row])
    norm = Normalize(0, max(2.0, float(np.quantile(places, 0.98))))
    for row, (example, weights) in enumerate(zip(examples, relative, strict=True)):
        for axes in grid[row]:
            axes.set_xticks([])
            axes.set_yticks([])
        for column, view in enumerate(example.views):
            left, right = grid[row, 2 * column : 2 * column + 2]
            _draw_input(left, view)
            _draw_weights(right, view, weights[column], norm)
            total = sum(float(np.sum(v.weights)) for v in example.views)
            share = float(np.sum(view.weights)) / total if total else math.nan
            for axes in (left, right):
                axes.set_box_aspect(1 / _aspect(view))
            left.set_title(style.plain(view.name), fontsize=9.5, pad=4)
            right.set_title(f"share {style.signed(share)}", fontsize=9.5, pad=4)
        grid[row, 0].set_ylabel(
            style.plain(example.caption),
            fontsize=9.5,
            rotation=0,
            ha="right",
            va="center",
            labelpad=8,
        )
    figure.suptitle(
        "Attention of the class token over the inputs", fontsize=11.5, x=0.01, ha="left"
    )
    bar = figure.colorbar(
        ScalarMappable(norm, _HEAT), ax=grid, shrink=0.7, aspect=30, pad=0.015, extend="max"
    )
    bar.set_label("weight of a token (1 = even)", fontsize=9.5)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    return figure


def _relative_weights(example: AttentionExample) -> list[Array]:
    """Weights of each view as multiples of the even weight over all modalities' tokens."""
    total = sum(float(np.sum(view.weights)) for view in example.views)
    count = sum(len(view.weights) for view in example.views)
    return [
        np.asarray(view.weights, np.float64) * count / max(total, 1e-12) for view in example.views
    ]


def _draw_input(axes: Axes, view: ModalityView) -> None:
    if view.kind in ("tokens", "vector"):
        values = np.nan_to_num(np.asarray(view.values, np.float64))
        axes.bar(np.arange(len(values)), values, color=style.MUTED, width=1.0)
        return
    axes.imshow(_picture(view), cmap="gray", **_placing(view))


def _draw_weights(axes: Axes, view: ModalityView, weights: Array, norm: Normalize) -> None:
    heat = tokens.weights_on_input(weights[1:], view.kind, np.shape(view.values), view.patch)
    if view.kind in ("sequence", "tokens", "vector"):
        colours = ScalarMappable(norm, _HEAT).to_rgba(heat)
        axes.bar(np.arange(len(heat)), heat, color=colours, width=1.0)
        axes.set_ylim(0, max(float(norm.vmax or 0), float(np.nanmax(heat))))
        return
    # The input in low contrast: it shows through, and colours still match the bar.
    faint = 0.25 + 0.5 * _picture(view)
    axes.imshow(faint, cmap="gray", vmin=0, vmax=1, **_placing(view))
    heat = _tile(heat) if view.kind == "video" else heat
    axes.imshow(heat, cmap=_HEAT, norm=norm, alpha=0.75, **_placing(view))


def _placing(view: ModalityView) -> dict:
    if view.kind == "spectrogram":  # low frequencies at the bottom, time from left to right
        return {"origin": "lower", "aspect": "auto", "interpolation": "nearest"}
    if view.kind == "sequence":
        return {"aspect": "auto", "interpolation": "nearest"}
    return {"aspect": "auto", "interpolation": "nearest"}  # the axes have the input's aspect


def _picture(view: ModalityView) -> Array:
    """The input as an image: grey [rows, columns] or RGB [rows, columns, 3], from 0 to 1."""
    values = np.asarray(view.values, np.float64)
    if view.kind == "sequence":
        values = values.T[..., None]
    elif view.kind == "video":
        values = _tile(values)
    values = np.nan_to_num(values)  # what an example lacks may hold anything
    low, high = values.min(), values.max()
    values = (values - low) / (high - low if high > low else 1.0)
    return values if values.shape[-1] == 3 and view.kind != "sequence" else values.mean(axis=-1)


def _tile(frames: Array) -> Array:
    """[T, H, W, ...] as frames side by side, [H, T * W, ...]."""
    return np.concatenate(list(frames), axis=1)


def _aspect(view: ModalityView) -> float:
    """Width over height of a view, kept within what a row can hold."""
    shape = np.shape(view.values)
    ratio = {
        "image": lambda: shape[1] / shape[0],
        "video": lambda: shape[0] * shape[2] / shape[1],
        "spectrogram": lambda: shape[1] / shape[0],
    }.get(view.kind, lambda: 1.3)()
    return float(np.clip(ratio, 0.7, 2.2))
