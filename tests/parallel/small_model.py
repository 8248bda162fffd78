"""A small multimodal model with dropout whose query is rolled several times in 20 steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rollingq_jax import build_model, rolling_query
from rollingq_jax.train.parallel import WRAPPERS, with_fsdp
from rollingq_jax.train.steps import RollSchedule, eval_step, train_step
from rollingq_jax.train.train_state import create_state

STEPS = 20
BATCH_SIZE = 16
LENGTHS = {"audio": (5, 6), "visual": (4, 3)}


def model(**fields):
    """The model; `fields` replace those of its configuration, `attention_fn` its attention."""
    attention_fn = fields.pop("attention_fn", None)
    config = {
        "num_classes": 3,
        "dim": 8,
        "depth": 1,
        "num_heads": 2,
        "fusion_heads": 2,
        "dropout": 0.2,
        "encoder_dropout": 0.1,
        "quality_bias": 0.5,
        "encoders": {m: {"kind": "sequence"} for m in LENGTHS},
    }
    return build_model(config | fields, attention_fn)


def batch(step):
    """The global batch of a step, the last of each five padded."""
    rng = np.random.default_rng(step)
    arrays = {
        m: rng.normal(size=(BATCH_SIZE, *shape)).astype(np.float32) for m, shape in LENGTHS.items()
    }
    arrays["label"] = rng.integers(0, 3, BATCH_SIZE).astype(np.int32)
    arrays["example_mask"] = np.arange(BATCH_SIZE) < (11 if step % 5 == 4 else BATCH_SIZE)
    return arrays


def step_and_state(tx=None, **fields):
    """A training step that checks the trigger after every fifth, and the state at step 0."""
    net = model(**fields)
    tx = tx or optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    roller = rolling_query(beta=0.0, rho=2.0, max_rotations=3)
    state = create_state(net, tx, roller, seed=0, batch=batch(0))
    parts = {"model": net, "tx": tx, "roller": roller, "schedule": RollSchedule(5, 2)}
    return functools.partial(train_step, **parts), state


def sharded(train_step, eval_step, data=2):
    """The state over all devices but for `data` groups of them; arrays of 16 elements and more."""
    parts = [train_step.keywords[name] for name in ("model", "tx", "roller")]
    like = jax.eval_shape(lambda: create_state(*parts, seed=0, batch=batch(0)))
    sizes = (data, jax.device_count() // data)
    return with_fsdp(train_step, eval_step, like, sizes, min_size=16)


LAYOUTS = WRAPPERS | {"fsdp": sharded}


def record(sums):
    """The sums of one step that are compared."""
    return {n: np.asarray(v, np.float64) for n, v in sums.items() if n != "nonfinite"}


def run_plain(steps=STEPS, **fields):
    """20 steps under plain jit, on one device: losses, the final state."""
    step, state = step_and_state(**fields)
    step = jax.jit(step, donate_argnums=0)
    records = []
    for i in range(steps):
        state, sums, _ = step(state, {n: jnp.asarray(v) for n, v in batch(i).items()})
        records.append(record(sums))
    return records, state


def run_layout(layout_of, rows=slice(None), steps=STEPS, **fields):
    """The same through one of `LAYOUTS`; `rows` are this process's in the batch."""
    step, state = step_and_state(**fields)
    layout = layout_of(step, functools.partial(eval_step, model=step.keywords["model"]))
    state = layout.put_state(state)
    records = []
    for i in range(steps):
        placed = layout.put_batch({n: v[rows] for n, v in batch(i).items()})
        state, sums, _ = layout.train_step(state, placed)
        records.append(record(layout.get(sums)))
    return records, layout.get(state), layout
