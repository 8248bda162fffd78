"""The rotation that takes one vector's direction to another's, its application and its folding.

Paper section 4 and upstream's `utils/utils.py` build it from an SVD of the rank-one matrix
`target source^T`, which fixes one direction and leaves all others to the linear algebra library.
The geodesic rotation here moves nothing outside the plane of the two vectors. After training it
folds into the query projection, and an ordinary Transformer is left.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from rollingq_jax.errors import UserError
from rollingq_jax.shapes import check_arrays

Params = Mapping[str, Any]

HIGHEST = jax.lax.Precision.HIGHEST
ZERO_NORM = 1e-12  # a shorter vector has no direction
MAX_DRIFT = 1e-5  # of R^T R from the identity, beyond which R is orthonormalized
PLANE_NORM = 1e-3  # a shorter component of y beside x does not tell the plane in float32


def wide_dtype(dtype: Any) -> Any:
    """float32, or `dtype` where that is a wider floating one."""
    wide = jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits > 32
    return dtype if wide else jnp.float32


def as_float(x: Array) -> Array:
    """`x` in float32, or in its own dtype where that is wider.

    Raises:
      UserError: it is complex.
    """
    x = jnp.asarray(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        raise UserError(f"an array has dtype {x.dtype}; allowed: real numbers")
    return x.astype(wide_dtype(x.dtype))


def safe_norm(x: Array) -> Array:
    """Euclidean norm over the last axis: `[..., d] -> [...]`.

    Squares neither overflow nor underflow, and the gradient at 0 is 0 rather than NaN. What is not
    finite has norm 0, as a vector without direction.
    """
    scale = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=-1))
    scale = jnp.where(scale > 0, scale, jnp.ones_like(scale))
    square = jnp.sum(jnp.square(x / scale[..., None]), axis=-1)
    positive = square > 0
    return jnp.where(positive, scale * jnp.sqrt(jnp.where(positive, square, 1.0)), 0.0)


def normalize(x: Array, epsilon: float = ZERO_NORM) -> Array:
    """`x / |x|` over the last axis: `[..., d] -> [..., d]`.

    Zeros where `|x| <= epsilon`, or where x is not finite.
    """
    norm = safe_norm(x)[..., None]
    known = norm > epsilon
    return jnp.where(known, x / jnp.where(known, norm, 1.0), 0.0)


def dot(x: Array, y: Array) -> Array:
    """Inner product over the last axis, never in bfloat16 or TF32: `[..., d] x 2 -> [...]`."""
    return jnp.einsum("...d,...d->...", x, y, precision=HIGHEST)


def _acute_rotation(x: Array, y: Array) -> Array:
    """R = I - 2 s s^T / (s.s) + 2 y x^T with s = x + y, for unit vectors with x.y >= 0."""
    s = x + y
    identity = jnp.eye(x.shape[-1], dtype=x.dtype)
    return (
        identity - 2.0 * jnp.outer(s, s) / jnp.dot(s, s, precision=HIGHEST) + 2.0 * jnp.outer(y, x)
    )


def _beside(x: Array, y: Array) -> Array:
    """Unit vector orthogonal to the unit vector x, in the plane of x and y, for x.y < 0.

    Where y is too nearly -x to tell that plane: the basis vector of the smallest |x_k|, made
    orthonormal to x.
    """

    def away_from_x(v):
        return v - jnp.dot(v, x, precision=HIGHEST) * x

    component = away_from_x(x + y)  # x + y, and not y: no digits cancel in it near 180 degrees
    basis = jax.nn.one_hot(jnp.argmin(jnp.abs(x)), x.shape[-1], dtype=x.dtype)
    told = safe_norm(component) >= PLANE_NORM
    z = normalize(jnp.where(told, component, away_from_x(basis)))
    return normalize(away_from_x(z))


def _geodesic(source: Array, target: Array) -> Array:
    x, y = normalize(source), normalize(target)
    degenerate = (jnp.max(jnp.abs(x)) == 0) | (jnp.max(jnp.abs(y)) == 0)
    e = jax.nn.one_hot(0, x.shape[-1], dtype=x.dtype)
    x, y = jnp.where(degenerate, e, x), jnp.where(degenerate, e, y)
    obtuse = jnp.dot(x, y, precision=HIGHEST) < 0
    rotation = _acute_rotation(jnp.where(obtuse, -x, x), y)
    z = _beside(x, jnp.where(obtuse, y, -x))
    turned = (
        rotation
        - 2.0 * jnp.outer(jnp.matmul(rotation, x, precision=HIGHEST), x)
        - 2.0 * jnp.outer(jnp.matmul(rotation, z, precision=HIGHEST), z)
    )
    return jnp.where(obtuse, turned, rotation)


def _from_svd(source: Array, target: Array) -> Array:
    x, y = jax.lax.stop_gradient((normalize(source), normalize(target)))
    degenerate = (jnp.max(jnp.abs(x)) == 0) | (jnp.max(jnp.abs(y)) == 0)
    left, _, right = jnp.linalg.svd(jnp.outer(y, x))
    sign, _ = jnp.linalg.slogdet(jnp.matmul(left, right, precision=HIGHEST))
    left = left.at[:, -1].multiply(sign)  # upstream's float32 `det` underflows to 0 at d = 768
    rotation = jnp.matmul(left, right, precision=HIGHEST)
    return jnp.where(degenerate, jnp.eye(x.shape[-1], dtype=x.dtype), rotation)


_CONSTRUCTIONS = {"geodesic": _geodesic, "svd": _from_svd}


def rotation_between(source: Array, target: Array, method: str = "geodesic") -> Array:
    """Rotation R with `R source/|source| = target/|target|`, R^T R = I and det R = +1.

    With unit vectors x, y and s = x + y, for an angle of at most 90 degrees

        G(x, y) = I - 2 s s^T / (s.s) + 2 y x^T,

    and for a wider one `R = G(-x, y) (I - 2 x x^T - 2 z z^T)`: first the half turn of the plane,
    z being its unit vector orthogonal to x, then on from -x to y. Both are the same rotation in
    exact arithmetic; used alone, G's error near 180 degrees is that of the norms divided by |s|. At
    180 degrees, where there is no plane, z comes from the basis vector of the smallest |x_k|.

    Args:
      source: `[..., d]`, d >= 2; converted to float32 unless wider.
      target: `[..., d]`, broadcast against `source`.
      method: "geodesic" (above; O(d^2), differentiable) or "svd": the orthogonal factor of
        `target source^T`, as upstream has it, but with its determinant corrected through `slogdet`
        (O(d^3); directions off the plane are arbitrary; no gradient flows through it).

    Returns:
      `[..., d, d]`. The identity where either norm is at most 1e-12, or not finite.

    Raises:
      UserError: `method` is neither of the two, the widths differ, d < 2, or the leading axes do
        not broadcast.

    Examples:
      >>> quarter_turn = rotation_between(jnp.array([1.0, 0.0]), jnp.array([0.0, 3.0]))
      >>> quarter_turn.round(3).tolist()
      [[0.0, -1.0], [1.0, 0.0]]
    """
    if method not in _CONSTRUCTIONS:
        raise UserError(f"method is {method!r}; allowed: {', '.join(sorted(_CONSTRUCTIONS))}")
    source, target = as_float(source), as_float(target)
    widths = source.shape[-1:] + target.shape[-1:]
    shape = _broadcast(source.shape, target.shape)
    if len(widths) != 2 or widths[0] != widths[1] or widths[0] < 2 or shape is None:
        raise UserError(
            f"source and target have shapes {source.shape} and {target.shape}; "
            "allowed: [..., d] both, with one d >= 2"
        )
    construct = jnp.vectorize(_CONSTRUCTIONS[method], signature="(d),(d)->(d,d)")
    return construct(jnp.broadcast_to(source, shape), jnp.broadcast_to(target, shape))


def _broadcast(first: tuple[int, ...], second: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which both broadcast, or None."""
    try:
        return jnp.broadcast_shapes(first, second)
    except ValueError:
        return None


