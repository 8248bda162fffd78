"""Checkpoints: saved in the background, committed whole, verified when they are read.

Orbax writes to a temporary folder and renames it, so a checkpoint exists completely or not at all.
It does not notice a byte that changed later (of the arrays, zarr3 checks only the index of a
shard); the checksums stored in the record do.

An array that is divided over devices is written, checked and read in its parts, by the process that
has them, so no host holds it whole. Its checksum is a sum over its elements, the same for every
layout, and a checkpoint is read into any other.
"""

import contextlib
import errno
import fnmatch
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import flax.serialization
import flax.traverse_util
import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError, NonFiniteError, UserError, said
from rollingq_jax.quality import QualityState
from rollingq_jax.train.train_state import TrainState
from rollingq_jax.train.workdir import check_path, reason_of

FORMAT_VERSION = 2  # 1 had one SHA-256 over all arrays, which takes a host that holds them whole
READABLE = (1, FORMAT_VERSION)
BLOCK = 1 << 16  # elements of which a checksum is taken at a time
ROOM = 1 << 20  # bytes on top of the arrays: their metadata, one block at least a file, metrics
# The arrays that inference reads, and the parts that trees of older versions lack.
LEARNED = ("params/", "ema/", "rolling/rotation", "quality/", "batch_stats/")
LATER = ("quality", "ema", "batch_stats")
OPTIONAL = ("rolling", *LATER)  # fields of the state that may be None
log = logging.getLogger(__name__)
T = TypeVar("T")


class DamagedError(CheckpointError):
    """A checkpoint is not as it was saved."""


