"""Attention drawn over what it looks at: from a token's weight to the place it was cut from."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from rollingq_jax.analysis.plots import style
from rollingq_jax.models.spec import PATCH_AXES, RESNET, token_grid

Array = np.ndarray
_HEAT = "viridis"
_BARS = ("sequence", "vector")  # kinds whose weights have no place in an image
_VIEWS_IN_A_LINE = 3  # of one example; more are set in further lines
_WORD, _NUMBER = 9.0, 7.0  # sizes of a word and of the weight under it, in points
_GAP, _LINE = 4.0, 2.9 * _WORD
_ADVANCE = 0.6021  # of a character of the monospaced font that comes with matplotlib, in its size


class ModalityView(NamedTuple):
    """One modality of an example and the attention its tokens get.

    Attributes:
      name: the modality.
      kind: "image", "spectrogram", "video", "sequence", "tokens", "vector" or "resnet18".
      values: the input as the model gets it, without a batch axis.
      weights: [L_m] attention weights, the modality's class token first.
      patch: the patch size of a patched kind.
      pieces: of tokens, the text that each adds, white space included; empty where that is not
        known, and the ids are shown.
    """

    name: str
    kind: str
    values: Array
    weights: Array
    patch: tuple[int, ...] | None = None
    pieces: tuple[str, ...] = ()


class AttentionExample(NamedTuple):
    """An example with its caption (class, prediction, noise) and its modalities."""

    caption: str
    views: tuple[ModalityView, ...]


def attention_figure(examples: Sequence[AttentionExample]) -> Figure:
    """Attention of the class token over the input of chosen examples, up to three views a line.

    Two pictures for each modality: the input, and the input under its token weights; of tokens one,
    in which each word stands on the color of its weight, with the number below. A weight is shown
    as a multiple of the even one, 1 / (real tokens of all modalities); the fusion class token is
    left out, and the modality's class token, which belongs to no place, is in the share above the
    picture but not in the picture.
    """
    views = examples[0].views
    lines = -(-len(views) // _VIEWS_IN_A_LINE)
    in_a_line = [views[i::_VIEWS_IN_A_LINE] for i in range(min(len(views), _VIEWS_IN_A_LINE))]
    ratios = [max(map(_aspect, column)) for column in in_a_line for _ in range(2)]
    width = min(1.6 * sum(ratios), 9.5)
    height = (width / sum(ratios) + 0.3) * lines * len(examples) + 0.4
    figure = style.new_figure(width + 1.9, height)
    grid = figure.add_gridspec(len(examples) * lines, len(ratios), width_ratios=ratios)
    relative = [_relative_weights(example) for example in examples]
    places = np.concatenate([weights[1:] for row in relative for weights in row])
    # One scale for all, so that examples compare; a few weights above it would darken all others.
    norm = Normalize(0, max(2.0, float(np.quantile(places, 0.98))))
    texts: list[tuple[Axes, list[tuple[str, float]]]] = []
    for row, (example, weights) in enumerate(zip(examples, relative, strict=True)):
        total = sum(float(np.sum(view.weights)) for view in example.views)
        for number, view in enumerate(example.views):
            line, column = divmod(number, _VIEWS_IN_A_LINE)
            line, column = row * lines + line, 2 * column
            share = float(np.sum(view.weights)) / total if total else math.nan
            titles = style.named(view.name), f"share {style.signed(share)}"
            if view.kind == "tokens":
                axes = [figure.add_subplot(grid[line, column : column + 2])]
                axes[0].set_title(", ".join(titles), fontsize=9.5, pad=4)
                ids = np.asarray(view.values)
                texts.append((axes[0], weighted_words(ids, weights[number][1:], view.pieces)))
            else:
                axes = [figure.add_subplot(grid[line, column + i]) for i in range(2)]
                _draw_input(axes[0], view)
                _draw_weights(axes[1], view, weights[number], norm)
                for one, title in zip(axes, titles, strict=True):
                    if view.kind not in _BARS:
                        one.set_box_aspect(1 / _aspect(view))
                    one.set_title(title, fontsize=9.5, pad=4)
            for one in axes:
                one.set_xticks([])
                one.set_yticks([])
            if number == 0:
                caption = style.plain(example.caption)
                look: dict[str, Any] = {"rotation": 0, "ha": "right", "va": "center"}
                axes[0].set_ylabel(caption, fontsize=9.5, labelpad=8, **look)
    style.heading(figure, "Attention of the class token over the inputs")
    bar = figure.colorbar(
        ScalarMappable(norm, _HEAT), ax=figure.axes, shrink=0.7, aspect=30, pad=0.015, extend="max"
    )
    bar.set_label("weight of a token (1 = even)", fontsize=9.5)
    bar.ax.tick_params(labelsize=9)
    bar.outline.set_visible(False)
    if texts:
        figure.draw_without_rendering()  # lines are broken where the panels have their final width
        for panel, words in texts:
            _draw_words(panel, words, norm)
    return figure


def _relative_weights(example: AttentionExample) -> list[Array]:
    """Weights of each view as multiples of the even weight over all modalities' real tokens."""
    total = sum(float(np.sum(view.weights)) for view in example.views)
    count = sum(np.count_nonzero(view.weights) for view in example.views)  # padding has 0 exactly
    return [
        np.asarray(view.weights, np.float64) * count / max(total, 1e-12) for view in example.views
    ]


