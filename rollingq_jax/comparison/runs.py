"""The runs of a comparison: where they lie, training one, and reading back what it left."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from etils import epath
from jax.experimental.compilation_cache import compilation_cache as jax_cache
from ml_collections import ConfigDict

from rollingq_jax.analysis import predictions, probes
from rollingq_jax.comparison.arms import Overrides, check_name, with_fields
from rollingq_jax.comparison.selection import Setting, read_json, setting_name, settings_of
from rollingq_jax.data.dataset import Dataset, fingerprint, first_difference
from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import CheckpointError, ConfigError, NonFiniteError
from rollingq_jax.train.config import check_config, differing_fields, flatten, from_json
from rollingq_jax.train.interrupt import Interruption
from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.restore import load_run
from rollingq_jax.train.setup import build, resolve_config
from rollingq_jax.train.summary import read_summary
from rollingq_jax.train.writer import write_json

MOST_SEED = 2**32 - 1


class Plan(NamedTuple):
    """What is to be done.

    Attributes:
      config: the configuration that the arms change.
      arms: name -> changed fields, in the order of the table.
      settings: those that every arm is tried with.
      tune_seeds: on which; none if there is one setting.
      seeds: of the comparison.
      folder: of the comparison.
    """

    config: ConfigDict
    arms: dict[str, Overrides]
    settings: list[Setting]
    tune_seeds: list[int]
    seeds: list[int]
    folder: epath.Path

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
        setting = setting_name(number, self.settings[number])
        return self.folder / "runs" / arm / setting / f"seed_{seed}"


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
    """A plan in which every run's configuration is known to fit the data.

    Args:
      config: with `config.compare`; its seed is the first.
      arms: name -> changed fields.
      num_seeds: of each arm.
      folder: of the comparison.
      dataset: of the first seed.
      first_seed: of those on which arms are compared; by default the first that no setting is
        chosen on, or with `allow_reuse` the configuration's.
      allow_reuse: whether arms may be compared on seeds that settings were chosen on.

    Raises:
      ConfigError: a field is wrong; says in which arm. Or seeds of the choice are among those of
        the comparison, and `allow_reuse` is False.
    """
    settings = settings_of(config.compare.grid)
    first = config.seed
    tune = config.compare.tune_seeds if len(settings) > 1 else 0
    if not arms:
        raise ConfigError("arms are empty; allowed: one or more")
    start = first_seed
    if start is None:
        start = first if allow_reuse else first + tune
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
    plan = Plan(
        config,
        {name: dict(fields) for name, fields in arms.items()},
        settings,
        tuning,
        seeds,
        folder,
    )
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
            own = any(name.startswith("data.") for name in fields | settings[number])
            try:
                check_config(changed)
                seen = dataset_of(changed) if own else dataset
                build(resolve_config(changed, seen), seen)
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
    changed = first_difference(fingerprint(dataset), theirs.get("signature", fingerprint(dataset)))
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


def tuned_accuracy(
    plan: Plan, arm: str, number: int, seed: int, interruption: Interruption
) -> float | None:
    """Best validation accuracy of one run, without reading test; None where training failed."""
    folder = plan.run_folder(arm, number, seed)
    record = read_json(folder / "tuning.json")
    if record is None:
        config = plan.run_config(arm, number, seed)
        try:
            found = train_and_evaluate(
                config, folder, interruption=interruption, test=False, quiet=True
            )
            record = {"validation_accuracy": found["best"]["accuracy"]}
        except NonFiniteError as error:
            interruption.unsaved = False
            record = {"validation_accuracy": None, "failure": str(error)}
        write_json(folder / "tuning.json", record)
    return record["validation_accuracy"]


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


def answers_of(folder: epath.Path) -> predictions.Predictions:
    """A finished run's answers on its test split."""
    return probes.answers(_probe(folder))


def noise_of(folder: epath.Path, levels: Sequence[float]) -> list[dict[str, Any]]:
    """Accuracy and share under noise in each modality of a finished run, kept in `noise.json`.

    Token ids cannot take noise and are left out.
    """
    kept = read_json(folder / "noise.json")
    if kept is None or kept["levels"] != list(levels):
        probe = _probe(folder)
        clean = probes.answers(probe)
        points = [
            point
            for m, info in probe.dataset.modalities.items()
            if info.kind != "tokens"
            for point in probes.corruption_curve(probe, m, levels, clean=clean)
        ]
        kept = {"levels": list(levels), "points": points}
        write_json(folder / "noise.json", kept)
    return kept["points"]


def _probe(folder: epath.Path) -> probes.Probe:
    run = load_run(folder)
    return probes.Probe(
        predictions.predictor(run.model, run.params, run.rotation),
        run.dataset,
        batch_size=run.config.batch_size,
        seed=run.config.seed,
        encoders=run.config.model.encoders,
    )


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
