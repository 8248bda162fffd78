"""Strict settings for every test: 8 fake devices, no silent promotion, no network."""

import os
import tempfile

# Small programs run once or twice: compiling them fast matters more than running them fast. XLA
# spends more than half of its compiling in the CPU's fusion emitters, and here one part per module
# is enough.
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    " --xla_force_host_platform_device_count=8"
    " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Compiling takes most of the time, and many tests and the commands that they start compile the
# same: programs of this session are shared by all its processes, which inherit the variable, and
# gone with it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _compiled = tempfile.TemporaryDirectory(prefix="rollingq-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled.name
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"

import contextlib
import socket

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# Of the slow suite and of the faults, longest first. `--dist=loadfile` gives a file to one process:
# a long one that began last would leave the others idle.
LONGEST = (
    "test_layouts.py",
    "test_whole_runs.py",
    "test_loop.py",
    "test_compare.py",
    "test_resume.py",
    "test_explicit_axes.py",
    "test_right_answers.py",
    "test_task_runs.py",
    "test_kills.py",
    "test_signals.py",
    "test_damage.py",
    "test_killed_comparison.py",
)


def pytest_collection_modifyitems(items):
    """Puts the longest files first; the rest stays in order."""
    place = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(LONGEST)))


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    """Any connection that leaves this machine fails the test that tried it."""
    connect = socket.socket.connect

    def guarded(self, address):
        host = address[0] if isinstance(address, tuple) else address
        if host not in ("127.0.0.1", "::1", "localhost") and isinstance(address, tuple):
            raise OSError(f"a test tried to connect to {host}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def no_pictures(monkeypatch):
    """Runs leave out figures and report, which take as long as training a tiny model does."""
    from rollingq_jax.train import report

    monkeypatch.setattr(report, "draw", lambda *args, **kwargs: None)


@pytest.fixture(scope="session")
def av_digits_cache(tmp_path_factory):
    """A cache directory that holds the demo's data of seed 0, built once for all test processes."""
    from types import SimpleNamespace

    from rollingq_jax.data.sources import av_digits

    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    folder = str(shared / "av_digits_cache")
    av_digits.load(SimpleNamespace(cache_dir=folder), seed=0)
    return folder


@pytest.fixture
def float64():
    """A context in which jax has 64-bit types (`jax.enable_x64` needs a newer jax than we do)."""

    @contextlib.contextmanager
    def enabled():
        jax.config.update("jax_enable_x64", True)
        try:
            yield
        finally:
            jax.config.update("jax_enable_x64", False)

    return enabled()
