"""Losses and metrics as sums over examples, divided once at the end.

A padding row has weight 0, so every example counts once however the data are batched. What is said
of one modality (its probe, cosine, attention share) is summed over the examples that have it. An
example that has none still gets an answer of the main head, which counts in the accuracy and the
loss, and counts nowhere else. Logits that are NaN or infinite are an answer to no example: it is
counted as wrong, and left out of the losses, the cosines and the shares.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rollingq_jax.data.dataset import KEPT
from rollingq_jax.rotation import dot, normalize

Sums = dict[str, Array]


def example_weight(batch: Mapping[str, Array]) -> Array:
    """`[B]` float32: 1 for an example, 0 for padding."""
    if "example_mask" in batch:
        return batch["example_mask"].astype(jnp.float32)
    return jnp.ones(batch["label"].shape, jnp.float32)


def cross_entropy(logits: Array, label: Array) -> Array:
    """-log softmax(z)_y a row: `[B, C], [B] -> [B]` float32."""
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), label)


def modality_weight(out: Mapping[str, Any], weight: Array) -> Array:
    """`[M, B]`: an example's weight in the modalities that it has, 0 in those it lacks."""
    present = jnp.stack([out["present"][m] for m in sorted(out["present"])])
    return weight[None] * present.astype(weight.dtype)


def finite_rows(values: Array) -> Array:
    """Whether all numbers of an example are finite: `[B, ...] -> [B]` bool."""
    return jnp.all(jnp.isfinite(values), axis=tuple(range(1, values.ndim)))


def batch_sums(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array]) -> Sums:
    """Weighted sums over one batch of everything that is reported.

    Args:
      logits: `[B, C]`.
      out: what the model returns beside them.
      batch: with "label" `[B]` and, where there is padding, "example_mask" `[B]`.

    Returns:
      Sums by name, `[]` or, for the cosines, `[H]`. What normalises them: `weight`; `weight/<m>`,
      examples that have the modality; `attended/<m>`, those of them whose logits are finite;
      `unscored` and `unscored/<m>`, those whose logits, or the probe's, are not. `loss` is that of
      the main head. `kept/<m>` counts what `data.masking.ModalityDropout` could not drop.
    """
    weight, label = example_weight(batch), batch["label"]

    def total(values: Array, weight: Array = weight) -> Array:
        return jnp.sum(jnp.where(weight > 0, values.astype(jnp.float32), 0.0) * weight)

    def of_head(logits: Array, weight: Array) -> tuple[Array, Array, Array]:
        """Loss, right answers, and examples without an answer."""
        finite = finite_rows(logits)
        losses = jnp.where(finite, cross_entropy(logits, label), 0.0)
        right = finite & (jnp.argmax(logits, axis=-1) == label)
        return total(losses, weight), total(right, weight), total(~finite, weight)

    sums = {"weight": jnp.sum(weight)}
    sums["loss"], sums["accuracy"], sums["unscored"] = of_head(logits, weight)
    modalities = sorted(out["present"])
    weights = dict(zip(modalities, modality_weight(out, weight), strict=True))
    for m, probe in out["probe_logits"].items():
        loss, right, unscored = of_head(probe, weights[m])
        sums |= {f"probe_loss/{m}": loss, f"probe_accuracy/{m}": right, f"unscored/{m}": unscored}
        sums[f"weight/{m}"] = jnp.sum(weights[m])
    if "mean_keys" in out:
        query, answered = normalize(out["query"]), finite_rows(logits)
        for m in modalities:
            attended = weights[m] * answered.astype(weight.dtype)
            cosines = dot(query, normalize(out["mean_keys"][m]))
            sums[f"cosine/{m}"] = jnp.sum(
                jnp.where(attended[:, None] > 0, cosines, 0.0) * attended[:, None], axis=0
            )
            sums[f"attention_share/{m}"] = total(
                jnp.mean(out["attention_share"][m], axis=-1), attended
            )
            sums[f"attended/{m}"] = jnp.sum(attended)
    sums |= {name: total(value) for name, value in batch.items() if name.startswith(KEPT)}
    return sums


def add_sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two dicts of sums in float64; a sum that only one of them has stays as it is."""
    total = {name: np.asarray(value, np.float64) for name, value in first.items()}
    for name, value in second.items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def finish(sums: Mapping[str, Any]) -> dict[str, Any]:
    """Means from sums: the row of `metrics.jsonl`.

    Adds `imbalance`, the mean over heads of max_m c^m - min_m c^m, and, for two modalities, `air`,
    the mean over heads of c^1 - c^2. Both are over the modalities that an example had, and need two
    of them. Means over no example are NaN. Counts: `skipped`; `kept/<m>`; `examples/<m>`, those
    that have the modality, where some lack it; `nonfinite` and `nonfinite/<m>`, those whose logits
    were NaN or infinite, where there are any.
    """
    weight = float(sums["weight"])

    def number(kind: str, modality: str) -> float:
        """Examples behind a sum of a modality."""
        return float(sums.get(f"{kind}/{modality}", sums.get(f"weight/{modality}", weight)))

    row: dict[str, Any] = {}
    scores, cosines = [], 0
    for name, value in sums.items():
        kind, _, modality = name.partition("/")
        if kind == "cosine":
            cosines += 1
            count = number("attended", modality)
            score = np.asarray(value) / (count or math.nan)
            if count:
                scores.append(score)
            row[name] = float(np.mean(score))
        elif kind in ("loss", "accuracy"):
            unscored = float(sums.get("unscored", 0.0)) if kind == "loss" else 0.0
            row[name] = float(value) / ((weight - unscored) or math.nan)
        elif kind in ("probe_loss", "probe_accuracy"):
            count = number("weight", modality)
            if kind == "probe_loss":
                count -= float(sums.get(f"unscored/{modality}", 0.0))
            row[name] = float(value) / (count or math.nan)
        elif kind == "attention_share":
            row[name] = float(value) / (number("attended", modality) or math.nan)
        elif kind == "unscored" and value:
            row[name.replace("unscored", "nonfinite")] = int(value)
        elif kind == "weight" and modality and float(value) < weight:
            row[f"examples/{modality}"] = int(value)
        elif name == "skipped" or name.startswith(KEPT):
            row[name] = int(value)
    if cosines:
        stacked = np.stack(scores) if len(scores) > 1 else np.full([1, 1], np.nan)
        row["imbalance"] = float(np.mean(stacked.max(0) - stacked.min(0)))
    if cosines == 2:
        row["air"] = float(np.mean(scores[0] - scores[1])) if len(scores) == 2 else math.nan
    return row


def psum(tree: Any, axis_name: str | None) -> Any:
    """Sum over the replicas of a mapped axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
