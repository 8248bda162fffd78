"""Learning rate and updates by hand."""

import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax import build_model
from rollingq_jax.train.config import default_config
from rollingq_jax.train.train_state import learning_rate_schedule, make_optimizer, update_ema


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
    return SimpleNamespace(
        **(default_config().optimizer.to_dict() | {"weight_decay": 0.01} | fields)
    )


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


@pytest.mark.parametrize(
    "name, direction",
    [
        ("lion", [1.0, -1.0]),  # the sign of (1 - b1) g
        ("lamb", [math.sqrt(8) / math.sqrt(2), -math.sqrt(8) / math.sqrt(2)]),  # sign(g) |p| / |u|
    ],
)
def test_first_step_of_lion_and_lamb(name, direction):
    params, gradient = {"a": jnp.array([2.0, 2.0])}, {"a": jnp.array([7.0, -0.3])}
    tx = make_optimizer(config(name=name, weight_decay=0.0), lambda step: jnp.float32(0.1))
    with jax.numpy_dtype_promotion("standard"):
        (after,) = updates(tx, params, [gradient])
    np.testing.assert_allclose(after["a"], 2.0 - 0.1 * np.array(direction), rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lion", "lamb"])
def test_decay_may_leave_biases_norms_tokens_and_embeddings_alone(name):
    """Parameters that are 1, gradients that are 0: what changes has decayed."""
    names = ("kernel", "bias", "scale", "cls", "position", "embedding")
    params = {"head": {n: jnp.ones([2, 2]) for n in names}}
    still = jax.tree.map(jnp.zeros_like, params)
    for on, decayed in (("all", set(names)), ("kernels", {"kernel"})):
        tx = make_optimizer(config(name=name, weight_decay_on=on), lambda step: jnp.float32(0.1))
        with jax.numpy_dtype_promotion("standard"):
            (after,) = updates(tx, params, [still])
        assert {n for n, x in after["head"].items() if float(x[0, 0]) < 1} == decayed, on


def test_learning_rates_fall_from_layer_to_layer():
    """Of encoders of 2 and 0 blocks, with momentum: every step is the plain one times a factor."""
    encoders = {
        "a": {"kind": "vector", "depth": 2},
        "b": {"kind": "vector", "depth": 0, "width": 4},
    }
    shape = {"dim": 8, "num_heads": 2, "mlp_ratio": 1.0, "num_classes": 3}
    model = build_model({"encoders": encoders, **shape})
    batch = {"a": jnp.ones([1, 5]), "b": jnp.ones([1, 3])}
    params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
    plain, layered = (
        updates(make_optimizer(config(layer_decay=d, weight_decay=0.0), lambda _: 0.1), params, g)
        for d in (1.0, 0.5)
        for g in ([jax.tree.map(jnp.ones_like, params)] * 2,)
    )
    flat = jax.tree_util.tree_leaves_with_path(params)
    steps = (jax.tree.leaves(after[-1]) for after in (plain, layered))
    factors = {}
    for (path, start), one, other in zip(flat, *steps, strict=True):
        name = "/".join(key.key for key in path)
        np.testing.assert_allclose(one - start, -0.1 * 2.9, atol=1e-6)  # the momentum is 0.9
        ratio = np.asarray(other - start) / -0.29
        factors[name] = float(ratio.flat[0])
        np.testing.assert_allclose(ratio, factors[name], atol=1e-5)
    expected = {"a/block_1": 0.5, "a/block_0": 0.25, "a/cls": 0.125, "a/embed": 0.125}
    expected |= {"a/position": 0.125, "b/embed": 0.5, "b/cls": 0.5, "b/position": 0.5}
    for name, factor in factors.items():
        part = next((x for n, x in expected.items() if name.startswith(f"encoder_{n}")), 1.0)
        assert factor == pytest.approx(part, abs=1e-4), name
    assert {n for n, f in factors.items() if n.startswith("encoder_b/") and f > 0.99} == {
        "encoder_b/project/kernel",
        "encoder_b/project/bias",
    }


def test_the_average_of_parameters_is_optax_debiased_ema():
    values = [jnp.array([2.0, -1.0]), jnp.array([4.0, 0.5]), jnp.array([-3.0, 8.0])]
    reference = optax.ema(0.9, debias=True)
    state, ema = reference.init(values[0]), values[0] + 1.0
    for t, value in enumerate(values, 1):
        with jax.numpy_dtype_promotion("standard"):
            expected, state = reference.update(value, state)
        ema = update_ema(ema, value, jnp.int32(t), 0.9)
        np.testing.assert_allclose(ema, expected, rtol=2e-6)
    by_hand = (0.81 * values[0] + 0.9 * values[1] + values[2]) / (0.81 + 0.9 + 1)
    np.testing.assert_allclose(ema, by_hand, rtol=2e-6)


def test_the_clipped_schedule_is_that_of_optax():
    ours = learning_rate_schedule(0.1, 7, 6, warmup_epochs=2.5)
    theirs = optax.warmup_cosine_decay_schedule(0.0, 0.1, int(2.5 * 7), 7 * 6)
    steps = np.arange(7 * 6 + 5)
    with jax.numpy_dtype_promotion("standard"):  # optax multiplies floats by integers
        np.testing.assert_allclose(jax.vmap(ours)(steps), jax.vmap(theirs)(steps), atol=2e-8)
