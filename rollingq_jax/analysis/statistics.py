"""The numbers behind the tables: correlations, intervals, calibration and per-class scores.

Pure NumPy on host arrays, float64 throughout. A value that the data do not define (the
correlation with a constant, the interval of a single run) is NaN, never an invented number. In what
is measured of each example, NaN says that the example has no such value: it is left out.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize, special

Array = np.ndarray


class Interval(NamedTuple):
    """Mean of ``size`` values with its bootstrap interval; NaN for fewer than two of them."""

    mean: float
    low: float
    high: float
    size: int


class PairedDifference(NamedTuple):
    """Mean of first - second over ``size`` pairs, its bootstrap interval, who won how often."""

    mean: float
    low: float
    high: float
    size: int
    wins: int
    losses: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the whole interval lies on one side of zero (False where it is undefined)."""
        return bool(self.low > 0 or self.high < 0)


def pearson(x: Array, y: Array) -> float:
    """Pearson's correlation of x [N] with y [N]; NaN if N < 2 or one of them is constant.

    r = sum (x - mean x)(y - mean y) / (norm(x - mean x) norm(y - mean y)).
    Pairs in which a number is NaN or infinite are left out. Raises ValueError where the shapes
    differ or are not one-dimensional.
    """
    x, y = _finite(*_pair(x, y))
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return float("nan")
    # Dividing by the largest deviation first keeps the squares of tiny or huge values finite.
    x, y = (v - v.mean() for v in (x, y))
    x, y = (v / np.abs(v).max() for v in (x, y))
    r = (x @ y) / (np.linalg.norm(x) * np.linalg.norm(y))
    return float(np.clip(r, -1.0, 1.0))


def ranks(x: Array) -> Array:
    """Ranks 1..N of x [N]; equal values share the mean of their ranks."""
    _, inverse, counts = np.unique(np.asarray(x), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[inverse]


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation: `pearson` of the ranks, ties averaged."""
    x, y = _finite(*_pair(x, y))
    return pearson(ranks(x), ranks(y))


def quality_contrast(quality: Mapping[str, Array]) -> dict[str, Array]:
    """Quality of each modality [N] minus the mean quality of the others [N], by modality.

    NaN is the quality of what an example lacks: the mean is over the others that it has, and the
    contrast is NaN where it lacks the modality or has no other.
    """
    names = sorted(quality)
    if len(names) < 2:
        raise ValueError(f"quality needs at least two modalities to contrast, got {names}")
    values = {m: np.asarray(quality[m], np.float64) for m in names}
    return {m: values[m] - _mean_known([values[n] for n in names if n != m]) for m in names}


def _mean_known(values: Sequence[Array]) -> Array:
    """Mean over those of several [N] that are finite, example by example; NaN where none is."""
    stacked = np.stack(values)
    known = np.isfinite(stacked)
    count = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.divide(total, count, out=np.full(count.shape, np.nan), where=count > 0)


def mean_finite(values: Array) -> float:
    """Mean of the finite ones of values [N]; NaN where there is none."""
    values = np.asarray(values)
    finite = np.isfinite(values)
    if not finite.any():
        return float("nan")
    return float((values if finite.all() else values[finite]).mean())


def quality_contrast_correlation(share: Mapping[str, Array], quality: Mapping[str, Array]) -> float:
    """How far attention follows quality: the dynamics measure of this project.

    The Pearson correlation of share_m [N] with quality_m minus the mean quality of the other
    modalities, averaged over m. In [-1, 1]; 0 when attention does not see quality. The quantity
    is the one the paper reports for a sample's attention against its modality's quality (Ni et
    al., ICML 2025); the contrast makes it independent of noise that hits all modalities alike.
    A modality that no example has beside another (see `quality_contrast`) is left out of the mean.
    Raises ValueError where the two mappings name different modalities.
    """
    if sorted(share) != sorted(quality):
        raise ValueError(f"share names {sorted(share)} but quality names {sorted(quality)}")
    contrast = quality_contrast(quality)
    known = [m for m in sorted(share) if np.isfinite(contrast[m]).any()]
    return float(np.mean([pearson(share[m], contrast[m]) for m in known])) if known else math.nan


def bootstrap_mean(
    values: Array, *, seed: int = 0, num_resamples: int = 10_000, confidence: float = 0.95
) -> Interval:
    """Mean of values [N] with a bootstrap interval that keeps its promise for few values.

    The plain percentile interval is too narrow for small N: as wide as one from the normal
    distribution and the biased standard deviation. The expanded percentile interval widens the
    two percentiles to Phi(-sqrt(N / (N - 1)) t_{N - 1}) on either side (Hesterberg, "What
    Teachers Should Know about the Bootstrap", arXiv 1411.5279), which for ten normal values
    covers the true mean in 95 % of cases where the plain one covers it in 90 %. Values that are
    NaN make the result NaN.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"values must be one-dimensional and not empty, got shape {values.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")
    count, mean = len(values), float(values.mean())
    if count < 2 or not np.isfinite(values).all():
        return Interval(mean, float("nan"), float("nan"), count)
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, count, (num_resamples, count))].mean(axis=1)
    quantile = special.stdtrit(count - 1, (1 - confidence) / 2)
    tail = special.ndtr(np.sqrt(count / (count - 1)) * quantile)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), count)


