"""Whole runs that go from one number of devices to another."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollingq_jax.train.config import default_config
from tests.parallel.processes import environment, free_address

HERE = Path(__file__).parent
SIZES = {"train": 44, "valid": 18, "test": 20}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run of 18 steps that rolls at the end of each of its 3 epochs, as JSON."""
    folder = tmp_path_factory.mktemp("whole_runs")
    rng = np.random.default_rng(0)
    means = {"a": rng.normal(size=(3, 6)), "b": 2 * rng.normal(size=(3, 5))}
    arrays = {}
    for split, count in SIZES.items():
        label = arrays[f"{split}/label"] = np.arange(count, dtype=np.int32) % 3
        for name, mean in means.items():
            noise = rng.normal(size=(count, mean.shape[1]))
            arrays[f"{split}/{name}"] = (mean[label] + noise).astype(np.float32)
    np.savez(folder / "data.npz", **arrays)
    fields = {
        "epochs": 3,
        "batch_size": 8,
        "log_every": 1,
        "optimizer.learning_rate": 0.05,
        "optimizer.warmup_epochs": 1.0,
        "rolling.rho": 4.0,
        "rolling.max_rotations": 5,
        "data.name": "arrays",
        "data.path": str(folder / "data.npz"),
        "model.dim": 8,
        "model.depth": 1,
        "model.num_heads": 2,
        "model.encoder_dropout": 0.1,
    }
    config = default_config()
    config.update_from_flattened_dict(fields)
    path = folder / "config.json"
    path.write_text(json.dumps(config.to_dict()))
    return path


def start(config, workdir, devices, max_steps=0, flags=(), **fields):
    settings = json.dumps(fields)
    command = [sys.executable, HERE / "run_worker.py", config, settings, workdir, str(max_steps)]
    command += flags
    return subprocess.Popen(command, env=environment(devices), stderr=subprocess.PIPE, text=True)


def finish(*processes):
    try:
        for process in processes:
            errors = process.communicate(timeout=400)[1]
            assert process.returncode == 0, errors
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def on_one(config, tmp_path_factory):
    """The folder of the run on one device."""
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start(config, workdir, 1))
    return workdir


def rows(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(ours, theirs):
    for a, b in zip(rows(ours), rows(theirs), strict=True):
        assert (a["step"], a["split"]) == (b["step"], b["split"])
        for name in ("loss", "accuracy", "imbalance", "imbalance_after", "attention_share/a"):
            if name in b:
                np.testing.assert_allclose(
                    a[name], b[name], atol=1e-5, err_msg=f"{b['step']} {name}"
                )
        assert a.get("rotations") == b.get("rotations")
    rotations = sorted(path.name for path in theirs.glob("rotations/*.npz"))
    assert rotations and rotations == sorted(path.name for path in ours.glob("rotations/*.npz"))


@pytest.mark.parametrize(("first", "second"), [(8, 1), (1, 8)])
def test_a_checkpoint_resumes_on_another_number_of_devices(config, on_one, tmp_path, first, second):
    finish(start(config, tmp_path, first, max_steps=9))
    assert max(row["step"] for row in rows(tmp_path)) == 9
    finish(start(config, tmp_path, second))
    assert_same_run(tmp_path, on_one)


IN_PARTS = {"mesh.fsdp": 4, "mesh.min_size": 16}


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)], ids=["parts first", "parts last"])
def test_a_checkpoint_goes_from_parts_to_pmap_to_one_device_and_back(
    config, on_one, tmp_path, order
):
    layouts = [(8, IN_PARTS), (8, {"parallel": "pmap"}), (1, {})]
    for number, max_steps in zip(order, (5, 11, 0), strict=True):
        devices, fields = layouts[number]
        finish(start(config, tmp_path, devices, max_steps, **fields))
    assert_same_run(tmp_path, on_one)


def saved(workdir):
    """Name, shape and checksum of every array that the last checkpoint holds."""
    last = max(p.name for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())
    record = json.loads((workdir / "checkpoints" / last / "record" / "metadata").read_text())
    return last, record["record"]["arrays"]


def test_in_parts_a_run_resumes_to_the_last_bit(config, on_one, tmp_path):
    finish(start(config, tmp_path / "through", 8, **IN_PARTS))
    finish(start(config, tmp_path / "stopped", 8, max_steps=9, **IN_PARTS))
    finish(start(config, tmp_path / "stopped", 8, **IN_PARTS))
    assert saved(tmp_path / "through") == saved(tmp_path / "stopped")
    assert_same_run(tmp_path / "through", on_one)


@pytest.mark.parametrize("fields", [{}, IN_PARTS | {"mesh.fsdp": 2}, IN_PARTS], ids=str)
def test_two_processes_write_the_run_of_one(config, on_one, tmp_path, fields):
    flags = [f"--coordinator={free_address()}", "--num_processes=2"]

    def both(max_steps):
        processes = [[*flags, f"--process_id={i}"] for i in range(2)]
        finish(*(start(config, tmp_path, 0, max_steps, joined, **fields) for joined in processes))

    both(9)
    assert max(row["step"] for row in rows(tmp_path)) == 9
    finish(start(config, tmp_path, 1, 12))  # what both have saved, one goes on with
    both(0)
    assert_same_run(tmp_path, on_one)
