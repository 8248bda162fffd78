"""Self-attention of an encoder: one function, injected, with an implementation for each backend.

Each takes queries, keys and values `[B, L, H, d_h]` and a mask `[B, L]`, True where a token is
real, or None, and returns softmax(Q K^T / sqrt(d_h)) V as `[B, L, H, d_h]` in the values' dtype,
the softmax taken in float32. A sample needs at least one real token: the encoder's class token
always is. What comes out at positions that are not real means nothing.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

AttentionFn = Callable[[Array, Array, Array, Array | None], Array]

#: From this length on, L x L matrices kept for the backward pass cost more on CPU than a loop.
LONG_ON_CPU = 128
#: From this length on, padding to whole blocks is a small part of flash attention's work on TPU.
LONG_ON_TPU = 1024
_TPU_LANES = 128
_TPU_BLOCK = 512  # the largest; two of its tiles in float32 are a small part of a core's memory
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


def _tpu_block(length: int) -> int:
    """Width of the blocks that cut `length`: multiples of 128, as equal as they can be."""
    blocks = math.ceil(length / _TPU_BLOCK)
    return _TPU_LANES * math.ceil(length / blocks / _TPU_LANES)


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
    block = _tpu_block(length)
    padding = -length % block
    real = jnp.ones((batch_size, length), jnp.bool_) if mask is None else mask
    segments = jnp.pad(real.astype(jnp.int32), ((0, 0), (0, padding)))

    def by_head(x: Array) -> Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, padding), (0, 0)))

    sizes = flash.BlockSizes(
        block_q=block,
        block_k_major=block,
        block_k=block,
        block_b=1,
        block_q_major_dkv=block,
        block_k_major_dkv=block,
        block_k_dkv=block,
        block_q_dkv=block,
        block_k_major_dq=block,
        block_k_dq=block,
        block_q_dq=block,
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        out = flash.flash_attention(
            by_head(q),
            by_head(k),
            by_head(v),
            segment_ids=flash.SegmentIds(segments, segments),
            sm_scale=head_dim**-0.5,
            block_sizes=sizes,
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
