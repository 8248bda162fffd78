"""The runs of a comparison: its arms and settings, where runs lie, and the two stages of training.

Settings are chosen on validation data, before any test set is read; then every arm is trained and
tested on every seed.
"""

import ast
import contextlib
import copy
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from ml_collections import ConfigDict
from tqdm import tqdm

from rollingq_jax.analysis import probes
from rollingq_jax.analysis.metrics import Predictions
from rollingq_jax.analysis.tasks import MAIN, METRICS
from rollingq_jax.comparison.results import Run, run_record
from rollingq_jax.data.dataset import Dataset, fingerprint, first_difference
from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import CheckpointError, ConfigError, NonFiniteError
from rollingq_jax.evaluate import noise_points
from rollingq_jax.inference import probe_of
from rollingq_jax.models.spec import CROSS_FUSIONS, STATIC_FUSIONS, ModelSpec
from rollingq_jax.train.config import (
    allowed_in,
    check_config,
    default_config,
    differing_fields,
    flatten,
    from_json,
)
from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.loop import load_run, train_and_evaluate
from rollingq_jax.train.preemption import Interruption
from rollingq_jax.train.workdir import read_summary, write_json

MOST_SEED = 2**32 - 1

Overrides = dict[str, Any]
Setting = dict[str, Any]

# An arm changes what it names and nothing else: a method of `config.baseline` stays, so that each
# fusion is compared with the losses that the configuration asks for.
PLAIN = {
    "rolling.enabled": False,
    "model.modality": None,
    "model.cosine_scale": ModelSpec.cosine_scale,
}
STATIC = PLAIN | {  # they have no class token that attends
    "model.fusion_layers": 1,
    "model.quality_bias": 0.0,
    "model.quality_signal": "norm",
    "model.quality_shuffled": False,
}
CONCAT = STATIC | {"model.fusion": "concat"}
CONCAT_METHODS = (
    *("ogm", "ogm-ge", "pmr", "modality_dropout", "joint", "mmpareto", "agm", "gblend", "dgl"),
    *("lfm", "arl", "opm", "inforeg", "cggm", "umt"),
)

ATTENTION = PLAIN | {"model.fusion": "attention"}
ROLLINGQ = ATTENTION | {"rolling.enabled": True}
UNIFORM = ATTENTION | {"model.attention_scale": 0.0}
# The quality bias, which is not the paper's: `rollingq_jax.quality`.
QUALITY = {
    "model.quality_bias": 1.0,
    "model.quality_signal": "norm",
    "model.quality_shuffled": False,
}
# Fusion models that the paper compares with, in which modalities attend to each other.
CROSS = {
    f"{name}{more}": STATIC | {"model.fusion": name, "rolling.enabled": bool(more)}
    for name in CROSS_FUSIONS
    for more in ("", "+rollingq")
}
ENERGY = QUALITY | {"model.quality_bias": 0.5, "model.quality_signal": "energy"}

# The methods of comparison stand on concat, as the paper has them; on another fusion they are
# written as NAME=FUSION:baseline.name=METHOD.
ARMS: dict[str, Overrides] = {
    **{n: STATIC | {"model.fusion": n} for n in STATIC_FUSIONS if n != "unimodal"},
    # The loss of a dynamic fusion has each modality's own already.
    "entropy": STATIC | {"model.fusion": "entropy", "baseline.name": ""},
    "pdf": STATIC | {"model.fusion": "pdf", "baseline.name": ""},
    "qmf": STATIC | {"model.fusion": "qmf", "baseline.name": "qmf"},
    "attention": ATTENTION,
    "uniform": UNIFORM,
    "rollingq": ROLLINGQ,
    "rollingq-once": ROLLINGQ | {"rolling.max_rotations": 1},
    "rollingq-epoch": ROLLINGQ | {"rolling.max_rotations": None, "rolling.check_every": 0},
    "attention-quality": ATTENTION | QUALITY,
    "uniform-quality": UNIFORM | QUALITY,
    "rollingq-quality": ROLLINGQ | QUALITY,
    "attention-energy": ATTENTION | ENERGY,
    "uniform-energy": UNIFORM | ENERGY,
    "rollingq-energy": ROLLINGQ | ENERGY,
    # The control: each sample gets the bias of another one.
    "uniform-shuffled": UNIFORM | QUALITY | {"model.quality_shuffled": True},
    "mbt": PLAIN | {"model.fusion": "mbt"},
    "mbt+rollingq": ROLLINGQ | {"model.fusion": "mbt", "model.mbt_head": "attention"},
    # As the paper counts its parameters: four layers, and a head on the class tokens.
    "mbt-paper": STATIC
    | {"model.fusion": "mbt", "model.mbt_layers": 4, "model.mbt_head": "concat"},
    **CROSS,
    **{name: CONCAT | {"baseline.name": name.replace("-", "_")} for name in CONCAT_METHODS},
    "config": {},  # the configuration as it is, to build own arms on
}
FORM = "NAME, or NAME=BASE:FIELD=VALUE:FIELD=VALUE with BASE the name of an arm"


