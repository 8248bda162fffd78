"""Flags that join processes, and where compiled programs and traces go."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from rollingq_jax.errors import ConfigError
from rollingq_jax.train import profiling
from rollingq_jax.train.distributed import join


@pytest.fixture
def joined(monkeypatch):
    """Arguments of every call of `jax.distributed.initialize`, which is not made."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args: calls.append(args))
    return calls


def test_without_flags_there_is_one_process(joined):
    argv = ["train.py", "--config", "a.py", "--config.seed=1"]
    assert join(argv) == argv
    assert joined == []


def test_flags_are_taken_out_of_the_command_line(joined):
    argv = "train.py --coordinator=host:1 --workdir w --num_processes=2 --process_id 1".split()
    assert join(argv) == ["train.py", "--workdir", "w"]
    assert joined == [("host:1", 2, 1)]


def test_a_cluster_that_jax_knows(joined):
    assert join(["train.py", "--distributed"]) == ["train.py"]
    assert joined == [(None, None, None)]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--coordinator=h:1 --num_processes=2", "--process_id is missing; allowed: all of"),
        ("--num_processes=two", "--num_processes: invalid int value: 'two'; allowed: --dist"),
        (
            "--coordinator=h:1 --num_processes=2 --process_id=2",
            "--process_id is 2; allowed: 0 to 1",
        ),
    ],
)
def test_mistakes(joined, flags, line):
    with pytest.raises(ConfigError, match=line):
        join(["train.py", *flags.split()])
    assert joined == []


def test_no_cluster_is_one_line(monkeypatch):
    def fail(*_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match="do not find each other .coordinator_address should"):
        join(["train.py", "--distributed"])


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (10, ["step"] * 3 + ["start"] + ["step"] * 5 + ["stop"] + ["step"] * 2),
        (8, ["step"] * 3 + ["start"] + ["step"] * 5 + ["stop"]),
        (5, ["step"] * 3 + ["start"] + ["step"] * 2 + ["stop"]),
        (2, ["step"] * 2),
    ],
)
def test_a_trace_of_the_fourth_to_the_eighth_step(tmp_path, monkeypatch, caplog, steps, expected):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda *a, **k: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    folder = epath.Path(tmp_path)
    with profiling.profiled(lambda x: (calls.append("step"), x)[1], folder) as step:
        for _ in range(steps):
            step(jnp.ones(2))
    assert calls == expected
    assert ("no profile: 2 steps were made" in caplog.text) == (steps == 2)


def test_a_remote_folder_gets_copies(tmp_path):
    source = tmp_path / "local" / "plugins"
    source.mkdir(parents=True)
    (source / "a.pb").write_bytes(b"trace")
    profiling.copy_tree(str(tmp_path / "local"), epath.Path(tmp_path / "remote"))
    assert (tmp_path / "remote" / "plugins" / "a.pb").read_bytes() == b"trace"


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert profiling.default_cache() == "/caches/rollingq_jax/xla"
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        profiling.keep_compiled("")
        assert jax.config.jax_compilation_cache_dir is None
        profiling.keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        profiling.keep_compiled("/elsewhere")  # the first stays
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