def weighted_words(
    ids: Array, weights: Array, pieces: Sequence[str] = ()
) -> list[tuple[str, float]]:
    """The words of a text in their order, each with the mean weight of its tokens.

    Args:
      ids: [L]; 0 pads and is left out.
      weights: [L].
      pieces: the text that each token adds, [L]; one of several may hold all of a character. Where
        it is empty each id is a word.
    """
    real = np.flatnonzero(ids).tolist()
    texts = [pieces[i] if pieces else f"{ids[i]} " for i in real]
    owner = np.repeat(np.arange(len(real)), [len(text) for text in texts])
    words = []
    for word in re.finditer(r"\S+", "".join(texts)):
        first, last = owner[word.start()], owner[word.end() - 1]
        if word.start():  # tokens that add nothing yet belong to what they begin
            first = min(first, owner[word.start() - 1] + 1)
        words.append((word[0], float(np.mean(weights[real[first : last + 1]]))))
    return words


def _draw_words(axes: Axes, words: Sequence[tuple[str, float]], norm: Normalize) -> None:
    """Sets words in lines, each on the color of its weight with the number below."""
    box = axes.get_window_extent()
    scale = 72 / axes.figure.dpi
    width, height = box.width * scale, box.height * scale
    axes.set(xlim=(0, width), ylim=(height, 0))  # in points, from the upper left
    most = int((width - 2 * _GAP) / (_ADVANCE * _WORD))
    x, y, colors = _GAP, _GAP, colormaps[_HEAT]
    for number, (word, weight) in enumerate(words):
        text, value = style.shorten(word, most), style.signed(weight, ".1f")
        wide = max(_ADVANCE * _WORD * (len(text) + 1), _ADVANCE * _NUMBER * len(value))
        if x > _GAP and x + wide + _GAP > width:
            x, y = _GAP, y + _LINE
        more = f"and {len(words) - number} more"
        full = y + 2 * _LINE > height  # the last line keeps room to say what is left out
        room = width - _ADVANCE * _WORD * (len(more) + 1) - _GAP
        if y + _LINE > height or (full and number + 1 < len(words) and x + wide > room):
            axes.text(x, y + 1, more, fontsize=_WORD, va="top", color=style.MUTED, in_layout=False)
            return
        color = colors(norm(weight))
        light = np.dot(color[:3], (0.299, 0.587, 0.114)) > 0.5
        axes.add_patch(Rectangle((x, y), wide - 1, _WORD * 1.45, color=color, linewidth=0))
        axes.text(
            x + (wide - 1) / 2, y + 0.72 * _WORD, style.plain(text), fontsize=_WORD,
            family="monospace", ha="center", va="center", in_layout=False,
            color=style.INK if light else "white",
        )  # fmt: skip
        axes.text(
            x + (wide - 1) / 2, y + _WORD * 1.45 + 1, value, fontsize=_NUMBER, ha="center",
            va="top", color=style.MUTED, in_layout=False,
        )  # fmt: skip
        x += wide + _GAP


