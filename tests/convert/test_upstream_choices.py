"""Upstream's schedule, statistics and roll, apart from any trajectory."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax.errors import UserError
from rollingq_jax.rolling import init_state
from rollingq_jax.train.train_state import learning_rate_schedule
from rollingq_jax.train.upstream import (
    upstream_roll,
    upstream_scores,
    upstream_statistics,
)

roll = jax.jit(upstream_roll, static_argnames=("max_rotations", "method", "joint"))


def rates_of_a_scheduler(lr, steps, epochs, warmup_epochs, extra):
    """What optimiser steps see of a counter that is stepped after each, and once more an epoch."""
    warmup, total = int(warmup_epochs * steps), steps * epochs
    counter, rates = 0, []
    for _ in range(epochs):
        for _ in range(steps):
            if counter < warmup:
                rates.append(lr * counter / max(1, warmup))
            else:
                progress = (counter - warmup) / max(1, total - warmup)
                rates.append(lr * 0.5 * (1 + math.cos(math.pi * progress)))
            counter += 1
        counter += extra
    return rates


@pytest.mark.parametrize("extra", [True, False])
@pytest.mark.parametrize(
    ("steps", "epochs", "warmup"), [(3, 3, 2.5), (7, 30, 2.5), (1, 5, 0.0), (4, 2, 2.5)]
)
def test_schedule(extra, steps, epochs, warmup):
    schedule = learning_rate_schedule(
        0.05, steps, epochs, warmup_epochs=warmup, extra_step=extra, clip=False
    )
    expected = rates_of_a_scheduler(0.05, steps, epochs, warmup, extra)
    counts = jnp.arange(steps * epochs)
    np.testing.assert_allclose([schedule(int(t)) for t in counts], expected, atol=1e-8)
    np.testing.assert_allclose(jax.jit(schedule)(counts), expected, atol=1e-8)


def test_the_rate_rises_again_unless_clipped():
    """30 epochs of 5 steps: the schedule's counter ends 29 steps beyond the cosine's end."""
    steps, epochs = 5, 30
    free = learning_rate_schedule(1.0, steps, epochs, extra_step=True, clip=False)
    held = learning_rate_schedule(1.0, steps, epochs, extra_step=True)
    last = steps * epochs - 1
    assert float(free(last)) > 0.08
    assert float(held(last)) == 0.0
    reached = [t for t in range(last) if t + t // steps <= steps * epochs]
    np.testing.assert_allclose([free(t) for t in reached], [held(t) for t in reached], atol=1e-7)


@pytest.fixture(scope="module")
def model_and_params():
    encoders = {"left": {"kind": "vector"}, "right": {"kind": "vector"}}
    fields = {"num_classes": 3, "dim": 8, "depth": 1, "num_heads": 2, "fusion_heads": 2}
    model = rq.build_model({**fields, "encoders": encoders})
    batch = example_batch(0, 2)
    return model, jax.jit(model.init)(jax.random.key(0), batch)["params"]


def example_batch(seed, size):
    rng = np.random.default_rng(seed)
    names = ("left", "right")
    return {name: rng.standard_normal((size, 5)).astype(np.float32) for name in names}


def output(model, params, batch, rotation=None):
    return jax.jit(lambda p, r, b: model.apply({"params": p}, b, rotation=r)[1])(
        params, rotation, batch
    )


def rotations(seed):
    matrices = np.linalg.qr(np.random.default_rng(seed).standard_normal((2, 4, 4)))[0]
    return jnp.asarray(matrices, jnp.float32)


def test_statistics_weigh_batches_and_not_examples(model_and_params):
    model, params = model_and_params
    batches = [example_batch(1, 4), example_batch(2, 4), example_batch(3, 1)]
    rotation = rotations(0)
    query, keys = upstream_statistics(model, params, rotation, iter(batches))
    outs = [output(model, params, batch, rotation) for batch in batches]
    assert query.shape == (2, 4) and keys.shape == (2, 2, 4)
    np.testing.assert_allclose(query, outs[0]["query"][0], atol=1e-6)
    for i, name in enumerate(("left", "right")):
        means = [np.asarray(out["mean_keys"][name]).mean(0) for out in outs]
        np.testing.assert_allclose(keys[i], np.mean(means, axis=0), atol=1e-6)


def test_statistics_leave_padding_out(model_and_params):
    model, params = model_and_params
    small, padded = example_batch(3, 1), example_batch(4, 4)
    padded = {name: np.concatenate([small[name], padded[name]]) for name in small}
    padded["example_mask"] = np.arange(5) < 1
    expected = upstream_statistics(model, params, None, [small])
    found = upstream_statistics(model, params, None, [padded])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


def test_statistics_need_a_batch(model_and_params):
    with pytest.raises(UserError, match="batches is empty"):
        upstream_statistics(*model_and_params, None, [])


def test_scores_are_mean_cosines(model_and_params):
    model, params = model_and_params
    out = output(model, params, example_batch(5, 3))
    query = np.float64(out["query"])
    weight = np.array([1.0, 1.0, 0.0], np.float32)
    scores, weighted = upstream_scores(out), upstream_scores(out, jnp.asarray(weight))
    assert scores.shape == (2, 2)
    for m, name in enumerate(("left", "right")):
        keys = np.float64(out["mean_keys"][name])
        norms = np.linalg.norm(query, axis=-1) * np.linalg.norm(keys, axis=-1)
        cosines = np.sum(query * keys, axis=-1) / norms
        np.testing.assert_allclose(scores[:, m], cosines.mean(0), atol=1e-6)
        np.testing.assert_allclose(weighted[:, m], cosines[:2].mean(0), atol=1e-6)


def problem(seed=0, heads=2, dim=4):
    rng = np.random.default_rng(seed)
    query, keys = rng.standard_normal((heads, dim)), rng.standard_normal((2, heads, dim))
    return jnp.asarray(query, jnp.float32), jnp.asarray(keys, jnp.float32)


def test_roll_goes_by_the_last_scores():
    """Head 0's |AIR| is over beta and head 1's is not, whatever the means say."""
    query, keys = problem()
    state = init_state(2, 4, 2)
    scores = jnp.array([[0.1, 0.45], [0.3, 0.2]])
    new, info = roll(state, query, keys, scores, beta=0.3, rho=2.0, max_rotations=1)
    np.testing.assert_array_equal(info.rolled, [True, False])
    np.testing.assert_array_equal(new.count, [1, 0])
    np.testing.assert_array_equal(new.rotation[1], np.eye(4))
    alpha = (1 - math.tanh(2.0 * (0.1 - 0.45))) / 2
    np.testing.assert_allclose(info.weights[0], [alpha, 1 - alpha], atol=1e-6)
    unit = np.asarray(keys[:, 0]) / np.linalg.norm(keys[:, 0], axis=-1, keepdims=True)
    u = alpha * unit[0] + (1 - alpha) * unit[1]
    anchor = np.linalg.norm(query[0]) * u / np.linalg.norm(u)
    np.testing.assert_allclose(info.anchor[0], anchor, atol=1e-6)
    np.testing.assert_allclose(new.rotation[0] @ query[0], anchor, atol=1e-6)


def test_equal_to_beta_is_not_over_it():
    query, keys = problem()
    scores = jnp.array([[0.5, 0.25], [0.25, 0.5]])
    _, info = roll(init_state(2, 4, 2), query, keys, scores, beta=0.25, rho=1.0, max_rotations=1)
    assert not info.rolled.any()


def test_heads_that_decide_together_and_the_svd():
    """The mean AIR is over beta though head 1's is not; both constructions reach the anchor."""
    query, keys = problem()
    scores = jnp.array([[0.1, 0.7], [0.3, 0.4]])
    options = {"beta": 0.3, "rho": 1.0, "max_rotations": 1, "joint": True}
    geodesic, info = roll(init_state(2, 4, 2), query, keys, scores, **options)
    svd, _ = roll(init_state(2, 4, 2), query, keys, scores, method="svd", **options)
    np.testing.assert_array_equal(info.rolled, [True, True])
    assert float(jnp.abs(geodesic.rotation - svd.rotation).max()) > 0.1
    for state in (geodesic, svd):
        turned = jnp.einsum("hij,hj->hi", state.rotation, query)
        np.testing.assert_allclose(turned, info.anchor, atol=1e-5)