def known_arms(modalities: tuple[str, ...]) -> dict[str, Overrides]:
    """The arms by name, with a unimodal one for each modality."""
    # No method against imbalance fits one modality, whose loss is its own in any case.
    alone = STATIC | {"model.fusion": "unimodal", "baseline.name": ""}
    noise = {"data.corruptions": fresh_noise(modalities)}
    bases = ("concat", "attention", "uniform", "rollingq")
    fresh = {f"{base}-fresh": ARMS[base] | noise for base in bases}
    return {m: alone | {"model.modality": m} for m in modalities} | ARMS | fresh


def fresh_noise(modalities: tuple[str, ...]) -> str:
    """Light noise in every modality, drawn anew in each epoch of training, so that it is not
    learned by heart: .5 for audio and .3 else, with up to 3 and 1.5 more in 30 % of the examples.
    """
    levels = {m: (0.5, 3.0) if m == "audio" else (0.3, 1.5) for m in modalities}
    return ", ".join(f"{m}={low}, {m}=0..{high}@0.3" for m, (low, high) in levels.items())


def parse_arms(text: str, modalities: tuple[str, ...]) -> dict[str, Overrides]:
    """Arms from a command line: `"concat,rollingq,fast=rollingq:rolling.beta=0.1"`.

    Args:
      text: arms with commas between; each a name, or `NAME=BASE:FIELD=VALUE...`, an arm `BASE`
        with fields of the configuration changed.
      modalities: of the data; each names the arm that sees it alone.

    Returns:
      Name -> fields of the configuration and their values.

    Raises:
      ConfigError: an arm is unknown, named twice or malformed; says which.
    """
    known, arms = known_arms(modalities), {}
    for item in _parts(text, ","):
        name, equals, rest = item.partition("=")
        base, *changes = _parts(rest, ":") if equals else (name,)
        check_name(name)
        if name in arms:
            raise ConfigError(f"--arms: {name!r} is there twice; allowed: once")
        if base not in known:
            raise ConfigError(f"--arms: {base!r} is no arm; allowed: {', '.join(known)}")
        arms[name] = known[base] | dict(_change(item, change) for change in changes)
    return arms


def check_name(name: str) -> None:
    """An arm's name can be that of a folder.

    Raises:
      ConfigError: it cannot.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.+-]{0,60}", name):
        raise ConfigError(
            f"an arm has the name {name!r}; allowed: letters, digits, and _ . + - after the first"
        )


def _change(item: str, text: str) -> tuple[str, Any]:
    field, equals, value = text.partition("=")
    if not equals or not field:
        raise ConfigError(f"--arms: {item!r} has the part {text!r}; allowed: FIELD=VALUE")
    return field.removeprefix("config."), read_value(value)


def read_value(text: str) -> Any:
    """A value as Python writes it (`0.5`, `(8, 8)`, `true` too), else the text itself."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):  # TypeError: a dict with an unhashable key
        return text


def _parts(text: str, mark: str) -> Iterator[str]:
    """The text between marks that are outside brackets, stripped; at least one part."""
    depth, start = 0, 0
    for place, letter in enumerate(text):
        depth += (letter in "([{") - (letter in ")]}")
        if letter == mark and depth == 0:
            yield text[start:place].strip()
            start = place + 1
    yield text[start:].strip()


