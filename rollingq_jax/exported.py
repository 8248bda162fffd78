"""A run's weights as named tensors in a file, and as a function that runs without this package."""

import hashlib
import importlib.util
import json
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

from rollingq_jax.convert import (
    from_upstream,
    load_state_dict,
    to_upstream,
    upstream_model,
    upstream_shapes,
)
from rollingq_jax.convert.upstream import ROTATION as UPSTREAM_ROTATION
from rollingq_jax.data.preprocessing import CLIP, Preprocessing
from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.files import write_whole
from rollingq_jax.inference import answer_function
from rollingq_jax.models import ModelSpec, build_model, dense_attention
from rollingq_jax.quality import COLLECTION, collection, model_variables
from rollingq_jax.rotation import fold_rotation
from rollingq_jax.train.loop import LoadedRun

ROTATION = "rolling.rotation"
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 1  # bytes of a serialized function, which holds the weights too


def is_upstream(run: LoadedRun) -> bool:
    """Whether the architecture is one of upstream's: its tensors then have upstream's names.

    The width, the depths and the number of classes are free. Heads, patches and activations are
    not stored in a state dict, and positions are for inputs of one size: those have to be its own.
    """
    spec = run.model.spec
    return _has_upstreams_parts(spec) and _has_upstreams_inputs(run)


def _has_upstreams_inputs(run: LoadedRun) -> bool:
    shapes = [upstream_shapes(dataset) for dataset in ("CREMAD", "KineticSound")]
    lengths = {"audio": slice(None), "visual": slice(1, None)}  # any number of frames
    return all(
        run.inputs.modalities[m].info.shape[lengths[m]] in [one[m][lengths[m]] for one in shapes]
        for m in run.model.spec.modalities
    )


def _has_upstreams_parts(spec: ModelSpec) -> bool:
    fusion = spec.mbt_head if spec.fusion == "mbt" else spec.fusion
    try:
        theirs = upstream_model(
            fusion_method={"unimodal": spec.modality}.get(fusion, fusion) or fusion,
            backbone="mbt" if spec.fusion == "mbt" else "vit",
            edim=spec.dim,
            depth=max(encoder.depth for encoder in spec.encoders),
            multi_depth=spec.mbt_layers if spec.fusion == "mbt" else 0,
            n_classes=spec.num_classes,
        ).spec
    except ConfigError:
        return False
    structure = ["modalities", "fusion", "fusion_heads", "fusion_layers", "mlp_ratio", "gelu"]
    structure += ["attention_scale", "quality_bias"]  # a state dict has no place for them
    structure += ["mbt_tokens", "mbt_layers", "mbt_head"] if spec.fusion == "mbt" else []
    encoder = ("kind", "patch", "depth", "width", "num_heads")
    same = all(getattr(spec, name) == getattr(theirs, name) for name in structure)
    return same and all(
        getattr(ours, name) == getattr(other, name)
        for ours, other in zip(spec.encoders, theirs.encoders, strict=True)
        for name in encoder
    )


def named_tensors(run: LoadedRun, fold: bool) -> tuple[dict[str, np.ndarray], str, str | None]:
    """The run's tensors by name.

    Returns:
      the tensors; whose names they are, "upstream" or "own"; and where the rotation is: the name of
      a tensor, "folded", or None.

    Raises:
      UserError: `fold` is asked for, and there is no class query.
    """
    params, rotation = run.params, run.rotation
    if fold:
        params, rotation = folded(run), None
    rotation_is = "folded" if fold else None
    if is_upstream(run):
        if rotation is not None:
            rotation_is = UPSTREAM_ROTATION
        return to_upstream(params, rotation), "upstream", rotation_is
    flat = traverse_util.flatten_dict(params, sep=".")
    if run.quality is not None:
        flat |= traverse_util.flatten_dict({COLLECTION: collection(run.quality)}, sep=".")
    tensors = {name: np.asarray(leaf) for name, leaf in sorted(flat.items())}
    if rotation is not None:
        rotation_is = ROTATION
        tensors[ROTATION] = np.asarray(rotation)
    return tensors, "own", rotation_is


def folded(run: LoadedRun) -> dict[str, Any]:
    """Parameters with the rotation in the query projection.

    Raises:
      UserError: there is no rotation, there are several fusion layers, or a norm bias.
    """
    if run.rotation is None:
        spec = run.model.spec
        raise UserError(
            f"--fold is given and model.fusion is {spec.fusion!r} with head {spec.head!r}, which "
            "has no class query; allowed: attention"
        )
    if run.model.spec.fusion_layers > 1:
        raise UserError(
            f"--fold is given and model.fusion_layers is {run.model.spec.fusion_layers}; allowed: "
            "1, since lower layers make every token's queries with one projection, which cannot "
            "take the class token's rotation; without --fold the rotation is stored beside them"
        )
    if run.model.spec.quality_bias:
        raise UserError(
            f"--fold is given and model.quality_bias is {run.model.spec.quality_bias:g}; allowed: "
            "0, since an ordinary Transformer has no such bias; without --fold its statistics and "
            "the rotation are stored beside the weights"
        )
    return fold_rotation(run.params, run.rotation)


