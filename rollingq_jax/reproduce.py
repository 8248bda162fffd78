"""The paper's tables beside what is measured here.

    python -m rollingq_jax.reproduce table2 --data av_digits --workdir runs/reproduce
    python -m rollingq_jax.reproduce table1 --data crema_d --config.data.path=DIR --workdir runs/ks

Runs what is missing through `compare`, in `compare/` of the workdir, which all tables share, and
leaves `<table>.md` and `<table>.json`. Killed or interrupted, the same command goes on. On the
paper's sets the configurations have the paper's settings; on the demo's data the same arms run
scaled down.

A table is a list of rows, and a row names an arm of `compare`: another one is a line in `TABLES`.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("reproduce"))

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rollingq_jax.analysis import metrics, probes
from rollingq_jax.compare import MOST_SEEDS, compare
from rollingq_jax.comparison.results import make_line, markdown
from rollingq_jax.comparison.runs import (
    Overrides,
    dataset_of,
    known_arms,
    parse_arms,
    read_json,
    run_folder,
    with_fields,
)
from rollingq_jax.data.dataset import ArraySource, Dataset
from rollingq_jax.data.records import clip_modalities
from rollingq_jax.errors import ConfigError
from rollingq_jax.files import write_whole
from rollingq_jax.inference import probe_of
from rollingq_jax.train.cli import Command, Flag, integer, switch, text
from rollingq_jax.train.config import check_config
from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.logging import count
from rollingq_jax.train.loop import load_run
from rollingq_jax.train.preemption import Interruption
from rollingq_jax.train.workdir import check_workdir, write_json

# The columns of published figures: `data.name` -> heading.
SETS = {"crema_d": "CREMA-D", "kinetics_sounds": "Kinetics-Sounds", "cmu_mosei": "CMU-MOSEI"}
# What a table measures -> its name in a run's record, factor and digits where it is printed.
# Parameters need no run.
MEASURES = {
    "accuracy": ("test_accuracy", 100.0, 1),
    "correlation": ("quality_correlation", 1.0, 2),
    "parameters": ("", 1e-6, 2),
}
# Third-party notes of the paper gave them; its own tables were not seen.
SECOND_HAND = (
    "Published figures are second-hand, from notes on the paper, whose tables were not seen."
)
# Deviations of the noise that stands in for a quality that a data set does not have.
QUALITY_NOISE = 1.0
DEFAULT_SEEDS = 5


class Row(NamedTuple):
    """A row of a table.

    Attributes:
      label: as it is printed.
      arm: of `compare`, as its `--arms` takes one: NAME, or NAME=BASE:FIELD=VALUE.
      published: data set -> the paper's figures, one for each column of the table.
    """

    label: str
    arm: str
    published: Mapping[str, tuple[float, ...]] = {}

    @property
    def name(self) -> str:
        """Of the arm."""
        return self.arm.partition("=")[0]


class PaperTable(NamedTuple):
    """A table of the paper.

    Attributes:
      title, rows: as they are printed.
      measure: a name in `MEASURES`.
      levels: noise in every modality, in training-set standard deviations: a column each.
      note: what has to be known beside it.
    """

    title: str
    measure: str
    rows: tuple[Row, ...]
    levels: tuple[float, ...] = (0.0,)
    note: str = SECOND_HAND


def _published(*values: float | None) -> dict[str, tuple[float, ...]]:
    """One column, of `SETS` in their order."""
    found = zip(SETS, values, strict=False)
    return {name: (value,) for name, value in found if value is not None}


def _sweep(title: str, field: str, values: Sequence[int]) -> PaperTable:
    """Attention and RollingQ with each value of a field."""
    rows = tuple(
        Row(f"{arm}, {field.rpartition('.')[2]} {value}", f"{arm}-{value}={arm}:{field}={value}")
        for value in values
        for arm in ("attention", "rollingq")
    )
    note = "The paper has this experiment; its figures were not seen."
    return PaperTable(title, "accuracy", rows, note=note)


TABLES: dict[str, PaperTable] = {
    "table1": PaperTable(
        "Test accuracy, %",
        "accuracy",
        (
            Row("audio only", "audio", _published(47.6, 53.9)),
            Row("text only", "text"),
            Row("visual only", "visual", _published(36.3, 57.0)),
            Row("vision only", "vision", _published(None, None, 47.1)),
            Row("concat", "concat", _published(49.3, 68.0, 62.8)),
            Row("OGM", "ogm", _published(51.2, 68.2, 62.7)),
            Row("PMR", "pmr", _published(50.1, 68.2, 63.0)),
            Row("vanilla attention", "attention", _published(48.8, 67.0, 62.7)),
            Row("MBT", "mbt-paper", _published(51.5, 72.2, 63.0)),
            Row("JMT", "jmt", _published(50.7)),
            Row("MulT", "mult"),
            Row("MMML", "mmml", _published(52.0, 69.8, 62.8)),
            Row("attention + RollingQ", "rollingq", _published(51.9, 69.3, 63.2)),
            Row("MMML + RollingQ", "mmml+rollingq", _published(52.7, 70.7, 63.2)),
        ),
    ),
    "table2": PaperTable(
        "Correlation of a sample's attention share with its modality's quality",
        "correlation",
        (
            Row("vanilla attention", "attention", _published(0.52, 0.44)),
            Row("attention + RollingQ", "rollingq", _published(0.76, 0.78)),
        ),
    ),
    "table3": PaperTable(
        "Test accuracy under noise, %",
        "accuracy",
        (
            Row("vanilla attention", "attention", {"kinetics_sounds": (67.0, 62.7, 52.9, 34.7)}),
            Row("attention + RollingQ", "rollingq", {"kinetics_sounds": (69.3, 67.2, 58.2, 40.6)}),
        ),
        levels=(0.0, 0.25, 0.5, 1.0),
        note=f"{SECOND_HAND} Which modality the paper's noise is in is not known: here, each.",
    ),
    "table4": PaperTable(
        "Parameters, millions, the rotation counted",
        "parameters",
        (
            Row("vanilla attention", "attention", _published(59.87)),
            Row("attention + RollingQ", "rollingq", _published(60.46)),
            Row("JMT", "jmt", _published(62.23)),
            Row("MMML", "mmml", _published(77.88)),
            Row("MBT", "mbt-paper", _published(114.21)),
        ),
        note=f"{SECOND_HAND} They leave out tokens and position embeddings, and are of one frame.",
    ),
    "batch": _sweep("Test accuracy by batch size, %", "batch_size", (16, 64, 256)),
    "depth": _sweep("Test accuracy by the encoders' depth, %", "model.depth", (2, 4, 6)),
    "layers": _sweep("Test accuracy by fusion layers, %", "model.fusion_layers", (2, 3, 4)),
}


def reproduce(
    table: str,
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    num_seeds: int = DEFAULT_SEEDS,
    only: Sequence[str] = (),
    tune: bool = False,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """One of `TABLES` on the data of a configuration; runs what the folder lacks.

    Args:
      table: its name.
      config: the configuration that the arms change.
      workdir: where it goes.
      num_seeds: runs of each arm.
      only: names of the arms to run; empty for all that the data allow. Others have no figures.
      tune: whether each arm's settings are chosen on validation data first, from
        `config.compare.grid`; else each has those of the configuration.
      interruption: as `compare` takes it.

    Returns:
      What `<table>.json` holds.

    Raises:
      ConfigError: there is no such table or arm.
      UserError: as `compare`.
    """
    if table not in TABLES:
        raise ConfigError(f"table is {table!r}; allowed: {', '.join(TABLES)}")
    spec, folder = TABLES[table], check_workdir(workdir)
    check_config(config)
    if odd := set(only) - {row.name for row in spec.rows}:
        names = ", ".join(row.name for row in spec.rows)
        raise ConfigError(f"--arms: {sorted(odd)[0]!r} is no arm of {table}; allowed: {names}")
    config = copy.deepcopy(config)
    if not tune:
        config.compare.grid = ConfigDict()
    counts = spec.measure == "parameters"
    dataset = _shapes(config) if counts else dataset_of(config)
    arms = _arms(spec, dataset, only)
    if counts:
        lines = {arm: [_size(config, fields, dataset, arm)] for arm, fields in arms.items()}
    else:
        lines = _measured(spec, config, folder / "compare", arms, num_seeds, dataset, interruption)
    result = {
        "table": table,
        "title": spec.title,
        "note": spec.note,
        "data": dataset.description,
        "data_name": config.data.name,
        "seeds": None if counts else num_seeds,
        "levels": list(spec.levels),
        "rows": [
            {
                "label": row.label,
                "arm": row.name,
                "published": {name: list(values) for name, values in row.published.items()},
                "measured": lines.get(row.name),
            }
            for row in spec.rows
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / f"{table}.json", result)
    cells = written_cells(result)
    page = markdown(cells[0], cells[1:])
    write_whole(folder / f"{table}.md", f"{spec.title}\n\n{page}\n\n{spec.note}\n")
    return result


def _arms(spec: PaperTable, dataset: Dataset, only: Sequence[str]) -> dict[str, Overrides]:
    """The arms of a table that its data allow: one of a modality that they lack is left out."""
    arms: dict[str, Overrides] = {}
    modalities = tuple(sorted(dataset.modalities))
    known = known_arms(modalities)
    for row in spec.rows:
        base = row.arm.partition("=")[2].partition(":")[0] or row.arm
        if base in known and (not only or row.name in only):
            arms |= parse_arms(row.arm, modalities)
    return arms


def _measured(
    spec: PaperTable,
    config: ConfigDict,
    folder: epath.Path,
    arms: Mapping[str, Overrides],
    num_seeds: int,
    dataset: Dataset,
    interruption: Interruption | None,
) -> dict[str, list[dict[str, Any]]]:
    """Arm -> for each level a mean with its interval and the paired difference to attention."""
    found = compare(config, folder, arms=arms, num_seeds=num_seeds, interruption=interruption)
    field = MEASURES[spec.measure][0]
    noisy = [m for m, info in dataset.modalities.items() if info.kind != "tokens"]
    values: dict[str, list[dict[int, float]]] = {arm: [{} for _ in spec.levels] for arm in arms}
    for run in found["runs"]:
        chosen = found["selection"][run["arm"]]
        place = run_folder(folder, run["arm"], chosen["chosen"], chosen["setting"], run["seed"])
        for column, level in enumerate(spec.levels):
            value = run[field] if level == 0 else None
            if value is None:  # noise; or the data have no quality, and noise of each example's own
                noise = f"0..{QUALITY_NOISE:g}" if level == 0 else f"{level:g}"
                corruption = ", ".join(f"{m}={noise}" for m in noisy)
                scores = scores_under(place, corruption)
                value = scores.get(field.removeprefix("test_"))
            if value is not None and np.isfinite(value):
                values[run["arm"]][column][run["seed"]] = float(value)
    lines = {}
    for arm, columns in values.items():
        if all(columns):
            # It is compared with the same arm without rotations, or with attention.
            twins = (arm.replace("rollingq", "attention"), "attention")
            twin = next((one for one in twins if one != arm and one in values), None)
            references = [None] * len(columns) if twin is None else values[twin]
            lines[arm] = [make_line(*pair) for pair in zip(columns, references, strict=True)]
    return lines


def scores_under(folder: epath.Path, corruption: str) -> dict[str, Any]:
    """A finished run's accuracy and correlation on its test split, corrupted; kept in a file."""
    path = folder / "reproduce.json"
    kept = dict(read_json(path) or {})
    if corruption not in kept:
        probe = probe_of(load_run(folder))
        found = probes.predict(probe, corruption)
        scores = metrics.scores(found, probe.dataset.num_classes)
        names = ("accuracy", "quality_correlation")
        kept[corruption] = {name: scores[name] for name in names if name in scores}
        write_json(path, kept)
    return kept[corruption]


