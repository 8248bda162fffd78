"""Made-up runs that look like real ones, for figures and reports."""

import functools

import jax
import numpy as np

from rollingq_jax.analysis.metrics import model_input
from rollingq_jax.data.dataset import ArraySource, Dataset, ModalityInfo
from rollingq_jax.models import build_model

CLASSES = 4


def run_rows(
    seed=0, *, rolls=(6, 12), epochs=24, steps=18, modalities=("audio", "visual"), heads=1, lift=0.0
):
    """Rows of metrics.jsonl of a run whose attention drifts to one modality until it rolls."""
    rng = np.random.default_rng(seed)
    rows, lean, share = [], 0.0, 0.52
    for step in range(1, epochs * steps + 1):
        epoch = step / steps
        lean += (0.9 - lean) * 0.012
        share += (0.5 + 0.42 * lean - share) * 0.05
        knowledge = 1 - np.exp(-epoch / 6)
        shown = {
            "imbalance": abs(lean + rng.normal(0, 0.03)),
            "accuracy": (0.58 + lift) * knowledge + 0.08 + rng.normal(0, 0.03),
            "loss": 2.3 - 1.4 * knowledge,
            "probe_accuracy/audio": 0.45 * knowledge + 0.1 + rng.normal(0, 0.02),
            "probe_accuracy/visual": (0.38 + 2 * lift) * knowledge + 0.1 + rng.normal(0, 0.02),
            "rotations": sum(step > r * steps for r in rolls),
        }
        first = np.clip(share + rng.normal(0, 0.015), 0, 1)
        rest = (1 - first) / (len(modalities) - 1)
        shown |= {
            f"attention_share/{m}": first if i == 0 else rest for i, m in enumerate(modalities)
        }
        base = {"step": step, "epoch": int(epoch)}
        if step % 6 == 0:
            rows.append({**base, "split": "train", **shown})
        if step % steps == 0:
            rows.append({**base, "split": "valid", **shown})
            if step // steps in rolls:
                for head in range(heads):
                    rows.append(
                        {
                            **base,
                            "split": "roll",
                            "head": head,
                            "imbalance_before": lean,
                            "imbalance_after": 0.12,
                            "angle_degrees": 61.0 - step / steps,
                        }
                    )
                lean, share = 0.12, 0.5
    rows.append({**rows[-1], **shown, "split": "test", "accuracy": shown["accuracy"] - 0.01})
    return rows


def cloud(seed=0, *, samples=300, dim=64, angle=75.0, norm=1.0):
    """A query [dim] and each modality's mean keys [samples, dim]; visual is ``angle`` away."""
    rng = np.random.default_rng(seed)
    basis = np.linalg.qr(rng.normal(size=(dim, dim)))[0].T
    query = 0.9 * basis[0]
    turn = np.deg2rad(angle)
    audio = 0.94 * basis[0] - 0.3 * basis[1] + 0.15 * basis[2]
    visual = np.cos(turn) * basis[0] + np.sin(turn) * basis[1] + 0.2 * basis[3]
    # Spread in a few directions, as mean keys of one class have it, and a little in all.
    spread = rng.normal(size=(2, samples, 12)) @ basis[:12] * 0.1
    spread += rng.normal(size=(2, samples, dim)) * 0.02
    return query, {"audio": norm * (audio + spread[0]), "visual": norm * (visual + spread[1])}


def shares_and_qualities(seed=0, *, samples=500, follow=0.06, bias=0.15):
    """Attention shares [N] that follow quality by ``follow`` per standard deviation of noise."""
    rng = np.random.default_rng(seed)
    noisy = rng.uniform(size=(2, samples)) < 0.5
    quality = {
        "audio": -np.where(noisy[0], rng.uniform(0, 4, samples), 0.0),
        "visual": -np.where(noisy[1], rng.uniform(0, 2, samples), 0.0),
    }
    audio = 0.5 + bias + follow * (quality["audio"] - quality["visual"])
    audio = np.clip(audio + rng.normal(0, 0.07, samples), 0.01, 0.99)
    return {"audio": audio, "visual": 1 - audio}, quality


