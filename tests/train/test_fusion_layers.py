"""Whole runs with several fusion layers: they roll from below and resume."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax import build_model, rolling_query, rotate
from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.export import folded
from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.loop import load_run, train_and_evaluate
from rollingq_jax.train.parallel import WRAPPERS
from rollingq_jax.train.preemption import Interrupted
from rollingq_jax.train.steps import RollSchedule, eval_step, train_step
from rollingq_jax.train.train_state import create_state
from tests.train.train_cases import read_metrics, tiny_config

pytestmark = pytest.mark.slow

LAYERS, HEADS = 3, 2


def layered_config(path, **overrides):
    """Six checks in 18 steps, one rotation a head."""
    fields = {
        "rolling.check_every": 3,
        "rolling.window": 0.7,
        "rolling.max_rotations": 1,
        "model.fusion_layers": LAYERS,
        "model.fusion_heads": HEADS,
    }
    return tiny_config(path, **fields | overrides)


@pytest.fixture(scope="module")
def finished(arrays, tmp_path_factory):
    """A run that nothing disturbed: config, folder, summary."""
    config, workdir = layered_config(arrays), tmp_path_factory.mktemp("layers") / "run"
    return config, workdir, train_and_evaluate(config, workdir)


def test_layers_roll_from_below(finished):
    _, workdir, summary = finished
    rolls = [row for row in read_metrics(workdir) if row["split"] == "roll"]
    layers = {}
    for row in rolls:
        layers.setdefault(row["step"], set()).add(row["head"] // HEADS)
    assert all(len(together) == 1 for together in layers.values())  # one layer at a check
    order = [together.pop() for together in layers.values()]
    assert order == sorted(order) and set(order) == set(range(LAYERS))
    assert sorted(row["head"] for row in rolls) == list(range(LAYERS * HEADS))
    assert np.isfinite([row["imbalance_after"] for row in rolls]).all()
    assert np.isfinite(summary["test_loss"])


def test_pictures_are_drawn(finished):
    """Of the first layer's first head, where a picture shows one."""
    workdir = finished[1]
    assert (workdir / "report.html").exists()
    drawn = {path.stem for path in (workdir / "figures").glob("*.png")}
    assert {"dynamics", "rotation"} <= drawn


def small_batch(step):
    """A batch of two vectors; the last row is padding."""
    rng = np.random.default_rng(step)
    return {
        "a": rng.normal(size=(8, 5)).astype(np.float32),
        "b": rng.normal(size=(8, 3)).astype(np.float32) + 1,
        "label": rng.integers(0, 3, 8).astype(np.int32),
        "example_mask": np.arange(8) < 5,
    }


def small_parts(period=1, **fields):
    """Model, training step that checks after every `period`, first state."""
    encoders = {"a": {"kind": "vector"}, "b": {"kind": "vector"}}
    shape = {"dim": 8, "depth": 1, "num_heads": 2, "fusion_heads": 2, "mlp_ratio": 1.0}
    model = build_model(
        {"num_classes": 3, "fusion_layers": 2, "encoders": encoders, **shape, **fields}
    )
    tx, roller = optax.sgd(0.1), rolling_query(rho=2.0, max_rotations=2, layers=2)
    state = create_state(model, tx, roller, seed=0, batch=small_batch(0))
    schedule = RollSchedule(period, period)
    parts = {"model": model, "tx": tx, "roller": roller, "schedule": schedule}
    return model, functools.partial(train_step, **parts), state


def test_replicas_under_pmap_roll_as_under_jit():
    found = {}
    for name, layout in WRAPPERS.items():
        model, step, state = small_parts(2, dropout=0.2, encoder_dropout=0.2)
        run = layout(step, functools.partial(eval_step, model=model))
        state, losses = run.put_state(state), []
        for k in range(6):
            state, sums, _ = run.train_step(state, run.put_batch(small_batch(k)))
            losses.append(float(run.get(sums)["loss"]))
        found[name] = losses, run.get(state).rolling
    (losses, rolling), (others, theirs) = found["jit"], found["pmap"]
    np.testing.assert_allclose(losses, others, rtol=1e-5)
    np.testing.assert_array_equal(rolling.count, [2, 2, 1, 1])
    np.testing.assert_array_equal(rolling.count, theirs.count)
    np.testing.assert_allclose(rolling.rotation, theirs.rotation, atol=1e-4)


def test_queries_at_the_roll_are_the_parameters_below_and_the_windows_mean_above():
    model, step, state = small_parts(dropout=0.0)
    step, layers = jax.jit(step), []
    for k in range(4):
        batch, before = small_batch(k), state
        state, _, roll = step(state, batch)
        rolled = np.asarray(roll.info.rolled)
        layers += sorted(set(np.flatnonzero(rolled) // 2))
        first = model.apply({"params": state.params}, before.rotation, method="class_query")
        _, out = model.apply({"params": before.params}, batch, before.rotation)
        np.testing.assert_allclose(roll.query[:2], first, atol=1e-5)
        np.testing.assert_allclose(roll.query[2:], out["query"][:5, 2:].mean(0), atol=1e-5)
        new = jnp.matmul(state.rotation, jnp.swapaxes(before.rotation, 1, 2), precision="highest")
        turned = rotate(new, roll.query)
        np.testing.assert_allclose(turned[rolled], roll.info.anchor[rolled], atol=1e-5)
        np.testing.assert_allclose(turned[~rolled], roll.query[~rolled], atol=1e-5)
    assert layers == [0, 0, 1, 1]
    assert int(state.step) == 4


def test_the_run_is_read_back_with_its_rotations(finished):
    run = load_run(finished[1])
    assert run.rotation.shape == (LAYERS * HEADS, 4, 4)
    with pytest.raises(UserError, match="--fold is given and model.fusion_layers is 3; allowed: 1"):
        folded(run)


def test_a_stopped_run_resumes_to_the_last_bit(finished, arrays, tmp_path):
    config, undisturbed, summary = finished
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=8)
    again = train_and_evaluate(config, tmp_path)
    assert again["test_loss"] == summary["test_loss"]
    assert read_metrics(tmp_path) == read_metrics(undisturbed)
    ours, theirs = load_run(tmp_path), load_run(undisturbed)
    jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
    np.testing.assert_array_equal(ours.rotation, theirs.rotation)
    assert json.loads((tmp_path / "config.json").read_text())["model"]["fusion_layers"] == LAYERS


@pytest.mark.parametrize("choice", ["last_batch_air", "statistics_pass", "extra_schedule_step"])
def test_upstream_has_one_layer(arrays, choice):
    config = layered_config(arrays, **{f"upstream_compat.{choice}": True})
    dataset = load_dataset(config.data, seed=0)
    with pytest.raises(ConfigError, match=f"{choice} is True; allowed with .*fusion_layers 3: Fal"):
        Experiment(config, dataset)
