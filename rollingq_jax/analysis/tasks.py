"""The task: what outputs are trained on, what answers they give, and how answers are scored.

============ ======================== =================== ======================================
task         label of an example      answer              loss
============ ======================== =================== ======================================
single_label a class number           softmax(z)          -log softmax(z)_y
multi_label  0 or 1 for each of C     sigmoid(z)          mean over labels of the binary
                                                          cross-entropy
regression   K numbers y              mean + std z        mean over k of |z - t| or (z - t)^2,
                                                          t = (y - mean) / std
============ ======================== =================== ======================================

mean and std are those of each target over the training split, so that a learning rate does not
depend on the targets' unit; answers and errors are in that unit, losses are not. All else, from the
training step to a comparison's table, asks a `Task` and not for its name.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rollingq_jax.analysis.metrics import (
    Predictions,
    class_cells,
    class_columns,
    class_probabilities,
    class_scores,
    f1_score,
    mean_finite,
    pearson,
    where_finite,
)
from rollingq_jax.data.dataset import MULTI_LABEL, REGRESSION, SEPARATORS, SINGLE_LABEL
from rollingq_jax.data.preprocessing import InputSpec

Values = np.ndarray
THRESHOLD = 0.5  # probability from which on a label counts as given
SENTIMENT = 3.0  # labels within +-3 are sentiments, of which accuracies are told too


class Metric(NamedTuple):
    """A score: its name in words, its direction, whether it is a fraction shown in percent."""

    words: str
    higher_is_better: bool = True
    percent: bool = False

    @property
    def title(self) -> str:
        """The words at the beginning of a heading."""
        first, *rest = self.words.split(" ")
        return " ".join([first.capitalize() if first.islower() else first, *rest])

    @property
    def scale(self) -> float:
        """The factor of shown values."""
        return 100.0 if self.percent else 1.0

    @property
    def axis(self) -> str:
        """The words at an axis of shown values."""
        return f"{self.words} (%)" if self.percent else self.words

    def written(self, value: float) -> str:
        """A value in a sentence."""
        if self.percent:
            return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
        return f"{value:.3f}"

    def better(self, first: float, second: float) -> bool:
        """Tells if the first is better than the second."""
        return first > second if self.higher_is_better else first < second


# Every score by its name in rows, summaries and `config.best_by`. An answer that is not finite is
# a wrong one where higher is better, and has no error where lower is.
METRICS = {
    "loss": Metric("loss", higher_is_better=False),
    "accuracy": Metric("accuracy", percent=True),
    "macro_f1": Metric("macro F1", percent=True),
    "weighted_f1": Metric("weighted F1", percent=True),
    "calibration_error": Metric("calibration error", higher_is_better=False),
    "map": Metric("mAP", percent=True),
    "micro_f1": Metric("micro F1", percent=True),
    "label_accuracy": Metric("accuracy by label", percent=True),
    "exact_match": Metric("accuracy by set of labels", percent=True),
    "mae": Metric("MAE", higher_is_better=False),
    "correlation": Metric("correlation with the target"),
    "ccc": Metric("CCC"),
    "acc2": Metric("Acc-2", percent=True),
    "acc2_nonzero": Metric("Acc-2 without zeros", percent=True),
    "acc7": Metric("Acc-7", percent=True),
}


# Of each task the metrics that a page begins with; the first is the main one, by which checkpoints
# and settings are chosen and arms compared.
HEADLINES = {
    SINGLE_LABEL: ("accuracy", "macro_f1"),
    MULTI_LABEL: ("map", "macro_f1", "micro_f1"),
    REGRESSION: ("mae", "correlation", "ccc", "acc2", "acc7"),
}
MAIN = {task: names[0] for task, names in HEADLINES.items()}


def task_name(record: Mapping[str, Any]) -> str:
    """The task of a run's summary or evaluation; those of older versions are of one."""
    return record.get("task", SINGLE_LABEL)


