"""Modality dropout: in training, an example loses modalities at random.

Each modality of each example is dropped with probability `rate`, independently; an example that
would lose all keeps all. What is dropped is marked in `"<m>_mask"`, as a modality that the example
lacks: its tokens take no attention, and in a static fusion its class token counts as zeros.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.baselines.hooks import Baseline, Batch, Setting


def drop_modalities(
    batch: Batch,
    rng: Array,
    example_index: Array,
    *,
    rate: float | Array,
    modalities: tuple[str, ...],
) -> Batch:
    """The batch with the masks of what is left.

    Args:
      batch: as the model takes it; `"<m>_mask"` may be absent, `[B]` or `[B, L]`.
      rng: the step's key.
      example_index: `[B]` int32, each example's number in the global batch: what an example loses
        depends on it and not on the layout over devices.
      rate: probability that a modality is dropped, one or `[M]`.
      modalities: names.
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(rng, index))(example_index)
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (len(modalities),)))(keys).T
    masks = [batch.get(f"{m}_mask", jnp.ones(example_index.shape, jnp.bool_)) for m in modalities]
    present = jnp.stack([m if m.ndim == 1 else jnp.any(m, axis=1) for m in masks])
    kept = kept | ~jnp.any(kept & present, axis=0)[None]
    return batch | {
        f"{m}_mask": mask & (keep if mask.ndim == 1 else keep[:, None])
        for m, mask, keep in zip(modalities, masks, kept, strict=True)
    }


def modality_dropout_baseline(setting: Setting) -> Baseline:
    """Modality dropout in a training step."""
    rate, modalities = setting.config.drop_rate, setting.spec.modalities

    def change_batch(state: Any, batch: Batch, rng: Array, example_index: Array) -> Batch:
        return drop_modalities(batch, rng, example_index, rate=rate, modalities=modalities)

    return Baseline(change_batch=change_batch)
