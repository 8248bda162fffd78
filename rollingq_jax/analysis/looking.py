"""Chosen examples with the attention over them, for `plots.attention_figure`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rollingq_jax.analysis import statistics, tokens
from rollingq_jax.analysis.plots import AttentionExample, ModalityView
from rollingq_jax.analysis.predictions import Predictions, model_input
from rollingq_jax.data.corruption import has_modality
from rollingq_jax.data.dataset import Dataset, Subset
from rollingq_jax.data.pipeline import eval_batches

Array = np.ndarray


def choose_examples(predictions: Predictions, count: int = 4) -> Array:
    """Numbers of examples that differ as much as possible in which modality is the better one.

    From the lowest to the highest quality contrast of the first modality, in even steps, of the
    examples that have it and another; where the quality is not known, in even steps through the
    data. No example twice.
    """
    order = np.arange(len(predictions.label))
    if len(predictions.quality) > 1:
        contrasts = statistics.quality_contrast(predictions.quality)
        contrast = contrasts[sorted(contrasts)[0]]
        known = int(np.isfinite(contrast).sum())
        order = np.argsort(contrast, kind="stable")[: known or None]  # NaN comes last
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def attention_examples(
    model: Any,
    params: Any,
    rotation: Any,
    dataset: Dataset,
    split: str,
    indices: Sequence[int] | Array,
    *,
    seed: int = 0,
) -> list[AttentionExample]:
    """The chosen examples as the model sees them, with its attention, mean over heads.

    Args:
      model: from `build_model`, with attention fusion; its ``spec`` says how inputs are patched.
      params, rotation: as in training.
      dataset, split, indices: which examples; captions have the class names and the noise.
      seed: of the data set's random transformations.
    """
    batch = next(
        eval_batches(
            Subset(dataset.splits[split], indices),
            batch_size=len(indices),
            seed=seed,
            transforms=dataset.eval_transforms,
        )
    )
    logits, out = jax.jit(
        lambda batch: model.apply(
            {"params": params}, batch, rotation=rotation, return_attention=True
        )
    )(model_input(batch))
    attention = np.array(out["attention"], np.float64)
    attention[..., 0] = 0.0
    # Each head's weights over the modalities' tokens sum to 1, as in the attention share; to 0 in
    # an example without any modality, or without finite weights.
    attention = np.where(np.isfinite(attention), attention, 0.0)
    total = attention.sum(axis=-1, keepdims=True)
    attention = (attention / np.where(total > 0, total, 1.0)).mean(axis=1)
    logits = np.asarray(logits)
    predicted = np.where(np.isfinite(logits).all(axis=-1), logits.argmax(axis=-1), -1)
    encoders = sorted(model.spec.encoders, key=lambda encoder: encoder.name)
    lengths = {
        e.name: tokens.num_tokens(e.kind, batch[e.name].shape[1:], e.patch) for e in encoders
    }
    weights = tokens.split_attention(attention, lengths)
    return [
        AttentionExample(
            _caption(batch, row, int(predicted[row]), dataset.class_names),
            tuple(
                ModalityView(e.name, e.kind, batch[e.name][row], weights[e.name][row], e.patch)
                for e in encoders
            ),
        )
        for row in range(len(indices))
    ]


def _caption(batch: dict[str, Array], row: int, predicted: int, names: Sequence[str]) -> str:
    classes = (int(batch["label"][row]), predicted)
    shown = ["none" if c < 0 else names[c] if names else str(c) for c in classes]
    lines = [f"true {shown[0]}", f"predicted {shown[1]}"]
    example = {name: value[row] for name, value in batch.items()}
    for name in sorted(batch):
        if name.startswith("quality_"):
            modality, noise = name.removeprefix("quality_"), -float(batch[name][row])
            if np.isfinite(noise) and has_modality(example, modality):
                lines.append(f"{modality} noise {max(noise, 0.0):.1f}")
    return "\n".join(lines)
