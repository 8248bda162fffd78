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

from rollingq_jax.baselines.hooks import Baseline, Batch, Setting, StepContext, mean_of_others
from rollingq_jax.baselines.modality_dropout import drop_modalities
from rollingq_jax.baselines.ogm import batch_scores


def drop_rates(scores: Array, base: float, strength: float) -> Array:
    """q_m, `[M]`, from s_m `[M]`."""
    ahead = scores / jnp.maximum(mean_of_others(scores), 1e-12)
    rates = jnp.minimum(base * (1 + strength * jnp.tanh(ahead - 1)), 1.0)
    return jnp.where(ahead > 1, rates, 0.0)


def opm_baseline(setting: Setting) -> Baseline:
    """OPM in a training step; its state is q_m `[M]` for the next."""
    config, modalities = setting.config, setting.spec.modalities

    def change_batch(state: Array, batch: Batch, rng: Array, example_index: Array) -> Batch:
        batch_rng, rng = jax.random.split(rng)
        changed = jax.random.bernoulli(batch_rng, config.opm_chance)
        rates = jnp.where(changed, state, 0.0)
        return drop_modalities(batch, rng, example_index, rate=rates, modalities=modalities)

    def update(state: Array, context: StepContext) -> Array:
        scores = batch_scores(context, setting.spec)
        rates = drop_rates(scores, config.opm_base, config.opm_strength)
        following = context.step + 1
        active = (setting.start_step <= following) & (following < setting.active_steps)
        return jnp.where(active, rates, 0.0)

    return Baseline(
        init=lambda *_: jnp.zeros(len(modalities)),
        change_batch=change_batch,
        update=update,
        whole_batch=True,
    )
