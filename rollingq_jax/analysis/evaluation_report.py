"""An evaluation shown: pictures, a report and a table for the terminal."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from rollingq_jax.analysis import looking, narrative, plots
from rollingq_jax.analysis.plots.style import signed
from rollingq_jax.analysis.predictions import Predictions
from rollingq_jax.analysis.probes import Probe
from rollingq_jax.analysis.report import ReportFigure, Table, write_report


def write_pictures(
    folder: epath.Path,
    run: Any,
    probe: Probe,
    clean: Predictions,
    result: Mapping[str, Any],
) -> None:
    """Writes ``figures/evaluation_*.png`` and ``evaluation.html``.

    Args:
      folder: the run's folder.
      run: as `rollingq_jax.train.restore.load_run` returns it.
      probe: how the split was read.
      clean: predictions without corruption.
      result: what ``evaluation.json`` holds.
    """
    figures = []
    for name, figure in _figures(run, probe, clean, result):
        drawn = figure.drawn()  # once, for the file and the report
        plots.save_png(drawn.figure, folder / "figures" / f"evaluation_{name}.png")
        figures.append(drawn)
    names = ("accuracy", "macro_f1", "calibration_error", "quality_correlation")
    write_report(
        folder / "evaluation.html",
        title=f"Evaluation on {probe.split}: {run.config.data.name}, {run.config.model.fusion}",
        lead=f"{result['num_examples']} examples of split {probe.split}, with the parameters of "
        f"step {run.step}, the best by validation accuracy.",
        key_numbers={name.replace("_", " "): result[name] for name in names if name in result},
        figures=figures,
        tables=list(_tables(result)),
        data=run.dataset.description,
        config=run.config,
        versions=result["versions"] | {"device": result["device"]},
    )


def _figures(
    run: Any, probe: Probe, clean: Predictions, result: Mapping[str, Any]
) -> Iterator[tuple[str, ReportFigure]]:
    share, quality = clean.attention_share, clean.quality
    if len(share) > 1 and quality:
        yield (
            "share_quality",
            ReportFigure(
                "Does attention follow quality?",
                plots.share_quality_figure({"": (share, {m: quality[m] for m in share})}),
                "Scatter plot of each example's attention share against its quality contrast; "
                f"their correlation is {signed(result['quality_correlation'])}.",
                narrative.HOW_TO_READ["share_quality"],
            ),
        )
    if result.get("noise"):
        yield (
            "noise",
            ReportFigure(
                "What noise in one modality does",
                plots.noise_figure({"": [result["noise"]]}),
                narrative.describe_noise(result["noise"]),
                narrative.HOW_TO_READ["noise"],
            ),
        )
    if share:
        chosen = looking.choose_examples(clean)
        examples = looking.attention_examples(
            run.model, run.params, run.rotation, run.dataset, probe.split, chosen, seed=probe.seed
        )
        yield (
            "attention",
            ReportFigure(
                "Where the class token looks",
                plots.attention_figure(examples),
                "Heat maps of the class token's attention over the inputs of chosen examples.",
                narrative.HOW_TO_READ["attention"],
            ),
        )


def _tables(result: Mapping[str, Any]) -> Iterator[Table]:
    if result["corrupted"]:
        rows = [(c["corrupt"], c["accuracy"], c["unchanged"]) for c in result["corrupted"]]
        yield Table("Corrupted", ("corruption", "accuracy", "predictions unchanged"), rows)
    if "reliance" in result:
        rows = [
            (m, way, *(found.get(f) for f in ("accuracy", "unchanged", "follows")))
            + (found["attention_share"].get(m),)
            for m, ways in result["reliance"].items()
            for way, found in ways.items()
        ]
        columns = ("modality", "is", "accuracy", "predictions unchanged", "follows it", "its share")
        yield Table(
            "Reliance on each modality",
            columns,
            rows,
            "Shuffled: taken from another example. Swapped: from an example of another class; "
            "then 'follows it' is the share of predictions of that class. Replaced: by noise.",
        )
    classes = result["per_class"].items()
    rows = [(name, *(found[f] for f in ("examples", "accuracy", "f1"))) for name, found in classes]
    yield Table("Classes", ("class", "examples", "accuracy", "F1"), rows)


def summary_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table that the command prints."""
    rows = [(f"{result['split']} examples", str(result["num_examples"]))]
    rows += [
        (name.replace("_", " "), "-" if math.isnan(result[name]) else f"{result[name]:.3f}")
        for name in ("accuracy", "macro_f1", "calibration_error", "quality_correlation")
        if name in result
    ]
    rows += [
        (f"attention share, {m}", f"{s:.3f}") for m, s in result.get("attention_share", {}).items()
    ]
    for found in result["corrupted"]:
        text = f"accuracy {found['accuracy']:.3f}"
        text += "".join(f", share {m} {s:.3f}" for m, s in found.get("attention_share", {}).items())
        rows.append((found["corrupt"], text))
    for m, ways in result.get("reliance", {}).items():
        text = ", ".join(f"{way} {found['accuracy']:.3f}" for way, found in ways.items())
        rows.append((f"accuracy with {m}", text))
    return rows
