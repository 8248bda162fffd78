"""Blocks and every self-attention function against NumPy; dropout by the example's position."""

import math

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from rollingq_jax.models import (
    default_attention,
    dense_attention,
    fused_attention,
    mapped_attention,
    tpu_flash_attention,
)
from rollingq_jax.models.layers import Block, Dense, LayerNorm, dropout, gelu_exact
from tests.models import numpy_reference
from tests.models.model_cases import close, filled, run

# ----- the block and its parts


INDEX = jnp.arange(3, dtype=jnp.int32)


def made_block(**fields):
    block = Block(num_heads=2, mlp_ratio=2.0, **fields)
    x = jax.random.normal(jax.random.key(0), (3, 6, 8))
    return block, filled(block, x, None, None, INDEX), x


@pytest.mark.parametrize("padded", [False, True])
def test_block_equals_numpy(padded):
    block, params, x = made_block()
    mask = jnp.arange(6)[None] < jnp.array([6, 2, 4])[:, None] if padded else None
    got = run(block, params, x, mask, None, INDEX)
    expected = numpy_reference.block(params, np.asarray(x, np.float64), 2, mask)
    real = np.ones((3, 6), bool) if mask is None else np.asarray(mask)
    close(np.asarray(got)[real], expected[real])


def test_gelu_is_the_erf_form():
    x = jnp.linspace(-6, 6, 101)
    close(gelu_exact(x), numpy_reference.gelu(np.asarray(x, np.float64)), 1e-6)


def test_tanh_gelu_is_an_option():
    exact, params, x = made_block()
    approximate, *_ = made_block(gelu="tanh")
    outputs = [run(b, params, x, None, None, INDEX) for b in (exact, approximate)]
    difference = float(jnp.max(jnp.abs(outputs[0] - outputs[1])))
    assert 0 < difference < 1e-2


def test_dense_equals_a_product_on_any_leading_axes():
    x = jax.random.normal(jax.random.key(0), (2, 3, 4, 5))
    dense = Dense(6)
    params = filled(dense, x)
    close(run(dense, params, x), numpy_reference.linear(params, np.asarray(x)))


def test_layer_norm_takes_its_statistics_in_float32():
    # In bfloat16, 256 + small differences have no variance at all.
    x = (256.0 + jax.random.normal(jax.random.key(0), (4, 64)) * 8).astype(jnp.bfloat16)
    norm = LayerNorm(dtype=jnp.bfloat16)
    params = filled(norm, x)
    got = run(norm, params, x)
    assert got.dtype == jnp.bfloat16
    expected = numpy_reference.layer_norm(params, np.asarray(x.astype(jnp.float32), np.float64))
    close(got.astype(jnp.float32), expected, 2**-6)


def test_dropout_is_inverted_and_has_its_rate():
    x = jnp.ones((50, 400))
    out = dropout(jax.random.key(0), x, 0.2, jnp.arange(50))
    kept = np.asarray(out) > 0
    np.testing.assert_allclose(np.asarray(out)[kept], 1.25, rtol=1e-6)
    standard_error = math.sqrt(0.2 * 0.8 / kept.size)
    assert abs(kept.mean() - 0.8) < 5 * standard_error
    assert len({row.tobytes() for row in kept}) == 50  # no two examples share a mask


def test_dropout_follows_the_example_through_any_layout():
    x = jax.random.normal(jax.random.key(0), (8, 5, 3))
    index = jnp.arange(8, dtype=jnp.int32)
    whole = dropout(jax.random.key(1), x, 0.5, index)
    order = jnp.array([6, 1, 3])
    part = dropout(jax.random.key(1), x[order], 0.5, index[order])
    np.testing.assert_array_equal(whole[order], part)


def test_no_rng_or_rate_keeps_everything():
    x = jnp.ones((3, 5))
    np.testing.assert_array_equal(dropout(None, x, 0.5, INDEX), x)
    np.testing.assert_array_equal(dropout(jax.random.key(0), x, 0.0, INDEX), x)


def test_the_two_branches_of_a_block_drop_independently():
    block, params, x = made_block(dropout=0.5)
    a = run(block, params, x, None, jax.random.key(1), INDEX)
    b = run(block, params, x, None, jax.random.key(2), INDEX)
    quiet = run(block, params, x, None, None, INDEX)
    assert not np.allclose(a, b)
    assert not np.allclose(a, quiet)


# ----- self-attention


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


@pytest.mark.slow
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
