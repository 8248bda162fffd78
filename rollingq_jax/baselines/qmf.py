"""QMF's ranking loss: a modality is to be surer of the examples that it has learned more easily.

Zhang et al., "Provable Dynamic Fusion for Low-Quality Multimodal Data" (ICML 2023), with the fusion
"qmf" (`models.DynamicFusion`). With kappa_i^m the cross-entropy CE(z_m) of example i added up over
the training so far, scaled to [0, 1] by the least and the largest of all examples, w_i^m =
logsumexp(z_m) / 10 and j the example after i in the batch, the first after the last,

    loss = CE(z) + sum_m CE(z_m) + weight sum_m relu(t (w_i - w_j) + |kappa_i - kappa_j|),
    t = sign(kappa_i - kappa_j)

The released code subtracts |kappa_i - kappa_j|, a margin that then relaxes the order instead of
enforcing it, and divides by 0 as long as all kappa are equal; here the term is 0 then, so all
through the first epoch. `weight` is 1 in the authors' runs on image and text, .1 on RGB-D.
"""

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.baselines.hooks import EXAMPLE_NUMBER, Baseline, Setting, StepContext, presence
from rollingq_jax.errors import ConfigError
from rollingq_jax.models.fusion import energy


def scaled_history(total: Array) -> Array:
    """kappa, `[M, N]` in [0, 1], from the losses added up, `[M, N]`; 0 where all are equal."""
    low = jnp.min(total, axis=1, keepdims=True)
    spread = jnp.max(total, axis=1, keepdims=True) - low
    return (total - low) / jnp.where(spread > 0, spread, 1.0)


def ranking_loss(sure: Array, other_sure: Array, hard: Array, other_hard: Array) -> Array:
    """relu(t (w_i - w_j) + |kappa_i - kappa_j|) from w_i, w_j, kappa_i, kappa_j, all `[M, B]`."""
    gap = hard - other_hard
    return jax.nn.relu(jnp.sign(gap) * (sure - other_sure) + jnp.abs(gap))


def following(context: StepContext, values: Array) -> Array:
    """`[..., B]`, those of the next example in the batch over all devices, the first's at last."""
    place = context.batch["example_index"]
    size = place.shape[0] * context.reduce(1)
    everyone = jnp.zeros((*values.shape[:-1], size), values.dtype).at[..., place].set(values)
    return context.reduce(everyone)[..., (place + 1) % size]


def qmf_baseline(setting: Setting) -> Baseline:
    """The ranking loss in a training step; its state is the losses added up, `[M, N]`.

    Raises:
      ConfigError: the fusion is another.
    """
    modalities = setting.spec.modalities
    if setting.spec.fusion != "qmf":
        raise ConfigError(
            f"config.baseline.name is 'qmf', which ranks the weights of that fusion, and "
            f"config.model.fusion is {setting.spec.fusion!r}; allowed: qmf"
        )

    def logits(context: StepContext) -> Array:
        return jnp.stack([context.out["probe_logits"][m] for m in modalities])

    def loss(state: Array, context: StepContext) -> Array:
        numbers = context.batch[EXAMPLE_NUMBER]
        sure, hard = energy(logits(context)), scaled_history(state)[:, numbers]
        counts = presence(context.out, modalities) * context.weight[None]
        counts = counts * following(context, counts)
        pairs = ranking_loss(sure, following(context, sure), hard, following(context, hard))
        return setting.config.qmf_weight * jnp.sum(pairs * counts, axis=0)

    def update(state: Array, context: StepContext) -> Array:
        losses = jax.vmap(optax.softmax_cross_entropy_with_integer_labels, (0, None))
        found = losses(logits(context), context.batch["label"])
        found = found * presence(context.out, modalities) * context.weight[None]
        added = jnp.zeros_like(state).at[:, context.batch[EXAMPLE_NUMBER]].add(found)
        return state + context.reduce(added)

    return Baseline(
        init=lambda params, examples: jnp.zeros((len(modalities), examples)),
        loss=loss,
        update=update,
        whole_batch=True,
        example_numbers=True,
    )