@dataclasses.dataclass(frozen=True)
class Task:
    """What is learned.

    Attributes:
      name: one of `rollingq_jax.data.dataset.TASKS`.
      loss: outputs `[B, C]`, label -> `[B]` float32; what is reported, and by default trained on.
      answer: outputs `[B, C]` -> `[B, C]`; NaN, all of an example's, where one is not finite.
      step_scores: outputs, label -> {metric: `[B]` float32}, whose mean over examples is the
        metric; of rows of the training split too.
      by_example: answers -> `[N]`, whose mean is the one metric of `step_scores`.
      step_metric: its name.
      scores: answers, number of outputs, their names -> the metrics of a whole split on the host.
      changed: answers, and others to the same examples -> {in which measure they agree: number}.
      guesses: answers, of which the labels are read -> main metric of answers that need no model,
        by the names that `plots.accuracy_figure` has for them.
      columns: names of the outputs -> the columns of `predictions.csv` that hold an answer.
      cells: names, answers `[N, C]` -> for each example the cells of those columns.
      shown: the metrics of tables; an answer's `scores` may lack some.
      curves: those that each epoch's validation row has besides `step_scores`.
    """

    name: str
    loss: Callable[[Array, Array], Array]
    answer: Callable[[Array], Array]
    step_scores: Callable[[Array, Array], dict[str, Array]]
    by_example: Callable[[Predictions], Values]
    step_metric: str
    scores: Callable[[Predictions, int, Sequence[str]], dict[str, Any]]
    changed: Callable[[Predictions, Predictions], dict[str, float]]
    guesses: Callable[[Predictions], dict[str, float]]
    columns: Callable[[Sequence[str]], list[str]]
    cells: Callable[[Sequence[str], Values], Iterator[list[str]]]
    shown: tuple[str, ...]
    curves: tuple[str, ...] = ()

    @property
    def main(self) -> str:
        """The name of the main metric."""
        return MAIN[self.name]

    def answer_text(self, names: Sequence[str], answer: Values) -> str:
        """One answer in a few words, for a picture; empty where there is none."""
        if self.name == REGRESSION:
            return SEPARATORS[0].join(f"{value:.3g}" for value in answer if np.isfinite(value))
        return next(self.cells(names, answer[None]))[0]

    @property
    def metric(self) -> Metric:
        """The main metric."""
        return METRICS[self.main]

    def main_score(self, predictions: Predictions) -> float:
        """The main metric of answers."""
        return self.scores(predictions, predictions.probabilities.shape[-1], ())[self.main]


# One class of several.


def cross_entropy(logits: Array, label: Array, label_smoothing: float = 0.0) -> Array:
    """-log softmax(z)_y per row, or with smoothed labels: `[B, C], [B] -> [B]` float32."""
    logits = logits.astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    if label_smoothing:
        even = -jnp.mean(jax.nn.log_softmax(logits), axis=-1)
        losses = (1.0 - label_smoothing) * losses + label_smoothing * even
    return losses


def _class_guesses(predictions: Predictions) -> dict[str, float]:
    majority = np.bincount(predictions.label).max() / len(predictions.label)
    return {"chance": 1 / predictions.probabilities.shape[1], "majority": float(majority)}


SINGLE = Task(
    name=SINGLE_LABEL,
    loss=cross_entropy,
    answer=class_probabilities,
    step_scores=lambda logits, label: {
        "accuracy": (jnp.argmax(logits, axis=-1) == label).astype(jnp.float32)
    },
    by_example=lambda found: found.correct.astype(np.float64),
    step_metric="accuracy",
    scores=class_scores,
    changed=lambda found, clean: {"unchanged": found.unchanged(clean)},
    guesses=_class_guesses,
    columns=class_columns,
    cells=class_cells,
    shown=("accuracy", "macro_f1", "weighted_f1", "calibration_error"),
)


# Any number of labels.


def binary_cross_entropy(logits: Array, label: Array) -> Array:
    """Mean over labels of -log of the probability of what is true: `[B, C], [B, C] -> [B]`."""
    logits = logits.astype(jnp.float32)
    losses = optax.sigmoid_binary_cross_entropy(logits, label.astype(jnp.float32))
    return jnp.mean(losses, axis=-1)


def label_probabilities(logits: Array) -> Array:
    """sigmoid(z) `[B, C]`; NaN, all of an example's, where one of its logits is not finite."""
    return where_finite(logits, jax.nn.sigmoid(logits.astype(jnp.float32)))


def average_precision(score: Values, label: Values) -> float:
    """Area under precision over recall, without interpolation; NaN without a positive.

    AP = sum_n (R_n - R_{n-1}) P_n over the thresholds n from the highest score on; equal scores
    share a threshold (as scikit-learn's `average_precision_score`). A score that is not finite is
    below all others.

    Args:
      score, label: `[N]`; label 0 or 1.
    """
    score = np.where(np.isfinite(score), score, -np.inf)
    order = np.argsort(-score, kind="stable")
    score, hits = score[order], np.cumsum(np.asarray(label, np.int64)[order])
    if not len(hits) or hits[-1] == 0:
        return math.nan
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # of each threshold
    precision, found = hits[last] / (last + 1), hits[last]
    return float((precision * np.diff(found, prepend=0)).sum() / hits[-1])


