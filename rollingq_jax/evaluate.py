"""Evaluates a trained run: accuracy and calibration, and what its attention follows.

    python -m rollingq_jax.evaluate --workdir runs/demo
    python -m rollingq_jax.evaluate --workdir runs/demo --corrupt audio=1.0
    python -m rollingq_jax.evaluate --workdir runs/demo --probes

Writes `evaluation.json`, `evaluation.html`, `figures/evaluation_*.png` and, a line for each
example, `predictions.csv` into the workdir. With `--path NEW` other data are evaluated.
The parameters are those of the best checkpoint by validation.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("evaluate"))

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath

from rollingq_jax.analysis import metrics, ood, probes
from rollingq_jax.analysis.metrics import Predictions, csv_header, csv_rows, csv_writer
from rollingq_jax.analysis.probes import Probe
from rollingq_jax.analysis.report import OUTPUTS, summary_rows, write_evaluation
from rollingq_jax.data.corruption import parse_corruptions
from rollingq_jax.data.dataset import SINGLE_LABEL, Dataset, Source, ids_of, label_text
from rollingq_jax.data.new_data import as_dataset, open_new_data
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.inference import probe_of
from rollingq_jax.train.cli import MOST_AT_ONCE, WORKDIR, Command, Flag, integer, switch, text
from rollingq_jax.train.logging import device_line, table, versions
from rollingq_jax.train.loop import LoadedRun, load_run
from rollingq_jax.train.workdir import check_workdir, write_json


def evaluate(
    workdir: epath.PathLike,
    *,
    path: str | None = None,
    split: str | None = None,
    corrupt: Sequence[str] = (),
    full_probes: bool = False,
    levels: Sequence[float] = probes.NOISE_LEVELS,
    batch_size: int | None = None,
    seed: int | None = None,
    ood_paths: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates the run in a folder and writes the result there.

    Args:
      workdir: the run's folder.
      path: of labeled data that are evaluated in the place of the run's own, read with the run's
        preprocessing (see `rollingq_jax.data.new_data`); the training data need not be there.
      split: of the data; by default "test", and of new data the only one, if they have one.
      corrupt: conditions, each a specification as in `rollingq_jax.data.corruption`; several
        corruptions in one specification are applied together.
      full_probes: whether each modality is noised at every level, shuffled, swapped and replaced,
        and the trained query is scaled.
      levels: of that noise, in training-set standard deviations; the clean split is always there.
      batch_size: of the passes; the run's own where it is None.
      seed: of noise and exchange; likewise.
      ood_paths: of other data, which the scores of `analysis.ood` tell from the split; of data with
        splits "test" is read. Their labels are not.

    Returns:
      What `evaluation.json` holds. Each example's answer is in `predictions.csv`.

    Raises:
      CheckpointError: the folder holds no run that can be restored.
      ConfigError, DataError: the split, a corruption or the folder cannot be used as asked.
      NonFiniteError: the model's logits are NaN or infinite for every example of the split.
    """
    folder = check_workdir(workdir)
    run = load_run(folder)
    spec = run.model.spec
    if ood_paths and run.task.name != SINGLE_LABEL:
        raise ConfigError(
            f"--ood is given, whose scores are of probabilities of classes, and the run's task is "
            f"{run.task.name}; allowed: a run of {SINGLE_LABEL}"
        )
    dataset = _own_dataset(run) if path is None else _new_dataset(run, path, split)
    split = split or "test"
    if split not in dataset.splits:
        raise ConfigError(f"split: {split!r}; one of {', '.join(dataset.splits)}")
    for specification in corrupt:  # a mistake is told before the first pass
        parse_corruptions(specification, dataset.modalities)
    probe = probe_of(
        run,
        dataset,
        split=split,
        # Batches are filled up with padding: none is larger than the split.
        batch_size=min(batch_size or run.config.batch_size, len(dataset.splits[split])),
        seed=run.config.seed if seed is None else seed,
    )
    clean = probes.predict(probe)
    result = {
        "workdir": str(folder),
        "split": split,
        **({} if path is None else {"path": path}),
        "step": run.step,
        "seed": probe.seed,
        "num_examples": len(clean.label),
        "task": run.task.name,
        **metrics.scores(
            clean, run.config.model.num_classes, run.inputs.class_names, run.task.scores
        ),
        "corrupted": [condition(probe, one, clean, run.config) for one in corrupt],
    }
    if full_probes:
        result["noise"] = noise_points(probe, clean, sorted({0.0, *levels}))
        result["reliance"] = {m: probes.reliance(probe, m, clean) for m in dataset.modalities}
        if spec.uses_class_query:
            result["attention_scale"] = probes.attention_scale_curve(
                probe,
                lambda tau: _predict_with(run, attention_scale=tau * spec.attention_scale),
                clean=clean,
            )
        if spec.quality_bias:
            # Each example gets the bias of another one, which says nothing of it.
            shuffled = _predict_with(run, quality_shuffled=True)
            found = probes.predict(probe._replace(predict=shuffled))
            result["quality_shuffled"] = {
                **probe.score(found),
                **run.task.changed(found, clean),
                "attention_share": metrics.mean_shares(found),
            }
    if ood_paths:
        result["ood"] = _told_apart(run, probe, ood_paths)
    result |= {"versions": versions(), "device": device_line()}
    # The numbers first: a picture that cannot be drawn costs none of them.
    write_json(folder / "evaluation.json", result)
    write_predictions(folder, run, dataset.splits[split], clean)
    write_evaluation(folder, run, probe, clean, result)
    return result


