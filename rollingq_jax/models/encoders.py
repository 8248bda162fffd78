"""Encoders: from one modality's raw array to tokens, and the bottleneck between encoders.

Patches are cut by reshaping and embedded by one matrix product; a class token and positions are
added; Transformer blocks follow. As upstream's `models/mbt_backbone.py`, after Dosovitskiy et al.,
"An Image is Worth 16x16 Words" (2021), and Nagrani et al., "Attention Bottlenecks for Multimodal
Fusion" (2021). The final LayerNorm is the classifier's, since bottleneck layers may come before it.

Layouts are channels last: spectrogram [B, F, T, C], image [B, H, W, C], video [B, T, H, W, C],
sequence [B, L, D], tokens [B, L] integer ids (0 pads), vector [B, D].
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from rollingq_jax.errors import DataError
from rollingq_jax.models.layers import AttentionFn, Block, Dense, symmetric_uniform
from rollingq_jax.models.spec import KINDS, PATCH_AXES, RESNET, EncoderSpec
from rollingq_jax.shapes import batch_broadcast, batch_reshape, batch_sharding

TOKEN_STD = 0.02
CLASS_TOKEN_STD = 1e-6
POSITION_STD = 0.02
BOTTLENECK_STD = 0.02
#: What encoders and bottleneck hand on to their blocks.
BLOCK_FIELDS = ("mlp_ratio", "dropout", "gelu", "dtype", "attention_fn")


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
    x = batch_reshape(x, batch_size, *pairs, channels)
    order = (0, *range(1, 2 * count, 2), *range(2, 2 * count + 1, 2), 2 * count + 1)
    x = x.transpose(order)
    return batch_reshape(x, batch_size, math.prod(grid), math.prod(patch) * channels)


def cut_example(kind: str, x: Array, patch: tuple[int, ...] | None) -> Array:
    """What becomes a token each: `[B, ...] -> [B, L, P]`, or `[B, L]` of token ids."""
    if kind == "spectrogram":  # as upstream; the order of tokens and the positions follow
        x = x.swapaxes(1, 2)
    if PATCH_AXES[kind]:
        return cut_patches(x, patch or ())
    return x[:, None] if kind == "vector" else x


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
    kinds = ("image", "video") if spec.kind == RESNET else (spec.kind,)
    layouts = [KINDS[kind] for kind in kinds]
    if spec.kind == "tokens":
        allowed, fits = "integer", jnp.issubdtype(x.dtype, jnp.integer)
    else:
        allowed = "float or uint8"
        fits = jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.uint8
    if x.ndim not in [1 + len(axes) for axes in layouts] or not fits:
        shapes = " or ".join(f"[batch, {', '.join(axes)}]" for axes in layouts)
        raise DataError(
            f"{spec.name} has shape {x.shape} and dtype {x.dtype}; allowed for kind "
            f"{spec.kind!r}: {shapes}, {allowed}"
        )


def normalize_pixels(spec: EncoderSpec, x: Array) -> Array:
    """(x / 255 - mean) / std for uint8, per channel; other dtypes pass, in float32.

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


class ModalityMask(NamedTuple):
    """The real part of one modality in a batch; None where nothing says otherwise.

    Attributes:
      positions: `[B, L]` bool, tokens that are real.
      present: `[B]` bool, examples that have the modality at all.
    """

    positions: Array | None = None
    present: Array | None = None


