"""The same pure steps over the devices of one or many processes, through jit or pmap.

jit: a mesh of all devices with the axis `data`, batches sharded along it, everything else
replicated; with `config.mesh.fsdp` a second axis, `fsdp`, along which the state is sharded too.
pmap: one replica a device. In today's JAX `jax.pmap` is itself a jit of `shard_map` and in
maintenance mode; it stays for those who ask for it, and has no second axis.

In every layout the part of the step that sees examples is mapped over the devices and reduces its
sums itself, so the sums behind an update or a roll are the global batch's and replicas cannot
differ.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from rollingq_jax.errors import ConfigError
from rollingq_jax.train.steps import AxisName, ForwardPass, loss_and_gradient, psum
from rollingq_jax.train.train_state import TrainState

AXIS, FSDP = "data", "fsdp"
EVERYWHERE = PartitionSpec()


def _as_it_is(tree: Any) -> Any:
    return tree


class Parallel(NamedTuple):
    """Steps over all devices, and the way into and out of their layout.

    `train_step` donates the state it is given.
    """

    put_state: Callable[[TrainState], TrainState]  # as it was read or made -> all devices
    put_batch: Callable[[Mapping[str, np.ndarray]], dict[str, jax.Array]]  # this process's rows
    train_step: Callable[..., Any]  # (state, batch)
    eval_step: Callable[..., Any]  # (state, batch) -> (sums, examples)
    get_rows: Callable[[Any], Any]  # examples of the global batch, as NumPy arrays
    like: Callable[[Any], Any] = _as_it_is  # abstract state -> the same, laid out as it is read
    get: Callable[[Any], Any] = _as_it_is  # replicated tree -> one copy of it
    get_learned: Callable[[Any], Any] = _as_it_is  # state as it was read -> whole, for a model


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


def lay_out(
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    config: Any,
    like: Callable[[], TrainState],
) -> Parallel:
    """The layout that `config.parallel` and `config.mesh` describe.

    Args:
      train_step: `(state, batch, axis_name, gradient_fn)`.
      eval_step: `(variables, rotation, batch, axis_name)`.
      config: the configuration, checked.
      like: gives a state, which may be abstract.

    Raises:
      ConfigError: the batch or the mesh does not fit the devices, or a rule the state.
    """
    check_batch_size(config.batch_size)
    mesh, devices = config.mesh, jax.device_count()
    data = mesh.data or devices // mesh.fsdp
    if data * mesh.fsdp != devices:
        raise ConfigError(
            f"config.mesh is data {mesh.data}, fsdp {mesh.fsdp}; "
            f"allowed: sizes whose product is the number of devices, which is {devices}"
        )
    if mesh.fsdp == 1:
        return WRAPPERS[config.parallel](train_step, eval_step)
    return with_fsdp(
        train_step,
        eval_step,
        like(),
        (data, mesh.fsdp),
        rules=mesh.rules,
        min_size=mesh.min_size,
    )


def make_mesh(sizes: Sequence[int], names: Sequence[str]) -> Mesh:
    """All devices, in an order in which neighbors along an axis are near in the network."""
    return jax.make_mesh(tuple(sizes), tuple(names), axis_types=(AxisType.Auto,) * len(names))


def _gather(tree: Any) -> Any:
    """A tree in parts, from all processes, as NumPy arrays."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def place(tree: Any, shardings: Any) -> Any:
    """Lays a tree out over the devices of every process; all processes hold the same tree.

    What is laid out that way already stays where it is.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)

    def put(x: Any, sharding: NamedSharding) -> jax.Array:
        if isinstance(x, jax.Array) and x.sharding == sharding:
            return x
        if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            bits = put(jax.random.key_data(x), sharding)
            return jax.random.wrap_key_data(bits, impl=jax.random.key_impl(x))
        whole = np.asarray(x)
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(put, tree, shardings)


def _over_mesh(
    mesh: Mesh,
    train_step: Callable[..., Any],
    evaluate: Callable[..., Any],
    shardings_of: Callable[[TrainState], Any],
) -> Parallel:
    """Compiled steps whose batches are divided over all axes of a mesh."""
    rows = NamedSharding(mesh, PartitionSpec(mesh.axis_names))

    def put_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.make_array_from_process_local_data(rows, np.asarray(value))
            for name, value in batch.items()
        }

    return Parallel(
        put_state=lambda state: place(state, shardings_of(state)),
        put_batch=put_batch,
        train_step=train_step,
        eval_step=jax.jit(evaluate),
        get_rows=_gather,
    )


def with_jit(train_step: Callable[..., Any], eval_step: Callable[..., Any]) -> Parallel:
    """Steps under jit with NamedSharding, the state on every device.

    `shard_map` and not XLA's own partitioning, which would gather what it cannot split: a loop over
    a sharded axis, or a kernel it does not know.
    """
    mesh = make_mesh([jax.device_count()], [AXIS])
    replicated = NamedSharding(mesh, EVERYWHERE)
    split = PartitionSpec(AXIS)

    def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> Any:
        return eval_step(state.variables, state.rotation, batch, axis_name=AXIS)

    mapped = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(EVERYWHERE, split), check_vma=False
    )
    train = functools.partial(train_step, axis_name=AXIS)
    return _over_mesh(
        mesh,
        jax.jit(mapped(train, out_specs=EVERYWHERE), donate_argnums=0),
        mapped(evaluate, out_specs=(EVERYWHERE, split)),
        lambda state: jax.tree.map(lambda _: replicated, state),
    )


def with_fsdp(
    train_step: Callable[..., Any],
    eval_step: Callable[..., Any],
    like: TrainState,
    sizes: tuple[int, int],
    *,
    rules: Sequence[tuple[str, Sequence[str | None]]] = (),
    min_size: int = 0,
) -> Parallel:
    """Steps under jit, the state sharded over the second of two mesh axes, the batch over both.

    Loss and gradient are mapped over the devices as without sharding. Each array of parameters is
    gathered inside, whole, before the model sees it, so attention in a loop over samples, kernels
    and dropout keys are what they were; the transpose of that gather sums an array's gradient and
    leaves each device its part. The rest of the step is written on whole arrays and XLA divides it:
    an optimizer may look across an array or the whole tree (a global norm, a trust ratio, noise of
    a gradient's shape), which on a device's part would be another function. docs/scaling.md has
    the measurements behind this.

    There is no third axis for a model's matrices: a parameter is whole before it is used, so such
    an axis would divide no work that `fsdp` does not.

    Args:
      train_step, eval_step: as in `lay_out`.
      like: a state, which may be abstract.
      sizes: devices along `data` and along `fsdp`.
      rules, min_size: see `state_specs`.
    """
    axes = (AXIS, FSDP)
    mesh = make_mesh(sizes, axes)
    specs = state_specs(like, sizes[1], rules=rules, min_size=min_size)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    split = PartitionSpec(axes)
    seen = specs.replace(opt_state=(), ema=None)  # what a loss reads

    def gather(params: Any, specs: Any) -> Any:
        def whole(part: jax.Array, spec: PartitionSpec) -> jax.Array:
            if FSDP not in spec:
                return part
            return jax.lax.all_gather(part, FSDP, axis=tuple(spec).index(FSDP), tiled=True)

        return jax.tree.map(whole, params, specs)

    def reduce(tree: Any, _: AxisName) -> Any:
        loss, grads = tree
        # The transpose of `all_gather` has summed a divided array's gradient along `fsdp` already.
        parted = [FSDP in spec for spec in jax.tree.leaves(specs.params)]
        leaves, structure = jax.tree.flatten(grads)
        leaves = [psum(g, AXIS if part else axes) for g, part in zip(leaves, parted, strict=True)]
        return psum(loss, axes), jax.tree.unflatten(structure, leaves)

    def gradient_fn(losses_of, state, batch, weight, _, micro_batches=1):
        def losses_of_parts(params, state, batch, axis_name):
            return losses_of(gather(params, specs.params), state, batch, axis_name)

        mapped = jax.shard_map(
            functools.partial(
                loss_and_gradient,
                losses_of_parts,
                axis_name=axes,
                reduce=reduce,
                micro_batches=micro_batches,
            ),
            mesh=mesh,
            in_specs=(seen, split, split),
            out_specs=(
                (EVERYWHERE, specs.params),
                ForwardPass(
                    logits=split,
                    out=split,
                    main=split,
                    baseline=EVERYWHERE,
                    tx_args=EVERYWHERE,
                    batch_stats=EVERYWHERE,
                ),
            ),
            check_vma=False,
        )
        # Without what no loss reads, which would be one more input to divide.
        return mapped(state.replace(opt_state=(), ema=None), batch, weight)

    def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> Any:
        def on_parts(state, batch):
            name = "params" if state.ema is None else "ema"
            whole = gather(getattr(state, name), getattr(specs, name))
            state = state.replace(params=whole, ema=None)
            return eval_step(state.variables, state.rotation, batch, axis_name=axes)

        return jax.shard_map(
            on_parts,
            mesh=mesh,
            in_specs=(specs.replace(opt_state=()), split),
            out_specs=(EVERYWHERE, split),
            check_vma=False,
        )(state.replace(opt_state=()), batch)

    replicated = NamedSharding(mesh, EVERYWHERE)
    step = jax.jit(
        functools.partial(train_step, gradient_fn=gradient_fn),
        donate_argnums=0,
        out_shardings=(shardings, replicated, replicated),
    )

    def in_parts(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    def get_learned(state: TrainState) -> TrainState:
        return _gather(place(state, shardings).replace(opt_state=(), rng=()))

    return _over_mesh(mesh, step, evaluate, lambda _: shardings)._replace(
        like=lambda state: jax.tree.map(in_parts, state, shardings), get_learned=get_learned
    )


def state_specs(
    state: TrainState,
    size: int,
    *,
    rules: Sequence[tuple[str, Sequence[str | None]]] = (),
    min_size: int = 0,
) -> TrainState:
    """Where the axis `fsdp` lies in each array of a state, as a tree of `PartitionSpec`.

    Parameters, their average and the optimizer's state are sharded; the rest, which is small and
    the same on every device, is not. An array is sharded as the first rule says whose expression is
    found in its name, such as `params/fusion/query/kernel` or
    `opt_state/1/0/trace/fusion/query/kernel`. Without a rule it is sharded along its largest axis
    that divides by the number of devices.

    Args:
      state: may be abstract.
      size: devices along `fsdp`.
      rules: pairs of a regular expression and, for each axis of the array, None or "fsdp"; axes
        that are left out are None, and `()` keeps the array whole.
      min_size: an array of fewer elements stays whole, unless a rule speaks of it.

    Raises:
      ConfigError: a rule does not fit an array, or fits none; or nothing is sharded.
    """
    unused = dict.fromkeys(pattern for pattern, _ in rules)

    def spec_of(path: Any, leaf: Any) -> PartitionSpec:
        name, shape = jax.tree_util.keystr(path, simple=True, separator="/"), np.shape(leaf)
        if not name.startswith(("params/", "opt_state/", "ema/")):
            return EVERYWHERE
        for pattern, axes in rules:
            if re.search(pattern, name):
                unused.pop(pattern, None)
                fits = len(axes) <= len(shape) and axes.count(FSDP) <= 1
                if not fits or any(a and n % size for a, n in zip(axes, shape, strict=False)):
                    raise ConfigError(
                        f"config.mesh.rules has {axes!r} for {name} of shape {list(shape)}; "
                        f"allowed: at most {len(shape)} entries, of them one {FSDP!r}, along an "
                        f"axis that divides by {size}"
                    )
                return PartitionSpec(*axes)
        divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
        if math.prod(shape) < min_size or not divisible:
            return EVERYWHERE
        largest = max(divisible, key=shape.__getitem__)
        return PartitionSpec(*[None] * largest, FSDP)

    specs = jax.tree_util.tree_map_with_path(spec_of, state)
    if unused:
        raise ConfigError(
            f"config.mesh.rules has {next(iter(unused))!r}; allowed: an expression that is found "
            "in the name of a parameter, such as params/fusion/query/kernel, and in no earlier rule"
        )
    if all(FSDP not in spec for spec in jax.tree.leaves(specs)):
        raise ConfigError(
            f"config.mesh.fsdp is {size}, and no array divides by it that has {min_size} elements; "
            "allowed: 1, or a smaller config.mesh.min_size"
        )
    return specs


def with_pmap(train_step: Callable[..., Any], eval_step: Callable[..., Any]) -> Parallel:
    """Steps under pmap, which today is jit of `shard_map` with arrays of one row a device."""
    count = jax.local_device_count()

    def put_batch(batch: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
        return {
            name: jax.device_put(
                np.asarray(value).reshape(count, -1, *np.shape(value)[1:]), stacked
            )
            for name, value in batch.items()
        }

    def evaluate(state: TrainState, batch: dict[str, jax.Array]) -> Any:
        return eval_step(state.variables, state.rotation, batch, axis_name=AXIS)

    def get_rows(tree: Any) -> Any:
        local = jax.tree.map(
            lambda x: np.asarray(x).reshape(-1, *x.shape[2:]), jax.device_get(tree)
        )
        return _gather(local)

    mesh = Mesh(np.array(jax.local_devices()), (AXIS,))
    stacked = NamedSharding(mesh, PartitionSpec(AXIS))

    def put_state(state: TrainState) -> TrainState:
        copies = jax.tree.map(lambda x: jax.numpy.stack([x] * count), state)
        return jax.device_put(copies, stacked)

    def get(tree: Any) -> Any:
        # The first device's copy. `x[0]` would be a program over all devices for each leaf, with a
        # collective in it; a CPU's devices share their threads, and several of them can lock.
        return jax.tree.map(lambda x: x.addressable_shards[0].data[0], tree)

    return Parallel(
        put_state=put_state,
        get=get,
        put_batch=put_batch,
        train_step=jax.pmap(
            functools.partial(train_step, axis_name=AXIS), axis_name=AXIS, donate_argnums=0
        ),
        eval_step=jax.pmap(evaluate, axis_name=AXIS),
        get_rows=get_rows,
    )


WRAPPERS = {"jit": with_jit, "pmap": with_pmap}
