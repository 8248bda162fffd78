"""Functions that a method of comparison may add to a training step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

Batch = dict[str, Array]


class StepContext(NamedTuple):
    """The forward pass of a training step and its surroundings.

    Attributes:
      params: the model's, before the update.
      out: the model's second output.
      batch: the batch as the model saw it.
      weight: `[B]` float32, 0 for padding.
      step: `[]` int32, updates done before this one.
      rng: a key of this step's own, the same on every device.
      reduce: sums a tree over the devices (under pmap; under jit sums are global already).
    """

    params: Any
    out: Mapping[str, Any]
    batch: Batch
    weight: Array
    step: Array
    rng: Array
    reduce: Callable[[Any], Any]


class Baseline(NamedTuple):
    """Pure functions that a training step calls; by default each adds nothing.

    Attributes:
      init: `() -> state`, a pytree that is checkpointed with the run.
      change_batch: `(batch, rng, example_index) -> batch`, before the forward pass.
      loss: `(state, context) -> [B]`, added to each example's loss; differentiated in
        `context.params` and `context.out`.
      update: `(state, context) -> state`, after the forward pass, without a gradient.
      transform: of the gradient, before the optimizer's; None leaves it.
      gradient_args: `(state, context) -> {name: value}`, extra arguments of `transform.update`.
      whole_batch: whether a function compares over the batch, which then cannot come in parts.
    """

    init: Callable[[], Any] = lambda: ()
    change_batch: Callable[[Batch, Array, Array], Batch] = lambda batch, rng, index: batch
    loss: Callable[[Any, StepContext], Array | float] = lambda state, context: 0.0
    update: Callable[[Any, StepContext], Any] = lambda state, context: state
    transform: optax.GradientTransformationExtraArgs | None = None
    gradient_args: Callable[[Any, StepContext], dict[str, Any]] = lambda state, context: {}
    whole_batch: bool = False


NO_BASELINE = Baseline()


def presence(out: Mapping[str, Any], modalities: tuple[str, ...]) -> Array:
    """`[M, B]` float32: 1 where the example has the modality."""
    return jnp.stack([out["present"][m] for m in modalities]).astype(jnp.float32)


def class_tokens(out: Mapping[str, Any], modalities: tuple[str, ...]) -> dict[str, Array]:
    """Each modality's class token after its final norm: `{m: [B, d]}` float32."""
    return {m: out["tokens"][m][:, 0].astype(jnp.float32) for m in modalities}


def probability_of_label(logits: Array, label: Array) -> Array:
    """softmax(z)_y: `[B, C], [B] -> [B]`."""
    chosen = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), label[:, None], axis=-1)
    return chosen[:, 0]