def resets(config: ConfigDict, arms: Mapping[str, Overrides]) -> list[str]:
    """A line for each field in which an arm has another value than the configuration's own.

    Own are values that differ from `default_config()`. What an arm is by its name, the fusion and
    whether it rolls, is not told.
    """
    ours, defaults = flatten(config), flatten(default_config())
    return [
        f"arm {arm}: config.{field} is {value!r} and not {ours[field]!r}"
        for arm, fields in arms.items()
        for field, value in fields.items()
        if field not in ("model.fusion", "rolling.enabled")
        and field in ours
        and ours[field] not in (value, defaults.get(field))
    ]


def with_fields(config: ConfigDict, fields: Mapping[str, Any], where: str) -> ConfigDict:
    """A copy of the configuration with some fields changed, `{"rolling.beta": 0.1}`.

    `where` says in messages what asks for it.

    Raises:
      ConfigError: there is no such field, or the value has another type.
    """
    changed = copy.deepcopy(config)
    for field, value in fields.items():
        section, _, name = field.rpartition(".")
        node: Any = changed
        for part in section.split(".") if section else ():
            node = node[part] if isinstance(node, ConfigDict) and part in node else None
        if not isinstance(node, ConfigDict) or name not in node:
            there = ", ".join(sorted(node.keys())) if isinstance(node, ConfigDict) else "no fields"
            raise ConfigError(f"{where}: config.{field} is not a field; allowed there: {there}")
        try:
            with changed.ignore_type() if value is None else contextlib.nullcontext():
                node[name] = value
        except TypeError:
            allowed = allowed_in(field, config)
            raise ConfigError(f"{where}: config.{field} is {value!r}; allowed: {allowed}") from None
    return changed


def settings_of(grid: Any) -> list[Setting]:
    """Every combination of the grid's values, `{"optimizer.learning_rate": 0.02}`.

    Args:
      grid: `config.compare.grid`: fields of the configuration, nested as there, each with a tuple
        of values. Empty: one setting that changes nothing.

    Raises:
      ConfigError: a field has something else than values.
    """
    fields = flatten(grid)
    for field, values in fields.items():
        if not isinstance(values, tuple) or not values:
            raise ConfigError(
                f"config.compare.grid.{field} is {values!r}; allowed: a tuple of values to try"
            )
    return [dict(zip(fields, one, strict=True)) for one in itertools.product(*fields.values())]


def run_folder(
    folder: epath.Path, arm: str, number: int, setting: Setting, seed: int
) -> epath.Path:
    """Where a run of a comparison lies, of its arm with the setting of that number."""
    text = ",".join(f"{field.rpartition('.')[2]}={value}" for field, value in setting.items())
    name = f"{number}-" + re.sub(r"[^\w.+=,-]", "_", text)[:80] if setting else "fixed"
    return folder / "runs" / arm / name / f"seed_{seed}"


def choose(scores: Sequence[Sequence[float | None]], metric: str = "accuracy") -> int | None:
    """Number of the setting with the best mean validation score, the first of equals.

    A setting in which a run failed (None) is out; None if all are.
    """
    sign = 1 if METRICS[metric].higher_is_better else -1
    means = [
        -math.inf if any(a is None for a in row) else sign * float(np.mean([a or 0.0 for a in row]))
        for row in scores
    ]
    best = int(np.argmax(means))
    return None if means[best] == -math.inf else best


def selected(
    settings: Sequence[Setting],
    seeds: Sequence[int],
    scores: Sequence[Sequence[float | None]],
    arm: str,
    metric: str = "accuracy",
) -> dict[str, Any]:
    """An arm's entry in `selection.json`; without seeds there was nothing to choose.

    Raises:
      ConfigError: no setting could be trained with.
    """
    best = choose(scores, metric) if seeds else 0
    if best is None:
        raise ConfigError(
            f"arm {arm!r}: loss or gradient is NaN or infinite with every setting of "
            "config.compare.grid; allowed: a grid with a setting that trains"
        )
    tried = [
        {"setting": setting, f"validation_{metric}": list(row)}
        for setting, row in zip(settings, scores, strict=True)
        if seeds
    ]
    return {
        "chosen": best,
        "setting": settings[best],
        "settings_tried": len(tried),
        "runs": len(tried) * len(seeds),
        "seeds": list(seeds),
        "tried": tried,
    }


