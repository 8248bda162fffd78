"""What a data set holds, printed before anything is trained on it.

    python -m rollingq_jax.check --path FILE
    python -m rollingq_jax.check --config configs/own_data.py --config.data.path=FILE

Reads every example (``--quick``: the first 100 of each split) and prints counts by split and class,
kinds, shapes, quality and files that cannot be read; last, the command that trains on it. Leaves
with code 2 where something is wrong.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("check"))

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grain
import numpy as np

from rollingq_jax.data.dataset import (
    MULTI_LABEL,
    REGRESSION,
    SINGLE_LABEL,
    Dataset,
    infer_model,
    labels_of,
    num_tokens,
)
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.options import mapping_option, option
from rollingq_jax.data.sources.media_folder import is_manifest, read_manifest
from rollingq_jax.errors import DataError, printable
from rollingq_jax.train.cli import Command, read_python, switch, text

QUICK = 100
SHOWN = 20


def describe(dataset: Dataset, encoders: Any = None) -> Iterator[str]:
    """Lines on splits, classes and modalities, from labels and descriptions alone.

    `encoders`, those of `config.model`, say how many tokens a modality has.

    Raises:
      ConfigError: the encoders do not fit the data.
    """
    yield f"data: {dataset.description or 'no description'}"
    labels = {split: labels_of(source) for split, source in dataset.splits.items()}
    for split, of_split in labels.items():
        yield f"{split}: {len(of_split)} examples"
    if dataset.task == SINGLE_LABEL:
        yield f"classes: {dataset.num_classes}"
    else:
        yield f"task: {dataset.learned}"
    names = dataset.class_names or tuple(map(str, range(dataset.num_classes)))
    names = tuple(printable(name, keep="") for name in names)
    told = {split: _told(of_split, dataset) for split, of_split in labels.items()}
    for number in range(min(SHOWN, dataset.num_classes)):
        parts = ", ".join(f"{split} {of_split[number]}" for split, of_split in told.items())
        yield f"  {names[number]}: {parts}"
    if dataset.num_classes > SHOWN:
        more = {SINGLE_LABEL: "classes", MULTI_LABEL: "labels", REGRESSION: "values"}
        yield f"  ... and {dataset.num_classes - SHOWN} more {more[dataset.task]}"
    specs = infer_model(dataset, {"encoders": encoders or {}})["encoders"]
    for name, info in dataset.modalities.items():
        patch = specs[name].get("patch")
        tokens = num_tokens(info, patch)
        yield (
            f"{name}: {info.kind} {list(info.shape)} {info.dtype}"
            + (f", {info.vocab_size} ids" if info.vocab_size else "")
            + (f", patch {'x'.join(map(str, patch))}" if patch else "")
            + f", {tokens} token{'s' if tokens != 1 else ''}"
        )


def _told(labels: np.ndarray, dataset: Dataset) -> list[str]:
    """Of each class or label the number of examples; of a value its mean and its range."""
    if dataset.task == SINGLE_LABEL:
        return list(map(str, np.bincount(labels, minlength=dataset.num_classes)))
    if dataset.task == MULTI_LABEL:
        return list(map(str, labels.sum(axis=0)))
    return [f"{v.mean():.3g} (from {v.min():.3g} to {v.max():.3g})" for v in labels.T]


def read_examples(dataset: Dataset, most: int | None = None) -> Iterator[str]:
    """Reads all examples, or so many of each split; lines on quality, missing modalities and files.

    Raises:
      DataError: after the last line, if any example could not be read.
    """
    unreadable = 0
    for split, source in dataset.splits.items():
        count = len(source) if most is None else min(most, len(source))
        qualities: dict[str, list[float]] = {}
        absent = dict.fromkeys(dataset.modalities, 0)
        for index in range(count):
            try:
                example = _example(dataset, source, index)
            except DataError as error:
                unreadable += 1
                if unreadable <= SHOWN:
                    yield f"{split}: example {index} cannot be read: {error}"
                continue
            for name in dataset.modalities:
                absent[name] += not np.any(example.get(f"{name}_mask", True))
                if f"quality_{name}" in example:
                    qualities.setdefault(name, []).append(float(example[f"quality_{name}"]))
        yield f"{split}: {count} of {len(source)} examples read"
        for name, values in qualities.items():
            yield f"  quality of {name}: {min(values):.3g} to {max(values):.3g}"
        for name, number in absent.items():
            if number:
                yield f"  {name} is missing in {number} examples"
    if unreadable:
        raise DataError(f"{unreadable} examples cannot be read")


def _example(dataset: Dataset, source: Any, index: int) -> Any:
    """One example as it goes into a batch, its shapes checked."""
    example = source[index]
    for transform in dataset.eval_transforms:
        if isinstance(transform, grain.transforms.Map):
            example = transform.map(example)
    for name, info in dataset.modalities.items():
        value = np.asarray(example[name])
        if value.shape != tuple(info.shape) or str(value.dtype) != info.dtype:
            raise DataError(
                f"{name}: {value.dtype}{list(value.shape)}; allowed: {info.dtype}{list(info.shape)}"
            )
    return example


def _missing_files(config_data: Any) -> Iterator[str]:
    """The files that a manifest names and that are not there, if the path is of a manifest."""
    path = option(config_data, "path", "")
    if not path or "://" in path:
        return
    place = Path(path).expanduser()
    if is_manifest(place):
        missing = read_manifest(
            place,
            columns=mapping_option(config_data, "columns"),
            modalities=option(config_data, "modalities", ()),
        ).missing
        yield from (f"missing: {name!r}" for name in missing[:SHOWN])
        if len(missing) > SHOWN:
            yield f"... and {len(missing) - SHOWN} more missing files"


def next_command(program: str, given: SimpleNamespace, fields: Sequence[str], train: int) -> str:
    """The command that trains on what was checked, called as this one was, `fields` as typed.

    Batches are no larger than `train`, the number of training examples.
    """
    if given.config_json is not None:
        config = ["--config_json", given.config_json]
    else:
        config = ["--config", given.config or "own_data"]
    fields = list(fields)
    if config[1] == "own_data" and train < read_python("own_data").batch_size:
        fields.append(f"--config.batch_size={train}")
    path = given.path or next((f for f in fields if f.startswith("--config.data.path=")), "own")
    workdir = given.workdir or f"runs/{Path(path.rpartition('=')[2]).stem}"
    start = "rollingq train" if program.startswith("rollingq ") else "python -m rollingq_jax train"
    return f"{start} {shlex.join([*config, *fields, '--workdir', workdir])}"


CHECK = Command(
    "check",
    "Prints what a data set holds, before anything is trained on it: counts by split and class, "
    "kinds, shapes, quality, and files that cannot be read. Exits with code 2 where something is "
    "wrong.",
    (
        "--path mine.npz",
        "--config own_data --config.data.path=mine.npz --workdir runs/mine",
    ),
    (
        text("path", "PATH", "an .npz file, a folder of .npy files or a manifest"),
        switch("quick", f"read {QUICK} examples of each split"),
        text("workdir", "FOLDER", "not read: a training command can be checked as it stands"),
    ),
    reads_config=True,
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax check`; `argv` begins with the program's name.

    Raises:
      UserError: the data or the arguments cannot be used.
    """
    given, fields = CHECK.parse_flags(argv)
    alone = given.path is not None and given.config is None and given.config_json is None
    if given.path is not None:
        fields.append(f"--config.data.path={given.path}")
    if alone and len(fields) == 1:
        config_data, encoders, seed = SimpleNamespace(name="arrays", path=given.path), None, 0
    else:
        config = CHECK.read_config(given, fields)
        config_data, encoders, seed = config.data, config.model.encoders, config.seed

    def lines() -> Iterator[str]:
        # In this order: a file that is missing is named even where the data cannot be loaded.
        yield from _missing_files(config_data)
        dataset = load_dataset(config_data, seed=seed, encoders=encoders)
        yield from describe(dataset, encoders)
        yield from read_examples(dataset, QUICK if given.quick else None)
        yield "train on it with"
        yield f"  {next_command(argv[0], given, fields, len(dataset.splits['train']))}"

    for line in lines():
        print(printable(line))
