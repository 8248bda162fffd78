"""The parts of a pre-norm Transformer: projections, attention, normalization, dropout, the block.

Parameters are float32 and start as upstream's do: JAX's own `glorot_normal` and `he_normal`
truncate the normal distribution, PyTorch's do not. Projections compute in `dtype` on a `[B * L, d]`
view: XLA on CPU takes twice the time for weight gradients contracted over two batch axes, and on
other devices it is the same program. Statistics of a normalization are float32.

Self-attention is one function, injected, with an implementation for each backend. Each takes
queries, keys and values `[B, L, H, d_h]` and a mask `[B, L]`, True where a token is real, or None,
and returns softmax(Q K^T / sqrt(d_h)) V as `[B, L, H, d_h]` in the values' dtype, the softmax taken
in float32. A sample needs at least one real token: the encoder's class token always is. Outputs at
positions that are not real mean nothing.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jax.sharding import PartitionSpec

from rollingq_jax.attention import drop
from rollingq_jax.shapes import batch_broadcast, batch_reshape, batch_sharding

Initializer = Callable[[Array, Sequence[int], Any], Array]
AttentionFn = Callable[[Array, Array, Array, Array | None], Array]

LAYER_NORM_EPSILON = 1e-6
#: From this length on, L x L matrices kept for the backward pass cost more on CPU than a loop.
LONG_ON_CPU = 128
#: From this length on, padding to whole blocks is a small part of flash attention's work on TPU.
LONG_ON_TPU = 1024
_TPU_LANES = 128
_TPU_BLOCK = 512  # the largest; two of its tiles in float32 are a small part of a core's memory
_CUDNN_HEAD_DIM = 128
_CUDNN_CAPABILITY = 8  # Ampere


def xavier_normal(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """N(0, 2 / (fan_in + fan_out)) for a kernel `[fan_in, ...]`, the other axes being fan_out.

    `variance_scaling` takes the square root in float32, which for some shapes is another last bit.
    """
    std = math.sqrt(2.0 / (shape[0] + math.prod(shape[1:])))
    return nn.initializers.normal(std)(rng, tuple(shape), dtype)


def symmetric_uniform(bound: float) -> Initializer:
    """U(-bound, bound). PyTorch's default for a kernel and its bias: bound = 1 / sqrt(fan_in)."""

    def init(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)

    return init