def paired_difference(
    first: Array,
    second: Array,
    *,
    seed: int = 0,
    num_resamples: int = 10_000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Mean of first [N] - second [N] over pairs (runs with the same seed) with `bootstrap_mean`.

    Wins count the pairs where first is larger, losses where it is smaller.
    """
    first, second = _pair(first, second)
    difference = first - second
    interval = bootstrap_mean(
        difference, seed=seed, num_resamples=num_resamples, confidence=confidence
    )
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(*interval, wins=wins, losses=losses)


def detectable_difference(
    deviation: float, pairs: int, *, power: float = 0.8, confidence: float = 0.95
) -> float:
    """The mean difference that so many pairs would show with probability ``power``.

    Of a two-sided paired t-test at ``1 - confidence``, for normal differences of this standard
    deviation; that is an estimate itself where it was measured on the same few pairs. NaN for fewer
    than two pairs.
    """
    if pairs < 2 or not math.isfinite(deviation):
        return float("nan")
    freedom = pairs - 1
    critical = special.stdtrit(freedom, (1 + confidence) / 2)
    # What the measured deviation may be in units of the true one, each as probable as the others.
    middles = (np.arange(2000) + 0.5) / 2000
    bounds = critical * np.sqrt(2 / freedom * special.gammaincinv(freedom / 2, middles))

    def excess(shift: float) -> float:
        """The power at a shift, in standard errors, above the one wanted."""
        shown = special.ndtr(shift - bounds) + special.ndtr(-shift - bounds)
        return float(shown.mean()) - power

    shift = optimize.brentq(excess, 0.0, 10 * critical)
    return float(shift * deviation / math.sqrt(pairs))


def expected_calibration_error(probabilities: Array, label: Array, num_bins: int = 15) -> float:
    """Mean gap between confidence and accuracy, for probabilities [N, C] and label [N].

    ECE = sum_b (n_b / N) |accuracy_b - confidence_b| over equal-width bins (b / n, (b + 1) / n]
    of the largest probability (Guo et al., ICML 2017). An example whose probabilities are not
    finite has no confidence and is left out; NaN where there is no other.
    """
    probabilities = np.asarray(probabilities, np.float64)
    finite = np.isfinite(probabilities).all(axis=-1)
    probabilities, label = probabilities[finite], np.asarray(label)[finite]
    if not len(label):
        return float("nan")
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == label
    bins = np.clip(np.ceil(confidence * num_bins).astype(int) - 1, 0, num_bins - 1)
    gap = np.bincount(bins, correct - confidence, minlength=num_bins)
    return float(np.abs(gap).sum() / len(label))


def confusion_matrix(prediction: Array, label: Array, num_classes: int) -> Array:
    """Counts [C, C]: row = true class, column = predicted class.

    [C, C + 1] where a prediction is -1, none at all: the last column counts those.
    """
    prediction, label = (np.asarray(values).astype(np.int64) for values in (prediction, label))
    columns = num_classes + int((prediction < 0).any())
    flat = label * columns + np.where(prediction < 0, num_classes, prediction)
    return np.bincount(flat, minlength=num_classes * columns).reshape(num_classes, columns)


def per_class_accuracy(confusion: Array) -> Array:
    """Share of each true class that is found, [C]; NaN for a class without examples."""
    total = confusion.sum(axis=1)
    return np.where(total > 0, np.diag(confusion) / np.maximum(total, 1), np.nan)


def per_class_f1(confusion: Array) -> Array:
    """F1 = 2 TP / (2 TP + FP + FN) of each class, [C]; NaN if it never occurs nor is predicted."""
    total = confusion.sum(axis=0)[: len(confusion)] + confusion.sum(axis=1)
    return np.where(total > 0, 2 * np.diag(confusion) / np.maximum(total, 1), np.nan)


def macro_f1(confusion: Array) -> float:
    """Mean F1 over the classes that occur or are predicted."""
    return float(np.nanmean(per_class_f1(confusion))) if confusion.sum() else float("nan")


def weighted_f1(confusion: Array) -> float:
    """Mean F1 over the classes, each weighted by its number of examples."""
    support = confusion.sum(axis=1)
    if not support.sum():
        return float("nan")
    return float(np.nan_to_num(per_class_f1(confusion)) @ support / support.sum())


def written(value: float | None, form: str = ".3f", count: int | None = None) -> str:
    """A measured value for the terminal: "-" where it is not defined, with its count where given.

    Example:
      >>> written(2 / 3, count=6), written(float("nan")), written(None, count=0)
      ('0.667 (n = 6)', '-', '- (n = 0)')
    """
    text = "-" if value is None or not math.isfinite(value) else format(value, form)
    return text if count is None else f"{text} (n = {count})"


def _finite(x: Array, y: Array) -> tuple[Array, Array]:
    """The pairs of two [N] in which both numbers are finite."""
    finite = np.isfinite(x) & np.isfinite(y)
    return (x, y) if finite.all() else (x[finite], y[finite])


def _pair(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"expected two arrays of one shape [N], got {x.shape} and {y.shape}")
    return x, y
