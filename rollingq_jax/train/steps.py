"""One training step and one evaluation step, as pure functions of state and batch.

They run on a whole batch, where `axis_name` is None, or mapped over the devices' shares of it,
where it names the mapped axis; `parallel.py` maps them under jit or pmap.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax.analysis.metrics import class_probabilities
from rollingq_jax.baselines.hooks import NO_BASELINE, Baseline, Seen
from rollingq_jax.rolling import (
    RollInfo,
    RollingQuery,
    RollingState,
    imbalance_of_known,
    scores_and_means,
)
from rollingq_jax.rotation import dot, normalize
from rollingq_jax.train.metrics import (
    Sums,
    batch_sums,
    cross_entropy,
    example_weight,
    modality_weight,
    psum,
)
from rollingq_jax.train.numerics import NONFINITE, choose_finite, nonfinite_flags
from rollingq_jax.train.state import TrainState

Batch = dict[str, Array]


class RollSchedule(NamedTuple):
    """When sums are taken and when the trigger is checked, in steps.

    Attributes:
      period: the trigger is checked after every `period` steps.
      window: sums are taken in the last `window` steps of a period.
    """

    period: int
    window: int

    @classmethod
    def from_fraction(cls, period: int, fraction: float) -> "RollSchedule":
        """The last `fraction` of the period, at least one step."""
        return cls(period, min(period, max(1, round(fraction * period))))

    def observes(self, step: Array) -> Array:
        """Whether step number `step` (from 0) lies in a window."""
        return step % self.period >= self.period - self.window

    def checks(self, step: Any) -> Any:
        """Whether the trigger is checked after step number `step`."""
        return step % self.period == self.period - 1


class Roll(NamedTuple):
    """What a check of the trigger saw; all zeros, `rolled` too, where there was none."""

    info: RollInfo
    query: Array  # [H, d_h] before the rotation, see `current_query`
    imbalance_before: Array  # [H], over this step's batch, under the old rotation
    imbalance_after: Array  # [H], over the same keys, under the new one


def example_positions(batch: Batch, axis_name: str | None) -> Array:
    """`[B]` int32, each row's position in the global batch, whatever the layout over devices."""
    size = batch["label"].shape[0]
    positions = jnp.arange(size, dtype=jnp.int32)
    return positions if axis_name is None else positions + size * jax.lax.axis_index(axis_name)


def step_key(state: TrainState) -> Array:
    """The key of one step."""
    return jax.random.fold_in(state.rng, state.step)


def what_is_seen(
    params: Any, out: dict[str, Any], state: TrainState, batch: Batch, axis_name: str | None
) -> Seen:
    """What a step knows after its forward pass, for a method of comparison."""
    rng = jax.random.fold_in(step_key(state), 1)
    reduce = functools.partial(psum, axis_name=axis_name)
    return Seen(params, out, batch, example_weight(batch), state.step, rng, reduce)


def loss_sums(
    model: Any,
    params: Any,
    state: TrainState,
    batch: Batch,
    axis_name: str | None,
    baseline: Baseline = NO_BASELINE,
) -> tuple[Array, tuple[Array, dict[str, Any]]]:
    """Cross-entropy of the main head plus that of each probe, divided by the global weight.

    The probes see stopped gradients, so they add nothing to the encoders' gradient. A method of
    comparison may add a loss of its own.
    """
    weight = example_weight(batch)
    logits, out = model.apply(
        {"params": params},
        batch,
        rotation=state.rotation,
        train=True,
        example_index=example_positions(batch, axis_name),
        rngs={"dropout": step_key(state)},
    )
    losses = cross_entropy(logits, batch["label"])
    if model.spec.fusion != "unimodal":  # there the probe is the main head
        for probe in out["probe_logits"].values():
            losses = losses + cross_entropy(probe, batch["label"])
    seen = what_is_seen(params, out, state, batch, axis_name)
    losses = losses + baseline.loss(state.baseline, seen)
    total = psum(jnp.sum(weight), axis_name)
    return jnp.sum(losses * weight) / total, (logits, out)


