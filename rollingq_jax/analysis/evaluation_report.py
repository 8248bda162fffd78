"""An evaluation shown: pictures, a report and a table for the terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from rollingq_jax.analysis import looking, narrative, plots
from rollingq_jax.analysis.plots.style import signed
from rollingq_jax.analysis.predictions import Predictions
from rollingq_jax.analysis.probes import Probe
from rollingq_jax.analysis.report import ReportFigure, Table, write_report
from rollingq_jax.analysis.statistics import written


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
        data=probe.dataset.description,
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
                plots.share_quality_figure({"": (clean.shares(), {m: quality[m] for m in share})}),
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
    if result.get("attention_scale"):
        points = result["attention_scale"]
        yield (
            "attention_scale",
            ReportFigure(
                "Does attention do good or harm?",
                plots.attention_scale_figure(points),
                narrative.describe_attention_scale(points),
                narrative.HOW_TO_READ["attention_scale"],
            ),
        )
    if share:
        chosen = looking.choose_examples(clean)
        examples = looking.attention_examples(
            run.model, run.params, run.rotation, probe.dataset, probe.split, chosen, seed=probe.seed
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
        fields = ["corrupt", "accuracy", "unchanged"]
        columns = ["corruption", "accuracy", "predictions unchanged"]
        for field, words in (
            ("kept", "examples that keep their last modality"),
            ("nonfinite", "NaN or infinite logits"),
        ):
            if any(field in found for found in result["corrupted"]):
                fields.append(field)
                columns.append(words)
        corrupted = [[found.get(field) for field in fields] for found in result["corrupted"]]
        yield Table("Corrupted", columns, corrupted)
    if "reliance" in result:
        rows = [
            (m, way, *(found.get(f) for f in ("accuracy", "unchanged", "follows")))
            + (found["attention_share"].get(m),)
            for m, ways in result["reliance"].items()
            for way, found in ways.items()
        ]
        yield Table(
            "Reliance on each modality",
            ("modality", "is", "accuracy", "predictions unchanged", "follows it", "its share"),
            rows,
            "Shuffled: taken from another example. Swapped: from an example of another class; "
            "then 'follows it' is the share of predictions of that class. Replaced: by noise.",
        )
    if "modality_examples" in result:
        counts = result["modality_examples"]
        share = result.get("attention_share", {})
        present = [(m, count, share.get(m)) for m, count in counts.items()]
        text = "Shares and correlations are over the examples that have the modality."
        yield Table("Modalities", ("modality", "examples that have it", "its share"), present, text)
    classes = result["per_class"].items()
    lines = [(name, *(found[f] for f in ("examples", "accuracy", "f1"))) for name, found in classes]
    yield Table("Classes", ("class", "examples", "accuracy", "F1"), lines)


def _share_rows(
    scores: Mapping[str, Any], words: str = "attention share, {}"
) -> list[tuple[str, str]]:
    """The share of each modality, with the examples behind it where some lack one."""
    counts = scores.get("modality_examples", {})
    return [
        (words.format(m), written(share, count=counts.get(m)))
        for m, share in scores.get("attention_share", {}).items()
    ]


def summary_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table that the command prints."""
    rows = [(f"{result['split']} examples", str(result["num_examples"]))]
    if "nonfinite" in result:
        rows.append(("examples with NaN or infinite logits", str(result["nonfinite"])))
    paired = min(result.get("contrast_examples", {}).values(), default=None)
    rows += [
        (
            name.replace("_", " "),
            written(result[name], count=paired if name == "quality_correlation" else None),
        )
        for name in ("accuracy", "macro_f1", "calibration_error", "quality_correlation")
        if name in result
    ]
    rows += _share_rows(result)
    for found in result["corrupted"]:
        text = f"accuracy {written(found['accuracy'])}"
        text += "".join(f", {words} {value}" for words, value in _share_rows(found, "share {}"))
        if "nonfinite" in found:
            text += f", {found['nonfinite']} with NaN or infinite logits"
        if "kept" in found:
            text += f", {found['kept']} examples keep their last modality"
        rows.append((found["corrupt"], text))
    for point in result.get("attention_scale", []):
        name = f"accuracy with the query times {point['scale']:g}"
        rows.append((name, written(point["accuracy"])))
    for m, ways in result.get("reliance", {}).items():
        text = ", ".join(f"{way} {written(found['accuracy'])}" for way, found in ways.items())
        rows.append((f"accuracy with {m}", text))
    return rows