def example_keys(rng: Array, example_index: Array) -> Array:
    """One key per example, from its position in the global batch: `[], [B] -> [B]`.

    Randomness then does not depend on how a batch is laid out over devices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, example_index)


def dropout(rng: Array | None, x: Array, rate: float, example_index: Array) -> Array:
    """Inverted dropout of `x` `[B, ...]` with one key per example; none where `rng` is None.

    Raises:
      UserError: the rate is not in [0, 1).
    """
    if rng is None or rate == 0.0:
        return x
    example_index = batch_broadcast(example_index, x.shape[:1], x)
    return drop(x, rate, example_keys(rng, example_index))


def _scores(logits: Array, head_dim: int, mask: Array | None) -> Array:
    """softmax(logits / sqrt(d_h)) over the last axis in float32, 0 where `mask` is False."""
    logits = logits * head_dim**-0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def on_each_device(
    function: Callable[..., Array], batched: tuple[Array, *tuple[Array | None, ...]], *whole: Array
) -> Array:
    """`function(*batched, *whole)`, on each device's samples if the batch is on an explicit axis.

    For loops over samples and a backend's kernels, which the partitioner could not split, and for
    convolutions, of whose result and gradients JAX would ask for the layout.

    Args:
      function: of arrays; its result has the batch first.
      batched: arrays `[B, ...]`; None in place of any but the first.
      *whole: arrays that every device has.
    """
    sharding = batch_sharding(batched[0], 1)
    if sharding is None:
        return function(*batched, *whole)
    return jax.shard_map(
        function,
        mesh=sharding.mesh,
        in_specs=(*[sharding.spec] * len(batched), *[PartitionSpec()] * len(whole)),
        out_specs=sharding.spec,
        check_vma=False,
    )(*batched, *whole)


def dense_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """The reference form, all samples and heads at once. Arguments as this module says."""
    logits = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32)
    weights = _scores(logits, q.shape[-1], None if mask is None else mask[:, None, None])
    return jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v)


def mapped_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """One sample's head after the other, its L x L matrix recomputed in the backward pass.

    For CPU: the matrix stays in the cache, memory grows with L instead of L^2 H B, and the loop's
    body is plain matrix products. Arguments as this module says.
    """
    batch_size, length, num_heads, head_dim = q.shape

    def by_head(x: Array) -> Array:
        return x.swapaxes(1, 2).reshape(batch_size * num_heads, length, head_dim)

    @jax.checkpoint
    def one_head(inputs: tuple[Array, ...]) -> Array:
        q, k, v, *real = inputs
        logits = jnp.matmul(q, k.T, preferred_element_type=jnp.float32)
        weights = _scores(logits, head_dim, real[0][None] if real else None)
        return jnp.matmul(weights.astype(v.dtype), v)

    inputs: tuple[Array, ...] = (by_head(q), by_head(k), by_head(v))
    if mask is not None:
        inputs += (jnp.repeat(mask, num_heads, axis=0),)
    out = jax.lax.map(one_head, inputs)
    return out.reshape(batch_size, num_heads, length, head_dim).swapaxes(1, 2)


def _cudnn_applies(q: Array, mask: Array | None) -> bool:
    if jax.default_backend() != "gpu":
        return False
    capability = str(getattr(jax.devices()[0], "compute_capability", "")).partition(".")[0]
    return (
        capability.isdigit()  # names of AMD's devices are not numbers
        and int(capability) >= _CUDNN_CAPABILITY
        and q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[-1] % 8 == 0
        and q.shape[-1] <= _CUDNN_HEAD_DIM
        and (mask is None or q.shape[1] % 2 == 0)
    )


def fused_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """cuDNN's flash attention where it applies, else the reference form, which XLA fuses.

    cuDNN takes 16-bit floats, head widths that are multiples of 8 up to 128, and under a mask even
    lengths only. Arguments as this module says.
    """
    if not _cudnn_applies(q, mask):
        return dense_attention(q, k, v, mask)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code relies on it
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None, None], implementation="cudnn"
        )


def tpu_flash_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """JAX's flash attention for TPUs (Pallas), on a sequence padded to whole blocks.

    No L x L matrix exists. Positions that are padded or not real make a segment of their own. The
    textbook form where the kernel does not apply: d_h above 128 that is no multiple of it.
    Arguments as this module says.
    """
    if q.shape[-1] > _TPU_LANES and q.shape[-1] % _TPU_LANES:
        return dense_attention(q, k, v, mask)
    from jax.experimental.pallas.ops.tpu import flash_attention as flash

    batch_size, length, _, head_dim = q.shape
    # Multiples of 128, as equal as they can be: a last block of padding alone would cost as much.
    number = math.ceil(length / _TPU_BLOCK)
    block = _TPU_LANES * math.ceil(length / number / _TPU_LANES)
    padding = -length % block
    real = jnp.ones((batch_size, length), jnp.bool_) if mask is None else mask
    segments = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, padding)))

    def by_head(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    sizes = {field.name: block for field in dataclasses.fields(flash.BlockSizes)} | {"block_b": 1}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = flash.flash_attention(
            by_head(q),
            by_head(k),
            by_head(v),
            segment_ids=flash.SegmentIds(segments, segments),
            sm_scale=head_dim**-0.5,
            block_sizes=flash.BlockSizes(**sizes),
        )
    return out[:, :, :length].swapaxes(1, 2)


def default_attention(length: int, backend: str | None = None) -> AttentionFn:
    """The function for sequences of `length` on `backend` (None: the one JAX runs on).

    A program that is exported for another platform should be given its function instead.
    """
    backend = backend or jax.default_backend()
    if backend == "cpu":
        return mapped_attention if length >= LONG_ON_CPU else dense_attention
    if backend == "tpu" and length >= LONG_ON_TPU:
        return tpu_flash_attention
    return fused_attention


class Dense(nn.Dense):
    """x W + b in `dtype`: `[..., d] -> [..., features]`, with W `kernel` and b `bias`."""

    dtype: Any = jnp.float32
    kernel_init: Initializer = xavier_normal

    def __call__(self, x: Array) -> Array:
        """Applies the projection on the `[N, d]` view, weight and bias gradients included."""
        rows = super().__call__(batch_reshape(x, -1, x.shape[-1]))
        return batch_reshape(rows, *x.shape[:-1], self.features)


class Projection(nn.Module):
    """Parameters of a projection to `shape`, for functions that use them folded."""

    shape: tuple[int, ...]

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        """Kernel `[width, *shape]` and bias `shape`, float32."""
        kernel = self.param("kernel", xavier_normal, (width, *self.shape), jnp.float32)
        return kernel, self.param("bias", nn.initializers.zeros, self.shape, jnp.float32)


def project(x: Array, kernel: Array, bias: Array, dtype: Any) -> Array:
    """x W + b in `dtype`, with the parameters of a `Projection`: `[B, L, d] -> [B, L, *shape]`."""
    rows = batch_reshape(x, -1, x.shape[-1]).astype(dtype)
    made = rows @ kernel.reshape(x.shape[-1], -1).astype(dtype)
    made = made + bias.reshape(1, -1).astype(dtype)
    return batch_reshape(made, *x.shape[:2], *bias.shape)


def gelu_exact(x: Array) -> Array:
    """x (1 + erf(x / sqrt 2)) / 2, which XLA computes faster than `jax.nn.gelu`'s erfc form."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


