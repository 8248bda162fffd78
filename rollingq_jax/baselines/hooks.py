"""Functions that a method of comparison may add to a training step."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.models.spec import ModelSpec

Batch = dict[str, Array]
EXAMPLE_NUMBER = "example_number"  # [B] int32, place of an example in the training data


class StepContext(NamedTuple):
    """The forward pass of a training step and its surroundings.

    Attributes:
      params: the model's, before the update.
      out: the model's second output.
      logits: `[B, C]`, the model's first output.
      losses: `[B]`, the main head's, as they are trained on.
      batch: the batch as the model saw it.
      weight: `[B]` float32, 0 for padding.
      step: `[]` int32, updates done before this one.
      rng: a key of this step's own, the same on every device.
      reduce: sums a tree over the devices (under pmap; under jit sums are global already).
      apply: `(params, *args, **kwargs)`, the model on this batch without dropout, under the step's
        rotation: another forward pass, or one of the model's methods.
      loss: of outputs `[B, C]` by the batch's label, `[B]`: the task's. Methods that read
        probabilities of a class do not ask for it; they fit no other task.
    """

    params: Any
    out: Mapping[str, Any]
    logits: Array
    losses: Array
    batch: Batch
    weight: Array
    step: Array
    rng: Array
    reduce: Callable[[Any], Any]
    apply: Callable[..., Any]
    loss: Callable[[Array, Array], Array] = optax.softmax_cross_entropy_with_integer_labels


class Baseline(NamedTuple):
    """Pure functions that a training step calls; by default each adds nothing.

    Attributes:
      init: `(params, examples) -> state`, a pytree that is checkpointed with the run, from the
        model's first parameters and the number of training examples.
      change_batch: `(state, batch, rng, example_index) -> batch`, before the forward pass.
      loss: `(state, context) -> [B]`, added to each example's loss; differentiated in the context.
      apart: `(state, context) -> [B]`, a loss that is not added: the gradient of its mean comes to
        `transform.update` as the argument `apart`. It takes a backward pass of its own.
      update: `(state, context) -> state`, after the forward pass, without a gradient.
      transform: of the gradient, before the optimizer's; None leaves it.
      gradient_args: `(state, context) -> {name: value}`, extra arguments of `transform.update`.
      whole_batch: whether a function compares over the batch, which then cannot come in parts.
      example_numbers: whether batches say which examples they hold, as `EXAMPLE_NUMBER`.
      teachers: whether `state` is to hold the encoders of models of one modality each, which are
        trained first; `init` gives them their form.
      blend_every: epochs after which `state`, the weights `[M + 1]` of the losses of each modality
        and of the joint one, is made anew from trainings of each alone; 0: never.
    """

    init: Callable[[Any, int], Any] = lambda params, examples: ()
    change_batch: Callable[[Any, Batch, Array, Array], Batch] = lambda state, batch, *_: batch
    loss: Callable[[Any, StepContext], Array | float] = lambda state, context: 0.0
    apart: Callable[[Any, StepContext], Array] | None = None
    update: Callable[[Any, StepContext], Any] = lambda state, context: state
    transform: optax.GradientTransformationExtraArgs | None = None
    gradient_args: Callable[[Any, StepContext], dict[str, Any]] = lambda state, context: {}
    whole_batch: bool = False
    example_numbers: bool = False
    teachers: bool = False
    blend_every: int = 0


NO_BASELINE = Baseline()


class Setting(NamedTuple):
    """What a method is built for.

    Attributes:
      config: `config.baseline`, with the method's own fields.
      spec: of the model.
      epoch_steps: steps in an epoch.
      active_steps: the first steps, in which a method with such a phase acts.
    """

    config: Any
    spec: ModelSpec
    epoch_steps: int
    active_steps: int

    @property
    def start_step(self) -> int:
        """The first step of the first epoch in which ARL or OPM acts."""
        return self.config.start_epoch * self.epoch_steps


class RunningMean(NamedTuple):
    """A mean over steps, `[M]` float32, and the number of steps that it is of, `[]`."""

    mean: Array
    steps: Array

    @classmethod
    def of_nothing(cls, size: int) -> "RunningMean":
        """Before the first step."""
        return cls(jnp.zeros(size), jnp.zeros([]))


def presence(out: Mapping[str, Any], modalities: tuple[str, ...]) -> Array:
    """`[M, B]` float32: 1 where the example has the modality."""
    return jnp.stack([out["present"][m] for m in modalities]).astype(jnp.float32)


def class_tokens(out: Mapping[str, Any], modalities: tuple[str, ...]) -> dict[str, Array]:
    """Each modality's class token after its final norm: `{m: [B, d]}` float32."""
    return {m: out["tokens"][m][:, 0].astype(jnp.float32) for m in modalities}


def fused(context: StepContext, modalities: Sequence[str]) -> Array:
    """Logits of the fusion that sees the tokens of some modalities only, without dropout: `[B, C]`.

    The encoders do not run again. Under attention the others' tokens take no attention; in a static
    fusion their class tokens count as zeros, and the whole bias stays.
    """
    return context.apply(context.params, context.out["tokens"], tuple(modalities), method="fuse")


def encoder_part(tree: Mapping[str, Any], modality: str) -> dict[str, Any]:
    """The parameters that only this modality's tokens pass: its encoder and its final norm."""
    return {name: tree[name] for name in (f"encoder_{modality}", f"norm_{modality}")}


def encoder_parts(tree: Mapping[str, Any], modalities: Sequence[str]) -> dict[str, Any]:
    """Those parameters of all modalities."""
    return {name: part for m in modalities for name, part in encoder_part(tree, m).items()}


def stateless(change: Callable[..., Any]) -> optax.GradientTransformationExtraArgs:
    """A transformation that reads its extra arguments only: `change(gradient, **arguments)`."""

    def update(updates: Any, state: Any, params: Any = None, **arguments: Any) -> tuple[Any, Any]:
        return change(updates, **arguments), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def scale_encoders(modalities: Sequence[str]) -> optax.GradientTransformationExtraArgs:
    """Multiplies the gradient of each encoder; its `update` takes `factors` `[M]`."""

    def change(gradient: Mapping[str, Any], *, factors: Array, **_: Any) -> dict[str, Any]:
        scaled = dict(gradient)
        for factor, m in zip(factors, modalities, strict=True):
            part = encoder_part(gradient, m)
            scaled |= jax.tree.map(lambda g, f=factor: f.astype(g.dtype) * g, part)
        return scaled

    return stateless(change)


def probability_of_label(logits: Array, label: Array) -> Array:
    """softmax(z)_y: `[B, C], [B] -> [B]`."""
    chosen = jnp.take_along_axis(jax.nn.softmax(logits, axis=-1), label[:, None], axis=-1)
    return chosen[:, 0]


def mean_of_others(scores: Array) -> Array:
    """mean_{n != m} s_n of each m, `[M] -> [M]`."""
    return (jnp.sum(scores) - scores) / (scores.shape[0] - 1)
