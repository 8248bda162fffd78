"""Whole runs on data that lack modalities, or whose test inputs are too large for float32."""

import json
import logging
import warnings

import numpy as np
import pytest

from rollingq_jax.analysis.report import describe_rolls
from rollingq_jax.errors import NonFiniteError
from rollingq_jax.train.logging import as_json, read_rows
from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.report import print_summary
from tests.train.train_cases import make_arrays, read_metrics, tiny_config, write_arrays

pytestmark = pytest.mark.slow

ONE = {"epochs": 1, "optimizer.warmup_epochs": 0.5}


@pytest.fixture
def own_warnings():
    """A warning of NumPy or Python from our own figures is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield


def masked(path, **test_masks):
    """Some training examples lack a, some b, some both; the test split has the masks given."""
    arrays = make_arrays()
    for split, count in (("train", 44), ("valid", 18), ("test", 20)):
        numbers = np.arange(count)
        arrays |= {f"{split}/mask_a": numbers % 2 == 0, f"{split}/mask_b": numbers % 4 == 0}
    np.savez(path, **arrays | {f"test/mask_{m}": mask for m, mask in test_masks.items()})


def test_each_modality_is_measured_over_the_examples_that_have_it(tmp_path, capsys, own_warnings):
    masked(tmp_path / "d.npz", b=np.arange(20) % 4 == 0)
    config = tiny_config(tmp_path / "d.npz", **ONE)
    summary = train_and_evaluate(config, tmp_path / "run", quiet=True)
    assert summary["modality_examples"] == {"a": 10, "b": 5}
    row = read_metrics(tmp_path / "run")[-1]
    assert (row["split"], row["examples/a"], row["examples/b"]) == ("test", 10, 5)
    for m, count in summary["modality_examples"].items():
        assert (summary["probe_accuracy"][m] * count) % 1 == pytest.approx(0, abs=1e-9)
        assert row[f"attention_share/{m}"] == pytest.approx(summary["attention_share"][m])
    print_summary(summary, tmp_path)
    printed = capsys.readouterr().out
    for m, count in summary["modality_examples"].items():
        assert f"{summary['probe_accuracy'][m]:.3f} (n = {count})" in printed


def test_nothing_is_said_of_a_modality_that_no_test_example_has(tmp_path, capsys, own_warnings):
    masked(tmp_path / "d.npz", b=np.zeros(20, bool))
    config = tiny_config(tmp_path / "d.npz", **ONE)
    summary = train_and_evaluate(config, tmp_path / "run", quiet=True)
    assert summary["probe_accuracy"]["b"] is None and summary["attention_share"]["b"] is None
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    for name in ("cosine/b", "probe_loss/b", "imbalance", "air"):
        assert row[name] is None
    print_summary(summary, tmp_path)
    assert "- (n = 0)" in capsys.readouterr().out


def test_an_answer_that_is_not_finite_is_wrong_and_warned_of(tmp_path, caplog):
    arrays = make_arrays()
    zero = np.flatnonzero(arrays["test/label"] == 0)
    arrays["test/a"][zero] = 3e38
    np.savez(tmp_path / "d.npz", **arrays)
    config = tiny_config(tmp_path / "d.npz", **ONE | {"data.standardize": False})
    with caplog.at_level(logging.WARNING):
        summary = train_and_evaluate(config, tmp_path / "run", quiet=True)
    said = [record.getMessage() for record in caplog.records if "NaN" in record.getMessage()]
    assert said == [
        f"split 'test': the logits of {len(zero)} of 20 examples are NaN or infinite; "
        "they count as wrong"
    ]
    assert summary["per_class"]["0"]["accuracy"] == 0.0 and summary["test_nonfinite"] == len(zero)
    assert summary["per_class"]["0"]["examples"] == len(zero)
    row = read_metrics(tmp_path / "run")[-1]
    assert row["nonfinite"] == len(zero) and np.isfinite(row["loss"])
    assert row["accuracy"] == pytest.approx(summary["test_accuracy"])


@pytest.mark.parametrize("parallel", ["jit", "pmap"])
def test_a_model_without_any_finite_answer_is_an_error(tmp_path, parallel):
    write_arrays(tmp_path / "d.npz")
    fields = {"optimizer.learning_rate": 1e30, "nonfinite": "skip", "parallel": parallel}
    config = tiny_config(tmp_path / "d.npz", **ONE | fields)
    with pytest.raises(NonFiniteError, match="split 'valid': the logits of all 18 examples"):
        train_and_evaluate(config, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "summary.json").exists()


def test_what_data_corruptions_could_not_drop_is_said(tmp_path, capsys):
    masked(tmp_path / "d.npz")
    fields = {"data.corruptions": "a=drop", "log_every": 2}
    config = tiny_config(tmp_path / "d.npz", **ONE | fields)
    train_and_evaluate(config, tmp_path / "run")
    # Of 44 training examples 22 have a, 11 of those have b too.
    assert "in epoch 1, 11 examples keep a" in capsys.readouterr().out
    rows = [row for row in read_metrics(tmp_path / "run") if row["split"] == "train"]
    assert sum(row["kept/a"] for row in rows) == 11


def test_a_rolls_row_may_lack_the_imbalance_of_its_batch(tmp_path):
    """The window had both modalities, the step's batch has one: the run reads what it wrote."""
    row = {"step": 6, "epoch": 1, "split": "roll", "head": 0, "angle_degrees": 40.0}
    row |= {"imbalance_before": float("nan"), "imbalance_after": float("nan")}
    (tmp_path / "metrics.jsonl").write_text(2 * (as_json(row) + "\n"))
    rows = read_rows(tmp_path / "metrics.jsonl")
    assert [r["imbalance_before"] for r in rows] == [None, None]
    assert "rotation was by 40°" in describe_rolls(rows[:1])
