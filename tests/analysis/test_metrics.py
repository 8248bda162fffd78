"""Hand values, and scikit-learn and SciPy where they define the same number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.analysis import metrics as stats

stats_scipy = pytest.importorskip("scipy.stats")
metrics = pytest.importorskip("sklearn.metrics")


def test_pearson_by_hand():
    # Deviations (-1, 0, 1) and (-1, 1, 0): 1 / (sqrt 2 sqrt 2).
    assert stats.pearson([1, 2, 3], [0, 2, 1]) == pytest.approx(0.5)
    assert stats.pearson([1, 2, 3], [5, 3, 1]) == pytest.approx(-1.0)


@pytest.mark.parametrize("x, y", [([1, 1, 1], [1, 2, 3]), ([1, 2], [4, 4]), ([1], [1]), ([], [])])
def test_correlation_is_undefined_without_variation(x, y):
    assert np.isnan(stats.pearson(x, y))
    assert np.isnan(stats.spearman(x, y))


@pytest.mark.parametrize("scale", [1e-200, 1e-8, 1.0, 1e8, 1e200])
def test_pearson_does_not_depend_on_scale(scale):
    x, y = np.random.default_rng(0).normal(size=(2, 50))
    assert stats.pearson(x * scale, y) == pytest.approx(stats.pearson(x, y), abs=1e-12)


def test_correlation_refuses_arrays_of_different_length():
    with pytest.raises(ValueError, match=r"\(3,\) and \(2,\)"):
        stats.pearson([1, 2, 3], [1, 2])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(-5, 5), st.integers(-5, 5)), min_size=3, max_size=30))
def test_correlations_match_the_definition_with_ties(pairs):
    x, y = np.array(pairs, float).T
    if np.ptp(x) and np.ptp(y):
        by_rank = np.corrcoef(stats_scipy.rankdata(x), stats_scipy.rankdata(y))[0, 1]
        assert stats.spearman(x, y) == pytest.approx(by_rank, abs=1e-12)
        assert stats.pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], abs=1e-12)


def test_quality_contrast_by_hand():
    quality = {"a": np.array([0.0, -1.0]), "b": np.array([-2.0, 0.0]), "c": np.array([-4.0, 0.0])}
    contrast = stats.quality_contrast(quality)
    np.testing.assert_allclose(contrast["a"], [3.0, -1.0])  # 0 - (-3), -1 - 0
    np.testing.assert_allclose(contrast["b"], [0.0, 0.5])
    np.testing.assert_allclose(contrast["c"], [-3.0, 0.5])


def test_quality_contrast_correlation_signs():
    rng = np.random.default_rng(0)
    quality = {m: -rng.uniform(0, 3, 400) for m in ("audio", "visual")}
    contrast = quality["audio"] - quality["visual"]
    follows = {"audio": 0.5 + 0.1 * contrast, "visual": 0.5 - 0.1 * contrast}
    against = {"audio": follows["visual"], "visual": follows["audio"]}
    blind = {"audio": rng.uniform(size=400)}
    blind["visual"] = 1 - blind["audio"]
    assert stats.quality_contrast_correlation(follows, quality) == pytest.approx(1.0)
    assert stats.quality_contrast_correlation(against, quality) == pytest.approx(-1.0)
    assert abs(stats.quality_contrast_correlation(blind, quality)) < 0.15
    constant = {m: np.full(400, 0.5) for m in quality}
    assert np.isnan(stats.quality_contrast_correlation(constant, quality))


def test_quality_contrast_correlation_averages_over_modalities():
    share = {"a": [0.0, 1.0, 2.0], "b": [1.0, 0.0, 0.0], "c": [0.0, 0.0, 1.0]}
    quality = {"a": [0.0, 1.0, 3.0], "b": [0.0, 2.0, 1.0], "c": [1.0, 0.0, 0.0]}
    contrast = {"a": [-0.5, 0.0, 2.5], "b": [-0.5, 1.5, -0.5], "c": [1.0, -1.5, -2.0]}
    expected = np.mean([stats_scipy.pearsonr(share[m], contrast[m])[0] for m in share])
    assert stats.quality_contrast_correlation(share, quality) == pytest.approx(expected)
    # Now quality_b minus the others' mean is (-.5, -.5, -.5): without variation, no correlation.
    quality["b"] = [0.0, 0.0, 1.0]
    assert np.isnan(stats.quality_contrast_correlation(share, quality))


def test_quality_contrast_needs_the_same_and_several_modalities():
    with pytest.raises(ValueError, match="at least two"):
        stats.quality_contrast({"a": [1.0]})
    with pytest.raises(ValueError, match="share names"):
        stats.quality_contrast_correlation({"a": [1.0]}, {"b": [1.0]})


def test_bootstrap_is_seeded_and_close_to_the_t_interval():
    values = np.random.default_rng(3).normal(1.0, 2.0, 10)
    first = stats.bootstrap_mean(values, seed=7)
    assert first == stats.bootstrap_mean(values, seed=7)
    assert first != stats.bootstrap_mean(values, seed=8)
    half = stats_scipy.t.ppf(0.975, 9) * values.std(ddof=1) / np.sqrt(10)
    assert first.mean == pytest.approx(values.mean())
    assert first.low == pytest.approx(values.mean() - half, abs=0.12 * half)
    assert first.high == pytest.approx(values.mean() + half, abs=0.12 * half)


def test_bootstrap_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.normal(size=(400, 10))
    hits = [
        interval.low <= 0 <= interval.high
        for i, values in enumerate(draws)
        for interval in [stats.bootstrap_mean(values, seed=i, num_resamples=1000)]
    ]
    assert 0.92 < np.mean(hits) < 0.98


def test_bootstrap_edges():
    single = stats.bootstrap_mean([2.0])
    assert single.mean == 2.0 and np.isnan(single.low) and np.isnan(single.high)
    assert stats.bootstrap_mean([1.0, 1.0, 1.0])[:3] == (1.0, 1.0, 1.0)
    assert np.isnan(stats.bootstrap_mean([1.0, np.nan]).low)
    with pytest.raises(ValueError, match="not empty"):
        stats.bootstrap_mean([])


def test_paired_difference_counts_and_decides():
    gain = stats.paired_difference([0.7, 0.8, 0.9, 0.6], [0.6, 0.7, 0.8, 0.6])
    assert (gain.wins, gain.losses, gain.size) == (3, 0, 4)
    assert gain.mean == pytest.approx(0.075)
    clear = stats.paired_difference(np.arange(10) + 1.0, np.arange(10))
    assert clear.low == clear.high == 1.0
    assert np.isnan(stats.paired_difference([1.0], [0.0]).low)


def test_calibration_error_by_hand():
    # Two at confidence .9 (one right) and two at .6 (both right): .5 * .4 + .5 * .4.
    probabilities = np.array([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6], [0.4, 0.6]])
    assert stats.expected_calibration_error(probabilities, [0, 1, 1, 1]) == pytest.approx(0.4)


def test_calibration_error_of_a_certain_and_right_model_is_zero():
    assert stats.expected_calibration_error(np.eye(3), [0, 1, 2]) == 0.0


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=60))
def test_class_scores_match_sklearn(pairs):
    prediction, label = np.array(pairs).T
    confusion = stats.confusion_matrix(prediction, label, 5)
    np.testing.assert_array_equal(
        confusion, metrics.confusion_matrix(label, prediction, labels=range(5))
    )
    arguments = {"y_true": label, "y_pred": prediction, "zero_division": 0}
    assert stats.macro_f1(confusion) == pytest.approx(
        metrics.f1_score(**arguments, average="macro")
    )
    assert stats.weighted_f1(confusion) == pytest.approx(
        metrics.f1_score(**arguments, average="weighted")
    )
    recall = stats.per_class_accuracy(confusion)
    present = np.unique(label)
    np.testing.assert_allclose(
        recall[present], metrics.recall_score(**arguments, labels=present, average=None)
    )
    assert np.isnan(np.delete(recall, present)).all()


def test_class_scores_by_hand():
    confusion = np.array([[3, 1], [2, 4]])
    np.testing.assert_allclose(stats.per_class_accuracy(confusion), [0.75, 4 / 6])
    np.testing.assert_allclose(stats.per_class_f1(confusion), [6 / 9, 8 / 11])
    assert stats.macro_f1(confusion) == pytest.approx((6 / 9 + 8 / 11) / 2)
    assert stats.weighted_f1(confusion) == pytest.approx((4 * 6 / 9 + 6 * 8 / 11) / 10)
    assert np.isnan(stats.macro_f1(np.zeros((2, 2), int)))
    assert np.isnan(stats.weighted_f1(np.zeros((2, 2), int)))


def test_what_an_example_lacks_is_in_no_pair():
    x, y = np.array([1.0, 2.0, np.nan, 3.0]), np.array([0.0, 2.0, 9.0, 1.0])
    assert stats.pearson(x, y) == pytest.approx(0.5) == stats.spearman(x, y)
    assert np.isnan(stats.pearson(x * np.nan, y)) and np.isnan(stats.mean_finite(x * np.nan))
    quality = {"a": np.array([0.0, -1.0]), "b": np.array([-2.0, np.nan])}
    contrast = stats.quality_contrast(quality)
    np.testing.assert_array_equal(contrast["a"], [2.0, np.nan])  # the second has no other
    np.testing.assert_array_equal(contrast["b"], [-2.0, np.nan])
    assert np.isnan(stats.quality_contrast_correlation(quality, {m: y[:2] * np.nan for m in "ab"}))


def test_no_answer_is_right_for_no_class():
    label = np.array([0, 0, 1, 1])
    confusion = stats.confusion_matrix(np.array([0, -1, 1, -1]), label, 2)
    np.testing.assert_array_equal(confusion, [[1, 0, 1], [0, 1, 1]])
    np.testing.assert_array_equal(stats.per_class_accuracy(confusion), [0.5, 0.5])
    np.testing.assert_allclose(stats.per_class_f1(confusion), [2 / 3, 2 / 3])
    probabilities = np.array([[0.75, 0.25], [np.nan, np.nan]])
    assert stats.expected_calibration_error(probabilities, [0, 0]) == pytest.approx(0.25)
    assert np.isnan(stats.expected_calibration_error(probabilities[1:], [0]))


@pytest.mark.parametrize("pairs", [2, 5, 10, 20])
def test_the_detectable_difference_is_found_four_times_in_five(pairs):
    """By simulating what it says of itself: t-tests on so many pairs with that true difference."""
    shift = stats.detectable_difference(0.02, pairs)
    rng = np.random.default_rng(0)
    values = rng.normal(shift, 0.02, (20_000, pairs))
    shown = stats_scipy.ttest_1samp(values, 0, axis=1).pvalue < 0.05
    assert shown.mean() == pytest.approx(0.8, abs=0.015)


def test_nothing_is_detected_where_there_is_no_spread_to_measure():
    assert np.isnan(stats.detectable_difference(0.1, 1))
    assert np.isnan(stats.detectable_difference(float("nan"), 5))
    assert stats.detectable_difference(0.0, 5) == 0
