"""The end of a run: the test set, read once, then `summary.json`, figures and the report.

The training loop imports this when it is there: Matplotlib is for finished runs.
"""

import functools
import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from rollingq_jax.analysis import plots, report
from rollingq_jax.analysis.metrics import (
    Predictions,
    scores,
    uniform_shares,
    where_present,
    written,
)
from rollingq_jax.analysis.plots.training import used_up
from rollingq_jax.analysis.report import (
    ReportFigure,
    Table,
    attention_examples,
    choose_examples,
    write_report,
)
from rollingq_jax.analysis.tasks import HEADLINES, MAIN, METRICS, task_name
from rollingq_jax.data.dataset import REGRESSION
from rollingq_jax.train.checkpoint import Checkpoints, DamagedError
from rollingq_jax.train.config import flatten
from rollingq_jax.train.experiment import Columns, Experiment
from rollingq_jax.train.logging import (
    Callback,
    MetricsWriter,
    Row,
    Snapshot,
    count,
    device_line,
    load_snapshots,
    read_rows,
    table,
    versions,
)
from rollingq_jax.train.output import wrapped
from rollingq_jax.train.train_state import TrainState
from rollingq_jax.train.workdir import is_number, json_ready, write_json

log = logging.getLogger(__name__)

MAX_ROTATIONS_DRAWN = 2