def search_line(selection: Mapping[str, Any]) -> str:
    """How much was tried before the tests, arm by arm: `{arm: entry}` of `selection.json`."""
    counts = {arm: len(entry["tried"]) for arm, entry in selection.items()}
    seeds = sorted({seed for entry in selection.values() for seed in entry["seeds"]})
    if not seeds:
        return "No settings were searched: each arm ran with those of the configuration."
    runs = sum(len(entry["tried"]) * len(entry["seeds"]) for entry in selection.values())
    each = sorted(set(counts.values()))
    words = str(each[0]) if len(each) == 1 else ", ".join(f"{a} {n}" for a, n in counts.items())
    return (
        f"Settings tried for each arm: {words}, on validation data of seeds "
        f"{', '.join(map(str, seeds))}; {runs} runs in all."
    )


class Plan(NamedTuple):
    """What is to be done.

    Attributes:
      config: the configuration that the arms change.
      arms: name -> changed fields, in the order of the table.
      settings: those that every arm is tried with.
      tune_seeds: on which; none if there is one setting.
      seeds, folder: of the comparison.
      metric: the main one of the data's task, by which settings are chosen.
    """

    config: ConfigDict
    arms: dict[str, Overrides]
    settings: list[Setting]
    tune_seeds: list[int]
    seeds: list[int]
    folder: epath.Path
    metric: str = "accuracy"

    @property
    def runs_to_choose(self) -> int:
        """How many runs an arm's setting is chosen by."""
        return len(self.settings) * len(self.tune_seeds)

    def run_config(self, arm: str, number: int, seed: int) -> ConfigDict:
        """The configuration of one run.

        Raises:
          ConfigError: a field is not one, or has another type.
        """
        # An arm without rotations is its own; runs of a comparison need no twin.
        own = {"seed": seed, "plain_twin": False}
        fields = self.arms[arm] | self.settings[number] | own
        return with_fields(self.config, fields, f"arm {arm!r}")

    def run_folder(self, arm: str, number: int, seed: int) -> epath.Path:
        """Where that run lies."""
        return run_folder(self.folder, arm, number, self.settings[number], seed)


def dataset_of(config: ConfigDict) -> Dataset:
    """The data of a run."""
    return load_dataset(config.data, seed=config.seed, encoders=config.model.encoders)


def make_plan(
    config: ConfigDict,
    arms: Mapping[str, Overrides],
    num_seeds: int,
    folder: epath.Path,
    dataset: Dataset,
    *,
    first_seed: int | None = None,
    allow_reuse: bool = False,
) -> Plan:
    """A plan in which every run's configuration is known to fit the data; see `compare`.

    Args:
      config: its seed is the first of those that settings are chosen on.
      arms, num_seeds, folder: as in `Plan`.
      dataset: of that seed.
      first_seed, allow_reuse: as `compare` takes them.

    Raises:
      ConfigError: a field is wrong; says in which arm. Or seeds of the choice are among those of
        the comparison, and `allow_reuse` is False.
    """
    settings = settings_of(config.compare.grid)
    first = config.seed
    tune = config.compare.tune_seeds if len(settings) > 1 else 0
    if not arms:
        raise ConfigError("arms are empty; allowed: one or more")
    # What settings are chosen on confirms nothing: by default arms are compared on later seeds.
    start = (first if allow_reuse else first + tune) if first_seed is None else first_seed
    if not 0 <= start <= MOST_SEED - num_seeds:
        raise ConfigError(
            f"--first_seed is {start} with {num_seeds} seeds; "
            f"allowed: seeds from 0 to {MOST_SEED:,}"
        )
    tuning, seeds = list(range(first, first + tune)), list(range(start, start + num_seeds))
    reused = sorted(set(tuning) & set(seeds))
    if reused and not allow_reuse:
        raise ConfigError(
            f"--first_seed is {start}, and settings are chosen on seed {reused[0]}; allowed: seeds "
            "that nothing is chosen on, or --allow_reuse"
        )
    own_arms = {name: dict(fields) for name, fields in arms.items()}
    plan = Plan(config, own_arms, settings, tuning, seeds, folder, MAIN[dataset.task])
    for arm, fields in plan.arms.items():
        check_name(arm)
        if "seed" in fields or "seed" in settings[0]:
            raise ConfigError(f"arm {arm!r} sets config.seed; allowed: every other field")
        both = sorted(set(fields) & set(settings[0]))
        if both:
            raise ConfigError(
                f"arm {arm!r} sets config.{both[0]}, which config.compare.grid searches; "
                "allowed: one of the two"
            )
        for number in range(len(settings)):
            changed = plan.run_config(arm, number, first)
            # Built and let go: what the model or the data refuse is told now, and not when the
            # runs before it are done. Data that an arm does not change are read once.
            own = any(name.startswith("data.") for name in fields | settings[number])
            try:
                check_config(changed)
                seen = dataset_of(changed) if own else dataset
                Experiment(changed, seen)
                if tune and "valid" not in seen.splits:
                    raise ConfigError(
                        "config.data.validation is False; allowed with several settings in "
                        "config.compare.grid: True, since validation data choose among them"
                    )
            except ConfigError as error:
                raise ConfigError(f"arm {arm!r}: {error}") from None
    return plan


