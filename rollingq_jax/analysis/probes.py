"""What a trained model does when a modality gets worse, is exchanged or is taken away."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.analysis.metrics import (
    PredictFn,
    Predictions,
    check_answers,
    collect,
    mean_shares,
    share_quality,
)
from rollingq_jax.analysis.tasks import SINGLE, Task
from rollingq_jax.data.corruption import SwappedModality, corrupt
from rollingq_jax.data.dataset import Dataset, Source, labels_of
from rollingq_jax.data.pipeline import eval_batches

Array = np.ndarray

NOISE_LEVELS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
ATTENTION_SCALES = (0.0, 0.5, 1.0, 2.0, 4.0)


class Probe(NamedTuple):
    """A model and how a split of its data is read.

    Attributes:
      predict: see `metrics.PredictFn`.
      dataset: its training split is where the units of noise come from.
      split: the one to read, with the data set's transformations for evaluation.
      batch_size: of the passes.
      seed: of the noise and of which examples are exchanged.
      encoders: `config.model.encoders`, as `rollingq_jax.data.corruption.corrupt` takes it.
      task: what the model has learned; its main metric stands in place of the accuracy.
    """

    predict: PredictFn
    dataset: Dataset
    split: str = "test"
    batch_size: int = 64
    seed: int = 0
    encoders: Mapping[str, Any] | None = None
    task: Task = SINGLE

    def score(self, predictions: Predictions) -> dict[str, float]:
        """The task's main metric, by its name."""
        return {self.task.main: self.task.main_score(predictions)}


def predict(probe: Probe, corruption: str = "") -> Predictions:
    """Predictions for the split, corrupted as `corruption` says (`rollingq_jax.data.corruption`).

    Examples whose logits are not finite are warned of. Under a corruption all may be so: that is
    an answer about the corruption, and the accuracy is 0.

    Raises:
      ConfigError: the corruption is malformed or does not fit the modality.
      NonFiniteError: without a corruption, the logits of every example are NaN or infinite.
    """
    source = probe.dataset.splits[probe.split]
    if not corruption:
        return _read(probe, probe.dataset, source)
    # Under a name of its own, so that probing the training split corrupts it as any other.
    known = probe.dataset.splits
    splits = {"probed": source} | ({"train": known["train"]} if "train" in known else {})
    corrupted = corrupt(
        dataclasses.replace(probe.dataset, splits=splits),
        corruption,
        seed=probe.seed,
        encoders=probe.encoders,
    )
    return _read(probe, corrupted, corrupted.splits["probed"], corruption)


def corruption_curve(
    probe: Probe,
    modality: str,
    levels: Sequence[float] = NOISE_LEVELS,
    *,
    clean: Predictions | None = None,
) -> list[dict[str, Any]]:
    """Accuracy and attention share while Gaussian noise in one modality grows.

    Args:
      probe: the model and the split.
      modality: the one that is noised; it may not hold token ids.
      levels: standard deviations of the noise, in training-set standard deviations.
      clean: predictions without noise, where they have been made already, for level 0.

    Returns:
      A point for each level: "modality", "level", "accuracy" and "attention_share" {m: mean}.
    """
    points = []
    for level in levels:
        found = (clean if level == 0 else None) or predict(probe, f"{modality}={float(level)!r}")
        point = {"modality": modality, "level": float(level), **probe.score(found)}
        points.append(point | {"attention_share": mean_shares(found)})
    return points


def attention_scale_curve(
    probe: Probe, scaled: Callable[[float], PredictFn], *, clean: Predictions | None = None
) -> list[dict[str, Any]]:
    """Accuracy and attention share while the trained query grows or vanishes.

    Where 0, the same weight for every token, is better than 1, what the query learned to prefer
    does harm; where it is worse, the look at the sample helps.

    Args:
      probe: the model and the split.
      scaled: the same model's `predict` with the query times a factor.
      clean: predictions of the model as it is, where they have been made already, for factor 1.

    Returns:
      A point for each of `ATTENTION_SCALES`: "scale", "accuracy", "attention_share" {m: mean} and,
      where the data carry qualities, "quality_correlation" (None where it is not defined, as at 0).
    """
    points = []
    for scale in ATTENTION_SCALES:
        found = clean if scale == 1 else None
        found = found or predict(probe._replace(predict=scaled(float(scale))))
        point: dict[str, Any] = {"scale": float(scale)} | probe.score(found)
        point["attention_share"] = mean_shares(found)
        if found.quality and len(found.attention_share) > 1:
            correlation = share_quality(found)["quality_correlation"] if scale else None
            point["quality_correlation"] = correlation
        points.append(point)
    return points


def reliance(probe: Probe, modality: str, clean: Predictions) -> dict[str, dict[str, Any]]:
    """How much the prediction rests on one modality.

    Three ways to take its information away: "shuffled", the modality of another example, chosen at
    random; "swapped", the modality of an example of another class, so that the modalities
    contradict each other; "replaced", noise in its place.

    Returns:
      For each way the main metric, as "accuracy" (against the example's own label), what the task's
      `changed` says against `clean`, as "unchanged" (predictions that are as there), and
      "attention_share"; for "swapped" also "follows", the share of predictions of the class that
      the swapped modality shows. "swapped" needs two classes of which an example has one, else it
      is absent.
    """
    source = probe.dataset.splits[probe.split]
    labels = labels_of(source)
    rng = np.random.default_rng((probe.seed, 1))
    others = other_class_partners(labels, rng)
    partners = {"shuffled": rng.permutation(len(source)), "swapped": others}

    def swapped(chosen: Array) -> SwappedModality:
        return SwappedModality(source, modality, lambda index: int(chosen[index]))

    found = {
        way: _read(probe, probe.dataset, swapped(chosen), f"{modality} {way}")
        for way, chosen in partners.items()
        if chosen is not None
    }
    found["replaced"] = predict(probe, f"{modality}=replace")
    result = {
        way: {
            **probe.score(predictions),
            **probe.task.changed(predictions, clean),
            "attention_share": mean_shares(predictions),
        }
        for way, predictions in found.items()
    }
    if others is not None:
        shown = labels[others]
        result["swapped"]["follows"] = float((found["swapped"].predicted == shown).mean())
    return result


def other_class_partners(labels: Array, rng: np.random.Generator) -> Array | None:
    """For each example the number of one of another class, [N]; None if there is one class, or
    labels are no classes."""
    classes = np.unique(labels)
    if labels.ndim > 1 or len(classes) < 2:
        return None
    partners = np.empty(len(labels), np.int64)
    for label in classes:
        here = labels == label
        partners[here] = rng.choice(np.flatnonzero(~here), here.sum())
    return partners


def _read(probe: Probe, dataset: Dataset, source: Source, changed: str = "") -> Predictions:
    """One pass; `changed` says what is not as it was in the split."""
    batches = eval_batches(
        source, batch_size=probe.batch_size, seed=probe.seed, transforms=dataset.eval_transforms
    )
    found = collect(probe.predict, batches)
    where = f"split {probe.split!r}" + (f" under {changed}" if changed else "")
    check_answers(found.nonfinite, len(found.label), where, fail=not changed)
    return found
