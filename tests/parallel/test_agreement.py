"""Processes compare what they are about to train, and end together, without a device."""

import socket
import threading
import time

import jax
import pytest
from etils import epath

from rollingq_jax.errors import DataError
from rollingq_jax.train import agreement as agreement_module
from rollingq_jax.train.agreement import (
    Store,
    agreement,
    differences,
    run_facts,
    verdict,
)
from rollingq_jax.train.distributed import Ending, Gate, processes

CONFIG = {
    "seed": 0,
    "optimizer": {"learning_rate": 0.1, "betas": (0.9, 0.99)},
    "data": {"name": "arrays", "path": "/a.npz"},
}
SIGNATURE = {"train": {"a": [1.0, 2.0], "label": [0.0, 1.0]}}


def facts(signature=SIGNATURE, examples=4, **fields):
    return run_facts(
        {
            "config": {**CONFIG, **fields},
            "examples": {"train": examples},
            "signature": signature,
        }
    )


def test_equal_runs_do_not_differ():
    assert differences({0: facts(), 1: facts(), 2: facts()}) == []


def test_places_of_the_data_may_differ_and_last_bits_too():
    elsewhere = {"name": "arrays", "path": "/b.npz"}
    near = {"train": {"a": [1.0001, 2.0], "label": [0.0, 1.0]}}
    assert differences({0: facts(), 1: facts(near, data=elsewhere)}) == []


def test_every_field_that_differs_has_its_values_and_processes():
    first = facts(seed=1, optimizer={"learning_rate": 0.2, "betas": (0.9, 0.99)}, new="x")
    assert differences({0: facts(), 1: first, 2: facts(), 3: first}) == [
        "config.new is absent in processes 0, 2 and 'x' in processes 1, 3",
        "config.optimizer.learning_rate is 0.1 in processes 0, 2 and 0.2 in processes 1, 3",
        "config.seed is 0 in processes 0, 2 and 1 in processes 1, 3",
    ]


def test_data_versions_and_settings_of_jax_are_compared():
    other = facts({"train": {"a": [1.0, 2.5], "label": [0.0, 1.0]}}, examples=5)
    other["values"]["the version of jax"] = "0.0.1"
    other["values"]["JAX_ENABLE_X64"] = "True"
    found = differences({0: facts(), 1: other})
    assert found[0] == "JAX_ENABLE_X64 is 'False' in process 0 and 'True' in process 1"
    assert found[1].startswith("the number of examples in the data's split 'train' is 4 in process")
    assert found[2].endswith(" and '0.0.1' in process 1")
    assert found[3] == "the data's train/a has other values in process 1 than in process 0"


def test_a_verdict_is_one_line_of_at_most_eight_differences():
    def told(workdir="/w", shared=True, **fields):
        return {"facts": facts(**fields), "workdir": workdir, "shared": shared}

    assert verdict({0: told(), 1: told("/mnt/w")}) == ""
    many = {f"field_{n}": n for n in range(11)}
    line = verdict({0: told(), 1: told("/v", False, **many)})
    assert line.count(" in process 0") == 8
    assert line.endswith("; and 4 other differences; allowed: the same in all processes")
    line = verdict({0: told(), 1: told("/v", False)})
    assert line.startswith("workdir /v in process 1 is not the folder /w in process 0, whose files")


def test_processes_in_words():
    assert processes([3]) == "process 3"
    assert processes(range(10)) == "processes 0, 1, 2, 3, 4, 5, 6, 7 and others"


class Client:
    """The coordination service's key-value store, in this process."""

    def __init__(self):
        self.content, self.lock = {}, threading.Lock()

    def key_value_set(self, key, value, allow_overwrite):
        with self.lock:
            if key in self.content and not allow_overwrite:
                raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
            self.content[key] = value

    def key_value_dir_get(self, folder):
        with self.lock:
            return [item for item in self.content.items() if item[0].startswith(folder)]

    def key_value_increment(self, key, by):
        with self.lock:
            self.content[key] = self.content.get(key, 0) + by
            return self.content[key]


@pytest.fixture
def together(monkeypatch):
    """Runs functions as processes of one run, in threads; returns what each raised."""
    local, client = threading.local(), Client()
    monkeypatch.setattr(agreement_module, "shared_store", lambda: local.store)
    monkeypatch.setattr(agreement_module, "AGAIN", 0.005)
    monkeypatch.setattr(agreement_module, "SEEN_WITHIN", 0.2)

    def run(*functions):
        errors = [None] * len(functions)

        def process(number, function):
            local.store = Store(client, number, len(functions))
            try:
                function()
            except Exception as error:
                errors[number] = str(error)

        threads = [threading.Thread(target=process, args=item) for item in enumerate(functions)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return errors

    return run


def prepared(workdir, timeout=30, after=0.0, error=None, **fields):
    """A process that comes to an agreement about one run."""

    def function():
        with agreement(timeout) as hand_in:
            time.sleep(after)
            if error is not None:
                raise error
            hand_in(epath.Path(workdir), facts(**fields))

    return function


def test_processes_that_agree_leave_the_folder_as_it_was(together, tmp_path):
    workdir = tmp_path / "new" / "run"
    for _ in range(2):  # a second run of the same processes
        assert together(*[prepared(workdir)] * 3) == [None] * 3
    assert list(tmp_path.iterdir()) == []
    workdir.mkdir(parents=True)
    (tmp_path / "other").symlink_to(workdir)
    assert together(prepared(workdir), prepared(tmp_path / "other")) == [None, None]
    assert list(workdir.iterdir()) == []


def test_all_say_in_what_one_differs(together, tmp_path):
    found = together(prepared(tmp_path), prepared(tmp_path, seed=2), prepared(tmp_path))
    line = "config.seed is 0 in processes 0, 2 and 2 in process 1; allowed: the same in all "
    assert found == [line + "processes"] * 3


def test_a_workdir_that_is_not_shared(together, tmp_path):
    found = together(prepared(tmp_path / "a"), prepared(tmp_path / "b"))
    assert found[0] == found[1] and found[0].startswith(f"workdir {tmp_path / 'b'} in process 1 is")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [0, 1, 2])
