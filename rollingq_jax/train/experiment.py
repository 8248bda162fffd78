"""One experiment: model, optimizer, data, steps over all devices and evaluation, from a config."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax

from rollingq_jax.analysis.metrics import Predictions, check_answers
from rollingq_jax.analysis.tasks import MAIN, Task, are_sentiments, task_of
from rollingq_jax.baselines.build import build_baseline
from rollingq_jax.baselines.hooks import EXAMPLE_NUMBER
from rollingq_jax.data.cache import cache_root
from rollingq_jax.data.dataset import (
    REGRESSION,
    SINGLE_LABEL,
    Dataset,
    fingerprint,
    first_difference,
    infer_model,
    labels_of,
)
from rollingq_jax.data.pipeline import collate, eval_batches, steps_per_epoch, train_batches
from rollingq_jax.data.preprocessing import input_spec
from rollingq_jax.errors import CheckpointError, ConfigError, DataError
from rollingq_jax.models import build_model
from rollingq_jax.models.spec import DYNAMIC_FUSIONS, INT32_MAX
from rollingq_jax.rolling import rolling_query
from rollingq_jax.train.config import BALANCED, MAIN_METRIC, default_config, upgraded, with_defaults
from rollingq_jax.train.parallel import lay_out
from rollingq_jax.train.steps import (
    RollSchedule,
    add_sums,
    cross_entropy,
    eval_step,
    finish,
    supervised_loss,
    train_step,
    with_baseline,
)
from rollingq_jax.train.train_state import (
    TrainState,
    create_state,
    learning_rate_schedule,
    make_optimizer,
)
from rollingq_jax.train.upstream import check_upstream_choices, with_last_batch_scores
from rollingq_jax.train.workdir import check_same_run

Batch = dict[str, np.ndarray]
Columns = dict[str, np.ndarray]
POSITIONS = ("sequence", "tokens")  # kinds whose mask may be [B, L]


class Experiment:
    """The parts of a run, which stay the same from the first step to the summary.

    Attributes:
      config: the configuration, `config.model` completed from the data.
      dataset: the data.
      model: from `build_model`.
      tx: the optimizer, with the gradient transformation of a method of comparison.
      learning_rate: of each step; None where `tx` was given, which has its own.
      roller: from `rolling_query`.
      roll_schedule: when to observe and to roll; None where nothing rolls.
      baseline: the method of comparison.
      epoch_steps, total_steps: lengths in steps.
      given: the `model` and `tx` that came from outside, or None.

    Args:
      config: checked, see `check_config`.
      dataset: the data.
      model: instead of `build_model(config.model)`; a module with the same calls and a `spec`.
      tx: instead of the optimizer that `config.optimizer` describes.

    Raises:
      ConfigError: a field of `config.model` is not allowed, or a size does not fit the data or the
        devices.
      DataError: the data cannot be read.
    """

    def __init__(
        self,
        config: Any,
        dataset: Dataset,
        *,
        model: Any = None,
        tx: optax.GradientTransformation | None = None,
    ) -> None:
        self.config = config = resolve_config(config, dataset)
        self.dataset, self.given = dataset, {"model": model, "tx": tx}
        self.model = build_model(config.model) if model is None else model
        spec, compat = self.model.spec, config.upstream_compat
        check_upstream_choices(compat, spec)
        examples = len(dataset.splits["train"])
        if config.batch_size > examples:
            raise ConfigError(
                f"config.batch_size is {config.batch_size}; "
                f"allowed: at most the number of training examples, which is {examples}"
            )
        self.epoch_steps = steps_per_epoch(examples, config.batch_size)
        self.total_steps = self.epoch_steps * config.epochs
        if self.total_steps > INT32_MAX:
            raise ConfigError(
                f"config.epochs is {config.epochs}; allowed with {self.epoch_steps} steps an "
                f"epoch: at most {INT32_MAX // self.epoch_steps:,}"
            )
        self.learning_rate: optax.Schedule | None = None
        if tx is None:
            self.learning_rate = learning_rate_schedule(
                config.optimizer.learning_rate,
                self.epoch_steps,
                config.epochs,
                warmup_epochs=config.optimizer.warmup_epochs,
                extra_step=compat.extra_schedule_step,
                clip=not compat.unclipped_cosine,
            )
            tx = make_optimizer(config.optimizer, self.learning_rate)
        self._check_task()
        self.baseline = build_baseline(
            config.baseline, spec, self.epoch_steps, self.total_steps, dataset.task
        )
        if self.baseline.teachers and model is not None:
            raise ConfigError(
                f"config.baseline.name is {config.baseline.name!r}, whose teachers are built from "
                "config.model, and a model is given; allowed: another name, or no model"
            )
        if self.baseline.blend_every and self.selection_split != "valid":
            raise ConfigError(
                f"config.baseline.gblend_every is {self.baseline.blend_every}, which needs "
                "validation data, and there are none; allowed: 0"
            )
        self._check_micro_batches()
        # The method of comparison comes first: it sees gradients, not clipped or scaled ones.
        transform = self.baseline.transform
        self.tx = tx if transform is None else optax.chain(transform, tx)
        self._make_rolling()

    @functools.cached_property
    def task(self) -> Task:
        """What is learned: losses, answers and scores."""
        return task_of(self.inputs, self.config.regression_loss)

    def _check_task(self) -> None:
        """What the task gives no meaning is not asked for."""
        config, task = self.config, self.dataset.task
        allowed = ("loss", *self.task.shown)
        if config.best_by not in allowed:
            raise ConfigError(
                f"config.best_by is {config.best_by!r}; allowed with the task {task}: "
                f"{MAIN_METRIC}, {', '.join(allowed)}"
            )
        if task == REGRESSION and config.best_by.startswith("acc"):
            if not are_sentiments(labels_of(self.dataset.splits[self.selection_split])):
                raise ConfigError(
                    f"config.best_by is {config.best_by!r}, which is of one value in -3 .. 3; "
                    f"allowed with these labels: {MAIN_METRIC}, loss, mae, correlation, ccc"
                )
        of_others = [] if task == REGRESSION else ["regression_loss"]
        of_others += [] if task == SINGLE_LABEL else ["class_weights", "label_smoothing"]
        for field in of_others:
            plain = default_config()[field]
            if config[field] != plain:
                raise ConfigError(
                    f"config.{field} is {config[field]!r}, and the data's task is {task}; "
                    f"allowed there: {plain!r}"
                )
        if task == SINGLE_LABEL:
            return
        spec = self.model.spec
        if spec.fusion in (*DYNAMIC_FUSIONS, "mmcosine"):
            raise ConfigError(
                f"model.fusion is {spec.fusion!r}, which reads probabilities of classes, and the "
                f"data's task is {task}; allowed there: the others"
            )
        if spec.quality_bias and spec.quality_signal == "energy":
            raise ConfigError(
                f"model.quality_signal is 'energy', of class probabilities, and the data's task is "
                f"{task}; allowed there: 'norm'"
            )

    def _check_micro_batches(self) -> None:
        config, rows = self.config, self.config.batch_size // jax.device_count()
        if config.micro_batches == 1:
            return
        field = f"config.micro_batches is {config.micro_batches}; allowed"
        if self.baseline.whole_batch:
            raise ConfigError(
                f"{field} with baseline.name {config.baseline.name!r}: 1, since it compares the "
                "modalities over the whole batch"
            )
        if self.model.spec.quality_shuffled:
            raise ConfigError(
                f"{field} with model.quality_shuffled True: 1, since a sample gets the bias of "
                "another one in the batch"
            )
        if rows % config.micro_batches:
            raise ConfigError(
                f"{field}: a divisor of the examples of a step on each device, which are {rows}"
            )

    @functools.cached_property
    def class_weights(self) -> jax.Array | None:
        """`[C]` float32, of an example in the loss by its label; None where all count alike.

        "balanced" is N / (C n_c) for the n_c of N training examples of class c, and 1 for a class
        that has none.

        Raises:
          ConfigError: there are not as many as classes.
        """
        given, classes = self.config.class_weights, self.model.spec.num_classes
        if not given:
            return None
        if tuple(given) == BALANCED:
            counts = np.bincount(labels_of(self.dataset.splits["train"]), minlength=classes)
            given = np.where(counts > 0, counts.sum() / (classes * np.maximum(counts, 1)), 1.0)
        if len(given) != classes:
            raise ConfigError(
                f"config.class_weights has {len(given)} numbers; allowed: as many as there are "
                f"classes, which is {classes}, or balanced"
            )
        return jax.numpy.asarray(given, jax.numpy.float32)

    def _make_rolling(self) -> None:
        rolling, compat, spec = self.config.rolling, self.config.upstream_compat, self.model.spec
        self.roller = rolling_query(
            rolling.beta,
            rolling.rho,
            rolling.max_rotations,
            rolling.method,
            rolling.joint,
            layers=spec.fusion_layers,
        )
        if compat.last_batch_air:
            self.roller = with_last_batch_scores(self.roller)
        self.roll_schedule = None
        if rolling.enabled and spec.uses_class_query and len(spec.modalities) > 1:
            # Upstream's own roll is between epochs, and reads the scores of the last batch in any
            # case: then every step observes.
            every_step = compat.statistics_pass and compat.last_batch_air
            self.roll_schedule = RollSchedule.from_fraction(
                rolling.check_every or self.epoch_steps,
                1.0 if every_step else rolling.window,
                in_step=not compat.statistics_pass,
            )

    @functools.cached_property
    def inputs(self) -> Any:
        """Preprocessing and classes, which inference needs without the data."""
        return input_spec(self.dataset)

    @functools.cached_property
    def signature(self) -> dict[str, Any]:
        """Of the data, so that no run resumes with others."""
        return fingerprint(self.dataset)

    @functools.cached_property
    def parallel(self) -> Any:
        """The steps over all devices.

        Raises:
          ConfigError: the batch or the mesh does not fit the devices, or a rule the state.
        """
        return self._lay_out(self.roll_schedule)

    @functools.cached_property
    def parallel_without_rolls(self) -> Any:
        """The same steps, which leave R as it is: for trainings that only measure something."""
        return self.parallel if self.roll_schedule is None else self._lay_out(None)

    def _lay_out(self, schedule: RollSchedule | None) -> Any:
        smoothing, loss = self.config.label_smoothing, self.task.loss
        if smoothing:
            loss = functools.partial(cross_entropy, label_smoothing=smoothing)
        loss_fn = functools.partial(supervised_loss, loss=loss)
        step = functools.partial(
            train_step,
            model=self.model,
            tx=self.tx,
            roller=self.roller,
            schedule=schedule,
            loss_fn=with_baseline(loss_fn, self.baseline, self.task.loss),
            task=self.task,
            skip_nonfinite=self.config.nonfinite == "skip",
            ema_decay=self.config.optimizer.ema_decay,
            class_weights=self.class_weights,
            micro_batches=self.config.micro_batches,
        )
        evaluate = functools.partial(eval_step, model=self.model, task=self.task)
        return lay_out(step, evaluate, self.config, self._shapes)

    def prepare(self) -> None:
        """Lays the steps out over the devices and reads what tells the data from others.

        Raises:
          ConfigError: as `parallel`.
          DataError: an example cannot be read.
        """
        _ = self.parallel, self.inputs, self.signature

    @property
    def rolls_after_epoch(self) -> bool:
        """True if the trigger is checked between epochs, as upstream does, and not in the step."""
        return self.roll_schedule is not None and not self.roll_schedule.in_step

    @property
    def selection_split(self) -> str:
        """The split that chooses the best checkpoint."""
        return "valid" if "valid" in self.dataset.splits else "train"

    def checks_after(self, step: int) -> bool:
        """Tells if the training step that ended with `step` updates checked the trigger."""
        return self.roll_schedule is not None and bool(self.roll_schedule.is_due(step - 1))

    def blends_before(self, step: int) -> bool:
        """Tells if G-Blending's weights are made anew before the `step`-th update."""
        every = self.baseline.blend_every * self.epoch_steps
        return bool(every) and (step - 1) % every == 0

    def initial_state(self, report: Callable[[str], None] = lambda _: None) -> TrainState:
        """The state at step 0, on one device; encoders start from `config.vit_weights` if set:
        patch encoders from a ViT, those of kind resnet18 from a ResNet-18.

        `report` is told which tensors of that file were used.

        Raises:
          ConfigError: the file of pretrained weights cannot be used.
        """
        state = self._drawn_state()
        if not self.config.vit_weights:
            return state
        from rollingq_jax.convert import fetch_weights, is_resnet, load_resnet, load_vit

        folder = cache_root(self.config.data.cache_dir) / "weights"
        path = fetch_weights(self.config.vit_weights, folder)
        batch_stats = state.batch_stats
        if is_resnet(path):
            params, batch_stats, used = load_resnet(path, state.params, batch_stats or {})
        else:
            params, used = load_vit(path, state.params)
        report(f"{self.config.vit_weights}: {used}")
        # An optimizer that keeps the parameters, and their average, begin with the loaded ones. The
        # average is a copy, since a step takes the memory of its state.
        ema = None if state.ema is None else jax.tree.map(jax.numpy.copy, params)
        return state.replace(
            params=params, opt_state=self.tx.init(params), ema=ema, batch_stats=batch_stats
        )

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of every state of the run, laid out as a checkpoint is read."""
        return self.parallel.like(self._shapes())

    def _shapes(self) -> TrainState:
        return jax.eval_shape(self._drawn_state)

    def _drawn_state(self) -> TrainState:
        return create_state(
            self.model,
            self.tx,
            self.roller,
            seed=self.config.seed,
            batch=example_batch(self.dataset),
            baseline=lambda params: self.baseline.init(params, len(self.dataset.splits["train"])),
            ema=self.config.optimizer.ema_decay > 0,
        )

    def batches(self, start_step: int, num_steps: int) -> "CheckedBatches":
        """Training batches of the steps `start_step .. num_steps - 1`, this process's rows."""
        return self._read(
            train_batches,
            "train",
            transforms=self.dataset.train_transforms,
            start_step=start_step,
            num_steps=num_steps,
            number_as=EXAMPLE_NUMBER if self.baseline.example_numbers else "",
        )

    def _read(self, read: Callable[..., Any], split: str, **options: Any) -> "CheckedBatches":
        processes = jax.process_count()
        batches = read(
            self.dataset.splits[split],
            batch_size=self.config.batch_size,
            seed=self.config.seed,
            process_index=jax.process_index(),
            process_count=processes,
            prefetch=self.config.data.prefetch,
            **options,
        )
        rows = self.config.batch_size // processes
        return CheckedBatches(batches, self.dataset, self.model.spec.modalities, rows)

    def evaluate(
        self, state: TrainState, split: str, check: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, Any], Columns]:
        """Evaluates a state on every example of a split; warns of answers that are not finite.

        Args:
          state: as `parallel.put_state` lays it out.
          split: one of the data's.
          check: called before each batch; may end the pass by raising.

        Returns:
          The row for `metrics.jsonl`, and columns `[N, ...]`: `probabilities`, `label`, `present`
          `[N, M]`, `quality_*` and, with a class query, `attention_share`, `uniform_share` and
          `mean_keys/<m>`.

        Raises:
          NonFiniteError: the logits of every example are NaN or infinite.
        """
        batches = self._read(eval_batches, split, transforms=self.dataset.eval_transforms)
        sums: dict[str, Any] = {}
        columns: dict[str, list[np.ndarray]] = {}
        for batch in batches:
            check()
            placed = self.parallel.put_batch(batch)
            batch_sums, examples = self.parallel.eval_step(state, placed)
            batch_sums = self.parallel.get(batch_sums)
            sums = add_sums(sums, {name: np.asarray(v) for name, v in batch_sums.items()})
            # Back from the devices: with several processes, this one has read only its own rows.
            given = {
                name: placed[name]
                for name in batch
                if name in ("label", "example_mask") or name.startswith("quality_")
            }
            rows = self.parallel.get_rows(examples | given)
            real = rows.pop("example_mask").astype(bool)  # padding rows are left out
            for name, value in rows.items():
                columns.setdefault(name, []).append(np.asarray(value)[real])
        row = finish(sums)
        parts = {name: np.concatenate(values) for name, values in columns.items()}
        row |= self._split_scores(row, parts)
        quiet = jax.process_index() > 0
        weight = int(sums["weight"])
        check_answers(row.get("nonfinite", 0), weight, f"split {split!r}", quiet=quiet)
        return row, parts

    def _split_scores(self, row: Mapping[str, Any], parts: Columns) -> dict[str, float]:
        """Metrics that are no means over examples, of the model and, of the main one, of probes.

        The probes' answers are taken out of `parts`; those of examples that have the modality
        count.
        """
        task, wanted = self.task, {self.task.main, self.config.best_by, *self.task.curves}
        found: dict[str, float] = {}
        if wanted - row.keys():
            answers = Predictions(parts["probabilities"], parts["label"], {}, {})
            scores = task.scores(answers, self.model.spec.num_classes, ())
            found |= {n: v for n, v in scores.items() if n in wanted - row.keys()}
        for place, m in enumerate(self.model.spec.modalities):
            if (probe := parts.pop(f"probe/{m}", None)) is not None:
                has = parts["present"][:, place]
                answers = Predictions(probe[has], parts["label"][has], {}, {})
                found[f"probe_{task.main}/{m}"] = task.main_score(answers)
        return found

    def identity(self) -> dict[str, Any]:
        """The configuration and the data of the run, as JSON, for checkpoints and the summary.

        `inputs` is for inference without the data; the rest tells the run from others.
        """
        examples = {split: len(source) for split, source in self.dataset.splits.items()}
        return {
            "config": self.config.to_dict(),
            "examples": examples,
            "signature": self.signature,
            "inputs": self.inputs.to_json(),
        }

    def check_record(self, record: Mapping[str, Any], workdir: Any) -> None:
        """Checks that a checkpoint in the folder is this run's.

        Raises:
          CheckpointError: its configuration or its data are others; says in which fields.
        """
        theirs = with_defaults(upgraded(record["config"]), default_config().to_dict())
        check_same_run(self.config, theirs, f"a checkpoint in {workdir}")
        self.check_data(record, f"the checkpoint in {workdir}")

    def check_data(self, record: Mapping[str, Any], where: str) -> None:
        """A checkpoint or summary was made with this run's data.

        Raises:
          CheckpointError: it was made with others; says where they differ.
        """
        for split, before in record.get("examples", {}).items():
            count = len(self.dataset.splits.get(split, ()))
            if before != count:
                raise CheckpointError(
                    f"the data's split {split!r} has {count} examples and had {before} when "
                    f"{where} was saved; allowed: the same data"
                )
        different = first_difference(self.signature, record.get("signature", self.signature))
        if different:
            raise CheckpointError(
                f"the data's {different} has other values than when {where} was saved; "
                "allowed: the same data, or another workdir"
            )


