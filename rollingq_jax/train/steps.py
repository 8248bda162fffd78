"""The training step and the evaluation step, as pure functions of state and batch.

They run on a whole batch, where `axis_name` is None, or mapped over the devices' shares of it,
where it names the mapped axis; `parallel.py` maps them under jit or pmap. Everything that is summed
over examples is summed over the axis, so that a step means the same in every layout.

Metrics are sums over examples, divided once at the end. A padding row has weight 0, so every
example counts once however the data are batched. Metrics of one modality (its probe, cosine,
attention share) are summed over the examples that have it. An example that has none still gets an
answer of the main head, which counts in the accuracy and the loss, and counts nowhere else. Logits
that are NaN or infinite are an answer to no example: it is counted as wrong, and left out of the
losses, the cosines and the shares.
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rollingq_jax import quality
from rollingq_jax.analysis.tasks import METRICS, SINGLE, Task, cross_entropy
from rollingq_jax.baselines.hooks import Baseline, StepContext, probability_of_label
from rollingq_jax.data.dataset import KEPT
from rollingq_jax.models.resnet import BATCH_STATS
from rollingq_jax.rolling import (
    RollInfo,
    RollingQuery,
    RollingState,
    imbalance_of_known,
    scores_and_means,
)
from rollingq_jax.rotation import dot, normalize
from rollingq_jax.train.train_state import TrainState, update_ema

Batch = dict[str, Array]
Sums = dict[str, Array]
AxisName = str | tuple[str, ...] | None
NONFINITE = "nonfinite"  # among the sums of a step
EXAMPLE_INDEX = "example_index"  # among the arrays of a batch: positions in the global batch
LOSS_WEIGHT = "loss_weight"  # likewise: of each example in the mean loss


class RollSchedule(NamedTuple):
    """The steps in which sums are taken, and after which the trigger is checked.

    Attributes:
      period: the trigger is checked after every `period` steps.
      window: sums are taken in the last `window` steps of a period.
      in_step: whether the step checks the trigger; False leaves that to the caller (`upstream.py`).
    """

    period: int
    window: int
    in_step: bool = True

    @classmethod
    def from_fraction(cls, period: int, fraction: float, in_step: bool = True) -> "RollSchedule":
        """The last `fraction` of the period, at least one step."""
        return cls(period, min(period, max(1, round(fraction * period))), in_step)

    def in_window(self, step: Any) -> Any:
        """Tells if step number `step` (from 0) lies in a window."""
        return step % self.period >= self.period - self.window

    def is_due(self, step: Any) -> Any:
        """Tells if the trigger is checked in step number `step`, after its update."""
        return (step % self.period == self.period - 1) & self.in_step


class RollRecord(NamedTuple):
    """One check of the trigger; where none was due, `info.rolled` is False and the rest is idle."""

    info: RollInfo
    query: Array  # [H, d_h] before the rotation, see `class_query_after_update`
    imbalance_before: Array  # [H], over this step's batch, under the old rotation
    imbalance_after: Array  # [H], over the same keys, under the new one


class ForwardPass(NamedTuple):
    """Everything that a loss function returns beside the losses.

    Attributes:
      logits: `[B, C]`.
      out: the model's second output.
      main: `[B]`, the main head's part of the losses.
      baseline: next state of a method of comparison.
      tx_args: extra arguments of `tx.update`.
      batch_stats: next running averages of the encoders; None where there are none.
    """

    logits: Array
    out: dict[str, Any]
    main: Array
    baseline: Any
    tx_args: dict[str, Any]
    batch_stats: Any = None


LossFn = Callable[..., tuple[Array, ForwardPass]]
LossOfOutputs = Callable[[Array, Array], Array]  # [B, C], label -> [B]
GradientFn = Callable[..., tuple[tuple[Array, Any], ForwardPass]]


def psum(tree: Any, axis_name: AxisName) -> Any:
    """Sum over the replicas of a mapped axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def supervised_loss(
    model: Any,
    params: Any,
    state: TrainState,
    batch: Batch,
    axis_name: AxisName = None,
    loss: LossOfOutputs = cross_entropy,
) -> tuple[Array, ForwardPass]:
    """Loss of the main head plus that of each probe, `[B]`, from a forward pass.

    The probes see stopped gradients, so they add nothing to the encoders' gradient; those of a
    dynamic fusion are its heads and do, and the confidences that one has learn beside them. `loss`
    is the task's, or one of smoothed labels; what is reported is the task's in any case.
    """
    forward = functools.partial(
        model.apply,
        quality.model_variables(params, state.quality, state.batch_stats),
        batch,
        rotation=state.rotation,
        train=True,
        example_index=batch[EXAMPLE_INDEX],
        rngs={"dropout": step_key(state)},
    )
    if state.batch_stats is None:
        (logits, out), batch_stats = forward(), None
    else:
        (logits, out), changed = forward(axis_name=axis_name, mutable=[BATCH_STATS])
        batch_stats = changed[BATCH_STATS]
    main = losses = loss(logits, batch["label"])
    if model.spec.fusion != "unimodal":  # there the probe is the main head
        for probe in out["probe_logits"].values():
            losses = losses + loss(probe, batch["label"])
    for m, confidence in out.get("confidence", {}).items():  # PDF's: of its true class
        right = jax.lax.stop_gradient(probability_of_label(out["probe_logits"][m], batch["label"]))
        losses = losses + jnp.abs(confidence - right) * out["present"][m].astype(losses.dtype)
    return losses, ForwardPass(logits, out, main, state.baseline, {}, batch_stats)


