"""Runs with a method of comparison: stopped and continued, they end as if never stopped."""

import json

import numpy as np
import pytest

from rollingq_jax.train import default_config, load_run, train_and_evaluate
from rollingq_jax.train.preemption import Interrupted

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]


@pytest.fixture
def config(tmp_path):
    """Three epochs of three steps over two modalities of vectors."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in {"train": 24, "valid": 8, "test": 8}.items():
        label = np.arange(count, dtype=np.int32) % 2
        arrays[f"{split}/label"] = label
        for name in ("audio", "visual"):
            values = rng.normal(size=(count, 5)) + label[:, None]
            arrays[f"{split}/{name}"] = values.astype(np.float32)
    np.savez(tmp_path / "data.npz", **arrays)
    config = default_config()
    config.update_from_flattened_dict(
        {
            "epochs": 3,
            "batch_size": 8,
            "optimizer.warmup_epochs": 0.5,
            "optimizer.learning_rate": 0.1,
            "data.name": "arrays",
            "data.path": str(tmp_path / "data.npz"),
            "model.fusion": "concat",
            "model.dim": 8,
            "model.depth": 1,
            "model.num_heads": 2,
            "model.mlp_ratio": 1.0,
        }
    )
    return config


@pytest.mark.parametrize(
    "name", ["pmr", "ogm_ge", "agm", "cggm", "inforeg", "opm", "qmf", "umt", "gblend"]
)
def test_a_stopped_run_goes_on_to_the_same_end(config, tmp_path, name):
    config.baseline.name = name
    if name == "gblend":
        config.baseline.gblend_every = 1
    if name == "qmf":
        config.model.fusion, config.rolling.enabled = "qmf", False
    train_and_evaluate(config, tmp_path / "whole", quiet=True)
    with pytest.raises(Interrupted):  # within the second epoch: PMR has prototypes, and sums
        train_and_evaluate(config, tmp_path / "cut", max_steps=5, quiet=True)
    train_and_evaluate(config, tmp_path / "cut", quiet=True)
    first, second = (
        json.loads((tmp_path / folder / "summary.json").read_text()) for folder in ("whole", "cut")
    )
    assert first["test_loss"] == second["test_loss"] and first["best"] == second["best"]
    assert load_run(tmp_path / "cut").config.baseline.name == name


def test_gblend_measures_its_weights_alike_over_every_layout(config, tmp_path):
    """Trained alone, a head leaves the run as it was: its rolls are its own, and few."""
    config.update_from_flattened_dict(
        {
            "baseline.name": "gblend",
            "baseline.gblend_every": 2,
            "model.fusion": "attention",
            "rolling.check_every": 3,
        }
    )
    rows = {}
    for layout in ("jit", "pmap"):
        config.parallel = layout
        summary = train_and_evaluate(config, tmp_path / layout, quiet=True)
        lines = (tmp_path / layout / "metrics.jsonl").read_text().splitlines()
        rows[layout] = [row for row in map(json.loads, lines) if row["split"] == "valid"]
        assert 0 < sum(summary["rotations"]) <= 3
    weights = np.asarray(
        [
            [[row[f"loss_weight/{m}"] for m in ("audio", "visual", "joint")] for row in one]
            for one in rows.values()
        ]
    )
    np.testing.assert_allclose(weights.sum(axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert np.all(weights[:, 1] != weights[:, 2])
    np.testing.assert_allclose(weights[0], weights[1], rtol=1e-3)
