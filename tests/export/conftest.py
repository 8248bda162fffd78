"""A run made by hand, and one that was trained."""

import numpy as np
import pytest

from rollingq_jax.train import default_config, train_and_evaluate
from tests.export.export_cases import made_run


@pytest.fixture(scope="session")
def run():
    return made_run()


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
    """A run of two epochs, trained and rolled, on two modalities of vectors."""
    folder = tmp_path_factory.mktemp("trained")
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 24), ("valid", 9), ("test", 12)):
        label = (np.arange(count) % 3).astype(np.int32)
        arrays[f"{split}/label"] = label
        for m, width in (("audio", 4), ("visual", 5)):
            shift = np.eye(3, width)[label] * 2
            arrays[f"{split}/{m}"] = (shift + rng.normal(size=shift.shape)).astype(np.float32)
    np.savez(folder / "data.npz", **arrays)
    config = default_config()
    config.epochs, config.batch_size = 2, 8  # one for each device
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.learning_rate = 0.05
    config.data.name, config.data.path = "arrays", str(folder / "data.npz")
    config.model.dim, config.model.depth, config.model.num_heads = 8, 1, 2
    train_and_evaluate(config, str(folder / "run"))
    return folder / "run"
