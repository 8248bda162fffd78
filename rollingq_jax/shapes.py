"""Shapes and dtypes of arguments: what broadcasting would take without a word is refused.

Looks at shapes and dtypes alone, so that it costs nothing once a function is compiled.
"""

from typing import Any

import jax.numpy as jnp

from rollingq_jax.errors import UserError

KINDS = {"real numbers": (jnp.floating, jnp.integer, jnp.bool_), "bool": (jnp.bool_,)}


def check_arrays(
    sizes: dict[str, int] | None = None, /, **arguments: tuple[Any, str] | tuple[Any, str, str]
) -> None:
    """Each argument has one of its shapes, with one size for each letter, and its kind of dtype.

    Args:
      sizes: of letters that are known already.
      **arguments: name -> (array, shapes) or (array, shapes, "bool"). Shapes are written as
        "B H d_h or H d_h"; an array for which they end in "or None" may be None.

    Raises:
      UserError: names the arguments, what came and what is allowed.

    Example:
      >>> import jax.numpy as jnp
      >>> check_arrays(query=(jnp.ones((2, 3)), "B d"), keys=(jnp.ones((4, 2, 3)), "M B d"))
      >>> check_arrays(query=(jnp.ones((2, 3)), "B d"), keys=(jnp.ones((4, 1, 3)), "M B d"))
      Traceback (most recent call last):
      ...
      rollingq_jax.errors.UserError: query, keys have shapes (2, 3), (4, 1, 3); allowed: [B, d], ...
    """
    bound = dict(sizes or {})
    fits = True
    for name, (array, shapes, *kind) in arguments.items():
        if array is None and shapes.endswith("or None"):
            continue
        _check_array(name, array, shapes, *kind)
        fits = fits and _binds(array.shape, shapes, bound)
    if not fits:
        came = ", ".join(str(getattr(a[0], "shape", None)) for a in arguments.values())
        allowed = ", ".join(_written(a[1]) for a in arguments.values())
        known = "".join(f", {letter} = {size}" for letter, size in (sizes or {}).items())
        raise UserError(
            f"{', '.join(arguments)} {'have shapes' if len(arguments) > 1 else 'has shape'} "
            f"{came}; allowed: {allowed}" + (f" with {known[2:]}" if known else "")
        )


def _check_array(name: str, array: Any, shapes: str, kind: str = "real numbers") -> None:
    if not hasattr(array, "shape") or not hasattr(array, "dtype"):
        came = "None" if array is None else f"a {type(array).__name__}"
        raise UserError(f"{name} is {came}; allowed: an array {_written(shapes)}")
    if not any(jnp.issubdtype(array.dtype, allowed) for allowed in KINDS[kind]):
        raise UserError(f"{name} has dtype {array.dtype}; allowed: {kind}")


def _binds(shape: tuple[int, ...], shapes: str, bound: dict[str, int]) -> bool:
    """Whether a shape is among those that are allowed; adds the sizes of its letters."""
    for alternative in shapes.split(" or "):
        letters = alternative.split()
        if alternative != "None" and len(letters) == len(shape):
            return all(
                bound.setdefault(letter, size) == size
                for letter, size in zip(letters, shape, strict=True)
            )
    return False


def _written(shapes: str) -> str:
    """ "B d or d or None" as "[B, d] or [d] or None"."""
    return " or ".join(
        part if part == "None" else f"[{', '.join(part.split())}]" for part in shapes.split(" or ")
    )
