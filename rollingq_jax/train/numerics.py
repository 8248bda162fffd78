"""Losses and gradients that are NaN or infinite: kept out of the state, and named.

The step returns flags, which the host reads when it reads the sums anyway, and always before it
saves a state; so nothing waits for them, and no checkpoint follows from such a number. Where
updates are to be skipped, the step itself chooses, on the device.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

NONFINITE = "nonfinite"  # among the sums of a step


def nonfinite_flags(loss: Array, gradient: Any) -> Array:
    """`[1 + N]` bool: whether the loss, and each of the gradient's N leaves, is not finite.

    max |g| is NaN or infinite exactly where g holds such a number; XLA's loop over floats is seven
    times as fast on a CPU as that over booleans.
    """
    leaves = [loss, *jax.tree.leaves(gradient)]
    return jnp.stack([~jnp.isfinite(jnp.max(jnp.abs(leaf))) for leaf in leaves])


def choose_finite(finite: Array | bool, new: Any, old: Any) -> Any:
    """The new tree where `finite` `[]` holds, else the old one; counts always move on.

    A skipped update so counts as one in the schedule, which stays a function of the step. Where
    `finite` is a plain True nothing is compiled: the choice would have every parameter's update
    wait for the whole gradient.
    """
    if finite is True:
        return new

    def choose(new: Array, old: Array) -> Array:
        is_count = jnp.issubdtype(new.dtype, jnp.integer)
        return new if is_count else jnp.where(finite, new, old)

    return jax.tree.map(choose, new, old)


def flag_names(params: Any) -> list[str]:
    """What each flag stands for; `params` gives the structure."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return ["loss", *("gradient of " + "/".join(str(k.key) for k in path) for path, _ in paths)]


def offending(flags: Any, names: list[str]) -> list[str]:
    """Names of what the flags mark."""
    if not np.any(flags):
        return []
    return [name for name, marked in zip(names, np.asarray(flags), strict=True) if marked]