def _draw_input(axes: Axes, view: ModalityView) -> None:
    if view.kind == "vector":
        values = np.nan_to_num(np.asarray(view.values, np.float64))
        axes.bar(np.arange(len(values)), values, color=style.MUTED, width=1.0)
        return
    axes.imshow(_picture(view), cmap="gray", **_placing(view))


def _draw_weights(axes: Axes, view: ModalityView, weights: Array, norm: Normalize) -> None:
    heat = weights_on_input(weights[1:], view.kind, np.shape(view.values), view.patch)
    if view.kind in _BARS:
        colors = ScalarMappable(norm, _HEAT).to_rgba(heat)
        axes.bar(np.arange(len(heat)), heat, color=colors, width=1.0)
        axes.set_ylim(0, max(float(norm.vmax or 0), float(np.nanmax(heat))))
        return
    # The input in low contrast: it shows through, and colors still match the bar.
    faint = 0.25 + 0.5 * _picture(view)
    axes.imshow(faint, cmap="gray", vmin=0, vmax=1, **_placing(view))
    heat = _tile(heat) if heat.ndim == 3 else heat
    axes.imshow(heat, cmap=_HEAT, norm=norm, alpha=0.75, **_placing(view))


def _placing(view: ModalityView) -> dict:
    # "auto": the axes have the input's aspect. Of a spectrogram low frequencies are at the bottom.
    origin = "lower" if view.kind == "spectrogram" else "upper"
    return {"origin": origin, "aspect": "auto", "interpolation": "nearest"}


def _picture(view: ModalityView) -> Array:
    """The input as an image: grey [rows, columns] or RGB [rows, columns, 3], from 0 to 1."""
    values = np.asarray(view.values, np.float64)
    if view.kind == "sequence":
        values = values.T[..., None]
    elif values.ndim == 4:
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
    ratio = 1.3
    if len(shape) > 2:  # frames stand side by side
        *frames, height, width = shape[:-1]
        ratio = math.prod(frames) * width / height
    return float(np.clip(ratio, 0.7, 2.2))


def num_tokens(kind: str, shape: Sequence[int], patch: Sequence[int] | None = None) -> int:
    """Tokens of a modality in the fusion, its own class token included."""
    return 1 + int(np.prod(token_grid(kind, shape, patch)))


def split_attention(attention: Array, lengths: Mapping[str, int]) -> dict[str, Array]:
    """Attention [..., L] by modality: [..., L_m] each, its class token first.

    The first weight belongs to the fusion class token and is left out; the modalities follow in
    alphabetical order. Raises ValueError where 1 + sum of lengths is not L.
    """
    attention = np.asarray(attention)
    names = sorted(lengths)
    total = 1 + sum(lengths.values())
    if attention.shape[-1] != total:
        raise ValueError(f"attention has {attention.shape[-1]} weights; lengths ask for {total}")
    ends = np.cumsum([lengths[m] for m in names])
    return dict(zip(names, np.split(attention[..., 1:], ends[:-1], axis=-1), strict=True))


def weights_on_input(
    weights: Array, kind: str, shape: Sequence[int], patch: Sequence[int] | None = None
) -> Array:
    """A weight for each element of the input, from one for each token (without the class token).

    Args:
      weights: [L], numbered row-major over `token_grid`.
      kind, shape, patch: as in `token_grid`.

    Returns:
      [F, T] for a spectrogram (its stored layout), [H, W], [T, H, W], [L], or [1]. Elements that
      no patch covers are NaN.
    """
    grid = token_grid(kind, shape, patch)
    heat = np.asarray(weights, np.float64).reshape(grid)
    if kind == RESNET:
        for axis in (-2, -1):
            size = shape[axis - 1]
            heat = heat.take(np.arange(size) * heat.shape[axis] // size, axis=axis)
        return heat
    if patch is None or not PATCH_AXES[kind]:
        return heat
    sizes = [shape[1], shape[0]] if kind == "spectrogram" else list(shape[: len(grid)])
    for axis, step in enumerate(patch):
        heat = heat.repeat(int(step), axis=axis)
    pad = [(0, int(size) - covered) for size, covered in zip(sizes, heat.shape, strict=True)]
    heat = np.pad(heat, pad, constant_values=np.nan)
    return heat.T if kind == "spectrogram" else heat
