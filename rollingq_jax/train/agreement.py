"""What the processes of one run tell each other beside the collectives of their devices.

Before a device is used they compare configuration, data, workdir and versions; later, whoever ends
early tells the others why. Both go through the key-value store of `jax.distributed`'s coordination
service, which process 0 holds. A collective could not do it: where processes differ, so may the
shapes in it, and it stands still for ever.
"""

import contextlib
import json
import os
import re
import secrets
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, NoReturn

import jax
from etils import epath
from jax._src import distributed as jax_distributed  # the store has no public name

import rollingq_jax
from rollingq_jax.data.dataset import first_difference
from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.train.config import flatten
from rollingq_jax.train.distributed import AGAIN, GOES_ON, TIMEOUT, Ending, Waiting, processes
from rollingq_jax.train.preemption import EXIT_CODE, Interrupted

BEAT = 2.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a process counts as dead; JAX allows 100
LAST_WORDS = 10.0  # seconds that process 0 stays for the others to read why
SEEN_WITHIN = 8.0  # seconds that a network file system may take to show a new file
# Statuses of a collective or of a barrier that not all have come to.
BROKEN = "(UNKNOWN|INTERNAL|UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|FAILED_PRECONDITION): "
MOST = 8  # differences in one line
# Folders of the host, whose content the data's fingerprint tells.
PLACES = ("data.path", "data.cache_dir")
SETTINGS = ("jax_default_prng_impl", "jax_enable_x64", "jax_default_matmul_precision")

Facts = dict[str, Any]


