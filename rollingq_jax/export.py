"""Exports a trained run: its weights, and a function that runs without this package.

    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors
    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors --fold
    python -m rollingq_jax.export --workdir runs/demo --out model.safetensors --stablehlo model.bin

Beside ``model.safetensors`` it writes a model card, ``model.json``: what the model was trained on,
how well it does, its configuration, versions and the inputs it takes. Tensors have upstream's names
where the architecture is upstream's, else ours, joined by dots, with the rotation under
``rolling.rotation``.
"""

import hashlib
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from etils import epath

import rollingq_jax as rq
from rollingq_jax.errors import UserError
from rollingq_jax.exported import (
    PLATFORMS,
    input_shapes,
    named_tensors,
    save_safetensors,
    serialize,
)
from rollingq_jax.files import write_whole
from rollingq_jax.train.cli import WORKDIR, Command, run_command, switch, text
from rollingq_jax.train.logging import table, versions
from rollingq_jax.train.loop import LoadedRun, load_run
from rollingq_jax.train.workdir import json_ready, read_summary, write_json

log = logging.getLogger(__name__)
# Of rounding raw arrays to float32, in standard deviations, above which the user is told.
ROUNDING = 1e-4


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
    card = {
        "description": "Multimodal Transformer trained with rollingq-jax",
        "method": "Rolling Query, arXiv 2506.11465",
        **files,
        "inputs": inputs,
        "inputs_are": "standardized" if standardized else "raw",
        "preprocessing": run.inputs.to_json()["modalities"],
        "outputs": {"probabilities": ["N", run.model.spec.num_classes]},
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
      out: path of the weights, ending in ``.safetensors``; the card has ``.json`` in its place.
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


EXPORT = Command(
    "export",
    "Exports the best checkpoint of a run, with a model card beside it.",
    "--workdir runs/demo --out model.safetensors --fold",
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
    rows = [
        ("weights", f"{given.out}, {card['weights']['names']} names"),
        ("parameters", f"{card['num_parameters']:,}"),
        ("rotation", rotation_line(card["weights"])),
        ("model card", str(epath.Path(given.out).with_suffix(".json"))),
    ]
    if "function" in card:
        platforms = ", ".join(card["function"]["platforms"])
        rows.append(("function", f"{given.stablehlo}, for {platforms}"))
    print(table(rows))


def rotation_line(weights: Mapping[str, Any]) -> str:
    """What became of the rotation, in words."""
    if weights["rotation"] is None:
        return "none"
    folded = weights["rotation"] == "folded"
    return "folded into the query projection" if folded else f"stored as {weights['rotation']}"


if __name__ == "__main__":
    sys.exit(run_command(command, sys.argv))
