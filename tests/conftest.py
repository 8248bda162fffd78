"""Strict settings for every test: 8 fake devices, no silent promotion, no network."""

import os

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

import contextlib
import socket

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


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
