"""The training run: epochs of steps, an evaluation after each, the test set once at the end."""

import contextlib
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from rollingq_jax.data.load import load_dataset
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.config import check_config
from rollingq_jax.train.console import Console
from rollingq_jax.train.interrupt import Interrupted, Interruption
from rollingq_jax.train.meter import Meter
from rollingq_jax.train.run import Run
from rollingq_jax.train.snapshot import save_snapshot
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.summary import finish_run, print_summary, read_summary
from rollingq_jax.train.upstream import roll_after_epoch
from rollingq_jax.train.workdir import claim, open_workdir
from rollingq_jax.train.writer import MetricsWriter

log = logging.getLogger(__name__)


class Best(NamedTuple):
    """The best checkpoint so far, by validation accuracy; the first of equals."""

    step: int = -1
    epoch: int = -1
    accuracy: float = -1.0


class Tools(NamedTuple):
    """Where a run's numbers and states go."""

    checkpoints: Checkpoints
    meter: Meter
    writer: MetricsWriter
    console: Console


def train_and_evaluate(
    config: Any, workdir: epath.PathLike, *, max_steps: int | None = None
) -> dict[str, Any]:
    """Trains as the configuration says, going on from what the folder holds, and tests at the end.

    Args:
      config: an `ml_collections.ConfigDict` with the fields of `default_config()`.
      workdir: the run's folder, local or gs://. The README says what is left in it.
      max_steps: stop at this step as an interruption would, with a checkpoint.

    Returns:
      The summary, as `summary.json` holds it.

    Raises:
      ConfigError, DataError, CheckpointError: what the user gave cannot be used; what was in the
        folder is as it was.
      Interrupted: SIGINT, SIGTERM or `max_steps` ended the run early; its state is saved.
    """
    check_config(config)
    workdir = open_workdir(workdir)
    run = Run(config, load_dataset(config.data, seed=config.seed), workdir)
    claim(workdir, run.config)
    summary = read_summary(workdir)
    if summary is None:
        with Checkpoints(workdir / "checkpoints", config.checkpoint.keep) as checkpoints:
            state, record = checkpoints.restore_newest(run.initial_state()) or (None, {})
            state = run.initial_state() if state is None else state
            best = train(run, checkpoints, state, record, max_steps)
            summary = finish_run(run, checkpoints, best.step)
    print_summary(summary, workdir)
    return summary


def train(
    run: Run,
    checkpoints: Checkpoints,
    state: TrainState,
    record: dict[str, Any],
    max_steps: int | None,
) -> Best:
    """Steps from the given state to the last; returns the best checkpoint."""
    setup, parallel, start_step = run.setup, run.parallel, int(state.step)
    best = Best(**record.get("best", {}))
    with contextlib.ExitStack() as stack:
        tools = Tools(
            checkpoints,
            Meter(parallel, setup, record.get("sums", {})),
            stack.enter_context(contextlib.closing(MetricsWriter(run.workdir, start_step))),
            stack.enter_context(Console(setup, state, run.dataset)),
        )
        interruption = stack.enter_context(Interruption())
        state = parallel.put_state(state)
        batches = run.batches(start_step, setup.total_steps)
        stack.callback(batches.close)
        for step in range(start_step + 1, setup.total_steps + 1):
            with tools.meter.waiting():
                batch = next(batches)
            state, sums, roll = parallel.train_step(state, parallel.put_batch(batch))
            tools.meter.add(step, sums, roll if run.checks_after(step) else None)
            tools.console.advance()
            epoch_ends = step % setup.epoch_steps == 0
            if epoch_ends or step % run.config.log_every == 0:
                rows = tools.meter.rows(step)
                tools.writer.write(rows)
                tools.console.show(rows)
            if epoch_ends:
                state, best = end_epoch(run, state, best, sums, tools)
            stop = interruption.requested or step == max_steps
            if stop and step < setup.total_steps:
                sums = tools.meter.flush()
                checkpoints.save(parallel.get(state), run.record(best._asdict(), sums))
                checkpoints.wait()
                raise Interrupted(step)
    return best


def end_epoch(
    run: Run, state: TrainState, best: Best, last_sums: Any, tools: Tools
) -> tuple[TrainState, Best]:
    """Validation, its rows, the picture of a rotation, and a checkpoint where one is due."""
    one = run.parallel.get(state)
    step = int(one.step)
    epoch = step // run.setup.epoch_steps
    roll = tools.meter.take_roll()
    if run.rolls_after_epoch:
        one, roll = roll_after_epoch(run, one, run.parallel.get(last_sums))
        state = run.parallel.put_state(one)
        rows = tools.meter.roll_rows(step, jax.device_get(roll))
        tools.writer.write(rows)
        tools.console.show(rows)
    means, columns = run.evaluate(state, run.selection_split)
    counts = {} if one.rolling is None else {"rotations": int(np.sum(one.rolling.count))}
    row = {"step": step, "epoch": epoch, "split": "valid"} | means | counts | tools.meter.timing()
    tools.writer.write([row])
    tools.console.show([row])
    if roll is not None:
        save_snapshot(run.workdir, step, epoch, roll, columns)
    improved = means["accuracy"] > best.accuracy
    if improved:
        best = Best(step, epoch, means["accuracy"])
    last = step == run.setup.total_steps
    if improved or last or epoch % run.config.checkpoint.every_epochs == 0:
        record = run.record(best._asdict(), {})
        tools.checkpoints.save(one, record, best.accuracy if improved else None)
    return state, best