def _size(config: ConfigDict, fields: Overrides, dataset: Dataset, arm: str) -> dict[str, Any]:
    """The parameters of an arm, and its rotation where it rolls."""
    one = with_fields(config, fields | {"batch_size": 1, "vit_weights": ""}, f"arm {arm!r}")
    experiment = Experiment(one, dataset)
    state = jax.eval_shape(experiment.initial_state)
    size = count(state.params)
    if experiment.roll_schedule is not None and state.rolling is not None:
        size += count(state.rolling.rotation)
    return {"mean": size}


def _shapes(config: ConfigDict) -> Dataset:
    """The data, or for the video sets without a path two examples of their shapes."""
    data = config.data
    if data.path or data.name not in ("crema_d", "kinetics_sounds"):
        return dataset_of(config)
    from rollingq_jax.data.sources import crema_d, kinetics_sounds

    known = {
        "crema_d": (crema_d.SPECTROGRAM_SHAPE, len(crema_d.EMOTIONS)),
        "kinetics_sounds": (kinetics_sounds.FBANK_SHAPE, kinetics_sounds.NUM_CLASSES),
    }
    spectrogram, classes = known[data.name]
    modalities = clip_modalities(spectrogram, data.num_frames, data.frame_size)
    columns = {m: np.zeros((2, *info.shape), info.dtype) for m, info in modalities.items()}
    source = ArraySource(columns | {"label": np.zeros(2, np.int32)})
    splits = dict.fromkeys(("train", "valid", "test"), source)
    return Dataset(splits, modalities, classes, description=f"shapes of {SETS[data.name]}")


