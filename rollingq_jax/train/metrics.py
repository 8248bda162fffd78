"""Losses and metrics as sums over examples, divided once at the end.

A padding row has weight 0, so every example counts once however the data are batched.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from rollingq_jax.rotation import dot, unit

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


def batch_sums(logits: Array, out: Mapping[str, Any], batch: Mapping[str, Array]) -> Sums:
    """Weighted sums over one batch of everything that is reported.

    Args:
      logits: `[B, C]`.
      out: what the model returns beside them.
      batch: with "label" `[B]` and, where there is padding, "example_mask" `[B]`.

    Returns:
      Sums by name, `[]` or, for the cosines, `[H]`; `weight` and `weight/<m>` normalise them.
      `loss` is that of the main head.
    """
    weight, label = example_weight(batch), batch["label"]

    def total(values: Array, weight: Array = weight) -> Array:
        return jnp.sum(jnp.where(weight > 0, values.astype(jnp.float32), 0.0) * weight)

    sums = {
        "weight": jnp.sum(weight),
        "loss": total(cross_entropy(logits, label)),
        "accuracy": total(jnp.argmax(logits, axis=-1) == label),
    }
    for m, probe in out["probe_logits"].items():
        sums[f"probe_loss/{m}"] = total(cross_entropy(probe, label))
        sums[f"probe_accuracy/{m}"] = total(jnp.argmax(probe, axis=-1) == label)
    if "mean_keys" in out:
        query = unit(out["query"])
        weights = modality_weight(out, weight)
        for m, of_modality in zip(sorted(out["mean_keys"]), weights, strict=True):
            cosines = dot(query, unit(out["mean_keys"][m]))
            of_modality = of_modality[:, None]
            sums[f"cosine/{m}"] = jnp.sum(
                jnp.where(of_modality > 0, cosines, 0.0) * of_modality, axis=0
            )
            sums[f"weight/{m}"] = jnp.sum(of_modality)
            share = out["attention_share"][m]
            sums[f"attention_share/{m}"] = total(jnp.mean(share, axis=-1))
    return sums


def add_sums(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Adds two dicts of sums in float64; a sum that only one of them has stays as it is."""
    total = {name: np.asarray(value, np.float64) for name, value in first.items()}
    for name, value in second.items():
        total[name] = total.get(name, 0.0) + np.asarray(value, np.float64)
    return total


def finish(sums: Mapping[str, Any]) -> dict[str, float]:
    """Means from sums: the row of `metrics.jsonl`.

    Adds `imbalance`, the mean over heads of max_m c^m - min_m c^m, and, for two modalities, `air`,
    the mean over heads of c^1 - c^2. Means over no example are NaN; `skipped` stays a count.
    """
    weight = float(sums["weight"]) or float("nan")
    row, scores = {}, []
    for name, value in sums.items():
        kind, _, modality = name.partition("/")
        if kind == "weight":
            continue
        if kind == "cosine":
            score = np.asarray(value) / max(float(sums[f"weight/{modality}"]), 1.0)
            scores.append(score)
            row[name] = float(np.mean(score))
        elif kind == "skipped":
            row[name] = int(value)
        else:
            row[name] = float(value) / weight
    if scores:
        stacked = np.stack(scores)
        row["imbalance"] = float(np.mean(stacked.max(0) - stacked.min(0)))
    if len(scores) == 2:
        row["air"] = float(np.mean(scores[0] - scores[1]))
    return row


def psum(tree: Any, axis_name: str | None) -> Any:
    """Sum over the replicas of a mapped axis; the tree itself where there is none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)
