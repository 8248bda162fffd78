"""Blocks against NumPy, and dropout that depends on the example alone."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from model_cases import close, filled, run

from rollingq_jax.models.layers import Block, Dense, LayerNorm, dropout, gelu_exact

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