def test_an_error_in_one_is_told_in_all(together, tmp_path, number):
    runs = [prepared(tmp_path)] * 3
    runs[number] = prepared(tmp_path, error=DataError("a.npz: no such file"))
    expected = [f"process {number} has ended: a.npz: no such file"] * 3
    expected[number] = "a.npz: no such file"
    assert together(*runs) == expected


def test_who_waits_says_for_whom_and_not_without_end(together, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("rollingq_jax.train.distributed.EVERY", 0.1)
    late = prepared(tmp_path, after=1.5)
    found = together(prepared(tmp_path, timeout=0.5), prepared(tmp_path, timeout=9), late)
    assert found[0] == found[1] == found[2]
    assert found[0].startswith("process 2 of 3 did not come so far within 0.5 s as to have read")
    assert "waiting for process 2 of 3 to have read configuration and data\n" in (
        capsys.readouterr().err
    )


def test_one_process_agrees_with_itself():
    with agreement() as hand_in:
        hand_in(epath.Path("unused"), {})


class Recorded(Ending):
    """Notes the line with which a process ends, which goes on."""

    def __init__(self):
        super().__init__()
        self.lines = []

    def end(self, line, code):
        self.lines.append((line, code))


@pytest.fixture
def watches(monkeypatch):
    """The watches of a run of two processes, of which the ends are recorded."""
    monkeypatch.setattr(agreement_module, "BEAT", 0.02)
    monkeypatch.setattr(agreement_module, "SILENCE", 0.5)
    monkeypatch.setattr(agreement_module, "AGAIN", 0.005)
    client = Client()
    return [agreement_module._Watch(Store(client, n, 2), Recorded()) for n in range(2)]


def ended_with(watch):
    """The first line with which a process ends, and its exit code."""
    end = time.monotonic() + 30
    while not watch._ending.lines:
        assert time.monotonic() < end
        time.sleep(0.01)
    watch._stop_asked.set()
    return watch._ending.lines[0]


@pytest.mark.parametrize("failing", [0, 1])
def test_what_ends_one_process_ends_the_other(watches, failing):
    for watch in watches:
        watch.start()
    watches[failing].fail("error: no room", 74)
    line = f"error: process {failing} has ended: no room"
    assert ended_with(watches[failing]) == ("error: no room", 74)
    assert ended_with(watches[1 - failing]) == (line, 74)


def test_errors_of_a_broken_collective_are_known():
    """What killing a process raises in the other: within a save, in a step; and other errors."""
    try:
        try:
            raise ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer")
        except ValueError as error:
            raise DataError("a checkpoint is not saved") from error
    except DataError as error:
        assert agreement_module._through_others(error)
    step = jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed")
    assert agreement_module._through_others(step)
    for other in (DataError("batch: UNKNOWN: x"), TypeError("x"), OSError(28, "No space left")):
        assert not agreement_module._through_others(other)


def test_a_process_without_signs_of_life_has_ended(watches):
    for watch in watches:
        watch.start()
    time.sleep(0.8)
    assert watches[0]._ending.lines == []
    watches[1]._stop_asked.set()
    line, code = ended_with(watches[0])
    assert line.startswith("error: process 1 has ended: no sign of life for 0.5 s; what is saved")
    assert code == 75


def test_all_wait_for_each_other_at_the_end(watches):
    for watch in watches:
        watch.start()
    threads = [threading.Thread(target=watch.finish) for watch in watches]
    threads[1].start()
    time.sleep(0.2)
    assert threads[1].is_alive() and watches[1].is_alive()
    threads[0].start()
    for thread in threads:
        thread.join(30)
    assert [(w._ending.guarded, w._ending.lines) for w in watches] == [(False, [])] * 2


@pytest.mark.parametrize("guarded", [True, False])
def test_the_gate_sees_process_0_end(guarded):
    ending = Recorded()
    with socket.create_server(("127.0.0.1", 0)) as server:
        gate = Gate(server.getsockname(), ending)
        host, _, port = gate.address.partition(":")
        with socket.create_connection((host, int(port))) as local:
            remote, _ = server.accept()
            for source, sink in ((local, remote), (remote, local)):
                source.sendall(b"x" * 200_000)
                received = 0
                while received < 200_000:
                    received += len(sink.recv(1 << 16))
            ending.guarded = guarded
            remote.close()
            local.settimeout(10)
            assert local.recv(1) == b""
    assert [code for _, code in ending.lines] == ([75] if guarded else [])


def test_the_gate_lets_this_process_close():
    ending = Recorded()
    ending.guarded = True
    with socket.create_server(("127.0.0.1", 0)) as server:
        gate = Gate(server.getsockname(), ending)
        host, _, port = gate.address.partition(":")
        local = socket.create_connection((host, int(port)))
        remote, _ = server.accept()
        local.close()
        remote.settimeout(10)
        assert remote.recv(1) == b""
        remote.close()
        time.sleep(0.1)
    assert ending.lines == []


def test_a_gate_to_nowhere_is_closed_and_not_lost():
    ending = Recorded()
    ending.guarded = True
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    gate = Gate(address, ending)
    host, _, port = gate.address.partition(":")
    with socket.create_connection((host, int(port)), timeout=10) as local:
        assert local.recv(1) == b""
    assert ending.lines == []
