"""The parts of a pre-norm Transformer: projections, normalisation, dropout and the block.

Parameters are float32. Projections compute in `dtype` on a `[B * L, d]` view: XLA on CPU takes
twice the time for weight gradients contracted over two batch axes, and on other devices it is the
same program. Statistics of a normalisation are float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

from rollingq_jax.attention import drop
from rollingq_jax.models import initializers
from rollingq_jax.models.self_attention import AttentionFn, default_attention

LAYER_NORM_EPSILON = 1e-6


def example_keys(rng: Array, example_index: Array) -> Array:
    """One key an example, from its position in the global batch: `[], [B] -> [B]`.

    Randomness then does not depend on how a batch is laid out over devices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, example_index)


def dropout(rng: Array | None, x: Array, rate: float, example_index: Array) -> Array:
    """Inverted dropout of `x` `[B, ...]` with a key an example; none where `rng` is None.

    Raises:
      ValueError: the rate is not in [0, 1).
    """
    if rng is None or rate == 0.0:
        return x
    return drop(x, rate, example_keys(rng, example_index))


def gelu_exact(x: Array) -> Array:
    """x (1 + erf(x / sqrt 2)) / 2, which XLA computes faster than `jax.nn.gelu`'s erfc form."""
    return 0.5 * x * (1.0 + jax.lax.erf(x * np.sqrt(0.5).astype(x.dtype)))


GELUS: dict[str, Callable[[Array], Array]] = {"exact": gelu_exact, "tanh": jax.nn.gelu}


class Dense(nn.Module):
    """x W + b: `[..., d] -> [..., features]`, with W `kernel` and b `bias`."""

    features: int
    dtype: Any = jnp.float32
    kernel_init: initializers.Initializer = initializers.xavier_normal
    bias_init: initializers.Initializer = initializers.zeros

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """Applies the projection in `dtype`."""
        kernel = self.param("kernel", self.kernel_init, (x.shape[-1], self.features), jnp.float32)
        bias = self.param("bias", self.bias_init, (self.features,), jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(self.dtype)
        out = rows @ kernel.astype(self.dtype) + bias.astype(self.dtype)[None]
        return out.reshape(*x.shape[:-1], self.features)


class HeadProjection(nn.Module):
    """The parameters of a projection to H heads, for functions that use them folded."""

    num_heads: int
    head_dim: int

    @nn.compact
    def __call__(self, width: int) -> tuple[Array, Array]:
        """Kernel `[width, H, d_h]` and bias `[H, d_h]`, float32."""
        heads = (self.num_heads, self.head_dim)
        kernel = self.param("kernel", initializers.xavier_normal, (width, *heads), jnp.float32)
        return kernel, self.param("bias", initializers.zeros, heads, jnp.float32)


@jax.checkpoint
def normalise(rows: Array, scale: Array, bias: Array) -> Array:
    """LayerNorm of `[N, d]`, float32. What lies between is computed again for the gradient.

    XLA would keep it in several arrays of the rows' size; to compute it again takes no longer.
    """
    centred = rows - jnp.mean(rows, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + LAYER_NORM_EPSILON) * scale[None] + bias[None]


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-6) * scale + bias over the last axis, in float32."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d] -> [..., d]` in `dtype`."""
        width = (x.shape[-1],)
        scale = self.param("scale", initializers.ones, width, jnp.float32)
        bias = self.param("bias", initializers.zeros, width, jnp.float32)
        rows = x.reshape(-1, x.shape[-1]).astype(jnp.float32)
        return normalise(rows, scale, bias).reshape(x.shape).astype(self.dtype)


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
        qkv = qkv.reshape(batch_size, length, 3, self.num_heads, width // self.num_heads)
        attention = self.attention_fn or default_attention(length)
        out = attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], mask)
        return Dense(width, dtype=self.dtype, name="out")(out.reshape(x.shape))


class Mlp(nn.Module):
    """gelu(x W_1 + b_1) W_2 + b_2."""

    hidden: int
    gelu: str = "exact"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """`[..., d] -> [..., d]`."""
        h = GELUS[self.gelu](Dense(self.hidden, dtype=self.dtype, name="fc1")(x))
        return Dense(x.shape[-1], dtype=self.dtype, name="fc2")(h)


class Block(nn.Module):
    """Pre-norm Transformer block: x + attention(norm1(x)), then x + mlp(norm2(x)).

    Attributes:
      num_heads: attention heads; they divide d.
      mlp_ratio: hidden width of the MLP in widths d.
      dropout: rate for what each branch adds.
      gelu: "exact" or "tanh".
      dtype: of the computation.
      attention_fn: see `self_attention`; None chooses by backend and length.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    gelu: str = "exact"
    dtype: Any = jnp.float32
    attention_fn: AttentionFn | None = None

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
        h = LayerNorm(dtype=self.dtype, name="norm1")(x)
        h = SelfAttention(self.num_heads, self.dtype, self.attention_fn, name="attention")(h, mask)
        x = x + dropout(rngs[0], h, self.dropout, example_index)
        h = LayerNorm(dtype=self.dtype, name="norm2")(x)
        h = Mlp(int(x.shape[-1] * self.mlp_ratio), self.gelu, self.dtype, name="mlp")(h)
        return x + dropout(rngs[1], h, self.dropout, example_index)
