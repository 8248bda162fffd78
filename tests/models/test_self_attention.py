"""Every self-attention function against a NumPy loop, and what each keeps for the backward pass."""

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from jax.experimental.pallas import tpu as pltpu
from model_cases import close

from rollingq_jax.models import (
    default_attention,
    dense_attention,
    fused_attention,
    mapped_attention,
    tpu_flash_attention,
)

FUNCTIONS = [dense_attention, mapped_attention, fused_attention]


def inputs(length=9, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(k, (3, length, 2, 4)).astype(dtype) for k in keys]


def padding(length=9):
    return jnp.arange(length)[None] < jnp.array([length, 4, 1])[:, None]


@pytest.mark.parametrize("mask", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_are_the_textbooks(function, mask):
    q, k, v = inputs()
    close(jax.jit(function)(q, k, v, mask), numpy_reference.attention(q, k, v, mask), 1e-5)


@pytest.mark.parametrize("mask", [None, padding()], ids=["all", "padded"])
@pytest.mark.parametrize("function", [mapped_attention, fused_attention])
def test_gradients_are_those_of_the_dense_form(function, mask):
    def loss(f, *arrays):
        return jnp.sum(jnp.sin(f(*arrays, mask)))

    expected = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(dense_attention, *inputs())
    got = jax.jit(jax.grad(loss, (1, 2, 3)), static_argnums=0)(function, *inputs())
    for a, b in zip(got, expected, strict=True):
        close(a, b, 1e-5)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_is_padded_does_not_matter(function):
    q, k, v = inputs()
    mask = padding()
    moved = [jnp.where(mask[..., None, None], x, 100.0 * x + 7.0) for x in (q, k, v)]
    real = mask[..., None, None]
    a, b = function(q, k, v, mask), function(*moved, mask)
    np.testing.assert_array_equal(jnp.where(real, a, 0.0), jnp.where(real, b, 0.0))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_softmax_is_float32_under_bfloat16(function):
    # Scores are 64 and 64.125: apart in float32, equal in bfloat16, whose steps are 0.5 there.
    length = 64
    q = jnp.ones((1, length, 1, 4), jnp.bfloat16)
    k = jnp.full((1, length, 1, 4), 32, jnp.bfloat16).at[:, ::2, :, 0].add(0.25)
    v = (jnp.arange(length) % 2 == 0).astype(jnp.bfloat16)[None, :, None, None]
    v = jnp.broadcast_to(v, (1, length, 1, 4))
    out = function(q, k, v, None)
    assert out.dtype == jnp.bfloat16
    exact = numpy_reference.attention(*(x.astype(jnp.float32) for x in (q, k, v)))
    assert exact[0, 0, 0, 0] > 0.53
    close(out.astype(jnp.float32), exact, 2**-7)


def kept_for_backward(function, length):
    """Sizes of the arrays that the backward pass holds on to."""
    _, backward = jax.vjp(lambda *arrays: function(*arrays, None), *inputs(length))
    return [leaf.size for leaf in jax.tree.leaves(backward)]


def test_mapped_attention_keeps_no_square_matrix():
    length = 80
    whole = 3 * 2 * length * length
    assert max(kept_for_backward(dense_attention, length)) >= whole
    assert max(kept_for_backward(mapped_attention, length)) <= 3 * 2 * 4 * length


def test_choice_by_backend_and_length():
    assert default_attention(17, backend="cpu") is dense_attention
    assert default_attention(589, backend="cpu") is mapped_attention
    assert default_attention(589, backend="gpu") is fused_attention
    assert default_attention(589, backend="tpu") is fused_attention
    assert default_attention(2048, backend="tpu") is tpu_flash_attention
    assert default_attention(2048, backend="gpu") is fused_attention
    assert default_attention(589) is mapped_attention


class _Gpu:
    compute_capability = "9.0"


@pytest.mark.parametrize(
    ("dtype", "length", "head_dim", "masked", "expected"),
    [
        (jnp.bfloat16, 589, 64, False, True),
        (jnp.float16, 588, 64, True, True),
        (jnp.float32, 588, 64, False, False),  # not 16 bits
        (jnp.bfloat16, 589, 64, True, False),  # an odd length under a mask
        (jnp.bfloat16, 588, 768, False, False),  # a head too wide
        (jnp.bfloat16, 588, 12, False, False),  # not a multiple of 8
    ],
)
def test_cudnn_is_asked_only_for_what_it_takes(
    monkeypatch, dtype, length, head_dim, masked, expected
):
    asked = []

    def recorded(q, k, v, *, mask, implementation):
        asked.append((implementation, None if mask is None else mask.shape))
        return v

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [_Gpu()])
    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    q = jax.ShapeDtypeStruct((2, length, 1, head_dim), dtype)
    mask = jax.ShapeDtypeStruct((2, length), jnp.bool_) if masked else None
    jax.eval_shape(fused_attention, q, q, q, mask)
    assert asked == ([("cudnn", (2, 1, 1, length) if masked else None)] if expected else [])


def with_gradients(function, length, mask):
    """Values, and gradients of a random sum of them, at real positions."""
    keys = jax.random.split(jax.random.key(1), 4)
    *arrays, chosen = (jax.random.normal(k, (2, length, 2, 8)) for k in keys)
    if mask is not None:
        chosen = jnp.where(mask[..., None, None], chosen, 0.0)

    def loss(arrays):
        out = function(*arrays, mask)
        return jnp.sum(out * chosen), jnp.where(chosen != 0, out, 0.0)

    (_, out), gradients = jax.value_and_grad(loss, has_aux=True)(arrays)
    return [out, *gradients]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("length", [140, 600])  # in one block of 256, and in two of 384
def test_flash_attention_on_tpu_is_the_dense_form(length, masked):
    mask = jnp.arange(length)[None] < jnp.array([length, 37])[:, None] if masked else None
    with pltpu.force_tpu_interpret_mode():
        got = jax.block_until_ready(with_gradients(tpu_flash_attention, length, mask))
    for a, b in zip(got, with_gradients(dense_attention, length, mask), strict=True):
        close(a, b, 2e-5)


@pytest.mark.parametrize("head_dim", [64, 128, 192])  # the kernel refuses the last
def test_flash_attention_lowers_for_tpu(head_dim):
    def loss(*arrays):
        return jnp.sum(tpu_flash_attention(*arrays).astype(jnp.float32))

    q = jax.ShapeDtypeStruct((2, 1200, 2, head_dim), jnp.bfloat16)
    exported = jax.export.export(jax.jit(jax.grad(loss, (0, 1, 2))), platforms=["tpu"])(q, q, q)
    assert ("tpu_custom_call" in exported.mlir_module()) == (head_dim != 192)
