"""Flags that join processes, and where compiled programs and traces go."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from etils import epath

from rollingq_jax.errors import ConfigError
from rollingq_jax.train import cli, distributed, loop
from rollingq_jax.train.cli import TRAIN, join_processes
from rollingq_jax.train.distributed import join, meet


@pytest.fixture
def joined(monkeypatch):
    """Arguments of every call of `jax.distributed.initialize`, which is not made."""
    calls = []
    monkeypatch.setattr(distributed, "meet", lambda *args: None)
    monkeypatch.setattr(
        jax.distributed,
        "initialize",
        lambda *args, initialization_timeout: calls.append((*args, initialization_timeout)),
    )
    return calls


def typed(flags):
    """The flags of a command line as `train.py` reads them, then the processes joined."""
    given, fields = TRAIN.parse_flags(["train.py", "--workdir", "w", *flags.split()])
    join_processes(given)
    return given, fields


def test_without_flags_there_is_one_process(joined):
    given, fields = typed("--config a.py --config.seed=1 --config.epochs 2")
    assert (given.config, fields) == ("a.py", ["--config.seed=1", "--config.epochs", "2"])
    assert joined == []


def test_flags_join_the_processes(joined):
    given, fields = typed("--coordinator=host:1 --num_processes=2 --process_id 1")
    assert given.workdir == "w" and fields == []
    ((address, *rest),) = joined
    assert address.startswith("127.0.0.1:") and rest == [2, 1, None, 360]  # through a `Gate`


def test_process_0_is_where_it_is(joined):
    typed("--coordinator=host:1 --num_processes=2 --process_id 0")
    assert joined == [("host:1", 2, 0, None, 360)]


def test_a_cluster_that_jax_knows(joined, monkeypatch):
    slurm = {
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "node[003-004]",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
    }
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    typed("--distributed")
    assert joined == [("node003:61447", 2, 0, [0], 360)]


def test_a_cluster_that_jax_may_know(joined):
    typed("--distributed")
    assert joined == [(None, None, None, None, 360)]


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--coordinator=h:1 --num_processes=2", "--process_id is missing; allowed: all of"),
        ("--num_processes=two", "--num_processes is 'two'; allowed: an integer >= 1"),
        (
            "--coordinator=h:1 --num_processes=2 --process_id=2",
            "--process_id is 2; allowed: 0 to 1",
        ),
        (
            "--distributed --initialization_timeout=0",
            "is 0; allowed: an integer >= 1 and at most 1,000,000",
        ),
        ("--distributed --initialization_timeout=1m", "--initialization_timeout is '1m'"),
        ("--initialization_timeout=60", "is given for one process; allowed: with --distributed"),
    ],
)
def test_mistakes(joined, flags, line):
    with pytest.raises(ConfigError, match=line):
        typed(flags)
    assert joined == []


def test_no_cluster_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(ConfigError, match="do not find each other .coordinator_address should"):
        join(distributed=True)


@pytest.fixture
def port():
    """A port of this machine that nobody uses."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture
def impatient(monkeypatch):
    """A line every fifth of a second."""
    monkeypatch.setattr(distributed, "EVERY", 0.2)
    monkeypatch.setattr(distributed, "AGAIN", 0.02)


class Process(threading.Thread):
    """`meet` in a thread, and what it raised."""

    def __init__(self, *arguments):
        super().__init__(daemon=True)
        self.arguments, self.error = arguments, None
        self.start()

    def run(self):
        try:
            meet(*self.arguments)
        except ConfigError as error:
            self.error = str(error)

    def end(self):
        self.join(30)
        assert not self.is_alive()
        return self.error


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
def test_processes_meet_in_whatever_order_they_come(port, impatient, order):
    processes = []
    for number in order:
        processes.append(Process(f"localhost:{port}", 3, number, 30))
        time.sleep(0.1)
    assert [process.end() for process in processes] == [None] * 3
    with socket.create_server(("", port)):  # the port is free for JAX
        pass


def test_one_process_meets_itself(port):
    meet(f"localhost:{port}", 1, 0, 30)


@pytest.mark.slow
def test_a_process_that_never_starts(port, impatient, capsys):
    began = time.monotonic()
    processes = [Process(f"localhost:{port}", 4, number, 1 + number) for number in (0, 2)]
    line = rf"processes 1, 3 did not come to localhost:{port} within 1 s; allowed: all processes"
    assert re.match(line, processes[0].end())
    assert processes[1].end().startswith(f"process 0 did not come to localhost:{port} within 3 s")
    assert 1 <= time.monotonic() - began < 4
    told = capsys.readouterr().err
    assert told.count(f"waiting for processes 1, 3 of 4 at localhost:{port}\n") >= 2
    assert f"waiting for all of 4 processes at localhost:{port}\n" in told


def test_a_coordinator_that_never_starts(port, impatient, capsys):
    line = rf"process 0 did not come to localhost:{port} within 0.5 s \(Connection refused\); all"
    assert re.match(line, Process(f"localhost:{port}", 2, 1, 0.5).end())
    assert f"waiting for process 0 at localhost:{port}\n" in capsys.readouterr().err


