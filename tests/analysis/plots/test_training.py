import numpy as np
import pytest

from rollingq_jax.analysis.plots import training as curves

ROWS = [
    {"step": 5, "split": "train", "loss": 2.0},
    {"step": 10, "split": "valid", "accuracy": 0.3, "attention_share/b": 0.4},
    {"step": 10, "split": "roll", "head": 0, "imbalance_before": 0.5, "imbalance_after": 0.1,
     "angle_degrees": 40.0},
    {"step": 10, "split": "roll", "head": 2, "imbalance_before": 0.7, "imbalance_after": 0.1,
     "angle_degrees": 60.0},
    {"step": 20, "split": "valid", "accuracy": None, "attention_share/a": 0.6},
    {"step": 30, "split": "valid", "accuracy": float("nan")},
    {"step": 40, "split": "valid", "accuracy": 0.4},
    {"step": 40, "split": "valid", "accuracy": 0.5},
    {"step": 35, "split": "valid", "accuracy": True},
    {"step": 15, "split": "roll", "head": 0},
]  # fmt: skip


def test_a_curve_keeps_numbers_alone_and_the_last_of_a_step():
    x, y = curves.curve([row for row in ROWS if row["step"] != 35], "valid", "accuracy")
    np.testing.assert_allclose(x, [1.0, 4.0])
    np.testing.assert_allclose(y, [0.3, 0.5])


def test_an_empty_curve_is_empty():
    x, y = curves.curve([], "valid", "accuracy")
    assert len(x) == len(y) == 0


def test_heads_that_roll_together_are_one_event():
    first, second = curves.rolls([row for row in ROWS if row["step"] != 35])
    assert first == (1.0, 2, pytest.approx(0.6), pytest.approx(0.1), 50.0)
    assert second.epoch == 1.5 and np.isnan(second.angle_degrees)


@pytest.mark.parametrize(
    "steps, expected", [([], 1.0), ([18], 18.0), ([18, 36, 54], 18.0), ([0, 7, 14], 7.0)]
)
def test_steps_per_epoch(steps, expected):
    rows = [{"step": step, "split": "valid"} for step in steps]
    assert curves.steps_per_epoch(rows) == expected


def test_modalities_are_found_and_sorted():
    assert curves.modalities(ROWS, "attention_share") == ["a", "b"]


@pytest.mark.parametrize("value", [None, True, "1", float("nan"), float("inf"), [1]])
def test_what_is_no_number(value):
    assert not curves.is_number(value)


def test_what_is_a_number():
    assert all(curves.is_number(v) for v in (0, 1.5, np.float32(2), np.int64(3)))