def stacked_keys(out: dict[str, Any]) -> Array:
    """`[M, B, H, d_h]`, the mean keys in the order of the modalities."""
    return jnp.stack([out["mean_keys"][m] for m in sorted(out["mean_keys"])])


def current_query(model: Any, params: Any, rolling: RollingState) -> Array:
    """The class queries of all fusion layers at the moment of a roll, `[n H, d_h]`, rotated.

    The first layer's follows from the parameters alone, so that R_new q = q_b holds for every
    sample. Those above depend on the sample: for them it is the mean query of the window, from
    before the last updates, and R_new q = q_b holds for that mean.
    """
    first = model.apply({"params": params}, rolling.rotation, method="class_query")
    observed = scores_and_means(rolling)[2]
    return jnp.concatenate([first, observed[len(first) :]])


def batch_imbalance(query: Array, mean_keys: Array, weight: Array, axis_name: str | None) -> Array:
    """Imbalance of the class query `[H, d_h]` over one global batch -> `[H]`.

    `mean_keys` is `[M, B, H, d_h]`, `weight` `[M, B]`. Over the modalities that an example has; NaN
    for fewer than two.
    """
    cosines = dot(normalize(query)[None, None], normalize(mean_keys))
    sums = jnp.sum(jnp.where(weight[..., None] > 0, cosines, 0.0) * weight[..., None], axis=1)
    sums, total = psum((sums, jnp.sum(weight, axis=1)), axis_name)
    known = total > 0
    found = imbalance_of_known((sums / jnp.maximum(total, 1.0)[:, None]).T, known[None])
    return jnp.where(jnp.sum(known) > 1, found, jnp.nan)


def batch_scores(sums: Sums) -> Array:
    """c^m of one batch, `[H, M]`, from its sums; NaN, which triggers nothing, where no example has
    the modality."""
    names = sorted(name for name in sums if name.startswith("cosine/"))
    counts = [sums[name.replace("cosine", "attended")] for name in names]
    columns = [
        jnp.where(count > 0, sums[name] / jnp.maximum(count, 1.0), jnp.nan)
        for name, count in zip(names, counts, strict=True)
    ]
    return jnp.stack(columns, axis=-1)


def replace_scores(rolling: RollingState, scores: Array) -> RollingState:
    """A state that observed the same mean keys, and `scores` `[H, M]` instead of its own.

    For upstream's choice, which takes keys from an epoch and scores from its last batch.
    """
    mean_keys = jnp.swapaxes(scores_and_means(rolling)[1], 0, 1)
    ones = jnp.ones_like(rolling.weight_sum)
    return rolling._replace(key_sum=mean_keys, cosine_sum=scores.T, weight_sum=ones)


