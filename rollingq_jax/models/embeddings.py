"""From one modality's raw array to tokens: patches cut by reshaping, then one matrix product.

Layouts are channels last: spectrogram [B, F, T, C], image [B, H, W, C], video [B, T, H, W, C],
sequence [B, L, D], tokens [B, L] integer ids (0 pads), vector [B, D].
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from rollingq_jax.errors import DataError
from rollingq_jax.models import initializers
from rollingq_jax.models.layers import Dense
from rollingq_jax.models.spec import EncoderSpec

TOKEN_STD = 0.02


def cut_patches(x: Array, patch: tuple[int, ...]) -> Array:
    """Cuts the axes between batch and channel into patches, stride = patch, remainder dropped.

    `[B, N_1, ..., N_n, C] -> [B, L, P]`: L counts the patches and P a patch's values, both in C
    order of the axes (frame, row, column, channel).

    Raises:
      DataError: an axis is shorter than the patch.
    """
    batch_size, *sizes, channels = x.shape
    grid = [size // length for size, length in zip(sizes, patch, strict=True)]
    if 0 in grid:
        raise DataError(f"the input's size is {tuple(sizes)}; allowed: at least one patch {patch}")
    count = len(patch)
    kept = [slice(0, number * length) for number, length in zip(grid, patch, strict=True)]
    x = x[(slice(None), *kept)]
    pairs = [n for pair in zip(grid, patch, strict=True) for n in pair]
    x = x.reshape(batch_size, *pairs, channels)
    order = (0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    return x.transpose(order).reshape(batch_size, math.prod(grid), math.prod(patch) * channels)


def _spectrogram(x: Array, patch: tuple[int, ...]) -> Array:
    """Upstream swaps frequency and time before it cuts; token order and positions follow."""
    return cut_patches(x.swapaxes(1, 2), patch)


class Kind(NamedTuple):
    """The axes behind the batch, and how `(array, patch)` becomes features `[B, L, P]`."""

    axes: tuple[str, ...]
    features: Callable[[Array, Any], Array]


KINDS = {
    "spectrogram": Kind(("frequency", "time", "channel"), _spectrogram),
    "image": Kind(("row", "column", "channel"), cut_patches),
    "video": Kind(("frame", "row", "column", "channel"), cut_patches),
    "sequence": Kind(("position", "feature"), lambda x, patch: x),
    "tokens": Kind(("position",), lambda x, patch: x),
    "vector": Kind(("feature",), lambda x, patch: x[:, None]),
}


def infer_kind(shape: Sequence[int], dtype: Any) -> str:
    """The kind that the shape `[N, ...]` and dtype of a whole array of examples speak for.

    [N, T, H, W, C] video; [N, F, T, 1] spectrogram, unless it is uint8; other [N, H, W, C] image;
    [N, L, D] float sequence; [N, L] integer tokens; [N, D] float vector.

    Raises:
      DataError: neither fits.
    """
    dtype = np.dtype(dtype)
    floating = jnp.issubdtype(dtype, jnp.floating)
    integer = jnp.issubdtype(dtype, jnp.integer)
    axes = len(shape) - 1
    if axes == 4 and (floating or integer):
        return "video"
    if axes == 3 and (floating or integer):
        return "spectrogram" if shape[-1] == 1 and dtype != np.uint8 else "image"
    if axes == 2 and floating:
        return "sequence"
    if axes == 1 and (floating or integer):
        return "vector" if floating else "tokens"
    raise DataError(
        f"an array of shape {tuple(shape)} and dtype {dtype} is of no known kind; allowed: "
        "[N, T, H, W, C], [N, H, W, C], [N, L, D] float, [N, L] integer, [N, D] float"
    )


def read_inputs(batch: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Array]:
    """The modalities' arrays, `[B, ...]` with one B.

    Raises:
      DataError: one is missing or is no array, or their numbers of examples differ.
    """
    inputs = {}
    for name in modalities:
        if name not in batch:
            raise DataError(f"the batch has no {name!r}; it has: {', '.join(sorted(batch))}")
        try:
            inputs[name] = jnp.asarray(batch[name])
        except (TypeError, ValueError) as error:
            line = str(error).splitlines()[0]
            raise DataError(f"{name} is not an array of numbers: {line}") from None
    sizes = {name: x.shape[:1] for name, x in inputs.items()}
    if len(set(sizes.values())) > 1 or () in sizes.values():
        counts = ", ".join(f"{name} {size[0] if size else 'none'}" for name, size in sizes.items())
        raise DataError(f"numbers of examples: {counts}; allowed: one for all modalities")
    return inputs


def check_input(spec: EncoderSpec, x: Array) -> None:
    """Checks rank and dtype of `x` against the kind.

    Raises:
      DataError: they do not fit.
    """
    axes = KINDS[spec.kind].axes
    if spec.kind == "tokens":
        allowed, fits = "integer", jnp.issubdtype(x.dtype, jnp.integer)
    else:
        allowed = "float or uint8"
        fits = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.uint8
    if x.ndim != 1 + len(axes) or not fits:
        raise DataError(
            f"{spec.name} has shape {x.shape} and dtype {x.dtype}; allowed for kind "
            f"{spec.kind!r}: [batch, {', '.join(axes)}], {allowed}"
        )


def normalise(spec: EncoderSpec, x: Array) -> Array:
    """(x / 255 - mean) / std for uint8, a channel at a time; other dtypes pass, in float32.

    Raises:
      DataError: the specification's channels are neither one nor those of `x`.
    """
    if x.dtype != jnp.uint8:
        return x.astype(jnp.float32)
    x = x.astype(jnp.float32) / 255.0
    mean, std = (np.array(v, np.float32) for v in (spec.mean or (0.0,), spec.std or (1.0,)))
    for values in (mean, std):
        if values.size not in (1, x.shape[-1]):
            raise DataError(
                f"{spec.name} has {x.shape[-1]} channels; its mean and std have {values.size}"
            )
    axes = (1,) * (x.ndim - 1) + (-1,)
    return (x - mean.reshape(axes)) / std.reshape(axes)


class Presence(NamedTuple):
    """What of one modality is real in a batch; None where nothing says otherwise.

    Attributes:
      positions: `[B, L]` bool, tokens that are real.
      present: `[B]` bool, examples that have the modality at all.
    """

    positions: Array | None = None
    present: Array | None = None


def read_mask(spec: EncoderSpec, x: Array, mask: Array | None) -> Presence:
    """Presence from a mask `[B, L]` (real positions) or `[B]` (modality present), or from the ids.

    Token ids without a mask of positions are real where they are not 0.

    Raises:
      DataError: the mask is not boolean, or its shape is neither.
    """
    mask = None if mask is None else jnp.asarray(mask)
    if mask is not None and (
        mask.dtype != jnp.bool_ or mask.shape[:1] != x.shape[:1] or mask.ndim > 2
    ):
        raise DataError(
            f"{spec.name}_mask has shape {mask.shape} and dtype {mask.dtype}; allowed: bool, "
            f"[{x.shape[0]}] or [{x.shape[0]}, positions]"
        )
    if mask is not None and mask.ndim == 2:
        return Presence(mask, jnp.any(mask, axis=1))
    if spec.kind == "tokens":
        positions = x != 0 if mask is None else (x != 0) & mask[:, None]
        return Presence(positions, jnp.any(positions, axis=1))
    return Presence(None, mask)


def make_features(spec: EncoderSpec, x: Array, presence: Presence) -> Array:
    """`[B, ...] -> [B, L, P]` float32 (or ids `[B, L]`), zeros where there is nothing real.

    So NaN in place of what is missing reaches neither a value nor a gradient.

    Raises:
      DataError: the mask has another number of positions than there are tokens.
    """
    kind = KINDS[spec.kind]
    if spec.kind == "tokens":
        features = kind.features(x, None)
    else:
        features = kind.features(normalise(spec, x), spec.patch)
    positions, present = presence
    if positions is not None and positions.shape != features.shape[:2]:
        raise DataError(
            f"{spec.name}_mask has shape {positions.shape}; allowed: {features.shape[:2]}, "
            "one value a token"
        )
    if positions is None and present is not None:
        positions = jnp.broadcast_to(present[:, None], features.shape[:2])
    if positions is None or spec.kind == "tokens":
        return features
    return jnp.where(positions[..., None], features, 0.0)


class TokenEmbedding(nn.Module):
    """A learned vector for each token id, N(0, 0.02^2) at first."""

    vocab_size: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        """`[B, L] -> [B, L, width]`; an id outside the vocabulary gives NaN."""
        table = self.param(
            "embedding", initializers.normal(TOKEN_STD), (self.vocab_size, self.width), jnp.float32
        )
        return jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)


def embedding(spec: EncoderSpec, features: Array, dtype: Any, name: str) -> nn.Module:
    """The module that embeds `features`: a table for ids, else a projection `[P, width]`.

    Kernels start as upstream's: Kaiming normal for a spectrogram's patches, PyTorch's uniform
    +-1/sqrt(fan_in) for those of images and videos and for every patch bias. Features that are not
    patches have a linear layer like any other.
    """
    if spec.kind == "tokens":
        assert spec.vocab_size is not None
        return TokenEmbedding(spec.vocab_size, spec.width, dtype, name=name)
    if spec.patch is None:
        return Dense(spec.width, dtype, name=name)
    kernel_init = uniform = initializers.uniform(1.0 / math.sqrt(features.shape[-1]))
    if spec.kind == "spectrogram":
        kernel_init = initializers.kaiming_normal_fan_out(math.prod(spec.patch))
    return Dense(spec.width, dtype, kernel_init, uniform, name=name)
