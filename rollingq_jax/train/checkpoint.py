"""Checkpoints: saved in the background, committed whole, verified when they are read.

Orbax writes to a temporary folder and renames it, so a checkpoint exists completely or not at all.
It does not notice a byte that changed later; the checksum stored beside the state does.
"""

import contextlib
import fnmatch
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError, said
from rollingq_jax.train.packing import (
    as_tree,
    check_finite,
    checksum,
    describe,
    from_host,
    key_type,
    seal,
    size,
    to_host,
)
from rollingq_jax.train.state import TrainState
from rollingq_jax.train.storage import check_room, saving, silence_closed_loops
from rollingq_jax.train.workdir import check_path

FORMAT_VERSION = 1
log = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedError(CheckpointError):
    """A checkpoint is not as it was saved."""


class LiteralPath(type(epath.Path("/"))):  # type: ignore[misc]
    """A path whose own brackets, stars and question marks are read as they stand by `glob`.

    `epath.Path.glob` reads the whole path as a pattern. In a folder such as `runs/[lr=0.1]` Orbax
    would not find the parts of a checkpoint that it has just written, and would commit it without
    its arrays. Orbax takes a path of any registered class and keeps to that class.
    """

    def glob(self, pattern: str) -> Iterator[Any]:
        """Paths below this one that match; `/` parts folders, and `**` is not known."""
        first, _, rest = pattern.partition("/")
        names = [path.name for path in self.iterdir()] if self.is_dir() else []
        for name in sorted(fnmatch.filter(names, first)):
            yield from (self / name).glob(rest) if rest else [self / name]


epath.register_path_cls(LiteralPath)


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


def _check_key_type(step: int, record: Mapping[str, Any], tree: Any) -> None:
    """The run goes on with the kind of random numbers with which it began.

    Raises:
      CheckpointError: names the setting of JAX that differs.
    """
    ours = key_type()
    size = np.shape(tree["rng"]) if isinstance(tree, dict) and "rng" in tree else ()
    # A record of an older version does not have the name; the width of the key tells it.
    theirs = record.get("key_type", {(2,): "threefry2x32", (4,): "rbg"}.get(size, ours))
    if theirs != ours:
        raise CheckpointError(
            f"checkpoint {step} was made with other random numbers: JAX_DEFAULT_PRNG_IMPL is "
            f"{ours} and was {theirs}; allowed: JAX_DEFAULT_PRNG_IMPL={theirs}"
        )


def _check_structure(step: int, tree: Any, like: Any) -> None:
    """The arrays of a checkpoint are those of the model that they are for.

    Raises:
      CheckpointError: names the first array that is not.
    """
    theirs, ours = describe(tree), describe(like)
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"checkpoint {step} is of another model: {name} is "
                f"{theirs.get(name, 'absent')}; allowed: {ours.get(name, 'absent')}"
            )


