"""The distributions that upstream's parameters start from.

JAX's own `glorot_normal` and `he_normal` truncate the normal distribution; PyTorch's do not.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Initializer = Callable[[Array, Sequence[int], Any], Array]


def normal(std: float) -> Initializer:
    """N(0, std^2)."""

    def init(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return std * jax.random.normal(rng, tuple(shape), dtype)

    return init


def uniform(bound: float) -> Initializer:
    """U(-bound, bound). PyTorch's default for a kernel and its bias: bound = 1 / sqrt(fan_in)."""

    def init(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return jax.random.uniform(rng, tuple(shape), dtype, -bound, bound)

    return init


def xavier_normal(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """N(0, 2 / (fan_in + fan_out)) for a kernel `[fan_in, ...]`, the other axes being fan_out."""
    fan_in, fan_out = shape[0], math.prod(shape[1:])
    return normal(math.sqrt(2.0 / (fan_in + fan_out)))(rng, shape, dtype)


def kaiming_normal_fan_out(area: int) -> Initializer:
    """N(0, 2 / fan_out) for a patch kernel `[P, d]`, fan_out = d x the patch's area in pixels."""

    def init(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
        return normal(math.sqrt(2.0 / (shape[-1] * area)))(rng, shape, dtype)

    return init


def zeros(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Zeros."""
    del rng
    return jnp.zeros(tuple(shape), dtype)


def ones(rng: Array, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
    """Ones."""
    del rng
    return jnp.ones(tuple(shape), dtype)
