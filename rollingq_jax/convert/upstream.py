"""Upstream's models in ours: its architecture, and its state dicts into our parameters and back.

Upstream's modules are `encoder` (both modalities in one), `a_head` and `v_head` (the probes), and
`fusion_module`; its encoder calls the visual modality "video". One table of tensors serves both
directions of the conversion.

Upstream applies its rotation to row vectors as `q R^T`, which is our `R q`: the stored matrix is
ours as it stands. Upstream itself forgets a stored rotation on reload, because its counter `r_time`
is not part of the state dict; here it is always returned, and applied where it is passed on.
"""

import logging
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax import Array

from rollingq_jax.errors import ConfigError, DataError, UserError
from rollingq_jax.models import build_model
from rollingq_jax.models.spec import MBT_HEADS

CREMA_D, KINETICS_SOUNDS = "CREMAD", "KineticSound"
DATASETS = {
    "cremad": CREMA_D,
    "kineticsound": KINETICS_SOUNDS,
    "kineticssounds": KINETICS_SOUNDS,
    "kineticssound": KINETICS_SOUNDS,
    "ks": KINETICS_SOUNDS,
}
NUM_CLASSES = {CREMA_D: 6, KINETICS_SOUNDS: 31}
SPECTROGRAMS = {CREMA_D: (257, 188), KINETICS_SOUNDS: (1024, 128)}
PATCH_SIZE = 16
FRAME_SIZE = 224  # in pixels
FRAME_TOKENS = (FRAME_SIZE // PATCH_SIZE) ** 2
MODALITIES = ("audio", "visual")
UNIMODAL = {"uni_A": "audio", "audio": "audio", "uni_V": "visual", "visual": "visual"}
STATIC = ("sum", "concat", "film", "gated")
ENCODERS = {
    "audio": {"kind": "spectrogram", "patch": (PATCH_SIZE, PATCH_SIZE)},
    "visual": {"kind": "video", "patch": (1, PATCH_SIZE, PATCH_SIZE)},
}
FIXED: dict[str, Any] = {  # what upstream's arguments do not reach
    "num_heads": 12,
    "fusion_heads": 1,
    "mlp_ratio": 4.0,
    "mbt_tokens": 4,
    "dropout": 0.2,
    "encoder_dropout": 0.0,
    "gelu": "exact",
}
ROTATION = "fusion_module.rotate"
STREAM = {"audio": "audio", "visual": "video"}  # inside upstream's encoder
LETTER = {"audio": "a", "visual": "v"}  # of upstream's probe heads
OPERAND = {"audio": "x", "visual": "y"}  # of upstream's fusion modules
KERNELS = {  # upstream's patch kernels: channel first
    "audio": (1, PATCH_SIZE, PATCH_SIZE),
    "visual": (3, 1, PATCH_SIZE, PATCH_SIZE),
}

# Modules of a block and of the fusions: upstream's name, our path, and the weight's shape there.
BLOCK = (
    ("norm1", "norm1", "d"),
    ("attn.qkv", "attention/qkv", "3d", "d"),
    ("attn.proj", "attention/out", "d", "d"),
    ("norm2", "norm2", "d"),
    ("mlp.fc1", "mlp/fc1", "4d", "d"),
    ("mlp.fc2", "mlp/fc2", "d", "4d"),
)
FUSIONS = {  # {} stands for a modality
    "attention": (
        ("attn.w_qs", "query", "d", "d"),
        ("attn.w_ks", "key", "d", "d"),
        ("attn.w_vs", "value", "d", "d"),
        ("attn.fc", "out", "d", "d"),
        ("FC", "head", "C", "d"),
    ),
    "concat": (("fc_out", "head", "C", "2d"),),
    "sum": (("fc_{}", "head_{}", "C", "d"),),
    "film": (("fc", "film", "2d", "d"), ("fc_out", "head", "C", "d")),
    "gated": (("fc_{}", "in_{}", "d", "d"), ("fc_out", "head", "C", "d")),
}
# Projections with an axis of heads here; upstream has one head.
HEADS = ("fusion/query/", "fusion/key/", "fusion/value/")

log = logging.getLogger(__name__)


def upstream_model(
    dataset: str = "CREMAD",
    fusion_method: str = "attention",
    backbone: str = "vit",
    edim: int = 768,
    depth: int = 4,
    multi_depth: int = 0,
    use_video_frames: int = 3,
    n_classes: int | None = None,
) -> Any:
    """The model that upstream builds for these arguments, which are upstream's own.

    Encoders with 12 heads, 16 x 16 patches, exact GELU; bottleneck layers and fusion attention with
    one head; dropout 0.2 in the fusion and none in the encoders.

    Args:
      dataset: "CREMAD" or "KineticSound" (also "CREMA-D", "KS", "Kinetics-Sounds").
      fusion_method: "attention", "sum", "concat", "film", "gated", or for one modality alone
        "uni_A" ("audio") or "uni_V" ("visual"). FiLM and gated are in upstream's modules, but its
        command line cannot reach them.
      backbone: "vit" or "mbt".
      edim: the model's width; a multiple of 12.
      depth: layers of each encoder, the bottleneck layers not counted.
      multi_depth: bottleneck layers; upstream sets it to 0 unless `backbone` is "mbt".
      use_video_frames: frames of a video; see `upstream_shapes`.
      n_classes: by default the data set's: 6, or 31.

    Raises:
      ConfigError: an argument has no meaning for upstream.

    Examples:
      >>> upstream_model(fusion_method="concat", edim=24).spec.fusion
      'concat'
    """
    dataset = _dataset(dataset)
    if use_video_frames < 1:
        raise ConfigError(f"use_video_frames is {use_video_frames}; allowed: 1 or more")
    if backbone not in ("vit", "mbt"):
        raise ConfigError(f"backbone is {backbone!r}; allowed: vit, mbt")
    if fusion_method not in ("attention", *STATIC, *UNIMODAL):
        allowed = ", ".join(("attention", *STATIC, *UNIMODAL))
        raise ConfigError(f"fusion_method is {fusion_method!r}; allowed: {allowed}")
    config: dict[str, Any] = {
        "fusion": fusion_method,
        "num_classes": NUM_CLASSES[dataset] if n_classes is None else n_classes,
        "dim": edim,
        "depth": depth,
        "encoders": ENCODERS,
        **FIXED,
    }
    if fusion_method in UNIMODAL:
        config |= {"fusion": "unimodal", "modality": UNIMODAL[fusion_method]}
    elif backbone == "mbt" and multi_depth:
        if fusion_method not in MBT_HEADS:
            allowed = ", ".join(MBT_HEADS)
            raise ConfigError(
                f"fusion_method is {fusion_method!r}; allowed with bottleneck layers: {allowed}"
            )
        config |= {"fusion": "mbt", "mbt_layers": multi_depth, "mbt_head": fusion_method}
    return build_model(config)


def upstream_shapes(
    dataset: str = "CREMAD", use_video_frames: int = 3
) -> dict[str, tuple[int, ...]]:
    """Shapes of one example in our layout: `{"audio": (F, T, 1), "visual": (frames, H, W, 3)}`.

    Raises:
      ConfigError: an unknown data set.

    Examples:
      >>> upstream_shapes("KineticSound")
      {'audio': (1024, 128, 1), 'visual': (3, 224, 224, 3)}
    """
    return {
        "audio": (*SPECTROGRAMS[_dataset(dataset)], 1),
        "visual": (use_video_frames, FRAME_SIZE, FRAME_SIZE, 3),
    }


def upstream_batch(audio: Any = None, video: Any = None) -> dict[str, Array]:
    """Upstream's arrays in our layout, channels last; one that is None (unimodal) is left out.

    Args:
      audio: `[B, F, T]`, the spectrograms as upstream's data sets store them.
      video: `[B, 3, T, H, W]`.

    Returns:
      `{"audio": [B, F, T, 1], "visual": [B, T, H, W, 3]}`, float32.

    Raises:
      DataError: another number of axes, or of channels.

    Examples:
      >>> batch = upstream_batch(jnp.zeros((2, 257, 188)), jnp.zeros((2, 3, 1, 224, 224)))
      >>> {name: array.shape for name, array in batch.items()}
      {'audio': (2, 257, 188, 1), 'visual': (2, 1, 224, 224, 3)}
    """
    batch = {}
    if audio is not None:
        audio = jnp.asarray(audio).astype(jnp.float32)
        if audio.ndim != 3:
            raise DataError(f"audio has shape {audio.shape}; allowed: [B, F, T]")
        batch["audio"] = audio[..., None]
    if video is not None:
        video = jnp.asarray(video).astype(jnp.float32)
        if video.ndim != 5 or video.shape[1] != 3:
            raise DataError(f"video has shape {video.shape}; allowed: [B, 3, T, H, W]")
        batch["visual"] = jnp.moveaxis(video, 1, -1)
    return batch


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

    Examples:
      >>> import jax, rollingq_jax as rq
      >>> model = rq.convert.upstream_model(edim=12, depth=1)
      >>> batch = rq.convert.upstream_batch(np.zeros((1, 257, 188)), np.zeros((1, 3, 3, 224, 224)))
      >>> params = jax.jit(model.init)(jax.random.key(0), batch)["params"]
      >>> params, rotation = from_upstream(to_upstream(params))  # there and back
      >>> rotation.shape, params["fusion"]["query"]["kernel"].shape
      ((1, 12, 12), (12, 1, 12))
    """
    found = _names(state_dict)
    variant, table, dropped = _select(found, modality)
    arrays = {name: _as_float32(name, found[name]) for name in sorted(set(found) - set(dropped))}
    sizes = _sizes(table, arrays)
    leaves = {}
    for tensor in table:
        array = arrays[tensor.name]
        _check_shape(tensor, array.shape, sizes, audio_shape)
        leaves[tensor.path] = jnp.array(_to_ours(tensor, array))
    params = traverse_util.unflatten_dict(leaves, sep="/")
    if dropped:
        log.info("dropped tensors that upstream never uses: %s", ", ".join(dropped))
    if variant.fusion != "attention":
        return params, None
    rotation = arrays[ROTATION]
    _check_shape(Tensor(ROTATION, "", ("d", "d")), rotation.shape, sizes, None)
    return params, jnp.array(rotation[None])


def dropped_tensors(state_dict: Mapping[str, Any], modality: str | None = None) -> tuple[str, ...]:
    """Names that `from_upstream` leaves out because upstream never uses them, without prefix.

    Raises:
      DataError, UserError: as `from_upstream`.

    Examples:
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

    Examples:
      >>> state_dict = to_upstream(params, rotation)  # doctest: +SKIP
    """
    leaves = traverse_util.flatten_dict(params, sep="/")
    variant = _detect_in_params(params)
    table = _tensors(variant)
    _check_names((tensor.path for tensor in table), leaves, "parameters")
    dim = leaves[f"encoder_{variant.modalities[0]}/cls"].shape[-1]
    head = next(tensor.path for tensor in table if tensor.shape[0] == "C")
    sizes = _multiples(dim) | {"C": leaves[head].shape[-1]}
    sizes |= {f"L_{m}": leaves[f"encoder_{m}/position"].shape[0] for m in variant.modalities}
    state = {}
    for tensor in table:
        array = np.array(leaves[tensor.path], dtype=np.float32)
        shape = tuple(s if isinstance(s, int) else sizes[s] for s in tensor.shape)
        expected = _our_shape(tensor, shape)
        if array.shape != expected:
            raise DataError(
                f"{tensor.path} has shape {array.shape}; upstream's {tensor.name} needs {expected}"
            )
        state[tensor.name] = np.ascontiguousarray(_to_theirs(tensor, array, shape))
    if variant.fusion == "attention":
        matrix = np.eye(dim)[None] if rotation is None else np.asarray(rotation)
        if matrix.shape != (1, dim, dim):
            raise UserError(f"rotation has shape {matrix.shape}; allowed: {(1, dim, dim)}")
        state[ROTATION] = np.array(matrix[0], dtype=np.float32)
    elif rotation is not None:
        raise UserError(
            f"rotation is given; allowed: None, for these parameters have {variant.fusion} fusion"
        )
    return state


def _dataset(name: str) -> str:
    key = "".join(c for c in str(name).lower() if c.isalnum())
    if key not in DATASETS:
        raise ConfigError(f"dataset is {name!r}; allowed: CREMAD, KineticSound")
    return DATASETS[key]


class UpstreamVariant(NamedTuple):
    """One of upstream's models, as far as the names of its tensors depend on it."""

    fusion: str  # attention, concat, sum, film, gated or unimodal
    modalities: tuple[str, ...]  # of a unimodal model, those whose stream is wanted
    depth: int
    multi_depth: int = 0  # bottleneck layers


class Tensor(NamedTuple):
    """One upstream tensor: its name, our path, and its shape there.

    Sizes in `shape` are numbers or symbols: "d" the model's width (also "2d", "3d", "4d"), "C" the
    number of classes, "L_audio" and "L_visual" the lengths of the position tables.
    """

    name: str
    path: str
    shape: tuple[int | str, ...]


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
) -> tuple[UpstreamVariant, list[Tensor], tuple[str, ...]]:
    """The variant, its table of tensors and the names to drop, all names accounted for."""
    variant = _detect(found, modality)
    table = _tensors(variant)
    live = [tensor.name for tensor in table] + [ROTATION] * (variant.fusion == "attention")
    dropped = tuple(sorted(_dead_names(variant) & set(found)))
    _check_names(live, set(found) - set(dropped), "tensors")
    return variant, table, dropped


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


