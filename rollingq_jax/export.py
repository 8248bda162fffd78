"""Exports a trained run: its weights, and a function that runs without this package.

    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors
    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors --fold
    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors --stablehlo model.bin

As well as `model.safetensors` it writes a model card, `model.json`: what the model was trained on,
how well it does, its configuration, versions and the inputs it takes. Tensors have upstream's names
where the architecture is upstream's, else ours, joined by dots, with the rotation under
`rolling.rotation`.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("export"))

import hashlib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import traverse_util

import rollingq_jax as rq
from rollingq_jax.analysis.metrics import forward
from rollingq_jax.convert import (
    from_upstream,
    load_state_dict,
    to_upstream,
    upstream_model,
    upstream_shapes,
)
from rollingq_jax.convert.upstream import ROTATION as UPSTREAM_ROTATION
from rollingq_jax.data.dataset import REGRESSION
from rollingq_jax.data.preprocessing import CLIP, Preprocessing
from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.files import write_whole
from rollingq_jax.models import build_model, dense_attention
from rollingq_jax.models.resnet import BATCH_STATS
from rollingq_jax.quality import COLLECTION, model_variables
from rollingq_jax.rotation import fold_rotation
from rollingq_jax.train.cli import WORKDIR, Command, switch, text
from rollingq_jax.train.logging import table, versions
from rollingq_jax.train.loop import LoadedRun, load_run
from rollingq_jax.train.workdir import json_ready, read_summary, write_json

log = logging.getLogger(__name__)

ROTATION = "rolling.rotation"
PLATFORMS = ("cpu", "cuda", "tpu")
LARGEST = 2**31 - 1  # bytes of a serialized function, which holds the weights too
# Of rounding raw arrays to float32, in standard deviations, above which the user is told.
ROUNDING = 1e-4


def export(
    workdir: epath.PathLike,
    out: epath.PathLike,
    *,
    stablehlo: epath.PathLike | None = None,
    fold: bool = False,
    standardized: bool = False,
) -> dict[str, Any]:
    """Writes the weights of a run's best checkpoint, the model card, and a function if asked for.

    Args:
      workdir: the run's folder.
      out: path of the weights, ending in `.safetensors`; the card has `.json` in its place.
      stablehlo: path of the serialized function.
      fold: fold the rotation into the query projection, which leaves an ordinary Transformer.
      standardized: the function takes what the model reads, and not raw arrays.

    Returns:
      The model card.

    Raises:
      CheckpointError: there is no run or no intact checkpoint.
      UserError: what is asked for cannot be exported; says why.
    """
    path = epath.Path(out).expanduser()
    if path.suffix != ".safetensors":
        raise UserError(f"--out is {str(out)!r}; allowed: a path that ends in .safetensors")
    card_path = path.with_suffix(".json")
    function_path = None if stablehlo is None else epath.Path(stablehlo).expanduser()
    if function_path in (path, card_path):
        raise UserError(f"--stablehlo is {str(stablehlo)!r}, which is written by --out as well")
    folder = epath.Path(workdir).expanduser()
    if standardized and stablehlo is None:
        raise UserError("--standardized is given without --stablehlo; allowed: both, or neither")
    return export_run(load_run(folder), folder, path, function_path, fold, standardized)


def export_run(
    run: LoadedRun,
    workdir: epath.Path,
    path: epath.Path,
    function_path: epath.Path | None = None,
    fold: bool = False,
    standardized: bool = False,
) -> dict[str, Any]:
    """`export` of a run that has been read."""
    # Both are made before a file is written: what cannot be exported leaves nothing behind.
    tensors, names, rotation = named_tensors(run, fold)
    function = None if function_path is None else serialize(run, fold, standardized)
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = save_safetensors(path, tensors, {"format": "rollingq-jax", "names": names})
    weights = {"file": path.name, "sha256": digest, "names": names, "rotation": rotation}
    files: dict[str, Any] = {"weights": weights}
    if function is not None and function_path is not None:
        function_path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(function_path, function)
        files["function"] = {
            "file": function_path.name,
            "sha256": hashlib.sha256(function).hexdigest(),
            "platforms": list(PLATFORMS),
            "call": "jax.export.deserialize(bytearray(open(file, 'rb').read())).call(batch)",
        }
        if not standardized:
            warn_of_rounding(run)
    card = model_card(run, workdir, standardized, **files)
    write_json(path.with_suffix(".json"), card)
    return card


def model_card(
    run: LoadedRun, workdir: epath.Path, standardized: bool = False, **files: Any
) -> dict[str, Any]:
    """What the model is, where it comes from, and how raw data become its input."""
    summary = read_summary(workdir) or {}
    metrics = {n: v for n, v in summary.items() if n.startswith("test_")}
    more = ("per_class", "probe_accuracy", "attention_share", "quality_correlation", "best")
    metrics |= {name: summary[name] for name in more if name in summary}
    inputs = {
        name: {"shape": ["N", *one.shape[1:]], "dtype": str(one.dtype)}
        for name, one in input_shapes(run, 1, standardized).items()
    }
    answers = "values" if run.task.name == REGRESSION else "probabilities"
    card = {
        "description": "Multimodal Transformer trained with rollingq-jax",
        "method": "Rolling Query, arXiv 2506.11465",
        **files,
        "inputs": inputs,
        "inputs_are": "standardized" if standardized else "raw",
        "preprocessing": run.inputs.to_json()["modalities"],
        "task": run.task.name,
        "outputs": {answers: ["N", run.model.spec.num_classes]},
        "masks": "True: real. An example lacks a modality where its mask is False throughout.",
        "class_names": list(run.inputs.class_names),
        "num_parameters": sum(leaf.size for leaf in jax.tree.leaves(run.params)),
        "data": run.inputs.description,
        "metrics": metrics,
        "finished": bool(summary),
        "step": run.step,
        "config": run.config.to_dict(),
        "versions": {**versions(), "rollingq-jax": rq.__version__},
    }
    return json_ready(card)


def warn_of_rounding(run: LoadedRun) -> None:
    """Says where a function of float32 arrays cannot give the numbers that training gave."""
    for m in run.model.spec.modalities:
        lost = run.inputs.modalities[m].lost_digits()
        if lost > ROUNDING:
            log.warning(
                "%s was stored as float64, and the function takes float32: rounding moves it by up "
                "to %.1g standard deviations; --standardized gives a function without that loss, "
                "for arrays that are standardized as the card says",
                m,
                lost,
            )


def named_tensors(run: LoadedRun, fold: bool) -> tuple[dict[str, np.ndarray], str, str | None]:
    """The run's tensors by name.

    Returns:
      the tensors; whose names they are, "upstream" or "own"; and where the rotation is: the name of
      a tensor, "folded", or None.

    Raises:
      UserError: `fold` is asked for, and there is no class query.
    """
    params, rotation = (folded(run), None) if fold else (run.params, run.rotation)

    def place(name: str) -> str | None:
        if fold:
            return "folded"
        return None if rotation is None else name

    if is_upstream(run):
        return to_upstream(params, rotation), "upstream", place(UPSTREAM_ROTATION)
    state = model_variables(params, run.quality, run.batch_stats)
    flat = traverse_util.flatten_dict(state.pop("params") | state, sep=".")
    tensors = {name: np.asarray(leaf) for name, leaf in sorted(flat.items())}
    if rotation is not None:
        tensors[ROTATION] = np.asarray(rotation)
    return tensors, "own", place(ROTATION)


def folded(run: LoadedRun) -> dict[str, Any]:
    """Parameters with the rotation in the query projection.

    Raises:
      UserError: there is no rotation, there are several fusion layers, or a norm bias.
    """
    spec = run.model.spec
    if run.rotation is None:
        raise UserError(
            f"--fold is given and model.fusion is {spec.fusion!r} with head {spec.head!r}, which "
            "has no class query; allowed: attention"
        )
    if spec.fusion in ("mult", "mmml"):
        raise UserError(
            f"--fold is given and model.fusion is {spec.fusion!r}; allowed: attention or "
            "jmt, since one projection makes the class token's query and those of the other "
            "tokens; without --fold the rotation is stored beside it"
        )
    if spec.fusion_layers > 1:
        raise UserError(
            f"--fold is given and model.fusion_layers is {spec.fusion_layers}; allowed: "
            "1, since lower layers make every token's queries with one projection, which cannot "
            "take the class token's rotation; without --fold the rotation is stored beside them"
        )
    if spec.quality_bias:
        raise UserError(
            f"--fold is given and model.quality_bias is {spec.quality_bias:g}; allowed: "
            "0, since an ordinary Transformer has no such bias; without --fold its statistics and "
            "the rotation are stored beside the weights"
        )
    if spec.fusion != "jmt":
        return fold_rotation(run.params, run.rotation)
    params = run.params
    # One roller has the heads of all streams; each stream has a projection of its own.
    streams = [*(f"stream_{m}" for m in spec.modalities), "joint_stream"]
    for name, rotation in zip(streams, jnp.split(run.rotation, len(streams)), strict=True):
        params = fold_rotation(params, rotation, ("fusion", f"{name}_attention", "query"))
    return params


def is_upstream(run: LoadedRun) -> bool:
    """Whether the architecture is one of upstream's: its tensors then have upstream's names.

    The width, the depths and the number of classes are free. Heads, patches and activations are
    not stored in a state dict, and positions are for inputs of one size: those have to be its own.
    """
    spec = run.model.spec
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
    structure += ["fusion_pooling", "fusion_residual", "fusion_norm"]
    structure += ["attention_scale", "quality_bias"]  # a state dict has no place for them
    structure += ["mbt_tokens", "mbt_layers", "mbt_head"] if spec.fusion == "mbt" else []
    encoder = ["kind", "patch", "depth", "width", "num_heads"]
    # The shapes are compared last: upstream has some for its own modalities only.
    if not _alike(spec, theirs, structure) or not all(
        _alike(*pair, encoder) for pair in zip(spec.encoders, theirs.encoders, strict=True)
    ):
        return False
    shapes = [upstream_shapes(dataset) for dataset in ("CREMAD", "KineticSound")]
    lengths = {"audio": slice(None), "visual": slice(1, None)}  # any number of frames
    return all(
        run.inputs.modalities[m].info.shape[lengths[m]] in [one[m][lengths[m]] for one in shapes]
        for m in spec.modalities
    )


def _alike(ours: Any, theirs: Any, names: Sequence[str]) -> bool:
    return all(getattr(ours, name) == getattr(theirs, name) for name in names)


def save_safetensors(
    path: epath.Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> str:
    """Writes tensors in float32 in the safetensors format, whole; returns the file's SHA-256.

    Raises:
      UserError: the package is not installed.
    """
    _need("safetensors", "--out")
    from safetensors.numpy import save

    arrays = {n: np.ascontiguousarray(value, np.float32) for n, value in tensors.items()}
    content = save(arrays, dict(metadata))
    write_whole(path, content)
    return hashlib.sha256(content).hexdigest()


def _need(package: str, flag: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"{flag} needs the package {package!r}, which is not installed: pip install {package}"
        )


def serialize(run: LoadedRun, fold: bool, standardized: bool = False) -> bytes:
    """`batch -> (probabilities [B, C], attention_share {m: [B, n H]})` with the weights inside.

    The probabilities are the task's answers; of a regression the values in the unit of the labels.
    The batch, of any size, holds each modality and its mask, as `input_shapes` says: raw arrays, as
    they stood in the training file, which the function preprocesses; with `standardized` what the
    model reads. `jax.export.deserialize(content).call(batch)` runs it where there are jax and
    flatbuffers without this package.

    Raises:
      UserError: the weights are too large for one function, or flatbuffers is not installed.
    """
    _need("flatbuffers", "--stablehlo")
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.params))
    if size >= LARGEST:
        raise UserError(f"the weights have {size} bytes; allowed with --stablehlo: under {LARGEST}")
    # The platform's own attention would be that of this process and not of the one that calls.
    model = build_model(run.model.spec, attention_fn=dense_attention)
    if model.spec.quality_shuffled:
        raise UserError(
            "--stablehlo is given and model.quality_shuffled is True; allowed: False, since the "
            "answers of that control depend on the other examples of a batch"
        )
    params, rotation = (folded(run), None) if fold else (run.params, run.rotation)
    variables = model_variables(params, run.quality, run.batch_stats)
    preprocessing = {m: run.inputs.modalities[m] for m in run.model.spec.modalities}

    @jax.jit
    def function(batch: dict[str, jax.Array]) -> Any:
        if not standardized:
            batch = batch | {
                m: one.apply_traced(batch[m], batch[f"{m}_mask"])
                for m, one in preprocessing.items()
            }
        probabilities, out = forward(model, variables, rotation, batch, answer=run.task.answer)
        return probabilities, out.get("attention_share", {})

    (examples,) = jax.export.symbolic_shape("examples")
    exported = jax.export.export(function, platforms=PLATFORMS)(
        input_shapes(run, examples, standardized)
    )
    return bytes(exported.serialize())


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
        if dtype.itemsize > 4:
            dtype = np.dtype(f"{dtype.kind}4")
        shapes[m] = jax.ShapeDtypeStruct((size, *shape), dtype)
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
    folded = tensors.pop(ROTATION, None)
    params = traverse_util.unflatten_dict({k: jnp.asarray(v) for k, v in tensors.items()}, ".")
    state = {name: params.pop(name) for name in (COLLECTION, BATCH_STATS) if name in params}
    return {"params": params} | state, None if folded is None else jnp.asarray(folded)


EXPORT = Command(
    "export",
    "Exports the best checkpoint of a run, with a model card beside it.",
    (
        "--workdir runs/demo --out model.safetensors --fold",
        "--workdir runs/demo --out model.safetensors --stablehlo model.bin",
    ),
    (
        WORKDIR,
        text("out", "FILE", "the weights, a path that ends in .safetensors", required=True),
        text(
            "stablehlo",
            "FILE",
            "also a serialized function of raw arrays, which jax alone can run (jax.export)",
        ),
        switch(
            "standardized",
            "that function takes arrays that are standardized already, as the card says",
        ),
        switch("fold", "fold the rotation into the query projection: an ordinary Transformer"),
    ),
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax export`; `argv` begins with the program's name."""
    given = EXPORT.parse(argv)
    card = export(
        given.workdir,
        given.out,
        stablehlo=given.stablehlo,
        fold=given.fold,
        standardized=given.standardized,
    )
    rotation = card["weights"]["rotation"]
    said = {None: "none", "folded": "folded into the query projection"}
    rows = [
        ("weights", f"{given.out}, {card['weights']['names']} names"),
        ("parameters", f"{card['num_parameters']:,}"),
        ("rotation", said.get(rotation, f"stored as {rotation}")),
        ("model card", str(epath.Path(given.out).with_suffix(".json"))),
    ]
    if "function" in card:
        platforms = ", ".join(card["function"]["platforms"])
        rows.append(("function", f"{given.stablehlo}, for {platforms}"))
    print(table(rows))