def example_batch(dataset: Dataset, size: int = 2) -> dict[str, np.ndarray]:
    """A small batch of the training data, for shapes."""
    source = dataset.splits["train"]
    example = source[0]
    for transform in dataset.eval_transforms:
        example = transform.map(example)
    return collate([example] * size)


def resolve_config(config: Any, dataset: Dataset) -> Any:
    """A copy of the configuration in which `config.model` is complete, as the data have it, and
    `config.best_by` names a metric.

    Raises:
      ConfigError: `config.model` does not fit the data.
    """
    resolved = copy.deepcopy(config)
    given = resolved.model.to_dict()
    with resolved.unlocked():
        resolved.model = infer_model(dataset, given)
    if resolved.best_by == MAIN_METRIC:
        resolved.best_by = MAIN[dataset.task]
    return resolved


class CheckedBatches:
    """Iterates over batches of `rows` examples with the model's modalities, and checks them.

    The first batch is checked whole, the others against the first; labels and token ids are checked
    in each, since a wrong one would pass as NaN or as another class.

    Raises:
      DataError: a file cannot be read any more, or a batch is not as the data set says; names the
        field, what came and what was expected.
    """

    def __init__(
        self, batches: Iterator[Batch], dataset: Dataset, modalities: tuple[str, ...], rows: int
    ) -> None:
        self._batches, self._dataset = batches, dataset
        self._modalities, self._rows = modalities, rows
        self._limits: dict[str, tuple[int, str]] = {}  # of integers, and what sets it
        if dataset.task == SINGLE_LABEL:
            self._limits["label"] = dataset.num_classes, f"{dataset.num_classes} classes"
        for m in modalities:
            size = dataset.modalities[m].vocab_size
            if size is not None:
                self._limits[m] = size, f"vocab_size {size}"
        self._first: dict[str, str] = {}

    def __iter__(self) -> "CheckedBatches":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except OSError as error:
            name = "" if error.filename is None else f"{error.filename}: "
            raise DataError(f"data: {name}{error.strerror or error}") from error
        forms = {name: f"{value.dtype}{list(value.shape)}" for name, value in batch.items()}
        if not self._first:
            check_batch(batch, self._dataset, self._modalities, self._rows)
            self._first = forms
        elif forms != self._first:
            odd = next(n for n in {**forms, **self._first} if forms.get(n) != self._first.get(n))
            raise DataError(
                f"batch: {odd!r} is {forms.get(odd, 'absent')}; "
                f"allowed: {self._first.get(odd, 'absent')}, as in the batches before"
            )
        for name, (limit, what) in self._limits.items():
            low, high = batch[name].min(), batch[name].max()
            if low < 0 or high >= limit:
                wrong = low if low < 0 else high
                raise DataError(
                    f"batch: {name!r} holds {wrong}; allowed: 0 to {limit - 1} ({what})"
                )
        return batch

    def close(self) -> None:
        """Stops the pipeline's threads."""
        self._batches.close()  # type: ignore[attr-defined]


