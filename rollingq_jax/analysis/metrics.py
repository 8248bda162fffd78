"""A model's answers, the scores that follow from them, and the statistics behind the tables.

On host arrays, float64 throughout. A value that the data do not define (the correlation with a
constant, the interval of a single run) is NaN, never an invented number. In what is measured per
example, NaN says that the example has no such value: it is left out.
"""

import contextlib
import csv
import io
import logging
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from rollingq_jax.data.dataset import KEPT
from rollingq_jax.errors import NonFiniteError

log = logging.getLogger(__name__)

Array = np.ndarray
CONFIDENCE = 0.95  # of intervals
CALIBRATION_BINS = 15
Batch = Mapping[str, Array]
# Batch -> {"probabilities": [B, C], "attention_share": {m: [B] or [B, H]}, "uniform_share":
# {m: [B]}, "present": {m: [B]}}. The shares are empty or absent where there is no attention, or it
# does not say what uniform attention would give; `present` where all have everything.
PredictFn = Callable[[Batch], Mapping[str, Any]]


# Answers: from a model and batches to one array for all examples.


class Predictions(NamedTuple):
    """A model's answers on N examples, in their order.

    Attributes:
      probabilities: [N, C], or the values that a regression predicts, [N, K]; NaN where the
        model's outputs are not finite.
      label: [N], or as the task has it (`rollingq_jax.data.dataset.TASKS`).
      attention_share: modality -> [N], mean over heads; empty for a fusion without attention.
      quality: modality -> [N], NaN where the example lacks it; empty unless every modality's
        quality is known.
      present: modality -> [N] bool, which examples have it; empty where all have every one.
      kept: modality -> [N] bool, where a corruption left it because it is the example's last;
        empty unless one was to be dropped.
      uniform_share: modality -> [N], its share under uniform attention; empty where not known.
    """

    probabilities: Array
    label: Array
    attention_share: dict[str, Array]
    quality: dict[str, Array]
    present: dict[str, Array] = {}
    kept: dict[str, Array] = {}
    uniform_share: dict[str, Array] = {}

    @property
    def predicted(self) -> Array:
        """The most probable class, [N]; -1, which is none, where a probability is not finite."""
        return np.where(self.finite, self.probabilities.argmax(axis=-1), -1)

    @property
    def finite(self) -> Array:
        """Whether the model gave an answer, [N] bool."""
        return np.isfinite(self.probabilities).all(axis=-1)

    @property
    def nonfinite(self) -> int:
        """Examples without an answer."""
        return int((~self.finite).sum())

    @property
    def correct(self) -> Array:
        """Whether the most probable class is the label, [N] bool; no answer is a wrong one."""
        return self.predicted == self.label

    @property
    def accuracy(self) -> float:
        """Share of `correct` examples."""
        return float(self.correct.mean())

    def unchanged(self, other: "Predictions") -> float:
        """Share of examples whose most probable class is that of `other`."""
        return float(((self.predicted == other.predicted) & self.finite).mean())

    @property
    def lacking(self) -> dict[str, int]:
        """How many examples have each modality, where one lacks any; else empty."""
        counts = {m: int(has.sum()) for m, has in sorted(self.present.items())}
        return counts if any(n < len(self.label) for n in counts.values()) else {}

    def shares(self) -> dict[str, Array]:
        """`attention_share`, NaN for the examples that lack the modality or have no answer."""
        return self._of_known(self.attention_share)

    def uniform_shares(self) -> dict[str, Array]:
        """`uniform_share`, NaN where `shares` are."""
        return self._of_known(self.uniform_share)

    def _of_known(self, shares: dict[str, Array]) -> dict[str, Array]:
        known = {m: self.present.get(m, True) & self.finite for m in shares}
        return {m: where_present(s, known[m]) for m, s in shares.items()}


def where_present(values: Array, present: Array | None) -> Array:
    """Values [N] of what has a modality, NaN for what lacks it; None: all have it."""
    values = np.asarray(values)
    if present is None or np.all(present):
        return values
    return np.where(present, values, np.nan)


def class_probabilities(logits: Any) -> Any:
    """softmax(logits) `[B, C]`; NaN, all of an example's, where one of its logits is not finite."""
    return where_finite(logits, jax.nn.softmax(logits, axis=-1))


def where_finite(outputs: Any, answers: Any) -> Any:
    """Answers `[B, C]`, NaN for an example of whose outputs `[B, C]` one is not finite."""
    finite = jnp.all(jnp.isfinite(outputs), axis=-1, keepdims=True)
    return jnp.where(finite, answers, jnp.nan)


