"""A run with a quality bias: stopped and resumed, loaded, exported, evaluated."""

import json

import jax
import numpy as np
import pytest

from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.evaluate import evaluate
from rollingq_jax.export import export, read_exported, read_variables
from rollingq_jax.inference import load
from rollingq_jax.train import train_and_evaluate
from rollingq_jax.train.loop import load_run
from rollingq_jax.train.preemption import Interrupted
from tests.train import train_cases

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "mine.npz"
    arrays = train_cases.make_arrays()
    rng = np.random.default_rng(1)
    for (
        split,
        count,
    ) in train_cases.SIZES.items():  # several tokens, so that their mean can be short
        for name in ("a", "b"):
            one = arrays[f"{split}/{name}"]
            noise = rng.normal(size=(count, 3, one.shape[1]))
            arrays[f"{split}/{name}"] = (one[:, None] + noise).astype(np.float32)
        arrays[f"{split}/mask_a"] = np.ones((count, 3), bool)
        arrays[f"{split}/mask_a"][::5] = False  # every fifth lacks it
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module", params=("norm", "energy"))
def finished(data, tmp_path_factory, request):
    """A run with a quality bias, and its summary."""
    workdir = tmp_path_factory.mktemp("run")
    fields = {"model.quality_bias": 1.5, "model.quality_signal": request.param}
    config = train_cases.tiny_config(data, **fields, **{"model.depth": 0, "epochs": 2})
    return workdir, config, train_and_evaluate(config, workdir, quiet=True)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(finished, tmp_path):
    workdir, config, summary = finished
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=8, quiet=True)
    resumed = train_and_evaluate(config, tmp_path, quiet=True)
    assert resumed["test_accuracy"] == summary["test_accuracy"]
    ours, theirs = load_run(workdir), load_run(tmp_path)
    for one, other in zip(
        jax.tree.leaves((ours.variables, ours.quality)),
        jax.tree.leaves((theirs.variables, theirs.quality)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    assert (ours.variables["quality"]["fusion"]["scale"] > 0).all()


def test_a_finished_run_answers_alike_everywhere(finished, data, tmp_path):
    """In its summary, loaded, exported as a function, and from its exported weights."""
    workdir, _, summary = finished
    arrays = np.load(data)
    batch = {m: arrays[f"test/{m}"] for m in ("a", "b")} | {"a_mask": arrays["test/mask_a"]}
    found = load(workdir)(batch)
    accuracy = (found.probabilities.argmax(axis=1) == arrays["test/label"]).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])

    out, function = tmp_path / "model.safetensors", tmp_path / "model.bin"
    export(workdir, out, stablehlo=function)
    everything = batch | {"b_mask": np.ones((len(batch["b"]), 3), bool)}
    answer = jax.export.deserialize(bytearray(function.read_bytes())).call(everything)
    np.testing.assert_allclose(answer[0], found.probabilities, atol=2e-6)
    np.testing.assert_allclose(answer[1]["a"], found.attention_share["a"], atol=2e-6)

    run = load_run(workdir)
    variables, rotation = read_variables(out)
    assert variables.keys() == {"params", "quality"}
    assert read_exported(out)[0].keys() == run.params.keys()
    for ours, theirs in zip(
        jax.tree.leaves((variables, rotation)),
        jax.tree.leaves((run.variables, run.rotation)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(UserError, match="--fold is given and model.quality_bias is 1.5"):
        export(workdir, out, fold=True)

    result = evaluate(workdir, full_probes=True, levels=(1.0,))
    assert result["accuracy"] == pytest.approx(summary["test_accuracy"])
    shuffled = json.loads((workdir / "evaluation.json").read_text())["quality_shuffled"]
    assert shuffled["unchanged"] <= 1.0 and shuffled["attention_share"].keys() == {"a", "b"}


def test_a_model_without_the_bias_has_the_old_tree(data, tmp_path):
    config = train_cases.tiny_config(data, epochs=1, **{"optimizer.warmup_epochs": 0.5})
    train_and_evaluate(config, tmp_path, quiet=True, test=False)
    run = load_run(tmp_path)
    assert run.quality is None and run.variables.keys() == {"params"}
    saved = next((tmp_path / "checkpoints").glob("*/state/_METADATA"))
    assert "quality" not in saved.read_text()


def test_upstreams_choices_are_refused_with_it(data, tmp_path):
    config = train_cases.tiny_config(
        data, **{"model.quality_bias": 1.0, "upstream_compat.last_batch_air": True}
    )
    with pytest.raises(ConfigError, match="allowed with model.quality_bias 1: False"):
        train_and_evaluate(config, tmp_path, quiet=True)