def _predict_with(run: LoadedRun, **fields: Any) -> metrics.PredictFn:
    """The run's answers with fields of its `ModelSpec` changed."""
    model = run.model.clone(spec=dataclasses.replace(run.model.spec, **fields))
    return metrics.predict_fn(model, run.variables, run.rotation, run.task.answer)


def _told_apart(run: LoadedRun, probe: Probe, paths: Sequence[str]) -> list[dict[str, Any]]:
    """For each of other data, how well the run's scores tell the split from them."""

    def outputs(source: Source, dataset: Dataset) -> Any:
        return ood.outputs(
            run.model,
            run.variables,
            run.rotation,
            source,
            batch_size=probe.batch_size,
            transforms=dataset.eval_transforms,
        )

    own = _own_dataset(run)
    train = outputs(own.splits["train"], own)
    inside = outputs(probe.dataset.splits[probe.split], probe.dataset)
    found = []
    for path in paths:
        foreign = _new_dataset(run, path, read_labels=False)
        source = foreign.splits["test"]
        scores = ood.compare_scores(train, inside, outputs(source, foreign))
        found.append({"path": path, "num_examples": len(source), **scores})
    return found


def _own_dataset(run: LoadedRun) -> Dataset:
    try:
        return run.dataset
    except DataError as error:
        raise DataError(f"{error}; --path names the place of data that have moved") from error


def _new_dataset(
    run: LoadedRun, path: str, split: str | None = None, *, read_labels: bool = True
) -> Dataset:
    names, seed = run.model.spec.modalities, run.config.seed
    data = open_new_data(path, run.config.data, run.inputs, names, split=split, seed=seed)
    if not read_labels:  # none of them may be of a class that the model has
        data = data._replace(labels=[run.inputs.classes[0]] * len(data.labels))
    return as_dataset(data, run.inputs, names, split or "test", run.config.model.encoders)


def write_predictions(
    folder: epath.Path, run: LoadedRun, source: Source, answers: Predictions
) -> None:
    """Writes `predictions.csv`, as `rollingq_jax.predict` does for new data."""
    classes, ids, task = run.inputs.classes, ids_of(source), run.task
    header = csv_header(task.columns(classes), tuple(answers.attention_share), labeled=True)
    rows = csv_rows(
        task.cells(classes, answers.probabilities),
        range(len(answers.label)) if ids is None else list(ids),
        answers.attention_share,
        [label_text(label, task.name, classes) for label in answers.label],
    )
    with csv_writer(folder / "predictions.csv") as write:
        write(itertools.chain([header], rows))


