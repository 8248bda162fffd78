"""The layout over devices and processes changes nothing: losses, rotations, what is compiled."""

import functools
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax import build_model, rolling_query
from rollingq_jax.models import resnet
from rollingq_jax.train.parallel import WRAPPERS, with_fsdp
from rollingq_jax.train.steps import eval_step, train_step
from rollingq_jax.train.train_state import create_state
from tests.parallel import small_model
from tests.parallel.processes import environment, free_address

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def plain():
    """20 steps on one device."""
    return small_model.run_plain()


@pytest.fixture(
    scope="module",
    params=["jit", *(pytest.param(name, marks=pytest.mark.slow) for name in ("fsdp", "pmap"))],
)
def over_eight(request):
    """The same on eight devices."""
    assert jax.device_count() == 8
    return small_model.run_layout(small_model.LAYOUTS[request.param])


def assert_same(records, expected):
    for step, (ours, theirs) in enumerate(zip(records, expected, strict=True)):
        scale = theirs["weight"]  # sums over examples: what is reported are their means
        for name, value in theirs.items():
            np.testing.assert_allclose(
                ours[name] / scale, value / scale, atol=1e-5, rtol=0, err_msg=f"{step} {name}"
            )


def test_the_reference_rolls_and_learns(plain):
    records, state = plain
    assert np.asarray(state.rolling.count).tolist() == [3, 3]
    means = [r["loss"] / r["weight"] for r in records]
    assert means[-1] != means[0] and np.isfinite(means).all()


def test_eight_devices_give_the_losses_of_one(plain, over_eight):
    assert_same(over_eight[0], plain[0])


def test_eight_devices_give_the_rotations_of_one(plain, over_eight):
    ours, theirs = over_eight[1].rolling, plain[1].rolling
    np.testing.assert_array_equal(ours.count, theirs.count)
    np.testing.assert_allclose(ours.rotation, theirs.rotation, atol=1e-5, rtol=0)
    assert np.abs(np.asarray(theirs.rotation) - np.eye(4)).max() > 0.1


@pytest.fixture(scope="module", params=["mult", "mmml", "jmt"])
def attending(request):
    """A run on one device of modalities that attend to each other, behind what it was made of."""
    fields = {"fusion": request.param, "quality_bias": 0.0, "steps": 10}
    return fields, *small_model.run_plain(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", sorted(small_model.LAYOUTS))
def test_modalities_that_attend_to_each_other_roll_as_on_one_device(attending, parallel):
    fields, records, state = attending
    ours, found, _ = small_model.run_layout(small_model.LAYOUTS[parallel], **fields)
    assert_same(ours, records)
    assert np.asarray(state.rolling.count).min() == 2
    np.testing.assert_array_equal(found.rolling.count, state.rolling.count)
    np.testing.assert_allclose(found.rolling.rotation, state.rolling.rotation, atol=1e-4, rtol=0)


def frames(step):
    """A global batch of images, some missing and some padding, and vectors."""
    rng = np.random.default_rng(step)
    return {
        "image": rng.normal(size=(16, 20, 24, 1)).astype(np.float32) + 1,
        "image_mask": rng.random(16) < 0.7,
        "vector": rng.normal(size=(16, 5)).astype(np.float32),
        "label": rng.integers(0, 3, 16).astype(np.int32),
        "example_mask": np.arange(16) < 13,
    }


@pytest.mark.slow
@pytest.mark.parametrize("parallel", sorted(small_model.LAYOUTS))
def test_averages_of_a_resnet_are_those_of_the_global_batch(parallel, monkeypatch):
    monkeypatch.setattr(resnet, "WIDTHS", (4, 8))
    kinds = {"image": {"kind": "resnet18"}, "vector": {"kind": "vector", "depth": 0}}
    net = build_model({"num_classes": 3, "dim": 8, "fusion": "concat", "encoders": kinds})
    tx, roller = optax.sgd(0.1), rolling_query()
    state = create_state(net, tx, roller, seed=0, batch=frames(0))
    step = functools.partial(train_step, model=net, tx=tx, roller=roller, schedule=None)
    evaluate = functools.partial(eval_step, model=net)
    layout = WRAPPERS.get(parallel)
    if layout is None:
        layout = functools.partial(with_fsdp, like=state, sizes=(2, 4), min_size=16)
    run = layout(step, evaluate)
    placed, plain = run.put_state(jax.tree.map(jnp.copy, state)), state
    for i in range(3):
        plain, sums, _ = jax.jit(step)(plain, {n: jnp.asarray(v) for n, v in frames(i).items()})
        placed, ours, _ = run.train_step(placed, run.put_batch(frames(i)))
        np.testing.assert_allclose(run.get(ours)["loss"], sums["loss"], rtol=1e-5)
        if i == 0:
            kernel = state.params["encoder_image"]["embed"]["conv"]["kernel"]
            real = frames(0)["image"][frames(0)["image_mask"] & frames(0)["example_mask"]]
            maps = jax.lax.conv_general_dilated(
                real, kernel, (2, 2), [(3, 3)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
            )
            found = plain.batch_stats["encoder_image"]["embed"]["norm"]
            np.testing.assert_allclose(found["mean"], 0.1 * maps.mean((0, 1, 2)), atol=1e-5)
    got = run.get(placed)
    for one, other in zip(
        jax.tree.leaves((got.batch_stats, got.params)),
        jax.tree.leaves((plain.batch_stats, plain.params)),
        strict=True,
    ):
        np.testing.assert_allclose(one, other, atol=2e-5, rtol=1e-4)
    evaluated = run.get(run.eval_step(placed, run.put_batch(frames(9)))[0])
    expected = jax.jit(evaluate)(plain.variables, None, frames(9))[0]
    np.testing.assert_allclose(evaluated["loss"], expected["loss"], rtol=1e-4)
    # In parts, as one device sees them: rows 0, 2, ... and 1, 3, ..., and the mean of their moves.
    parts = functools.partial(step, micro_batches=2)
    after = jax.jit(parts)(state, frames(0))[0].batch_stats
    halves = [jax.jit(step)(state, {n: v[i::2] for n, v in frames(0).items()})[0] for i in range(2)]
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *(half.batch_stats for half in halves))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), after, mean)


