"""The training run: epochs of steps, an evaluation after each, the test set once at the end."""

import contextlib
import copy
import logging
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rollingq_jax.data.load import load_dataset
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.config import check_config
from rollingq_jax.train.console import Console
from rollingq_jax.train.interrupt import Interrupted, Interruption
from rollingq_jax.train.lock import locked
from rollingq_jax.train.meter import Meter
from rollingq_jax.train.output import shown
from rollingq_jax.train.parallel import Parallel
from rollingq_jax.train.profiling import profiled
from rollingq_jax.train.run import Run
from rollingq_jax.train.schedule import SaveSchedule
from rollingq_jax.train.snapshot import save_snapshot
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.storage import explained, within_memory, writing
from rollingq_jax.train.summary import (
    finish_run,
    moved,
    print_summary,
    read_summary,
    with_inputs,
)
from rollingq_jax.train.upstream import roll_after_epoch
from rollingq_jax.train.workdir import (
    check_free,
    check_workdir,
    claim,
    remember,
    with_absolute_paths,
)
from rollingq_jax.train.writer import MetricsWriter, Row

log = logging.getLogger(__name__)


class Best(NamedTuple):
    """The best checkpoint so far, by validation accuracy; the first of equals."""

    step: int = -1
    epoch: int = -1
    accuracy: float = -1.0


class Tools(NamedTuple):
    """Where a run's numbers and states go, and what may stop it."""

    checkpoints: Checkpoints
    saves: SaveSchedule
    meter: Meter
    writer: MetricsWriter
    console: Console
    interruption: Interruption

    def report(self, rows: list[Row]) -> None:
        """Writes and shows rows."""
        self.writer.write(rows)
        self.console.show(rows)

    def take(self, batches: Iterator[Any], parallel: Parallel) -> dict[str, jax.Array]:
        """The next batch, on its way to the devices; waiting for it is counted."""
        with self.meter.waiting():
            batch = next(batches)
        return parallel.put_batch(batch)


def train_and_evaluate(
    config: Any,
    workdir: epath.PathLike,
    *,
    max_steps: int | None = None,
    interruption: Interruption | None = None,
    test: bool = True,
    quiet: bool = False,
    profile: bool = False,
) -> dict[str, Any]:
    """Trains as the configuration says, going on from what the folder holds, and tests at the end.

    Args:
      config: an `ml_collections.ConfigDict` with the fields of `default_config()`.
      workdir: the run's folder, local or gs://. The README says what is left in it.
      max_steps: stop at this step as an interruption would, with a checkpoint.
      interruption: what may stop the run, if the caller has entered one already.
      test: False stops before the test set is read; the same call with True goes on from there.
      quiet: print nothing.
      profile: write a trace of some steps into `profile` in the workdir.

    Returns:
      The summary, as `summary.json` holds it; with `test` False, `{"best": {"step", "epoch",
      "accuracy"}}` on validation data.

    Raises:
      ConfigError, DataError, CheckpointError: what the user gave cannot be used, and what was in
        the folder is as it was; or data or folder failed in the middle, and the last checkpoint is
        intact.
      NonFiniteError: a loss or gradient was NaN or infinite; the last checkpoint is from before.
      Interrupted: SIGINT, SIGTERM or `max_steps` ended the run early; its state is saved.

    Example:
      >>> config.data.name, config.data.path = "arrays", "mine.npz"  # doctest: +SKIP
      >>> summary = train_and_evaluate(config, "runs/mine")  # doctest: +SKIP
    """
    if interruption is None:
        with Interruption() as interruption:
            return train_and_evaluate(
                config,
                workdir,
                max_steps=max_steps,
                interruption=interruption,
                test=test,
                quiet=quiet,
                profile=profile,
            )
    check_config(config)
    workdir = check_workdir(workdir)
    config = with_absolute_paths(config)
    with within_memory(config), shown():
        run = Run(
            config,
            load_dataset(config.data, seed=config.seed, encoders=config.model.encoders),
            workdir,
            profile,
        )
        check_free(workdir, run.config)
        summary = read_summary(workdir)
        if summary is not None:
            run.check_data(summary, f"the summary in {workdir}")
            summary = moved(workdir, summary, run.config)
            summary = with_inputs(workdir, summary, run.inputs)
        else:
            if config.vit_weights and not (workdir / "checkpoints").exists():
                run.initial_state()  # a wrong file is told while the folder is as it was
            with writing(workdir), locked(workdir):
                claim(workdir, run.config)
                with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
                    summary = complete(run, checkpoints, interruption, max_steps, test, quiet)
        if test and not quiet:
            print_summary(summary, workdir)
    return summary


def complete(
    run: Run,
    checkpoints: Checkpoints,
    interruption: Interruption,
    max_steps: int | None,
    test: bool = True,
    quiet: bool = False,
) -> dict[str, Any]:
    """From the newest checkpoint to the summary; without a test, to the best by validation."""
    found = checkpoints.restore_newest(run.abstract_state(), run.check_record)
    if found is not None:  # its data are the same, wherever they are now
        remember(run.workdir, run.config)
    silent = quiet or jax.process_index() > 0
    state, record = found or (run.initial_state((lambda _: None) if silent else print), {})
    with explained(lambda: checkpoints.newest), writing(run.workdir):
        best = train(run, checkpoints, state, record, interruption, max_steps, quiet)._asdict()
        checkpoints.wait()
        interruption.unsaved = False
        if not test:
            return {"best": best}
        if run.config.plain_twin and run.setup.roll_schedule is not None:
            train_plain_twin(run, interruption, quiet)
        return finish_run(run, checkpoints, best)