def condition(probe: Probe, corruption: str, clean: Predictions, config: Any) -> dict[str, Any]:
    """Scores of the split under one corruption, without those of each class, label or target.

    With "drop", "kept" counts the modalities that stayed because they are an example's last.
    """
    found = probes.predict(probe, corruption)
    scores = metrics.scores(found, config.model.num_classes, (), probe.task.scores)
    scores = {name: value for name, value in scores.items() if name not in OUTPUTS}
    result = {"corrupt": corruption, **scores, **probe.task.changed(found, clean)}
    if found.kept:
        result["kept"] = sum(int(kept.sum()) for kept in found.kept.values())
    return result


def noise_points(probe: Probe, clean: Predictions, levels: Sequence[float]) -> list[dict[str, Any]]:
    """The noise curves of all modalities but token ids, which cannot take noise."""
    return [
        point
        for m, info in probe.dataset.modalities.items()
        if info.kind != "tokens"
        for point in probes.corruption_curve(probe, m, levels, clean=clean)
    ]


class _Levels(flags.ArgumentParser):
    """Numbers with commas between."""

    syntactic_help = "numbers >= 0 with commas between"

    def parse(self, argument: str) -> tuple[float, ...]:
        """The numbers; raises ValueError where one is none, negative or not finite."""
        levels = tuple(float(part) for part in argument.split(","))
        if not all(0 <= level < math.inf for level in levels):
            raise ValueError(argument)
        return levels


EVALUATE = Command(
    "evaluate",
    "Evaluates a trained run, with the best checkpoint by validation, and probes what its "
    "attention follows. Writes evaluation.json, evaluation.html, predictions.csv and figures into "
    "the run's folder.",
    (
        "--workdir runs/demo --corrupt audio=1.0",
        "--workdir runs/demo --probes --levels 0,1,4",
        "--workdir runs/demo --path new.npz --split test",
        "--workdir runs/demo --ood other.npz",
    ),
    (
        WORKDIR,
        text(
            "path",
            "PATH",
            "labeled data instead of the run's own, read with the run's preprocessing: data that "
            "have moved, or new ones",
        ),
        text("split", "NAME", "train, valid or test (default: test)"),
        text(
            "corrupt",
            "MODALITY=CORRUPTION",
            "evaluate under this too, e.g. audio=1.0 (noise in training-set standard deviations), "
            "audio=drop, audio=replace, audio=misalign; can be given several times",
            repeated=True,
        ),
        text(
            "ood",
            "PATH",
            "other data, as --path takes them, whose labels are not read: does the run know them "
            "from its own, by probabilities, energies and features (AUROC, FPR at 95 %)? Can be "
            "given several times",
            repeated=True,
        ),
        switch(
            "probes",
            "noise each modality at every level, shuffle, swap and replace it; and scale the class "
            "token's query, from even attention on",
        ),
        Flag(
            "levels",
            "A,B,...",
            "levels of noise of --probes (default: "
            + ",".join(f"{level:g}" for level in probes.NOISE_LEVELS)
            + ")",
            _Levels(),
        ),
        integer(
            "batch_size", "examples computed at once (default: the run's)", low=1, high=MOST_AT_ONCE
        ),
        integer("seed", "of noise and exchange (default: the run's)", low=0, high=2**32 - 1),
    ),
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax evaluate`; `argv` begins with the program's name."""
    given = EVALUATE.parse(argv)
    if given.levels and not given.probes:
        raise ConfigError("--levels is given without --probes; allowed: both, or neither")
    result = evaluate(
        given.workdir,
        path=given.path,
        split=given.split,
        corrupt=given.corrupt or (),
        full_probes=given.probes,
        levels=given.levels or probes.NOISE_LEVELS,
        batch_size=given.batch_size,
        seed=given.seed,
        ood_paths=given.ood or (),
    )
    print(table(summary_rows(result)))
    print(f"evaluation.json, evaluation.html, predictions.csv and figures are in {given.workdir}")
