"""PMR: the modality that is behind is drawn to the prototypes of its classes.

Fan et al., "PMR: Prototypical Modal Rebalance for Multimodal Learning" (CVPR 2023), as the authors'
released code has it. With x_m the class token of modality m and P_m[c] the mean of x_m over
examples of class c,

    sim_m[c] = -||x_m - P_m[c]||        s_m = sum_b softmax(sim_m)[b, y_b]
    loss = CE(z) + alpha CE(sim_w),     w the modality with the smallest s_m

and no term where all s_m are equal. At an epoch's end P <- (1 - mu) P_new + mu P.

Where this differs from the released code: P_new comes from sums over the last tenth of the epoch's
training steps, not from another pass over a tenth of the data; before the first epoch's end there
are no prototypes and the term is 0. A class that was not seen keeps its prototype, or has none and
is left out (there: NaN). The distance is sqrt(|.|^2 + eps), whose gradient is finite at 0. More
than two modalities are allowed.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import (
    Baseline,
    Setting,
    StepContext,
    class_tokens,
    presence,
    probability_of_label,
)

EPSILON = 1e-12
NEVER = -1e9  # similarity to a class without a prototype; finite, so that no gradient is NaN


class Prototypes(NamedTuple):
    """Prototypes, and the sums from which the next ones come; all float32.

    Attributes:
      prototype: `[M, C, d]`.
      known: `[M, C]`, 1 where there is a prototype.
      total: `[M, C, d]`, sum of the class tokens since the last epoch's end.
      weight: `[M, C]`, how many those were, weighted.
    """

    prototype: Array
    known: Array
    total: Array
    weight: Array


def init_prototypes(num_modalities: int, num_classes: int, dim: int) -> Prototypes:
    """No prototypes yet.

    Four arrays and not two used twice: a training step that donates its state donates each once.
    """
    classes = (num_modalities, num_classes)
    return Prototypes(
        prototype=jnp.zeros((*classes, dim), jnp.float32),
        known=jnp.zeros(classes, jnp.float32),
        total=jnp.zeros((*classes, dim), jnp.float32),
        weight=jnp.zeros(classes, jnp.float32),
    )


def similarities(tokens: Array, state: Prototypes) -> Array:
    """sim, `[M, B, C]`, of class tokens `[M, B, d]`; -1e9 where a class has no prototype."""
    offset = tokens[:, :, None] - jax.lax.stop_gradient(state.prototype)[:, None]
    distance = jnp.sqrt(jnp.sum(offset * offset, axis=-1) + EPSILON)
    return jnp.where(state.known[:, None] > 0, -distance, NEVER)


def prototype_loss(
    tokens: Array, label: Array, weight: Array, state: Prototypes, reduce: Any = lambda tree: tree
) -> Array:
    """CE(sim_w) of each example, `[B]`, w the weak modality over the whole batch.

    Args:
      tokens: `[M, B, d]`.
      label: `[B]`.
      weight: `[B]`, 0 for what takes no part: padding, an example that lacks a modality.
      state: the prototypes.
      reduce: sums over devices.
    """
    similar = similarities(tokens, state)
    usable = weight * jnp.prod(jnp.take(state.known, label, axis=1), axis=0)
    probability = jax.vmap(probability_of_label, (0, None))(similar, label)
    scores = reduce(jnp.sum(jax.lax.stop_gradient(probability) * usable[None], axis=1))
    weak = (scores == jnp.min(scores)) & (scores < jnp.max(scores))
    losses = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, (0, None))(similar, label)
    return jnp.sum(losses * weak[:, None].astype(losses.dtype), axis=0) * usable


def add_tokens(
    state: Prototypes, tokens: Array, label: Array, weight: Array, reduce: Any = lambda tree: tree
) -> Prototypes:
    """Adds one batch to the sums: tokens `[M, B, d]`, label `[B]`, weight `[M, B]`."""
    member = jax.nn.one_hot(label, state.weight.shape[1], dtype=jnp.float32)[None]
    member = member * weight[..., None]  # [M, B, C]
    safe = jnp.where(weight[..., None] > 0, tokens, 0.0)
    total, count = reduce((jnp.einsum("mbc,mbd->mcd", member, safe), jnp.sum(member, axis=1)))
    return state._replace(total=state.total + total, weight=state.weight + count)


def renew(state: Prototypes, momentum: float) -> Prototypes:
    """An epoch's end: P <- (1 - mu) P_new + mu P, and the sums start anew."""
    fresh = state.total / jnp.maximum(state.weight, 1.0)[..., None]
    mixed = (1 - momentum) * fresh + momentum * state.prototype
    seen, known = state.weight[..., None] > 0, state.known[..., None] > 0
    return Prototypes(
        prototype=jnp.where(seen, jnp.where(known, mixed, fresh), state.prototype),
        known=jnp.maximum(state.known, (state.weight > 0).astype(jnp.float32)),
        total=jnp.zeros_like(state.total),
        weight=jnp.zeros_like(state.weight),
    )


def pmr_baseline(setting: Setting) -> Baseline:
    """PMR in a training step."""
    config, spec, epoch_steps = setting.config, setting.spec, setting.epoch_steps
    names = spec.modalities
    window = max(1, epoch_steps // 10)

    def read(context: StepContext) -> tuple[Array, Array]:
        tokens = jnp.stack(list(class_tokens(context.out, names).values()))
        return tokens, presence(context.out, names)

    def loss(state: Prototypes, context: StepContext) -> Array:
        tokens, present = read(context)
        whole = context.weight * jnp.prod(present, axis=0)
        active = (context.step < setting.active_steps).astype(jnp.float32)
        losses = prototype_loss(tokens, context.batch["label"], whole, state, context.reduce)
        return config.pmr_alpha * active * losses

    def update(state: Prototypes, context: StepContext) -> Prototypes:
        tokens, present = read(context)
        place = context.step % epoch_steps
        counted = (place >= epoch_steps - window).astype(jnp.float32)
        weight = present * context.weight[None] * counted
        state = add_tokens(state, tokens, context.batch["label"], weight, context.reduce)
        ends = place == epoch_steps - 1
        return jax.lax.cond(ends, lambda s: renew(s, config.pmr_momentum), lambda s: s, state)

    return Baseline(
        init=lambda *_: init_prototypes(len(names), spec.num_classes, spec.dim),
        loss=loss,
        update=update,
        whole_batch=True,
    )
