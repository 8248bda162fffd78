"""The state that a training run carries from step to step, and the optimizer that moves it."""

import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax import Array

from rollingq_jax import quality
from rollingq_jax.models.resnet import BATCH_STATS
from rollingq_jax.quality import QualityState
from rollingq_jax.rolling import RollingQuery, RollingState


class TrainState(flax.struct.PyTreeNode):
    """The whole of a run: with the data, which follow from `step`, it determines all that comes.

    Attributes:
      step: `[]` int32, updates done; also the position in the data.
      params: the model's parameters, float32.
      opt_state: the optimizer's.
      rolling: rotations, counts and running sums; None for a fusion without a class query.
      rng: PRNG key `[]`, the same for the whole run; a step folds its number in.
      baseline: of a method of comparison that has one, such as PMR's prototypes; else `()`.
      quality: sums behind the norm bias's statistics; None for a model without one.
      ema: average of the parameters, see `update_ema`; None without one.
      batch_stats: running averages of resnet18 encoders; None without one.
    """

    step: Array
    params: Any
    opt_state: Any
    rolling: RollingState | None
    rng: Array
    baseline: Any = ()
    quality: QualityState | None = None
    ema: Any = None
    batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The variables that are evaluated, as `model.apply` takes them: the average, if any."""
        params = self.params if self.ema is None else self.ema
        return quality.model_variables(params, self.quality, self.batch_stats)

    @property
    def rotation(self) -> Array | None:
        """`[n H, d_h, d_h]` for n fusion layers, or None for a fusion without a class query.

        It turns the query of the parameters, from which it was made, and that of their average
        alike: R changes the coordinates of the query, as if folded into every projection in the
        average, those from before the roll too. An average of rotated queries would instead lag
        between the directions before and after a roll, and its R would be no rotation. As R keeps
        distances, the averaged query is as far from the trained one as without a roll.
        """
        return None if self.rolling is None else self.rolling.rotation


def create_state(
    model: Any,
    tx: optax.GradientTransformation,
    roller: RollingQuery,
    *,
    seed: int,
    batch: Any,
    baseline: Callable[[Any], Any] = lambda params: (),
    ema: bool = False,
) -> TrainState:
    """Initial state: parameters drawn from `seed` with the shapes of one `batch`, R = I.

    Args:
      baseline: `params ->` the initial state of a method of comparison.
      ema: whether an average of the parameters is kept.
    """
    init_rng, step_rng = jax.random.split(jax.random.key(seed))
    variables = jax.jit(model.init)(init_rng, batch)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros([], jnp.int32),
        params=params,
        opt_state=tx.init(params),
        rolling=init_rolling(model, roller),
        rng=step_rng,
        baseline=baseline(params),
        quality=quality.init(len(model.spec.modalities)) if model.spec.quality_bias else None,
        ema=jax.tree.map(jnp.copy, params) if ema else None,
        batch_stats=variables.get(BATCH_STATS),
    )


def update_ema(ema: Any, params: Any, count: Array, decay: float) -> Any:
    """The average of the parameters after t = `count` updates, without a bias to the first.

        mean_t = (1 - decay) / (1 - decay^t) sum_s decay^(t - s) params_s,    s = 1 .. t

    as `optax.ema` has it with `debias=True`; here for parameters, and from the mean before.
    """
    count = jnp.asarray(count, jnp.float32)
    return optax.incremental_update(params, ema, (1 - decay) / -jnp.expm1(count * math.log(decay)))


def init_rolling(model: Any, roller: RollingQuery) -> RollingState | None:
    """The rolling state that fits the model's class queries; None where it has none."""
    if not model.spec.uses_class_query or len(model.spec.modalities) < 2:
        return None
    heads, head_dim = model.spec.rolling_heads, model.spec.dim // model.spec.fusion_heads
    return roller.init(len(model.spec.modalities), head_dim, model.spec.fusion_layers * heads)