def rotate(rotation: Array, query: Array) -> Array:
    """R q over the last axis: `[..., d, d], [..., d] -> [..., d]`, leading axes broadcast.

    Computed in float32 or wider and returned in `query`'s dtype, or as computed where that is no
    floating one.

    Raises:
      UserError: the shapes do not fit each other.

    Examples:
      >>> quarter_turn = jnp.array([[0.0, -1.0], [1.0, 0.0]])
      >>> rotate(quarter_turn, jnp.array([[1.0, 0.0], [0.0, 2.0]])).tolist()
      [[0.0, 1.0], [-2.0, 0.0]]
    """
    if not (hasattr(rotation, "shape") and hasattr(query, "shape")):
        came = f"{type(rotation).__name__} and {type(query).__name__}"
        raise UserError(f"rotation and query are {came}; allowed: arrays [..., d, d] and [..., d]")
    leading = _broadcast(rotation.shape[:-2], query.shape[:-1])
    if not query.ndim or rotation.shape[-2:] != 2 * query.shape[-1:] or leading is None:
        raise UserError(
            f"rotation and query have shapes {rotation.shape} and {query.shape}; "
            "allowed: [..., d, d] and [..., d]"
        )
    query = jnp.asarray(query)
    vector = jnp.broadcast_to(as_float(query), leading + query.shape[-1:])
    matrix = jnp.expand_dims(rotation, range(len(leading) + 2 - rotation.ndim))
    rotated = jnp.einsum("...ij,...j->...i", matrix.astype(vector.dtype), vector, precision=HIGHEST)
    return rotated.astype(query.dtype) if jnp.issubdtype(query.dtype, jnp.floating) else rotated


