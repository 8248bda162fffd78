"""From a token's attention weight back to the place in the input it was cut from."""

from collections.abc import Mapping, Sequence

import numpy as np

Array = np.ndarray

# Kinds whose tokens are patches, with the number of axes a patch has.
_PATCH_AXES = {"image": 2, "spectrogram": 2, "video": 3}


def token_grid(
    kind: str, shape: Sequence[int], patch: Sequence[int] | None = None
) -> tuple[int, ...]:
    """How many tokens an input gives along each axis, in the order they are numbered (row-major).

    Args:
      kind: "image", "spectrogram", "video", "sequence", "tokens" or "vector".
      shape: of one example: [H, W, C], [F, T, 1], [T, H, W, C], [L, D], [L] or [D].
      patch: (h, w), or (t, h, w) for video; of the other kinds each position is a token.

    Returns:
      (H // h, W // w); for a spectrogram (T // h, F // w), because the model swaps its axes before
      it cuts patches; (T // t, H // h, W // w); (L,); (1,) for a vector. A remainder is dropped.

    Raises:
      ValueError: the kind is unknown, or the patch does not have as many sizes as it needs.
    """
    if kind in ("sequence", "tokens"):
        return (int(shape[0]),)
    if kind == "vector":
        return (1,)
    if kind not in _PATCH_AXES:
        allowed = sorted([*_PATCH_AXES, "sequence", "tokens", "vector"])
        raise ValueError(f"kind: {kind!r}; one of {', '.join(allowed)}")
    axes = _PATCH_AXES[kind]
    if patch is None or len(patch) != axes:
        raise ValueError(f"patch: {patch}; {axes} sizes for kind {kind!r}")
    sizes = [shape[1], shape[0]] if kind == "spectrogram" else list(shape[:axes])
    return tuple(int(size) // int(step) for size, step in zip(sizes, patch, strict=True))


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
    tokens = np.asarray(weights, np.float64).reshape(grid)
    if patch is None or kind not in _PATCH_AXES:
        return tokens
    sizes = [shape[1], shape[0]] if kind == "spectrogram" else list(shape[: len(grid)])
    for axis, step in enumerate(patch):
        tokens = tokens.repeat(int(step), axis=axis)
    pad = [(0, int(size) - covered) for size, covered in zip(sizes, tokens.shape, strict=True)]
    tokens = np.pad(tokens, pad, constant_values=np.nan)
    return tokens.T if kind == "spectrogram" else tokens
