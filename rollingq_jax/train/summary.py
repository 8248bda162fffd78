"""The end of a run: the test set, read once, then `summary.json`, figures and the report."""

import importlib.metadata
import logging
import platform
import sys
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from rollingq_jax.analysis.metrics import Predictions, scores, where_present, written
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.errors import CheckpointError
from rollingq_jax.train.checkpoint import Checkpoints, DamagedError
from rollingq_jax.train.console import count, device_line
from rollingq_jax.train.evaluation import Columns, by_modality
from rollingq_jax.train.run import Run
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.workdir import remember
from rollingq_jax.train.writer import (
    MetricsWriter,
    is_number,
    json_ready,
    read_object,
    read_rows,
    table,
    write_json,
)

log = logging.getLogger(__name__)

PACKAGES = ("rollingq-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def versions() -> dict[str, str]:
    """Versions of what produced the result; a package that is run from its source has none."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def read_summary(workdir: epath.Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run has not finished."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = read_object(path)
        best = summary["best"]
        fits = is_number(best["step"]) and "epoch" in best and "accuracy" in best
        fits &= summary["test_accuracy"] is None or is_number(summary["test_accuracy"])
        fits &= all(isinstance(summary.get(n, {}), dict) for n in ("examples", "signature"))
        if not fits:
            raise TypeError("numbers are missing")
    except (CheckpointError, TypeError, KeyError) as error:
        reason = f" ({error})" if isinstance(error, CheckpointError) else ""
        raise CheckpointError(
            f"{path} is damaged{reason}; allowed: the summary of a run, or none, to make it anew"
        ) from None
    return summary


def moved(workdir: epath.Path, summary: dict[str, Any], config: Any) -> dict[str, Any]:
    """A finished run's summary with the place where its data are now, which `config` says.

    To be called when the data are known to be the same. The summary and `config.json` are written
    anew where that has changed.
    """
    places = {name: config.data.get(name) for name in ("path", "cache_dir")}
    told = summary.get("config")
    if not isinstance(told, dict) or not isinstance(told.get("data"), dict):
        return summary
    if all(told["data"].get(name) == place for name, place in places.items()):
        return summary
    summary = summary | {"config": told | {"data": told["data"] | places}}
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)
    remember(workdir, config)
    return summary


def with_inputs(workdir: epath.Path, summary: dict[str, Any], inputs: InputSpec) -> dict[str, Any]:
    """A finished run's summary, with what inference needs of its data if an older version left it
    out; the file is then written anew."""
    if "inputs" in summary:
        return summary
    summary = summary | {"inputs": json_ready(inputs.to_json())}
    if jax.process_index() == 0:
        write_json(workdir / "summary.json", summary)
    return summary


def predictions_of(run: Run, columns: Columns) -> Predictions:
    """The columns of a pass over a split in the form that the analysis reads."""
    modalities = run.setup.model.spec.modalities
    present = by_modality(modalities, columns, "present")
    quality = by_modality(modalities, columns, "quality")
    return Predictions(
        probabilities=columns["probabilities"],
        label=columns["label"],
        attention_share=by_modality(modalities, columns, "attention_share"),
        quality={m: where_present(q, present.get(m)) for m, q in quality.items()},
        present=present,
    )


def test_scores(predictions: Predictions, run: Run) -> dict[str, Any]:
    """Accuracy, F1 and calibration as `test_*`; each class, the shares and what they follow.

    Where they apply, "test_nonfinite", examples whose logits were not finite, and
    "modality_examples", how many have each modality.
    """
    found = scores(predictions, run.config.model.num_classes, run.dataset.class_names)
    named = ("accuracy", "macro_f1", "weighted_f1", "calibration_error", "nonfinite")
    return {f"test_{n}" if n in named else n: value for n, value in found.items()}


def restore_best(
    run: Run, checkpoints: Checkpoints, best: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The state of the best checkpoint; where that is damaged, of the newest that is not."""
    like = run.abstract_state()
    try:
        return checkpoints.restore(best["step"], like, run.check_record)[0], dict(best)
    except DamagedError as error:
        found = checkpoints.restore_newest(like, run.check_record)
        if found is None:
            raise
        log.warning("the best %s; the newest is tested in its place", error)
    state, step = found[0], int(found[0].step)
    rows = read_rows(run.workdir / "metrics.jsonl")
    accuracy = [r["accuracy"] for r in rows if (r["split"], r["step"]) == ("valid", step)]
    epoch = step // run.setup.epoch_steps
    return state, {"step": step, "epoch": epoch, "accuracy": accuracy[0] if accuracy else None}


def finish_run(run: Run, checkpoints: Checkpoints, best: Mapping[str, Any]) -> dict[str, Any]:
    """Tests the best checkpoint and leaves the summary, the figures and the report.

    The summary is written last: as long as it is missing, the same command does this again.
    """
    from rollingq_jax.train.pictures import draw

    state, best = restore_best(run, checkpoints, best)
    means, columns = run.evaluate(run.parallel.put_state(state), "test")
    rotations = None if state.rolling is None else np.asarray(state.rolling.count).tolist()
    predictions = predictions_of(run, columns)
    found = test_scores(predictions, run) | {
        "test_loss": means["loss"],
        "probe_accuracy": {
            name.partition("/")[2]: value
            for name, value in means.items()
            if name.startswith("probe_accuracy/")
        },
        "best": best,
        "rotations": rotations,
        "num_parameters": count(state.params),
        "seed": run.config.seed,
        "device": device_line(),
        "versions": versions(),
        "command": sys.argv,
        "data": run.dataset.description,
        **run.identity(),
    }
    summary = json_ready(found)
    if jax.process_index() == 0:
        writer = MetricsWriter(run.workdir, run.setup.total_steps)
        writer.remove("test")
        epoch = run.config.epochs
        writer.write([{"step": run.setup.total_steps, "epoch": epoch, "split": "test"} | means])
        from rollingq_jax.analysis.plots.training import used_up  # Matplotlib, at the end only

        spent = used_up(writer.rows)
        if spent is not None:
            summary["rotations_used_up"] = spent
        draw(run, state, summary, predictions, writer.rows)
        write_json(run.workdir / "summary.json", summary)
    return summary


def print_summary(summary: Mapping[str, Any], workdir: epath.Path) -> None:
    """The table at the end of a run; of a summary that lacks something, what it has."""
    best = summary["best"]

    def mapping(name: str) -> Mapping[str, Any]:
        found = summary.get(name)
        return found if isinstance(found, Mapping) else {}

    def shown(value: Any, form: str = ".3f", count: Any = None) -> str:
        count = count if isinstance(count, int) else None
        return written(value if is_number(value) else None, form, count)

    counts = mapping("modality_examples")  # where some example lacks one
    rows = [
        ("best epoch by validation", f"{best['epoch']} ({shown(best['accuracy'])})"),
        ("test accuracy", shown(summary["test_accuracy"])),
        ("test macro F1", shown(summary.get("test_macro_f1"))),
    ]
    if "test_nonfinite" in summary:
        rows.append(("test examples with NaN or infinite logits", str(summary["test_nonfinite"])))
    for words, name in (
        ("test accuracy, {} alone", "probe_accuracy"),
        ("attention share, {}", "attention_share"),
    ):
        rows += [
            (words.format(m), shown(value, count=counts.get(m)))
            for m, value in mapping(name).items()
        ]
    if "quality_correlation" in summary:
        value = summary["quality_correlation"]  # undefined where a quality is constant
        examples = [n for n in mapping("contrast_examples").values() if isinstance(n, int)]
        count = min(examples, default=None)
        rows.append(("correlation of share and quality", shown(value, "+.3f", count)))
    rotations = summary.get("rotations")
    if isinstance(rotations, list) and all(map(is_number, rotations)):
        rows.append(("rotations in the best checkpoint", str(sum(rotations))))
    used_up = mapping("rotations_used_up")
    if used_up:
        text = f"epoch {used_up.get('epoch')}, imbalance then {shown(used_up.get('imbalance'))}"
        rows.append(("all rotations used, imbalance above beta", text))
    if jax.process_index() == 0:
        print(table(rows))
        print(f"figures, report.html and summary.json are in {workdir}")