def learning_rate_schedule(
    learning_rate: float,
    steps_per_epoch: int,
    epochs: int,
    *,
    warmup_epochs: float = 2.5,
    extra_step: bool = False,
    clip: bool = True,
) -> optax.Schedule:
    """Learning rate of optimizer step t = 0, 1, ...: linear warm-up, then one cosine.

    With W = int(warmup_epochs * steps_per_epoch) and T = epochs * steps_per_epoch,

        lr(s) = learning_rate s / W                                      for s < W
        lr(s) = learning_rate (1 + cos(pi (s - W) / (T - W))) / 2        after that.

    It is `get_cosine_schedule_with_warmup` of the transformers library, which upstream uses, and
    within rounding `optax.warmup_cosine_decay_schedule`. That one cannot go on beyond T, which
    `clip=False` needs.

    Args:
      learning_rate: the highest.
      steps_per_epoch: optimizer steps in an epoch.
      epochs: their number.
      warmup_epochs: epochs of warm-up; the paper's 2.5 may end inside an epoch.
      extra_step: upstream steps its schedule once more at each epoch's end, so that
        s = t + floor(t / steps_per_epoch); otherwise s = t.
      clip: whether the rate stays at 0 from s = T. Upstream's extra steps go beyond T, where its
        cosine rises again.
    """
    warmup, total = int(warmup_epochs * steps_per_epoch), steps_per_epoch * epochs

    def schedule(count: Any) -> Array:
        step = jnp.asarray(count, jnp.int32)
        if extra_step:
            step = step + step // steps_per_epoch
        step = step.astype(jnp.float32)
        progress = (step - warmup) / max(1, total - warmup)
        if clip:
            progress = jnp.minimum(progress, 1.0)
        cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return learning_rate * jnp.where(step < warmup, step / max(1, warmup), cosine)

    return schedule


def make_optimizer(config: Any, schedule: optax.Schedule) -> optax.GradientTransformation:
    """The optimizer of `config.optimizer`: optax's, with clipping before it.

    SGD adds the weight decay to every gradient, Adam has none, the others decay apart from the
    gradient. What a layer's learning rate is multiplied by, `layer_scales`, multiplies the update
    last, and so its decay too.

    Args:
      config: `config.optimizer`, checked.
      schedule: learning rate of each step.
    """
    mask = kernel_mask if config.weight_decay_on == "kernels" else None
    parts = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm else []
    if config.name == "sgd":
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
        parts.append(optax.sgd(schedule, momentum=config.momentum or None))
    elif config.name == "adam":
        parts.append(optax.adam(schedule))
    else:
        decoupled = {"adamw": optax.adamw, "lion": optax.lion, "lamb": optax.lamb}[config.name]
        parts.append(decoupled(schedule, weight_decay=config.weight_decay, mask=mask))
    if config.layer_decay < 1:

        def scaled(updates: Any, _: Any) -> Any:
            scales = layer_scales(updates, config.layer_decay)
            return jax.tree.map(lambda update, scale: scale * update, updates, scales)

        parts.append(optax.stateless(scaled))
    return optax.chain(*parts)


def kernel_mask(params: Any) -> Any:
    """True at the matrices of projections and patches, the leaves named `kernel`."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def layer_scales(params: Any, decay: float) -> Any:
    """Factor of each leaf's learning rate, by how many layers lie above it.

    In an encoder of n blocks, `encoder_<m>`, that is decay^(n - i) for block i = 0 .. n - 1 and
    decay^(n + 1) for the embedding, its class token and positions. All that starts anew, above the
    blocks, has 1: final norms, projections, fusion, probes. (Layer-wise decay as ELECTRA and BEiT
    fine-tune pretrained Transformers.)

    Examples:
      >>> params = {"encoder_a": {"block_0": 0, "block_1": 0, "cls": 0}, "fusion": 0}
      >>> layer_scales(params, 0.5)
      {'encoder_a': {'block_0': 0.25, 'block_1': 0.5, 'cls': 0.125}, 'fusion': 1.0}
    """

    def scale(path: Any, _: Any) -> float:
        part, *rest = [key.key for key in path]
        name = rest[0] if rest and part.startswith("encoder_") else ""
        depth = sum(key.startswith("block_") for key in params[part]) if name else 0
        if name.startswith("block_"):
            return decay ** (depth - int(name.removeprefix("block_")))
        return decay ** (depth + 1) if name in ("embed", "cls", "position") else 1.0

    return jax.tree_util.tree_map_with_path(scale, params)