def read_mask(spec: EncoderSpec, x: Array, mask: Array | None) -> ModalityMask:
    """The real part from a mask `[B, L]` (real positions) or `[B]` (has the modality), or the ids.

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
        return ModalityMask(mask, jnp.any(mask, axis=1))
    if spec.kind == "tokens":
        positions = x != 0 if mask is None else (x != 0) & mask[:, None]
        return ModalityMask(positions, jnp.any(positions, axis=1))
    return ModalityMask(None, mask)


def make_features(spec: EncoderSpec, x: Array, presence: ModalityMask) -> Array:
    """`[B, ...] -> [B, L, P]` float32 (or ids `[B, L]`), zeros where there is nothing real.

    So NaN instead of a missing value reaches neither a value nor a gradient.

    Raises:
      DataError: the mask has another number of positions than there are tokens.
    """
    values = x if spec.kind == "tokens" else normalize_pixels(spec, x)
    features = cut_example(spec.kind, values, spec.patch)
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
        init, shape = nn.initializers.normal(TOKEN_STD), (self.vocab_size, self.width)
        table = self.param("embedding", init, shape, jnp.float32)
        sharding = batch_sharding(ids, ids.ndim + 1)
        if sharding is None:
            return jnp.take(table, ids, axis=0, mode="fill").astype(self.dtype)
        return table.at[ids].get(mode="fill", out_sharding=sharding).astype(self.dtype)


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
        return Dense(spec.width, dtype=dtype, name=name)
    kernel_init = uniform = symmetric_uniform(1.0 / math.sqrt(features.shape[-1]))
    if spec.kind == "spectrogram":
        fan_out = spec.width * math.prod(spec.patch)  # of a convolution, in pixels
        kernel_init = nn.initializers.normal(math.sqrt(2.0 / fan_out))
    return Dense(spec.width, dtype=dtype, kernel_init=kernel_init, bias_init=uniform, name=name)


def with_real(mask: Array | None, count: int) -> Array | None:
    """The mask of tokens before which `count` real ones come: `[B, L] -> [B, count + L]`."""
    if mask is None:
        return None
    real = batch_broadcast(jnp.ones((1, 1), jnp.bool_), (mask.shape[0], count), mask)
    return jnp.concatenate([real, mask], axis=1)


def make_block(module: "Encoder | Bottleneck", num_heads: int, name: str) -> Block:
    """A block of the module that is being applied, with its fields."""
    # Not while parameters are made: under `nn.remat` Flax draws them from other keys.
    remat = module.remat and not module.is_initializing()
    made: type[Block] = nn.remat(Block) if remat else Block
    return made(num_heads, **{field: getattr(module, field) for field in BLOCK_FIELDS}, name=name)


def run_blocks(
    blocks: Sequence[Block],
    x: Array,
    mask: Array | None,
    rng: Array | None,
    example_index: Array,
    *,
    scan: bool = False,
) -> Array:
    """Applies blocks of equal shape one after the other: `[B, L, d] -> [B, L, d]`.

    Args:
      blocks: bound modules, each with its own parameters.
      x: `[B, L, d]`.
      mask: `[B, L]` or None.
      rng: one dropout key, folded with each block's number; None keeps everything.
      example_index: `[B]`.
      scan: stack the blocks' parameters and loop over them, so that one block is compiled.
    """
    if not blocks:
        return x
    rngs = None
    if rng is not None:
        rngs = jax.vmap(functools.partial(jax.random.fold_in, rng))(jnp.arange(len(blocks)))
    if not scan or blocks[0].is_initializing():
        for i, block in enumerate(blocks):
            x = block(x, mask, None if rngs is None else rngs[i], example_index)
        return x
    # `nn.scan` would keep the parameters stacked, and checkpoints would have another layout. Here
    # the stack is a copy, made at run time.
    unbound = blocks[0].clone(parent=None, name=None)

    def step(x: Array, layer: tuple[Any, Array | None]) -> tuple[Any, None]:
        return unbound.apply({"params": layer[0]}, x, mask, layer[1], example_index), None

    params = [block.variables["params"] for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *params)
    return jax.lax.scan(step, x, (stacked, rngs))[0]


class Encoder(nn.Module):
    """Tokens of one modality, its class token first.

    Attributes:
      spec: kind, patch, depth, width and heads.
      dim: d, width of the output; a projection is added where the encoder's own width differs.
      mlp_ratio, dropout, gelu, dtype, attention_fn: see `Block`.
      scan_layers: see `run_blocks`.
      remat: recompute each block in the backward pass.
    """

    spec: EncoderSpec
    dim: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    scan_layers: bool = False
    remat: bool = False

    def _with_class_token(self, tokens: Array) -> Array:
        """[cls, tokens] + position: `[B, L, width] -> [B, 1 + L, width]`."""
        length, width = 1 + tokens.shape[1], tokens.shape[2]
        if self.has_variable("params", "position"):
            learned = jnp.shape(self.get_variable("params", "position"))[0]
            if learned != length:
                raise DataError(
                    f"{self.spec.name} has {length - 1} tokens; allowed: {learned - 1}, the number "
                    "that the parameters' position embedding was made for"
                )
        cls = self.param("cls", nn.initializers.normal(CLASS_TOKEN_STD), (width,), jnp.float32)
        position = self.param(
            "position", nn.initializers.normal(POSITION_STD), (length, width), jnp.float32
        )
        cls = cls.astype(self.dtype)[None, None]
        cls = batch_broadcast(cls, (tokens.shape[0], 1, width), tokens)
        return jnp.concatenate([cls, tokens], axis=1) + position.astype(self.dtype)[None]

    def _check_width(self, features: Array) -> None:
        """The parameters' embedding was made for as many numbers a token."""
        params: Any = self.get_variable("params", "embed", {})
        made_for = jnp.shape(params["kernel"])[0] if "kernel" in params else None
        if made_for not in (None, features.shape[-1]):
            raise DataError(
                f"{self.spec.name} has {features.shape[-1]} numbers a token; allowed: {made_for}, "
                "for which the parameters' embedding was made"
            )

    @nn.compact
    def __call__(
        self,
        x: Array,
        presence: ModalityMask | None = None,
        *,
        train: bool = False,
        example_index: Array | None = None,
    ) -> Array:
        """`[B, ...] -> [B, 1 + L, dim]` in `dtype`.

        Args:
          x: `[B, ...]` in the layout of the kind, float or uint8 (ids: integer).
          presence: the real part of `x`, by default everything. Tokens attend to real positions
            only; an example without the modality still gets tokens, which mean nothing.
          train: whether dropout applies (key "dropout").
          example_index: `[B]` int32, positions in the global batch; default 0, 1, ...

        Raises:
          DataError: `x` or the mask does not fit the kind, or not the parameters.
        """
        check_input(self.spec, x)
        presence = presence or ModalityMask()
        features = make_features(self.spec, x, presence)
        self._check_width(features)
        tokens = embedding(self.spec, features, self.dtype, "embed")(features)
        tokens = self._with_class_token(tokens)
        tokens = run_blocks(
            [make_block(self, self.spec.num_heads, f"block_{i}") for i in range(self.spec.depth)],
            tokens,
            with_real(presence.positions, 1),
            self.make_rng("dropout") if train and self.dropout > 0 else None,
            jnp.arange(x.shape[0]) if example_index is None else example_index,
            scan=self.scan_layers,
        )
        if self.spec.width == self.dim:
            return tokens
        return Dense(self.dim, dtype=self.dtype, name="project")(tokens)