def check_answers(
    nonfinite: int, total: int, where: str, *, quiet: bool = False, fail: bool = True
) -> None:
    """Warns of examples without an answer, unless `quiet`.

    Raises:
      NonFiniteError: no example has one, and `fail`.
    """
    if fail and nonfinite and nonfinite == total:
        raise NonFiniteError(
            f"{where}: the logits of all {total} examples are NaN or infinite; allowed: finite "
            "numbers (inputs may be too large, or the learning rate)"
        )
    if nonfinite and not quiet:
        log.warning(
            "%s: the logits of %d of %d examples are NaN or infinite; they count as wrong",
            where,
            nonfinite,
            total,
        )


def forward(
    model: Any,
    variables: Any,
    rotation: Any,
    batch: Mapping[str, Any],
    *,
    answer: Callable[[Any], Any] = class_probabilities,
    **options: Any,
) -> tuple[jax.Array, dict[str, Any]]:
    """Class probabilities `[B, C]` and what else the model says; pure.

    Args:
      model: from `build_model`.
      variables: its parameters, as `{"params": ...}`, and what else it reads.
      rotation: `[H, d_h, d_h]` or None.
      batch: what `model_input` leaves.
      answer: of a `Task`, to have other answers than class probabilities.
      options: of the model's call, as `return_attention`.
    """
    logits, out = model.apply(variables, batch, rotation=rotation, **options)
    return answer(logits), out


def predict_fn(
    model: Any,
    variables: Any,
    rotation: Any = None,
    answer: Callable[[Any], Any] = class_probabilities,
) -> PredictFn:
    """`PredictFn` of a model built by `build_model`, compiled once per form of batch.

    Args:
      model: a Flax module that returns `(logits, out)`; see `MultimodalTransformer`.
      variables: its parameters, as `{"params": ...}`, and what else it reads.
      rotation: `[H, d_h, d_h]` or None.
      answer: as in `forward`.
    """

    @jax.jit
    def apply(variables: Any, rotation: Any, batch: Batch) -> Mapping[str, Any]:
        probabilities, out = forward(model, variables, rotation, batch, answer=answer)
        return {
            "probabilities": probabilities,
            "attention_share": out.get("attention_share", {}),
            "uniform_share": out.get("uniform_share", {}),
            "present": out["present"],
        }

    return lambda batch: apply(variables, rotation, model_input(batch))


def model_input(batch: Batch) -> dict[str, Array]:
    """The batch without what no model reads: label, padding, quality and what was not dropped."""
    names, prefixes = ("label", "example_mask"), ("quality_", KEPT)
    return {k: v for k, v in batch.items() if k not in names and not k.startswith(prefixes)}


def collect(predict: PredictFn, batches: Iterable[Batch]) -> Predictions:
    """Predictions for every example of finite batches; padding rows are left out.

    Raises:
      ValueError: there is no batch.
    """
    parts: dict[str, list[Array]] = {}
    for batch in batches:
        result = predict(batch)
        rows = {"probabilities": result["probabilities"], "label": batch["label"]}
        for name, share in result.get("attention_share", {}).items():
            share = np.asarray(share)
            rows[f"share/{name}"] = share.mean(axis=-1) if share.ndim == 2 else share
        for kind in ("uniform_share", "present"):
            rows |= {f"{kind}/{name}": x for name, x in result.get(kind, {}).items()}
        rows |= {k: v for k, v in batch.items() if k.startswith(("quality_", KEPT))}
        real = np.asarray(batch.get("example_mask", np.ones(len(batch["label"]), bool)))
        for name, values in rows.items():
            parts.setdefault(name, []).append(np.asarray(values)[real])
    if not parts:
        raise ValueError("batches are empty: there is nothing to evaluate")
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    share = _with_prefix(columns, "share/")
    quality, present = _with_prefix(columns, "quality_"), _with_prefix(columns, "present/")
    if share.keys() - quality.keys():
        quality = {}
    return Predictions(
        columns["probabilities"],
        columns["label"],
        share,
        {m: where_present(values, present.get(m)) for m, values in quality.items()},
        present,
        _with_prefix(columns, KEPT),
        _with_prefix(columns, "uniform_share/"),
    )


