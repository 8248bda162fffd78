"""Checkpoints: saved in the background, committed whole, verified when they are read.

Orbax writes to a temporary folder and renames it, so a checkpoint exists completely or not at all.
It does not notice a byte that changed later; the checksum stored beside the state does.
"""

import contextlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError
from rollingq_jax.train.packing import (
    as_tree,
    check_finite,
    checksum,
    describe,
    from_host,
    seal,
    size,
    to_host,
)
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.storage import check_room, saving

FORMAT_VERSION = 1
log = logging.getLogger(__name__)


class DamagedError(CheckpointError):
    """A checkpoint is not as it was saved."""


def found_steps(directory: epath.Path) -> list[int]:
    """Steps of the checkpoints in a folder, damaged ones too, newest first."""
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    return sorted((int(name) for name in names if re.fullmatch(r"\d+", name)), reverse=True)


class _Preserve:
    """Orbax's policy of deletion: the newest `keep` stay, and the best."""

    def __init__(self, keep: int) -> None:
        self.keep, self.best = keep, -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints, oldest first, stay."""
        newest = len(checkpoints) - self.keep
        return [i >= newest or info.step == self.best for i, info in enumerate(checkpoints)]


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Keeps the newest `keep` and the best by validation. A context manager: leaving it waits for the
    save that is under way.

    Args:
      directory: the folder.
      keep: how many of the newest stay.
      read_only: leave the folder as it is, since a live run may be writing there. Otherwise what
        an interrupted save has left is removed.
    """

    def __init__(self, directory: epath.Path, keep: int = 1, *, read_only: bool = False) -> None:
        self._directory, self._read_only = directory, read_only
        self._preserve = _Preserve(keep)
        # Orbax's own `read_only` warns of what it implies, each time. Without it nothing is written
        # either, as long as nothing is created, cleaned up or saved.
        self._manager = ocp.CheckpointManager(
            directory,
            item_names=("state", "record"),
            options=ocp.CheckpointManagerOptions(
                create=not read_only,
                cleanup_tmp_directories=not read_only,
                preservation_policy=None if read_only else self._preserve,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        try:
            with saving(self._directory):
                self._manager.close()
        except CheckpointError:
            if error is None:  # otherwise what ended the run says more
                raise

    def wait(self) -> None:
        """Waits until the save that is under way is committed; raises what went wrong in it."""
        with saving(self._directory):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what has gone wrong in the background, without waiting."""
        with saving(self._directory):
            self._manager.check_for_errors()

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint, once the save that is under way has ended."""
        with contextlib.suppress(CheckpointError):  # its failure is another error's to report
            self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, damaged ones too, newest first."""
        return found_steps(self._directory)

    def save(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """Begins to save the state, with a JSON record, under its step number.

        Args:
          state: one copy of it, on any device.
          record: what else a continuation needs; `record["best"]["step"]` is kept.

        Raises:
          NonFiniteError: the state holds NaN or infinity. Nothing is saved.
          CheckpointError: this save, or the one before in the background, failed.
        """
        tree = to_host(state)
        step = int(tree["step"])
        self._preserve.best = record["best"]["step"]
        if step in self._manager.all_steps():
            return
        check_finite(tree, step)
        record = {**record, "format_version": FORMAT_VERSION, "checksum": checksum(tree)}
        with saving(self._directory):
            self.wait()
            check_room(self._directory, size(tree))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(tree),
                    record=ocp.args.JsonSave({"record": record, "sha256": seal(record)}),
                ),
            )

    def restore(
        self,
        step: int,
        like: TrainState,
        check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state and record saved at a step.

        Args:
          step: one of `steps()`.
          like: a state of the same structure, shapes and dtypes; may be abstract.
          check: raises `CheckpointError` for the record of a checkpoint that is not the run's.

        Raises:
          DamagedError: something in it is missing or not as it was saved.
          CheckpointError: it is another run's, or of another format.
        """
        record = self._read_record(step)
        if record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {step} has format version {record['format_version']!r}; "
                f"allowed: {FORMAT_VERSION}"
            )
        check(record)
        tree = self._read(step, "state", ocp.args.StandardRestore())
        tree = jax.tree.map(np.asarray, tree)
        if checksum(tree) != record["checksum"]:
            raise DamagedError(f"checkpoint {step} is damaged: its checksum does not fit")
        theirs, ours = describe(tree), describe(jax.eval_shape(as_tree, like))
        for name in sorted(theirs.keys() | ours.keys()):
            if theirs.get(name) != ours.get(name):
                raise CheckpointError(
                    f"checkpoint {step} is of another model: {name} is "
                    f"{theirs.get(name, 'absent')}; allowed: {ours.get(name, 'absent')}"
                )
        return from_host(tree, like), record

    def restore_newest(
        self,
        like: TrainState,
        check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is intact; None if there is no checkpoint.

        Damaged ones are named in warnings. They are not deleted: unless the folder is read only,
        they are renamed, so that the run can save the same step again.

        Raises:
          CheckpointError: there are checkpoints, and none is intact; or one is not the run's.
        """
        damaged: list[int] = []
        for step in self.steps():
            try:
                found = self.restore(step, like, check)
            except DamagedError as error:
                log.warning("%s; trying the one before", error)
                damaged.append(step)
                continue
            self._preserve.best = found[1]["best"]["step"]
            if damaged and not self._read_only:
                self._set_aside(damaged)
            return found
        if damaged:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} is intact: {damaged}; "
                "allowed: another workdir, for a new run"
            )
        return None

    def _read(self, step: int, item: str, args: Any) -> Any:
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # Orbax raises many types on a damaged folder
            reason = " ".join(str(error).split())[:200]
            raise DamagedError(f"checkpoint {step} cannot be read: {reason}") from error

    def _read_record(self, step: int) -> dict[str, Any]:
        content = self._read(step, "record", ocp.args.JsonRestore())
        try:
            record, sealed = content["record"], content["sha256"]
            intact = seal(record) == sealed
        except (KeyError, TypeError):
            intact = False
        if not intact:
            raise DamagedError(f"checkpoint {step} is damaged: its record is not as it was saved")
        return record

    def _set_aside(self, steps: Sequence[int]) -> None:
        if jax.process_index() == 0:
            for step in steps:
                source = self._directory / str(step)
                names = (f"{step}.damaged" + (f"-{n}" if n else "") for n in range(10_000))
                free = next(name for name in names if not (self._directory / name).exists())
                source.rename(self._directory / free)
                log.warning("checkpoint %d is kept as %s", step, self._directory / free)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self._manager.reload()