def with_baseline(
    loss_fn: LossFn, baseline: Baseline, loss: LossOfOutputs = cross_entropy
) -> LossFn:
    """The loss function with the batch, the losses and the state of a method of comparison.

    `loss` is the task's, for losses that the method adds.
    Its gradient transformation, if it has one, is chained before `tx` where that is made. A
    gradient apart that is not finite makes the losses so: then the step counts as any such step.
    """

    def wrapped(model, params, state, batch, axis_name=None):
        rng = jax.random.fold_in(step_key(state), 2)
        batch = baseline.change_batch(state.baseline, batch, rng, batch[EXAMPLE_INDEX])

        def run(params):
            losses, forward = loss_fn(model, params, state, batch, axis_name)
            context = step_context(model, params, forward, state, batch, axis_name, loss)
            return losses, forward, context

        losses, forward, context = run(params)
        losses = losses + baseline.loss(state.baseline, context)
        still = jax.lax.stop_gradient((params, forward))
        context = step_context(model, *still, state, batch, axis_name, loss)
        tx_args = baseline.gradient_args(state.baseline, context)
        if baseline.apart is not None:

            def mean_apart(params):
                context, weight = run(params)[2], batch[LOSS_WEIGHT]
                total = context.reduce(jnp.sum(weight))
                return jnp.sum(baseline.apart(state.baseline, context) * weight) / total

            apart = context.reduce(jax.grad(mean_apart)(context.params))
            finite = ~jnp.any(nonfinite_flags(jnp.zeros([]), apart))
            losses, tx_args = jnp.where(finite, losses, jnp.nan), tx_args | {"apart": apart}
        return losses, forward._replace(
            baseline=baseline.update(state.baseline, context), tx_args=tx_args
        )

    return wrapped