def finish_run(
    experiment: Experiment,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    best: Mapping[str, Any],
    step: int,
    callbacks: Sequence[Callback] = (),
    plain: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Tests the best checkpoint and leaves the summary, the figures and the report.

    `step` is the last that was trained, which is not that of the plan where patience ended. The
    summary is written last: as long as it is missing, the same command does this again. `plain` is
    the best checkpoint of the same run without rotations, where there is one; it is tested too.
    """
    state, best = restore_best(experiment, workdir, checkpoints, best)
    means, columns = experiment.evaluate(experiment.parallel.put_state(state), "test")
    rotations = None if state.rolling is None else np.asarray(state.rolling.count).tolist()
    predictions = predictions_of(experiment, columns)
    without = None if plain is None else plain_predictions(experiment, workdir, plain)
    probe = f"probe_{experiment.task.main}"
    probes = {n.removeprefix(f"{probe}/"): v for n, v in means.items() if n.startswith(f"{probe}/")}
    found = test_scores(predictions, experiment) | {
        "test_loss": means["loss"],
        "task": experiment.task.name,
        probe: probes,
        "best": best,
        "rotations": rotations,
        "num_parameters": count(state.params),
        "seed": experiment.config.seed,
        "device": device_line(),
        "versions": versions(),
        "command": sys.argv,
        "data": experiment.dataset.description,
        **experiment.identity(),
    }
    epoch = step // experiment.epoch_steps
    if step < experiment.total_steps:
        found["stopped_early"] = {"step": step, "epoch": epoch}
    summary = json_ready(found)
    state = experiment.parallel.get_learned(state)  # in which all processes take part
    if jax.process_index() == 0:
        writer = MetricsWriter(workdir, step, callbacks=callbacks)
        writer.remove("test")  # of an earlier try, cut off before its summary
        writer.write([{"step": step, "epoch": epoch, "split": "test"} | means])
        spent = used_up(writer.rows)
        if spent is not None:
            summary["rotations_used_up"] = spent
        summary["verdicts"] = report.run_verdicts(
            predictions,
            writer.rows,
            experiment.config.rolling,
            rotations=0 if rotations is None else int(np.sum(rotations)),
            plain=without,
            task=experiment.task,
        )
        draw(experiment, workdir, state, summary, predictions, writer.rows)
        write_json(workdir / "summary.json", summary)
    return summary


def selected_on(summary: Mapping[str, Any]) -> str:
    """What chose the best checkpoint: the training data where they have no validation part."""
    validation = flatten(summary.get("config") or {}).get("data.validation", True)
    return "validation" if validation else "training"


def plain_predictions(
    experiment: Experiment, workdir: epath.Path, best: Mapping[str, Any]
) -> Predictions | None:
    """The answers on the test split of the same run without rotations; None if it is damaged."""
    with Checkpoints(workdir / "plain" / "checkpoints", read_only=True) as checkpoints:
        try:
            state, _ = checkpoints.restore(best["step"], experiment.abstract_state())
        except DamagedError as error:
            log.warning("the run without rotations is left out of the verdicts: %s", error)
            return None
    _, columns = experiment.evaluate(experiment.parallel.put_state(state), "test")
    return predictions_of(experiment, columns)


def print_summary(summary: Mapping[str, Any], workdir: epath.Path) -> None:
    """Verdicts and a table at the end of a run; of a summary that lacks something, what it has."""
    if jax.process_index() > 0:
        return
    best = summary["best"]

    def mapping(name: str) -> Mapping[str, Any]:
        found = summary.get(name)
        return found if isinstance(found, Mapping) else {}

    def shown(value: Any, form: str = ".3f", count: Any = None) -> str:
        count = count if isinstance(count, int) else None
        return written(value if is_number(value) else None, form, count)

    headlines = HEADLINES[task_name(summary)]
    main, metric = headlines[0], chosen_by(summary)
    by = "" if metric == "accuracy" else f" {METRICS[metric].words}"
    chosen = f"best epoch by {selected_on(summary)}{by}"
    rows = {chosen: f"{best['epoch']} ({shown(best[metric])})"}
    for name in headlines:
        if f"test_{name}" in summary:
            rows[f"test {METRICS[name].words}"] = shown(summary[f"test_{name}"])
    if "stopped_early" in summary:
        rows["training ended early, after epoch"] = str(mapping("stopped_early").get("epoch"))
    if "test_nonfinite" in summary:
        rows["test examples with NaN or infinite logits"] = str(summary["test_nonfinite"])
    counts = mapping("modality_examples")  # where some example lacks one
    for m, value in mapping(f"probe_{main}").items():
        rows[f"test {METRICS[main].words}, {m} alone"] = shown(value, count=counts.get(m))
    for m, value in mapping("attention_share").items():
        rows[f"attention share, {m}"] = shown(value, count=counts.get(m))
    if "quality_correlation" in summary:
        value = summary["quality_correlation"]  # undefined where a quality is constant
        examples = [n for n in mapping("contrast_examples").values() if isinstance(n, int)]
        rows["correlation of share and quality"] = shown(value, "+.3f", min(examples, default=None))
    rotations = summary.get("rotations")
    if isinstance(rotations, list) and all(map(is_number, rotations)):
        rows["rotations in the best checkpoint"] = str(sum(rotations))
    used_up = mapping("rotations_used_up")
    if used_up:
        text = f"epoch {used_up.get('epoch')}, imbalance then {shown(used_up.get('imbalance'))}"
        rows["all rotations used, imbalance above beta"] = text
    verdicts = summary.get("verdicts")
    for line in verdicts if isinstance(verdicts, list) else ():
        print(wrapped(str(line)))
    print(table(rows.items()))
    print(f"figures, report.html and summary.json are in {workdir}")


def chosen_by(summary: Mapping[str, Any]) -> str:
    """The metric by which the best checkpoint was chosen: what it has beside the main one."""
    main = MAIN[task_name(summary)]
    return next((name for name in METRICS if name != main and name in summary["best"]), main)


def predictions_of(experiment: Experiment, columns: Columns) -> Predictions:
    """The columns of a pass over a split in the form that the analysis reads."""
    modalities = experiment.model.spec.modalities

    def by_modality(name: str) -> dict[str, np.ndarray]:
        values = columns.get(name)
        return {} if values is None else {m: values[:, i] for i, m in enumerate(modalities)}

    present = by_modality("present")
    quality: dict[str, np.ndarray] = {}
    if all(f"quality_{m}" in columns for m in modalities):
        quality = {m: where_present(columns[f"quality_{m}"], present.get(m)) for m in modalities}
    return Predictions(
        probabilities=columns["probabilities"],
        label=columns["label"],
        attention_share=by_modality("attention_share"),
        quality=quality,
        present=present,
        uniform_share=by_modality("uniform_share"),
    )


def test_scores(predictions: Predictions, experiment: Experiment) -> dict[str, Any]:
    """The task's metrics as `test_*`; each class, the shares and what they follow.

    Where they apply, "test_nonfinite", examples whose logits were not finite, and
    "modality_examples", how many have each modality.
    """
    outputs, names = experiment.config.model.num_classes, experiment.dataset.class_names
    found = scores(predictions, outputs, names, experiment.task.scores)
    named = (*METRICS, "nonfinite")
    return {f"test_{n}" if n in named else n: value for n, value in found.items()}


def restore_best(
    experiment: Experiment,
    workdir: epath.Path,
    checkpoints: Checkpoints,
    best: Mapping[str, Any],
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the best checkpoint; where that is damaged, of the newest that is not."""
    like = experiment.abstract_state()
    check = functools.partial(experiment.check_record, workdir=workdir)
    try:
        return checkpoints.restore(best["step"], like, check)[0], dict(best)
    except DamagedError as error:
        found = checkpoints.restore_newest(like, check)
        if found is None:
            raise
        log.warning("the best %s; the newest is tested in its place", error)
    state, step = found[0], int(found[0].step)
    rows = read_rows(workdir / "metrics.jsonl")
    row = next((r for r in rows if (r["split"], r["step"]) == ("valid", step)), {})
    names = dict.fromkeys((experiment.task.main, experiment.config.best_by))
    values = {name: row.get(name) for name in names}
    return state, {"step": step, "epoch": step // experiment.epoch_steps, **values}


def rotation_panels(snapshots: list[Snapshot]) -> list[plots.PolarPanel]:
    """Before and after the first rotation and the last; none where the query was never rotated."""
    if len(snapshots) > MAX_ROTATIONS_DRAWN:
        snapshots = [snapshots[0], snapshots[-1]]
    panels = []
    for snapshot in snapshots:
        when, keys, anchor = f"epoch {snapshot.epoch}", snapshot.keys, snapshot.anchor
        panels += [
            plots.PolarPanel(f"{when}, before the rotation", keys, snapshot.query, anchor),
            plots.PolarPanel(f"{when}, after it", keys, anchor, anchor),
        ]
    return panels


def report_figures(
    experiment: Experiment,
    workdir: epath.Path,
    state: TrainState,
    predictions: Predictions,
    rows: list[Row],
) -> dict[str, ReportFigure]:
    """Every figure by the name of its file, with its words."""
    task, beta = experiment.task, experiment.config.rolling.beta
    figures: dict[str, ReportFigure] = {}

    def add(name: str, title: str, figure: Any, words: str, how: str = "") -> None:
        figures[name] = ReportFigure(title, figure, words, report.HOW_TO_READ[how or name])

    add(
        task.main,
        f"{task.metric.title} of the model and of its probes",
        plots.accuracy_figure(rows, score=task.main, **task.guesses(predictions)),
        report.describe_accuracy(rows, task.main),
        "accuracy",
    )
    if task.name == REGRESSION:
        add(
            "values",
            "Predicted and true values",
            plots.values_figure(predictions, experiment.dataset.class_names),
            "Scatter plot of predicted against true values, test data.",
        )
    if not predictions.attention_share:
        return figures
    plain = read_rows(workdir / "plain" / "metrics.jsonl") if experiment.config.plain_twin else []
    add(
        "dynamics",
        "Imbalance and attention share",
        plots.dynamics_figure(rows, beta=beta, plain=plain),
        report.describe_dynamics(rows, plain),
    )
    if any("key_gap" in row for row in rows):
        words = report.describe_key_gap(rows, plain)
        add("keys", "Gap of the keys", plots.key_gap_figure(rows, plain=plain), words)
    panels = rotation_panels(load_snapshots(workdir, experiment.total_steps))
    if panels:
        title = "Keys around the query, before and after a rotation"
        words = report.describe_rolls(rows)
        add("rotation", title, plots.polar_panels(panels), words, "polar")
    if predictions.quality:
        pairs = {"": (predictions.shares(), predictions.quality)}
        add(
            "share_quality",
            "Does attention follow quality?",
            plots.share_quality_figure(pairs, even=uniform_shares(predictions)),
            "Scatter plot of attention share against the difference in quality, test data.",
        )
    if experiment.model.spec.uses_class_query:
        examples = attention_examples(
            experiment.model,
            state.variables,
            state.rotation,
            experiment.dataset,
            "test",
            choose_examples(predictions),
            seed=experiment.config.seed,
            task=task,
        )
        add(
            "attention",
            "What the class token looks at",
            plots.attention_figure(examples),
            "Attention weights drawn over the inputs of some test examples.",
        )
    return figures


def report_tables(
    summary: dict[str, Any], predictions: Predictions, rows: list[Row]
) -> list[Table]:
    """Rotations, classes and, where a page can hold it, which were taken for which."""
    rolls = [row for row in rows if row["split"] == "roll"]
    fields = ("epoch", "head", "imbalance_before", "imbalance_after", "angle_degrees")
    tables = report.tables_by_output(summary, ", test data")
    if "per_class" in summary:
        confusion = report.confusion_table(predictions, list(summary["per_class"]))
        tables += [] if confusion is None else [confusion]
    if rolls:
        columns = ("epoch", "head", "imbalance before", "imbalance after", "angle (degrees)")
        lines = [[row.get(field) for field in fields] for row in rolls]
        words = "Imbalance over the batch of the step, with the query before and after."
        tables.insert(0, Table("Rotations", columns, lines, words))
    return tables


def key_numbers(summary: dict[str, Any]) -> dict[str, Any]:
    """The numbers at the top of the report."""
    rotations = summary["rotations"]
    numbers = {
        **{
            f"test {METRICS[name].words}": summary.get(f"test_{name}")
            for name in HEADLINES[task_name(summary)]
        },
        "rotations": None if rotations is None else int(np.sum(rotations)),
        "correlation of share and quality": summary.get("quality_correlation"),
    }
    return {name: value for name, value in numbers.items() if value is not None}


def draw(
    experiment: Experiment,
    workdir: epath.Path,
    state: TrainState,
    summary: dict[str, Any],
    predictions: Predictions,
    rows: list[Row],
) -> None:
    """Writes `figures/*.png` and `report.html`."""
    figures = report_figures(experiment, workdir, state, predictions, rows)
    best = summary["best"]
    metric = chosen_by(summary)
    chosen = "" if best[metric] is None else f" ({best[metric]:.3f})"
    write_report(
        workdir / "report.html",
        title=f"RollingQ: {experiment.config.data.name}, {experiment.config.model.fusion}",
        verdicts=summary["verdicts"],
        lead=f"The best epoch by {selected_on(summary)} {METRICS[metric].words} is "
        f"{best['epoch']}{chosen}; the test data were read once, with its parameters.",
        key_numbers=key_numbers(summary),
        figures=report.save_figures(workdir / "figures", figures.items()),
        tables=report_tables(summary, predictions, rows),
        data=summary["data"],
        config=summary["config"],
        versions=summary["versions"] | {"device": summary["device"]},
    )
