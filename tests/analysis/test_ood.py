"""Out-of-distribution scores against hand values and other forms of the same numbers."""

import numpy as np
import pytest

from rollingq_jax.analysis import ood
from rollingq_jax.analysis.ood import (
    auroc,
    compare_scores,
    fit_gaussians,
    fpr_at,
    mahalanobis,
    max_softmax,
    negative_energy,
)
from tests.analysis import analysis_examples


def test_scores_of_logits_have_their_hand_values():
    logits = np.log([[1.0, 3.0], [2.0, 2.0]])
    np.testing.assert_allclose(max_softmax(logits), [0.75, 0.5])
    np.testing.assert_allclose(negative_energy(logits), np.log([4.0, 4.0]))


def test_mahalanobis_is_the_distance_to_the_nearest_class():
    """Two classes at (0, 0) and (10, 0), each with deviations of 1 and 2 along the axes."""
    spread = np.array([[1.0, 2.0], [-1.0, 2.0], [1.0, -2.0], [-1.0, -2.0]])
    features = np.concatenate([spread, spread + [10, 0]])
    fitted = fit_gaussians(features, np.repeat([0, 3], 4))
    np.testing.assert_allclose(fitted.means, [[0, 0], [10, 0]])
    np.testing.assert_allclose(fitted.precision, np.diag([1, 1 / 4]))
    points = np.array([[0.0, 0.0], [3.0, 0.0], [8.0, 4.0]])
    np.testing.assert_allclose(mahalanobis(points, fitted), [0, -9, -(4 + 4)], atol=1e-12)


def test_a_direction_in_which_nothing_varies_does_not_count():
    features = np.array([[1.0, 5.0], [-1.0, 5.0], [2.0, 5.0], [0.0, 5.0]])
    fitted = fit_gaussians(features, np.zeros(4, int))
    assert np.isfinite(mahalanobis(features + [0, 1], fitted)).all()


def test_auroc_and_fpr_have_their_hand_values():
    assert auroc(np.array([3.0, 4.0]), np.array([1.0, 2.0])) == 1.0
    assert auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0])) == 0.0
    assert auroc(np.array([1.0, 2.0]), np.array([2.0])) == 0.25  # a loss and a tie
    inside, outside = np.arange(20.0), np.array([-1.0, 0.0, 0.5, 1.0, 30.0])
    assert fpr_at(inside, outside) == pytest.approx(2 / 5)  # 19 of 20 are at least 1
    assert fpr_at(inside, outside, rate=1.0) == pytest.approx(4 / 5)


def test_auroc_is_the_share_of_pairs():
    draw = np.random.default_rng(0)
    inside, outside = draw.integers(0, 9, 40), draw.integers(0, 7, 30)
    gaps = inside[:, None] - outside[None]
    assert auroc(inside, outside) == pytest.approx((gaps > 0).mean() + (gaps == 0).mean() / 2)


@pytest.mark.parametrize("fusion", ["concat", "sum", "attention", "mmml"])
def test_features_are_what_the_head_reads(fusion):
    model, params, dataset, _ = analysis_examples.small_model(fusion)
    source = dataset.splits["test"]
    logits, features, labels = ood.outputs(model, {"params": params}, None, source, batch_size=4)
    assert len(logits) == len(features) == len(labels) == len(source)
    heads = {n: p for n, p in params["fusion"].items() if n.startswith("head")}
    kernel = np.concatenate([head["kernel"] for head in heads.values()])
    bias = sum(np.asarray(head["bias"]) for head in heads.values())
    np.testing.assert_allclose(features @ kernel + bias, logits, atol=1e-5)


def test_an_example_without_finite_logits_is_the_most_foreign():
    draw = np.random.default_rng(1)
    train = draw.normal(size=(30, 3)), draw.normal(size=(30, 2)), np.arange(30) % 3
    broken = np.full((5, 3), np.nan), draw.normal(size=(5, 2)), np.zeros(5)
    found = compare_scores(train, train, broken)
    assert all(one == {"auroc": 1.0, "fpr95": 0.0} for one in found.values())
    same = compare_scores(train, train, train)
    assert all(one["auroc"] == pytest.approx(0.5) for one in same.values())
