"""Chosen examples with the attention over them, for `plots.attention_figure`."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from rollingq_jax.analysis import statistics, tokens
from rollingq_jax.analysis.plots import AttentionExample, ModalityView
from rollingq_jax.analysis.predictions import Predictions, model_input
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.types import Dataset, Subset

Array = np.ndarray


def choose_examples(predictions: Predictions, count: int = 4) -> Array:
    """Numbers of examples that differ as much as possible in which modality is the better one.

    From the lowest to the highest quality contrast of the first modality, in even steps; where the
    quality is not known, in even steps through the data. No example twice.
    """
    total = len(predictions.label)
    steps = np.linspace(0, total - 1, min(count, total)).round().astype(int)
    if len(predictions.quality) < 2:
        return steps
    contrast = statistics.quality_contrast(predictions.quality)
    return np.argsort(contrast[sorted(contrast)[0]], kind="stable")[steps]


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
    # Each head's weights over the modalities' tokens sum to 1, as in the attention share.
    attention = (attention / attention.sum(axis=-1, keepdims=True)).mean(axis=1)
    predicted = np.asarray(logits).argmax(axis=-1)
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
    shown = [names[c] if names else str(c) for c in (int(batch["label"][row]), predicted)]
    lines = [f"true {shown[0]}", f"predicted {shown[1]}"]
    for name in sorted(batch):
        if name.startswith("quality_"):
            noise = -float(batch[name][row])
            lines.append(f"{name.removeprefix('quality_')} noise {max(noise, 0.0):.1f}")
    return "\n".join(lines)
