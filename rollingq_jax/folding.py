"""After training the rotation folds into the query projection: an ordinary Transformer is left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.rotation import HIGHEST, as_float
from rollingq_jax.shapes import check_arrays

Params = Mapping[str, Any]


def fold_projection(
    kernel: Array, bias: Array | None, rotation: Array
) -> tuple[Array, Array | None]:
    """W_q' = W_q R^T and b_q' = b_q R^T, from q R^T = (t W_q + b_q) R^T, a head at a time.

    `kernel` is `[D, H, d_h]` or `[D, H d_h]`, `bias` `[H, d_h]` or `[H d_h]` or None, `rotation`
    `[H, d_h, d_h]`; shapes and dtypes are kept.
    """
    heads, width = rotation.shape[:2]
    blocks = as_float(kernel).reshape(-1, heads, width)
    folded = jnp.einsum("dhj,hij->dhi", blocks, as_float(rotation), precision=HIGHEST)
    folded = folded.reshape(kernel.shape).astype(kernel.dtype)
    if bias is None:
        return folded, None
    rows = as_float(bias).reshape(heads, width)
    turned = jnp.einsum("hj,hij->hi", rows, as_float(rotation), precision=HIGHEST)
    return folded, turned.reshape(bias.shape).astype(bias.dtype)


def _check(projection: Any, rotation: Array, path: Sequence[str]) -> None:
    where = "/".join(path)
    if not isinstance(projection, Mapping) or "kernel" not in projection:
        raise UserError(
            f"query_path is {where!r}; there is no projection with a kernel at that path"
        )
    check_arrays(rotation=(rotation, "H d_h d_h"))
    shape, (heads, width) = projection["kernel"].shape, rotation.shape[:2]
    has = math.prod(shape[1:]) // width
    if heads > has and heads % has == 0 and shape[1:] in ((has, width), (has * width,)):
        raise UserError(
            f"rotation is for {heads} heads, and the kernel at {where!r} makes {has}: those of the "
            "last of several fusion layers. The layers below make every token's queries with one "
            "projection, which cannot take the class token's rotation"
        )
    if shape[1:] not in ((heads, width), (heads * width,)):
        raise UserError(
            f"the kernel at {where!r} has shape {shape}, which does not end in {heads} heads of "
            f"width {width}: a projection that makes keys or values as well, or serves other "
            "queries, cannot take the rotation without changing them"
        )


def fold_rotation(
    params: Params, rotation: Array, query_path: Sequence[str] = ("fusion", "query")
) -> dict[str, Any]:
    """Parameters of an ordinary Transformer whose outputs equal those of `params` under `rotation`.

    Args:
      params: nested mapping of parameters; not changed.
      rotation: `[H, d_h, d_h]`.
      query_path: keys that lead to the query projection `{"kernel": [D, H, d_h] or [D, H d_h],
        "bias": ...}`. The caller declares that it serves the class token alone: a projection that
        other tokens use as well would turn their queries too.

    Returns:
      A new nested dict; leaves that do not change are shared with `params`.

    Raises:
      UserError: nothing is at the path, or its kernel does not fit the rotation (a fused
        query-key-value projection, for one, or several fusion layers), so that folding would not
        be exact.

    Example:
      >>> quarter_turn = jnp.array([[[0.0, -1.0], [1.0, 0.0]]])
      >>> params = {"query": {"kernel": jnp.array([[[3.0, 4.0]]])}}  # [D, H, d_h], no bias
      >>> fold_rotation(params, quarter_turn, ("query",))["query"]["kernel"].tolist()
      [[[-4.0, 3.0]]]
    """
    if isinstance(query_path, str) or not query_path:
        raise UserError(f"query_path is {query_path!r}; allowed: keys, ('fusion', 'query') for one")
    name, *rest = query_path
    child = params.get(name) if isinstance(params, Mapping) else None
    if child is None:
        raise UserError(
            f"query_path is {'/'.join(query_path)!r}; the parameters have no {name!r} there"
        )
    if rest:
        folded = fold_rotation(child, rotation, rest)
    else:
        _check(child, rotation, query_path)
        kernel, bias = fold_projection(child["kernel"], child.get("bias"), rotation)
        folded = {**child, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    return {**params, name: folded}