def check_same(plan: Plan, dataset: Dataset) -> None:
    """The folder holds nothing, or this comparison, whose arms and seeds may be others.

    Raises:
      CheckpointError: configuration, search, data or an arm of the same name differ; says where.
    """
    theirs = read_json(plan.folder / "comparison.json")
    if theirs is None:
        return
    stored = from_json(theirs["config"])
    different = differing_fields(plan.config, stored)
    mine, other = (flatten({"compare": c.compare.to_dict()}) for c in (plan.config, stored))
    different |= {
        n: (mine.get(n), other.get(n)) for n in mine | other if mine.get(n) != other.get(n)
    }
    if different:
        name, (ours, before) = next(iter(different.items()))
        raise CheckpointError(
            f"workdir {plan.folder} holds another comparison: config.{name} is {ours!r} and was "
            f"{before!r}; allowed: the same, or another workdir"
        )
    data = fingerprint(dataset)
    # A comparison of an earlier version has no signature, and is believed.
    changed = first_difference(data, theirs.get("signature", data))
    if changed:
        raise CheckpointError(
            f"workdir {plan.folder} holds a comparison on other data: {changed} has other values; "
            "allowed: the same data, or another workdir"
        )
    for name in plan.arms.keys() & theirs["arms"].keys():
        if not _same_arm(plan.config, plan.arms[name], flatten(theirs["arms"][name])):
            raise CheckpointError(
                f"workdir {plan.folder} holds an arm {name!r} with other fields: "
                f"{theirs['arms'][name]}; allowed: another name"
            )


def _same_arm(config: ConfigDict, ours: Overrides, theirs: Overrides) -> bool:
    """Whether two arms make the same configuration; one may name a field that the other leaves as
    the configuration has it."""
    if flatten(ours) == theirs:
        return True
    try:
        first, second = (with_fields(config, fields, "arm") for fields in (ours, theirs))
    except ConfigError:  # a field that is none any more
        return False
    return flatten(first) == flatten(second)


def claim(plan: Plan, dataset: Dataset) -> None:
    """Writes what is compared, and on what; arms of earlier calls stay."""
    before = read_json(plan.folder / "comparison.json") or {"arms": {}}
    content = {
        "config": plan.config.to_dict(),
        "signature": fingerprint(dataset),
        "arms": before["arms"] | plan.arms,
    }
    write_json(plan.folder / "comparison.json", content)


class Progress:
    """A bar over runs, and a line for each that has ended."""

    def __init__(self, bar: tqdm) -> None:
        self._bar, self._done = bar, 0  # a bar that is not shown does not count

    def begin(self, text: str) -> None:
        """A run is under way."""
        self._bar.set_postfix_str(text)

    def end(self, text: str, runs: int = 1) -> None:
        """Runs have ended."""
        self._done += runs
        self._bar.update(runs)
        tqdm.write(f"{self._done}/{self._bar.total}  {text}")


