"""ResNet-18: from images, spectrograms or frames to the positions of its last feature map.

The network of He et al., "Deep Residual Learning for Image Recognition" (2016), as torchvision has
it (`models/resnet.py`), which is the encoder of many methods of comparison, for frames and for
spectrograms of one channel. Layouts are channels last.

Its normalizations average over a batch in training. What the average is over is the same in every
layout over devices: the examples of the global batch that are not padding and that have the
modality. Where a step takes its batch in parts (`micro_batches`), it is over each part.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models.encoders import ModalityMask, check_input, normalize_pixels
from rollingq_jax.models.layers import Dense, on_each_device
from rollingq_jax.models.spec import EncoderSpec
from rollingq_jax.shapes import batch_broadcast, batch_reshape

WIDTHS = (64, 128, 256, 512)  # of the four stages, two blocks each
BATCH_STATS = "batch_stats"  # the collection of running averages, as in Flax
MOMENTUM = 0.1  # of the batch in a running average
EPSILON = 1e-5

AxisName = str | tuple[str, ...] | None

# N(0, 2 / fan_out), as torchvision draws every convolution.
kaiming_normal = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + 1e-5) * scale + bias for each channel.

    In training mean and variance are those of the batch, and the running averages move a tenth of
    the way there, the variance's to the unbiased one; otherwise they are the running averages.
    `nn.BatchNorm` averages the means of devices that hold different numbers of examples.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, weight: Array | None, train: bool, axis_name: AxisName) -> Array:
        """`[N, h, w, C] -> [N, h, w, C]`.

        Args:
          x: one feature map for each of N images.
          weight: `[N]` float32, 0 for an image that does not count; None: all count.
          train: whether to normalize by the batch.
          axis_name: mapped axis over which the batch is divided.

        Raises:
          ConfigError: the variables have no running averages.
        """
        size = (x.shape[-1],)
        if not (self.is_initializing() or self.has_variable(BATCH_STATS, "mean")):
            raise ConfigError(
                f"the variables have no collection {BATCH_STATS!r}, with the running averages of a "
                "resnet18 encoder; allowed: those of the run, `run.variables`"
            )
        scale = self.param("scale", nn.initializers.ones, size, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, size, jnp.float32)
        running_mean = self.variable(BATCH_STATS, "mean", jnp.zeros, size, jnp.float32)
        running_var = self.variable(BATCH_STATS, "var", jnp.ones, size, jnp.float32)
        mean, var, wide = running_mean.value, running_var.value, x.astype(jnp.float32)
        if train:
            if weight is None:
                weight = batch_broadcast(jnp.ones(1, jnp.float32), x.shape[:1], x)
            each = jnp.broadcast_to(weight[:, None, None, None], (*x.shape[:3], 1))
            # Moments around the running mean: around 0 the difference of squares loses digits.
            centered = jnp.where(each > 0, wide - mean[None, None, None], 0.0)
            sums = [jnp.sum(v * each, axis=(0, 1, 2)) for v in (centered, centered**2)]
            count = jnp.sum(each)
            if axis_name is not None:
                sums, count = jax.lax.psum((sums, count), axis_name)
            first, second = (total / jnp.maximum(count, 1.0) for total in sums)
            batch_var = jnp.maximum(second - first**2, 0.0)
            some = count > 0
            unbiased = batch_var * count / jnp.maximum(count - 1.0, 1.0)
            if self.is_mutable_collection(BATCH_STATS):
                step = MOMENTUM * some.astype(jnp.float32)
                running_mean.value = mean + step * first
                running_var.value = var + step * (unbiased - var)
            mean, var = mean + first, jnp.where(some, batch_var, var)
        factor = jax.lax.rsqrt(var + EPSILON) * scale
        normalized = (wide - mean[None, None, None]) * factor[None, None, None]
        return (normalized + bias[None, None, None]).astype(self.dtype)


def convolve(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
    """`jax.lax.conv_general_dilated`, in any layout of the batch."""

    def function(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(x, kernel, *args, **kwargs)

    return on_each_device(function, (x,), kernel)


def convolution(features: int, side: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """A square kernel without bias, padded as torchvision's: by (side - 1) / 2 on all sides."""
    return nn.Conv(
        features,
        (side, side),
        (stride, stride),
        [(side // 2, side // 2)] * 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kaiming_normal,
        conv_general_dilated=convolve,
        name=name,
    )


class ResidualBlock(nn.Module):
    """relu(norm2(conv2(relu(norm1(conv1(x))))) + x), where x has a projection if shapes differ."""

    features: int
    stride: int = 1
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, weight: Array | None, train: bool, axis_name: AxisName) -> Array:
        """`[N, h, w, C] -> [N, h / stride, w / stride, features]`; see `BatchNorm`."""

        def norm(x: Array, name: str) -> Array:
            return BatchNorm(self.dtype, name=name)(x, weight, train, axis_name)

        h = convolution(self.features, 3, self.stride, self.dtype, "conv1")(x)
        h = jax.nn.relu(norm(h, "norm1"))
        h = norm(convolution(self.features, 3, 1, self.dtype, "conv2")(h), "norm2")
        if self.stride != 1 or x.shape[-1] != self.features:
            x = convolution(self.features, 1, self.stride, self.dtype, "shortcut")(x)
            x = norm(x, "shortcut_norm")
        return jax.nn.relu(h + x)


class Stem(nn.Module):
    """relu(norm(conv(x))) with a kernel of 7 x 7, stride 2, then the maximum of 3 x 3, stride 2."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: Array, weight: Array | None, train: bool, axis_name: AxisName) -> Array:
        """`[N, H, W, C] -> [N, H / 4, W / 4, 64]`; see `BatchNorm`."""
        x = convolution(WIDTHS[0], 7, 2, self.dtype, "conv")(x)
        x = jax.nn.relu(BatchNorm(self.dtype, name="norm")(x, weight, train, axis_name))
        return on_each_device(lambda x: nn.max_pool(x, (3, 3), (2, 2), [(1, 1), (1, 1)]), (x,))


class ResNet18(nn.Module):
    """Tokens of one modality: the mean of the feature map first, in the class token's place.

    Every 32 x 32 pixels are a token; those of a video are of one frame after the other. Static
    fusions and probes so read the average pooling that ResNets end with. There are no positions:
    the padding's zeros tell the network where the edges are.

    Attributes:
      spec: kind "resnet18", mean and std.
      dim: d, width of the output; a projection is added where it is not 512.
      dtype: of the computation; averages and normalization are in float32.
      remat: recompute each block in the backward pass.
    """

    spec: EncoderSpec
    dim: int
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: Array,
        presence: ModalityMask | None = None,
        *,
        train: bool = False,
        weight: Array | None = None,
        axis_name: AxisName = None,
    ) -> Array:
        """`[B, ...] -> [B, 1 + L, dim]` in `dtype`.

        Args:
          x: `[B, H, W, C]`, or `[B, T, H, W, C]` frames; float or uint8.
          presence: of the modality; an example without it counts in no average.
          train: whether averages are the batch's.
          weight: `[B]`, 0 or False for padding, which counts in none either.
          axis_name: mapped axis over which the batch is divided.

        Raises:
          DataError: `x` is no such array, has other channels than the parameters, or its mask is of
            positions.
          ConfigError: the variables have no running averages.
        """
        check_input(self.spec, x)
        positions, present = presence or ModalityMask()
        if positions is not None:
            raise DataError(
                f"{self.spec.name}_mask has shape {positions.shape}; allowed for kind 'resnet18': "
                "[batch], whether an example has the modality"
            )
        self._check_channels(x.shape[-1])
        x = normalize_pixels(self.spec, x)
        if present is not None:  # NaN where an example lacks it would reach every gradient
            x = jnp.where(present.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)
        # The averages leave out padding and absent examples, whatever layout the batch has.
        counted = [w.astype(jnp.float32) for w in (weight, present) if w is not None]
        each = counted[0] * counted[-1] if counted else None
        size, frames = x.shape[0], x.shape[1] if x.ndim == 5 else 1
        if each is not None and frames > 1:
            each = jnp.broadcast_to(each[:, None], (size, frames))
            each = batch_reshape(each, size * frames)
        x = batch_reshape(x, size * frames, *x.shape[-3:]).astype(self.dtype)
        stem: Any = Stem
        block: Any = ResidualBlock
        if self.remat:
            stem, block = (nn.remat(m, static_argnums=(3, 4)) for m in (stem, block))
        x = stem(self.dtype, name="embed")(x, each, train, axis_name)
        for i in range(2 * len(WIDTHS)):
            stage, second = divmod(i, 2)
            stride = 2 if stage and not second else 1
            made = block(WIDTHS[stage], stride, self.dtype, name=f"block_{i}")
            x = made(x, each, train, axis_name)
        tokens = batch_reshape(x, size, -1, WIDTHS[-1])
        mean = jnp.mean(tokens.astype(jnp.float32), axis=1, keepdims=True).astype(self.dtype)
        tokens = jnp.concatenate([mean, tokens], axis=1)
        if self.dim == WIDTHS[-1]:
            return tokens
        return Dense(self.dim, dtype=self.dtype, name="project")(tokens)

    def _check_channels(self, channels: int) -> None:
        params: Any = self.get_variable("params", "embed", {})
        made_for = jnp.shape(params["conv"]["kernel"])[2] if "conv" in params else None
        if made_for not in (None, channels):
            raise DataError(
                f"{self.spec.name} has {channels} channels; allowed: {made_for}, for which the "
                "parameters' first convolution was made"
            )
