"""Runs of models that have state beside their parameters: a quality's scale, running averages.

Stopped and resumed, loaded, exported, evaluated.
"""

import json

import jax
import numpy as np
import pytest

from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.evaluate import evaluate
from rollingq_jax.export import export, read_exported, read_variables
from rollingq_jax.inference import load
from rollingq_jax.models import resnet
from rollingq_jax.train import report, train_and_evaluate
from rollingq_jax.train.loop import load_run
from rollingq_jax.train.preemption import Interrupted
from tests.train import train_cases

pytestmark = pytest.mark.slow


def write(path, kind):
    """Modality a is missing in every fifth example; b comes as vectors but for a quality.

    For a quality each has several tokens, so that their mean can be short; for a ResNet a is a gray
    image whose level tells the class.
    """
    arrays = train_cases.make_arrays()
    rng = np.random.default_rng(1)
    for split, count in train_cases.SIZES.items():
        present = np.arange(count) % 5 > 0
        if kind == "resnet18":
            level = arrays[f"{split}/label"][:, None, None, None] - 1.0
            noise = rng.normal(size=(count, 20, 16, 1))
            arrays[f"{split}/a"] = (level + noise).astype(np.float32)
        else:
            for name in ("a", "b"):
                one = arrays[f"{split}/{name}"]
                noise = rng.normal(size=(count, 3, one.shape[1]))
                arrays[f"{split}/{name}"] = (one[:, None] + noise).astype(np.float32)
            present = np.repeat(present[:, None], 3, axis=1)
        arrays[f"{split}/mask_a"] = present
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def sequences(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "mine.npz", "sequence")


@pytest.fixture(scope="module", params=("norm", "energy", "resnet18"))
def finished(tmp_path_factory, request):
    """A run with a quality bias of this kind or with this encoder, and its summary."""
    folder = tmp_path_factory.mktemp("run")
    config = train_cases.tiny_config(
        write(folder / "mine.npz", request.param), epochs=2, **{"model.depth": 0}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda *args, **kwargs: None)
        if request.param == "resnet18":
            patch.setattr(resnet, "WIDTHS", (4, 8))
            config.model.encoders = {"a": {"kind": "resnet18"}}
            config.optimizer.ema_decay = 0.5
        else:
            config.model.quality_bias, config.model.quality_signal = 1.5, request.param
        yield folder / "run", config, train_and_evaluate(config, folder / "run", quiet=True)


def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(finished, tmp_path):
    workdir, config, summary = finished
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=8, quiet=True)
    assert train_and_evaluate(config, tmp_path, quiet=True)["test_loss"] == summary["test_loss"]
    ours, theirs = load_run(workdir), load_run(tmp_path)
    jax.tree.map(
        np.testing.assert_array_equal,
        (ours.variables, ours.quality),
        (theirs.variables, theirs.quality),
    )
    if config.model.quality_bias:
        assert ours.variables.keys() == {"params", "quality"}
        assert (ours.variables["quality"]["fusion"]["scale"] > 0).all()
    else:
        assert ours.variables.keys() == {"params", "batch_stats"}
        assert (ours.batch_stats["encoder_a"]["embed"]["norm"]["var"] != 1).all()


def test_a_finished_run_answers_alike_everywhere(finished, tmp_path):
    """In its summary, loaded, exported as a function, and from its exported weights."""
    workdir, config, summary = finished
    arrays = np.load(config.data.path)
    batch = {m: arrays[f"test/{m}"] for m in ("a", "b")} | {"a_mask": arrays["test/mask_a"]}
    found = load(workdir)(batch)
    accuracy = (found.probabilities.argmax(axis=1) == arrays["test/label"]).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])

    out, function = tmp_path / "model.safetensors", tmp_path / "model.bin"
    if config.model.quality_bias:
        with pytest.raises(UserError, match="--fold is given and model.quality_bias is 1.5"):
            export(workdir, out, fold=True)
    export(workdir, out, stablehlo=function, fold=not config.model.quality_bias)
    everything = batch | {"b_mask": np.ones(batch["b"].shape[:-1], bool)}
    answer = jax.export.deserialize(bytearray(function.read_bytes())).call(everything)
    np.testing.assert_allclose(answer[0], found.probabilities, atol=1e-5)
    np.testing.assert_allclose(answer[1]["a"], found.attention_share["a"], atol=1e-5)

    run = load_run(workdir)
    variables, rotation = read_variables(out)
    assert variables.keys() == run.variables.keys()
    assert read_exported(out)[0].keys() == run.params.keys()
    if not config.model.quality_bias:  # folded: the parameters are others
        jax.tree.map(np.testing.assert_array_equal, variables["batch_stats"], run.batch_stats)
        return
    jax.tree.map(
        np.testing.assert_array_equal, (variables, rotation), (run.variables, run.rotation)
    )
    result = evaluate(workdir, full_probes=True, levels=(1.0,))
    assert result["accuracy"] == pytest.approx(summary["test_accuracy"])
    shuffled = json.loads((workdir / "evaluation.json").read_text())["quality_shuffled"]
    assert shuffled["unchanged"] <= 1.0 and shuffled["attention_share"].keys() == {"a", "b"}


def test_a_model_without_the_bias_has_the_old_tree(sequences, tmp_path):
    config = train_cases.tiny_config(sequences, epochs=1, **{"optimizer.warmup_epochs": 0.5})
    train_and_evaluate(config, tmp_path, quiet=True, test=False)
    run = load_run(tmp_path)
    assert run.quality is None and run.variables.keys() == {"params"}
    saved = next((tmp_path / "checkpoints").glob("*/state/_METADATA"))
    assert "quality" not in saved.read_text()


def test_upstreams_choices_are_refused_with_it(sequences, tmp_path):
    config = train_cases.tiny_config(
        sequences, **{"model.quality_bias": 1.0, "upstream_compat.last_batch_air": True}
    )
    with pytest.raises(ConfigError, match="allowed with model.quality_bias 1: False"):
        train_and_evaluate(config, tmp_path, quiet=True)