class Learned(NamedTuple):
    """What training leaves for inference.

    Attributes:
      step: of the checkpoint.
      params: of the model, float32.
      rotation: `[n H, d_h, d_h]` for n fusion layers, or None for a fusion without a class query.
    """

    step: int
    params: Any
    rotation: jax.Array | None


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
        check_path(directory)
        self._directory, self._read_only = directory, read_only
        self._preserve = _Preserve(keep)
        self._read_back = False
        # Orbax's own `read_only` warns of what it implies, each time. Without it nothing is written
        # either, as long as nothing is created, cleaned up or saved.
        self._manager = ocp.CheckpointManager(
            LiteralPath(directory),
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

        The first of these is waited for and read back: a storage that does not keep what is written
        is told of now, and not when the run has ended.

        Args:
          state: one copy of it, on any device.
          record: what else a continuation needs; `record["best"]["step"]` is kept.

        Raises:
          NonFiniteError: the state holds NaN or infinity. Nothing is saved.
          CheckpointError: this save, or the one before in the background, failed; or the first one
            cannot be read, and is set aside.
        """
        tree = to_host(state)
        step = int(tree["step"])
        self._preserve.best = record["best"]["step"]
        if step in self._manager.all_steps():
            return
        check_finite(tree, step)
        record = {
            **record,
            "format_version": FORMAT_VERSION,
            "checksum": checksum(tree),
            "key_type": key_type(state.rng),
        }
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
            if not self._read_back:
                self.wait()
                self._verify(step)

    def _verify(self, step: int) -> None:
        try:
            self._read_tree(step, self._read_record(step))
        except DamagedError as error:
            self._set_aside([step])
            raise CheckpointError(
                f"the first checkpoint in {self._directory} cannot be read back ({error}); "
                "allowed: a workdir on a storage that keeps what is written"
            ) from error
        self._read_back = True

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
        check(record)
        tree = self._read_tree(step, record)
        _check_key_type(step, record, tree)
        _check_structure(step, tree, jax.eval_shape(as_tree, like))
        try:
            return from_host(tree, like), record
        except Exception as error:  # the arrays are right, and the empty nodes between are not
            raise DamagedError(
                f"checkpoint {step} is damaged: its structure is not as it was saved"
            ) from error

    def restore_params(
        self, step: int, like: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Learned, dict[str, Any]]:
        """What inference needs of a checkpoint, and its record: no optimizer, no PRNG key.

        Args:
          step: one of `steps()`.
          like: record -> parameters of the same structure, shapes and dtypes, which may be
            abstract; raises `CheckpointError` for the record of another run.

        Raises:
          DamagedError, CheckpointError: as `restore`.
        """
        record = self._read_record(step)
        expected = like(record)
        tree = self._read_tree(step, record)
        try:
            params, rolling = tree["params"], tree.get("rolling") or {}
            rotation = rolling.get("rotation")
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedError(
                f"checkpoint {step} is damaged: its structure is not as it was saved"
            ) from error
        _check_structure(step, {"params": params}, {"params": expected})
        params = jax.tree.map(jax.numpy.asarray, params)
        rotation = None if rotation is None else jax.numpy.asarray(rotation)
        return Learned(step, params, rotation), record

    def _read_tree(self, step: int, record: Mapping[str, Any]) -> Any:
        """The arrays of a checkpoint, on the host; their checksum is the record's."""
        tree = self._read(step, "state", ocp.args.StandardRestore())
        try:
            tree = jax.tree.map(np.asarray, tree)
            fits = checksum(tree) == record["checksum"]
        except Exception as error:  # whatever stands in a damaged tree in the place of arrays
            raise DamagedError(f"checkpoint {step} is damaged: {said(error)}") from error
        if not fits:
            raise DamagedError(f"checkpoint {step} is damaged: its checksum does not fit")
        return tree

    def restore_newest(
        self,
        like: TrainState,
        check: Callable[[Mapping[str, Any]], None] = lambda record: None,
    ) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that `restore` can read; None if there is no checkpoint.

        Damaged ones are named in warnings. They are not deleted: unless the folder is read only,
        they are renamed, so that the run can save the same step again.

        Raises:
          CheckpointError: there are checkpoints, and none is intact; or one is not the run's.
        """
        return self._newest_intact(lambda step: self.restore(step, like, check))

    def restore_newest_params(
        self, like: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Learned, dict[str, Any]] | None:
        """As `restore_newest`, with `restore_params`."""
        return self._newest_intact(lambda step: self.restore_params(step, like))

    def _newest_intact(
        self, read: Callable[[int], tuple[T, dict[str, Any]]]
    ) -> tuple[T, dict[str, Any]] | None:
        damaged: list[int] = []
        for step in self.steps():
            try:
                found = read(step)
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
            silence_closed_loops()
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
        if record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {step} has format version {record['format_version']!r}; "
                f"allowed: {FORMAT_VERSION}"
            )
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