def _with_prefix(columns: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    names = sorted(name for name in columns if name.startswith(prefix))
    return {name.removeprefix(prefix): columns[name] for name in names}


# Scores of answers.


def mean_shares(predictions: Predictions) -> dict[str, float]:
    """The attention share of each modality, averaged over the examples that have it."""
    return {m: mean_finite(share) for m, share in predictions.shares().items()}


def uniform_shares(predictions: Predictions) -> dict[str, float]:
    """What uniform attention would give in place of `mean_shares`; empty where it is not known."""
    return {m: mean_finite(share) for m, share in predictions.uniform_shares().items()}


def class_scores(
    predictions: Predictions, num_classes: int, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy, F1 and calibration, and what each class has of them.

    Returns:
      "accuracy", "macro_f1", "weighted_f1", "calibration_error", "per_class" {name: {"accuracy",
      "f1", "examples"}}. A number that the data do not define is NaN.
    """
    confusion = confusion_matrix(predictions.predicted, predictions.label, num_classes)
    calibration = expected_calibration_error(predictions.probabilities, predictions.label)
    accuracy, f1 = per_class_accuracy(confusion), per_class_f1(confusion)
    examples = confusion.sum(axis=1)
    names = class_names or [str(label) for label in range(num_classes)]
    return {
        "accuracy": predictions.accuracy,
        "macro_f1": macro_f1(confusion),
        "weighted_f1": weighted_f1(confusion),
        "calibration_error": calibration,
        "per_class": {
            name: {"accuracy": float(accuracy[i]), "f1": float(f1[i]), "examples": int(examples[i])}
            for i, name in enumerate(names)
        },
    }


def scores(
    predictions: Predictions,
    num_classes: int,
    class_names: Sequence[str] = (),
    task_scores: Callable[..., dict[str, Any]] = class_scores,
) -> dict[str, Any]:
    """What `task_scores` of a `Task` gives, attention share and what it follows.

    Returns:
      Besides: with attention "attention_share" and "uniform_share" {m: mean}, and with quality as
      well `share_quality`. A number that the data do not define is NaN. Where some example lacks a
      modality, "modality_examples" {m: count} says how many have it; where the model gave some no
      answer, "nonfinite" says how many.
    """
    result = task_scores(predictions, num_classes, class_names)
    if predictions.nonfinite:
        result["nonfinite"] = predictions.nonfinite
    if predictions.lacking:
        result["modality_examples"] = predictions.lacking
    if predictions.attention_share:
        result["attention_share"] = mean_shares(predictions)
    if predictions.uniform_share:
        result["uniform_share"] = uniform_shares(predictions)
    if predictions.attention_share and predictions.quality:
        result |= share_quality(predictions)
    return result


def share_quality(predictions: Predictions) -> dict[str, Any]:
    """Correlation of attention with quality.

    Returns:
      "quality_correlation", the dynamics measure (`quality_contrast_correlation`), and
      for each modality "pearson" and "spearman" of its share with its own quality alone, over the
      examples that have it. The contrast needs another modality beside it: where some example has
      none, "contrast_examples" {m: count} says how many have.
    """
    share = predictions.shares()
    quality = {m: predictions.quality[m] for m in share}
    result: dict[str, Any] = {
        "pearson": {m: pearson(share[m], quality[m]) for m in share},
        "spearman": {m: spearman(share[m], quality[m]) for m in share},
    }
    if len(share) > 1:
        correlation = quality_contrast_correlation(share, quality)
        result = {"quality_correlation": correlation} | result
        contrast = quality_contrast(quality)
        counts = {m: int((np.isfinite(contrast[m]) & np.isfinite(share[m])).sum()) for m in share}
        if any(count < len(predictions.label) for count in counts.values()):
            result["contrast_examples"] = counts
    return result


# Statistics.


def pearson(x: Array, y: Array) -> float:
    """Pearson's correlation of x `[N]` with y `[N]`; NaN if N < 2 or one of them is constant.

    r = sum (x - mean x)(y - mean y) / (norm(x - mean x) norm(y - mean y)).
    Pairs in which a number is NaN or infinite are left out.

    Raises:
      ValueError: the shapes differ or are not one-dimensional.
    """
    return _correlation("pearsonr", x, y)


def spearman(x: Array, y: Array) -> float:
    """Spearman's rank correlation: `pearson` of the ranks, ties averaged."""
    return _correlation("spearmanr", x, y)


def _correlation(name: str, x: Array, y: Array) -> float:
    from scipy import stats  # most of a second: a training step does without it

    x, y = _pair(x, y)
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = x[finite], y[finite]
    if len(x) < 2 or np.ptp(x) == 0 or np.ptp(y) == 0:
        return math.nan
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.NearConstantInputWarning)
        return float(getattr(stats, name)(x, y).statistic)


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
    return ratio(np.where(known, stacked, 0.0).sum(axis=0), known.sum(axis=0))


def ratio(part: Any, whole: Any) -> Array:
    """part / whole, element by element; NaN where the whole is 0."""
    whole = np.asarray(whole, np.float64)
    return np.divide(part, whole, out=np.full(whole.shape, np.nan), where=whole > 0)


def mean_finite(values: Array) -> float:
    """Mean of the finite ones of values [N]; NaN where there is none."""
    values = np.asarray(values)
    finite = np.isfinite(values)
    return float(values[finite].mean()) if finite.any() else math.nan


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


class Interval(NamedTuple):
    """Mean of `size` values with its 95 % interval; NaN for fewer than two of them."""

    mean: float
    low: float
    high: float
    size: int

    def written(self, form: str = ".3f", scale: float = 1.0) -> str:
        """As text: `0.590 [0.577, 0.602]`; without the interval where it is not defined."""
        mean, low, high = (written(scale * x, form) for x in self[:3])
        return f"{mean} [{low}, {high}]" if math.isfinite(self.low) else mean


class PairedDifference(NamedTuple):
    """Mean of first - second over `size` pairs, its bootstrap interval, who won how often."""

    mean: float
    low: float
    high: float
    size: int
    wins: int
    losses: int


def mean_over_examples(values: Array) -> Interval:
    """Mean of values [N] with the 95 % interval of Student's t; what is not finite is left out.

    For the examples of a split, which are many: `bootstrap_mean` is for the few runs of a table.
    """
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    count = len(values)
    mean = float(values.mean()) if count else math.nan
    if count < 2:
        return Interval(mean, math.nan, math.nan, count)
    from scipy import special

    half = special.stdtrit(count - 1, (1 + CONFIDENCE) / 2) * values.std(ddof=1) / math.sqrt(count)
    return Interval(mean, float(mean - half), float(mean + half), count)


def bootstrap_mean(values: Array, *, seed: int = 0, num_resamples: int = 10_000) -> Interval:
    """Mean of values [N] with a bootstrap 95 % interval that keeps its promise for few values.

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
    count, mean = len(values), float(values.mean())
    if count < 2 or not np.isfinite(values).all():
        return Interval(mean, math.nan, math.nan, count)
    from scipy import special  # a part of a second, which `--help` does without

    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, count, (num_resamples, count))].mean(axis=1)
    quantile = special.stdtrit(count - 1, (1 - CONFIDENCE) / 2)
    tail = special.ndtr(np.sqrt(count / (count - 1)) * quantile)
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean, float(low), float(high), count)


def paired_difference(first: Array, second: Array) -> PairedDifference:
    """Mean of first [N] - second [N] over pairs (runs with the same seed) with `bootstrap_mean`.

    Wins count the pairs where first is larger, losses where it is smaller.
    """
    first, second = _pair(first, second)
    difference = first - second
    wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
    return PairedDifference(*bootstrap_mean(difference), wins=wins, losses=losses)


def detectable_difference(deviation: float, pairs: int, *, power: float = 0.8) -> float:
    """The mean difference that so many pairs would show with probability `power`.

    Of a two-sided paired t-test at 5 %, for normal differences of this standard deviation; that is
    an estimate itself where it was measured on the same few pairs. NaN for fewer than two pairs.
    """
    if pairs < 2 or not math.isfinite(deviation):
        return math.nan
    from scipy import optimize, special

    freedom = pairs - 1
    critical = special.stdtrit(freedom, (1 + CONFIDENCE) / 2)
    # What the measured deviation may be in units of the true one, each as probable as the others.
    middles = (np.arange(2000) + 0.5) / 2000
    bounds = critical * np.sqrt(2 / freedom * special.gammaincinv(freedom / 2, middles))

    def excess(shift: float) -> float:
        """The power at a shift, in standard errors, above the one wanted."""
        shown = special.ndtr(shift - bounds) + special.ndtr(-shift - bounds)
        return float(shown.mean()) - power

    shift = optimize.brentq(excess, 0.0, 10 * critical)
    return float(shift * deviation / math.sqrt(pairs))


def expected_calibration_error(probabilities: Array, label: Array) -> float:
    """Mean gap between confidence and accuracy, for probabilities [N, C] and label [N].

    ECE = sum_b (n_b / N) |accuracy_b - confidence_b| over equal-width bins (b / n, (b + 1) / n]
    of the largest probability (Guo et al., ICML 2017). An example whose probabilities are not
    finite has no confidence and is left out; NaN where there is no other.
    """
    probabilities = np.asarray(probabilities, np.float64)
    finite = np.isfinite(probabilities).all(axis=-1)
    probabilities, label = probabilities[finite], np.asarray(label)[finite]
    if not len(label):
        return math.nan
    confidence, correct = probabilities.max(-1), probabilities.argmax(-1) == label
    bins = np.clip(np.ceil(confidence * CALIBRATION_BINS).astype(int) - 1, 0, CALIBRATION_BINS - 1)
    gap = np.bincount(bins, correct - confidence, minlength=CALIBRATION_BINS)
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
    return ratio(np.diag(confusion), confusion.sum(axis=1))


def per_class_f1(confusion: Array) -> Array:
    """`f1_score` of each class, [C]; NaN if it never occurs nor is predicted."""
    predicted = confusion.sum(axis=0)[: len(confusion)]
    return f1_score(np.diag(confusion), predicted, confusion.sum(axis=1))


def f1_score(both: Any, given: Any, true: Any) -> Array:
    """F1 = 2 TP / (given + true) = 2 TP / (2 TP + FP + FN); NaN where there is neither."""
    return ratio(2 * both, given + true)


def macro_f1(confusion: Array) -> float:
    """Mean F1 over the classes that occur or are predicted."""
    return float(np.nanmean(per_class_f1(confusion))) if confusion.sum() else math.nan


def weighted_f1(confusion: Array) -> float:
    """Mean F1 over the classes, each weighted by its number of examples."""
    support = confusion.sum(axis=1)
    if not support.sum():
        return math.nan
    return float(np.nan_to_num(per_class_f1(confusion)) @ support / support.sum())


def written(value: float | None, form: str = ".3f", count: int | None = None) -> str:
    """A measured value for the terminal: "-" where it is not defined, with its count where given.

    Examples:
      >>> written(2 / 3, count=6), written(math.nan), written(None, count=0)
      ('0.667 (n = 6)', '-', '- (n = 0)')
    """
    text = "-" if value is None or not math.isfinite(value) else format(value, form)
    return text if count is None else f"{text} (n = {count})"


def counted(count: int, what: str) -> str:
    """A number of things in words: `1 rotation`, `2 rotations`."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _pair(x: Array, y: Array) -> tuple[Array, Array]:
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    if x.ndim != 1 or x.shape != y.shape:
        raise ValueError(f"expected two arrays of one shape [N], got {x.shape} and {y.shape}")
    return x, y


# `predictions.csv`: what a model answered per example, and which modality it looked at.


def class_columns(classes: Sequence[str]) -> list[str]:
    """The columns of an answer."""
    return ["predicted", *(f"probability/{name}" for name in classes)]


def class_cells(classes: Sequence[str], probabilities: np.ndarray) -> Iterator[list[str]]:
    """The cells of answers `[N, C]`; where they are not finite nothing is predicted."""
    predicted = probabilities.argmax(axis=-1)
    known = np.isfinite(probabilities).all(axis=-1)
    for place, row in enumerate(probabilities):
        name = classes[predicted[place]] if known[place] else ""
        yield [name, *(f"{value:.8g}" for value in row)]


def csv_header(columns: Sequence[str], modalities: Sequence[str], labeled: bool) -> list[str]:
    """The names of the columns, of which those of an answer are given."""
    return ["id", *columns, *(f"share/{m}" for m in modalities), *(["label"] if labeled else [])]


def csv_rows(
    cells: Iterable[list[str]],
    ids: Sequence[Any],
    shares: Mapping[str, np.ndarray],
    labels: Sequence[str] | None = None,
) -> Iterator[list[str]]:
    """A line for each of N examples.

    Args:
      cells: N, each an answer's; `cells` of a `Task`.
      ids: N.
      shares: `{m: [N]}` or `{m: [N, H]}`, averaged over heads; empty without a class query.
      labels: N texts, "" where one is not known; None leaves the column out.
    """
    means = [np.asarray(share).reshape(len(ids), -1).mean(axis=-1) for share in shares.values()]
    for place, (name, answer) in enumerate(zip(ids, cells, strict=True)):
        yield [
            str(name),
            *answer,
            *(f"{share[place]:.8g}" for share in means),
            *([] if labels is None else [labels[place]]),
        ]


@contextlib.contextmanager
def csv_writer(path: epath.Path) -> Iterator[Any]:
    """A CSV writer into a file that appears when all is written, and not at all if it fails."""
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with temporary.open("wb") as file:

            def write(lines: Iterator[list[str]]) -> None:
                file.write("".join(map(_csv_line, lines)).encode("utf-8", "backslashreplace"))

            yield write
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _csv_line(cells: Sequence[str]) -> str:
    """A line of CSV; of line ends in cells the writer quotes only those that it writes itself."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"
