"""Self-attention of an encoder: one function, injected, with an implementation for each backend.

Each takes queries, keys and values `[B, L, H, d_h]` and a mask `[B, L]`, True where a token is
real, or None, and returns softmax(Q K^T / sqrt(d_h)) V as `[B, L, H, d_h]` in the values' dtype,
the softmax taken in float32. A sample needs at least one real token: the encoder's class token
always is. What comes out at positions that are not real means nothing.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

AttentionFn = Callable[[Array, Array, Array, Array | None], Array]

#: From this length on, L x L matrices kept for the backward pass cost more on CPU than a loop.
LONG_ON_CPU = 128
_CUDNN_HEAD_DIM = 128
_CUDNN_CAPABILITY = 8  # Ampere


def _scores(logits: Array, head_dim: int, mask: Array | None) -> Array:
    """softmax(logits / sqrt(d_h)) over the last axis in float32, 0 where `mask` is False."""
    logits = logits * head_dim**-0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
    return jax.nn.softmax(logits, axis=-1)


def dense_attention(q: Array, k: Array, v: Array, mask: Array | None = None) -> Array:
    """The textbook form, all samples and heads at once. Arguments as this module says."""
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
    """cuDNN's flash attention where it applies, else the textbook form, which XLA fuses.

    cuDNN takes 16-bit floats, head widths that are multiples of 8 up to 128, and under a mask even
    lengths alone. Arguments as this module says.
    """
    if not _cudnn_applies(q, mask):
        return dense_attention(q, k, v, mask)
    with jax.numpy_dtype_promotion("standard"):  # JAX's own code relies on it
        return jax.nn.dot_product_attention(
            q, k, v, mask=None if mask is None else mask[:, None, None], implementation="cudnn"
        )


def default_attention(length: int, backend: str | None = None) -> AttentionFn:
    """The function for sequences of `length` on `backend` (None: the one JAX runs on).

    A program that is exported for another platform should be given its function instead.
    """
    if (backend or jax.default_backend()) != "cpu":
        return fused_attention
    return mapped_attention if length >= LONG_ON_CPU else dense_attention
