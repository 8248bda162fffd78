"""Upstream's state dicts into our parameters, and back.

Upstream applies its rotation to row vectors as `q R^T`, which is our `R q`: the stored matrix is
ours as it stands. Upstream itself forgets a stored rotation on reload, because its counter `r_time`
is not part of the state dict; here it is always returned, and applied where it is passed on.
"""

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from rollingq_jax.convert.detect import detect, detect_in_params
from rollingq_jax.convert.names import LAYOUTS, Arm, Tensor, dead_names, tensors
from rollingq_jax.errors import DataError, UserError

ROTATION = "fusion_module.rotate"
AUDIO_SHAPES = ((257, 188), (1024, 128))  # CREMA-D, Kinetics-Sounds
FRAME_TOKENS = 196  # 14 x 14 patches of a 224 x 224 frame
PATCH_SIZE = 16

_log = logging.getLogger(__name__)


def from_upstream(
    state_dict: Mapping[str, Any],
    modality: str | None = None,
    audio_shape: tuple[int, int] | None = None,
) -> tuple[dict[str, Any], Array | None]:
    """Parameters and rotation of one of upstream's models: all its arms, with or without MBT.

    Tensors that upstream stores but never uses are left out, and logged at level INFO;
    `dropped_tensors` lists them.

    Args:
      state_dict: upstream's names to NumPy arrays, or anything `np.asarray` takes (PyTorch tensors
        too). A `module.` before every name (`DataParallel`) and a `{'model': state_dict}` around
        them (upstream's checkpoints) are accepted.
      modality: "audio" or "visual" ("uni_A", "uni_V"), which stream of a unimodal model to take.
        Upstream's class stores both, with both heads, and does not say which was trained. Without
        it both are returned where both are there, and the model reads its own.
      audio_shape: `(F, T)` of the spectrograms as stored, where they are neither CREMA-D's nor
        Kinetics-Sounds' (the position table has to fit).

    Returns:
      Parameters in float32, as `upstream_model` takes them; and the rotation `[1, d, d]` with
      q_new = R q, or None without attention fusion.

    Raises:
      DataError: a tensor is missing, unknown or not numeric, or its shape does not fit; the message
        names it, with both shapes.
      UserError: `modality` is no modality, or is given for a model that fuses both.

    Example:
      >>> import jax, rollingq_jax as rq
      >>> model = rq.convert.upstream_model(edim=12, depth=1)
      >>> batch = rq.convert.upstream_batch(np.zeros((1, 257, 188)), np.zeros((1, 3, 3, 224, 224)))
      >>> params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
      >>> params, rotation = from_upstream(to_upstream(params))  # there and back
      >>> rotation.shape, params["fusion"]["query"]["kernel"].shape
      ((1, 12, 12), (12, 1, 12))
    """
    found = _names(state_dict)
    arm, table, dropped = _select(found, modality)
    arrays = {name: _as_float32(name, found[name]) for name in sorted(set(found) - set(dropped))}
    sizes = _sizes(table, arrays)
    leaves = {}
    for tensor in table:
        array = arrays[tensor.name]
        _check_shape(tensor, array.shape, sizes, audio_shape)
        leaves[tensor.path] = jnp.array(LAYOUTS[tensor.layout].ours(array))
    params = traverse_util.unflatten_dict(leaves)
    if dropped:
        _log.info("dropped tensors that upstream never uses: %s", ", ".join(dropped))
    if arm.fusion != "attention":
        return params, None
    rotation = arrays[ROTATION]
    _check_shape(Tensor(ROTATION, (), "plain", ("d", "d")), rotation.shape, sizes, None)
    return params, jnp.array(rotation[None])


def dropped_tensors(state_dict: Mapping[str, Any], modality: str | None = None) -> tuple[str, ...]:
    """Names that `from_upstream` leaves out because upstream never uses them, without prefix.

    Raises:
      DataError, UserError: as `from_upstream`.

    Example:
      >>> dropped_tensors(load_state_dict("model.pth"))  # doctest: +SKIP
    """
    return _select(_names(state_dict), modality)[2]