def set_scores(predictions: Predictions, num_labels: int, names: Sequence[str]) -> dict[str, Any]:
    """Scores of sets of labels; a label counts as given from a probability of `THRESHOLD` on.

    Returns:
      "map", the mean average precision over the labels that some example has; "macro_f1", the mean
      F1 over labels that are true or given somewhere; "micro_f1", over all decisions;
      "label_accuracy", the share of decisions that are right; "exact_match", the share of examples
      with all of them right; "per_label" {name: {"average_precision", "f1", "examples"}}, the last
      how many have the label.
    """
    label, probability = predictions.label.astype(bool), predictions.probabilities
    given = given_labels(predictions)
    both, answered, true = (x.sum(axis=0) for x in (label & given, given, label))
    f1 = f1_score(both, answered, true)
    precision = [average_precision(probability[:, c], label[:, c]) for c in range(num_labels)]
    right = _right_labels(predictions)
    return {
        "map": mean_finite(np.array(precision)),
        "macro_f1": mean_finite(f1),
        "micro_f1": float(f1_score(both.sum(), answered.sum(), true.sum())),
        "label_accuracy": float(right.mean()),
        "exact_match": float(right.all(axis=1).mean()),
        "per_label": {
            name: {"average_precision": precision[c], "f1": float(f1[c]), "examples": int(true[c])}
            for c, name in enumerate(names or map(str, range(num_labels)))
        },
    }


def given_labels(predictions: Predictions) -> Values:
    """The labels that the model gives, bool `[N, C]`; none where its answer is not finite."""
    return predictions.probabilities >= THRESHOLD  # NaN is not


def _right_labels(predictions: Predictions) -> Values:
    """The decisions that are right, bool `[N, C]`; none where the answer is not finite."""
    right = given_labels(predictions) == predictions.label.astype(bool)
    return right & predictions.finite[:, None]


def _same_set(found: Predictions, clean: Predictions) -> dict[str, float]:
    same = (given_labels(found) == given_labels(clean)).all(axis=1) & found.finite
    return {"unchanged": float(same.mean())}


def _set_guesses(predictions: Predictions) -> dict[str, float]:
    """The expected average precision of scores without meaning is a label's frequency."""
    frequency = predictions.label.mean(axis=0)
    return {"chance": mean_finite(np.where(frequency > 0, frequency, np.nan))}


def _set_cells(names: Sequence[str], probabilities: Values) -> Iterator[list[str]]:
    for row in probabilities:
        given = (name for name, p in zip(names, row, strict=True) if p >= THRESHOLD)
        yield [SEPARATORS[0].join(given), *(f"{value:.8g}" for value in row)]


MULTI = Task(
    name=MULTI_LABEL,
    loss=binary_cross_entropy,
    answer=label_probabilities,
    step_scores=lambda logits, label: {
        "label_accuracy": jnp.mean(((logits >= 0) == (label > 0)).astype(jnp.float32), axis=-1)
    },
    by_example=lambda found: _right_labels(found).mean(axis=1),
    step_metric="label_accuracy",
    scores=set_scores,
    changed=_same_set,
    guesses=_set_guesses,
    columns=class_columns,
    cells=_set_cells,
    shown=("map", "macro_f1", "micro_f1", "label_accuracy", "exact_match"),
    curves=("map", "macro_f1"),
)


# Values.

LOSSES: dict[str, Callable[[Array], Array]] = {"l1": jnp.abs, "mse": jnp.square}


def concordance(x: Values, y: Values) -> float:
    """Lin's concordance correlation coefficient of x `[N]` with y `[N]`; NaN where undefined.

    CCC = 2 cov(x, y) / (var x + var y + (mean x - mean y)^2), of the population (Lin, Biometrics
    1989). Pairs in which a number is not finite are left out.
    """
    finite = np.isfinite(x) & np.isfinite(y)
    x, y = np.asarray(x, np.float64)[finite], np.asarray(y, np.float64)[finite]
    if len(x) < 2:
        return math.nan
    covariance = ((x - x.mean()) * (y - y.mean())).mean()
    total = x.var() + y.var() + (x.mean() - y.mean()) ** 2
    return float(2 * covariance / total) if total else math.nan


