"""Upstream's tensor names and layouts, beside the places they have in our parameter tree.

One table serves both directions. Upstream's modules are `encoder` (both modalities in one),
`a_head` and `v_head` (the probes), and `fusion_module`; its encoder calls the visual one "video".
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

Path = tuple[str, ...]
Template = tuple[int | str, ...]

MODALITIES = ("audio", "visual")
STREAM = {"audio": "audio", "visual": "video"}  # inside upstream's encoder
LETTER = {"audio": "a", "visual": "v"}  # of upstream's probe heads
OPERAND = {"audio": "x", "visual": "y"}  # of upstream's fusion modules
PATCH = {"audio": (1, 16, 16), "visual": (3, 1, 16, 16)}  # upstream's kernels: channel first
BOTTLENECK_TOKENS = 4


class Arm(NamedTuple):
    """What decides the names of a model's tensors."""

    fusion: str  # attention, concat, sum, film, gated or unimodal
    modalities: tuple[str, ...]  # of a unimodal arm, those whose stream is wanted
    depth: int
    multi_depth: int = 0  # bottleneck layers


class Tensor(NamedTuple):
    """One upstream tensor: its name, our path, how the values are laid out, and its shape.

    Sizes in `shape` are numbers or symbols: "d" the model's width (also "2d", "3d", "4d"), "C" the
    number of classes, "L_audio" and "L_visual" the lengths of the position tables.
    """

    name: str
    path: Path
    layout: str
    shape: Template


