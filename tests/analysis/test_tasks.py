"""Losses, answers and scores of each task, against values worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.analysis import tasks
from rollingq_jax.analysis.metrics import Predictions
from rollingq_jax.data.dataset import TASKS
from rollingq_jax.data.preprocessing import InputSpec
from rollingq_jax.train.steps import add_sums, batch_sums, finish, psum

LOG_2 = math.log(2)
VALUES = tasks.regression([10.0], [2.0])


def answers(probabilities, label):
    return Predictions(np.asarray(probabilities, np.float64), np.asarray(label), {}, {})


@pytest.mark.parametrize(
    ("score", "label", "expected"),
    [
        ([0.9, 0.8, 0.7, 0.6], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([0.1, 0.2, 0.3], [0, 1, 1], 1.0),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 0, 0], 0.25),  # equal scores share a threshold
        ([0.9, 0.5, 0.5], [0, 1, 0], 1 / 3),
        ([np.nan, 0.2], [1, 0], 0.5),  # no answer comes last
        ([0.3, 0.4], [0, 0], math.nan),
    ],
)
def test_average_precision(score, label, expected):
    found = tasks.average_precision(np.array(score), np.array(label))
    np.testing.assert_allclose(found, expected, rtol=1e-12)


def test_scores_of_sets():
    label = [[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0]]
    probability = [[0.9, 0.6, 0.1], [0.4, 0.7, 0.2], [0.5, 0.8, 0.3], [np.nan] * 3]
    found = tasks.set_scores(answers(probability, label), 3, ("x", "y", "z"))
    # x: TP 1, FP 1, FN 1; y: TP 2, FP 1, FN 0; z never occurs, nor is it given.
    assert found["macro_f1"] == pytest.approx((2 / 4 + 4 / 5) / 2)
    assert found["micro_f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    assert found["label_accuracy"] == pytest.approx((2 + 2 + 2 + 0) / 12)
    assert found["exact_match"] == 0
    # x by score: 1, 0, 1; y: 1, 1, 0; the mean is over labels that some example has.
    assert found["map"] == pytest.approx(((1 + 2 / 3) / 2 + 1) / 2)
    assert math.isnan(found["per_label"]["z"]["average_precision"])
    assert [row["examples"] for row in found["per_label"].values()] == [2, 2, 0]


def test_scores_of_values():
    label = np.array([[-2.0], [0.0], [0.4], [3.0], [1.0]], np.float32)
    value = [[-1.0], [-0.2], [1.6], [2.4], [np.nan]]
    found = tasks.value_scores(answers(value, label), 1, ())
    assert found["mae"] == pytest.approx((1 + 0.2 + 1.2 + 0.6) / 4, rel=1e-6)
    assert found["acc2"] == pytest.approx(3 / 5)  # all but the second and the last
    assert found["acc2_nonzero"] == pytest.approx(3 / 4)
    assert found["acc7"] == pytest.approx(1 / 5)  # -0.2 is 0; 0.4 is 0 and 1.6 is 2
    x, y = np.array(value)[:4, 0], label[:4, 0]
    assert found["correlation"] == pytest.approx(np.corrcoef(x, y)[0, 1])
    cov = np.cov(x, y, bias=True)
    ccc = 2 * cov[0, 1] / (cov[0, 0] + cov[1, 1] + (x.mean() - y.mean()) ** 2)
    assert found["ccc"] == pytest.approx(ccc)
    several = tasks.value_scores(answers(np.hstack([value, label]), np.hstack([label] * 2)), 2, ())
    assert several["mae"] == pytest.approx(found["mae"] / 2, rel=1e-6) and "acc2" not in several
    assert "acc2" not in tasks.value_scores(answers(value, label * 2), 1, ())


def test_concordance_by_its_formula():
    # Variances 2/3 and 8/3, covariance 4/3, means 2 apart: 2 (4/3) / (2/3 + 8/3 + 4).
    assert tasks.concordance(np.array([1, 2, 3]), np.array([2, 4, 6])) == pytest.approx(4 / 11)
    assert tasks.concordance(np.array([1, 2, 3]), np.array([1, 2, 3])) == pytest.approx(1)
    assert math.isnan(tasks.concordance(np.array([1, 1]), np.array([1, 1])))


def test_losses_and_answers():
    z = jnp.array([[0.0, 0.0], [2.0, jnp.nan]])
    label = jnp.array([[1, 0], [1, 1]], jnp.int32)
    np.testing.assert_allclose(tasks.MULTI.loss(z, label)[0], LOG_2, rtol=1e-6)
    np.testing.assert_array_equal(tasks.MULTI.answer(z), [[0.5, 0.5], [np.nan, np.nan]])
    # Deviation 2 and mean 10: 0.5 answers 11, which is 1 from 12, the standardized 1.
    half, target = jnp.array([[0.5]]), jnp.array([[12.0]])
    assert VALUES.answer(half) == 11 and VALUES.step_scores(half, target)["mae"] == 1
    assert VALUES.loss(half, target) == 0.5
    assert tasks.regression([10.0], [2.0], "mse").loss(half, target) == 0.25


def of_task(task, rng, rows):
    """Outputs and labels."""
    label = rng.integers(0, 2, (rows, 3)).astype(np.int32)
    if task == "single_label":
        return tasks.SINGLE, label.sum(axis=1).astype(np.int32) % 3
    if task == "multi_label":
        return tasks.MULTI, label
    values = rng.normal(size=(rows, 3)).astype(np.float32)
    return tasks.regression([0.5] * 3, [2.0, 1.0, 3.0]), values


@pytest.mark.parametrize("name", TASKS)
def test_rows_are_means_over_examples_in_every_layout(name):
    """With padding and an output that is not finite, by batches and mapped over devices."""
    rng = np.random.default_rng(0)
    task, label = of_task(name, rng, 12)
    logits = rng.normal(size=(12, 3)).astype(np.float32)
    logits[2] = np.inf
    out = {"present": {"m": np.ones(12, bool)}, "probe_logits": {"m": logits}}
    batch = {"label": label, "example_mask": np.arange(12) < 11}
    tree = (logits, out, batch)

    def sums_of(tree, axis_name=None):
        return psum(batch_sums(*tree, task), axis_name)

    whole = finish(jax.jit(sums_of)(tree))
    parts = jax.tree.map(lambda x: np.asarray(x).reshape(3, 4, *x.shape[1:]), tree)
    total: dict = {}
    for i in range(3):
        total = add_sums(total, sums_of(jax.tree.map(lambda x, i=i: x[i], parts)))
    mapped = jax.vmap(lambda tree: sums_of(tree, "devices"), axis_name="devices")(parts)
    for row in (finish(total), finish(jax.tree.map(lambda x: x[0], mapped))):
        assert row.keys() == whole.keys()
        for field, value in row.items():
            assert value == pytest.approx(whole[field], rel=1e-6)
    known = np.array([i for i in range(11) if i != 2])
    losses, scores = task.loss(logits, label), task.step_scores(logits, label)
    ((metric, score),) = scores.items()
    assert whole["loss"] == pytest.approx(np.asarray(losses)[known].mean(), rel=1e-5)
    counted = 11 if tasks.METRICS[metric].higher_is_better else 10
    assert whole[metric] == pytest.approx(np.asarray(score)[known].sum() / counted, rel=1e-5)
    assert whole[metric] == whole[f"probe_{metric}/m"] and whole["nonfinite"] == 1


def test_predictions_as_cells_of_a_table():
    names = ("x", "y")
    assert list(tasks.MULTI.cells(names, np.array([[0.5, 0.25], [0.75, 0.5]]))) == [
        ["x", "0.5", "0.25"],
        ["x|y", "0.75", "0.5"],
    ]
    assert tasks.MULTI.columns(names) == ["predicted", "probability/x", "probability/y"]
    assert list(VALUES.cells(("0",), np.array([[1.5]]))) == [["1.5"]]
    assert VALUES.columns(("0",)) == ["predicted"]
    assert VALUES.columns(names) == ["predicted/x", "predicted/y"]


def test_every_task_has_scores_that_are_known():
    rng = np.random.default_rng(1)
    for name in TASKS:
        inputs = InputSpec({}, 1, task=name, target_mean=(0.0,), target_std=(0.0,))
        task = tasks.task_of(inputs)
        assert task.name == name and task.main == tasks.HEADLINES[name][0]
        found, label = of_task(name, rng, 9)
        outputs = np.asarray(found.answer(jnp.asarray(rng.normal(size=(9, 3)), jnp.float32)))
        scores = task.scores(answers(outputs, label), 3, ())
        assert set(task.shown) <= tasks.METRICS.keys()
        assert task.main_score(answers(outputs, label)) == scores[task.main]
        assert {*task.curves, task.main} <= scores.keys()
