"""Rows of rotations, and what is said of one that had drifted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax import rolling_query
from rollingq_jax.rotation import MAX_DRIFT, orthogonality_error
from rollingq_jax.train.console import Console
from rollingq_jax.train.meter import Meter
from rollingq_jax.train.snapshot import turn_of
from rollingq_jax.train.steps import Roll

HEADS, WIDTH = 2, 6


def rolled(drift):
    """State and check of a roll of both heads, from a rotation of which the first is stretched."""
    roller = rolling_query(beta=0.0, rho=1.0)
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(HEADS, WIDTH)), jnp.float32)
    keys = jnp.asarray(rng.normal(size=(2, 3, HEADS, WIDTH)), jnp.float32)
    state = roller.init(2, WIDTH, HEADS)
    stretched = state.rotation.at[0, 2].multiply(1 + drift)
    state = roller.observe(state._replace(rotation=stretched), query, keys)
    state, info = roller.update(state, query)
    nothing = jnp.zeros(HEADS)
    return state, jax.device_get(Roll(info, query, nothing, nothing))


class Setup:
    epoch_steps = 4


@pytest.fixture
def meter():
    return Meter(None, Setup, {}, {}, skip=False)


def test_a_rotation_that_has_drifted_is_mended_and_told(meter, capsys):
    state, roll = rolled(drift=1e-3)
    assert roll.info.rolled.tolist() == [True, True]
    assert roll.info.mended.tolist() == [True, False]
    # A Newton step squares the error, 2e-3 here.
    assert float(orthogonality_error(state.rotation).max()) < 5e-6
    rows = meter.roll_rows(6, roll)
    assert [row.get("mended", False) for row in rows] == [True, False]
    assert [(row["step"], row["epoch"], row["head"]) for row in rows] == [(6, 2, 0), (6, 2, 1)]
    console = object.__new__(Console)
    console._first, console._rotations_shown = True, 0
    console.show(rows)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("; R had drifted from orthogonal and is mended")
    assert lines[1].startswith("epoch 2, head 1: rotated the query by ")
    assert not lines[1].endswith("mended")


def test_a_rotation_within_rounding_stays(meter):
    _, roll = rolled(drift=MAX_DRIFT / 10)
    assert roll.info.mended.tolist() == [False, False]
    assert not any("mended" in row for row in meter.roll_rows(6, roll))


def test_the_last_turn_of_the_first_head_is_kept_until_it_is_taken(meter):
    _, roll = rolled(drift=0.0)
    meter.roll_rows(6, roll)
    turn = meter.take_turn()
    assert turn == turn_of(roll)
    np.testing.assert_array_equal(np.asarray(turn["query"], np.float32), roll.query[0])
    assert meter.take_turn() is None
    rolled_second = roll._replace(info=roll.info._replace(rolled=np.array([False, True])))
    assert len(meter.roll_rows(7, rolled_second)) == 1 and meter.take_turn() is None
