"""A trained model's answers on new data, as a table.

    python -m rollingq_jax.predict --workdir runs/demo --path NEW --out predictions.csv

NEW is anything that can be trained on, with or without labels: an `.npz` file, a folder of `.npy`
files, a manifest of media files, the data directory of a TFDS data set. It is read as the training
data were; these need not be there. The table has a line for each example: id, predicted class,
probability of each class, attention share of each modality and, where it is given, the label. Where
an example may have any number of labels, they stand with | between, and each label has its own
probability; of a regression there is the predicted value.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("predict"))

import itertools
import logging
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from rollingq_jax.analysis.metrics import (
    Predictions,
    check_answers,
    csv_header,
    csv_rows,
    csv_writer,
    written,
)
from rollingq_jax.analysis.tasks import HEADLINES, METRICS, SINGLE, Task
from rollingq_jax.data.new_data import NewData, label_numbers, open_new_data
from rollingq_jax.data.pipeline import collate
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.data.sources.media_folder import MANIFEST_SUFFIXES
from rollingq_jax.errors import ConfigError
from rollingq_jax.inference import Prediction, Predictor, check_batch_size, predictor_of
from rollingq_jax.train.cli import MOST_AT_ONCE, WORKDIR, Command, integer, text
from rollingq_jax.train.logging import table
from rollingq_jax.train.loop import load_run
from rollingq_jax.train.output import progress_bar

log = logging.getLogger(__name__)
READERS = 2  # threads that read and decode examples


def predict(
    workdir: epath.PathLike,
    path: str,
    out: epath.PathLike,
    *,
    split: str | None = None,
    batch_size: int = 64,
    quiet: bool = False,
) -> dict[str, Any]:
    """Writes the predictions of a run's best checkpoint on new data.

    Args:
      workdir: the run's folder.
      path: of the new data.
      out: the table, a CSV file; an old one is replaced when all is predicted.
      split: which part, where the data have splits; by default the only one, else "test".
      batch_size: of the passes; a power of two.
      quiet: show no progress.

    Returns:
      `"examples"`; `"missing"` `{m: examples that lack it}`; where labels are given `"labeled"`,
      how many, and their `"accuracy"`, or what the task is scored by in its place; `"nonfinite"`,
      examples without an answer, where there are.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder.
      DataError, ConfigError: the data cannot be read as the run's.
      NonFiniteError: no example gets a finite answer.
    """
    check_batch_size(batch_size)
    target = epath.Path(out).expanduser()
    check_out(target, path)
    run = load_run(workdir)
    predictor = predictor_of(run, batch_size)
    names = run.model.spec.modalities
    seed = run.config.seed
    data = open_new_data(path, run.config.data, run.inputs, names, split=split, seed=seed)
    classes, labeled, task = run.inputs.classes, any(data.labels), run.task
    target.parent.mkdir(parents=True, exist_ok=True)
    answered, missing = 0, dict.fromkeys(names, 0)
    # A label of no class of the model counts in no score.
    is_known = classes.__contains__ if task is SINGLE else bool
    known = np.array([is_known(label) for label in data.labels], bool)
    answers: list[np.ndarray] = []  # to the known ones
    # Batch by batch: of examples without a label no answer stays in memory.
    with csv_writer(target) as write:
        shares = names if run.model.spec.has_shares else ()
        write(iter([csv_header(task.columns(classes), shares, labeled)]))
        for place, batch, found in _answers(predictor, data, batch_size, quiet):
            rows = slice(place, place + len(found.probabilities))
            ids, labels = data.ids[rows], data.labels[rows] if labeled else None
            cells = task.cells(classes, found.probabilities)
            write(csv_rows(cells, ids, found.attention_share, labels))
            answered += int(np.isfinite(found.probabilities).all(axis=-1).sum())
            answers.append(found.probabilities[known[rows]])
            for m in names:
                missing[m] += _lacking(batch, m, len(ids))
        check_answers(len(data.ids) - answered, len(data.ids), path)
    result: dict[str, Any] = {"examples": len(data.ids), "missing": missing}
    if labeled:
        result |= {"labeled": int(known.sum())}
        known_labels = list(itertools.compress(data.labels, known))
        result |= _scores(task, run.inputs, known_labels, answers)
    if answered < len(data.ids):
        result["nonfinite"] = len(data.ids) - answered
    unknown = sum(bool(label) for label in data.labels) - int(known.sum())
    if unknown:
        log.warning("%d labels are of no class of the model, and count in no accuracy", unknown)
    return result


def _scores(
    task: Task, inputs: InputSpec, labels: Sequence[str], answers: Sequence[np.ndarray]
) -> dict[str, Any]:
    """The headlines of the examples that have a label; the main one is None without any."""
    if not labels:
        return {task.main: None}
    found = Predictions(np.concatenate(answers), label_numbers(labels, inputs), {}, {})
    if task is SINGLE:
        return {"accuracy": found.accuracy}
    scores = task.scores(found, inputs.num_classes, inputs.classes)
    return {name: scores[name] for name in HEADLINES[task.name] if name in scores}


def check_out(target: epath.Path, path: str) -> None:
    """The table does not take the place of the data.

    Raises:
      ConfigError: it would.
    """
    place = Path(path).expanduser()
    data = [place, *(place / f"manifest{suffix}" for suffix in MANIFEST_SUFFIXES)]
    if os.path.realpath(target) in map(os.path.realpath, data):
        raise ConfigError(
            f"out is {str(target)!r}, which holds the new data; allowed: another file"
        )


def _answers(
    predictor: Predictor, data: NewData, batch_size: int, quiet: bool
) -> Iterator[tuple[int, dict[str, np.ndarray], Prediction]]:
    """(place of the first example, batch, answers) for all of the data, in order."""
    total = len(data.source)
    with (
        ThreadPoolExecutor(READERS) as pool,
        progress_bar(total, "example", **({"disable": True} if quiet else {})) as progress,
    ):
        for start in range(0, total, batch_size):
            places = range(start, min(start + batch_size, total))
            batch = collate(list(pool.map(data.source.__getitem__, places)))
            yield start, batch, predictor.predict(batch, standardized=data.standardized)
            progress.update(len(places))


def _lacking(batch: dict[str, np.ndarray], modality: str, rows: int) -> int:
    """How many examples of a batch lack a modality."""
    if modality not in batch:
        return rows
    mask = batch.get(f"{modality}_mask")
    return 0 if mask is None else int((~mask.reshape(rows, -1).any(axis=-1)).sum())


PREDICT = Command(
    "predict",
    "Predicts on new data with a trained run, and writes a table with a line for each example.",
    (
        "--workdir runs/demo --path new.npz --out predictions.csv",
        "--workdir runs/demo --path table.csv --batch_size 256",
    ),
    (
        WORKDIR,
        text("path", "PATH", "the new data, in any form for training", required=True),
        text("out", "FILE", "the table (default: predictions.csv)", default="predictions.csv"),
        text("split", "NAME", "train, valid or test, where the data have splits"),
        integer(
            "batch_size",
            "examples computed at once, a power of two (default: 64)",
            low=1,
            high=MOST_AT_ONCE,
            default=64,
        ),
    ),
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax predict`; `argv` begins with the program's name."""
    given = PREDICT.parse(argv)
    result = predict(
        given.workdir, given.path, given.out, split=given.split, batch_size=given.batch_size
    )
    lines = [("examples", str(result["examples"]))]
    lines += [(f"examples without {m}", str(n)) for m, n in result["missing"].items() if n]
    if "labeled" in result:
        lines.append(("examples with a label", str(result["labeled"])))
        lines += [(METRICS[n].words, written(v)) for n, v in result.items() if n in METRICS]
    print(table(lines))
    print(f"predictions are in {given.out}")
