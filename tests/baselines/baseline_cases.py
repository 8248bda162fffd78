"""A small model of two modalities of vectors, and training steps of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollingq_jax.baselines.build import build_baseline
from rollingq_jax.models import build_model
from rollingq_jax.rolling import rolling_query
from rollingq_jax.train.config import default_config
from rollingq_jax.train.steps import supervised_loss, train_step, with_baseline
from rollingq_jax.train.train_state import create_state

NAMES = ("audio", "visual")


def small_model(fusion, size=4, **fields):
    vector = {"kind": "vector"}
    model = build_model(
        {
            "fusion": fusion,
            "num_classes": 3,
            "dim": 8,
            "depth": 1,
            "num_heads": 2,
            "encoders": {"audio": vector, "visual": vector},
            **fields,
        }
    )
    rng = np.random.default_rng(0)
    batch = {
        "audio": jnp.asarray(rng.normal(size=(size, 5)), jnp.float32),
        "visual": jnp.asarray(rng.normal(size=(size, 7)), jnp.float32),
        "label": jnp.asarray([0, 1, 2, 1] * (size // 4), jnp.int32),
        "example_number": jnp.arange(size, dtype=jnp.int32)[::-1],
    }
    return model, model.init(jax.random.key(0), batch)["params"], batch


def training(name, fusion="concat", *, size=4, epoch_steps=2, **fields):
    """Model, first state, step (not compiled) and batch; plain SGD with rate 1."""
    model, _, batch = small_model(fusion, size)
    config = default_config().baseline
    config.update({"name": name, **fields})
    baseline = build_baseline(config, model.spec, epoch_steps, 10 * epoch_steps)
    tx, roller = optax.sgd(1.0), rolling_query()
    if baseline.transform is not None:
        tx = optax.chain(baseline.transform, tx)
    state = create_state(
        model, tx, roller, seed=0, batch=batch, baseline=lambda p: baseline.init(p, size)
    )
    step = functools.partial(
        train_step,
        model=model,
        tx=tx,
        roller=roller,
        schedule=None,
        loss_fn=with_baseline(supervised_loss, baseline),
    )
    return model, state, step, batch