# Upstream's blocks have a GELU, those of other fusion models a ReLU.
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "exact": gelu_exact,
    "tanh": jax.nn.gelu,
    "relu": jax.nn.relu,
}


@jax.checkpoint
def _layer_norm(rows: Array, scale: Array, bias: Array) -> Array:
    """LayerNorm of `[N, d]`, float32. Intermediates are computed again for the gradient.

    XLA would keep them in several arrays of the rows' size; to compute them again takes no longer.
    """
    centered = rows - jnp.mean(rows, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centered), axis=-1, keepdims=True)
    return centered * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale[None] + bias[None]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-6) * scale + bias over the last axis, in float32.

    `nn.LayerNorm` raises in bfloat16 under strict dtype promotion, which the tests run with.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d] -> [..., d]` in `dtype`."""
        width = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, width, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, width, jnp.float32)
        rows = batch_reshape(x, -1, x.shape[-1]).astype(jnp.float32)
        return batch_reshape(_layer_norm(rows, scale, bias), *x.shape).astype(self.dtype)


class SelfAttention(nn.Module):
    """softmax(Q K^T / sqrt(d_h)) V W_o + b_o, with Q, K and V from one projection `qkv`."""

    num_heads: int
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None

    @nn.compact
    def __call__(self, x: Array, mask: Array | None = None) -> Array:
        """`[B, L, d] -> [B, L, d]`; `mask` `[B, L]` is True where a token is real."""
        batch_size, length, width = x.shape
        qkv = Dense(3 * width, dtype=self.dtype, name="qkv")(x)
        heads = (self.num_heads, width // self.num_heads)
        qkv = batch_reshape(qkv, batch_size, length, 3, *heads)
        attention = self.attention_fn or default_attention(length)
        out = on_each_device(attention, (qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask))
        return Dense(width, dtype=self.dtype, name="out")(batch_reshape(out, *x.shape))


class Mlp(nn.Module):
    """gelu(x W_1 + b_1) W_2 + b_2, or with relu."""

    hidden: int
    gelu: str = "exact"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d] -> [..., d]`."""
        h = ACTIVATIONS[self.gelu](Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class Block(nn.Module):
    """Transformer block: x <- x + attention(norm1(x)), then x <- x + mlp(norm2(x)).

    With `post_norm`, as BERT has it: x <- norm1(x + attention(x)), then x <- norm2(x + mlp(x)).

    Attributes:
      num_heads: attention heads; they divide d.
      mlp_ratio: hidden width of the MLP in widths d.
      dropout: rate for what each branch adds.
      gelu: "exact", "tanh", or "relu" in its place.
      dtype: of the computation.
      attention_fn: self-attention, see above; None chooses by backend and length.
      post_norm: whether the normalizations follow the sums.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None
    post_norm: bool = False

    @nn.compact
    def __call__(
        self, x: Array, mask: Array | None, rng: Array | None, example_index: Array
    ) -> Array:
        """`[B, L, d] -> [B, L, d]`.

        Args:
          x: `[B, L, d]`.
          mask: `[B, L]`, True where a token is real, or None where all are.
          rng: one dropout key for the block; None keeps everything.
          example_index: `[B]` int32, each example's position in the global batch.
        """
        rngs = (None, None) if rng is None else tuple(jax.random.split(rng))
        attention = SelfAttention(self.num_heads, self.dtype, self.attention_fn, name="attention")
        mlp = Mlp(int(x.shape[-1] * self.mlp_ratio), self.gelu, self.dtype, name="mlp")
        branches: list[Callable[[Array], Array]] = [lambda h: attention(h, mask), mlp]
        for i, branch in enumerate(branches):
            norm = LayerNorm(self.dtype, name=f"norm{i + 1}")
            h = branch(x if self.post_norm else norm(x))
            x = x + dropout(rngs[i], h, self.dropout, example_index)
            x = norm(x) if self.post_norm else x
        return x
