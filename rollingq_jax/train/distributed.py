"""Several processes as one run: joined before anything uses a device.

`jax.distributed.initialize` waits in silence, and where a process does not come or a port is in use
it takes this one down with it. So the processes meet at the coordinator's address first, over plain
TCP, where they say whom they wait for and can give up in one line.
"""

import contextlib
import errno
import os
import selectors
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn

import jax
from jax._src import clusters  # finds the address of process 0, and has no public name

from rollingq_jax.errors import ConfigError, printable, said
from rollingq_jax.train.preemption import EXIT_CODE

FLAGS = ("coordinator", "num_processes", "process_id")
NAMES = ", ".join(f"--{name}" for name in FLAGS)
TIMEOUT = 300
EVERY = 5.0  # seconds between two lines of what is waited for
AGAIN = 0.2  # seconds between two attempts to reach the coordinator
USER_ERROR = 2
GREETING = "rollingq_jax: process {} of {}"
ALL_HERE = "rollingq_jax: all are here"
GOES_ON = "what is saved stays, and the same command in all processes goes on from there"
REFUSED = "rollingq_jax: refused: "


class Ending:
    """The end of this process in one line, for whichever of its threads is the first to know.

    Attributes:
      guarded: whether the end of process 0 is one of this process too; after the run, it may go.
    """

    def __init__(self) -> None:
        self.guarded, self._lock = False, threading.RLock()

    def take(self) -> None:
        """Returns in the first thread that calls it; in others never."""
        self._lock.acquire()

    def end(self, line: str, code: int) -> NoReturn:
        """Ends this process, with no word from JAX."""
        self.take()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            print(printable(" ".join(line.split())), file=sys.stderr, flush=True)
        os._exit(code)


class Gate:
    """Stands between this process's JAX and process 0, and so is the first to see process 0 end.

    JAX's client aborts its process in many lines when its connection to process 0 breaks. It has a
    callback for that, which fails in jaxlib itself (`std::bad_cast`) where it is a Python function.
    So the connection goes through a port of this machine, and is not seen to break.

    Args:
      address: of process 0.
      ending: of this process.

    Attributes:
      address: for JAX, `HOST:PORT`.
    """

    def __init__(self, address: tuple[str, int], ending: Ending) -> None:
        self._remote, self._ending = address, ending
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._start(self._accept)

    @staticmethod
    def _start(function: Callable[..., None], *args: object) -> None:
        threading.Thread(target=function, args=args, daemon=True).start()

    def _accept(self) -> None:
        while True:
            self._start(self._relay, self._server.accept()[0])

    def _relay(self, local: socket.socket) -> None:
        try:
            remote = socket.create_connection(self._remote, timeout=EVERY)
        except OSError:
            local.close()  # process 0 is not so far; JAX tries again
            return
        remote.settimeout(None)
        closed = threading.Event()  # by this process
        self._start(self._pump, local, remote, closed.set)
        self._pump(remote, local, lambda: None if closed.is_set() else self._lost())
        local.close()
        remote.close()

    def _pump(self, source: socket.socket, sink: socket.socket, at_end: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            while content := source.recv(1 << 16):
                sink.sendall(content)
        at_end()
        with contextlib.suppress(OSError):
            sink.shutdown(socket.SHUT_WR)

    def _lost(self) -> None:
        if self._ending.guarded:
            self._ending.end(
                f"error: process 0 has ended, or cannot be reached any more; {GOES_ON}", EXIT_CODE
            )


def join(
    *,
    distributed: bool = False,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    initialization_timeout: int | None = None,
) -> Ending:
    """Joins the processes that the command line speaks of, if it speaks of any.

    Args:
      distributed: find the others through the cluster (TPU pods, Slurm, Open MPI and what else
        `jax.distributed.initialize` knows).
      coordinator: where there is no such cluster, `HOST:PORT`: an address of process 0 that all
        reach.
      num_processes: with it, how many there are.
      process_id: with it, which of them this is, from 0.
      initialization_timeout: seconds to wait for the others; standard error says for what.

    Returns:
      What ends this process in one line, where that is no longer `join`'s to raise.

    Raises:
      ConfigError: a value is missing or is out of range, or the processes do not find each other.
    """
    values = dict(zip(FLAGS, (coordinator, num_processes, process_id), strict=True))
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if 0 < len(missing) < len(FLAGS):
        raise ConfigError(f"{', '.join(missing)} is missing; allowed: all of {NAMES}, or none")
    ending = Ending()
    timeout = TIMEOUT if initialization_timeout is None else initialization_timeout
    if distributed or not missing:
        place, devices = "the cluster", None
        try:
            if missing:
                coordinator, num_processes, process_id, devices = _in_cluster(timeout)
            if coordinator is not None and num_processes is not None and process_id is not None:
                if process_id >= num_processes:
                    raise ConfigError(
                        f"--process_id is {process_id}; allowed: 0 to {num_processes - 1}"
                    )
                place = coordinator
                meet(coordinator, num_processes, process_id, timeout)
                if process_id > 0:
                    coordinator = Gate(_address(coordinator), ending).address
            with _ended_in_time(place, timeout, ending):
                jax.distributed.initialize(
                    coordinator,
                    num_processes,
                    process_id,
                    devices,
                    # Longer than ours, so that it is we who give up, in one line.
                    initialization_timeout=timeout + 60,
                )
        except ConfigError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the run's processes do not find each other ({said(error)}); allowed: "
                f"--distributed in a cluster that JAX knows, elsewhere {NAMES}"
            ) from None
    elif initialization_timeout is not None:
        raise ConfigError(
            "--initialization_timeout is given for one process; allowed: with --distributed or "
            f"with {NAMES}"
        )
    return ending


