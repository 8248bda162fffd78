"""The same pure steps over the devices of one or many processes, through jit or pmap.

jit: a `data` mesh axis over all devices, batches sharded along it, everything else replicated.
pmap: one replica a device. Either way the step is mapped over the axis and reduces its sums over it
itself, so the sums behind an update or a roll are the global batch's and replicas cannot differ.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from rollingq_jax.errors import ConfigError
from rollingq_jax.train.train_state import TrainState

AXIS = "data"


class Parallel(NamedTuple):
    """Steps over all devices, and the way into and out of their layout.

    `train_step` donates the state it is given.
    """

    put_state: Callable[[TrainState], TrainState]  # host or single-device -> all devices
    get: Callable[[Any], Any]  # replicated tree -> one copy of it
    put_batch: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]  # this process's rows
    train_step: Callable[..., Any]  # (state, batch)
    eval_step: Callable[..., Any]  # (state, batch) -> (sums, examples)
    get_rows: Callable[[Any], Any]  # examples of the global batch, as NumPy arrays


def check_batch_size(batch_size: int) -> None:
    """Every device gets the same number of rows.

    Raises:
      ConfigError: the global batch does not divide by the number of devices.
    """
    if batch_size % jax.device_count():
        raise ConfigError(
            f"config.batch_size is {batch_size}; "
            f"allowed: a multiple of the number of devices, which is {jax.device_count()}"
        )


def _gather_rows(tree: Any) -> Any:
    """Rows of a batch-sharded tree from all processes."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def replicate(tree: Any, sharding: NamedSharding) -> Any:
    """A copy of a tree on every device of every process; all processes hold the same tree."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: Any) -> jax.Array:
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):  # `device_put` refuses these here
            bits = place(jax.random.key_data(x))
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
        return jax.make_array_from_process_local_data(sharding, np.asarray(x))

    return jax.tree.map(place, tree)


def with_jit(train_step: Callable[..., Any], eval_step: Callable[..., Any]) -> Parallel:
    """Steps under jit with NamedSharding.

    `shard_map` and not XLA's own partitioning, which would gather what it cannot split: a loop over
    a sharded axis, or a kernel it does not know.
    """
    mesh = Mesh(np.array(jax.devices()), (AXIS,))
    replicated = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec(AXIS))

    def put_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(rows, np.asarray(value))
            for name, value in batch.items()
        }

    def evaluate(state: TrainState, batch: dict[str, jax.Array]):
        return eval_step(state.variables, state.rotation, batch, axis_name=AXIS)

    everywhere, split = PartitionSpec(), PartitionSpec(AXIS)
    mapped = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(everywhere, split), check_vma=False
    )
    train = functools.partial(train_step, axis_name=AXIS)
    return Parallel(
        put_state=lambda state: replicate(state, replicated),
        get=lambda tree: tree,
        put_batch=put_batch,
        train_step=jax.jit(mapped(train, out_specs=everywhere), donate_argnums=0),
        eval_step=jax.jit(mapped(evaluate, out_specs=(everywhere, split))),
        get_rows=_gather_rows,
    )


def with_pmap(train_step: Callable[..., Any], eval_step: Callable[..., Any]) -> Parallel:
    """Steps under pmap."""
    count = jax.local_device_count()

    def put_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(
                np.asarray(value).reshape(count, -1, *np.shape(value)[1:]), stacked
            )
            for name, value in batch.items()
        }

    def evaluate(state: TrainState, batch: dict[str, jax.Array]):
        return eval_step(state.variables, state.rotation, batch, axis_name=AXIS)

    def get_rows(tree: Any) -> Any:
        local = jax.tree.map(
            lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), jax.device_get(tree)
        )
        return _gather_rows(local)

    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    stacked = NamedSharding(mesh, PartitionSpec(AXIS))

    def put_state(state: TrainState) -> TrainState:
        copies = jax.tree.map(lambda x: jax.numpy.stack([x] * count), state)
        return jax.device_put(copies, stacked)

    return Parallel(
        put_state=put_state,
        get=lambda tree: jax.tree.map(lambda x: x[0], tree),
        put_batch=put_batch,
        train_step=jax.pmap(
            functools.partial(train_step, axis_name=AXIS), axis_name=AXIS, donate_argnums=0
        ),
        eval_step=jax.pmap(evaluate, axis_name=AXIS),
        get_rows=get_rows,
    )


WRAPPERS = {"jit": with_jit, "pmap": with_pmap}
