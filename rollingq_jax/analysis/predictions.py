"""A model's answers on a split, and the scores that follow from them.

``predict`` is any function from a batch to probabilities and attention shares; `predictor` makes
one of a model of ours.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rollingq_jax.analysis import statistics

Array = np.ndarray
Batch = Mapping[str, Array]
# Batch -> {"probabilities": [B, C], "attention_share": {m: [B] or [B, H]}}; the shares are empty or
# absent where there is no attention.
Predict = Callable[[Batch], Mapping[str, Any]]


class Predictions(NamedTuple):
    """A model's answers on N examples, in their order.

    Attributes:
      probabilities: [N, C].
      label: [N].
      attention_share: modality -> [N], mean over heads; empty for a fusion without attention.
      quality: modality -> [N]; empty unless every modality's quality is known.
    """

    probabilities: Array
    label: Array
    attention_share: dict[str, Array]
    quality: dict[str, Array]

    @property
    def predicted(self) -> Array:
        """The most probable class, [N]."""
        return self.probabilities.argmax(axis=-1)

    @property
    def accuracy(self) -> float:
        """Share of examples whose most probable class is the label."""
        return float((self.predicted == self.label).mean())


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
            "probabilities": jax.nn.softmax(logits, axis=-1),
            "attention_share": out.get("attention_share", {}),
        }

    def predict(batch: Batch) -> Mapping[str, Any]:
        return apply(params, rotation, model_input(batch))

    return predict


def model_input(batch: Batch) -> dict[str, Array]:
    """The batch without what no model reads: label, padding and quality."""
    ignored = ("label", "example_mask")
    return {k: v for k, v in batch.items() if k not in ignored and not k.startswith("quality_")}


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
        rows |= {k: v for k, v in batch.items() if k.startswith("quality_")}
        real = np.asarray(batch.get("example_mask", np.ones(len(batch["label"]), bool)))
        for name, values in rows.items():
            parts.setdefault(name, []).append(np.asarray(values)[real])
    if not parts:
        raise ValueError("batches are empty: there is nothing to evaluate")
    columns = {name: np.concatenate(values) for name, values in parts.items()}
    share = _with_prefix(columns, "share/")
    quality = _with_prefix(columns, "quality_")
    if share.keys() - quality.keys():
        quality = {}
    return Predictions(columns["probabilities"], columns["label"], share, quality)


def mean_shares(predictions: Predictions) -> dict[str, float]:
    """The attention share of each modality, averaged over the examples."""
    return {m: float(share.mean()) for m, share in predictions.attention_share.items()}


def scores(
    predictions: Predictions, num_classes: int, class_names: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy, F1, calibration, each class, attention share and what it follows.

    Returns:
      "accuracy", "macro_f1", "weighted_f1", "calibration_error", "per_class" {name: {"accuracy",
      "f1", "examples"}}, with attention "attention_share" {m: mean}, and with quality as well
      `share_quality`. A number that the data do not define is NaN.
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
    if predictions.attention_share:
        result["attention_share"] = mean_shares(predictions)
    if predictions.attention_share and predictions.quality:
        result |= share_quality(predictions)
    return result


def share_quality(predictions: Predictions) -> dict[str, Any]:
    """Correlation of attention with quality.

    Returns:
      "quality_correlation", the dynamics measure (`statistics.quality_contrast_correlation`), and
      for each modality "pearson" and "spearman" of its share with its own quality alone.
    """
    share, quality = predictions.attention_share, predictions.quality
    quality = {m: quality[m] for m in share}
    result: dict[str, Any] = {
        "pearson": {m: statistics.pearson(share[m], quality[m]) for m in share},
        "spearman": {m: statistics.spearman(share[m], quality[m]) for m in share},
    }
    if len(share) > 1:
        correlation = statistics.quality_contrast_correlation(share, quality)
        result = {"quality_correlation": correlation} | result
    return result


def _with_prefix(columns: Mapping[str, Array], prefix: str) -> dict[str, Array]:
    names = sorted(name for name in columns if name.startswith(prefix))
    return {name.removeprefix(prefix): columns[name] for name in names}