def test_a_process_that_ends_while_it_waits_may_come_again(port, impatient):
    first = Process(f"localhost:{port}", 3, 0, 30)
    gone = None
    while gone is None:
        with contextlib.suppress(ConnectionRefusedError):
            gone = socket.create_connection(("localhost", port))
    gone.sendall(b"rollingq_jax: process 1 of 3\n")
    time.sleep(0.2)
    gone.close()
    time.sleep(0.2)
    others = [Process(f"localhost:{port}", 3, number, 30) for number in (1, 2)]
    assert [process.end() for process in (first, *others)] == [None] * 3


def test_strangers_at_the_port_are_sent_away(port, impatient):
    first = Process(f"localhost:{port}", 2, 0, 30)
    for word in (b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 300, b"rollingq_jax: process x of 2\n", b""):
        sent = False
        while not sent:
            with contextlib.suppress(ConnectionError):
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(word)
                    sent = True
    assert Process(f"localhost:{port}", 2, 1, 30).end() is None and first.end() is None


def test_processes_that_do_not_agree(port, impatient):
    first = Process(f"localhost:{port}", 3, 0, 30)
    second = Process(f"localhost:{port}", 3, 1, 30)
    time.sleep(0.3)
    line = f"process 1 of 3 is not taken at localhost:{port}: another process has --process_id=1"
    assert Process(f"localhost:{port}", 3, 1, 30).end().startswith(line)
    other = Process(f"localhost:{port}", 4, 2, 30).end()
    assert "process 0 has --num_processes=3; allowed: the same --coord" in other
    assert Process(f"localhost:{port}", 3, 2, 30).end() is None
    assert first.end() is None and second.end() is None


def test_another_program_at_the_coordinators_address(port):
    with socket.create_server(("127.0.0.1", port)) as server:
        process = Process(f"127.0.0.1:{port}", 2, 1, 30)
        connection, _ = server.accept()
        connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")
        assert "another program answers there; allowed: " in process.end()
        connection.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::1", "::"])
def test_a_port_that_is_in_use(port, host):
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family):
        with pytest.raises(ConfigError, match=f"port {port} cannot be used \\(Address already"):
            meet(f"localhost:{port}", 2, 0, 30)


@pytest.mark.parametrize("address", ["", "host", "host:", ":80", "host:x", "host:0", "host:70000"])
def test_addresses_that_are_none(address):
    with pytest.raises(ConfigError, match=r"--coordinator is .*; allowed: HOST:PORT of process 0"):
        meet(address, 2, 0, 30)


def test_brackets_of_an_address_in_ipv6_are_taken_off():
    assert distributed._address("[::1]:12") == ("::1", 12)


ROOT = Path(__file__).resolve().parents[2]


def real(*flags):
    """`train.py` in a process of its own, as one of two."""
    command = [sys.executable, ROOT / "train.py", "--num_processes=2", *flags]
    command += ["--config", ROOT / "configs" / "av_digits.py", "--workdir=unused"]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ})


@pytest.mark.slow
def test_real_processes_give_up_in_one_line(port):
    alone = real(f"--coordinator=localhost:{port}", "--process_id=0", "--initialization_timeout=6")
    told = alone.communicate(timeout=120)[1].splitlines()
    assert alone.returncode == 2
    assert told[0] == f"waiting for process 1 of 2 at localhost:{port}"
    assert told[-1].startswith(f"error: process 1 did not come to localhost:{port} within 6 s")
    assert len(told) == 2


def test_a_real_coordinators_port_in_use(port):
    with socket.create_server(("", port)):
        process = real(f"--coordinator=localhost:{port}", "--process_id=0")
        told = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert re.fullmatch(rf"error: --coordinator is .* port {port} cannot be used .*\n", told)


def test_jax_itself_is_not_waited_for_without_end(port):
    """In a cluster that JAX knows it is JAX that waits; the process ends before JAX aborts it."""
    code = """
import sys, time, jax
from rollingq_jax.train import distributed
distributed.EVERY = 0.3
jax.distributed.initialize = lambda *args, **kwargs: time.sleep(60)
distributed.join(distributed=True, initialization_timeout=1)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("waiting for the run's processes at the cluster\n")
    assert (
        "\nerror: some of the run's processes did not come to the cluster within 1 s" in done.stderr
    )


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
    with loop.profiled(lambda x: (calls.append("step"), x)[1], folder) as step:
        for _ in range(steps):
            step(jnp.ones(2))
    assert calls == expected
    assert ("no profile: 2 steps were made" in caplog.text) == (steps == 2)


def test_a_remote_folder_gets_copies(tmp_path):
    source = tmp_path / "local" / "plugins"
    source.mkdir(parents=True)
    (source / "a.pb").write_bytes(b"trace")
    loop.copy_tree(str(tmp_path / "local"), epath.Path(tmp_path / "remote"))
    assert (tmp_path / "remote" / "plugins" / "a.pb").read_bytes() == b"trace"


def test_compiled_programs_are_kept_where_the_user_says(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert cli.default_cache() == "/caches/rollingq_jax/xla"
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", None)
        cli.keep_compiled("")
        assert jax.config.jax_compilation_cache_dir is None
        cli.keep_compiled(str(tmp_path))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
        cli.keep_compiled("/elsewhere")  # the first stays
        assert jax.config.jax_compilation_cache_dir == str(tmp_path)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