def make_train_step(
    model: Any,
    tx: optax.GradientTransformation,
    roller: RollingQuery,
    schedule: RollSchedule | None,
    *,
    check: bool = True,
    last_batch_scores: bool = False,
    baseline: Baseline = NO_BASELINE,
    skip_nonfinite: bool = False,
) -> Callable[..., tuple[TrainState, Sums, Roll | None]]:
    """The training step of a model.

    Args:
      model: from `build_model`.
      tx: the optimiser.
      roller: from `rolling_query`.
      schedule: when to observe and to roll; None leaves the rolling state as it is.
      check: whether the step checks the trigger; False leaves that to the caller (`upstream.py`).
      last_batch_scores: the trigger and the weights use this batch's scores, not the window's.
      baseline: what a method of comparison adds; its `transform` is part of `tx` already.
      skip_nonfinite: a step whose loss or gradient is not finite changes the step number alone, and
        its sums are 0.

    Returns:
      `train_step(state, batch, axis_name=None) -> (state, sums, roll)`: the sums are the global
      batch's, from the parameters before the update; `roll` is None where the step does not check.
      `sums["nonfinite"]` says whether loss and gradient were finite (see `numerics.py`); what
      follows from a step that was not is never to be saved.
    """

    def trigger(
        rolling: RollingState, params: Any, out: dict[str, Any], sums: Sums, weight, axis_name
    ):
        """The check, with the query as it is now: after the update, under the old rotation."""
        query = current_query(model, params, rolling)
        keys = stacked_keys(out)
        if last_batch_scores:
            rolling = replace_scores(rolling, batch_scores(sums))
        rolled, info = roller.update(rolling, query)
        turned = jnp.where(info.rolled[:, None], info.anchor, query)
        before, after = (batch_imbalance(q, keys, weight, axis_name) for q in (query, turned))
        return rolled, Roll(info, query, before, after)

    def train_step(state: TrainState, batch: Batch, axis_name: str | None = None):
        batch = baseline.change_batch(
            batch, jax.random.fold_in(step_key(state), 2), example_positions(batch, axis_name)
        )

        def loss_fn(params):
            return loss_sums(model, params, state, batch, axis_name, baseline)

        (loss, (logits, out)), gradient = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        loss, gradient = psum((loss, gradient), axis_name)
        flags = nonfinite_flags(loss, gradient)
        finite = ~jnp.any(flags) if skip_nonfinite else True
        seen = what_is_seen(state.params, out, state, batch, axis_name)
        extra = baseline.gradient_args(state.baseline, seen)
        updates, opt_state = tx.update(gradient, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        params, opt_state, method = choose_finite(
            finite,
            (params, opt_state, baseline.update(state.baseline, seen)),
            (state.params, state.opt_state, state.baseline),
        )
        sums = psum(batch_sums(logits, out, batch), axis_name)
        sums = choose_finite(finite, sums, jax.tree.map(jnp.zeros_like, sums))
        rolling, roll = state.rolling, None
        if schedule is not None:
            weight = modality_weight(out, example_weight(batch))
            counted = weight * (schedule.observes(state.step) & finite).astype(weight.dtype)
            rolling = roller.observe(rolling, out["query"], stacked_keys(out), counted, axis_name)
        if schedule is not None and check:

            def due(rolling):
                return trigger(rolling, params, out, sums, weight, axis_name)

            nothing = jax.tree.map(
                lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(due, rolling)[1]
            )
            rolling, roll = jax.lax.cond(
                schedule.checks(state.step), due, lambda rolling: (rolling, nothing), rolling
            )
        sums[NONFINITE] = flags
        state = state.replace(
            step=state.step + 1,
            params=params,
            opt_state=opt_state,
            rolling=rolling,
            baseline=method,
        )
        return state, sums, roll

    return train_step


def make_eval_step(model: Any) -> Callable[..., tuple[Sums, dict[str, Array]]]:
    """The evaluation step of a model.

    Returns:
      `eval_step(params, rotation, batch, axis_name=None) -> (sums, examples)`: the global batch's
      sums, and row by row `probabilities` `[B, C]` (NaN where a logit is not finite), `present`
      `[B, M]` and, with a class query, `attention_share` and `mean_keys/<m>` (first head, `[B, M]`
      and `[B, d_h]`).
    """

    def eval_step(params: Any, rotation: Array | None, batch: Batch, axis_name: str | None = None):
        logits, out = model.apply({"params": params}, batch, rotation=rotation)
        sums = psum(batch_sums(logits, out, batch), axis_name)
        present = jnp.stack([out["present"][m] for m in sorted(out["present"])], axis=-1)
        examples = {"probabilities": class_probabilities(logits), "present": present}
        if "attention_share" in out:
            shares = [jnp.mean(out["attention_share"][m], axis=1) for m in sorted(out["mean_keys"])]
            examples["attention_share"] = jnp.stack(shares, axis=-1)
            examples |= {f"mean_keys/{m}": out["mean_keys"][m][:, 0] for m in out["mean_keys"]}
        return sums, examples

    return eval_step
