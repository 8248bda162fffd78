"""The parts of one run put together: data, steps over all devices, evaluation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from etils import epath

from rollingq_jax.data.dataset import Dataset, fingerprint, first_difference
from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.preprocessing import input_spec
from rollingq_jax.errors import CheckpointError
from rollingq_jax.train import parallel as parallel_lib
from rollingq_jax.train.config import default_config, with_defaults
from rollingq_jax.train.evaluation import Columns, evaluate
from rollingq_jax.train.feed import Feed
from rollingq_jax.train.setup import Setup, build, resolve_config
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.steps import make_eval_step, make_train_step
from rollingq_jax.train.workdir import check_same_run


class Run:
    """What stays the same from the first step to the summary.

    Attributes:
      config: the configuration, `config.model` completed from the data.
      dataset: the data.
      workdir: the run's folder.
      profile: whether some training steps are traced.
      setup: model, optimiser, lengths.
      inputs: what a model has to know of its data, for inference without them.
      signature: of the data, so that the run does not go on with others.
      parallel: the steps over all devices.

    Raises:
      ConfigError: the configuration does not fit the data or the devices.
      DataError: the data cannot be read.
    """

    def __init__(
        self, config: Any, dataset: Dataset, workdir: epath.Path, profile: bool = False
    ) -> None:
        self.config = resolve_config(config, dataset)
        self.dataset, self.workdir, self.profile = dataset, workdir, profile
        self.setup: Setup = build(self.config, dataset)
        self.inputs = input_spec(dataset)
        self.signature = fingerprint(dataset)
        parallel_lib.check_batch_size(config.batch_size)
        compat = self.config.upstream_compat
        train_step = make_train_step(
            self.setup.model,
            self.setup.tx,
            self.setup.roller,
            self.setup.roll_schedule,
            check=not compat.statistics_pass,
            last_batch_scores=compat.last_batch_air,
            baseline=self.setup.baseline,
            skip_nonfinite=config.nonfinite == "skip",
        )
        wrap = parallel_lib.WRAPPERS[config.parallel]
        self.parallel = wrap(train_step, make_eval_step(self.setup.model))

    @property
    def rolls_after_epoch(self) -> bool:
        """Whether the trigger is checked between epochs, as upstream does, and not in the step."""
        return self.setup.roll_schedule is not None and self.config.upstream_compat.statistics_pass

    @property
    def selection_split(self) -> str:
        """The split that chooses the best checkpoint."""
        return "valid" if "valid" in self.dataset.splits else "train"

    def checks_after(self, step: int) -> bool:
        """Whether the training step that ended with `step` updates checked the trigger."""
        schedule = self.setup.roll_schedule
        if schedule is None or self.rolls_after_epoch:
            return False
        return bool(schedule.checks(step - 1))

    def initial_state(self, report: Callable[[str], None] = lambda _: None) -> TrainState:
        """The state at step 0, on one device; `report` is told what pretrained weights were used.

        Raises:
          ConfigError: the file of pretrained weights cannot be used.
        """
        return self.setup.initial_state(self.config, self.dataset, report)

    def abstract_state(self) -> TrainState:
        """Shapes and dtypes of every state of the run."""
        return self.setup.abstract_state(self.config, self.dataset)

    def batches(self, start_step: int, num_steps: int) -> Feed:
        """Training batches of the steps `start_step .. num_steps - 1`, this process's rows."""
        options = self._reading() | {"start_step": start_step, "num_steps": num_steps}
        return self._checked(
            train_batches(
                self.dataset.splits["train"],
                transforms=self.dataset.train_transforms,
                **options,
            )
        )

    def evaluate(
        self, state: TrainState, split: str, check: Callable[[], None] = lambda: None
    ) -> tuple[dict[str, float], Columns]:
        """Means over a split, and each of its examples' outputs (see `evaluation.evaluate`).

        `check` is called before each batch, and may end the pass by raising.

        Raises:
          NonFiniteError: the logits of every example are NaN or infinite.
        """
        batches = eval_batches(
            self.dataset.splits[split], transforms=self.dataset.eval_transforms, **self._reading()
        )
        return evaluate(self.parallel, state, self._checked(batches), check, f"split {split!r}")

    def _reading(self) -> dict[str, Any]:
        return {
            "batch_size": self.config.batch_size,
            "seed": self.config.seed,
            "process_index": jax.process_index(),
            "process_count": jax.process_count(),
            "prefetch": self.config.data.prefetch,
        }

    def _checked(self, batches: Any) -> Feed:
        rows = self.config.batch_size // jax.process_count()
        return Feed(batches, self.dataset, self.setup.model.spec.modalities, rows)

    def identity(self) -> dict[str, Any]:
        """The configuration and the data of the run, as JSON, for checkpoints and the summary.

        `inputs` is what inference needs of the data; the rest tells the run from others.
        """
        examples = {split: len(source) for split, source in self.dataset.splits.items()}
        return {
            "config": self.config.to_dict(),
            "examples": examples,
            "signature": self.signature,
            "inputs": self.inputs.to_json(),
        }

    def record(self, best: Mapping[str, Any], **rest: Any) -> dict[str, Any]:
        """What a checkpoint holds beside the state, as JSON: the best so far, what else the loop
        needs to go on from there, and the run's identity."""
        return {"best": best, **self.identity(), **rest}

    def check_record(self, record: Mapping[str, Any]) -> None:
        """A checkpoint is this run's.

        Raises:
          CheckpointError: its configuration or its data are others; says in which fields.
        """
        theirs = with_defaults(record["config"], default_config().to_dict())
        check_same_run(self.config, theirs, f"a checkpoint in {self.workdir}")
        self.check_data(record, f"the checkpoint in {self.workdir}")

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