def loss_and_gradient(
    losses_of: Callable[..., tuple[Array, ForwardPass]],
    state: TrainState,
    batch: Batch,
    weight: Array,
    axis_name: AxisName = None,
    reduce: Callable[[Any, AxisName], Any] = psum,
    micro_batches: int = 1,
) -> tuple[tuple[Array, Any], ForwardPass]:
    """Mean loss over the global batch and its gradient, and what the forward pass gave.

    Args:
      losses_of: `(params, state, batch, axis_name) -> (losses [B], ForwardPass)`.
      state: the state before; the gradient is that in `state.params`.
      batch: as in `train_step`, with `EXAMPLE_INDEX` `[B]`.
      weight: `[B]`, 0 for padding.
      axis_name: mapped axis over which the batch is divided.
      reduce: sums `(loss, gradient)` over it.
      micro_batches: n > 1 takes the rows i, i + n, ... for each i < n one after the other and adds
        up: intermediates need memory for B / n rows. The losses must be of each example alone,
        but for the averages of resnet18 encoders, which are then over each part; the running ones
        move to the parts' mean. `tokens`, which are large, are left out of `out`.
    """
    total_weight = psum(jnp.sum(weight), axis_name)

    def mean_loss(params, batch, weight):
        losses, forward = losses_of(params, state, batch, axis_name)
        return jnp.sum(losses * weight) / total_weight, forward

    gradient = jax.value_and_grad(mean_loss, has_aux=True)
    if micro_batches == 1:
        (loss, forward), grads = gradient(state.params, batch, weight)
        return reduce((loss, grads), axis_name), forward

    def add(total, part):
        (loss, forward), grads = gradient(state.params, *part)
        out = {name: value for name, value in forward.out.items() if name != "tokens"}
        return jax.tree.map(jnp.add, total, (loss, grads)), forward._replace(out=out)

    # In strides, so that a device's rows stay with it where one program sees the global batch.
    parts = jax.tree.map(
        lambda x: jnp.swapaxes(x.reshape(-1, micro_batches, *x.shape[1:]), 0, 1), (batch, weight)
    )
    zero = jax.tree.map(jnp.zeros_like, (total_weight, state.params))
    total, forward = jax.lax.scan(add, zero, parts)
    batch_stats = jax.tree.map(lambda x: jnp.mean(x, axis=0), forward.batch_stats)
    forward = jax.tree.map(
        lambda x: jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:]),
        forward._replace(batch_stats=None),
    )._replace(batch_stats=batch_stats)
    return reduce(total, axis_name), forward


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: Any,
    tx: optax.GradientTransformation,
    roller: RollingQuery,
    schedule: RollSchedule | None,
    loss_fn: LossFn = supervised_loss,
    task: Task = SINGLE,
    skip_nonfinite: bool = False,
    ema_decay: float = 0.0,
    class_weights: Array | None = None,
    micro_batches: int = 1,
    axis_name: str | None = None,
    gradient_fn: GradientFn = loss_and_gradient,
) -> tuple[TrainState, Sums, RollRecord | None]:
    """One optimizer step; RollingQ observes in the window and may roll at the period's end.

    Args:
      state: the state before.
      batch: with "label" `[B]`, or as the task has it, and, where there is padding, "example_mask"
        `[B]`.
      model: from `build_model`.
      tx: the optimizer.
      roller: from `rolling_query`.
      schedule: when to observe and to roll; None leaves the rolling state as it is.
      loss_fn: `(model, params, state, batch, axis_name) -> (losses [B], ForwardPass)`.
      task: says what is reported.
      skip_nonfinite: a step whose loss or gradient is not finite changes only the step number and
        counts, and its sums are 0.
      ema_decay: of the average of the parameters, where the state has one.
      class_weights: `[C]`, all > 0; the loss is then sum_i w_i L_i / sum_i w_i with the weight of
        each example's label. What is reported is not weighted.
      micro_batches: parts in which the rows are taken, see `loss_and_gradient`.
      axis_name: mapped axis over which the batch is divided.
      gradient_fn: `loss_and_gradient`, or a function of the same arguments that lays it out over
        devices; the rest of the step then sees whole arrays, wherever their parts are.

    Returns:
      The state after; the global batch's sums, from the parameters before the update, with
      `"nonfinite"`, which says whether loss and gradient were finite (see `nonfinite_flags`); what
      a check of the trigger saw, None without a schedule. A state that follows from a step that was
      not finite is never to be saved.
    """
    batch = {**batch, EXAMPLE_INDEX: example_positions(batch, axis_name)}
    weight = loss_weight = example_weight(batch)
    if class_weights is not None:
        loss_weight = weight * class_weights[batch["label"]]
    batch[LOSS_WEIGHT] = loss_weight
    losses_of = functools.partial(loss_fn, model)
    (loss, grads), forward = gradient_fn(
        losses_of, state, batch, loss_weight, axis_name, micro_batches=micro_batches
    )
    flags = nonfinite_flags(loss, grads)
    finite = ~jnp.any(flags) if skip_nonfinite else True
    tx = optax.with_extra_args_support(tx)
    updates, opt_state = tx.update(grads, state.opt_state, state.params, **forward.tx_args)
    params = optax.apply_updates(state.params, updates)
    ema = state.ema
    if ema is not None:
        ema = update_ema(ema, params, state.step + 1, ema_decay)
    params, opt_state, baseline, ema, batch_stats = select_if_finite(
        finite,
        (params, opt_state, forward.baseline, ema, forward.batch_stats),
        (state.params, state.opt_state, state.baseline, state.ema, state.batch_stats),
    )
    sums = psum(batch_sums(forward.logits, forward.out, batch, task), axis_name)
    sums = select_if_finite(finite, sums, jax.tree.map(jnp.zeros_like, sums))
    sums[NONFINITE] = flags

    rolling, record = state.rolling, None
    if schedule is not None:
        assert rolling is not None  # a schedule is made only for a model with class queries
        # RollingQ observes what the forward pass has computed. Outside the window weights are 0.
        keys = stack_mean_keys(forward.out)
        present = modality_weight(forward.out, weight)
        counted = present * (schedule.in_window(state.step) & finite).astype(weight.dtype)
        rolling = roller.observe(rolling, forward.out["query"], keys, counted, axis_name)
        # The query is that of the new parameters, so that R_new q = q_b holds exactly after the
        # step; the rotation is still the old one.
        query = class_query_after_update(model, params, rolling)
        rolling, info = roller.update(rolling, query, when=schedule.is_due(state.step))
        turned = jnp.where(info.rolled[:, None], info.anchor, query)
        before, after = (imbalance_on_batch(q, keys, present, axis_name) for q in (query, turned))
        record = RollRecord(info, query, before, after)

    norms = state.quality
    if norms is not None:
        measured = jnp.stack([x for _, x in sorted(forward.out["quality_signal"].items())])
        counted = modality_weight(forward.out, weight) * jnp.asarray(finite, weight.dtype)
        norms = quality.observe(norms, measured, counted, axis_name)

    state = state.replace(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        rolling=rolling,
        baseline=baseline,
        quality=norms,
        ema=ema,
        batch_stats=batch_stats,
    )
    return state, sums, record


