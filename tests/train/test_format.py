"""A run that was stopped by an earlier version: its folder is read, resumed and finished."""

import json
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest

from rollingq_jax.train.config import from_json
from rollingq_jax.train.loop import load_run, train_and_evaluate
from tests.train.train_cases import make_arrays

ARCHIVE = Path(__file__).parents[1] / "golden" / "run_format_1.tar.xz"


@pytest.fixture
def stopped(tmp_path):
    """The folder of the run, of 18 steps, with checkpoints of steps 6 and 8; and its data."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    np.savez(tmp_path / "data.npz", **make_arrays())
    config = from_json(json.loads((tmp_path / "stopped" / "config.json").read_text()))
    config.data.path = str(tmp_path / "data.npz")
    return config, tmp_path / "stopped", np.load(tmp_path / "expected.npz")


@pytest.mark.slow
def test_a_run_of_format_1_is_read_and_ends_as_it_would_have(stopped):
    config, workdir, expected = stopped
    assert load_run(workdir).step == 6  # the best so far
    summary = train_and_evaluate(config, workdir, quiet=True)
    assert summary["test_loss"] == pytest.approx(float(expected["test_loss"]), abs=1e-3)
    run = load_run(workdir)
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params):
        name = "/".join(str(key.key) for key in path)
        np.testing.assert_allclose(leaf, expected[name], atol=1e-3, err_msg=name)
    np.testing.assert_allclose(run.rotation, expected["rotation"], atol=1e-3)