def to_upstream(params: Mapping[str, Any], rotation: Any = None) -> dict[str, np.ndarray]:
    """The inverse of `from_upstream`: upstream's names and layouts, float32.

    Tensors that upstream never uses are not made up, so its `load_state_dict` wants `strict=False`;
    a model with a rotation also wants `fusion_module.r_time = 1` there, or the rotation folded away
    beforehand (`fold_rotation`).

    Args:
      params: parameters of a model with upstream's architecture (`upstream_model`).
      rotation: `[1, d, d]`; None is the identity. Attention fusion only.

    Raises:
      DataError: the parameters are not those of an architecture of upstream's.
      UserError: a rotation without attention fusion, or of another shape.

    Example:
      >>> state_dict = to_upstream(params, rotation)  # doctest: +SKIP
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    arm = detect_in_params(params)
    table = tensors(arm)
    _check_names(("/".join(tensor.path) for tensor in table), leaves, "parameters")
    dim = leaves[f"encoder_{arm.modalities[0]}/cls"].shape[-1]
    sizes = _multiples(dim) | {"C": leaves[_head(arm)].shape[-1]}
    sizes |= {f"L_{m}": leaves[f"encoder_{m}/position"].shape[0] for m in arm.modalities}
    state = {}
    for tensor in table:
        path, layout = "/".join(tensor.path), LAYOUTS[tensor.layout]
        array = np.array(leaves[path], dtype=np.float32)
        shape = tuple(s if isinstance(s, int) else sizes[s] for s in tensor.shape)
        expected = layout.ours(np.zeros(shape, np.float32)).shape
        if array.shape != expected:
            raise DataError(
                f"{path} has shape {array.shape}; upstream's {tensor.name} needs {expected}"
            )
        state[tensor.name] = np.ascontiguousarray(layout.theirs(array, shape))
    if arm.fusion == "attention":
        matrix = np.eye(dim)[None] if rotation is None else np.asarray(rotation)
        if matrix.shape != (1, dim, dim):
            raise UserError(f"rotation has shape {matrix.shape}; allowed: {(1, dim, dim)}")
        state[ROTATION] = np.array(matrix[0], dtype=np.float32)
    elif rotation is not None:
        raise UserError(
            f"rotation is given; allowed: None, for these parameters have {arm.fusion} fusion"
        )
    return state


def _names(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors by name, out of their wrapper and without `module.`."""
    if not isinstance(state_dict, Mapping):
        raise DataError(f"state_dict is a {type(state_dict).__name__}; allowed: a mapping of names")
    if isinstance(state_dict.get("model"), Mapping):
        state_dict = state_dict["model"]
    found: dict[str, Any] = {}
    for name, value in state_dict.items():
        short = str(name).removeprefix("module.")
        if short in found:
            raise DataError(f"{short} is there twice, with and without the prefix 'module.'")
        found[short] = value
    return found


def _select(
    found: Mapping[str, Any], modality: str | None
) -> tuple[Arm, list[Tensor], tuple[str, ...]]:
    """The arm, the table of its tensors and the names to drop, once all names are accounted for."""
    arm = detect(found, modality)
    table = tensors(arm)
    live = [tensor.name for tensor in table] + [ROTATION] * (arm.fusion == "attention")
    dropped = tuple(sorted(dead_names(arm) & set(found)))
    _check_names(live, set(found) - set(dropped), "tensors")
    return arm, table, dropped


def _check_names(wanted: Iterable[str], found: Collection[str], what: str) -> None:
    wanted = list(wanted)
    problems = [
        f"{kind} {what}: {_listed(names)}"
        for kind, names in (
            ("missing", [name for name in wanted if name not in found]),
            ("unknown", sorted(set(found) - set(wanted))),
        )
        if names
    ]
    if problems:
        raise DataError("; ".join(problems))


def _listed(names: list[str], most: int = 8) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _as_float32(name: str, value: Any) -> np.ndarray:
    try:
        if hasattr(value, "detach"):  # a PyTorch tensor: NumPy knows no bfloat16, no other device
            value = value.detach().cpu().float()
        array = np.asarray(value)
    except Exception as error:
        raise DataError(f"{name} is a {type(value).__name__} that is no array: {error}") from error
    if not (jnp.issubdtype(array.dtype, np.floating) or jnp.issubdtype(array.dtype, np.integer)):
        raise DataError(f"{name} has dtype {array.dtype}; allowed: numbers")
    return array.astype(np.float32)


def _multiples(dim: int) -> dict[str, int]:
    return {"d": dim, "2d": 2 * dim, "3d": 3 * dim, "4d": 4 * dim}


def _sizes(table: list[Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The width and the number of classes that most tensors have: an error names the odd one."""
    votes: dict[str, Counter[int]] = {"d": Counter(), "C": Counter()}
    for tensor in table:
        for symbol, size in zip(tensor.shape, arrays[tensor.name].shape, strict=False):
            if symbol in votes:
                votes[symbol][size] += 1
    common = {symbol: counter.most_common(1) for symbol, counter in votes.items()}
    dim, classes = (pairs[0][0] if pairs else 0 for pairs in (common["d"], common["C"]))
    return _multiples(dim) | {"C": classes}


def _check_shape(
    tensor: Tensor,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    audio_shape: tuple[int, int] | None,
) -> None:
    shapes = AUDIO_SHAPES if audio_shape is None else (audio_shape,)
    lengths = tuple(1 + (f // PATCH_SIZE) * (t // PATCH_SIZE) for f, t in shapes)

    def fits(symbol: int | str, size: int) -> bool:
        if symbol == "L_audio":
            return size in lengths
        if symbol == "L_visual":
            return size > 1 and (size - 1) % FRAME_TOKENS == 0
        return size == (symbol if isinstance(symbol, int) else sizes[symbol])

    def shown(symbol: int | str) -> str:
        if symbol == "L_audio":
            return " or ".join(map(str, lengths))
        if symbol == "L_visual":
            return f"1 + {FRAME_TOKENS} x frames"
        return str(symbol if isinstance(symbol, int) else sizes[symbol])

    if len(shape) != len(tensor.shape) or not all(map(fits, tensor.shape, shape)):
        expected = ", ".join(map(shown, tensor.shape)) + ("," if len(tensor.shape) == 1 else "")
        raise DataError(f"{tensor.name} has shape {shape}; expected ({expected})")


def _head(arm: Arm) -> str:
    named = arm.fusion in ("sum", "unimodal")
    return f"fusion/head_{arm.modalities[0]}/kernel" if named else "fusion/head/kernel"
