"""SIGINT and SIGTERM end a run at the next step, after a checkpoint; a second one, at once."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command resumes where this one stopped


class Interrupted(Exception):
    """The run was asked to stop; what it had done is saved."""

    def __init__(self, step: int | None = None) -> None:
        where = "with nothing to save" if step is None else f"at step {step}, which is saved"
        super().__init__(f"stopped {where}; the same command goes on from there")
        self.step = step


class Interruption:
    """Context manager that turns signals into a request to stop.

    The first SIGINT or SIGTERM asks for the end; where nothing would be lost (`unsaved` is False)
    it ends the run on the spot. The second does so in any case. Outside the main thread, where
    Python allows no handlers, signals do what they did before.

    With several processes, SIGTERM belongs to the coordination service of `jax.distributed`: it is
    the cluster's notice of preemption, and all processes agree on the step at which they stop.

    Attributes:
      requested: whether the run shall stop.
      unsaved: whether steps have been done that no checkpoint holds.

    Args:
      ends_process: end the process itself, from a thread of its own: Python's handlers wait for
        compilation and for other long calls to return. Otherwise, as in a notebook, the handlers
        raise `Interrupted`, and `KeyboardInterrupt` at the second signal.
    """

    def __init__(self, ends_process: bool = False) -> None:
        self.requested, self.unsaved = False, False
        self._ends_process = ends_process
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            shared = jax.distributed.is_initialized()
            for number in (signal.SIGINT,) if shared else (signal.SIGINT, signal.SIGTERM):
                handler = self._forward if shared else self._handle
                self._stack.callback(signal.signal, number, signal.signal(number, handler))
            if self._ends_process and not shared:
                self._stack.enter_context(self._watcher())
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def reached(self, step: int) -> bool:
        """Tells if the run shall stop after this step; to be asked after every step.

        With several processes, the answer is the same in all of them.
        """
        if jax.distributed.is_initialized():
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def check(self) -> None:
        """To be called in long passes over data; several processes stop only between steps.

        Raises:
          Interrupted: the run shall stop.
        """
        if self.requested and not jax.distributed.is_initialized():
            raise Interrupted

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """One process's SIGINT stops all of them, as a notice of preemption; the second, this."""
        if self.requested:
            os._exit(128 + number)
        self.requested = True
        os.kill(os.getpid(), signal.SIGTERM)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ends_process:
            return  # the watcher has seen it
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if not self.unsaved:
            raise Interrupted

    @contextlib.contextmanager
    def _watcher(self) -> Iterator[None]:
        """Python's C-level handler writes each signal's number into a pipe; a thread reads it."""
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        previous = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._watch, args=(reader,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(previous)
            os.close(writer)
            thread.join()
            os.close(reader)

    def _watch(self, reader: int) -> None:
        while number := os.read(reader, 1):
            if number[0] not in (signal.SIGINT, signal.SIGTERM):
                continue
            if self.requested:
                os._exit(128 + number[0])
            self.requested = True
            if not self.unsaved:
                # A terminal has echoed ^C behind the progress bar.
                start = "\n" if sys.stderr.isatty() else ""
                with contextlib.suppress(OSError):  # nobody reads it any more
                    print(f"{start}{Interrupted()}", file=sys.stderr, flush=True)
                os._exit(EXIT_CODE)
