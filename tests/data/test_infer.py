"""Inferred models: patch rules, overrides, and a forward pass of every kind."""

import jax
import numpy as np
import pytest

from rollingq_jax.data.dataset import (
    MAX_TOKENS,
    ModalityInfo,
    infer_encoders,
    infer_model,
    infer_patch,
    num_tokens,
)
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.sources.arrays import from_arrays
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import build_model


@pytest.mark.parametrize(
    ("kind", "shape", "patch"),
    [
        ("image", (28, 28, 1), (4, 4)),
        ("image", (8, 8, 1), (2, 2)),
        ("image", (32, 32, 3), (4, 4)),
        ("image", (1, 50, 3), (1, 2)),
        ("image", (1, 1, 3), (1, 1)),
        ("spectrogram", (20, 200, 1), (10, 10)),
        ("video", (3, 224, 224, 3), (1, 28, 28)),
        ("video", (8, 64, 64, 3), (1, 16, 16)),
        ("sequence", (50, 35), None),
        ("tokens", (50,), None),
        ("vector", (50,), None),
    ],
)
def test_patches(kind, shape, patch):
    assert infer_patch(ModalityInfo("m", kind, shape)) == patch


@pytest.mark.parametrize("kind", ["image", "spectrogram", "video"])
def test_there_are_some_tokens_and_not_too_many(kind):
    rng = np.random.default_rng(0)
    for _ in range(300):
        height, width = rng.integers(1, 1200, 2).tolist()
        shape = (height, width, 1) if kind != "video" else (5, height, width, 1)
        info = ModalityInfo("m", kind, shape)
        patch = infer_patch(info)
        assert 1 <= num_tokens(info, patch) <= MAX_TOKENS[kind]


def test_a_long_video_keeps_one_patch_a_frame():
    info = ModalityInfo("m", "video", (300, 20, 20, 3))
    assert num_tokens(info, infer_patch(info)) == 300


INFO = {
    "audio": ModalityInfo("audio", "spectrogram", (32, 32, 1)),
    "visual": ModalityInfo("visual", "image", (8, 8, 1), "uint8", mean=(0.5,), std=(0.2,)),
}


def test_overrides_win_field_by_field():
    encoders = infer_encoders(INFO, {"visual": {"patch": (8, 8), "depth": 3, "mean": None}})
    assert encoders["visual"] == {
        "kind": "image", "patch": (8, 8), "depth": 3, "mean": (0.5,), "std": (0.2,),
    }  # fmt: skip
    assert encoders["audio"] == {"kind": "spectrogram", "patch": (4, 4)}
    assert infer_encoders(INFO, {"audio": {"kind": "image"}})["audio"]["kind"] == "image"


def test_impossible_overrides():
    with pytest.raises(ConfigError, match="model.encoders.text.*audio, visual"):
        infer_encoders(INFO, {"text": {}})
    with pytest.raises(ConfigError, match="model.encoders.audio.kind.*2 axes"):
        infer_encoders(INFO, {"audio": {"kind": "sequence"}})


def make_dataset():
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 30), ("test", 9)):
        arrays |= {
            f"{split}/label": np.arange(count) % 3,
            f"{split}/clip": rng.integers(0, 255, (count, 2, 9, 8, 3)).astype("u1"),
            f"{split}/photo": rng.integers(0, 255, (count, 9, 8)).astype("u1"),
            f"{split}/sound": rng.normal(size=(count, 12, 9, 1)),
            f"{split}/steps": rng.normal(size=(count, 6, 5)),
            f"{split}/mask_steps": rng.integers(0, 2, (count, 6)),
            f"{split}/table": rng.normal(size=(count, 4)) * 1e5,
            f"{split}/words": rng.integers(0, 20, (count, 7)),
        }
    return from_arrays(arrays)


def test_every_kind_runs_in_the_inferred_model():
    dataset = make_dataset()
    fields = infer_model(dataset, {"dim": 16, "depth": 1, "num_heads": 2, "num_classes": 0})
    assert fields["num_classes"] == 3
    model = build_model(fields)
    batch = next(iter(eval_batches(dataset.splits["test"], batch_size=4)))
    (logits, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    assert logits.shape == (4, 3)
    assert sorted(out["tokens"]) == ["clip", "photo", "sound", "steps", "table", "words"]
    for name, info in dataset.modalities.items():
        expected = 1 + num_tokens(info, fields["encoders"][name].get("patch"))
        assert out["tokens"][name].shape[1] == expected


def test_model_overrides():
    dataset = make_dataset()
    assert infer_model(dataset)["dim"] == 64
    fields = infer_model(dataset, {"dropout": 0.0, "num_classes": 5, "modality": None})
    assert fields["dropout"] == 0.0 and fields["num_classes"] == 5 and "modality" not in fields
    with pytest.raises(ConfigError, match="model.num_classes: 2; the data have 3"):
        infer_model(dataset, {"num_classes": 2})
