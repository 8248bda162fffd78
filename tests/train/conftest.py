"""Tiny data, and no pictures."""

import pytest

from tests.train.train_cases import write_arrays


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """Path of a data set of vectors, 44 training, 18 validation and 20 test examples."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_arrays(path)
    return path


@pytest.fixture(autouse=True)
def _no_pictures(no_pictures):
    """Fixtures of wider scope still draw them."""