def _detect(names: Collection[str], modality: str | None) -> UpstreamVariant:
    """The variant that a set of tensor names belongs to.

    Raises:
      DataError: the fusion module is of no known kind, or no variant fits.
      UserError: `modality` is no modality, or is given for a model that fuses both.
    """
    fusion = _detect_fusion(names)
    depth = max(_depth(names, f"{stream}_blocks") for stream in STREAM.values())
    if fusion == "unimodal":
        return UpstreamVariant(fusion, _detect_modalities(names, modality), depth)
    if modality is not None:
        raise UserError(
            f"modality is {modality!r}; allowed: None, for these tensors have {fusion} fusion"
        )
    multi_depth = max(_depth(names, f"bot_{stream}_blocks") for stream in STREAM.values())
    return UpstreamVariant(fusion, MODALITIES, depth, multi_depth)


def _detect_fusion(names: Collection[str]) -> str:
    parts = {name.split(".")[1] for name in names if name.startswith("fusion_module.")}
    if parts & {"attn", "FC", "cls_token", "rotate"}:
        return "attention"
    if parts & {"fc_x", "fc_y"}:
        return "gated" if "fc_out" in parts else "sum"
    if "fc" in parts:
        return "film"
    if "fc_out" in parts:
        return "concat"
    if parts:
        listed = ", ".join(sorted(f"fusion_module.{part}" for part in parts))
        raise DataError(f"unknown tensors: {listed}; they belong to no fusion module of upstream's")
    return "unimodal"


