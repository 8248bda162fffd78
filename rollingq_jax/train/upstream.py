"""Upstream's own choices in training, for reproducing its trajectories and for nothing else.

`docs/upstream.md` says why each differs from what this project does by default, and which option
(`config.upstream_compat.*`) puts it back. Upstream's loop is `train_func.py` and `method.py`. Its
schedule is in `optimizer.py`.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.models import ModelSpec
from rollingq_jax.rolling import (
    RollInfo,
    RollingQuery,
    RollingState,
    cosine_scores,
    reset_sums,
    roll,
    scores_and_means,
)
from rollingq_jax.rotation import compose
from rollingq_jax.train.steps import RollRecord, imbalance_on_batch
from rollingq_jax.train.train_state import TrainState


def upstream_scores(out: Mapping[str, Any], weight: Array | None = None) -> Array:
    """Cosine scores `[H, M]` of one batch, from the model's second output.

    Upstream's AIR, and so its trigger and its alpha, come from only an epoch's last batch, in the
    forward pass before that batch's update.

    Args:
      out: holds `query` `[B, H, d]` and `mean_keys` `{m: [B, H, d]}`.
      weight: `[B]`; 0 leaves an example (padding) out.
    """
    mean_keys = _stack(out["mean_keys"])  # [M, B, H, d]
    heads = jax.vmap(functools.partial(cosine_scores, weight=weight), in_axes=(1, 2))
    return jax.lax.stop_gradient(heads(out["query"], mean_keys))


def with_last_batch_scores(roller: RollingQuery) -> RollingQuery:
    """RollingQ that scores by the last batch it has observed; the means stay the window's.

    The trigger and the weights follow from the scores. A batch in which no example has some
    modality has no imbalance, so that it triggers nothing.
    """

    def observe(
        state: Any,
        query: Array,
        mean_keys: Any,
        weight: Any = None,
        axis_name: str | None = None,
    ) -> RollingState:
        window = roller.observe(state, query, mean_keys, weight, axis_name)
        batch = roller.observe(reset_sums(state), query, mean_keys, weight, axis_name)
        scores = batch.cosine_sum / jnp.maximum(batch.weight_sum, 1.0)[:, None]
        scores = jnp.where(jnp.all(batch.weight_sum > 0), scores, 0.0)
        return window._replace(cosine_sum=scores * window.weight_sum[:, None])

    return roller._replace(observe=observe)


def upstream_statistics(
    model: nn.Module, params: Any, rotation: Array | None, batches: Iterable[Mapping[str, Array]]
) -> tuple[Array, Array]:
    """Mean query and mean keys from a whole extra pass, in evaluation mode.

    Upstream averages each batch, then the batches, so that a smaller last batch weighs as much as
    the others. Rows whose `example_mask` is False (padding) are left out of their batch's mean; of
    a modality's mean keys, so are examples, and batches, that lack it; they are 0 where all do.

    Args:
      model: with attention fusion.
      params: its parameters, after the epoch's last update.
      rotation: `[H, d, d]`, or None for the identity.
      batches: an epoch of training batches.

    Returns:
      query `[H, d]`, already rotated, and mean keys `[M, H, d]`; modalities in alphabetical order.

    Raises:
      UserError: there is no batch.
    """
    means = [_batch_means(model, params, rotation, dict(batch)) for batch in batches]
    if not means:
        raise UserError("batches is empty; allowed: at least one batch")
    query = jnp.mean(jnp.stack([query for query, _, _ in means]), axis=0)
    mean_keys = []
    for m in range(means[0][1].shape[0]):
        seen = [keys[m] for _, keys, counts in means if counts[m] > 0] or [means[0][1][m]]
        mean_keys.append(jnp.mean(jnp.stack(seen), axis=0))
    return query, jnp.stack(mean_keys)


def upstream_roll(
    rolling_state: RollingState,
    query: Array,
    mean_keys: Array,
    last_scores: Array,
    *,
    beta: float,
    rho: float,
    max_rotations: int | None,
    method: str = "geodesic",
    joint: bool = False,
    rotation: Array | None = None,
) -> tuple[RollingState, RollInfo]:
    """Upstream's decision at an epoch's end: rolls where |AIR| > beta and rotations are left.

    Args:
      rolling_state: the state; its running sums are neither read nor changed.
      query: `[H, d]`, q_bar of `upstream_statistics`.
      mean_keys: `[M, H, d]`, mu^m of `upstream_statistics`.
      last_scores: `[H, M]`, `upstream_scores` of the epoch's last batch.
      beta: the trigger's threshold.
      rho: sharpness of the rebalance weights; upstream's `sigma`.
      max_rotations: the most a head rolls; upstream's `r_time`. None sets no limit.
      method, joint: see `rolling_query`.
      rotation: `[H, d, d]`, R_new from outside, such as upstream's own SVD (whose directions off
        one line are arbitrary); None makes it by `method`.

    Returns:
      The state with R <- R_new R and the count of the heads that rolled, and what was decided.
    """
    state, info = roll(
        rolling_state,
        query,
        jnp.swapaxes(mean_keys, 0, 1),
        last_scores,
        beta=beta,
        rho=rho,
        max_rotations=max_rotations,
        method=method,
        joint=joint,
    )
    if rotation is None:
        return state, info
    new, _ = compose(jnp.asarray(rotation, jnp.float32), rolling_state.rotation)
    turned = jnp.where(info.rolled[:, None, None], new, rolling_state.rotation)
    return state._replace(rotation=turned), info


def check_upstream_choices(compat: Any, spec: ModelSpec) -> None:
    """Upstream has one fusion layer, one process and no norm bias.

    Raises:
      ConfigError: a choice of `config.upstream_compat` is made with more, or with that bias.
    """
    chosen = [name for name, value in compat.items() if value]

    def refuse(option: str, allowed: str) -> NoReturn:
        raise ConfigError(f"config.upstream_compat.{option} is True; allowed {allowed}")

    def refuse_with(field: str, reason: str) -> NoReturn:
        refuse(chosen[0], f"with model.{field}: False, since upstream has {reason}")

    if compat.statistics_pass and (count := jax.process_count()) > 1:
        own = "each would roll by its own examples"
        refuse("statistics_pass", f"in {count} processes: False, since {own}")
    if compat.statistics_pass and spec.has_batch_stats:
        encoder = "with an encoder of kind 'resnet18'"
        refuse("statistics_pass", f"{encoder}: False, since upstream has no such encoder")
    if chosen and spec.fusion_layers > 1:
        refuse_with(f"fusion_layers {spec.fusion_layers}", "one layer")
    if chosen and spec.uses_class_query and not spec.has_fixed_query:
        refuse_with(f"fusion {spec.fusion!r}", "no such model")
    if chosen and spec.quality_bias:
        refuse_with(f"quality_bias {spec.quality_bias:g}", "no such bias")


def roll_after_epoch(
    experiment: Any, state: TrainState, rotation: Array | None = None
) -> tuple[TrainState, RollRecord]:
    """Upstream's epoch end in the training loop: the extra pass, the trigger, the rotation.

    The scores are those that the state has observed: of the window, or of the last batch, see
    `with_last_batch_scores`.

    Args:
      experiment: the `Experiment`; its batches of the epoch just done are read once more.
      state: after the epoch's last update, on one device.
      rotation: R_new from outside, see `upstream_roll`.

    Returns:
      The state with its rotation, and empty running sums; and what was decided.
    """
    step, rolling, model = int(state.step), state.rolling, experiment.model
    assert rolling is not None  # upstream rolls only with attention fusion
    batches = experiment.batches(step - experiment.epoch_steps, step)
    query, mean_keys = upstream_statistics(model, state.params, rolling.rotation, batches)
    settings = experiment.config.rolling
    rolled, info = upstream_roll(
        rolling,
        query,
        mean_keys,
        scores_and_means(rolling)[0],
        beta=settings.beta,
        rho=settings.rho,
        max_rotations=settings.max_rotations,
        method=settings.method,
        joint=settings.joint,
        rotation=rotation,
    )
    turned = jnp.where(info.rolled[:, None], info.anchor, query)
    ones = jnp.ones([len(mean_keys), 1], jnp.float32)
    before, after = (imbalance_on_batch(q, mean_keys[:, None], ones, None) for q in (query, turned))
    return state.replace(rolling=reset_sums(rolled)), RollRecord(info, query, before, after)


def _stack(by_modality: Mapping[str, Array]) -> Array:
    return jnp.stack([by_modality[m] for m in sorted(by_modality)])


@functools.partial(jax.jit, static_argnums=0)
def _batch_means(
    model: nn.Module, params: Any, rotation: Array | None, batch: Mapping[str, Array]
) -> tuple[Array, Array, Array]:
    """Mean query `[H, d]`, mean keys `[M, H, d]`, and how many examples have a modality, `[M]`."""
    _, out = model.apply({"params": params}, batch, rotation=rotation)
    query, mean_keys = out["query"], _stack(out["mean_keys"])
    real = batch.get("example_mask", jnp.ones(query.shape[0], jnp.bool_))
    has = real[None] & _stack(out["present"])  # [M, B]

    def mean(values: Array, mask: Array) -> Array:
        count = jnp.maximum(jnp.sum(mask, axis=-1), 1).astype(values.dtype)
        total = jnp.sum(jnp.where(mask[..., None, None], values, 0.0), axis=-3)
        return total / count[..., None, None]

    return mean(query, real), mean(mean_keys, has), jnp.sum(has, axis=1)