def eval_step(
    variables: Any,
    rotation: Array | None,
    batch: Batch,
    *,
    model: Any,
    task: Task = SINGLE,
    axis_name: AxisName = None,
) -> tuple[Sums, dict[str, Array]]:
    """The global batch's sums, and each example's outputs.

    Returns:
      The sums, also of `uniform_share/<m>` and, with a class query, of the mean keys k,
      `key_sum/<m>` `[H, d_h]`, and of |k|^2, `key_square/<m>` `[H]`. And row by row
      `probabilities` `[B, C]`, the task's answers (NaN where a logit is not finite), `present`
      `[B, M]`, where the modalities have shares `attention_share` and `uniform_share` `[B, M]`,
      and with a class query `mean_keys/<m>` of the first head, `[B, d_h]`. Where the main metric is
      no mean over examples, `probe/<m>` `[B, C]`, the probes' answers.
    """
    logits, out = model.apply(variables, batch, rotation=rotation)
    sums = batch_sums(logits, out, batch, task)
    answered = finite_rows(logits).astype(jnp.float32)
    counts = modality_weight(out, example_weight(batch) * answered)
    if "uniform_share" in out:
        even = jnp.stack([out["uniform_share"][m] for m in sorted(out["uniform_share"])])
        totals = jnp.sum(even * counts, axis=1)
        sums |= {f"uniform_share/{m}": totals[i] for i, m in enumerate(sorted(out["present"]))}
    for (m, keys), counted in zip(sorted(out.get("mean_keys", {}).items()), counts, strict=False):
        keys = jnp.where(counted[:, None, None] > 0, keys, 0.0)
        sums[f"key_sum/{m}"] = jnp.einsum("b,bhd->hd", counted, keys)
        sums[f"key_square/{m}"] = jnp.einsum("b,bh->h", counted, dot(keys, keys))
    sums = psum(sums, axis_name)
    present = jnp.stack([out["present"][m] for m in sorted(out["present"])], axis=-1)
    examples = {"probabilities": task.answer(logits), "present": present}
    if task.main not in sums:
        examples |= {f"probe/{m}": task.answer(z) for m, z in out["probe_logits"].items()}
    if "attention_share" in out:
        shares = [jnp.mean(out["attention_share"][m], axis=1) for m in sorted(out["present"])]
        examples["attention_share"] = jnp.stack(shares, axis=-1)
        if "uniform_share" in out:
            examples["uniform_share"] = even.T
    examples |= {f"mean_keys/{m}": keys[:, 0] for m, keys in out.get("mean_keys", {}).items()}
    return sums, examples


