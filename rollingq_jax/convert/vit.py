"""ImageNet-21k ViT weights into the encoders of a multimodal model.

The paper initializes both encoders from a ViT-B/16 (Dosovitskiy et al., 2021; AugReg: Steiner et
al., 2022). Upstream reads a prepared file that it does not ship; here the public files are read:
AugReg and big_vision `.npz`, timm `.safetensors`, in the layouts of
github.com/google-research/vision_transformer (`models_vit.py`, `checkpoint.py`),
github.com/google-research/big_vision (`models/vit.py`) and timm (`vision_transformer.py`).

AugReg weights were trained with the tanh approximation of GELU and evaluated by timm with the exact
one, which is this project's default; `config.model.gelu = "tanh"` gives the former. They expect
pixels scaled as (x - 0.5) / 0.5.
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from rollingq_jax.convert.files import load_state_dict
from rollingq_jax.convert.upstream import BLOCK, FRAME_SIZE
from rollingq_jax.errors import DataError, UserError
from rollingq_jax.models.spec import ModelSpec

# Patches of the paper's spectrograms, (time, frequency): CREMA-D, Kinetics-Sounds.
SPECTROGRAM_GRIDS = {176: (11, 16), 512: (8, 64)}
# What may stand before the names of an .npz: nothing, a training checkpoint, big_vision.
PREFIXES = ("", "opt/target/", "target/", "params/")
PATCH_NPZ, PATCH_TIMM = "embedding/kernel", "patch_embed.proj.weight"

Grid = tuple[int, int]
Block = dict[str, np.ndarray]
Take = Callable[[str], np.ndarray]


class VitReport(NamedTuple):
    """What became of every parameter; each path is in one of the first three.

    Examples:
      >>> print(VitReport(("a",), {"b": "resized"}, ("c",), ()))
      1 parameters loaded, 1 left as they were
      b: resized
    """

    loaded: tuple[str, ...]  # as in the file
    reshaped: dict[str, str]  # derived from the file: path -> how
    left: tuple[str, ...]  # as they were
    unused: tuple[str, ...]  # tensors of the file that went nowhere

    def __str__(self) -> str:
        """Several lines, for a log."""
        lines = [f"{len(self.loaded)} parameters loaded, {len(self.left)} left as they were"]
        return "\n".join(lines + [f"{path}: {how}" for path, how in self.reshaped.items()])


def load_vit(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    *,
    grids: Mapping[str, Grid | None] | None = None,
) -> tuple[dict[str, Any], VitReport]:
    """Parameters whose patch encoders (spectrogram, image, video) start from a ViT's weights.

    The first layers of the file fill an encoder's layers, and the final norm its `norm_<m>`. A
    spectrogram's kernel is the sum of the file's over red, green and blue (a gray image through it
    gives what it gave through the file's); a video's gets a time axis of 1. Position embeddings are
    resized to the encoder's grid, bilinearly between patch centers, and repeated over frames.
    Fusion, probes, bottleneck layers and encoders without patches keep their values.

    Args:
      path: AugReg or big_vision `.npz`, or timm `.safetensors`.
      params: parameters of a model; not changed.
      grids: (rows, columns) of an encoder's patches, in the order in which they become tokens, and
        None for an encoder that is to be left alone; `patch_grids` makes it from a batch. Encoders
        not in it are read as the paper's: spectrograms of 11 x 16 or 8 x 64 patches, images and
        videos with frames of 224 x 224 (14 x 14 patches), or of the file's own grid.

    Returns:
      New parameters, and a report.

    Raises:
      DataError: the file cannot be used, a shape does not fit, or no encoder takes its patches.
      UserError: a grid is ambiguous or does not fit; the message names the encoder.

    Examples:
      >>> params, report = load_vit("vit.npz", params)  # doctest: +SKIP
      >>> print(report)  # doctest: +SKIP
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    encoders = _encoder_shapes(leaves)
    grids = {} if grids is None else grids
    if unknown := sorted(set(grids) - set(encoders)):
        raise UserError(f"grids has {', '.join(unknown)}; allowed: {', '.join(encoders)}")
    vit = read_vit(path, max(map(_depth, encoders.values()), default=0))
    new: dict[str, np.ndarray] = {}
    reshaped: dict[str, str] = {}
    for modality, encoder in encoders.items():
        plan = _plan(modality, encoder, vit, grids)
        if plan is None:
            continue
        base, kernel = f"encoder_{modality}", vit.kernel
        if plan.channels == 1:  # the sum, not the mean: three equal colors gave as much
            kernel = kernel.sum(axis=2)
            reshaped[f"{base}/embed/kernel"] = "sum over the file's three colors"
        new[f"{base}/embed/kernel"] = kernel.reshape(-1, kernel.shape[-1])
        new[f"{base}/embed/bias"] = vit.bias
        if vit.cls is not None:
            new[f"{base}/cls"] = vit.cls
        position, how = _positions(vit, plan, np.asarray(leaves[f"{base}/position"][0]))
        new[f"{base}/position"] = position
        if how:
            reshaped[f"{base}/position"] = how
        for i, block in enumerate(vit.blocks[: _depth(encoder)]):
            new |= {f"{base}/block_{i}/{name}": value for name, value in block.items()}
        if f"{base}/project/kernel" not in leaves:  # else the norm stands behind the projection
            new |= {f"norm_{modality}/{kind}": value for kind, value in vit.norm.items()}
    if not new:
        patch = "x".join(map(str, vit.kernel.shape[:3]))
        raise DataError(f"{path} has patches of {patch}; no encoder of the model takes these")
    for name, value in new.items():
        if leaves[name].shape != value.shape:
            raise DataError(f"{name} has shape {leaves[name].shape}; the file has {value.shape}")
    return replaced(leaves, new, reshaped, vit.unused)


def replaced(
    leaves: Mapping[str, Any],
    new: Mapping[str, np.ndarray],
    reshaped: dict[str, str],
    unused: tuple[str, ...],
) -> tuple[dict[str, Any], VitReport]:
    """The tree of `leaves` with the new values in its own dtypes, and what became of each."""
    arrays = {name: jnp.array(value, leaves[name].dtype) for name, value in new.items()}
    report = VitReport(
        loaded=tuple(sorted(set(new) - set(reshaped))),
        reshaped=reshaped,
        left=tuple(sorted(set(leaves) - set(new))),
        unused=unused,
    )
    return traverse_util.unflatten_dict({**leaves, **arrays}, sep="/"), report


def patch_grids(config_model: Any, batch: Mapping[str, Any]) -> dict[str, Grid | None]:
    """(rows, columns) of each encoder's patches, None where it has none: `load_vit`'s `grids`.

    Args:
      config_model: `config.model`, or a `ModelSpec`.
      batch: arrays `[B, ...]` (or anything with a shape) by modality.

    Examples:
      >>> encoders = {"visual": {"kind": "image", "patch": (16, 16)}}
      >>> config = {"fusion": "concat", "num_classes": 2, "encoders": encoders}
      >>> patch_grids(config, {"visual": np.zeros((1, 224, 224, 3))})
      {'visual': (14, 14)}
    """
    grids: dict[str, Grid | None] = {}
    for encoder in ModelSpec.from_config(config_model).encoders:
        shape, patch = batch[encoder.name].shape, encoder.patch
        grids[encoder.name] = None
        if patch is not None:
            rows, columns = shape[-3:-1]
            if encoder.kind == "spectrogram":  # patches are cut after the swap to (time, frequency)
                rows, columns = columns, rows
            grids[encoder.name] = (rows // patch[-2], columns // patch[-1])
    return grids


class Vit(NamedTuple):
    """A Vision Transformer's weights, in our layouts: linear kernels `[in, out]`.

    G = side x side patches in the file's own grid.
    """

    kernel: np.ndarray  # [h, w, 3, d]
    bias: np.ndarray  # [d]
    cls: np.ndarray | None  # [d]
    position: np.ndarray  # [side, side, d]
    blocks: list[Block]  # "norm1/scale", "attention/qkv/kernel", ... as in a block of ours
    norm: Block  # scale, bias
    cls_position: np.ndarray | None = None  # [d]
    unused: tuple[str, ...] = ()  # tensors of the file that were not read: heads, further blocks


class _Plan(NamedTuple):
    """How the file's patches become one encoder's."""

    channels: int
    frames: int
    grid: Grid


def _encoder_shapes(leaves: Mapping[str, Any]) -> dict[str, dict[str, tuple[int, ...]]]:
    """`{m: {path within encoder_<m>: shape}}`, in alphabetical order."""
    encoders: dict[str, dict[str, tuple[int, ...]]] = {}
    for path in sorted(leaves):
        name, _, rest = path.partition("/")
        if name.startswith("encoder_"):
            shapes = encoders.setdefault(name.removeprefix("encoder_"), {})
            shapes[rest] = leaves[path].shape
    return encoders


def _depth(encoder: Mapping[str, Any]) -> int:
    return len({name.split("/")[0] for name in encoder if name.startswith("block_")})


def _plan(
    modality: str,
    encoder: Mapping[str, tuple[int, ...]],
    vit: Vit,
    grids: Mapping[str, Grid | None],
) -> _Plan | None:
    """Reads an encoder's patches from its shapes; None where it has none, or others."""
    kernel, chosen = encoder.get("embed/kernel"), grids.get(modality)
    if kernel is None or (modality in grids and chosen is None):
        return None
    length = encoder["position"][0] - 1
    height, width = vit.kernel.shape[:2]
    channels, rest = divmod(kernel[0], height * width)
    if rest or channels not in (1, 3) or (length == 1 and chosen is None):
        if chosen is not None:
            raise DataError(
                f"encoder_{modality}/embed/kernel has shape {kernel}; the file has patches of "
                f"{height} x {width}, with 3 channels or their sum, in one frame"
            )
        return None
    if chosen is None:
        chosen = _paper_grid(modality, channels, length, vit)
    frames, rest = divmod(length, math.prod(chosen))
    if rest or frames < 1 or (channels == 1 and frames != 1):
        raise UserError(f"grids[{modality!r}] is {chosen}; the encoder has {length} patches")
    if kernel[1] != vit.kernel.shape[-1]:
        raise DataError(
            f"encoder_{modality} has width {kernel[1]}; the file has {vit.kernel.shape[-1]} (leave "
            f"this encoder alone with grids={{{modality!r}: None}})"
        )
    return _Plan(channels, frames, chosen)


def _paper_grid(modality: str, channels: int, length: int, vit: Vit) -> Grid:
    """The grid that an encoder has if it is one of the paper's, or of the file's own size."""
    if channels == 1 and length in SPECTROGRAM_GRIDS:
        return SPECTROGRAM_GRIDS[length]
    paper = (FRAME_SIZE // vit.kernel.shape[0], FRAME_SIZE // vit.kernel.shape[1])
    for grid in (paper, vit.position.shape[:2]) if channels == 3 else ():
        frames, rest = divmod(length, math.prod(grid))
        # A square number of frames might as well be one frame with a finer grid.
        if frames and not rest and (frames == 1 or math.isqrt(frames) ** 2 != frames):
            return grid
    raise UserError(
        f"the {length} patches of encoder_{modality} can be arranged in more than one way: pass "
        f"grids={{{modality!r}: (rows, columns)}}, or {{{modality!r}: None}} if they are no patches"
    )


def _positions(vit: Vit, plan: _Plan, initial: np.ndarray) -> tuple[np.ndarray, str]:
    """The position table `[1 + frames * rows * columns, d]`, and what was done to the file's."""
    steps = []
    table, side = vit.position, vit.position.shape[0]
    if plan.grid != (side, side):
        shape = (*plan.grid, table.shape[-1])
        resized = jax.image.resize(jnp.asarray(table), shape, "bilinear", antialias=False)
        table = np.asarray(resized)
        steps.append(f"grid {side} x {side} resized to {plan.grid[0]} x {plan.grid[1]}")
    if plan.frames > 1:
        steps.append(f"repeated over {plan.frames} frames")
    rows = np.tile(table.reshape(-1, table.shape[-1]), (plan.frames, 1))
    first = vit.cls_position
    if first is None:  # the file adds positions to its patches alone
        first = initial if vit.cls is None else np.zeros_like(rows[0])
        steps.append(
            "the class token's row kept" if vit.cls is None else "none for the class token"
        )
    return np.concatenate([first[None], rows]), ", ".join(steps)


def read_vit(path: str | os.PathLike[str], depth: int) -> Vit:
    """Reads a file of either layout, whatever its names say about variant and prefix.

    Args:
      path: `.npz` or `.safetensors`.
      depth: the most blocks that are wanted, from the first on.

    Raises:
      DataError: the file cannot be read, has neither layout, or lacks a tensor (which is named).
    """
    tensors = load_state_dict(path)
    used: set[str] = set()

    def take(name: str) -> np.ndarray:
        if name not in tensors:
            raise DataError(f"{path} lacks {name}")
        used.add(name)
        return np.asarray(tensors[name], dtype=np.float32)

    prefix = next((p for p in PREFIXES if p + PATCH_NPZ in tensors), None)
    if prefix is None and PATCH_TIMM not in tensors:
        raise DataError(
            f"{path} is no ViT file: it has neither {PATCH_NPZ} (AugReg, big_vision) nor "
            f"{PATCH_TIMM} (timm)"
        )
    try:
        if prefix is None:
            vit = _arranged(_from_timm(tensors, take, depth))
        else:
            vit = _arranged(_from_npz(tensors, take, depth, prefix))
    except (ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds a tensor of an unexpected shape: {error}") from error
    return vit._replace(unused=tuple(sorted(set(tensors) - used)))


def _from_npz(tensors: Mapping[str, np.ndarray], take: Take, depth: int, prefix: str) -> Vit:
    base, cls = f"{prefix}Transformer/", f"{prefix}cls"
    position = f"{base}posembed_input/pos_embedding"
    if position not in tensors:
        position = f"{prefix}pos_embedding"
    stacked = f"{base}encoderblock/LayerNorm_0/scale"
    if stacked in tensors:
        depth = min(depth, tensors[stacked].shape[0])
        blocks = [_npz_block(tensors, take, f"{base}encoderblock/", i) for i in range(depth)]
    else:
        depth = min(depth, _count(tensors, rf"{re.escape(base)}encoderblock_(\d+)/"))
        blocks = [_npz_block(tensors, take, f"{base}encoderblock_{i}/") for i in range(depth)]
    return Vit(
        kernel=take(prefix + PATCH_NPZ),
        bias=take(f"{prefix}embedding/bias"),
        cls=take(cls) if cls in tensors else None,
        position=take(position),
        blocks=blocks,
        norm={kind: take(f"{base}encoder_norm/{kind}") for kind in ("scale", "bias")},
    )


def _npz_block(
    tensors: Mapping[str, np.ndarray], take: Take, base: str, index: int | None = None
) -> Block:
    """One block; modules are numbered over all kinds in AugReg files, by kind in big_vision's."""

    def module(*names: str) -> str:
        return next((n for n in names if any(f"{base}{n}/" in t for t in tensors)), names[0])

    def get(name: str) -> np.ndarray:
        return take(base + name) if index is None else take(base + name)[index]

    attention = module("MultiHeadDotProductAttention_1", "MultiHeadDotProductAttention_0")
    mlp = module("MlpBlock_3", "MlpBlock_0")
    names = {
        "norm1": "LayerNorm_0",
        "norm2": module("LayerNorm_2", "LayerNorm_1"),
        "attention/out": f"{attention}/out",
        "mlp/fc1": f"{mlp}/Dense_0",
        "mlp/fc2": f"{mlp}/Dense_1",
    }
    block = {}
    for ours, theirs in names.items():
        for kind in ("scale" if ours in ("norm1", "norm2") else "kernel", "bias"):
            block[f"{ours}/{kind}"] = get(f"{theirs}/{kind}")
    out = block["attention/out/kernel"]
    block["attention/out/kernel"] = out.reshape(-1, out.shape[-1])
    kernels = [get(f"{attention}/{part}/kernel") for part in ("query", "key", "value")]
    biases = [get(f"{attention}/{part}/bias") for part in ("query", "key", "value")]
    return block | {
        "attention/qkv/kernel": np.concatenate([k.reshape(k.shape[0], -1) for k in kernels], 1),
        "attention/qkv/bias": np.concatenate([b.reshape(-1) for b in biases]),
    }


def _from_timm(tensors: Mapping[str, np.ndarray], take: Take, depth: int) -> Vit:
    blocks = []
    for i in range(min(depth, _count(tensors, r"blocks\.(\d+)\."))):
        block: Block = {}
        for theirs, ours, *_ in BLOCK:  # upstream took timm's names
            weight, bias = (take(f"blocks.{i}.{theirs}.{kind}") for kind in ("weight", "bias"))
            is_norm = ours in ("norm1", "norm2")
            block |= {f"{ours}/scale": weight} if is_norm else {f"{ours}/kernel": weight.T}
            block[f"{ours}/bias"] = bias
        blocks.append(block)
    return Vit(
        kernel=take(PATCH_TIMM).transpose(2, 3, 1, 0),
        bias=take("patch_embed.proj.bias"),
        cls=take("cls_token") if "cls_token" in tensors else None,
        position=take("pos_embed"),
        blocks=blocks,
        norm={"scale": take("norm.weight"), "bias": take("norm.bias")},
    )


def _arranged(vit: Vit) -> Vit:
    """Checks the patch kernel and takes the position table, as the file has it, apart."""
    if vit.kernel.ndim != 4 or vit.kernel.shape[2] != 3:
        raise DataError(
            f"the patch kernel has shape {vit.kernel.shape}; allowed: 3 channels, [h, w, 3, d]"
        )
    dim = vit.kernel.shape[-1]
    rows = vit.position.reshape(-1, dim)
    # big_vision adds positions before it prepends the class token, which then has none.
    has_cls = math.isqrt(len(rows)) ** 2 != len(rows)
    side = math.isqrt(len(rows) - has_cls)
    if side**2 + has_cls != len(rows):
        raise DataError(
            f"the position table has {len(rows)} rows; allowed: a square grid of patches, "
            "with at most one more row for a class token"
        )
    return vit._replace(
        cls=None if vit.cls is None else vit.cls.reshape(dim),
        cls_position=rows[0] if has_cls else None,
        position=rows[has_cls:].reshape(side, side, dim),
    )


def _count(names: Collection[str], pattern: str) -> int:
    """How many blocks the names number, from 0."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    depth = max(found, default=-1) + 1
    if len(found) != depth or not depth:
        raise DataError(f"the file numbers its blocks {sorted(found)[:12]}; allowed: 0, 1, 2, ...")
    return depth