def check_batch(
    batch: Mapping[str, np.ndarray], dataset: Dataset, modalities: tuple[str, ...], rows: int
) -> None:
    """Keys, shapes and dtypes of a batch, against what the data set says of itself.

    Raises:
      DataError: names the field, what came and what was expected.
    """
    for name in (*modalities, "label", "example_mask"):
        if name not in batch:
            raise DataError(
                f"batch: {name!r} is missing; allowed: {', '.join(modalities)}, label and "
                f"example_mask, found {', '.join(sorted(batch))}"
            )
    width = () if dataset.task == SINGLE_LABEL else (dataset.num_classes,)
    expect(batch, "label", [(rows, *width)], "f" if dataset.task == REGRESSION else "i")
    expect(batch, "example_mask", [(rows,)], "b")
    for name in modalities:
        info = dataset.modalities[name]
        expect(batch, name, [(rows, *info.shape)], np.dtype(info.dtype).kind)
        # Whether an example has the modality, or its real positions.
        masks: list[tuple[int, ...]] = [(rows,)]
        if info.kind in POSITIONS:
            masks.append((rows, info.shape[0]))
        expect(batch, f"{name}_mask", masks, "b")
        expect(batch, f"quality_{name}", [(rows,)], "f")
        if batch[name].dtype.kind == "f" and not np.isfinite(batch[name]).all():
            raise DataError(f"batch: {name!r} holds NaN or infinity; allowed: finite numbers")


def expect(
    batch: Mapping[str, np.ndarray], name: str, shapes: list[tuple[int, ...]], kind: str
) -> None:
    """Checks that a field, where it is present, has one of the shapes and that kind of dtype."""
    if name not in batch:
        return
    value = batch[name]
    words = {"i": "int32", "b": "bool", "f": "float32", "u": "uint8"}[kind]
    if value.shape not in shapes or value.dtype != np.dtype(words):
        wanted = " or ".join(f"{words}{list(shape)}" for shape in shapes)
        raise DataError(f"batch: {name!r} is {value.dtype}{list(value.shape)}; allowed: {wanted}")
