"""A run with a resnet18 encoder: stopped and resumed, loaded, exported; its averages are state."""

import jax
import numpy as np
import pytest

from rollingq_jax.export import export, read_variables
from rollingq_jax.inference import load
from rollingq_jax.models import resnet
from rollingq_jax.train import train_and_evaluate
from rollingq_jax.train.loop import load_run
from rollingq_jax.train.preemption import Interrupted
from tests.train import train_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Gray images, whose level tells the class, and vectors; every fifth lacks its image."""
    path = tmp_path_factory.mktemp("data") / "mine.npz"
    arrays = train_cases.make_arrays()
    rng = np.random.default_rng(1)
    for split, count in train_cases.SIZES.items():
        level = arrays[f"{split}/label"][:, None, None, None] - 1.0
        noise = rng.normal(size=(count, 20, 16, 1))
        arrays[f"{split}/a"] = (level + noise).astype(np.float32)
        arrays[f"{split}/mask_a"] = np.arange(count) % 5 > 0
    np.savez(path, **arrays)
    return path


def test_a_run_resumes_and_answers_alike_everywhere(data, tmp_path, monkeypatch):
    monkeypatch.setattr(resnet, "WIDTHS", (4, 8))
    encoders = {"a": {"kind": "resnet18"}}
    fields = {"model.depth": 0, "epochs": 2, "optimizer.ema_decay": 0.5}
    config = train_cases.tiny_config(data, **fields)
    config.model.encoders = encoders
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    summary = train_and_evaluate(config, whole, quiet=True)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, stopped, max_steps=8, quiet=True)
    assert train_and_evaluate(config, stopped, quiet=True)["test_loss"] == summary["test_loss"]
    run = load_run(whole)
    assert set(run.variables) == {"params", "batch_stats"}
    jax.tree.map(np.testing.assert_array_equal, run.variables, load_run(stopped).variables)
    stem = run.batch_stats["encoder_a"]["embed"]["norm"]
    assert (np.asarray(stem["var"]) != 1).all()

    arrays = np.load(data)
    batch = {m: arrays[f"test/{m}"] for m in ("a", "b")} | {"a_mask": arrays["test/mask_a"]}
    found = load(whole)(batch)
    accuracy = (found.probabilities.argmax(axis=1) == arrays["test/label"]).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])

    out, function = tmp_path / "model.safetensors", tmp_path / "model.bin"
    export(whole, out, stablehlo=function, fold=True)
    everything = batch | {"b_mask": np.ones(len(batch["b"]), bool)}
    answer = jax.export.deserialize(bytearray(function.read_bytes())).call(everything)
    np.testing.assert_allclose(answer[0], found.probabilities, atol=1e-5)
    variables, _ = read_variables(out)
    jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], run.batch_stats)
