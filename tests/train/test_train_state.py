"""Learning rate and updates by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax.train.train_state import learning_rate_schedule, make_optimizer


def test_schedule_at_hand_values():
    schedule = learning_rate_schedule(0.1, 4, 3, warmup_epochs=1.0)
    expected = {
        0: 0.0,
        1: 0.025,
        3: 0.075,
        4: 0.1,
        6: 0.05 * (1 + math.cos(math.pi / 4)),
        8: 0.05,
        12: 0.0,
        20: 0.0,
    }
    for step, value in expected.items():
        assert float(schedule(step)) == pytest.approx(value, abs=1e-8)


def test_warm_up_may_end_inside_an_epoch():
    schedule = learning_rate_schedule(0.1, 5, 2, warmup_epochs=0.5)  # int(2.5) = 2 steps
    assert float(schedule(1)) == pytest.approx(0.05) and float(schedule(2)) == pytest.approx(0.1)


def test_schedule_without_warm_up_starts_at_the_top():
    schedule = learning_rate_schedule(0.1, 5, 2, warmup_epochs=0.0)
    assert float(schedule(0)) == pytest.approx(0.1)


def updates(tx, params, gradients):
    """Parameters after each of the gradients."""
    state, after = tx.init(params), []
    for gradient in gradients:
        update, state = tx.update(gradient, state, params)
        params = optax.apply_updates(params, update)
        after.append(params)
    return after


def config(**fields):
    defaults = {"name": "sgd", "momentum": 0.9, "weight_decay": 0.01, "clip_norm": 0.0}
    return SimpleNamespace(**(defaults | fields))


def test_sgd_adds_decay_to_the_gradient_and_momentum_to_that():
    params = {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}
    gradients = [
        {"kernel": jnp.array([0.3, 0.1]), "bias": jnp.array([-1.0])},
        {"kernel": jnp.array([-0.2, 0.4]), "bias": jnp.array([2.0])},
    ]
    rates = [0.1, 0.05]
    tx = make_optimizer(config(), lambda step: jnp.array(rates)[step])
    after = updates(tx, params, gradients)
    for name, value in params.items():
        value, trace = np.asarray(value, np.float64), 0.0
        for i, rate in enumerate(rates):
            trace = 0.9 * trace + np.asarray(gradients[i][name]) + 0.01 * value  # biases decay too
            value = value - rate * trace
            np.testing.assert_allclose(after[i][name], value, rtol=1e-6)


def test_gradients_are_clipped_by_their_global_norm_before_decay():
    params = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    gradient = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    tx = make_optimizer(
        config(clip_norm=1.0, momentum=0.0, weight_decay=0.5), lambda step: jnp.float32(1.0)
    )
    (after,) = updates(tx, params, [gradient])
    np.testing.assert_allclose(after["a"], 3.0 - (0.6 + 1.5), rtol=1e-6)
    np.testing.assert_allclose(after["b"], 4.0 - (0.8 + 2.0), rtol=1e-6)


def test_adam_does_not_decay():
    params = {"a": jnp.array([2.0])}
    tx = make_optimizer(config(name="adam", weight_decay=0.5), lambda step: jnp.float32(0.1))
    with jax.numpy_dtype_promotion("standard"):  # optax raises a float to an int32 power
        (after,) = updates(tx, params, [{"a": jnp.array([7.0])}])
    np.testing.assert_allclose(after["a"], 2.0 - 0.1, rtol=1e-6)  # the first step is lr sign(g)


def test_adamw_decays_apart_from_the_gradient():
    params = {"a": jnp.array([2.0])}
    tx = make_optimizer(config(name="adamw", weight_decay=0.5), lambda step: jnp.float32(0.1))
    with jax.numpy_dtype_promotion("standard"):
        (after,) = updates(tx, params, [{"a": jnp.array([7.0])}])
    np.testing.assert_allclose(after["a"], 2.0 - 0.1 * (1 + 0.5 * 2.0), rtol=1e-6)


def test_the_clipped_schedule_is_that_of_optax():
    ours = learning_rate_schedule(0.1, 7, 6, warmup_epochs=2.5)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, int(2.5 * 7), 7 * 6)
    steps = np.arange(7 * 6 + 5)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integers
        np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(theirs)(steps), atol=2e-8)