def step_key(state: TrainState) -> Array:
    """The key of one step."""
    return jax.random.fold_in(state.rng, state.step)


def example_positions(batch: Batch, axis_name: AxisName) -> Array:
    """`[B]` int32, each row's position in the global batch, whatever the layout over devices."""
    size = batch["label"].shape[0]
    positions = jnp.arange(size, dtype=jnp.int32)
    return positions if axis_name is None else positions + size * jax.lax.axis_index(axis_name)


def step_context(
    model: Any,
    params: Any,
    forward: ForwardPass,
    state: TrainState,
    batch: Batch,
    axis_name: AxisName,
    loss: LossOfOutputs,
) -> StepContext:
    """The forward pass and its surroundings, for a method of comparison."""

    def apply(params: Any, *args: Any, **kwargs: Any) -> Any:
        variables = quality.model_variables(params, state.quality, state.batch_stats)
        return model.apply(variables, batch, *args, rotation=state.rotation, **kwargs)

    return StepContext(
        params=params,
        out=forward.out,
        logits=forward.logits,
        losses=forward.main,
        batch=batch,
        weight=example_weight(batch),
        step=state.step,
        rng=jax.random.fold_in(step_key(state), 1),
        reduce=functools.partial(psum, axis_name=axis_name),
        apply=apply,
        loss=loss,
    )


def stack_mean_keys(out: dict[str, Any]) -> Array:
    """`[M, B, H, d_h]`, the mean keys in the order of the modalities."""
    return jnp.stack([out["mean_keys"][m] for m in sorted(out["mean_keys"])])


def class_query_after_update(model: Any, params: Any, rolling: RollingState) -> Array:
    """The class queries of all fusion layers at the moment of a roll, `[n H, d_h]`, rotated.

    The first layer's follows from the parameters only, so that R_new q = q_b holds for every
    sample. Those above depend on the sample, as all do where the class tokens are the modalities':
    for them it is the mean query of the window, from before the last updates, and R_new q = q_b
    holds for that mean.
    """
    if not model.spec.has_fixed_query:
        return scores_and_means(rolling)[2]
    first = model.apply({"params": params}, rolling.rotation, method="class_query")
    observed = scores_and_means(rolling)[2]
    return jnp.concatenate([first, observed[len(first) :]])


def imbalance_on_batch(query: Array, mean_keys: Array, weight: Array, axis_name: AxisName) -> Array:
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


def example_weight(batch: Mapping[str, Array]) -> Array:
    """`[B]` float32: 1 for an example, 0 for padding."""
    if "example_mask" in batch:
        return batch["example_mask"].astype(jnp.float32)
    return jnp.ones(batch["label"].shape[:1], jnp.float32)


def modality_weight(out: Mapping[str, Any], weight: Array) -> Array:
    """`[M, B]`: an example's weight in the modalities that it has, 0 in those it lacks."""
    present = jnp.stack([out["present"][m] for m in sorted(out["present"])])
    return weight[None] * present.astype(weight.dtype)


