"""Runs of a regression and of sets of labels from the command line: train, predict, compare."""

import csv
import json

import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax import compare, evaluate, export, predict
from rollingq_jax.train.cli import run_command, train_command
from tests.train.train_cases import read_metrics

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
FLAGS = [
    "--config=configs/own_data.py",
    "--config.epochs=6",
    "--config.batch_size=8",
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=0.05",
    "--config.optimizer.warmup_epochs=1.0",
    "--config.model.dim=8",
    "--config.model.depth=1",
    "--config.model.num_heads=2",
]
MAIN = {"regression": "mae", "multi_label": "map"}


def write(path, task):
    """Two modalities of which each shows the same three numbers; these, or their signs, are it."""
    rng = np.random.default_rng(0)
    mixed = {"a": rng.normal(size=(3, 6)), "b": rng.normal(size=(3, 5))}
    arrays = {}
    for split, count in {"train": 72, "valid": 40, "test": 42}.items():
        shown = rng.normal(size=(count, 3))
        for name, mix in mixed.items():
            noise = 0.5 * rng.normal(size=(count, mix.shape[1]))
            arrays[f"{split}/{name}"] = (shown @ mix + noise).astype(np.float32)
        values = np.clip(100 + 20 * shown[:, 0], 0, 200)
        arrays[f"{split}/label"] = values if task == "regression" else (shown > 0.3).astype(int)
    np.savez(path, **arrays)
    return arrays


@pytest.mark.parametrize("task", ["regression", "multi_label"])
def test_a_run_from_the_command_line(tmp_path, task, capsys):
    arrays, data, workdir = write(tmp_path / "d.npz", task), tmp_path / "d.npz", tmp_path / "run"
    main, flags = MAIN[task], [*FLAGS, f"--config.data.path={data}"]
    assert run_command(train_command, ["train", *flags, f"--workdir={workdir}"]) == 0
    rows = [row for row in read_metrics(workdir) if row["split"] == "valid"]
    best = (min if task == "regression" else max)(row[main] for row in rows)
    summary = json.loads((workdir / "summary.json").read_text())
    assert summary["best"][main] == best and summary["config"]["best_by"] == main
    assert {f"probe_{main}/a", f"probe_{main}/b"} <= rows[0].keys()

    # The table, the loaded model and the exported function answer alike, and score alike.
    out = tmp_path / "p.csv"
    argv = [f"--workdir={workdir}", f"--path={data}", f"--out={out}"]
    assert run_command(predict.command, ["predict", *argv]) == 0
    test = {m: arrays[f"test/{m}"] for m in ("a", "b")}
    found = rq.load(workdir)(test).probabilities
    lines = list(csv.DictReader(out.open()))
    label = arrays["test/label"]
    if task == "regression":
        told = [float(line["predicted"]) for line in lines]
        np.testing.assert_allclose(told, found[:, 0], rtol=1e-6)
        np.testing.assert_allclose(np.abs(found[:, 0] - label).mean(), summary["test_mae"], 1e-5)
        assert summary["test_mae"] < 0.8 * np.abs(label - np.median(label)).mean()
        assert summary["test_correlation"] > 0.8 and "test_acc7" not in summary
    else:
        told = [[float(line[f"probability/{c}"]) for c in range(3)] for line in lines]
        np.testing.assert_allclose(told, found, atol=1e-6)
        sets = ["|".join(map(str, np.flatnonzero(row >= 0.5))) for row in found]
        assert [line["predicted"] for line in lines] == sets
        assert summary["test_map"] > 0.6 > label.mean()
    evaluation = evaluate.evaluate(workdir, corrupt=["a=1.0"], full_probes=True, levels=(1.0,))
    assert evaluation[main] == pytest.approx(summary[f"test_{main}"], rel=1e-5)
    assert set(evaluation["reliance"]["a"]) == {"shuffled", "replaced"}
    card = export.export(workdir, tmp_path / "m.safetensors", stablehlo=tmp_path / "m.bin")
    assert card["task"] == task
    assert list(card["outputs"]) == ["values" if task == "regression" else "probabilities"]

    arms = "--arms=concat,joint,attention,rollingq"
    argv = [*flags, "--config.epochs=2", arms, "--seeds=1", f"--workdir={tmp_path / 'compare'}"]
    assert run_command(compare.command, ["compare", *argv]) == 0
    result = json.loads((tmp_path / "compare" / "results.json").read_text())
    assert list(result["table"])[0] == f"test_{main}" and len(result["runs"]) == 4
    assert run_command(compare.command, ["compare", *argv[:-3], "--arms=ogm", *argv[-2:]]) == 2
    assert "arm 'ogm': config.baseline.name is 'ogm', which needs" in capsys.readouterr().err
