"""A model's answers on a split, and the scores that follow from them.

``predict`` is any function from a batch to probabilities and attention shares; `predictor` makes
one of a model of ours.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rollingq_jax.analysis import statistics
from rollingq_jax.data.dataset import KEPT
from rollingq_jax.errors import NonFiniteError

log = logging.getLogger(__name__)

Array = np.ndarray
Batch = Mapping[str, Array]
# Batch -> {"probabilities": [B, C], "attention_share": {m: [B] or [B, H]}, "present": {m: [B]}}.
# The shares are empty or absent where there is no attention, `present` where all have everything.
Predict = Callable[[Batch], Mapping[str, Any]]


class Predictions(NamedTuple):
    """A model's answers on N examples, in their order.

    Attributes:
      probabilities: [N, C], NaN where the model's logits are not finite.
      label: [N].
      attention_share: modality -> [N], mean over heads; empty for a fusion without attention.
      quality: modality -> [N], NaN where the example lacks it; empty unless every modality's
        quality is known.
      present: modality -> [N] bool, which examples have it; empty where all have every one.
      kept: modality -> [N] bool, where a corruption left it because it is the example's last;
        empty unless one was to be dropped.
    """

    probabilities: Array
    label: Array
    attention_share: dict[str, Array]
    quality: dict[str, Array]
    present: dict[str, Array] = {}
    kept: dict[str, Array] = {}

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
    def accuracy(self) -> float:
        """Share of examples whose most probable class is the label; no answer is a wrong one."""
        return float((self.predicted == self.label).mean())

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
        known = {m: self.present.get(m, True) & self.finite for m in self.attention_share}
        return {m: where_present(s, known[m]) for m, s in self.attention_share.items()}


def where_present(values: Array, present: Array | None) -> Array:
    """Values [N] of what has a modality, NaN for what lacks it; None: all have it."""
    values = np.asarray(values)
    if present is None or np.all(present):
        return values
    return np.where(present, values, np.nan)


def class_probabilities(logits: Any) -> Any:
    """softmax(logits) `[B, C]`; NaN, all of an example's, where one of its logits is not finite."""
    finite = jnp.all(jnp.isfinite(logits), axis=-1, keepdims=True)
    return jnp.where(finite, jax.nn.softmax(logits, axis=-1), jnp.nan)


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


def predictor(model: Any, params: Any, rotation: Any = None) -> Predict:
    """`Predict` of a model built by `build_model`, compiled once for each form of batch.

    Args:
      model: a Flax module that returns ``(logits, out)``; see `MultimodalTransformer`.
      params: its parameters.
      rotation: [H, d_h, d_h] or None.
    """

    @jax.jit
    def apply(params: Any, rotation: Any, batch: Batch) -> Mapping[str, Any]:
        logits, out = model.apply({"params": params}, batch, rotation=rotation)
        return {
            "probabilities": class_probabilities(logits),
            "attention_share": out.get("attention_share", {}),
            "present": out["present"],
        }

    def predict(batch: Batch) -> Mapping[str, Any]:
        return apply(params, rotation, model_input(batch))

    return predict


def model_input(batch: Batch) -> dict[str, Array]:
    """The batch without what no model reads: label, padding, quality and what was not dropped."""
    names, prefixes = ("label", "example_mask"), ("quality_", KEPT)
    return {k: v for k, v in batch.items() if k not in names and not k.startswith(prefixes)}


def collect(predict: Predict, batches: Iterable[Batch]) -> Predictions:
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
        rows |= {f"present/{name}": has for name, has in result.get("present", {}).items()}
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
    )


def mean_shares(predictions: Predictions) -> dict[str, float]:
    """The attention share of each modality, averaged over the examples that have it."""
    return {m: statistics.mean_finite(share) for m, share in predictions.shares().items()}


def scores(
    predictions: Predictions, num_classes: int, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy, F1, calibration, each class, attention share and what it follows.

    Returns:
      "accuracy", "macro_f1", "weighted_f1", "calibration_error", "per_class" {name: {"accuracy",
      "f1", "examples"}}, with attention "attention_share" {m: mean}, and with quality as well
      `share_quality`. A number that the data do not define is NaN. Where some example lacks a
      modality, "modality_examples" {m: count} says how many have it; where the model gave some no
      answer, "nonfinite" says how many.
    """
    confusion = statistics.confusion_matrix(predictions.predicted, predictions.label, num_classes)
    accuracy = statistics.per_class_accuracy(confusion)
    f1 = statistics.per_class_f1(confusion)
    names = class_names or [str(label) for label in range(num_classes)]
    result = {
        "accuracy": predictions.accuracy,
        "macro_f1": statistics.macro_f1(confusion),
        "weighted_f1": statistics.weighted_f1(confusion),
        "calibration_error": statistics.expected_calibration_error(
            predictions.probabilities, predictions.label
        ),
        "per_class": {
            name: {
                "accuracy": float(accuracy[i]),
                "f1": float(f1[i]),
                "examples": int(confusion[i].sum()),
            }
            for i, name in enumerate(names)
        },
    }
    if predictions.nonfinite:
        result["nonfinite"] = predictions.nonfinite
    if predictions.lacking:
        result["modality_examples"] = predictions.lacking
    if predictions.attention_share:
        result["attention_share"] = mean_shares(predictions)
    if predictions.attention_share and predictions.quality:
        result |= share_quality(predictions)
    return result


def share_quality(predictions: Predictions) -> dict[str, Any]:
    """Correlation of attention with quality.

    Returns:
      "quality_correlation", the dynamics measure (`statistics.quality_contrast_correlation`), and
      for each modality "pearson" and "spearman" of its share with its own quality alone, over the
      examples that have it. The contrast needs another modality beside it: where some example has
      none, "contrast_examples" {m: count} says how many have.
    """
    share = predictions.shares()
    quality = {m: predictions.quality[m] for m in share}
    result: dict[str, Any] = {
        "pearson": {m: statistics.pearson(share[m], quality[m]) for m in share},
        "spearman": {m: statistics.spearman(share[m], quality[m]) for m in share},
    }
    if len(share) > 1:
        correlation = statistics.quality_contrast_correlation(share, quality)
        result = {"quality_correlation": correlation} | result
        contrast = statistics.quality_contrast(quality)
        counts = {m: int((np.isfinite(contrast[m]) & np.isfinite(share[m])).sum()) for m in share}
        if any(count < len(predictions.label) for count in counts.values()):
            result["contrast_examples"] = counts
    return result


def _with_prefix(columns: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    names = sorted(name for name in columns if name.startswith(prefix))
    return {name.removeprefix(prefix): columns[name] for name in names}
