"""Checkpoints: saved in the background, committed whole, verified when they are read.

Orbax writes to a temporary folder and renames it, so a checkpoint exists completely or not at all.
It does not notice a byte that changed later; the checksum stored beside the state does.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from rollingq_jax.errors import CheckpointError
from rollingq_jax.train.state import TrainState

FORMAT_VERSION = 1
log = logging.getLogger(__name__)


def to_host(state: TrainState) -> dict[str, Any]:
    """Nested dict of NumPy arrays, a PRNG key as its bits; a rolling state of None is left out."""
    tree = flax.serialization.to_state_dict(
        state.replace(rng=jax.random.key_data(state.rng), rolling=state.rolling or ())
    )
    return jax.tree.map(np.asarray, jax.device_get(tree))


def from_host(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state that `to_host` took apart; `like` gives the structure."""
    target = like.replace(rng=jax.random.key_data(like.rng), rolling=like.rolling or ())
    state = flax.serialization.from_state_dict(target, tree)
    state = jax.tree.map(jax.numpy.asarray, state)
    rng = jax.random.wrap_key_data(state.rng, impl=jax.random.key_impl(like.rng))
    return state.replace(rng=rng, rolling=state.rolling or None)


def checksum(tree: Any) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of every leaf, in a fixed order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n"
        digest.update(head.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _sealed(record: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Keeps the newest `keep` and the best by validation. A context manager: leaving it waits for the
    save that is under way.
    """

    def __init__(self, directory: Any, keep: int) -> None:
        policy = preservation_policy.AnyPreservationPolicy(
            [
                preservation_policy.LatestN(keep),
                preservation_policy.BestN(get_metric_fn=lambda m: m["improved_to"], n=1),
            ]
        )
        self._directory = directory
        self._manager = ocp.CheckpointManager(
            directory,
            item_names=("state", "record"),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policy, best_fn=lambda m: m["improved_to"], create=True
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.wait_until_finished()
        self._manager.close()

    def wait(self) -> None:
        """Waits until the save that is under way is committed."""
        self._manager.wait_until_finished()

    def save(
        self, state: TrainState, record: Mapping[str, Any], improved_to: float | None = None
    ) -> None:
        """Begins to save the state, with a JSON record, under its step number.

        Args:
          state: one copy of it, on any device.
          record: what else a continuation needs.
          improved_to: the validation accuracy, where it is the best so far.
        """
        tree = to_host(state)
        step = int(tree["step"])
        if step in self._manager.all_steps():
            return
        record = {**record, "format_version": FORMAT_VERSION, "checksum": checksum(tree)}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(tree),
                record=ocp.args.JsonSave({"record": record, "sha256": _sealed(record)}),
            ),
            metrics={"improved_to": -1.0 if improved_to is None else float(improved_to)},
        )

    def steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first."""
        return sorted(self._manager.all_steps(read=True), reverse=True)

    def restore(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The state and record saved at a step.

        Args:
          step: one of `steps()`.
          like: a state of the same structure, shapes and dtypes.

        Raises:
          CheckpointError: something in it is missing or not as it was saved.
        """
        target = to_host(like)
        try:
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardRestore(target), record=ocp.args.JsonRestore()
                ),
            )
            record, seal = restored["record"]["record"], restored["record"]["sha256"]
            tree = jax.tree.map(np.asarray, restored["state"])
            intact = _sealed(record) == seal and checksum(tree) == record["checksum"]
        except Exception as error:  # Orbax raises many types on a damaged folder
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"checkpoint {step} cannot be read: {reason}") from error
        if not intact:
            raise CheckpointError(f"checkpoint {step} is damaged: its checksum does not fit")
        if record["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"checkpoint {step} has format version {record['format_version']}; "
                f"allowed: {FORMAT_VERSION}"
            )
        return from_host(tree, like), record

    def restore_newest(self, like: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
        """The newest checkpoint that is intact; None if there is no checkpoint.

        A damaged one is named in a warning and left where it is.

        Raises:
          CheckpointError: there are checkpoints, and none is intact.
        """
        steps = self.steps()
        for step in steps:
            try:
                return self.restore(step, like)
            except CheckpointError as error:
                log.warning("%s; trying the one before", error)
        if steps:
            raise CheckpointError(
                f"none of the checkpoints in {self._directory} is intact: {steps}"
            )
        return None