class Store(NamedTuple):
    """The key-value store that all processes share.

    Attributes:
      client: of `jax.distributed`.
      process: the number of this process.
      total: how many there are.
    """

    client: Any
    process: int
    total: int

    def put(self, key: str, value: Any) -> None:
        """Sets a value."""
        self.client.key_value_set(_key(key), json.dumps(value), allow_overwrite=True)

    def put_first(self, key: str, value: Any) -> None:
        """Sets a value if no process has set one."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.client.key_value_set(_key(key), json.dumps(value), allow_overwrite=False)

    def get(self, key: str) -> Any:
        """The value of a key, or None."""
        folder, _, name = key.rpartition("/")
        return self.under(folder).get(name)

    def under(self, folder: str) -> dict[str, Any]:
        """Values by the last parts of their keys."""
        found = self.client.key_value_dir_get(_key(folder) + "/")
        return {key.rpartition("/")[2]: json.loads(value) for key, value in found}


def _key(name: str) -> str:
    return f"rollingq_jax/{name}"


def shared_store() -> Store | None:
    """The store, or None in a process that is alone."""
    state = jax_distributed.global_state
    if state.client is None or state.num_processes < 2:
        return None
    return Store(state.client, state.process_id, state.num_processes)


def run_facts(identity: Mapping[str, Any]) -> Facts:
    """What has to be the same in all processes.

    Args:
      identity: of the experiment, see `Experiment.identity`.

    Returns:
      `values`, compared as they stand, by the names that a difference is told by; and `signature`,
      the data's fingerprint, which is compared with a tolerance.
    """
    config = flatten(identity["config"])
    values = {f"config.{name}": value for name, value in config.items() if name not in PLACES}
    for split, count in identity["examples"].items():
        values[f"the number of examples in the data's split {split!r}"] = count
    for package in (jax, rollingq_jax):
        values[f"the version of {package.__name__}"] = package.__version__
    for name in SETTINGS:
        values[name.upper()] = str(jax.config.values[name])
    return {"values": values, "signature": identity["signature"]}


def differences(facts: Mapping[int, Facts]) -> list[str]:
    """Each difference between processes, in words: by field, with the values of all.

    Args:
      facts: by process, from `run_facts`.

    Examples:
      >>> differences({0: {"values": {"config.seed": 0}}, 1: {"values": {"config.seed": 1}}})
      ['config.seed is 0 in process 0 and 1 in process 1']
    """
    lines = []
    values = {number: found["values"] for number, found in facts.items()}
    for name in sorted(set().union(*values.values())):
        groups = _grouped({n: repr(v[name]) if name in v else "absent" for n, v in values.items()})
        if len(groups) > 1:
            told = [f"{shown} in {processes(who)}" for shown, who in groups.items()]
            lines.append(f"{name} is {' and '.join(told)}")
    signatures = {number: found.get("signature", {}) for number, found in facts.items()}
    ours = signatures[min(facts)]
    arrays = _grouped({n: first_difference(theirs, ours) for n, theirs in signatures.items()})
    lines += [
        f"the data's {array} has other values in {processes(who)} than in process 0"
        for array, who in arrays.items()
        if array
    ]
    return lines


def _grouped(shown: Mapping[int, Any]) -> dict[Any, list[int]]:
    """The processes, in order, by what each of them shows."""
    groups: dict[Any, list[int]] = {}
    for number, value in sorted(shown.items()):
        groups.setdefault(value, []).append(number)
    return groups


def verdict(told: Mapping[int, Any]) -> str:
    """The differences between processes, their workdirs among them, in one line; or nothing."""
    lines = differences({number: one["facts"] for number, one in told.items()})
    lines += [
        f"workdir {one['workdir']} in process {number} is not the folder {told[0]['workdir']} in "
        "process 0, whose files do not appear in it"
        for number, one in sorted(told.items())
        if not one["shared"]
    ]
    more = [f"and {len(lines) - MOST} other differences"] if len(lines) > MOST else []
    return "; ".join(lines[:MOST] + more + ["allowed: the same in all processes"]) if lines else ""


@contextlib.contextmanager
def agreement(timeout: float = TIMEOUT) -> Iterator[Callable[[epath.Path, Facts], None]]:
    """Runs a block in all processes and compares what it found before one of them goes on.

    An error in the block is told to the others, which raise it too. In a process that is alone,
    nothing happens.

    Args:
      timeout: seconds to wait for the others; standard error says for whom.

    Returns:
      A function that the block hands the workdir and the facts to.

    Raises:
      ConfigError: the processes differ, says in what; one of them has failed; or one does not come.
    """
    found: list[tuple[epath.Path, Facts]] = []
    store = shared_store()
    if store is None:
        yield lambda *_: None
        return
    # A process may train several runs one after the other.
    run = store.client.key_value_increment(_key(f"runs/{store.process}"), 1)
    room = f"agreement/{run}"
    try:
        yield lambda workdir, facts: found.append((workdir, facts))
    except Exception as error:
        line = has_ended(store.process, one_line(error))
        store.put(f"{room}/here/{store.process}", line)
        if store.process == 0:
            store.put(f"{room}/verdict/0", line)
        raise
    store.put(f"{room}/here/{store.process}", "")
    ask = _ask_all if store.process == 0 else _answer
    message = ask(store, room, *found[0], timeout)
    if message:
        raise ConfigError(message)


def _ask_all(store: Store, room: str, workdir: epath.Path, facts: Facts, timeout: float) -> str:
    """Process 0: collects the facts; returns what all processes raise, or nothing."""

    def collect() -> str:
        with _token(workdir) as token:
            store.put(f"{room}/token/0", token.name)
            mine = {"facts": facts, "workdir": str(workdir), "shared": True}
            store.put(f"{room}/facts/0", mine)
            store.put(f"{room}/told/0", "")
            message = _await_all(store, f"{room}/told", "looked into the workdir", timeout)
        told = store.under(f"{room}/facts")
        return message or verdict({int(number): one for number, one in told.items()})

    message = _await_all(store, f"{room}/here", "read configuration and data", timeout)
    try:
        message = message or collect()
    except OSError as error:
        message = has_ended(0, one_line(error))
    store.put(f"{room}/verdict/0", message)
    return message


def _answer(store: Store, room: str, workdir: epath.Path, facts: Facts, timeout: float) -> str:
    """Another process: tells its facts; returns what process 0 says of them."""

    def verdict_told() -> str | None:
        return store.get(f"{room}/verdict/0")

    def begun() -> str | None:
        # A verdict before the facts is an error, after which no token may come.
        return verdict_told() or ("" if store.get(f"{room}/token/0") else None)

    message = _await(begun, store, f"{room}/here", "read configuration and data", timeout)
    if message:
        return message
    shared = _appears(workdir / store.get(f"{room}/token/0"))
    told = {"facts": facts, "workdir": str(workdir), "shared": shared}
    store.put(f"{room}/facts/{store.process}", told)
    store.put(f"{room}/told/{store.process}", "")
    return _await(verdict_told, store, f"{room}/told", "looked into the workdir", timeout)


def _await_all(store: Store, folder: str, what: str, timeout: float) -> str:
    """Waits until all processes have told something; returns what speaks against going on."""

    def complete() -> str | None:
        told = store.under(folder)
        if failed := [line for _, line in sorted(told.items()) if line]:
            return str(failed[0])
        return "" if len(told) == store.total else None

    return _await(complete, store, folder, what, timeout)


def _await(
    found: Callable[[], str | None], store: Store, folder: str, what: str, timeout: float
) -> str:
    """Waits until `found` returns a text, and says now and then for whom; after too long a time
    returns a message instead."""
    waiting = Waiting(timeout)
    while (answer := found()) is None:
        if waiting.over(lambda: f"{_away(store, folder)} to have {what}"):
            return (
                f"{_away(store, folder)} did not come so far within {timeout:g} s as to have "
                f"{what}; allowed: processes that are equally fast, or a longer "
                "--initialization_timeout"
            )
        time.sleep(AGAIN)
    return answer


def _away(store: Store, folder: str) -> str:
    """The processes that have put nothing under a folder, in words."""
    here = store.under(folder)
    away = [number for number in range(store.total) if str(number) not in here]
    return f"{processes(away or [0])} of {store.total}"


@contextlib.contextmanager
def _token(workdir: epath.Path) -> Iterator[epath.Path]:
    """A file in the workdir for a while; the folder is afterwards as it was, or is not there."""
    local = "://" not in os.fspath(workdir)
    made = [path for path in (workdir, *workdir.parents) if local and not path.exists()]
    workdir.mkdir(parents=True, exist_ok=True)
    token = workdir / f".one-workdir-{secrets.token_hex(8)}"
    try:
        token.write_text("")
        yield token
    finally:
        token.unlink(missing_ok=True)
        for path in made:
            with contextlib.suppress(OSError):  # somebody else has put something there
                path.rmdir()


def _appears(path: epath.Path) -> bool:
    """Tells if a file comes into sight, which on a network file system may take seconds."""
    end = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > end:
            return False
        time.sleep(AGAIN)
    return True


def has_ended(number: int, line: str) -> str:
    """What the other processes say when one has ended early."""
    return f"process {number} has ended: {line}"


def one_line(error: BaseException) -> str:
    """An error in one line; what is no user's error with the name of its type."""
    text = " ".join(str(error).split())
    return text if isinstance(error, UserError) else f"{type(error).__name__}: {text}"


