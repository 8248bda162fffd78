"""The training run: epochs of steps, an evaluation after each, the test set once at the end.

`load_run` reads a finished or stopped run back from its folder, without its data.
"""

import contextlib
import copy
import dataclasses
import functools
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath
from ml_collections import ConfigDict

from rollingq_jax.analysis.tasks import METRICS, Task, task_of
from rollingq_jax.baselines.gblend import weigh_heads
from rollingq_jax.baselines.hooks import encoder_part
from rollingq_jax.data.dataset import Dataset
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.errors import CheckpointError, ConfigError, UserError, said
from rollingq_jax.models import ModelSpec, build_model
from rollingq_jax.quality import QualityState, model_variables
from rollingq_jax.train.agreement import agreement, run_facts
from rollingq_jax.train.checkpoint import Checkpoints, CheckpointSchedule, with_last_checkpoint
from rollingq_jax.train.config import check_config, from_json
from rollingq_jax.train.distributed import TIMEOUT
from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.logging import (
    Callback,
    Console,
    MetricAccumulator,
    MetricsWriter,
    Row,
    save_snapshot,
)
from rollingq_jax.train.output import shown
from rollingq_jax.train.preemption import Interrupted, Interruption
from rollingq_jax.train.train_state import TrainState
from rollingq_jax.train.upstream import roll_after_epoch
from rollingq_jax.train.workdir import (
    TOKENIZER,
    absolute,
    check_free,
    check_same_run,
    check_workdir,
    claim,
    convert_io_errors,
    locked,
    read_config,
    read_summary,
    remember,
    updated,
    with_absolute_paths,
)

log = logging.getLogger(__name__)

FIRST_TRACED, LAST_TRACED = 4, 8  # calls of the step; the first compile, and fill the pipeline
# Fields of `config.model` that a model of one modality may not have.
FUSION_FIELDS = "cosine_scale fusion_layers quality_bias quality_signal quality_shuffled".split()
# Before there is a best checkpoint. One has its main metric and what it was chosen by.
NO_BEST = {"step": -1, "epoch": -1}


def improves(row: Mapping[str, Any], best: Mapping[str, Any], metric: str) -> bool:
    """Tells if a validation row is better than the best so far: of equals, the first stays."""
    if best["step"] < 0:
        return True
    return METRICS[metric].better(row[metric], best[metric])


def train_and_evaluate(
    config: Any,
    workdir: epath.PathLike,
    *,
    max_steps: int | None = None,
    interruption: Interruption | None = None,
    test: bool = True,
    quiet: bool = False,
    profile: bool = False,
    model: Any = None,
    tx: optax.GradientTransformation | None = None,
    dataset: Dataset | None = None,
    callbacks: Sequence[Callback] = (),
    initialization_timeout: float = TIMEOUT,
) -> dict[str, Any]:
    """Trains as the configuration says, resuming from what the folder holds, and tests at the end.

    Args:
      config: an `ml_collections.ConfigDict` with the fields of `default_config()`.
      workdir: the run's folder, local or gs://. The README says what is left in it.
      max_steps: stop at this step as an interruption would, with a checkpoint.
      interruption: what may stop the run, if the caller has entered one already.
      test: False stops before the test set is read; the same call with True resumes from there.
      quiet: print nothing.
      profile: write a trace of some steps into `profile` in the workdir.
      model: instead of `build_model(config.model)`: a module with the same calls and a `spec`.
        `load_run` makes the model of the configuration, and so does not read such a run unless
        both have the same parameters.
      tx: instead of the optimizer that `config.optimizer` describes.
      dataset: instead of the data that `config.data` names.
      callbacks: each is called with a step and the numbers of a row of `metrics.jsonl`, named
        `<split>/<name>`, in the first process: `lambda step, scalars: wandb.log(scalars, step)`.
      initialization_timeout: seconds that one of several processes waits for the others before the
        first step.

    Returns:
      The summary, as `summary.json` holds it; with `test` False, `{"best": {"step", "epoch",
      "accuracy"}}` on validation data, or the task's main metric in place of the accuracy, and
        there what `config.best_by` names.

    Raises:
      ConfigError, DataError, CheckpointError: what the user gave cannot be used, or differs from
        one process to another, and what was in the folder is as it was; or data or folder failed in
        the middle, and the last checkpoint is intact.
      NonFiniteError: a loss or gradient was NaN or infinite; the last checkpoint is from before.
      Interrupted: SIGINT, SIGTERM or `max_steps` ended the run early; its state is saved.

    Examples:
      >>> config.data.name, config.data.path = "arrays", "mine.npz"  # doctest: +SKIP
      >>> summary = train_and_evaluate(config, "runs/mine")  # doctest: +SKIP
    """
    with contextlib.ExitStack() as stack:
        if interruption is None:
            interruption = stack.enter_context(Interruption())
        with agreement(initialization_timeout) as hand_in:
            check_config(config)
            workdir = check_workdir(workdir)
            config = with_absolute_paths(config)
            stack.enter_context(within_memory(config))
            stack.enter_context(shown())
            if dataset is None:
                encoders = config.model.encoders
                dataset = load_dataset(config.data, seed=config.seed, encoders=encoders)
            experiment = Experiment(config, dataset, model=model, tx=tx)
            hand_in(workdir, run_facts(experiment.identity()))
        # What can be refused is refused before the folder is touched.
        experiment.prepare()
        check_free(workdir, experiment.config)
        summary = read_summary(workdir)
        if summary is not None:
            experiment.check_data(summary, f"the summary in {workdir}")
            summary = updated(workdir, summary, experiment.config, experiment.inputs)
        else:
            if config.vit_weights and not (workdir / "checkpoints").exists():
                experiment.initial_state()  # a wrong file is told while the folder is as it was
            with convert_io_errors(workdir), locked(workdir):
                claim(workdir, experiment.config)
                keep = config.checkpoint.keep
                with Checkpoints(workdir / "checkpoints", keep) as checkpoints:
                    loop = TrainLoop(
                        experiment,
                        workdir,
                        checkpoints,
                        interruption,
                        max_steps=max_steps,
                        quiet=quiet,
                        profile=profile,
                        callbacks=callbacks,
                    )
                    summary = loop.run(test)
        if test and not quiet:
            from rollingq_jax.train.report import print_summary

            print_summary(summary, workdir)
    return summary


