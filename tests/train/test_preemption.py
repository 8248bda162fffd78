"""Signals within one process; `tests/faults` sends them to real runs."""

import os
import signal
import threading

import jax
import pytest

from rollingq_jax.train import preemption
from rollingq_jax.train.cli import run_command
from rollingq_jax.train.preemption import Interrupted, Interruption

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def send(number):
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_asks_and_the_second_ends(number):
    with Interruption() as interruption:
        interruption.unsaved = True
        assert not interruption.reached(1)
        interruption.check()
        send(number)
        assert interruption.reached(2)
        with pytest.raises(Interrupted):
            interruption.check()
        with pytest.raises(KeyboardInterrupt):
            send(number)


def test_with_nothing_to_save_the_first_ends_on_the_spot():
    with Interruption() as interruption:
        with pytest.raises(Interrupted, match="stopped with nothing to save; the same command"):
            send(signal.SIGTERM)
        assert interruption.requested


@pytest.mark.parametrize("ends_process", [False, True])
def test_handlers_are_as_before_afterwards(ends_process):
    before = [signal.getsignal(number) for number in SIGNALS]
    threads = threading.active_count()
    with Interruption(ends_process):
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert [signal.getsignal(number) for number in SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
    assert threading.active_count() == threads


def test_a_thread_sees_signals_while_python_code_does_not_run():
    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption.os, "_exit", ended.append)
        with Interruption(ends_process=True) as interruption:
            interruption.unsaved = True
            send(signal.SIGTERM)
            wait_for(lambda: interruption.requested)
            assert ended == []
            send(signal.SIGINT)
            wait_for(lambda: ended)
    assert ended == [128 + signal.SIGINT]


def test_a_thread_ends_a_process_that_has_nothing_to_save(capsys):
    ended = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preemption.os, "_exit", ended.append)
        with Interruption(ends_process=True):
            send(signal.SIGTERM)
            wait_for(lambda: ended)
    assert ended == [75]
    assert "stopped with nothing to save" in capsys.readouterr().err


def wait_for(condition):
    event = threading.Event()
    for _ in range(1000):
        if condition():
            return
        event.wait(0.01)
    raise AssertionError("nothing happened within ten seconds")


def test_outside_the_main_thread_nothing_is_taken():
    found = []

    def run():
        with Interruption() as interruption:
            found.append((signal.getsignal(signal.SIGTERM), interruption.reached(1)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, False)]


def test_with_several_processes_all_agree_on_the_step(monkeypatch):
    """SIGTERM stays with the coordination service, and SIGINT is passed on to it."""
    noticed = []
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(
        preemption.multihost_utils, "reached_preemption_sync_point", lambda step: step == 7
    )
    previous = signal.signal(signal.SIGTERM, lambda *_: noticed.append("preempted"))
    try:
        with Interruption(ends_process=True) as interruption:
            send(signal.SIGINT)
            assert noticed == ["preempted"]
            assert [step for step in range(6, 9) if interruption.reached(step)] == [7]
            interruption.check()  # one process alone does not leave a validation
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (Interrupted(12), 75, "stopped at step 12, which is saved; the same command goes on from"),
        (OSError(28, "No space left on device", "/x/y"), 74, "error: [Errno 28] No space left on"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_exit_codes(capsys, error, code, line):
    def command(argv):
        raise error

    assert run_command(command, ["x"]) == code
    printed = capsys.readouterr().err
    assert printed.startswith(line) and printed.count("\n") == 1
