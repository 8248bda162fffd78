"""Compares arms over seeds: each tuned on validation data with the same grid, tested once.

    python -m rollingq_jax.compare --config configs/av_digits.py \\
      --arms concat,attention,rollingq --seeds 10 --workdir runs/compare

Leaves `selection.json` (before any test set is read), `results.json`, `results.csv`, `figures/` and
`report.html`. Killed or interrupted, the same command goes on, skips what is done, and ends with
the same table. More seeds or arms can be added by naming them in another call.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("compare"))

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from ml_collections import ConfigDict

from rollingq_jax.analysis.probes import NOISE_LEVELS
from rollingq_jax.comparison import results as numbers
from rollingq_jax.comparison.runs import (
    ARMS,
    FORM,
    Overrides,
    Plan,
    Progress,
    answers_of,
    check_same,
    claim,
    compiled_programs,
    dataset_of,
    make_plan,
    noise_of,
    parse_arms,
    resets,
    run_tests,
    search_line,
    tune_arms,
)
from rollingq_jax.errors import ConfigError
from rollingq_jax.files import write_whole
from rollingq_jax.train.cli import Command, integer, switch, text
from rollingq_jax.train.config import check_config
from rollingq_jax.train.logging import device_line, read_rows, table, versions
from rollingq_jax.train.output import progress_bar, wrapped
from rollingq_jax.train.preemption import Interruption
from rollingq_jax.train.workdir import check_workdir, locked, write_json

DEFAULT_ARMS = "concat,attention,rollingq"
MOST_SEEDS = 10_000


def compare(
    config: ConfigDict,
    workdir: epath.PathLike,
    *,
    arms: str | Mapping[str, Overrides] = DEFAULT_ARMS,
    num_seeds: int = 10,
    reference: str | None = None,
    noise: bool = False,
    first_seed: int | None = None,
    allow_reuse: bool = False,
    interruption: Interruption | None = None,
) -> dict[str, Any]:
    """Trains and tests arms over seeds, going on from what the folder holds.

    Args:
      config: the configuration that the arms change. `config.compare` says what each arm
        is tuned with, on seeds that count from `config.seed`.
      workdir: the comparison's folder.
      arms: as `comparison.runs.parse_arms` reads them, or name -> changed fields.
      num_seeds: of each arm.
      reference: the arm that the others are compared with, seed by seed; by default attention,
        or the first arm where that is none.
      first_seed: of those on which the arms are compared; by default the first behind the seeds
        that settings are chosen on.
      allow_reuse: whether a seed may serve the choice and the comparison, too.
      noise: whether each run is tested under growing noise in each modality, too.
      interruption: what may stop the comparison, if the caller has entered one already.

    Returns:
      What `results.json` holds.

    Raises:
      ConfigError, DataError, CheckpointError: an arm, the data or the folder cannot be used.
      NonFiniteError: with the chosen setting, a loss or gradient was NaN or infinite.
      Interrupted: the same call goes on from where this one stopped.
    """
    with contextlib.ExitStack() as stack:
        if interruption is None:
            interruption = stack.enter_context(Interruption())
        check_config(config)
        if jax.process_count() > 1:
            raise ConfigError(f"compare runs in {jax.process_count()} processes; allowed: one")
        if not 1 <= num_seeds <= MOST_SEEDS:
            raise ConfigError(
                f"--seeds is {num_seeds}; allowed: an integer >= 1 and at most {MOST_SEEDS:,}"
            )
        # What may be wrong is told before anything is written.
        folder = check_workdir(workdir)
        dataset = dataset_of(config)
        if isinstance(arms, str):
            arms = parse_arms(arms, tuple(sorted(dataset.modalities)))
        plan = make_plan(
            config, arms, num_seeds, folder, dataset, first_seed=first_seed, allow_reuse=allow_reuse
        )
        reference = reference or ("attention" if "attention" in arms else next(iter(arms)))
        if reference not in arms:
            raise ConfigError(f"--reference is {reference!r}; allowed: {', '.join(arms)}")
        check_same(plan, dataset)
        folder.mkdir(parents=True, exist_ok=True)
        for line in resets(config, arms):
            print(line)
        stack.enter_context(locked(folder))
        stack.enter_context(compiled_programs(folder / "compiled"))
        total = len(arms) * (plan.runs_to_choose + len(plan.seeds))
        progress = Progress(stack.enter_context(progress_bar(total, "run")))
        claim(plan, dataset)
        # All choices are made, and written down, before the first test set is read.
        selection = tune_arms(plan, interruption, progress)
        records = run_tests(plan, selection, interruption, progress)
        result = gather(plan, selection, records, reference, dataset.description)
        show(plan, result, noise)
    return result


def gather(
    plan: Plan,
    selection: Mapping[str, Any],
    records: Sequence[numbers.Run],
    reference: str,
    data: str,
) -> dict[str, Any]:
    """The table and what it says, as `results.json` holds them."""
    arms = list(plan.arms)
    main = numbers.make_table(records, arms, reference)
    second = None
    if "concat" in arms and reference != "concat" and len(arms) > 2:
        lines = numbers.make_table(records, arms, "concat")
        second = {name: lines[name] for name in [numbers.main_of(lines)]}
    return {
        "verdicts": numbers.verdicts(main, records, reference),
        "conclusion": numbers.conclude(main, second, reference, "concat", len(plan.seeds)),
        "search": search_line({arm: selection[arm] for arm in arms}),
        "reference": reference,
        "second_reference": "concat" if second else None,
        "seeds": plan.seeds,
        "arms": plan.arms,
        "selection": {arm: selection[arm] for arm in arms},
        "table": main,
        "second_table": second,
        "runs": list(records),
        "data": data,
        "config": plan.config.to_dict(),
        "versions": versions(),
        "device": device_line(),
    }


def show(plan: Plan, result: dict[str, Any], noise: bool) -> None:
    """Writes the numbers, then the figures and the report."""
    write_whole(plan.folder / "results.csv", numbers.as_csv(result["runs"]))
    write_json(plan.folder / "results.json", result)

    def folders(arm: str) -> Iterator[epath.Path]:
        number = result["selection"][arm]["chosen"]
        return (plan.run_folder(arm, number, seed) for seed in plan.seeds)

    rows = {arm: [read_rows(f / "metrics.jsonl") for f in folders(arm)] for arm in plan.arms}
    with_quality = result["table"].get("quality_correlation", {})
    samples = {arm: answers_of(next(folders(arm))) for arm in with_quality}
    points = {}
    if noise:
        points = {a: [noise_of(f, NOISE_LEVELS) for f in folders(a)] for a in plan.arms}
        write_json(plan.folder / "noise.json", points)
    numbers.write_pictures(plan.folder, result, rows, samples, points)


def summary_lines(result: Mapping[str, Any]) -> Iterator[str]:
    """What the command prints: verdicts, a table for each metric, and what may be concluded."""
    yield from map(wrapped, result["verdicts"])
    words = numbers.metrics_of(result["runs"])
    for metric, lines in result["table"].items():
        yield f"{words[metric]}, and its difference to {result['reference']}:"
        rows = []
        for arm, line in lines.items():
            rows.append((arm, numbers.written_mean(metric, line)))
            if "difference" in line:
                rows.append(("", numbers.written_difference(metric, line)))
        yield table(rows)
    yield wrapped(result["search"])
    yield wrapped(result["conclusion"])


EXPLAINED = """\
seeds
  A seed is that of parameters, order and dropout, and of data that are made.
  Runs of one seed are compared in pairs, so that what a seed does to all arms
  alike cancels. A gain counts when the bootstrap 95 % interval of the paired
  differences excludes 0, with five seeds or more. Settings are chosen on other
  seeds than those of the table.
