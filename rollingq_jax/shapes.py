"""Shapes and dtypes of arguments: chex's assertions as errors that name the argument.

Broadcasting would take many a wrong shape without a word. Only shapes and dtypes are read, so that
a check costs nothing once a function is compiled.

Under a mesh with explicit axes a shape has a sharding, too, and JAX refuses to guess that of some
results. `batch_reshape`, `batch_broadcast` and `laid_out_as` give them that of the batch; without
such a mesh they change nothing.
"""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from rollingq_jax.errors import UserError

KINDS = {
    "real numbers": (jnp.floating, jnp.integer, jnp.bool_),
    "integers": (jnp.integer,),
    "bool": (jnp.bool_,),
}


def check_arrays(
    dims: chex.Dimensions | None = None,
    kind: str = "real numbers",
    /,
    **arguments: tuple[Any, *tuple[str | None, ...]],
) -> chex.Dimensions:
    """Refuses an argument whose shape or dtype is not one of those that are allowed.

    Args:
      dims: sizes of axes that are known; those of other axes are added as they are met.
      kind: "real numbers", "integers" or "bool".
      **arguments: name -> (array, shape, ...), a shape being a key of `chex.Dimensions` such as
        "BHd"; None among them allows None.

    Returns:
      `dims` with the size of every axis.

    Raises:
      UserError: names the first argument that does not fit, its shape and those allowed.

    Examples:
      >>> dims = check_arrays(query=(jnp.ones((2, 3)), "Bd"), keys=(jnp.ones((4, 2, 3)), "MBd"))
      >>> dims.M, dims.B
      (4, 2)
      >>> check_arrays(query=(jnp.ones((2, 3)), "Bd"), keys=(jnp.ones((4, 1, 3)), "MBd"))
      Traceback (most recent call last):
      ...
      rollingq_jax.errors.UserError: keys has shape (4, 1, 3); allowed: [M, B, d] with B = 2, d = 3
    """
    dims = chex.Dimensions() if dims is None else dims
    for name, (array, *shapes) in arguments.items():
        if array is None and None in shapes:
            continue
        allowed = " or ".join("None" if s is None else f"[{', '.join(s)}]" for s in shapes)
        if not hasattr(array, "shape") or not hasattr(array, "dtype"):
            came = "None" if array is None else f"a {type(array).__name__}"
            raise UserError(f"{name} is {came}; allowed: an array {allowed}")
        if not any(jnp.issubdtype(array.dtype, number) for number in KINDS[kind]):
            raise UserError(f"{name} has dtype {array.dtype}; allowed: {kind}")
        sizes = {axis: getattr(dims, axis, None) for s in shapes for axis in s or ""}
        known = ", ".join(f"{axis} = {size}" for axis, size in sizes.items() if size is not None)
        try:
            by_rank = {len(s): s for s in shapes if s is not None}
            chex.assert_rank(array, set(by_rank))
            shape = by_rank[array.ndim]
            for axis, size in zip(shape, array.shape, strict=True):
                if sizes[axis] is None:  # `dims[shape] = ...` takes no symbolic size of jax.export
                    setattr(dims, axis, size)
            chex.assert_shape(array, dims[shape])
        except AssertionError:
            raise UserError(
                f"{name} has shape {array.shape}; allowed: {allowed}"
                + (f" with {known}" if known else "")
            ) from None
    return dims


def explicit_sharding(x: Array) -> NamedSharding | None:
    """The sharding in the type of `x`; None where `x` is on no explicit axis of a mesh."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    known = isinstance(sharding, NamedSharding) and any(axis is not None for axis in sharding.spec)
    return sharding if known else None


def batch_sharding(like: Array, rank: int) -> NamedSharding | None:
    """The sharding of an array of `rank` axes of which the first is laid out as that of `like`.

    None where `like` is on no explicit axis of a mesh, which leaves the choice to the compiler.
    """
    sharding = explicit_sharding(like)
    if sharding is None:
        return None
    return NamedSharding(sharding.mesh, PartitionSpec(sharding.spec[0], *(None,) * (rank - 1)))


def batch_reshape(x: Array, *shape: int) -> Array:
    """`x.reshape(shape)` where the first axis stays the batch, or is it with the next ones merged.

    Other axes are gathered if they are on explicit axes of a mesh.
    """
    sharding = batch_sharding(x, len(shape))
    return x.reshape(shape) if sharding is None else jnp.reshape(x, shape, out_sharding=sharding)


def batch_broadcast(x: Array, shape: tuple[int, ...], like: Array) -> Array:
    """`jnp.broadcast_to(x, shape)`, whose first axis is laid out as that of `like`."""
    x, sharding = jnp.broadcast_to(x, shape), batch_sharding(like, len(shape))
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def laid_out_as(x: Array, like: Array) -> Array:
    """`x` with the sharding of `like`, which has its shape; `x` itself if `like` has none."""
    sharding = explicit_sharding(like)
    return x if sharding is None else jax.sharding.reshard(x, sharding)


def whole_sharding(x: Array, rank: int) -> NamedSharding | None:
    """The sharding of an array of `rank` axes that every device has as a whole; for sums over `x`.

    None where `x` is on no explicit axis of a mesh.
    """
    sharding = explicit_sharding(x)
    return sharding and NamedSharding(sharding.mesh, PartitionSpec(*(None,) * rank))