def _detect_modalities(names: Collection[str], modality: str | None) -> tuple[str, ...]:
    """The streams of a unimodal model: upstream's class stores both, and names do not tell."""
    if modality is not None:
        if modality not in UNIMODAL:
            raise UserError(f"modality is {modality!r}; allowed: audio, visual, uni_A, uni_V")
        return (UNIMODAL[modality],)
    words = {word for name in names for word in re.split(r"[._]", name) if name[:8] == "encoder."}
    streams = [m for m in MODALITIES if STREAM[m] in words]
    heads = [m for m in MODALITIES if any(n.startswith(f"{LETTER[m]}_head.") for n in names)]
    found = [m for m in streams if m in heads] or streams or heads
    if not found:
        raise DataError("no tensor has a name of upstream's, such as encoder.norm_audio.weight")
    return tuple(found)


def _depth(names: Collection[str], stack: str) -> int:
    found = (re.match(rf"encoder\.{stack}\.(\d{{1,3}})\.", name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _detect_in_params(params: Mapping[str, Any]) -> UpstreamVariant:
    """The variant of one of our parameter trees, by the names in it.

    Raises:
      DataError: its encoders are not upstream's.
    """
    modalities = tuple(
        sorted(k.removeprefix("encoder_") for k in params if k.startswith("encoder_"))
    )
    fusion = params.get("fusion", {})
    by_name = {"cls": "attention", "film": "film", "in_audio": "gated", "head": "concat"}
    kind = next((kind for name, kind in by_name.items() if name in fusion), None)
    if kind is None:  # heads named by modality
        kind = "sum" if any(name.startswith("probe_") for name in params) else "unimodal"
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise DataError(
            f"the parameters have encoders for {', '.join(modalities) or 'nothing'}; upstream has "
            + ", ".join(MODALITIES)
        )

    def depth(tree: Mapping[str, Any], prefix: str) -> int:
        return sum(name.startswith(prefix) for name in tree)

    bottleneck = depth(params.get("bottleneck", {}), f"{modalities[0]}_block_")
    encoder = depth(params[f"encoder_{modalities[0]}"], "block_")
    return UpstreamVariant(kind, modalities, encoder, bottleneck)


def _our_shape(tensor: Tensor, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape here of a tensor that has `shape` there."""
    if tensor.path.endswith("/kernel"):
        shape = (math.prod(shape[1:]), shape[0])
    else:  # upstream's tokens and tables have a batch axis
        shape = shape[sum(size == 1 for size in tensor.shape[:-1]) :]
    if tensor.path.startswith(HEADS):
        shape = (*shape[:-1], 1, shape[-1])
    return shape


def _to_ours(tensor: Tensor, array: np.ndarray) -> np.ndarray:
    """Upstream's values in our layout.

    Kernels `[out, in]` are transposed, those of patches `[d, C, (t,) h, w] -> [(t) h w C, d]`.
    """
    shape = _our_shape(tensor, array.shape)
    if tensor.path.endswith("/kernel"):
        array = np.moveaxis(array, (0, 1), (-1, -2))
    return array.reshape(shape)


def _to_theirs(tensor: Tensor, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse, of upstream's `shape`."""
    if tensor.path.endswith("/kernel"):
        return np.moveaxis(array.reshape(*shape[2:], shape[1], shape[0]), (-1, -2), (0, 1))
    return array.reshape(shape)


def _module(name: str, path: str, *shape: int | str) -> list[Tensor]:
    """Weight and bias of a projection, or of a LayerNorm, whose weight has one axis."""
    weight = "kernel" if len(shape) > 1 else "scale"
    return [
        Tensor(f"{name}.weight", f"{path}/{weight}", shape),
        Tensor(f"{name}.bias", f"{path}/bias", shape[:1]),
    ]


def _blocks(name: str, path: str, depth: int) -> Iterator[Tensor]:
    for i in range(depth):
        for theirs, ours, *shape in BLOCK:
            yield from _module(f"{name}.{i}.{theirs}", f"{path}_{i}/{ours}", *shape)


def _encoder(modality: str, depth: int) -> Iterator[Tensor]:
    stream, path = STREAM[modality], f"encoder_{modality}"
    yield Tensor(f"encoder.cls_token_{stream}", f"{path}/cls", (1, 1, "d"))
    yield Tensor(f"encoder.pos_embed_{stream}", f"{path}/position", (1, f"L_{modality}", "d"))
    embed = f"encoder.patch_embed_{stream}.proj"
    yield from _module(embed, f"{path}/embed", "d", *KERNELS[modality])
    yield from _blocks(f"encoder.{stream}_blocks", f"{path}/block", depth)
    yield from _module(f"encoder.norm_{stream}", f"norm_{modality}", "d")


def _tensors(variant: UpstreamVariant) -> list[Tensor]:
    """Every live tensor of a variant but the rotation, which is no parameter here."""
    modalities, depth = variant.modalities, variant.multi_depth
    table = [tensor for m in modalities for tensor in _encoder(m, variant.depth)]
    if depth:
        tokens = (1, FIXED["mbt_tokens"], "d")
        table.append(Tensor("encoder.bot_token", "bottleneck/tokens", tokens))
        for m in modalities:
            table += _blocks(f"encoder.bot_{STREAM[m]}_blocks", f"bottleneck/{m}_block", depth)
    if variant.fusion == "unimodal":  # upstream trains the probe head itself
        for m in modalities:
            table += _module(f"{LETTER[m]}_head", f"fusion/head_{m}", "C", "d")
        return table
    if variant.fusion == "attention":
        table.append(Tensor("fusion_module.cls_token", "fusion/cls", (1, 1, "d")))
    for theirs, ours, *shape in FUSIONS[variant.fusion]:
        for m in modalities if "{" in ours else modalities[:1]:  # one each, or one for all
            name = theirs.format(OPERAND[m])
            table += _module(f"fusion_module.{name}", f"fusion/{ours.format(m)}", *shape)
    for m in modalities:
        table += _module(f"{LETTER[m]}_head", f"probe_{m}", "C", "d")
    return table


def _dead_names(variant: UpstreamVariant) -> set[str]:
    """Tensors that upstream allocates and stores but never uses.

    The attention module's LayerNorm; the bottleneck tokens of a model without bottleneck layers;
    of a unimodal model, the whole other stream and its head.
    """
    names = set()
    if variant.fusion == "attention":
        names |= {f"fusion_module.attn.layer_norm.{kind}" for kind in ("weight", "bias")}
    if not variant.multi_depth:
        names.add("encoder.bot_token")
    for other in set(MODALITIES) - set(variant.modalities):
        head = _module(f"{LETTER[other]}_head", "", "C", "d")
        names |= {tensor.name for tensor in (*_encoder(other, variant.depth), *head)}
    return names


def _multiples(dim: int) -> dict[str, int]:
    return {"d": dim, "2d": 2 * dim, "3d": 3 * dim, "4d": 4 * dim}


def _sizes(table: list[Tensor], arrays: Mapping[str, np.ndarray]) -> dict[str, int]:
    """The width and the number of classes that most tensors have: an error names the odd one."""
    votes: dict[int | str, list[int]] = defaultdict(list)
    for tensor in table:
        for symbol, size in zip(tensor.shape, arrays[tensor.name].shape, strict=False):
            votes[symbol].append(size)
    dim, classes = (statistics.mode(votes[symbol] or [0]) for symbol in ("d", "C"))
    return _multiples(dim) | {"C": classes}


def _check_shape(
    tensor: Tensor,
    shape: tuple[int, ...],
    sizes: Mapping[str, int],
    audio_shape: tuple[int, int] | None,
) -> None:
    shapes = SPECTROGRAMS.values() if audio_shape is None else (audio_shape,)
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
        raise DataError(f"{tensor.name} has shape {shape}; allowed: ({expected})")