reference
  Each arm's difference is to this one: attention, where it is among the arms,
  else the first. `--reference uniform` asks what the look at the sample adds.
noise
  Tests every run under noise of 0.25 to 4 standard deviations in one modality
  at a time: whether attention leaves what has become noise. It costs some
  passes over the test set and no training.
sweep
  There is no command of its own: a sweep over settings is a comparison. Name
  each setting as an arm (the second example), to have a line of the table and
  an interval for each, or put values into config.compare.grid, to have each
  arm tuned over all their combinations on validation data."""


COMPARE = Command(
    "compare",
    "Compares arms over seeds: each is tuned on validation data with the same grid "
    "(config.compare.grid) and tested once a seed. Resumes what the folder holds.",
    (
        "--config av_digits --arms concat,attention,rollingq --seeds 10 --workdir runs/compare",
        "--config av_digits --workdir runs/sweep "
        "--arms attention,b0=rollingq:rolling.beta=0.0,b2=rollingq:rolling.beta=0.2",
    ),
    (
        text("workdir", "FOLDER", "the comparison's folder", required=True),
        text(
            "arms",
            "ARMS",
            f"with commas between, each {FORM}; known: the name of a modality, {', '.join(ARMS)} "
            f"(default: {DEFAULT_ARMS})",
            default=DEFAULT_ARMS,
        ),
        integer("seeds", "runs of each arm (default: 10)", low=1, high=MOST_SEEDS, default=10),
        text("reference", "ARM", "the arm that the others are compared with, seed by seed"),
        switch("noise", "test each run under growing noise in each modality, too"),
        integer(
            "first_seed",
            "where seeds count from (default: behind those that settings are chosen on)",
            low=0,
            high=2**32 - 1,
        ),
        switch("allow_reuse", "a seed may serve the choice of settings and the comparison, too"),
    ),
    reads_config=True,
    epilog=lambda: EXPLAINED,
)


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax compare`; `argv` begins with the program's name."""
    with Interruption(ends_process=True) as interruption:
        given = COMPARE.parse(argv)
        result = compare(
            given.config,
            given.workdir,
            arms=given.arms,
            num_seeds=given.seeds,
            reference=given.reference,
            noise=given.noise,
            first_seed=given.first_seed,
            allow_reuse=given.allow_reuse,
            interruption=interruption,
        )
    for line in summary_lines(result):
        print(line)
    print(f"results.json, results.csv, figures and report.html are in {given.workdir}")