def test_rotations_compose_until_they_are_used_up():
    state, scores = init_state(2, 4, 2), jnp.array([[0.5, 0.1], [0.1, 0.5]])
    first, second = rotations(1), rotations(2)
    query, keys = problem(3)
    options = {"beta": 0.0, "rho": 1.0, "max_rotations": 2}
    state, _ = roll(state, query, keys, scores, rotation=first, **options)
    np.testing.assert_allclose(state.rotation, first, atol=1e-6)
    state, _ = roll(state, query, keys, scores, rotation=second, **options)
    expected = np.einsum("hij,hjk->hik", np.float64(second), np.float64(first))
    np.testing.assert_allclose(state.rotation, expected, atol=1e-6)
    np.testing.assert_array_equal(state.count, [2, 2])
    state, info = roll(state, query, keys, scores, rotation=first, **options)
    np.testing.assert_allclose(state.rotation, expected, atol=1e-6)
    assert not info.rolled.any()


def test_a_roll_without_an_anchor_changes_nothing():
    query, keys = problem()
    opposite = jnp.stack([keys[0], -keys[0]])
    scores = jnp.array([[0.5, 0.1], [0.1, 0.5]])
    state = init_state(2, 4, 2)
    new, info = roll(
        state, query, opposite, scores, beta=0.0, rho=0.0, max_rotations=1, rotation=rotations(1)
    )
    assert not info.rolled.any()
    np.testing.assert_array_equal(new.rotation, state.rotation)
