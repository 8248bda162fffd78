"""A state that is divided over devices: where its parts lie, and that nothing else changes."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from rollingq_jax.baselines.ogm import ogm
from rollingq_jax.errors import ConfigError
from rollingq_jax.train.config import check_config, default_config
from rollingq_jax.train.parallel import lay_out, state_specs, with_fsdp
from rollingq_jax.train.steps import ForwardPass, cross_entropy, train_step
from rollingq_jax.train.train_state import TrainState

SIZES = (2, 4)


def specs_by_name(state, size=4, **options):
    specs = jax.tree_util.tree_leaves_with_path(state_specs(state, size, **options))
    return {jax.tree_util.keystr(path, simple=True, separator="/"): spec for path, spec in specs}


def state_of(params, tx=None):
    """A state with these shapes of parameters."""
    tx = tx or optax.sgd(0.1, momentum=0.9)
    params = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in params.items()}
    number = jax.ShapeDtypeStruct((), jnp.int32)
    opt_state = jax.eval_shape(tx.init, params)
    return TrainState(number, params, opt_state, None, jax.eval_shape(jax.random.key, 0))


def test_the_largest_axis_that_divides_is_sharded():
    shapes = {"wide": (8, 12), "odd": (9, 8), "tall": (16, 4), "none": (3, 5), "bias": (12,)}
    found = specs_by_name(state_of(shapes))
    expected = {"wide": P(None, "fsdp"), "odd": P(None, "fsdp"), "tall": P("fsdp")}
    expected |= {"none": P(), "bias": P("fsdp")}
    for name, spec in expected.items():
        assert found[f"params/{name}"] == spec, name
        assert found[f"opt_state/0/trace/{name}"] == spec, name
    assert found["step"] == found["rng"] == P()


def test_small_arrays_stay_whole_and_rules_go_first():
    state = state_of({"query": (8, 16), "bias": (8,), "head": (16, 8)})
    rules = (("params/bias$", ("fsdp",)), ("query", ("fsdp",)), ("bias|head", ()))
    found = specs_by_name(state, rules=rules, min_size=100)
    assert found["params/query"] == found["opt_state/0/trace/query"] == P("fsdp")
    assert found["params/bias"] == P("fsdp") and found["opt_state/0/trace/bias"] == P()
    assert found["params/head"] == P()


@pytest.mark.parametrize(
    "rules, min_size, line",
    [
        ((("qury", ("fsdp",)),), 0, "config.mesh.rules has 'qury'; allowed: an expression that is"),
        ((("que", ()), ("query", ("fsdp",))), 0, "and in no earlier rule"),
        ((("query", (None, None, "fsdp")),), 0, r"for params/query of shape \[8, 6\]; allowed: at"),
        ((("query", (None, "fsdp")),), 0, "along an axis that divides by 4"),
        ((("query", ("fsdp", "fsdp")),), 0, "of them one 'fsdp'"),
        ((), 49, "config.mesh.fsdp is 4, and no array divides by it that has 49 elements; allowed"),
    ],
)
def test_rules_that_do_not_fit(rules, min_size, line):
    with pytest.raises(ConfigError, match=line):
        state_specs(state_of({"query": (8, 6)}), 4, rules=rules, min_size=min_size)


@pytest.mark.parametrize(
    "fields, line",
    [
        (
            {"mesh.fsdp": 3},
            "config.mesh is data 0, fsdp 3; allowed: sizes whose product is",
        ),
        ({"mesh.data": 4}, "config.mesh is data 4, fsdp 1; .* number of devices, which is 8"),
        ({"mesh.fsdp": 4, "batch_size": 20}, "config.batch_size is 20; allowed: a multiple of"),
    ],
)
def test_meshes_that_do_not_fit_the_devices(fields, line):
    config = default_config()
    config.update_from_flattened_dict(fields)
    check_config(config)
    with pytest.raises(ConfigError, match=line):
        lay_out(lambda: None, lambda: None, config, lambda: None)


def test_pmap_has_no_second_axis():
    config = default_config()
    config.update_from_flattened_dict({"mesh.fsdp": 4, "parallel": "pmap"})
    with pytest.raises(ConfigError, match="config.parallel is 'pmap' and config.mesh.fsdp is 4; a"):
        check_config(config)


def bytes_on_a_device(state, specs, size):
    sizes = jax.tree.map(lambda x, s: math.prod(x.shape) // (size if "fsdp" in s else 1), *(
        (t.params, t.opt_state, t.rolling) for t in (state, specs)
    ))  # fmt: skip
    return 4 * sum(jax.tree.leaves(sizes))


def test_the_papers_state_takes_a_quarter_on_each_of_four():
    from benchmarks import paper_scale

    state = jax.eval_shape(lambda: paper_scale.step_of(paper_scale.Scale())[1])
    specs = state_specs(state, 4, min_size=default_config().mesh.min_size)
    part, whole = (bytes_on_a_device(state, specs, size) for size in (4, 1))
    assert 0.25 < part / whole < 0.26


X = np.random.default_rng(0).normal(size=(4, 16, 8)).astype(np.float32)


def two_layers(_, params, state, batch, axis_name):
    """Losses of a network of two layers, its first being an encoder."""
    hidden = jnp.tanh(batch["a"] @ params["encoder_a"]["kernel"])
    logits = hidden @ params["head"] + params["bias"][None]
    out = {"present": {"a": jnp.ones(logits.shape[0], bool)}, "probe_logits": {}}
    tx_args = {"scores": jnp.ones(1), "rng": jax.random.fold_in(state.rng, state.step)}
    tx_args = tx_args if state.baseline else {}  # OGM's, the gradient of a batch as a whole
    losses = cross_entropy(logits, batch["label"])
    return losses, ForwardPass(logits, out, losses, state.baseline, tx_args)


@pytest.fixture(scope="module")
def two_layer_state():
    rng = np.random.default_rng(1)
    params = {
        "encoder_a": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)},
        "head": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
        "bias": jnp.zeros(3),
    }
    return TrainState(jnp.int32(0), params, (), None, jax.random.key(0))


@pytest.mark.parametrize(
    "tx, micro_batches",
    [
        (optax.chain(optax.clip_by_global_norm(0.01), optax.sgd(1.0, momentum=0.9)), 2),
        (optax.lamb(0.1, weight_decay=0.1), 1),
        (optax.chain(ogm(0.8, ("a",), noise=True), optax.adamw(0.1)), 1),
        (optax.adafactor(0.1, min_dim_size_to_factor=8), 1),
    ],
    ids=["global norm", "trust ratio", "noise", "factors"],
)
def test_optimizers_that_look_across_arrays_see_whole_ones(tx, micro_batches, two_layer_state):
    baseline = {"ogm": jnp.ones(())} if micro_batches == 1 else ()
    state = two_layer_state.replace(opt_state=tx.init(two_layer_state.params), baseline=baseline)
    fixed = {"model": None, "tx": tx, "roller": None, "schedule": None, "loss_fn": two_layers}
    step = functools.partial(train_step, **fixed, micro_batches=micro_batches)
    plain_step, layout = jax.jit(step), with_fsdp(step, lambda: None, state, SIZES)
    plain, parts = state, layout.put_state(jax.tree.map(jnp.copy, state))
    for x in X:
        batch = {"a": x, "label": (np.arange(16) % 3).astype(np.int32)}
        batch["example_mask"] = np.arange(16) < 13
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            plain, sums, _ = plain_step(plain, batch)
            parts, sharded_sums, _ = layout.train_step(parts, layout.put_batch(batch))
        np.testing.assert_allclose(sharded_sums["loss"], sums["loss"], rtol=1e-5)
    for one, other in zip(
        jax.tree.leaves(parts.params), jax.tree.leaves(plain.params), strict=True
    ):
        np.testing.assert_allclose(one, other, atol=1e-5, rtol=1e-5)
    kernel = parts.params["encoder_a"]["kernel"]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(8, 4)}


def test_an_evaluation_sees_whole_arrays(two_layer_state):
    def evaluate(variables, rotation, batch, axis_name):
        out = batch["a"] @ variables["params"]["encoder_a"]["kernel"]
        return jax.lax.psum(jnp.sum(out), axis_name), out

    layout = with_fsdp(train_step, evaluate, two_layer_state, SIZES)
    batch = layout.put_batch({"a": X[0]})
    total, rows = layout.eval_step(layout.put_state(two_layer_state), batch)
    expected = X[0] @ two_layer_state.params["encoder_a"]["kernel"]
    np.testing.assert_allclose(layout.get_rows(rows), expected, atol=1e-5)
    np.testing.assert_allclose(total, expected.sum(), rtol=1e-5)


def test_the_mesh_is_of_the_sizes_that_a_configuration_has(two_layer_state):
    config = default_config()
    config.update_from_flattened_dict({"mesh.fsdp": 2, "mesh.min_size": 16})

    def mesh():
        layout = lay_out(train_step, lambda: None, config, lambda: two_layer_state)
        return dict(layout.put_state(two_layer_state).step.sharding.mesh.shape)

    assert mesh() == {"data": 4, "fsdp": 2}
    config.mesh.data, config.mesh.fsdp = 8, 1
    assert mesh() == {"data": 8}
