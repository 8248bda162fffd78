"""SIGINT and SIGTERM end a run at the next step, after a checkpoint; a second one, at once."""

import os
import signal
from types import FrameType

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command goes on from where this one stopped


class Interrupted(Exception):
    """The run was asked to stop and has saved its state."""

    def __init__(self, step: int) -> None:
        super().__init__(
            f"stopped at step {step}, which is saved; the same command goes on from there"
        )
        self.step = step


class Interruption:
    """Context manager that notes the first SIGINT or SIGTERM and lets the second end the process.

    Outside the main thread, where Python allows no handlers, it notes nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interruption":
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        except ValueError:
            self._previous.clear()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            os._exit(128 + number)
        self.requested = True
