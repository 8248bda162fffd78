"""The training step and the roll between epochs on upstream's trajectories, its choices on."""

import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax import convert
from rollingq_jax.models import MultimodalTransformer
from rollingq_jax.rolling import rolling_query
from rollingq_jax.train.config import default_config
from rollingq_jax.train.steps import RollSchedule, train_step
from rollingq_jax.train.train_state import (
    TrainState,
    init_rolling,
    learning_rate_schedule,
    make_optimizer,
)
from rollingq_jax.train.upstream import roll_after_epoch, with_last_batch_scores
from tests.golden_inputs import Golden, golden_files

LOSSES = ("loss", "probe_loss/audio", "probe_loss/visual")


def configuration(golden):
    """The training configuration that upstream's run had."""
    config = default_config()
    config.rolling.update(
        beta=golden.config["beta"],
        rho=golden.config["sigma"],
        max_rotations=golden.config["r_time"] if "train/roll0_target" in golden else 0,
    )
    for choice in config.upstream_compat:
        config.upstream_compat[choice] = True
    return config


def batches_of(golden):
    def batch(seed):
        audio, video, label = golden.inputs(float(golden["meta/seed"]) + seed)
        return {**convert.upstream_batch(audio, video), "label": jnp.asarray(label)}

    return [batch(10 + j) for j in range(int(golden["meta/steps"]))], batch(99)


@pytest.mark.slow
@pytest.mark.parametrize("path", golden_files("train_*.npz"), ids=lambda path: path.stem)
def test_follows_upstreams_trajectory(path):
    golden = Golden(path)
    config = configuration(golden)
    spec = convert.upstream_model(**golden.model_arguments()).spec
    model = MultimodalTransformer(dataclasses.replace(spec, dropout=0.0))
    steps, epochs = int(golden["meta/steps"]), int(golden["meta/epochs"])
    schedule = learning_rate_schedule(
        float(golden["meta/lr"]), steps, epochs, extra_step=True, clip=False
    )
    tx, roller = make_optimizer(config.optimizer, schedule), with_last_batch_scores(rolling_query())
    params, _ = convert.from_upstream(golden.under("init"))
    state = TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rolling=init_rolling(model, roller),
        rng=jax.random.key(0),
    )
    batches, evaluation = batches_of(golden)
    window = RollSchedule.from_fraction(steps, config.rolling.window, in_step=False)
    parts = {"model": model, "tx": tx, "roller": roller, "schedule": window}
    step = jax.jit(functools.partial(train_step, **parts))
    run = SimpleNamespace(
        config=config,
        model=model,
        epoch_steps=steps,
        batches=lambda start_step, num_steps: iter(batches),
    )
    rolls = 0
    for losses in golden["train/epoch_losses"]:
        seen = []
        for batch in batches:
            state, sums, _ = step(state, batch)
            seen.append([float(sums[name] / sums["weight"]) for name in LOSSES])
        np.testing.assert_allclose(np.mean(seen, axis=0), losses, atol=1e-5)
        name = f"train/roll{rolls}_rotation"
        given = jnp.asarray(golden[name])[None] if name in golden else None
        before = state.rolling.rotation
        state, roll = roll_after_epoch(run, state, rotation=given)
        if roll.info.rolled[0]:
            turned = (state.rolling.rotation[0] @ before[0].T) @ roll.query[0]
            np.testing.assert_allclose(turned, golden[f"train/roll{rolls}_target"], atol=1e-6)
            rolls += 1
    assert rolls == int(golden["train/rotations"])
    logits, out = model.apply({"params": state.params}, evaluation, rotation=state.rotation)
    np.testing.assert_allclose(logits, golden["final/eval_logits"], atol=1e-5)
    np.testing.assert_allclose(out["query"][0, 0], golden["final/q_cls"][0], atol=1e-5)
