"""The paper's model at CREMA-D's size, and its training step."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from benchmarks.flops import train_step_flops
from rollingq_jax import build_model, rolling_query
from rollingq_jax.train.steps import RollSchedule, train_step
from rollingq_jax.train.train_state import TrainState, create_state

PATCHES = {"audio": 176, "visual": 588}
PATCH_SIZES = {"audio": 256, "visual": 768}
STEPS_PER_EPOCH = 105  # 6,698 clips in batches of 64


class Scale(NamedTuple):
    """Sizes of the model: the paper's by default (upstream `main.py`)."""

    batch_size: int = 8
    dim: int = 768
    depth: int = 4
    num_heads: int = 12
    dtype: str = "float32"
    scan_layers: bool = False
    remat: bool = False
    fusion: str = "attention"


def model_of(scale: Scale) -> Any:
    """The model."""
    return build_model(
        {
            "fusion": scale.fusion,
            "num_classes": 6,
            "dim": scale.dim,
            "depth": scale.depth,
            "num_heads": scale.num_heads,
            "dtype": scale.dtype,
            "scan_layers": scale.scan_layers,
            "remat": scale.remat,
            "encoders": {
                "audio": {"kind": "spectrogram", "patch": (16, 16)},
                "visual": {"kind": "video", "patch": (1, 16, 16)},
            },
        }
    )


def batch_of(scale: Scale) -> dict[str, jax.Array]:
    """Random data of CREMA-D's shapes."""
    audio, visual, label = jax.random.split(jax.random.key(1), 3)
    size = scale.batch_size
    return {
        "audio": jax.random.normal(audio, (size, 257, 188, 1)),
        "visual": jax.random.normal(visual, (size, 3, 224, 224, 3)),
        "label": jax.random.randint(label, (size,), 0, 6),
    }


def step_of(scale: Scale, rolling: bool = True) -> tuple[Callable[..., Any], TrainState]:
    """The training step, SGD with momentum and weight decay, and its first state."""
    model = model_of(scale)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(1e-3, momentum=0.9))
    roller = rolling_query(beta=0.0, rho=1.0, max_rotations=1)
    schedule = RollSchedule.from_fraction(STEPS_PER_EPOCH, 0.25) if rolling else None
    state = create_state(model, tx, roller, seed=0, batch=batch_of(scale._replace(batch_size=2)))
    parts = {"model": model, "tx": tx, "roller": roller, "schedule": schedule}
    return functools.partial(train_step, **parts), state


def compiled_alone(scale: Scale, rolling: bool = True) -> Any:
    """The compiled step without a state to call it on: for what the compiler says of it."""
    made: list[Any] = []

    def state() -> TrainState:
        step, first = step_of(scale, rolling)
        made.append(step)
        return first

    shapes = jax.eval_shape(state), jax.eval_shape(lambda: batch_of(scale))
    return jax.jit(made[0], donate_argnums=0).lower(*shapes).compile()


def compiled_step(scale: Scale, rolling: bool = True) -> tuple[Any, TrainState, dict[str, Any]]:
    """The compiled step (its state is donated), a state and a batch."""
    step, state = step_of(scale, rolling)
    batch = batch_of(scale)
    return jax.jit(step, donate_argnums=0).lower(state, batch).compile(), state, batch


class Stepper:
    """Calls a compiled step again and again, its state going round."""

    def __init__(self, compiled: Any, state: TrainState, batch: Any) -> None:
        self._compiled, self._state, self._batch = compiled, state, batch

    def __call__(self) -> Any:
        """One step; returns its sums."""
        self._state, sums, _ = self._compiled(self._state, self._batch)
        return sums


def model_flops(scale: Scale) -> float:
    """Model FLOPs of a training step, by formula."""
    spec = model_of(scale).spec
    return scale.batch_size * train_step_flops(spec, PATCHES, PATCH_SIZES)


def encoder_step(scale: Scale) -> tuple[Callable[[], Any], dict[str, Any]]:
    """Value and gradient of the encoders alone, and the parameters they have."""
    model = model_of(scale._replace(fusion="sum"))
    batch = batch_of(scale)
    params = model.init(jax.random.key(0), batch_of(scale._replace(batch_size=2)))["params"]

    def loss(params: Any, batch: Any) -> jax.Array:
        _, out = model.apply({"params": params}, batch)
        return sum(jnp.mean(jnp.square(x.astype(jnp.float32))) for x in out["tokens"].values())

    compiled = jax.jit(jax.value_and_grad(loss)).lower(params, batch).compile()
    return lambda: compiled(params, batch), params