Outcome = Callable[[BaseException], tuple[str, int] | None]


@contextlib.contextmanager
def watched(ending: Ending, outcome: Outcome) -> Iterator[None]:
    """Ends this process in one line where another one of the run ends early, and the reverse.

    A process may be in a collective then, from which nothing returns. So it is a thread that
    listens, and the process ends on the spot: checkpoints are whole at every moment.
    Process 0 looks for signs of life of the others; that it is gone itself, `Gate` sees.

    Args:
      ending: from `join`.
      outcome: from an error to its line and the exit code; None for one that wants a traceback.
    """
    store = shared_store()
    if store is None:
        yield
        return
    watch = _Watch(store, ending)
    watch.start()
    try:
        yield
    except Interrupted:  # all stop at the same step
        watch.finish()
        raise
    except BaseException as error:
        if _through_others(error):  # then another one is known to have ended soon
            time.sleep(SILENCE + 4 * BEAT)
        told = outcome(error)
        if told is None:
            traceback.print_exception(error)
        watch.fail(*(told or (one_line(error), 1)))
    else:
        watch.finish()


def _through_others(error: BaseException | None) -> bool:
    """Tells if an error came out of a collective, as it does where another process is gone.

    XLA raises them as more than one type, ValueError among them; they begin with a status.
    """
    while error is not None:
        if re.match(BROKEN, str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


class _Watch(threading.Thread):
    """Gives signs of life, and looks whether another process has ended early."""

    def __init__(self, store: Store, ending: Ending) -> None:
        super().__init__(daemon=True)
        self._store, self._ending, self._stop_asked = store, ending, threading.Event()
        now = time.monotonic()
        self._heard: dict[int, tuple[Any, float]] = dict.fromkeys(
            range(1, store.total), (None, now)
        )
        self._silent = set[int]()

    def run(self) -> None:
        self._ending.guarded, beat = True, 0
        while not self._stop_asked.wait(BEAT):
            beat += 1
            # Where the store does not answer, process 0 is gone, which `Gate` notices.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                self._store.put(f"alive/{self._store.process}", beat)
                if self._store.process == 0:
                    self._look_for_silence()
                notice = self._store.get("ended/0")
                if notice is not None:
                    line = f"error: {has_ended(notice['process'], notice['line'])}"
                    self._leave(line, notice["code"])

    def _look_for_silence(self) -> None:
        signs, now = self._store.under("alive"), time.monotonic()
        for number, (before, when) in self._heard.items():
            sign = signs.get(str(number))
            if sign != before:
                self._heard[number] = (sign, now)
            elif now - when > SILENCE:
                self._silent.add(number)
                line = f"no sign of life for {SILENCE:g} s; {GOES_ON}"
                notice = {"process": number, "line": line, "code": EXIT_CODE}
                self._store.put_first("ended/0", notice)

    def finish(self) -> None:
        """This process has done its part: returns when all have; process 0 writes the report."""
        self._store.put(f"done/{self._store.process}", "")
        _await_all(self._store, "done", "finished the run", float("inf"))
        self._stop_asked.set()
        self.join()
        self._ending.guarded = False

    def fail(self, line: str, code: int) -> NoReturn:
        """Tells the others, then ends this process."""
        self._ending.take()
        reason = line.removeprefix("error: ")
        notice = {"process": self._store.process, "line": reason, "code": code}
        self._store.put_first("ended/0", notice)
        self._leave(line, code)

    def _leave(self, line: str, code: int) -> NoReturn:
        """Ends this process; process 0, in which the store lives, when the others have read why."""
        self._ending.take()
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._store.put(f"read/{self._store.process}", "")
            end = time.monotonic() + LAST_WORDS
            while self._store.process == 0 and time.monotonic() < end:
                if len(self._store.under("read")) >= self._store.total - len(self._silent):
                    break
                time.sleep(AGAIN)
        self._ending.end(line, code)