def test_eight_devices_give_the_norms_of_one(plain, over_eight):
    ours, theirs = over_eight[1].quality, plain[1].quality
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    steps = range(small_model.STEPS)  # the last batch of each five is padded
    weight = sum((11 if 19 - i in (4, 9, 14, 19) else 16) * 0.98**i for i in steps)
    np.testing.assert_allclose(theirs.weight, weight, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", sorted(small_model.LAYOUTS))
def test_two_processes_of_two_devices_give_the_same(plain, parallel, tmp_path):
    address = free_address()
    workers = [
        subprocess.Popen(
            [sys.executable, HERE / "worker.py", parallel, str(tmp_path / f"{i}.npz")]
            + [f"--coordinator={address}", "--num_processes=2", f"--process_id={i}"],
            env=environment(),
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        for worker in workers:
            errors = worker.communicate(timeout=300)[1]
            assert worker.returncode == 0, errors
    finally:
        for worker in workers:
            worker.kill()
    for i in range(2):
        with np.load(tmp_path / f"{i}.npz") as found:
            assert found["devices"].tolist() == [4, 2]
            losses = [r["loss"] / r["weight"] for r in plain[0]]
            np.testing.assert_allclose(found["losses"], losses, atol=1e-5, rtol=0)
            rolling = plain[1].rolling
            np.testing.assert_allclose(found["rotation"], rolling.rotation, atol=1e-5, rtol=0)
            np.testing.assert_array_equal(found["count"], rolling.count)


def equations(jaxpr):
    """All equations of a program, those of its inner programs too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def dtypes_by_primitive(function, *args):
    """What each primitive of a program reads: `{name: dtypes}`."""
    found = {}
    for equation in equations(jax.make_jaxpr(function)(*args).jaxpr):
        dtypes = {v.aval.dtype for v in equation.invars if hasattr(v.aval, "dtype")}
        found.setdefault(equation.primitive.name, set()).update(dtypes)
    return found


@pytest.mark.slow
def test_bfloat16_is_for_the_encoders_matrices_alone():
    step, state = small_model.step_and_state(dtype="bfloat16")
    batch = {n: jnp.asarray(v) for n, v in small_model.batch(0).items()}
    state, sums, roll = jax.jit(step)(state, batch)
    for leaf in jax.tree.leaves((state.params, state.opt_state, state.rolling, sums, roll)):
        assert leaf.dtype != jnp.bfloat16
    found = dtypes_by_primitive(step, state, batch)
    assert jnp.dtype(jnp.bfloat16) in found["dot_general"]  # it is in use
    for name in ("log", "rsqrt", "sqrt"):  # losses, norms, anchor
        assert jnp.dtype(jnp.bfloat16) not in found.get(name, ()), name
    # GELU's gradient has an exponential of its own, so softmax is looked at in the forward pass.
    net = small_model.model(dtype="bfloat16")
    found = dtypes_by_primitive(lambda p, b: net.apply(p, b)[0], state.variables, batch)
    assert found["exp"] == {jnp.dtype(jnp.float32)}
    assert jnp.dtype(jnp.bfloat16) in found["erf"]
