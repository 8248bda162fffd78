"""Tiny data, and compiled programs kept between tests, since compiling takes most of the time."""

import jax
import pytest

from tests.train.train_cases import write_arrays


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Programs of this session, shared by the test processes, and gone with it."""
    base = tmp_path_factory.getbasetemp()
    folder = base.parent if base.name.startswith("popen-") else base
    names = (
        "jax_compilation_cache_dir",
        "jax_persistent_cache_min_compile_time_secs",
        "jax_persistent_cache_min_entry_size_bytes",
    )
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in zip(names, (str(folder / "compiled"), 0.0, -1), strict=True):
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def arrays(tmp_path_factory):
    """Path of a data set of vectors, 44 training, 18 validation and 20 test examples."""
    path = tmp_path_factory.mktemp("data") / "tiny.npz"
    write_arrays(path)
    return path


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    """Figures and report take longer than a tiny run; fixtures of wider scope still draw them."""
    from rollingq_jax.train import report

    monkeypatch.setattr(report, "draw", lambda *args, **kwargs: None)