def finite_rows(values: Array) -> Array:
    """True where all numbers of an example are finite: `[B, ...] -> [B]` bool."""
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def batch_sums(
    logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array], task: Task = SINGLE
) -> Sums:
    """Weighted sums over one batch of everything that is reported.

    Args:
      logits: `[B, C]`.
      out: the model's second output.
      batch: with "label" `[B]`, or as the task has it, and, where there is padding, "example_mask"
        `[B]`.
      task: with the loss and the scores that are summed.

    Returns:
      Sums by name, `[]` or, for the cosines, `[H]`. What normalizes them: `weight`; `weight/<m>`,
      examples that have the modality; `attended/<m>`, those of them whose logits are finite;
      `unscored` and `unscored/<m>`, those whose logits, or the probe's, are not. `loss` is that of
      the main head. `kept/<m>` counts what `data.masking.ModalityDropout` could not drop.
    """
    weight, label = example_weight(batch), batch["label"]

    def total(values: Array, weight: Array = weight) -> Array:
        return jnp.sum(jnp.where(weight > 0, values.astype(jnp.float32), 0.0) * weight)

    def of_head(logits: Array, weight: Array) -> tuple[Sums, Array]:
        """Loss and the task's scores, and examples without an answer."""
        finite = finite_rows(logits)
        scores = {"loss": task.loss(logits, label), **task.step_scores(logits, label)}
        sums = {name: total(jnp.where(finite, x, 0.0), weight) for name, x in scores.items()}
        return sums, total(~finite, weight)

    sums = {"weight": jnp.sum(weight)}
    scored, unscored = of_head(logits, weight)
    sums |= scored | {"unscored": unscored}
    modalities = sorted(out["present"])
    weights = dict(zip(modalities, modality_weight(out, weight), strict=True))
    for m, probe in out["probe_logits"].items():
        scored, unscored = of_head(probe, weights[m])
        sums |= {f"probe_{name}/{m}": value for name, value in scored.items()}
        sums[f"unscored/{m}"] = unscored
        sums[f"weight/{m}"] = jnp.sum(weights[m])
    if "attention_share" in out:
        answered = finite_rows(logits)
        for m in modalities:
            attended = weights[m] * answered.astype(weight.dtype)
            if "mean_keys" in out:
                cosines = dot(normalize(out["query"]), normalize(out["mean_keys"][m]))
                sums[f"cosine/{m}"] = jnp.sum(
                    jnp.where(attended[:, None] > 0, cosines, 0.0) * attended[:, None], axis=0
                )
            sums[f"attention_share/{m}"] = total(
                jnp.mean(out["attention_share"][m], axis=-1), attended
            )
            sums[f"attended/{m}"] = jnp.sum(attended)
    sums |= {name: total(value) for name, value in batch.items() if name.startswith(KEPT)}
    return sums


def add_sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two dicts of sums in float64; a sum that only one of them has stays as it is."""
    total = {name: np.asarray(value, np.float64) for name, value in first.items()}
    for name, value in second.items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def finish(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Means from sums: the row of `metrics.jsonl`.

    Adds `imbalance`, the mean over heads of max_m c^m - min_m c^m, and, for two modalities, `air`,
    the mean over heads of c^1 - c^2. Both are over the modalities that an example had, and need two
    of them. `key_gap` is, with mean keys, the mean over heads of `key_gap` below. Means over no
    example are NaN. Counts: `skipped`; `kept/<m>`; `examples/<m>`, those
    that have the modality, where some lack it; `nonfinite` and `nonfinite/<m>`, those whose logits
    were NaN or infinite, where there are any.
    """
    weight = float(sums["weight"])

    def number(kind: str, modality: str) -> float:
        """Examples behind a sum of a modality."""
        return float(sums.get(f"{kind}/{modality}", sums.get(f"weight/{modality}", weight)))

    row: dict[str, Any] = {}
    scores, cosines = [], 0
    for name, value in sums.items():
        kind, _, modality = name.partition("/")
        if kind == "cosine":
            cosines += 1
            count = number("attended", modality)
            score = np.asarray(value) / (count or math.nan)
            if count:
                scores.append(score)
            row[name] = float(np.mean(score))
        elif kind.removeprefix("probe_") in METRICS:
            count = number("weight", modality) if modality else weight
            if not METRICS[kind.removeprefix("probe_")].higher_is_better:
                count -= float(sums.get("unscored" + "/" * bool(modality) + modality, 0.0))
            row[name] = float(value) / (count or math.nan)
        elif kind in ("attention_share", "uniform_share"):
            row[name] = float(value) / (number("attended", modality) or math.nan)
        elif kind == "unscored" and value:
            row[name.replace("unscored", "nonfinite")] = int(value)
        elif kind == "weight" and modality and float(value) < weight:
            row[f"examples/{modality}"] = int(value)
        elif name == "skipped" or name.startswith(KEPT):
            row[name] = int(value)
    if cosines:
        stacked = np.stack(scores) if len(scores) > 1 else np.full([1, 1], np.nan)
        row["imbalance"] = float(np.mean(stacked.max(0) - stacked.min(0)))
    spreads = [name.partition("/")[2] for name in sums if name.startswith("key_sum/")]
    if spreads:
        counts = [number("attended", m) or math.nan for m in spreads]
        means = [sums[f"key_sum/{m}"] / n for m, n in zip(spreads, counts, strict=True)]
        squares = [sums[f"key_square/{m}"] / n for m, n in zip(spreads, counts, strict=True)]
        row["key_gap"] = float(np.mean(key_gap(np.stack(means), np.stack(squares))))
    if cosines == 2:
        row["air"] = float(np.mean(scores[0] - scores[1])) if len(scores) == 2 else math.nan
    return row