def _gram_and_identity(rotation: Array) -> tuple[Array, Array]:
    gram = jnp.einsum("...ki,...kj->...ij", rotation, rotation, precision=HIGHEST)
    return gram, jnp.broadcast_to(jnp.eye(rotation.shape[-1], dtype=rotation.dtype), gram.shape)


def orthogonality_error(rotation: Array) -> Array:
    """max |R^T R - I|: `[..., d, d] -> [...]`."""
    gram, identity = _gram_and_identity(rotation)
    return jnp.max(jnp.abs(gram - identity), axis=(-2, -1))


def orthonormalize(rotation: Array) -> Array:
    """The orthogonal matrix next to a nearly orthogonal one: `[..., d, d] -> [..., d, d]`.

    One Newton-Schulz step, R (3 I - R^T R) / 2, which squares the orthogonality error.
    """
    gram, identity = _gram_and_identity(rotation)
    return jnp.matmul(rotation, 1.5 * identity - 0.5 * gram, precision=HIGHEST)


def compose(new: Array, rotation: Array) -> tuple[Array, Array]:
    """R_new R, orthonormalized where rounding took R^T R beyond `MAX_DRIFT` from I; and where so.

    `[..., d, d] x 2 -> [..., d, d], [...]` bool.
    """
    product = jnp.matmul(new, rotation, precision=HIGHEST)
    drifted = orthogonality_error(product) > MAX_DRIFT
    return jnp.where(drifted[..., None, None], orthonormalize(product), product), drifted


def fold_projection(
    kernel: Array, bias: Array | None, rotation: Array
) -> tuple[Array, Array | None]:
    """W_q' = W_q R^T and b_q' = b_q R^T, from q R^T = (t W_q + b_q) R^T, per head.

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


def _check_projection(projection: Any, rotation: Array, path: Sequence[str]) -> None:
    where = "/".join(path)
    if not isinstance(projection, Mapping) or "kernel" not in projection:
        raise UserError(
            f"query_path is {where!r}; there is no projection with a kernel at that path"
        )
    check_arrays(rotation=(rotation, "Hdd"))
    shape, (heads, width) = projection["kernel"].shape, rotation.shape[:2]
    has = math.prod(shape[1:]) // width
    if heads > has and heads % has == 0 and shape[1:] in ((has, width), (has * width,)):
        raise UserError(
            f"rotation is for {heads} heads, and the kernel at {where!r} makes {has}; allowed: as "
            "many. Queries that share one projection cannot each fold a rotation into it (latents; "
            "all tokens' queries in the layers below the last of several fusion layers)"
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
        "bias": ...}`. The caller declares that it serves only the class token: a projection that
        other tokens use as well would turn their queries too.

    Returns:
      A new nested dict; leaves that do not change are shared with `params`.

    Raises:
      UserError: nothing is at the path, or its kernel does not fit the rotation (a fused
        query-key-value projection, for one, or several fusion layers), so that folding would not
        be exact.

    Examples:
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
        _check_projection(child, rotation, query_path)
        kernel, bias = fold_projection(child["kernel"], child.get("bias"), rotation)
        folded = {**child, "kernel": kernel} | ({} if bias is None else {"bias": bias})
    return {**params, name: folded}