class Layout(NamedTuple):
    """`ours(array)` from upstream's values, `theirs(array, shape)` back to upstream's shape."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]


def _patch_ours(kernel: np.ndarray) -> np.ndarray:
    """`[d, C, (t,) h, w] -> [(t) h w C, d]`: channels last inside the patch."""
    return np.moveaxis(kernel, (0, 1), (-1, -2)).reshape(-1, kernel.shape[0])


def _patch_theirs(kernel: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return np.moveaxis(kernel.reshape(*shape[2:], shape[1], shape[0]), (-1, -2), (0, 1))


LAYOUTS = {
    "plain": Layout(lambda x: x, lambda x, shape: x),
    "token": Layout(lambda x: x[0, 0], lambda x, shape: x[None, None]),
    "table": Layout(lambda x: x[0], lambda x, shape: x[None]),
    "linear": Layout(np.transpose, lambda x, shape: x.T),
    "patch": Layout(_patch_ours, _patch_theirs),
    # The query, key and value projections carry a head axis here; upstream has one head.
    "head_kernel": Layout(lambda x: x.T[:, None], lambda x, shape: x[:, 0].T),
    "head_bias": Layout(lambda x: x[None], lambda x, shape: x[0]),
}


def _linear(name: str, path: Path, inside: str, outside: str, head: bool = False) -> list[Tensor]:
    kernel, bias = ("head_kernel", "head_bias") if head else ("linear", "plain")
    return [
        Tensor(f"{name}.weight", (*path, "kernel"), kernel, (outside, inside)),
        Tensor(f"{name}.bias", (*path, "bias"), bias, (outside,)),
    ]


def _norm(name: str, path: Path) -> list[Tensor]:
    return [
        Tensor(f"{name}.weight", (*path, "scale"), "plain", ("d",)),
        Tensor(f"{name}.bias", (*path, "bias"), "plain", ("d",)),
    ]


def _block(name: str, path: Path) -> list[Tensor]:
    return [
        *_norm(f"{name}.norm1", (*path, "norm1")),
        *_linear(f"{name}.attn.qkv", (*path, "attention", "qkv"), "d", "3d"),
        *_linear(f"{name}.attn.proj", (*path, "attention", "out"), "d", "d"),
        *_norm(f"{name}.norm2", (*path, "norm2")),
        *_linear(f"{name}.mlp.fc1", (*path, "mlp", "fc1"), "d", "4d"),
        *_linear(f"{name}.mlp.fc2", (*path, "mlp", "fc2"), "4d", "d"),
    ]


def _encoder(modality: str, depth: int) -> Iterator[Tensor]:
    stream, path = STREAM[modality], (f"encoder_{modality}",)
    yield Tensor(f"encoder.cls_token_{stream}", (*path, "cls"), "token", (1, 1, "d"))
    length = f"L_{modality}"
    yield Tensor(f"encoder.pos_embed_{stream}", (*path, "position"), "table", (1, length, "d"))
    embed = f"encoder.patch_embed_{stream}.proj"
    kernel: Template = ("d", *PATCH[modality])
    yield Tensor(f"{embed}.weight", (*path, "embed", "kernel"), "patch", kernel)
    yield Tensor(f"{embed}.bias", (*path, "embed", "bias"), "plain", ("d",))
    for i in range(depth):
        yield from _block(f"encoder.{stream}_blocks.{i}", (*path, f"block_{i}"))
    yield from _norm(f"encoder.norm_{stream}", (f"norm_{modality}",))


def _bottleneck(modalities: tuple[str, ...], depth: int) -> Iterator[Tensor]:
    tokens = (1, BOTTLENECK_TOKENS, "d")
    yield Tensor("encoder.bot_token", ("bottleneck", "tokens"), "table", tokens)
    for modality in modalities:
        for i in range(depth):
            path = ("bottleneck", f"{modality}_block_{i}")
            yield from _block(f"encoder.bot_{STREAM[modality]}_blocks.{i}", path)


def _attention() -> Iterator[Tensor]:
    yield Tensor("fusion_module.cls_token", ("fusion", "cls"), "token", (1, 1, "d"))
    for name, ours in (("w_qs", "query"), ("w_ks", "key"), ("w_vs", "value")):
        yield from _linear(f"fusion_module.attn.{name}", ("fusion", ours), "d", "d", head=True)
    yield from _linear("fusion_module.attn.fc", ("fusion", "out"), "d", "d")
    yield from _linear("fusion_module.FC", ("fusion", "head"), "d", "C")


def _fusion(arm: Arm) -> Iterator[Tensor]:
    head = ("fusion", "head")
    if arm.fusion == "attention":
        yield from _attention()
    elif arm.fusion == "concat":
        yield from _linear("fusion_module.fc_out", head, "2d", "C")
    elif arm.fusion == "sum":
        for modality in arm.modalities:
            name = f"fusion_module.fc_{OPERAND[modality]}"
            yield from _linear(name, ("fusion", f"head_{modality}"), "d", "C")
    elif arm.fusion == "film":
        yield from _linear("fusion_module.fc", ("fusion", "film"), "d", "2d")
        yield from _linear("fusion_module.fc_out", head, "d", "C")
    elif arm.fusion == "gated":
        for modality in arm.modalities:
            name = f"fusion_module.fc_{OPERAND[modality]}"
            yield from _linear(name, ("fusion", f"in_{modality}"), "d", "d")
        yield from _linear("fusion_module.fc_out", head, "d", "C")
    else:  # unimodal: upstream trains the probe head itself
        for modality in arm.modalities:
            yield from _linear(f"{LETTER[modality]}_head", ("fusion", f"head_{modality}"), "d", "C")


def tensors(arm: Arm) -> list[Tensor]:
    """Every live tensor of an arm but the rotation, which is no parameter here."""
    table = [tensor for m in arm.modalities for tensor in _encoder(m, arm.depth)]
    if arm.multi_depth:
        table += _bottleneck(arm.modalities, arm.multi_depth)
    table += _fusion(arm)
    if arm.fusion != "unimodal":
        for m in arm.modalities:
            table += _linear(f"{LETTER[m]}_head", (f"probe_{m}",), "d", "C")
    return table


def dead_names(arm: Arm) -> set[str]:
    """Tensors that upstream allocates and stores but never uses.

    The attention module's LayerNorm; the bottleneck tokens of a model without bottleneck layers;
    of a unimodal model, the whole other stream and its head.
    """
    names = set()
    if arm.fusion == "attention":
        names |= {f"fusion_module.attn.layer_norm.{kind}" for kind in ("weight", "bias")}
    if not arm.multi_depth:
        names.add("encoder.bot_token")
    for other in set(MODALITIES) - set(arm.modalities):
        names |= {tensor.name for tensor in _encoder(other, arm.depth)}
        names |= {f"{LETTER[other]}_head.{kind}" for kind in ("weight", "bias")}
    return names
