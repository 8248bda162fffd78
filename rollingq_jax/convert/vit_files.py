"""ViT weight files in one form: AugReg and big_vision `.npz`, timm `.safetensors`.

Layouts of github.com/google-research/vision_transformer (`models_vit.py`, `checkpoint.py`),
github.com/google-research/big_vision (`models/vit.py`) and timm (`vision_transformer.py`).
"""

import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from typing import NamedTuple

import numpy as np

from rollingq_jax.convert.files import load_state_dict
from rollingq_jax.errors import DataError

#: What may stand before the names of an .npz: nothing, a training checkpoint, big_vision.
PREFIXES = ("", "opt/target/", "target/", "params/")
PATCH_NPZ, PATCH_TIMM = "embedding/kernel", "patch_embed.proj.weight"

Block = dict[str, np.ndarray]
Take = Callable[[str], np.ndarray]


class Vit(NamedTuple):
    """A Vision Transformer's weights, in our layouts: linear kernels `[in, out]`.

    G = side x side patches in the file's own grid.
    """

    kernel: np.ndarray  # [h, w, 3, d]
    bias: np.ndarray  # [d]
    cls: np.ndarray | None  # [d]
    cls_position: np.ndarray | None  # [d]
    position: np.ndarray  # [side, side, d]
    blocks: list[Block]  # "norm1/scale", "attention/qkv/kernel", ... as in a block of ours
    norm: Block  # scale, bias
    unused: tuple[str, ...]  # tensors of the file that were not read: heads, further blocks


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
            vit = _from_timm(tensors, take, depth)
        else:
            vit = _from_npz(tensors, take, depth, prefix)
    except (ValueError, IndexError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} holds a tensor of an unexpected shape: {error}") from error
    return vit._replace(unused=tuple(sorted(set(tensors) - used)))


def _from_npz(tensors: Mapping[str, np.ndarray], take: Take, depth: int, prefix: str) -> Vit:
    base = f"{prefix}Transformer/"
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
    cls, position_table = f"{prefix}cls", take(position)
    return _vit(
        kernel=take(prefix + PATCH_NPZ),
        bias=take(f"{prefix}embedding/bias"),
        cls=take(cls) if cls in tensors else None,
        position=position_table,
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
    norms = {"norm1": "LayerNorm_0", "norm2": module("LayerNorm_2", "LayerNorm_1")}
    kernels = [get(f"{attention}/{part}/kernel") for part in ("query", "key", "value")]
    biases = [get(f"{attention}/{part}/bias") for part in ("query", "key", "value")]
    out = get(f"{attention}/out/kernel")
    block = {
        f"{ours}/{kind}": get(f"{theirs}/{kind}")
        for ours, theirs in norms.items()
        for kind in ("scale", "bias")
    }
    block |= {
        f"mlp/fc{i + 1}/{kind}": get(f"{mlp}/Dense_{i}/{kind}")
        for i in (0, 1)
        for kind in ("kernel", "bias")
    }
    return block | {
        "attention/qkv/kernel": np.concatenate([k.reshape(k.shape[0], -1) for k in kernels], 1),
        "attention/qkv/bias": np.concatenate([b.reshape(-1) for b in biases]),
        "attention/out/kernel": out.reshape(-1, out.shape[-1]),
        "attention/out/bias": get(f"{attention}/out/bias"),
    }


def _from_timm(tensors: Mapping[str, np.ndarray], take: Take, depth: int) -> Vit:
    linear = {
        "attention/qkv": "attn.qkv",
        "attention/out": "attn.proj",
        "mlp/fc1": "mlp.fc1",
        "mlp/fc2": "mlp.fc2",
    }

    def norm(ours: str, theirs: str) -> Block:
        return {f"{ours}scale": take(f"{theirs}.weight"), f"{ours}bias": take(f"{theirs}.bias")}

    blocks = []
    for i in range(min(depth, _count(tensors, r"blocks\.(\d+)\."))):
        block = norm("norm1/", f"blocks.{i}.norm1") | norm("norm2/", f"blocks.{i}.norm2")
        for ours, theirs in linear.items():
            block[f"{ours}/kernel"] = take(f"blocks.{i}.{theirs}.weight").T
            block[f"{ours}/bias"] = take(f"blocks.{i}.{theirs}.bias")
        blocks.append(block)
    return _vit(
        kernel=take(PATCH_TIMM).transpose(2, 3, 1, 0),
        bias=take("patch_embed.proj.bias"),
        cls=take("cls_token") if "cls_token" in tensors else None,
        position=take("pos_embed"),
        blocks=blocks,
        norm=norm("", "norm"),
    )


def _vit(
    kernel: np.ndarray,
    bias: np.ndarray,
    cls: np.ndarray | None,
    position: np.ndarray,
    blocks: list[Block],
    norm: Block,
) -> Vit:
    """Checks the patch kernel and takes the position table apart."""
    if kernel.ndim != 4 or kernel.shape[2] != 3:
        raise DataError(
            f"the patch kernel has shape {kernel.shape}; expected 3 channels, [h, w, 3, d]"
        )
    dim = kernel.shape[-1]
    rows = position.reshape(-1, dim)
    # big_vision adds positions before it prepends the class token, which then has none.
    has_cls = math.isqrt(len(rows)) ** 2 != len(rows)
    side = math.isqrt(len(rows) - has_cls)
    if side**2 + has_cls != len(rows):
        raise DataError(
            f"the position table has {len(rows)} rows; expected a square grid of patches, "
            "with at most one more row for a class token"
        )
    return Vit(
        kernel=kernel,
        bias=bias,
        cls=None if cls is None else cls.reshape(dim),
        cls_position=rows[0] if has_cls else None,
        position=rows[has_cls:].reshape(side, side, dim),
        blocks=blocks,
        norm=norm,
        unused=(),
    )


def _count(names: Collection[str], pattern: str) -> int:
    """How many blocks the names number, from 0."""
    found = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    depth = max(found, default=-1) + 1
    if len(found) != depth or not depth:
        raise DataError(f"the file numbers its blocks {sorted(found)[:12]}; expected 0, 1, 2, ...")
    return depth