def written_cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The table as text, its head first: published figures, what was measured, and differences."""
    spec = TABLES[result["table"]]
    sets = [name for name in SETS if any(name in row["published"] for row in result["rows"])]
    levels = [f", noise {level:g}" for level in spec.levels] if len(spec.levels) > 1 else [""]
    ours = SETS.get(result["data_name"], result["data_name"])
    paired = any("difference" in (row["measured"] or [{}])[0] for row in result["rows"])
    columns = [*(f"paper, {SETS[name]}" for name in sets), f"measured, {ours}"]
    columns += ["to attention"] if paired else []
    lines = [["", *(f"{column}{level}" for column in columns for level in levels)]]
    for row in result["rows"]:
        line = [row["label"]]
        for name in sets:
            values = row["published"].get(name, [None] * len(levels))
            line += ["" if v is None else _number(spec.measure, v, published=True) for v in values]
        measured = row["measured"] or [None] * len(levels)
        line += [_written(spec.measure, one) for one in measured]
        if paired:
            line += [_written(spec.measure, one, "difference", "low", "high") for one in measured]
        lines.append(line)
    return lines


def _written(measure: str, line: Any, *fields: str) -> str:
    """A mean or a difference with its interval; empty where there is none."""
    value, low, high = fields or ("mean", "mean_low", "mean_high")
    if line is None or value not in line:
        return ""
    sign = "+" if value == "difference" else ""
    text = _number(measure, line[value], sign)
    if line.get(low) is None:
        return text
    return f"{text} [{_number(measure, line[low], sign)}, {_number(measure, line[high], sign)}]"


def _number(measure: str, value: float, sign: str = "", *, published: bool = False) -> str:
    """As the paper writes it: percent, a correlation, or millions."""
    _, scale, digits = MEASURES[measure]
    return f"{value if published else scale * value:{sign}.{digits}f}"


def aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    """Lines of columns as wide as their widest cell, the first to the left."""
    first_width, *widths = (max(map(len, column)) for column in zip(*cells, strict=True))
    for first, *rest in cells:
        numbers = (cell.rjust(width) for cell, width in zip(rest, widths, strict=True))
        yield "  ".join([first.ljust(first_width), *numbers]).rstrip()


REPRODUCE = Command(
    "reproduce",
    "Prints one of the paper's tables beside what is measured here, and runs what is missing "
    "through compare. Resumes what the folder holds.",
    (
        "table2 --data av_digits --workdir runs/reproduce",
        "table1 --data crema_d --config.data.path=DATA --workdir runs/paper --seeds 3",
    ),
    (
        text("workdir", "FOLDER", "where tables and runs go", required=True),
        text("data", "NAME", "a configuration by its name, as --config: av_digits, crema_d ..."),
        integer(
            "seeds",
            f"runs of each arm (default: {DEFAULT_SEEDS})",
            low=1,
            high=MOST_SEEDS,
            default=DEFAULT_SEEDS,
        ),
        text("arms", "NAMES", "run only these rows; names of arms with commas between"),
        switch(
            "tune",
            "choose each arm's settings on validation data first, from config.compare.grid; else "
            "each has those of the configuration",
        ),
    ),
    positional=Flag("table", "TABLE", ", ".join(TABLES), flags.EnumParser(list(TABLES))),
    reads_config=True,
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax reproduce`; `argv` begins with the program's name."""
    with Interruption(ends_process=True) as interruption:
        given = REPRODUCE.parse(argv)
        result = reproduce(
            given.table,
            given.config,
            given.workdir,
            num_seeds=given.seeds,
            only=[name for name in (given.arms or "").split(",") if name],
            tune=given.tune,
            interruption=interruption,
        )
    print(result["title"])
    print("\n".join(aligned(written_cells(result))))
    print(result["note"])
    print(f"{given.table}.md and {given.table}.json are in {given.workdir}")