@dataclasses.dataclass
class TrainLoop:
    """One run's loop, from the newest checkpoint in its claimed folder to the summary.

    The last fields are arguments of `train_and_evaluate`.
    """

    experiment: Experiment
    workdir: epath.Path
    checkpoints: Checkpoints
    interruption: Interruption
    max_steps: int | None
    quiet: bool
    profile: bool
    callbacks: Sequence[Callback]

    def run(self, test: bool = True) -> dict[str, Any]:
        """Trains to the last step and tests; without a test, returns the best by validation."""
        experiment, workdir, checkpoints = self.experiment, self.workdir, self.checkpoints
        check = functools.partial(experiment.check_record, workdir=workdir)
        found = checkpoints.restore_newest(experiment.abstract_state(), check)
        if found is not None:  # its data are the same, wherever they are now
            remember(workdir, experiment.config)
        state, record = found or (experiment.initial_state(self._say), {})
        if found is None and experiment.baseline.teachers:
            state = state.replace(baseline=self._train_teachers())
        with with_last_checkpoint(lambda: checkpoints.newest), convert_io_errors(workdir):
            best, step = self.train(state, record)
            checkpoints.wait()
            self.interruption.unsaved = False
            if not test:
                return {"best": best}
            plain = None
            if experiment.config.plain_twin and experiment.roll_schedule is not None:
                self._say("The same without rotations, to compare with ...")
                config = copy.deepcopy(experiment.config)
                config.rolling.enabled, config.plain_twin = False, False
                plain = self._train_in(workdir / "plain", config)
            from rollingq_jax.train.report import finish_run

            return finish_run(experiment, workdir, checkpoints, best, step, self.callbacks, plain)

    def _say(self, text: str) -> None:
        if not self.quiet and jax.process_index() == 0:
            print(text)

    def _train_teachers(self) -> dict[str, Any]:
        """The encoders of a run of each modality alone, which lies in `teachers/<m>` of the run."""
        encoders: dict[str, Any] = {}
        for m in self.experiment.model.spec.modalities:
            folder = self.workdir / "teachers" / m
            self._say(f"The teacher of {m} ...")
            self._train_in(folder, alone(self.experiment.config, m))
            encoders |= encoder_part(load_run(folder).params, m)
        return encoders

    def _train_in(self, folder: epath.Path, config: Any) -> dict[str, Any]:
        """Another run on the same data, as far as before its test; returns its best checkpoint.

        Interrupted, the run that it belongs to resumes it.
        """
        found = train_and_evaluate(
            config,
            folder,
            interruption=self.interruption,
            test=False,
            quiet=True,
            dataset=self.experiment.dataset,
            **self.experiment.given,
        )
        return found["best"]

    def train(self, state: TrainState, record: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        """Steps from the given state to the last; returns the best checkpoint, and the last step.

        Args:
          state: on one device.
          record: of the checkpoint that it comes from; empty at step 0.
        """
        experiment, start_step = self.experiment, int(state.step)
        config, parallel = experiment.config, experiment.parallel
        self.best = {**NO_BEST, **record.get("best", {})}
        validate_first = record.get("validate", False)
        self.writer = MetricsWriter(
            self.workdir, start_step, validate=validate_first, callbacks=self.callbacks
        )
        self.saves = CheckpointSchedule(
            config.checkpoint.every_steps, config.checkpoint.every_minutes, config.log_every
        )
        self.metrics = MetricAccumulator(
            state.params,
            record,
            get=parallel.get,
            epoch_steps=experiment.epoch_steps,
            learning_rate=experiment.learning_rate,
            skip_nonfinite=config.nonfinite == "skip",
        )
        with contextlib.ExitStack() as stack:
            self.console = stack.enter_context(Console(experiment, state, quiet=self.quiet))
            state = parallel.put_state(state)
            if validate_first:
                self.validate(state)
            batches = experiment.batches(start_step, experiment.total_steps)
            stack.enter_context(contextlib.closing(batches))
            train_step = parallel.train_step
            if self.profile:
                train_step = stack.enter_context(profiled(train_step, self.workdir / "profile"))
            last = self._train_steps(start_step, state, train_step, batches)
        return self.best, last

    def _train_steps(
        self, start_step: int, state: TrainState, train_step: Callable[..., Any], batches: Any
    ) -> int:
        """The loop itself; returns the last step that was done."""
        experiment, config = self.experiment, self.experiment.config
        epoch_steps, total_steps = experiment.epoch_steps, experiment.total_steps
        batch = None
        for step in range(start_step + 1, total_steps + 1):
            # Asked before a step, so that a run resumed after its last epoch ends here too.
            if self.is_exhausted(step - 1):
                self.console.note(
                    f"epoch {(step - 1) // epoch_steps}: validation was best in epoch "
                    f"{self.best['epoch']} ({config.best_by}), config.patience is "
                    f"{config.patience}: training ends"
                )
                return step - 1
            if experiment.blends_before(step):
                state = self._blend(state)
            epoch_ends = step % epoch_steps == 0
            state, sums, roll = train_step(state, batch or self._next_batch(batches))
            self.interruption.unsaved = True
            self.metrics.add(step, sums, roll if experiment.checks_after(step) else None)
            self.console.advance()
            # The next batch goes to the devices while they are at this one; at an epoch's end,
            # which may be the last, there may be none.
            batch = None if epoch_ends else self._next_batch(batches)
            if epoch_ends or step % config.log_every == 0:
                self.report(self.metrics.rows(step))
                self.checkpoints.check()
            if epoch_ends:
                if experiment.rolls_after_epoch:
                    state = self._roll_between_epochs(state)
                self.validate(state)
            # Asked after every step, the last too: several processes agree in these calls.
            stop = self.interruption.reached(step) or step == self.max_steps
            if stop and step < total_steps:
                self.stop(step, state)
            if not epoch_ends and self.saves.is_due(step):  # `validate` sees to an epoch's end
                self.save(state)
        return total_steps

    def is_exhausted(self, step: int) -> bool:
        """Tells if training ends after this step, before the last: `config.patience` is used up.

        It follows from the step and the best checkpoint so far, and so is the same in a
        continuation.
        """
        patience, epoch_steps = self.experiment.config.patience, self.experiment.epoch_steps
        if not patience or step == 0 or step % epoch_steps:
            return False
        return step // epoch_steps - self.best["epoch"] >= patience

    def report(self, rows: list[Row]) -> None:
        """Writes and shows rows."""
        self.writer.write(rows)
        self.console.show(rows)

    def save(self, state: TrainState, *, validate: bool = False) -> None:
        """A checkpoint, and what has to be on disk before it.

        `validate` marks one at an epoch's end whose validation is still to come.
        """
        # Rows first: a run that resumes cuts those of later steps, and does not make earlier ones.
        rows, pending = self.metrics.pending()
        self.report(rows)
        record = {"best": self.best, **self.experiment.identity(), "validate": validate, **pending}
        self.checkpoints.save(self.experiment.parallel.get(state), record)
        self.saves.mark_saved()

    def stop(self, step: int, state: TrainState, *, validate: bool = False) -> NoReturn:
        """Ends the run early, once its state is on the disk."""
        self.save(state, validate=validate)
        self.checkpoints.wait()
        raise Interrupted(step) from None

    def validate(self, state: TrainState) -> None:
        """An epoch's end: validation, its row, the picture of a rotation, a checkpoint if due.

        Raises:
          Interrupted: the run shall stop; its state is saved, its validation is still to come.
        """
        experiment = self.experiment
        one = experiment.parallel.get(state)
        step = int(one.step)
        epoch = step // experiment.epoch_steps
        # A pass over the data takes long. Asked to stop in it, the run saves, and validates when it
        # resumes.
        try:
            means, columns = experiment.evaluate(
                state, experiment.selection_split, self.interruption.check
            )
        except Interrupted:
            self.stop(step, state, validate=True)
        row: Row = {"step": step, "epoch": epoch, "split": "valid"}
        if experiment.selection_split != "valid":
            row["evaluated_on"] = experiment.selection_split
        row |= means
        if one.rolling is not None:
            row["rotations"] = int(np.sum(one.rolling.count))
        if experiment.baseline.blend_every:
            heads = (*experiment.model.spec.modalities, "joint")
            weights = np.asarray(one.baseline).tolist()
            row |= {f"loss_weight/{m}": w for m, w in zip(heads, weights, strict=True)}
        row |= self.metrics.timing()
        if one.rolling is not None and self._used_up(one.rolling.count, means):
            row["rotations_used_up"] = True
        self.report([row])
        rotation = self.metrics.pop_last_rotation()
        if rotation is not None and jax.process_index() == 0:
            save_snapshot(self.workdir, step, epoch, rotation, columns)
        # Before the checkpoint, whose record says which one is the best and has to stay.
        metric = experiment.config.best_by
        improved = improves(means, self.best, metric)
        if improved:
            names = dict.fromkeys((experiment.task.main, metric))
            self.best = {"step": step, "epoch": epoch} | {name: means[name] for name in names}
        last = step == experiment.total_steps or self.is_exhausted(step)
        every = experiment.config.checkpoint.every_epochs
        due = epoch % every == 0 or self.saves.is_due(step)
        if improved or last or due:
            self.save(state)

    def _blend(self, state: TrainState) -> TrainState:
        """G-Blending's weights for the next epochs, from copies of the state.

        Raises:
          Interrupted: the run shall stop; its state is saved, and the weights are still to come.
        """
        experiment, check = self.experiment, self.interruption.check
        parallel, count = experiment.parallel_without_rolls, len(experiment.model.spec.modalities)
        step = int(experiment.parallel.get(state).step)
        num_steps = experiment.baseline.blend_every * experiment.epoch_steps
        last = min(step + num_steps, experiment.total_steps)

        def weighed(state: TrainState, weights: jax.Array) -> TrainState:
            one = experiment.parallel.get(state).replace(baseline=weights)
            return parallel.put_state(one)

        def train_alone(state: TrainState, head: int) -> TrainState:
            # A step takes its state's memory, and this one is needed again.
            state = jax.tree.map(jnp.copy, weighed(state, jnp.eye(count + 1)[head]))
            with contextlib.closing(experiment.batches(step, last)) as batches:
                for batch in batches:
                    check()
                    state, _, _ = parallel.train_step(state, parallel.put_batch(batch))
            return state

        def losses(state: TrainState) -> tuple[jax.Array, jax.Array]:
            heads = [*(f"probe_loss/{m}" for m in experiment.model.spec.modalities), "loss"]
            rows = [experiment.evaluate(state, split, check)[0] for split in ("train", "valid")]
            train, valid = jnp.asarray([[row[name] for name in heads] for row in rows])
            return train, valid

        try:
            weights = weigh_heads(state, train_alone, losses)
        except Interrupted:
            if step:
                self.stop(step, state)
            raise Interrupted(step) from None
        return weighed(state, weights)

    def _next_batch(self, batches: Iterator[Any]) -> dict[str, jax.Array]:
        """The next batch, on its way to the devices; waiting for it is counted."""
        with self.metrics.waiting():
            batch = next(batches)
        return self.experiment.parallel.put_batch(batch)

    def _roll_between_epochs(self, state: TrainState) -> TrainState:
        """Upstream's roll, which is made between two epochs and not in a step."""
        parallel = self.experiment.parallel
        one, roll = roll_after_epoch(self.experiment, parallel.get(state))
        self.report(self.metrics.roll_rows(int(one.step), jax.device_get(roll)))
        return parallel.put_state(one)

    def _used_up(self, count: jax.Array, means: Mapping[str, float]) -> bool:
        """Tells if every head has done all its rotations and imbalance stands above beta."""
        rolling = self.experiment.config.rolling
        if self.experiment.roll_schedule is None or not rolling.max_rotations:
            return False  # nothing rolls, there is no limit, or 0 was asked for
        spent = bool(np.all(np.asarray(count) >= rolling.max_rotations))
        return spent and means.get("imbalance", 0.0) > rolling.beta


def alone(config: Any, modality: str) -> Any:
    """The configuration of the model that sees one modality, which no method helps."""
    config = copy.deepcopy(config)
    config.rolling.enabled, config.plain_twin, config.baseline.name = False, False, ""
    plain = {name: getattr(ModelSpec, name) for name in FUSION_FIELDS}
    with config.unlocked():  # a complete configuration lacks the fields that are None
        config.model.update(plain | {"fusion": "unimodal", "modality": modality})
    return config


@dataclasses.dataclass(frozen=True)
class LoadedRun:
    """A run's model with what it has learned, and the inputs that it takes.

    Attributes:
      model: from `build_model`.
      params: of the best checkpoint by validation; their average, where the run has one.
      rotation: `[H, d_h, d_h]`, or None for a fusion without a class query.
      config: the run's configuration, complete.
      inputs: what the model has to know of its data: preprocessing, and a class for each output.
      step: of the checkpoint.
      quality: sums behind the norm bias's statistics; None for a model without one.
      batch_stats: running averages of resnet18 encoders; None for a model without one.
    """

    model: Any
    params: Any
    rotation: jax.Array | None
    config: ConfigDict
    inputs: InputSpec
    step: int
    quality: QualityState | None = None
    batch_stats: Any = None

    @property
    def variables(self) -> dict[str, Any]:
        """The model's variables, as `model.apply` takes them."""
        return model_variables(self.params, self.quality, self.batch_stats)

    @functools.cached_property
    def task(self) -> Task:
        """What was learned."""
        return task_of(self.inputs)

    @functools.cached_property
    def dataset(self) -> Dataset:
        """The data that the run was trained on, read when it is first asked for.

        Raises:
          ConfigError, DataError: they are not there any more, or cannot be used.
        """
        config = self.config
        return load_dataset(config.data, seed=config.seed, encoders=config.model.encoders)


def load_run(workdir: epath.PathLike) -> LoadedRun:
    """Reads back the best checkpoint of a run; its data need not be there.

    Args:
      workdir: the run's folder.

    Raises:
      CheckpointError: there is no run or no intact checkpoint in the folder, or it was written by a
        version that did not record how the data became the model's input.
      ConfigError: its configuration cannot be used any more.

    Examples:
      >>> run = load_run("runs/demo")  # doctest: +SKIP
      >>> query = run.model.apply(
      ...     run.variables, run.rotation, method="class_query"
      ... )  # doctest: +SKIP
    """
    allowed = (
        f"workdir is {str(workdir)!r}; allowed: the folder of a run, with config.json and "
        "checkpoints"
    )
    try:
        path = absolute(workdir)
        found = (path / "config.json").exists() and (path / "checkpoints").exists()
    except Exception as error:  # of the system, or whatever a client of gs:// raises
        raise CheckpointError(f"{allowed} ({said(error)})") from None
    stored = read_config(path) if found else None
    if stored is None:
        raise CheckpointError(allowed)
    config = from_json(stored)
    if (path / TOKENIZER).exists():
        config.data.tokenizer = str(path / TOKENIZER)
    check_config(config)
    model = build_model(config.model)
    summary = read_summary(path) or {}

    def like(record: Mapping[str, Any]) -> Any:
        check_same_run(config, from_json(record["config"]), f"a checkpoint in {path}")
        return abstract_params(model, recorded_inputs(record, summary, path))

    with Checkpoints(path / "checkpoints", read_only=True) as checkpoints:
        newest = checkpoints.restore_newest_params(like)
        if newest is None:
            raise CheckpointError(f"workdir {path} holds no checkpoint yet")
        learned, record = newest
        # The summary knows best: a run whose best was damaged has tested another checkpoint.
        best = (summary or record)["best"]["step"]
        if best not in (-1, learned.step):
            learned, record = checkpoints.restore_params(best, like)
    inputs = recorded_inputs(record, summary, path).with_outputs(config.model.num_classes)
    inputs = inputs.with_tokenizer(str(path / TOKENIZER))
    return LoadedRun(model=model, config=config, inputs=inputs, **learned._asdict())


def recorded_inputs(
    record: Mapping[str, Any], summary: Mapping[str, Any], workdir: epath.Path
) -> InputSpec:
    """The recorded way from the run's data to its model's input: of a checkpoint, or the summary.

    Raises:
      CheckpointError: neither says so.
      DataError: what is recorded cannot be read.
    """
    found = record.get("inputs") or summary.get("inputs")
    if found is None:
        raise CheckpointError(
            f"workdir {workdir} was written by an older version, which did not record how the data "
            "became the model's input; allowed: such a run after `python train.py --config_json "
            f"{workdir / 'config.json'} --workdir {workdir}` with its data in place, which adds "
            "that and trains nothing anew"
        )
    return InputSpec.from_json(found)


def abstract_params(model: Any, inputs: InputSpec) -> Any:
    """Shapes and dtypes of a model's parameters.

    Raises:
      CheckpointError: the model reads a modality of which the inputs do not tell.
    """
    batch = {}
    for m in model.spec.modalities:
        if m not in inputs.modalities:
            raise CheckpointError(
                f"modality {m!r} of the model is not recorded; recorded: "
                f"{', '.join(inputs.modalities)}"
            )
        info = inputs.modalities[m].info
        batch[m] = jax.ShapeDtypeStruct((1, *info.shape), np.dtype(info.dtype))
    return jax.eval_shape(model.init, jax.random.key(0), batch)["params"]


@contextlib.contextmanager
def within_memory(config: Any) -> Iterator[None]:
    """Turns an exception of XLA or Python, where memory is exhausted, into one line.

    Raises:
      ConfigError: names the fields that decide how much memory a run takes.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ConfigError(
            f"memory is exhausted with config.batch_size {config.batch_size} and config.model.dim "
            f"{config.model.dim}; allowed: what fits: a smaller batch_size, model.dim or "
            "model.depth, more micro_batches, model.remat=True, data.prefetch=0, or more devices "
            f"({reason[:160] or type(error).__name__})"
        ) from error


@contextlib.contextmanager
def profiled(train_step: Callable[..., Any], folder: epath.Path) -> Iterator[Callable[..., Any]]:
    """The step, of which calls 4 to 8 are traced, with all that happens between them.

    A run that ends in between leaves the trace up to there; one that ends before, a warning.
    The folder gets what `jax.profiler` writes: XProf reads it, and `perfetto_trace.json.gz` goes to
    ui.perfetto.dev. Each process traces its own devices.
    """
    calls, tracing = 0, False
    remote = "://" in os.fspath(folder)
    local = tempfile.mkdtemp() if remote else os.fspath(folder)

    def stop() -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        if remote:  # the profiler writes only local files
            copy_tree(local, folder)

    def traced(*args: Any) -> Any:
        nonlocal calls, tracing
        calls += 1
        if calls == FIRST_TRACED:
            jax.block_until_ready(args)
            jax.profiler.start_trace(local, create_perfetto_trace=True)
            tracing = True
        results = train_step(*args)
        if calls == LAST_TRACED:
            jax.block_until_ready(results)
            stop()
        return results

    try:
        yield traced
    finally:
        if tracing:
            stop()
        elif calls < FIRST_TRACED:
            log.warning("no profile: %d steps were made and the trace begins with step 4", calls)


def copy_tree(source: str, target: epath.Path) -> None:
    """Copies a local folder's files into a folder that may be on gs://."""
    for root, _, names in os.walk(source):
        to = target / os.path.relpath(root, source)
        to.mkdir(parents=True, exist_ok=True)
        for name in names:
            epath.Path(os.path.join(root, name)).copy(to / name, overwrite=True)