def save_safetensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
    """Writes a file in the safetensors format, whole or not at all; returns its SHA-256.

    A header in JSON (its length first, 8 bytes, little-endian; dtype, shape and bytes of each
    tensor), then the tensors in C order.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    chunks, start = [], 0
    for name, value in tensors.items():
        data = np.ascontiguousarray(value, "<f4").tobytes()
        offsets = [start, start + len(data)]
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": offsets}
        chunks.append(data)
        start += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    content = struct.pack("<Q", len(text)) + text + b"".join(chunks)
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def input_shapes(
    run: LoadedRun, size: Any, standardized: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """What the serialized function takes: each modality and its mask, for `size` examples.

    Raw arrays keep the dtype in which the training data were stored, except for 64 bits, which jax
    reads as 32 by default; integers that may not fit into those are taken as float32.
    """
    shapes = {}
    for m in run.model.spec.modalities:
        one = run.inputs.modalities[m]
        info = one.info
        shape, name = (info.shape, info.dtype) if standardized else (one.raw_shape, one.raw_dtype)
        dtype = np.dtype(name).newbyteorder("=")
        if not standardized and dtype.itemsize > 4 and not _fits_32_bits(one, dtype):
            dtype = np.dtype("float32")
        shapes[m] = jax.ShapeDtypeStruct((size, *shape), _at_most_32_bits(dtype))
        positions = info.shape[:1] if info.kind in ("sequence", "tokens") else ()
        shapes[f"{m}_mask"] = jax.ShapeDtypeStruct((size, *positions), np.dtype(bool))
    return shapes


def _fits_32_bits(one: Preprocessing, dtype: np.dtype) -> bool:
    """Whether raw values are still themselves with 32 bits, as far as is known of them."""
    if dtype.kind not in "iu" or one.info.dtype == "int32":  # ids are in the vocabulary
        return True
    if one.mean is None or one.std is None:
        return False
    mean, spread = np.asarray(one.mean), CLIP * np.asarray(one.std)
    largest = np.iinfo(f"{dtype.kind}4").max
    low = mean - spread if dtype.kind == "i" else -mean
    return bool((low > -largest).all() and (mean + spread < largest).all())


def _at_most_32_bits(dtype: np.dtype) -> np.dtype:
    return np.dtype(f"{dtype.kind}4") if dtype.itemsize > 4 else dtype


def serialize(
    run: LoadedRun,
    fold: bool,
    standardized: bool = False,
    platforms: Sequence[str] = PLATFORMS,
) -> bytes:
    """`batch -> (probabilities [B, C], attention_share {m: [B, n H]})` with the weights inside.

    The batch holds raw arrays, as they stood in the training file, which the function preprocesses;
    with `standardized` what the model reads.

    For any batch size, through `jax.export`: `jax.export.deserialize(content).call(batch)` runs it
    where there are jax and flatbuffers without this package. The batch holds each modality and its
    mask, as `input_shapes` says.

    Raises:
      UserError: the weights are too large for one function, or flatbuffers is not installed.
    """
    if importlib.util.find_spec("flatbuffers") is None:
        raise UserError(
            "--stablehlo needs the package 'flatbuffers', which is not installed: "
            "pip install flatbuffers"
        )
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.params))
    if size >= LARGEST:
        raise UserError(f"the weights have {size} bytes; allowed with --stablehlo: under {LARGEST}")
    model = build_model(run.model.spec, attention_fn=dense_attention)  # the same on all platforms
    if model.spec.quality_shuffled:
        raise UserError(
            "--stablehlo is given and model.quality_shuffled is True; allowed: False, since the "
            "answers of that control depend on the other examples of a batch"
        )
    params, rotation = (folded(run), None) if fold else (run.params, run.rotation)
    variables = model_variables(params, run.quality)
    answer = answer_function(model)
    preprocessing = {m: run.inputs.modalities[m] for m in run.model.spec.modalities}

    @jax.jit
    def function(batch: dict[str, jax.Array]) -> Any:
        if not standardized:
            batch = batch | {
                m: one.apply_traced(batch[m], batch[f"{m}_mask"])
                for m, one in preprocessing.items()
            }
        return answer(variables, rotation, batch)

    (examples,) = jax.export.symbolic_shape("examples")
    exported = jax.export.export(function, platforms=platforms)(
        input_shapes(run, examples, standardized)
    )
    return bytes(exported.serialize())


def read_exported(path: epath.PathLike) -> tuple[dict[str, Any], jax.Array | None]:
    """Parameters and rotation of an exported file, whichever names it has.

    Raises:
      DataError: it cannot be read, or its tensors are not those of a model.
    """
    variables, rotation = read_variables(path)
    return variables["params"], rotation


def read_variables(path: epath.PathLike) -> tuple[dict[str, Any], jax.Array | None]:
    """Variables, as `model.apply` takes them, and rotation of an exported file: with the statistics
    of a norm bias, which `read_exported` leaves out.

    Raises:
      DataError: it cannot be read, or its tensors are not those of a model.
    """
    tensors = load_state_dict(str(path))
    if any(name.startswith("encoder.") for name in tensors):  # ours begin with encoder_
        params, rotation = from_upstream(tensors)
        return {"params": params}, rotation
    rotation = tensors.pop(ROTATION, None)
    params = traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in tensors.items()}, ".")
    statistics = params.pop(COLLECTION, None)
    variables = {"params": params} | ({} if statistics is None else {COLLECTION: statistics})
    return variables, None if rotation is None else jnp.asarray(rotation)