def key_gap(means: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """How far the modalities' keys lie apart, in units of their spread over the samples, `[H]`.

    |mu^m - mu^n| / sqrt((s_m^2 + s_n^2) / 2) with s_m^2 = E|k^m - mu^m|^2, its mean over the pairs
    of modalities. At 1 and below their distributions overlap; at several the keys tell the
    modality and hardly the sample. NaN where no sample differs from another.

    Args:
      means: mu^m = E k^m, `[M, H, d_h]` of two modalities or more.
      squares: E|k^m|^2, `[M, H]`.
    """
    spread = np.maximum(squares - np.sum(means * means, axis=-1), 0.0)
    gaps = []
    for m, n in itertools.combinations(range(len(means)), 2):
        mean = np.sqrt((spread[m] + spread[n]) / 2)
        gaps.append(np.linalg.norm(means[m] - means[n], axis=-1) / np.where(mean > 0, mean, np.nan))
    return np.mean(gaps, axis=0)


def nonfinite_flags(loss: Array, gradient: Any) -> Array:
    """`[1 + N]` bool: whether the loss, and each of the gradient's N leaves, is not finite.

    The host reads them when it reads the sums anyway, and always before it saves a state; so
    nothing waits for them, and no checkpoint follows from such a number.

    max |g| is NaN or infinite exactly where g holds such a number; XLA's loop over floats is seven
    times as fast on a CPU as that over booleans.
    """
    leaves = [loss, *jax.tree.leaves(gradient)]
    return jnp.stack([~jnp.isfinite(jnp.max(jnp.abs(leaf))) for leaf in leaves])


def select_if_finite(finite: Array | bool, new: Any, old: Any) -> Any:
    """The new tree where `finite` `[]` holds, else the old one; counts always move on.

    A skipped update so counts as one in the schedule, which stays a function of the step. That is
    why this is not `optax.apply_if_finite`, which holds the counts back too; its counters would
    also become part of `opt_state`, and a run could not be continued with the other choice of
    `config.nonfinite`. Where `finite` is a plain True nothing is compiled: the choice would have
    every parameter's update wait for the whole gradient.
    """
    if finite is True:
        return new

    def choose(new: Array, old: Array) -> Array:
        is_count = jnp.issubdtype(new.dtype, jnp.integer)
        return new if is_count else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old)


def flag_names(params: Any) -> list[str]:
    """A name for each flag; `params` gives the structure."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return ["loss", *("gradient of " + "/".join(str(k.key) for k in path) for path, _ in paths)]


def nonfinite_names(flags: Any, names: list[str]) -> list[str]:
    """Names of the losses and leaves that are flagged."""
    if not np.any(flags):
        return []
    return [name for name, marked in zip(names, np.asarray(flags), strict=True) if marked]