class Learned(NamedTuple):
    """The part of a checkpoint that inference reads.

    Attributes:
      step: of the checkpoint.
      params: of the model, float32; their average, where the run has one.
      rotation: `[n H, d_h, d_h]` for n fusion layers, or None for a fusion without a class query.
      quality: sums behind the norm bias's statistics; None for a model without one.
      batch_stats: running averages of resnet18 encoders; None for a model without one.
    """

    step: int
    params: Any
    rotation: jax.Array | None
    quality: QualityState | None = None
    batch_stats: Any = None


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
        self._preserve = _NewestAndBest(keep)
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
            with convert_save_errors(self._directory):
                self._manager.close()
        except CheckpointError:
            if error is None:  # otherwise what ended the run says more
                raise

    def wait(self) -> None:
        """Waits until the save that is under way is committed; raises what went wrong in it."""
        with convert_save_errors(self._directory):
            self._manager.wait_until_finished()

    def check(self) -> None:
        """Raises what has gone wrong in the background, without waiting."""
        with convert_save_errors(self._directory):
            self._manager.check_for_errors()

    @property
    def newest(self) -> int | None:
        """Step of the newest checkpoint, once the save that is under way has ended."""
        with contextlib.suppress(CheckpointError):  # its failure is another error's to report
            self.wait()
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, damaged ones too, newest first."""
        paths = self._directory.iterdir() if self._directory.exists() else ()
        names = [path.name for path in paths]
        return sorted((int(name) for name in names if re.fullmatch(r"\d+", name)), reverse=True)

    def save(self, state: TrainState, record: Mapping[str, Any]) -> None:
        """Begins to save the state, with a JSON record, under its step number.

        The first of these is waited for and read back: a storage that does not keep what is written
        is told of now, and not when the run has ended.

        Args:
          state: one copy of it, whole or in parts, on any devices.
          record: what else a continuation needs; `record["best"]["step"]` is kept.

        Raises:
          NonFiniteError: the state holds NaN or infinity. Nothing is saved.
          CheckpointError: this save, or the one before in the background, failed; or the first one
            cannot be read, and is set aside.
        """
        tree = to_host(state)
        step = int(tree["step"])
        # Before the save, after which Orbax deletes what the policy does not keep.
        self._preserve.best = record["best"]["step"]
        if step in self._manager.all_steps():
            return
        sums = checksums(tree)
        for name, one in sums.items():
            if not one.finite:
                raise NonFiniteError(f"step {step}: {name} is not finite, and is not saved")
        record = {
            **record,
            "format_version": FORMAT_VERSION,
            "arrays": {name: one.told for name, one in sums.items()},
            "key_type": key_type(state.rng),
        }
        with convert_save_errors(self._directory):
            self.wait()
            check_room(self._directory, sum(leaf.nbytes for leaf in jax.tree.leaves(tree)))
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(tree),
                    record=ocp.args.JsonSave({"record": record, "sha256": record_digest(record)}),
                ),
            )
            if not self._read_back:
                self.wait()
                self._verify(step, tree)

    def _verify(self, step: int, tree: Any) -> None:
        try:
            self._read_arrays(step, self._read_record(step), tree)
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
          like: a state of the same structure, shapes and dtypes; may be abstract. Arrays that are
            divided over devices in it are read that way, the others to the host.
          check: raises `CheckpointError` for the record of a checkpoint that is not the run's.

        Raises:
          DamagedError: something in it is missing or not as it was saved.
          CheckpointError: it is another run's, or of another format.
        """
        record = self._read_record(step)
        check(record)
        target = as_tree(like)
        if record["format_version"] == 1:
            tree = self._read_format_1(step, record)
            found = tree_spec(tree)
        else:
            found = {name: told.rpartition(" ")[0] for name, told in record["arrays"].items()}
        # Before the structure: where keys are of another kind, the state has another shape too.
        _check_key_type(step, record, found.get("rng"))
        _check_structure(step, found, tree_spec(target))
        if record["format_version"] != 1:
            tree = self._read_arrays(step, record, target)
        try:
            return from_host(tree, like), record
        except Exception as error:  # the arrays are right, and the empty nodes between are not
            raise DamagedError(
                f"checkpoint {step} is damaged: its structure is not as it was saved"
            ) from error

    def restore_params(
        self, step: int, like: Callable[[Mapping[str, Any]], Any]
    ) -> tuple[Learned, dict[str, Any]]:
        """The part that inference reads, and the record: no optimizer, no PRNG key.

        Args:
          step: one of `steps()`.
          like: record -> parameters of the same structure, shapes and dtypes, which may be
            abstract; raises `CheckpointError` for the record of another run.

        Raises:
          DamagedError, CheckpointError: as `restore`.
        """
        record = self._read_record(step)
        expected = tree_spec({"params": like(record)})
        if record["format_version"] == 1:
            tree = self._read_format_1(step, record)
        else:
            names = [name for name in record["arrays"] if name.startswith(LEARNED)]
            if any(name.startswith("ema/") for name in names):
                names = [name for name in names if not name.startswith("params/")]
            wanted = flax.traverse_util.unflatten_dict(dict.fromkeys(names, 0), sep="/")
            tree = self._read_arrays(step, record, wanted)
        try:
            params, rolling = tree["ema" if "ema" in tree else "params"], tree.get("rolling") or {}
            rotation = rolling.get("rotation")
            sums = tree.get("quality")
            quality = None if sums is None else QualityState(**sums)
        except (AttributeError, KeyError, TypeError) as error:
            raise DamagedError(
                f"checkpoint {step} is damaged: its structure is not as it was saved"
            ) from error
        _check_structure(step, tree_spec({"params": params}), expected)
        parts = params, rotation, quality, tree.get("batch_stats")
        return Learned(step, *jax.tree.map(jax.numpy.asarray, parts)), record

    def _read_format_1(self, step: int, record: Mapping[str, Any]) -> Any:
        """All arrays of a checkpoint of format 1, on the host: its one checksum is over all."""
        tree = self._read(step, "state", ocp.args.PyTreeRestore())
        try:
            tree = jax.tree.map(np.asarray, tree)
            fits = checksum_1(tree) == record["checksum"]
        except Exception as error:  # whatever stands in a damaged tree in the place of arrays
            raise DamagedError(f"checkpoint {step} is damaged: {said(error)}") from error
        if not fits:
            raise DamagedError(f"checkpoint {step} is damaged: its checksum does not fit")
        return tree

    def _read_arrays(self, step: int, record: Mapping[str, Any], target: Any) -> Any:
        """The arrays whose names `target` has, in its structure; their checksums are the record's.

        An array that is divided over devices in `target` is read that way, the others to the host.
        """

        def how(leaf: Any) -> ocp.RestoreArgs:
            if not is_divided(leaf):
                return ocp.RestoreArgs(restore_type=np.ndarray)
            return ocp.ArrayRestoreArgs(
                sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype
            )

        how_each = jax.tree.map(how, target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=how_each, partial_restore=True)
        tree = self._read(step, "state", args)
        try:
            sums = checksums(tree)
            tree = jax.tree.unflatten(jax.tree.structure(target), jax.tree.leaves(tree))
        except Exception as error:  # whatever stands in a damaged tree in the place of arrays
            raise DamagedError(f"checkpoint {step} is damaged: {said(error)}") from error
        for name in tree_names(target):
            if name not in sums or sums[name].told != record["arrays"][name]:
                raise DamagedError(f"checkpoint {step} is damaged: its checksum of {name} is wrong")
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
            intact = record_digest(record) == sealed
        except (KeyError, TypeError):
            intact = False
        if not intact:
            raise DamagedError(f"checkpoint {step} is damaged: its record is not as it was saved")
        if record["format_version"] not in READABLE:
            raise CheckpointError(
                f"checkpoint {step} has format version {record['format_version']!r}; "
                f"allowed: {', '.join(map(str, READABLE))}"
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


class CheckpointSchedule:
    """Checkpoints by steps and by minutes since the last one.

    Args:
      every_steps, every_minutes: as in `config.checkpoint`; 0 turns one off.
      log_every: several processes agree on the time only where they wait for each other anyway.
    """

    def __init__(self, every_steps: int, every_minutes: float, log_every: int) -> None:
        self._steps, self._seconds, self._log_every = every_steps, 60 * every_minutes, log_every
        self.mark_saved()

    def mark_saved(self) -> None:
        """A checkpoint has been made: the minutes count from now."""
        self._last = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Tells if a checkpoint is due after this step; the same in all processes."""
        if self._steps and step % self._steps == 0:
            return True
        if not self._seconds:
            return False
        late = time.monotonic() - self._last >= self._seconds
        if jax.process_count() == 1:
            return late
        if step % self._log_every:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))


def as_tree(state: TrainState) -> dict[str, Any]:
    """Nested dict of arrays, a PRNG key as its bits; states of None are left out.

    The state may be abstract; arrays keep their shardings.
    """
    abstract = isinstance(state.rng, jax.ShapeDtypeStruct)
    bits_of = functools.partial(jax.eval_shape, jax.random.key_data)
    rng = bits_of(state.rng) if abstract else jax.random.key_data(state.rng)
    tree = flax.serialization.to_state_dict(_none_as_empty(state).replace(rng=rng))
    # Trees of runs without them are those of older versions.
    return {name: part for name, part in tree.items() if name not in LATER or part}


def _none_as_empty(state: TrainState) -> TrainState:
    """The same with () in the place of None, so that the part is an empty dict in the tree."""
    return state.replace(**{name: getattr(state, name) or () for name in OPTIONAL})


def key_type(key: jax.Array | None = None) -> str:
    """Name of a PRNG key's implementation; without a key, of JAX's default."""
    return str(jax.random.key_impl(jax.random.key(0) if key is None else key))


def is_divided(leaf: Any) -> bool:
    """Tells if an array, which may be abstract, lies in parts on several devices."""
    sharding = getattr(leaf, "sharding", None)
    return sharding is not None and not sharding.is_fully_replicated


def to_host(state: TrainState) -> dict[str, Any]:
    """`as_tree` in host memory, but for arrays that are divided over devices, which stay there."""
    leaves, structure = jax.tree.flatten(as_tree(state))
    whole = iter(jax.device_get([leaf for leaf in leaves if not is_divided(leaf)]))
    leaves = [leaf if is_divided(leaf) else np.asarray(next(whole)) for leaf in leaves]
    return jax.tree.unflatten(structure, leaves)


def from_host(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state that `to_host` took apart; `like` gives the structure, and may be abstract."""
    lacking: dict[str, Any] = {name: {} for name in LATER}
    state = flax.serialization.from_state_dict(_none_as_empty(like), lacking | dict(tree))
    state = jax.tree.map(lambda x: x if is_divided(x) else jax.numpy.asarray(x), state)
    return state.replace(
        rng=jax.random.wrap_key_data(state.rng),
        **{name: getattr(state, name) or None for name in OPTIONAL},
    )


def tree_names(tree: Any) -> list[str]:
    """The name of each leaf, as `params/fusion/cls`."""
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return ["/".join(str(key.key) for key in path) for path, _ in paths]


def tree_spec(tree: Any) -> dict[str, str]:
    """`{"params/fusion/cls": "float32[64]", ...}`."""
    specs = [f"{leaf.dtype}{list(np.shape(leaf))}" for leaf in jax.tree.leaves(tree)]
    return dict(zip(tree_names(tree), specs, strict=True))


class Checksum(NamedTuple):
    """Facts about an array that need no host to hold it whole."""

    told: str  # dtype, shape and checksum, as a record has them
    finite: bool  # whether all elements are; True of integers


def checksums(tree: Any) -> dict[str, Checksum]:
    """The checksum of each array, the same for every layout over devices and processes.

    With b_i the bits of element i as an integer and k_i an odd 64-bit number that follows from i,
    it is the sum of b_i k_i modulo 2^64: a multilinear hash (Carter and Wegman, 1979). Addition has
    no order, so each process adds what it holds. A change of one element always changes the sum;
    changes of several would have to cancel by chance.

    Where arrays are divided over processes, all of them have to call this.
    """
    leaves = jax.tree.leaves(tree)
    sums, finite = [], []
    for leaf in leaves:
        parts = [(leaf, (0,) * np.ndim(leaf))]
        if is_divided(leaf):
            parts = [
                (shard.data, tuple(axis.start or 0 for axis in shard.index))
                for shard in leaf.addressable_shards
                if shard.replica_id == 0
            ]
        arrays = [(np.asarray(data), start) for data, start in parts]
        sums.append(sum(_sum_of_part(*part, np.shape(leaf)) for part in arrays) % 2**64)
        finite.append(all(a.dtype.kind != "f" or np.isfinite(a).all() for a, _ in arrays))
    if any(is_divided(leaf) and not leaf.is_fully_addressable for leaf in leaves):
        mine = [(s >> 32, s % 2**32, ok) for s, ok in zip(sums, finite, strict=True)]
        found = multihost_utils.process_allgather(np.array(mine, np.uint32))
        for i, leaf in enumerate(leaves):
            if is_divided(leaf):
                sums[i] = sum(int(p[i, 0]) * 2**32 + int(p[i, 1]) for p in found) % 2**64
                finite[i] = bool(found[:, i, 2].all())
    told = [f"{spec} {s:016x}" for spec, s in zip(tree_spec(tree).values(), sums, strict=True)]
    return dict(zip(tree_names(tree), map(Checksum, told, finite), strict=True))


def _sum_of_part(part: np.ndarray, start: tuple[int, ...], shape: tuple[int, ...]) -> int:
    """The sum of `checksums` over a part of an array that begins at `start` in it."""
    if not part.size:
        return 0
    part, start, shape = np.atleast_1d(part), start or (0,), shape or (1,)
    *outer, length = part.shape
    bits = np.ascontiguousarray(part).reshape(-1, length).view(f"u{part.dtype.itemsize}")
    first = np.zeros((), np.uint64)  # position of each row's first element in the whole array
    for axis, size in enumerate(outer):
        rows = np.arange(start[axis], start[axis] + size, dtype=np.uint64)
        first = np.add.outer(first, rows * np.uint64(math.prod(shape[axis + 1 :])))
    first = first.reshape(-1, 1) + np.uint64(start[-1])
    column, total = np.arange(length, dtype=np.uint64)[None], 0
    rows_at_once = max(1, BLOCK // length)
    for row in range(0, len(bits), rows_at_once):
        block = slice(row, row + rows_at_once)
        products = bits[block].astype(np.uint64) * _odd_number(first[block] + column)
        total += int(np.sum(products))
    return total


def _odd_number(position: np.ndarray) -> np.ndarray:
    """An odd pseudo-random 64-bit number for each position (splitmix64; Steele et al., 2014)."""
    z = (position + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (z ^ (z >> np.uint64(31))) | np.uint64(1)


def checksum_1(tree: Any) -> str:
    """Format 1's: SHA-256 over paths, dtypes, shapes and bytes of every leaf, in a fixed order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n"
        digest.update(head.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def record_digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _check_key_type(step: int, record: Mapping[str, Any], rng: str | None) -> None:
    """Checks that the run goes on with the kind of random numbers with which it began."""
    ours = key_type()
    # A record of an older version does not have the name; the width of the key tells it.
    older = {"uint32[2]": "threefry2x32", "uint32[4]": "rbg"}.get(rng or "", ours)
    theirs = record.get("key_type", older)
    if theirs != ours:
        raise CheckpointError(
            f"checkpoint {step} was made with other random numbers: JAX_DEFAULT_PRNG_IMPL is "
            f"{ours} and was {theirs}; allowed: JAX_DEFAULT_PRNG_IMPL={theirs}"
        )


def _check_structure(step: int, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    """Checks that a checkpoint's arrays, as `tree_spec` tells them, are those of the model."""
    for name in sorted(theirs.keys() | ours.keys()):
        if theirs.get(name) != ours.get(name):
            raise CheckpointError(
                f"checkpoint {step} is of another model: {name} is "
                f"{theirs.get(name, 'absent')}; allowed: {ours.get(name, 'absent')}"
            )


class _NewestAndBest:
    """Orbax's policy of deletion: the newest `keep` stay, and the best.

    Orbax's own `BestN` reads the metric of each checkpoint from the disk and takes the last of
    equals; here the step is given, since the best by validation is known, and is the first.
    """

    def __init__(self, keep: int) -> None:
        self.keep, self.best = keep, -1

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Which of the checkpoints, oldest first, stay."""
        newest = len(checkpoints) - self.keep
        return [i >= newest or info.step == self.best for i, info in enumerate(checkpoints)]


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


def check_room(directory: epath.Path, size: int) -> None:
    """A checkpoint fits on the disk. Orbax would say so too, in many lines and half-way through.

    Raises:
      OSError: it does not.
    """
    if "://" in os.fspath(directory):
        return
    free, wanted = shutil.disk_usage(directory).free, size + size // 8 + ROOM
    if free < wanted:
        reason = f"{os.strerror(errno.ENOSPC)}: {wanted:,} bytes are wanted and {free:,} are free"
        raise OSError(errno.ENOSPC, reason)


@contextlib.contextmanager
def convert_save_errors(directory: epath.Path) -> Iterator[None]:
    """Turns an exception of Orbax, while it saves, into one line.

    Raises:
      CheckpointError: the checkpoint is not saved.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        silence_closed_loops()
        raise CheckpointError(
            f"a checkpoint in {directory} is not saved ({reason_of(error)})"
        ) from error


def silence_closed_loops() -> None:
    """Drops reports that no caller can catch, of an error that is raised as well.

    Where a checkpoint cannot be read or written, TensorStore still reports to Orbax's event loop
    when Orbax has raised the error and closed the loop, and asyncio logs what nobody waits for.
    Called when the first such error has come; all other reports go where they went.
    """
    shown = sys.unraisablehook
    if getattr(shown, "drops_closed_loops", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    hook.drops_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and "tensorstore_spec" in str(record.exc_info[1]))
    )


@contextlib.contextmanager
def with_last_checkpoint(newest: Callable[[], int | None]) -> Iterator[None]:
    """Adds to an error what is left: the step of the newest checkpoint, None if there is none."""
    try:
        yield
    except UserError as error:
        step = newest()
        left = (
            "there is no checkpoint yet"
            if step is None
            else f"the last good checkpoint is of step {step}"
        )
        raise type(error)(f"{error}; {left}") from error