def _in_cluster(
    timeout: int,
) -> tuple[str | None, int | None, int | None, Sequence[int] | None]:
    """Address of process 0, number of processes, number of this one and its devices, as JAX finds
    them; None where it does not."""
    find = clusters.ClusterEnv.auto_detect_unset_distributed_params
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")  # as `jax.distributed.initialize` has it
    found = find(address, None, None, None, None, timeout)
    return found[:3] + (None,) if os.environ.get("JAX_LOCAL_DEVICE_IDS") else found


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Returns when all processes have come to the coordinator's address; its port is free then.

    Raises:
      ConfigError: the address is none, its port is in use, or not all came within `timeout`
        seconds.
    """
    host, port = _address(coordinator)
    if process_id == 0:
        _await_all(coordinator, port, num_processes, timeout)
    else:
        _report_to(coordinator, (host, port), num_processes, process_id, timeout)


def _address(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65_536):
        raise ConfigError(f"--coordinator is {coordinator!r}; allowed: HOST:PORT of process 0")
    return host, int(port)


class Waiting:
    """Says every few seconds what is waited for, and when that has been long enough."""

    def __init__(self, timeout: float) -> None:
        self._start = self._said = time.monotonic()
        self._timeout = timeout

    def over(self, what: str | Callable[[], str]) -> bool:
        """Tells if it has been long enough; a function is called only when there is a line due."""
        now = time.monotonic()
        if now - self._said >= EVERY:
            self._said = now
            print(f"waiting for {what() if callable(what) else what}", file=sys.stderr, flush=True)
        return now - self._start >= self._timeout


def processes(numbers: Sequence[int]) -> str:
    """Processes in words, at most eight of them.

    Examples:
      >>> processes([1]), processes([1, 2])
      ('process 1', 'processes 1, 2')
    """
    words = ", ".join(map(str, numbers[:8])) + (" and others" if len(numbers) > 8 else "")
    return f"process{'' if len(numbers) == 1 else 'es'} {words}"


def _did_not_come(who: str, coordinator: str, timeout: float, reason: str = "") -> ConfigError:
    return ConfigError(
        f"{who} did not come to {coordinator} within {timeout:g} s{reason}; allowed: all "
        "processes, started with the same --coordinator and --num_processes, or a longer "
        "--initialization_timeout"
    )


def _await_all(coordinator: str, port: int, num_processes: int, timeout: float) -> None:
    """Process 0: holds the port until each of the others has reported and still listens."""
    try:
        server = _listen(port)
    except OSError as error:
        raise ConfigError(
            f"--coordinator is {coordinator!r}: port {port} cannot be used ({said(error)}); "
            "allowed: a free port of this machine"
        ) from None
    waiting, present = Waiting(timeout), dict[int, socket.socket]()
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        selector = stack.enter_context(selectors.DefaultSelector())
        selector.register(server, selectors.EVENT_READ)
        while len(present) < num_processes - 1:
            for key, _ in selector.select(AGAIN):
                if key.fileobj is server:
                    connection = stack.enter_context(server.accept()[0])
                    # A stranger that connects and says nothing must not hold up the others.
                    connection.setblocking(False)
                    selector.register(connection, selectors.EVENT_READ)
                    continue
                connection = key.fileobj  # type: ignore[assignment]
                number = _number(_read(connection), num_processes, present)
                if isinstance(number, int):
                    present[number] = connection
                    continue
                for place in [n for n, found in present.items() if found is connection]:
                    del present[place]  # it has ended while it waited
                if number:
                    _send(connection, REFUSED + number)
                selector.unregister(connection)
                connection.close()
            who = sorted(set(range(1, num_processes)) - present.keys())
            if who and waiting.over(f"{processes(who)} of {num_processes} at {coordinator}"):
                raise _did_not_come(processes(who), coordinator, timeout)
        server.close()  # before the others go on: JAX uses the same port
        for connection in present.values():
            _send(connection, ALL_HERE)


def _listen(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        try:
            return socket.create_server(
                ("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024
            )
        except OSError as error:  # a machine may know IPv6 and have no address of it
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    return socket.create_server(("", port), backlog=1024)


def _number(told: str | None, num_processes: int, present: dict[int, socket.socket]) -> int | str:
    """The process that a connection tells of; else why it is refused, empty for a stranger."""
    words = (told or "").split()
    if len(words) != 5 or told != GREETING.format(words[2], words[4]):
        return ""
    if not (words[2].isascii() and words[2].isdigit()):
        return ""
    if words[4] != str(num_processes):
        return f"process 0 has --num_processes={num_processes}"
    if int(words[2]) in present:
        return f"another process has --process_id={words[2]}"
    return int(words[2])


def _report_to(
    coordinator: str,
    address: tuple[str, int],
    num_processes: int,
    process_id: int,
    timeout: float,
) -> None:
    """Another process: tells process 0 of itself, and waits until all are there."""
    waiting, reason = Waiting(timeout), ""
    state = f"process 0 at {coordinator}"
    while True:
        try:
            with socket.create_connection(address, timeout=EVERY) as connection:
                _send(connection, GREETING.format(process_id, num_processes))
                connection.settimeout(AGAIN)
                state, reason = f"all of {num_processes} processes at {coordinator}", ""
                while not (told := _read(connection)):
                    if told is None:
                        break  # process 0 has ended, and may come again
                    if waiting.over(state):
                        raise _did_not_come("some other process", coordinator, timeout)
                if told == ALL_HERE:
                    return
                if told is not None:
                    refused = told.startswith(REFUSED)
                    why = told.removeprefix(REFUSED) if refused else "another program answers there"
                    raise ConfigError(
                        f"process {process_id} of {num_processes} is not taken at {coordinator}: "
                        f"{why}; allowed: the same --coordinator and --num_processes in all "
                        "processes, and a --process_id of its own in each"
                    )
        except OSError as error:
            reason = f" ({said(error)})"
        state = f"process 0 at {coordinator}"
        if waiting.over(state):
            raise _did_not_come("process 0", coordinator, timeout, reason)
        time.sleep(AGAIN)


def _send(connection: socket.socket, text: str) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(text.encode() + b"\n")


def _read(connection: socket.socket) -> str | None:
    """What has come: one line, empty where there is none yet, None at the end."""
    try:
        told = connection.recv(200)
    except (TimeoutError, BlockingIOError):
        return ""
    except OSError:
        return None
    return told.decode(errors="replace").strip() if told else None


@contextlib.contextmanager
def _ended_in_time(place: str, timeout: float, ending: Ending) -> Iterator[None]:
    """Speaks while JAX waits, and ends the process in one line before JAX would with many."""
    done = threading.Event()

    def watch() -> None:
        waiting = Waiting(timeout)
        while not done.wait(AGAIN):
            if waiting.over(f"the run's processes at {place}"):
                error = _did_not_come("some of the run's processes", place, timeout)
                ending.end(f"error: {error}", USER_ERROR)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
