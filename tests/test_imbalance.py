"""Scores, weights and anchor against hand values, the paper's two-modality forms and edge cases."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rollingq_jax as rq


def test_cosine_scores_by_hand():
    query = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    keys = jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(rq.cosine_scores(query, keys), [1.0, np.sqrt(0.5) / 2], rtol=1e-6)
    weighted = rq.cosine_scores(query, keys, jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(weighted, [1.0, np.sqrt(0.5)], rtol=1e-6)
    air = rq.attention_imbalance_rate(query, keys[0], keys[1])
    np.testing.assert_allclose(air, 1.0 - np.sqrt(0.5) / 2, rtol=1e-6)


def test_no_direction_has_cosine_zero_and_finite_gradient():
    query, keys = jnp.zeros([2, 3]), jnp.ones([2, 2, 3])
    np.testing.assert_array_equal(rq.cosine_scores(query, keys), [0.0, 0.0])
    gradient = jax.grad(lambda q: rq.cosine_scores(q, keys).sum())(query)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_cosine_zero(value):
    query, keys = jnp.array([[1.0, 0.0], [value, 0.0]]), jnp.ones([2, 2, 2])
    np.testing.assert_allclose(rq.cosine_scores(query, keys), np.full(2, np.sqrt(0.125)), rtol=1e-6)
    keys = keys.at[1, 0, 1].set(value)
    np.testing.assert_allclose(rq.cosine_scores(query, keys), [np.sqrt(0.125), 0.0], rtol=1e-6)


@pytest.mark.parametrize("weight", [None, jnp.ones(0)])
def test_a_batch_without_samples_scores_zero(weight):
    query, keys = jnp.ones([0, 3]), jnp.ones([2, 0, 3])
    np.testing.assert_array_equal(rq.cosine_scores(query, keys, weight), [0.0, 0.0])
    assert rq.attention_imbalance_rate(query, *keys) == 0.0


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 5.0])
def test_weights_are_the_papers_tanh_for_two_modalities(rho):
    scores = jnp.array([0.7, -0.1])
    first = (1 - np.tanh(rho * 0.8)) / 2
    np.testing.assert_allclose(rq.rebalance_weights(scores, rho), [first, 1 - first], atol=1e-6)
    assert float(rq.imbalance(scores)) == pytest.approx(0.8, abs=1e-6)


def test_weights_of_three_modalities_sum_to_one_and_favour_the_neglected():
    weights = rq.rebalance_weights(jnp.array([0.5, -0.5, 0.0]), 2.0)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    assert weights[1] > weights[2] > weights[0]
    np.testing.assert_allclose(
        rq.rebalance_weights(jnp.arange(3.0), 0.0), np.full(3, 1 / 3), rtol=1e-6
    )


def test_anchor_by_hand():
    anchor = rq.rebalance_anchor(
        jnp.array([0.0, 3.0]), jnp.array([[4.0, 0.0], [0.0, 0.1]]), jnp.array([0.5, 0.5])
    )
    np.testing.assert_allclose(anchor, np.array([3.0, 3.0]) / np.sqrt(2), rtol=1e-6)


@pytest.mark.parametrize(
    ("query", "keys", "weights"),
    [
        ([1.0, 2.0], [[1.0, 0.3], [-1.0, -0.3]], [0.5, 0.5]),  # opposite keys
        ([1.0, 2.0], [[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5]),  # a zero mean key
        ([1.0, 2.0], [[1e-13, 0.0], [1.0, 0.0]], [0.5, 0.5]),
        ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),  # a zero query
    ],
)
def test_degenerate_anchor_returns_the_query(query, keys, weights):
    query, keys, weights = map(jnp.array, (query, keys, weights))
    np.testing.assert_array_equal(rq.rebalance_anchor(query, keys, weights), query)
    for argument in range(3):
        gradient = jax.jacobian(rq.rebalance_anchor, argument)(query, keys, weights)
        assert np.isfinite(gradient).all()


def test_everything_together_under_jit_grad_and_vmap(float64):
    query = np.random.default_rng(0).normal(size=(5, 4))
    keys = np.random.default_rng(1).normal(size=(3, 5, 4))

    def total(query, keys):
        scores = rq.cosine_scores(query, keys)
        weights = rq.rebalance_weights(scores, 1.0)
        anchor = rq.rebalance_anchor(query.mean(0), keys.mean(1), weights)
        return rq.rotation_between(query.mean(0), anchor).sum() + rq.imbalance(scores)

    with float64:
        check_grads(total, (jnp.asarray(query), jnp.asarray(keys)), order=1, modes=["rev"])
    query, keys = query.astype(np.float32), keys.astype(np.float32)
    np.testing.assert_allclose(jax.jit(total)(query, keys), total(query, keys), rtol=1e-4)
    heads = jax.vmap(rq.cosine_scores, (1, 2))(np.stack([query] * 2, 1), np.stack([keys] * 2, 2))
    np.testing.assert_allclose(heads, np.stack([rq.cosine_scores(query, keys)] * 2), rtol=1e-6)