def mean_over_present(copies: list[Array], presences: list[ModalityMask]) -> Array:
    """Mean of one array a modality over the modalities that an example has.

    `M x [B, n, d] -> [B, n, d]`; zeros for an example without any.
    """
    if all(presence.present is None for presence in presences):
        return sum(copies[1:], start=copies[0]) / len(copies)
    everyone = jnp.ones_like(copies[0][:, 0, 0], jnp.bool_)
    has = jnp.stack([everyone if p.present is None else p.present for p in presences])
    has = has[..., None, None]
    count = jnp.maximum(jnp.sum(has, axis=0), 1).astype(copies[0].dtype)
    return jnp.sum(jnp.where(has, jnp.stack(copies), 0.0), axis=0) / count


class Bottleneck(nn.Module):
    """Streams exchange information through a few shared bottleneck tokens b.

    As upstream has it, the tokens are prepended and the layers have one attention head. In each
    layer, for all modalities m at once (a parallel update: all see the same old b),

        [b_m; x_m] <- Block_m([b; x_m]),    b <- mean of b_m over the modalities present.

    Attributes:
      num_layers: layers.
      num_tokens: n, tokens of the bottleneck.
      mlp_ratio, dropout, gelu, dtype, attention_fn: see `Block`.
      remat: recompute each block in the backward pass.
    """

    num_layers: int
    num_tokens: int = 4
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        tokens: Mapping[str, Array],
        presences: Mapping[str, ModalityMask],
        *,
        train: bool = False,
        example_index: Array,
    ) -> dict[str, Array]:
        """`{m: [B, 1 + L_m, d]} -> {m: [B, 1 + L_m, d]}`.

        Args:
          tokens: each modality's, its class token first.
          presences: the real part of each; see `ModalityMask`.
          train: whether dropout applies (key "dropout").
          example_index: `[B]` int32, positions in the global batch.
        """
        modalities = sorted(tokens)
        batch_size, _, width = tokens[modalities[0]].shape
        shared = self.param(
            "tokens", nn.initializers.normal(BOTTLENECK_STD), (self.num_tokens, width), jnp.float32
        )
        shared = batch_broadcast(
            shared.astype(self.dtype)[None],
            (batch_size, self.num_tokens, width),
            tokens[modalities[0]],
        )
        rng = self.make_rng("dropout") if train and self.dropout > 0 else None
        streams = dict(tokens)
        for layer in range(self.num_layers):
            copies = []
            for number, m in enumerate(modalities):
                stream = run_blocks(
                    [make_block(self, 1, f"{m}_block_{layer}")],
                    jnp.concatenate([shared, streams[m]], axis=1),
                    with_real(presences[m].positions, self.num_tokens + 1),
                    None if rng is None else jax.random.fold_in(rng, layer * len(streams) + number),
                    example_index,
                )
                copies.append(stream[:, : self.num_tokens])
                streams[m] = stream[:, self.num_tokens :]
            # After the loop: in a layer all modalities read the same bottleneck tokens.
            shared = mean_over_present(copies, [presences[m] for m in modalities])
        return streams