def are_sentiments(label: Values) -> bool:
    """Tells if labels `[N, K]` are of one target and all lie in -3 .. 3."""
    return label.shape[1] == 1 and bool(np.abs(label).max(initial=0.0) <= SENTIMENT)


def value_scores(predictions: Predictions, num_values: int, names: Sequence[str]) -> dict[str, Any]:
    """Scores of predicted values, in the unit of the labels.

    Returns:
      "mae", the mean absolute error, "correlation" (Pearson's) and "ccc" (`concordance`), each a
      mean over the targets; "per_target" {name: the same} for several. For one target whose labels
      all lie in -3 .. 3, as sentiments do, "acc2", the share of examples with value and label both
      >= 0 or both < 0; "acc2_nonzero", with both > 0 or both not, over those whose label is not 0;
      "acc7", with both the same after rounding to -3 .. 3 (halves to the even number). An example
      without a finite answer is wrong in the last three and left out of the others.
    """
    label, value = predictions.label.astype(np.float64), predictions.probabilities
    rows = {
        name: {
            "mae": mean_finite(np.abs(value[:, k] - label[:, k])),
            "correlation": pearson(value[:, k], label[:, k]),
            "ccc": concordance(value[:, k], label[:, k]),
        }
        for k, name in enumerate(names or map(str, range(num_values)))
    }
    result: dict[str, Any] = {
        name: float(np.mean([row[name] for row in rows.values()]))
        for name in ("mae", "correlation", "ccc")
    }
    if num_values > 1:
        return result | {"per_target": rows}
    if are_sentiments(label):
        y, z, known = label[:, 0], value[:, 0], predictions.finite
        nonzero = y != 0
        signs, strict = ((z >= 0) == (y >= 0)) & known, ((z > 0) == (y > 0)) & known
        levels = [np.rint(np.clip(x, -SENTIMENT, SENTIMENT)) for x in (z, y)]
        result |= {
            "acc2": float(signs.mean()),
            "acc2_nonzero": float(strict[nonzero].mean()) if nonzero.any() else math.nan,
            "acc7": float((levels[0] == levels[1]).mean()),
        }
    return result


def _constant_guess(predictions: Predictions) -> dict[str, float]:
    """The constant of the least mean absolute error is the median."""
    label = predictions.label.astype(np.float64)
    return {"constant": float(np.abs(label - np.median(label, axis=0)).mean())}


def regression(mean: Sequence[float], std: Sequence[float], loss: str = "l1") -> Task:
    """The prediction of K values.

    Args:
      mean, std: of the targets over the training split, `[K]`.
      loss: a key of `LOSSES`.
    """
    center = np.asarray(mean, np.float32)
    scale = np.where(np.asarray(std) > 0, std, 1.0).astype(np.float32)

    def losses(outputs: Array, label: Array) -> Array:
        target = (label.astype(jnp.float32) - center[None]) / scale[None]
        return jnp.mean(LOSSES[loss](outputs.astype(jnp.float32) - target), axis=-1)

    def answer(outputs: Array) -> Array:
        return where_finite(outputs, center[None] + scale[None] * outputs.astype(jnp.float32))

    def step_scores(outputs: Array, label: Array) -> dict[str, Array]:
        return {"mae": jnp.mean(jnp.abs(answer(outputs) - label.astype(jnp.float32)), axis=-1)}

    return Task(
        name=REGRESSION,
        loss=losses,
        answer=answer,
        step_scores=step_scores,
        by_example=lambda found: np.abs(found.probabilities - found.label).mean(axis=1),
        step_metric="mae",
        scores=value_scores,
        changed=lambda found, clean: {
            "mean_change": mean_finite(np.abs(found.probabilities - clean.probabilities))
        },
        guesses=_constant_guess,
        columns=lambda names: (
            [f"predicted/{n}" for n in names] if len(names) > 1 else ["predicted"]
        ),
        cells=lambda names, values: ([f"{v:.8g}" for v in row] for row in values),
        shown=("mae", "correlation", "ccc", "acc2", "acc2_nonzero", "acc7"),
        curves=("correlation", "ccc"),
    )


def task_of(inputs: InputSpec, loss: str = "l1") -> Task:
    """The task of a data set.

    Args:
      inputs: of the data.
      loss: of a regression, `config.regression_loss`.
    """
    if inputs.task == REGRESSION:
        return regression(inputs.target_mean, inputs.target_std, loss)
    return {SINGLE_LABEL: SINGLE, MULTI_LABEL: MULTI}[inputs.task]
