"""A training state as arrays in host memory, what is in it in words, and its checksum."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import flax.serialization
import jax
import numpy as np

from rollingq_jax.errors import NonFiniteError
from rollingq_jax.train.state import TrainState


def as_tree(state: TrainState) -> dict[str, Any]:
    """Nested dict of arrays, a PRNG key as its bits; a rolling state of None is left out."""
    return flax.serialization.to_state_dict(
        state.replace(rng=jax.random.key_data(state.rng), rolling=state.rolling or ())
    )


def key_type(key: jax.Array | None = None) -> str:
    """Name of a PRNG key's implementation; without a key, of JAX's default."""
    return str(jax.random.key_impl(jax.random.key(0) if key is None else key))


def to_host(state: TrainState) -> dict[str, Any]:
    """`as_tree` in host memory."""
    return jax.tree.map(np.asarray, jax.device_get(as_tree(state)))


def from_host(tree: Mapping[str, Any], like: TrainState) -> TrainState:
    """The state that `to_host` took apart; `like` gives the structure, and may be abstract."""
    target = like.replace(rolling=like.rolling or ())
    state = flax.serialization.from_state_dict(target, dict(tree))
    state = jax.tree.map(jax.numpy.asarray, state)
    rng = jax.random.wrap_key_data(state.rng)
    return state.replace(rng=rng, rolling=state.rolling or None)


def describe(tree: Any) -> dict[str, str]:
    """`{"params/fusion/cls": "float32[64]", ...}`."""
    return {
        "/".join(str(key.key) for key in path): f"{leaf.dtype}{list(np.shape(leaf))}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def checksum(tree: Any) -> str:
    """SHA-256 over paths, dtypes, shapes and bytes of every leaf, in a fixed order."""
    digest = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        head = f"{jax.tree_util.keystr(path)} {array.dtype} {np.shape(leaf)}\n"
        digest.update(head.encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def size(tree: Any) -> int:
    """Bytes of all leaves."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def seal(record: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON record."""
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def check_finite(tree: Any, step: int) -> None:
    """Raises NonFiniteError where an array of the state is NaN or infinite somewhere."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.dtype.kind == "f" and not np.isfinite(leaf).all():
            name = "/".join(str(key.key) for key in path)
            raise NonFiniteError(f"step {step}: {name} is not finite, and is not saved")
