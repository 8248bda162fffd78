"""Checkpoints of a state in parts: into any layout and back, and damage in a part is found."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath

from rollingq_jax.errors import NonFiniteError
from rollingq_jax.train.checkpoint import (
    Checkpoints,
    DamagedError,
    checksums,
    is_divided,
    to_host,
)
from rollingq_jax.train.parallel import with_fsdp
from rollingq_jax.train.steps import train_step
from rollingq_jax.train.train_state import TrainState

RECORD = {"best": {"step": -1}}


@pytest.fixture(scope="module")
def state():
    rng = np.random.default_rng(1)
    params = {
        "encoder_a": {"kernel": jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)},
        "head": jnp.asarray(rng.normal(size=(16, 3)), jnp.float32),
        "bias": jnp.zeros(3),
    }
    opt_state = optax.sgd(0.1, momentum=0.9).init(params)
    return TrainState(jnp.int32(0), params, opt_state, None, jax.random.key(0))


def laid_out(state, sizes, **options):
    """The layout over so many devices, and the state in it; whole on one device for None."""
    if sizes is None:
        return state, jax.eval_shape(lambda: state)
    layout = with_fsdp(train_step, lambda: None, state, sizes, **options)
    return layout.put_state(state), layout.like(jax.eval_shape(lambda: state))


@pytest.mark.parametrize("saved", [None, (2, 4)], ids=["whole", "2 x 4"])
def test_a_checkpoint_is_read_into_any_layout(saved, state, tmp_path):
    placed, _ = laid_out(state, saved)
    expected = checksums(to_host(state))
    with Checkpoints(epath.Path(tmp_path) / "c", keep=1) as checkpoints:
        checkpoints.save(placed, RECORD)
        rows_first = {"rules": (("encoder_a", ("fsdp",)),)}
        for sizes, options in ((None, {}), ((2, 4), {}), ((4, 2), {}), ((2, 4), rows_first)):
            _, like = laid_out(state, sizes, **options)
            found, record = checkpoints.restore(0, like)
            assert checksums(to_host(found)) == expected
            assert record["arrays"] == {name: one.told for name, one in expected.items()}
            kernel = found.params["encoder_a"]["kernel"]
            assert is_divided(kernel) == (sizes is not None)
            if sizes is not None:
                assert kernel.sharding == like.params["encoder_a"]["kernel"].sharding
        learned, _ = checkpoints.restore_params(0, lambda record: state.params)
        chex.assert_trees_all_equal(learned.params, state.params)


def test_a_part_that_is_damaged_or_not_finite_is_found(state, tmp_path, monkeypatch):
    placed, like = laid_out(state, (2, 4))
    kernel = placed.params["head"]
    with Checkpoints(epath.Path(tmp_path) / "c", keep=1) as checkpoints:
        bad = placed.replace(params=placed.params | {"head": kernel.at[9, 1].set(jnp.nan)})
        with pytest.raises(NonFiniteError, match="step 0: params/head is not finite"):
            checkpoints.save(bad, RECORD)
        checkpoints.save(placed, RECORD)
        read = Checkpoints._read

        def changed(self, step, item, args):
            tree = read(self, step, item, args)
            if item == "state":
                tree["params"]["head"] = tree["params"]["head"].at[9, 1].multiply(1.000001)
            return tree

        monkeypatch.setattr(Checkpoints, "_read", changed)
        with pytest.raises(DamagedError, match="its checksum of params/head is wrong"):
            checkpoints.restore(0, like)