def train_plain_twin(run: Run, interruption: Interruption, quiet: bool) -> None:
    """The same run without rotations, in the folder `plain` of the run, for its figures.

    The test data are not read. Interrupted, the run that it belongs to resumes it.
    """
    config = copy.deepcopy(run.config)
    config.rolling.enabled, config.plain_twin = False, False
    if not quiet and jax.process_index() == 0:
        print("The same without rotations, for the figures ...")
    plain = run.workdir / "plain"
    train_and_evaluate(config, plain, interruption=interruption, test=False, quiet=True)


def train(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    record: Mapping[str, Any],
    interruption: Interruption,
    max_steps: int | None,
    quiet: bool = False,
) -> Best:
    """Steps from the given state to the last; returns the best checkpoint."""
    config, setup, parallel, start_step = run.config, run.setup, run.parallel, int(state.step)
    best, validate_first = Best(**record.get("best", {})), record.get("validate", False)
    with contextlib.ExitStack() as stack:
        writer = MetricsWriter(run.workdir, start_step, validate=validate_first)
        tools = Tools(
            checkpoints,
            SaveSchedule(
                config.checkpoint.every_steps, config.checkpoint.every_minutes, config.log_every
            ),
            Meter(parallel, setup, state.params, record, skip=config.nonfinite == "skip"),
            writer,
            stack.enter_context(Console(setup, state, run.dataset, quiet)),
            interruption,
        )
        state = parallel.put_state(state)
        if validate_first:
            best = validate(run, state, best, tools)
        batches = run.batches(start_step, setup.total_steps)
        stack.enter_context(contextlib.closing(batches))
        train_step = parallel.train_step
        if run.profile:
            train_step = stack.enter_context(profiled(train_step, run.workdir / "profile"))
        batch = None
        for step in range(start_step + 1, setup.total_steps + 1):
            epoch_ends = step % setup.epoch_steps == 0
            state, sums, roll = train_step(state, batch or tools.take(batches, parallel))
            interruption.unsaved = True
            tools.meter.add(step, sums, roll if run.checks_after(step) else None)
            tools.console.advance()
            # The next batch goes to the devices while they are at this one.
            batch = None if epoch_ends else tools.take(batches, parallel)
            if epoch_ends or step % config.log_every == 0:
                tools.report(tools.meter.rows(step))
                checkpoints.check()
            if epoch_ends:
                if run.rolls_after_epoch:
                    state = roll_between_epochs(run, state, sums, tools)
                best = validate(run, state, best, tools)
            stop = (interruption.reached(step) or step == max_steps) and step < setup.total_steps
            if stop or (not epoch_ends and tools.saves.due(step)):
                save(run, state, best, tools)
            if stop:
                checkpoints.wait()
                raise Interrupted(step)
    return best


def save(run: Run, state: TrainState, best: Best, tools: Tools, *, validate: bool = False) -> None:
    """A checkpoint, and what has to be on disk before it.

    `validate` marks one at an epoch's end whose validation is still to come.
    """
    rows, pending = tools.meter.pending()
    tools.report(rows)
    record = run.record(best._asdict(), validate=validate, **pending)
    tools.checkpoints.save(run.parallel.get(state), record)
    tools.saves.saved()


def roll_between_epochs(run: Run, state: TrainState, last_sums: Any, tools: Tools) -> TrainState:
    """Upstream's roll, which is made between two epochs and not in a step."""
    one, roll = roll_after_epoch(run, run.parallel.get(state), run.parallel.get(last_sums))
    tools.report(tools.meter.roll_rows(int(one.step), jax.device_get(roll)))
    return run.parallel.put_state(one)


def used_up(run: Run, count: jax.Array, means: Mapping[str, float]) -> bool:
    """Whether every head has done the rotations it is allowed while imbalance stands above beta."""
    rolling = run.config.rolling
    if run.setup.roll_schedule is None or not rolling.max_rotations:
        return False  # nothing rolls, there is no limit, or 0 was asked for
    spent = bool(np.all(np.asarray(count) >= rolling.max_rotations))
    return spent and means.get("imbalance", 0.0) > rolling.beta


def validate(run: Run, state: TrainState, best: Best, tools: Tools) -> Best:
    """An epoch's end: validation, its row, the picture of a rotation, a checkpoint if one is due.

    Raises:
      Interrupted: the run shall stop; its state is saved, its validation is still to come.
    """
    one = run.parallel.get(state)
    step = int(one.step)
    epoch = step // run.setup.epoch_steps
    try:
        means, columns = run.evaluate(state, run.selection_split, tools.interruption.check)
    except Interrupted:
        save(run, state, best, tools, validate=True)
        tools.checkpoints.wait()
        raise Interrupted(step) from None
    counts = {} if one.rolling is None else {"rotations": int(np.sum(one.rolling.count))}
    row = {"step": step, "epoch": epoch, "split": "valid"} | means | counts | tools.meter.timing()
    if one.rolling is not None and used_up(run, one.rolling.count, means):
        row["rotations_used_up"] = True
    tools.report([row])
    turn = tools.meter.take_turn()
    if turn is not None and jax.process_index() == 0:
        save_snapshot(run.workdir, step, epoch, turn, columns)
    improved = means["accuracy"] > best.accuracy
    if improved:
        best = Best(step, epoch, means["accuracy"])
    last = step == run.setup.total_steps
    due = epoch % run.config.checkpoint.every_epochs == 0 or tools.saves.due(step)
    if improved or last or due:
        save(run, state, best, tools)
    return best
