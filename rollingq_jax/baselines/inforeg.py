"""InfoReg: while encoders take up most, the one that is ahead is held near where the epoch began.

Huang et al., "Adaptive Unimodal Regulation for Balanced Multimodal Information Acquisition" (CVPR
2025). With s_m = sum_b softmax(z_m)[b, y_b] over the batch, theta the parameters of encoder m and
theta_0 those at the epoch's start,

    loss = CE(z) + sum_m CE(z_m)
    g <- g + beta exp(tanh(s_m - mean_{n != m} s_n)) (theta - theta_0)    for the m of the highest s

as long as k_m > .05, the rise of the gradient's information F over the epochs,

    F_m = sum over tensors with more than one axis of the mean over their elements of sum_steps g^2
    k_m = (S_1 - S_2) / S_1,    S_1 and S_2 the sums of the last ten F_m and of the ten before the
                                last; 0 before the first epoch, and k_m = 1 in that

The authors stop both modalities by the audio's k, and have beta .95 for audio and .1 for visual;
here each has its own k and all the same beta. z_m is the modality's part in the head of concat or
sum, elsewhere u_m, the answer of the fusion that sees m only.
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
    encoder_part,
    encoder_parts,
    mean_of_others,
    presence,
)
from rollingq_jax.baselines.ogm import batch_scores
from rollingq_jax.baselines.unimodal import part_logits

EPOCHS = 10  # in each of the two sums
LEAST_RISE = 0.05


class Information(NamedTuple):
    """What the regulation remembers.

    Attributes:
      start: encoders and their norms at the epoch's start, by name.
      current: `[M]`, F_m of the epoch so far.
      past: `[M, 11]`, F_m of the epochs before, the last one last.
    """

    start: dict[str, Any]
    current: Array
    past: Array


def rise(past: Array) -> Array:
    """k_m, `[M]`, from F_m of the last eleven epochs `[M, 11]`; 1 where they are 0."""
    late, early = jnp.sum(past[:, 1:], axis=1), jnp.sum(past[:, :-1], axis=1)
    return jnp.where(late > 0, (late - early) / jnp.where(late > 0, late, 1.0), 1.0)


def strengths(scores: Array, beta: float) -> Array:
    """beta exp(tanh(s_m - mean of the others)) where s_m is the highest, else 0: `[M]`."""
    others = mean_of_others(scores)
    ahead = (scores == jnp.max(scores)) & (scores > others)
    return jnp.where(ahead, beta * jnp.exp(jnp.tanh(scores - others)), 0.0)


def information(gradient: Any) -> Array:
    """Sum over tensors with more than one axis of their mean square, `[]`."""
    squares = [jnp.mean(g * g) for g in jax.tree.leaves(gradient) if g.ndim > 1]
    return sum(squares, start=jnp.zeros([]))


def inforeg(beta: float, modalities: tuple[str, ...]) -> optax.GradientTransformationExtraArgs:
    """InfoReg as a transformation of the whole model's gradient; needs the parameters.

    Its `update` takes `scores` `[M]` (s_m in the order of `modalities`), `begins` `[]`, True in an
    epoch's first step, and optionally `active` `[]` (False leaves the gradient as it is).

    Args:
      beta: how strongly the encoder is held.
      modalities: names; the parameters have `encoder_<m>` and `norm_<m>` for each.
    """

    def init(params: Any) -> Information:
        count = len(modalities)
        start = jax.tree.map(jnp.copy, encoder_parts(params, modalities))
        return Information(start, jnp.zeros(count), jnp.zeros((count, EPOCHS + 1)))

    def begin(state: Information, params: Any) -> Information:
        past = jnp.concatenate([state.past[:, 1:], state.current[:, None]], axis=1)
        start = encoder_parts(params, modalities)
        return Information(start, jnp.zeros_like(state.current), past)

    def update(
        updates: Any,
        state: Information,
        params: Any = None,
        *,
        scores: Array,
        begins: Array,
        active: Array | bool = True,
        **_: Any,
    ) -> tuple[Any, Information]:
        fresh = begin(state, params)
        state = jax.tree.map(lambda new, old: jnp.where(begins, new, old), fresh, state)
        holds = (rise(state.past) > LEAST_RISE) & active
        pulls = jnp.where(holds, strengths(scores, beta), 0.0)
        held = dict(updates)
        for pull, m in zip(pulls, modalities, strict=True):
            held |= jax.tree.map(
                lambda g, now, start, pull=pull: g + pull * (now - start),
                encoder_part(updates, m),
                encoder_part(params, m),
                encoder_part(state.start, m),
            )
        seen = jnp.stack([information(encoder_part(held, m)) for m in modalities])
        return held, state._replace(current=state.current + seen)

    return optax.GradientTransformationExtraArgs(init, update)


def inforeg_baseline(setting: Setting) -> Baseline:
    """InfoReg in a training step."""
    spec = setting.spec

    def loss(state: Any, context: StepContext) -> Array:
        logits = part_logits(context, spec)
        label, here = context.batch["label"], presence(context.out, spec.modalities)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(logits[m], label)
            for m in spec.modalities
        ]
        return jnp.sum(jnp.stack(losses) * here, axis=0)

    def gradient_args(state: Any, context: StepContext) -> dict[str, Any]:
        return {
            "scores": batch_scores(context, spec),
            "begins": context.step % setting.epoch_steps == 0,
            "active": context.step < setting.active_steps,
        }

    return Baseline(
        loss=loss,
        transform=inforeg(setting.config.inforeg_beta, spec.modalities),
        gradient_args=gradient_args,
        whole_batch=True,
    )