def noise_points(seed=0, *, follows=False, levels=(0.0, 0.25, 0.5, 1.0, 2.0, 4.0)):
    """Accuracy and share under noise; a model that ``follows`` quality looks away from noise."""
    rng = np.random.default_rng(seed)
    points = []
    for modality, weight in (("audio", 0.35), ("visual", 0.12)):
        for level in levels:
            lost = 1 - np.exp(-level / 1.2)
            accuracy = 0.62 - weight * lost * (0.75 if follows else 1) + rng.normal(0, 0.01)
            share = {"audio": 0.5, "visual": 0.5} if follows else {"audio": 0.75, "visual": 0.25}
            noised = share[modality] * (1 - 0.4 * lost * follows) + rng.normal(0, 0.01)
            other = "visual" if modality == "audio" else "audio"
            points.append(
                {
                    "modality": modality,
                    "level": level,
                    "accuracy": accuracy,
                    "attention_share": {modality: noised, other: 1 - noised},
                }
            )
    return points


def looking_examples(seed=0):
    """Examples for the attention figure: spectrogram 32 x 32 in 8 x 8, image 8 x 8 in 2 x 2."""
    from sklearn.datasets import load_digits

    from rollingq_jax.analysis.plots import AttentionExample, ModalityView

    rng = np.random.default_rng(seed)
    digits = load_digits()
    examples = []
    for i in (3, 11, 25):
        frequency, time = np.mgrid[0:32, 0:32] / 32
        voice = sum(
            np.exp(-((frequency - 0.12 * k - 0.1 * np.sin(3 * time + i)) ** 2) / 6e-4)
            for k in (1, 3, 5)
        )
        voice = voice * np.exp(-((time - 0.45) ** 2) / 0.06) + rng.normal(0, 0.08, (32, 32))
        image = digits.images[i] / 16
        heard = voice.T.reshape(4, 8, 4, 8).std(axis=(1, 3)).ravel() ** 1.5
        seen = image.reshape(4, 2, 4, 2).std(axis=(1, 3)).ravel()
        weights = np.concatenate([[0.5], heard * 4, [0.4], seen + 0.1])
        weights = weights / weights.sum()
        views = (
            ModalityView("audio", "spectrogram", voice[..., None], weights[:17], (8, 8)),
            ModalityView("visual", "image", image[..., None], weights[17:], (2, 2)),
        )
        label = digits.target[i]
        examples.append(AttentionExample(f"true {label}\npredicted {label}\nnoise 0, 1.3", views))
    return examples


@functools.cache
def small_model(fusion="attention"):
    """An untrained model, its parameters, a data set of 9 examples, and those as columns."""
    config = {
        "fusion": fusion,
        "num_classes": CLASSES,
        "dim": 8,
        "depth": 1,
        "num_heads": 2,
        "fusion_heads": 2 if fusion == "attention" else 1,
        "fusion_token_scale": 1.0,
        "encoders": {
            "audio": {"kind": "spectrogram", "patch": (2, 3)},
            "visual": {"kind": "image", "patch": (2, 2)},
        },
    }
    model = build_model(config)
    rng = np.random.default_rng(0)
    columns = {
        "audio": rng.normal(size=(9, 6, 8, 1)).astype(np.float32),
        "visual": rng.normal(size=(9, 4, 4, 1)).astype(np.float32),
        "label": (np.arange(9) % CLASSES).astype(np.int32),
        "quality_audio": -np.arange(9, dtype=np.float32),
        "quality_visual": np.zeros(9, np.float32),
    }
    modalities = {
        "audio": ModalityInfo("audio", "spectrogram", (6, 8, 1)),
        "visual": ModalityInfo("visual", "image", (4, 4, 1)),
    }
    source = ArraySource(columns)
    dataset = Dataset({"train": source, "test": source}, modalities, CLASSES)
    init = jax.jit(model.init)
    params = init(jax.random.key(0), model_input(columns))["params"]
    return model, params, dataset, columns


def scale_points():
    """Points of `probes.attention_scale_curve`: attention that does harm."""
    return [
        {"scale": s, "accuracy": 0.83 - s / 50, "attention_share": {"audio": a, "visual": 1 - a}}
        for s, a in ((0.0, 0.5), (0.5, 0.58), (1.0, 0.64), (2.0, 0.8), (4.0, 0.95))
    ]