def tune_arms(plan: Plan, interruption: Interruption, progress: Progress) -> dict[str, Any]:
    """Chooses each arm's setting on validation data and writes `selection.json`.

    An arm that has its setting already keeps it.

    Returns:
      Arm -> its entry (`selection.selected`).
    """
    path = plan.folder / "selection.json"
    selection = dict(read_json(path) or {})
    for arm in plan.arms:
        if arm in selection:
            if plan.runs_to_choose:
                progress.end(f"{arm}: has its setting already", plan.runs_to_choose)
            continue
        scores: list[list[float | None]] = [[] for _ in plan.settings]
        for seed in plan.tune_seeds:
            for number, setting in enumerate(plan.settings):
                words = ", ".join(f"{field}={value}" for field, value in setting.items())
                progress.begin(f"{arm}, {words}, seed {seed}")
                found = tuned_score(plan, arm, number, seed, interruption)
                scores[number].append(found)
                score = f"validation {METRICS[plan.metric].words}"
                score = "not finite" if found is None else f"{score} {found:.3f}"
                progress.end(f"{arm}, {words}, seed {seed}: {score}")
        selection[arm] = selected(plan.settings, plan.tune_seeds, scores, arm, plan.metric)
    write_json(path, selection)
    return selection


def run_tests(
    plan: Plan, selection: Mapping[str, Any], interruption: Interruption, progress: Progress
) -> list[Run]:
    """Every arm and seed with the chosen setting, seed by seed, so that pairs come together.

    Returns:
      A record of each run, arm by arm.
    """
    records = []
    for seed in plan.seeds:
        for arm in plan.arms:
            number = selection[arm]["chosen"]
            progress.begin(f"{arm}, seed {seed}")
            summary = tested_summary(plan, arm, number, seed, interruption)
            records.append(run_record(arm, seed, plan.settings[number], summary))
            score = summary[f"test_{plan.metric}"]
            progress.end(f"{arm}, seed {seed}: test {METRICS[plan.metric].words} {score:.3f}")
    order = list(plan.arms)
    return sorted(records, key=lambda run: (order.index(run["arm"]), run["seed"]))


def tuned_score(
    plan: Plan, arm: str, number: int, seed: int, interruption: Interruption
) -> float | None:
    """Best validation score of one run, without reading test; None where training failed."""
    name = f"validation_{plan.metric}"
    folder = plan.run_folder(arm, number, seed)
    record = read_json(folder / "tuning.json")
    if record is None:
        config = plan.run_config(arm, number, seed)
        try:
            found = train_and_evaluate(
                config, folder, interruption=interruption, test=False, quiet=True
            )
            record = {name: found["best"][plan.metric]}
        except NonFiniteError as error:
            interruption.unsaved = False  # the run has ended: an interruption loses none of it
            record = {name: None, "failure": str(error)}
        write_json(folder / "tuning.json", record)
    return record[name]


def tested_summary(
    plan: Plan, arm: str, number: int, seed: int, interruption: Interruption
) -> dict[str, Any]:
    """The summary of one run, which is trained and tested where it has not been."""
    folder = plan.run_folder(arm, number, seed)
    summary = read_summary(folder)
    if summary is not None:
        return summary
    config = plan.run_config(arm, number, seed)
    try:
        return train_and_evaluate(config, folder, interruption=interruption, quiet=True)
    except NonFiniteError as error:
        raise NonFiniteError(f"arm {arm!r}, seed {seed}: {error}") from None


def answers_of(folder: epath.Path) -> Predictions:
    """A finished run's answers on its test split."""
    return probes.predict(probe_of(load_run(folder)))


def noise_of(folder: epath.Path, levels: Sequence[float]) -> list[dict[str, Any]]:
    """Score and share under noise in each modality of a finished run, kept in `noise.json`."""
    kept = read_json(folder / "noise.json")
    if kept is None or kept["levels"] != list(levels):
        probe = probe_of(load_run(folder))
        points = noise_points(probe, probes.predict(probe), levels)
        kept = {"levels": list(levels), "points": points}
        write_json(folder / "noise.json", kept)
    return kept["points"]


@contextlib.contextmanager
def compiled_programs(folder: epath.Path) -> Iterator[None]:
    """Keeps compiled programs in a folder, since the runs of an arm share them all.

    A `jax_compilation_cache_dir` that the user has set is used instead.
    """
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    if before:
        yield
        return
    jax.config.update(name, str(folder))
    jax_cache.reset_cache()
    try:
        yield
    finally:
        jax.config.update(name, before)
        jax_cache.reset_cache()


def read_json(path: epath.Path) -> Any:
    """The content of a JSON file; None where there is none.

    Raises:
      CheckpointError: it is damaged.
    """
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} is damaged; allowed: a JSON object, or no file")
    return content
