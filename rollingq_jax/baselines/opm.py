"""OPM: in training, examples lose the modality that is ahead, the more often the further it is.

Wei et al., "On-the-fly Modulation for Balanced Multimodal Learning" (TPAMI 2024). With the scores
s_m = sum_b softmax(z_m)[b, y_b] of the step before,

    rho_m = s_m / mean_{n != m} s_n
    q_m = min(1, base (1 + lambda tanh(rho_m - 1))) if rho_m > 1, else 0

and with probability `chance` a batch is changed: each of its examples loses modality m with
probability q_m; one that would lose all keeps all.

z_m is the modality's part in the head of concat or sum, elsewhere u_m, the answer of the fusion
that sees m only. The authors take the scores from a pass before the step's own, and multiply all
features of a changed batch by a constant for what was dropped; here what is dropped is marked as
missing (see `modality_dropout`), so that attention's weights still sum to 1 and nothing is scaled.
"""

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.alone import part_logits
from rollingq_jax.baselines.hooks import Baseline, Batch, StepContext
from rollingq_jax.baselines.modality_dropout import drop_modalities
from rollingq_jax.baselines.ogm import modality_scores
from rollingq_jax.models.spec import ModelSpec


def drop_rates(scores: Array, base: float, strength: float) -> Array:
    """q_m, `[M]`, from s_m `[M]`."""
    others = (jnp.sum(scores) - scores) / (scores.shape[0] - 1)
    ahead = scores / jnp.maximum(others, 1e-12)
    rates = jnp.minimum(base * (1 + strength * jnp.tanh(ahead - 1)), 1.0)
    return jnp.where(ahead > 1, rates, 0.0)


def opm_baseline(
    spec: ModelSpec,
    base: float,
    strength: float,
    chance: float,
    *,
    start_step: int,
    active_steps: int,
) -> Baseline:
    """OPM in a training step; its state is q_m `[M]` for the next.

    Args:
      spec: of the model.
      base, strength: of q_m.
      chance: that a batch is changed.
      start_step, active_steps: the steps between which batches are.
    """

    def change_batch(state: Array, batch: Batch, rng: Array, example_index: Array) -> Batch:
        batch_rng, rng = jax.random.split(rng)
        rates = jnp.where(jax.random.bernoulli(batch_rng, chance), state, 0.0)
        return drop_modalities(batch, rng, example_index, rate=rates, modalities=spec.modalities)

    def update(state: Array, context: StepContext) -> Array:
        logits = part_logits(context, spec)
        scores = modality_scores(logits, context.batch["label"], context.weight)
        rates = drop_rates(context.reduce(scores), base, strength)
        following = context.step + 1
        return jnp.where((start_step <= following) & (following < active_steps), rates, 0.0)

    return Baseline(
        init=lambda *_: jnp.zeros(len(spec.modalities)),
        change_batch=change_batch,
        update=update,
        whole_batch=True,
    )
