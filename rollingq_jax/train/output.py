"""Standard output that is always written, whatever stands in a name and whoever has left."""

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, TextIO

from tqdm import tqdm

from rollingq_jax.errors import printable, said

WIDTH = 80  # of the terminal that everything fits


def wrapped(line: str, indent: str = "  ") -> str:
    """A line as several that fit the terminal; those after the first are indented."""
    return textwrap.fill(
        printable(line),
        WIDTH,
        subsequent_indent=indent,
        break_on_hyphens=False,
        break_long_words=False,
    )


def in_columns(left: str, right: str, column: int) -> str:
    """Two texts side by side; the second is wrapped, and begins below where the first is long."""
    first = left.ljust(column)
    lines = textwrap.wrap(right, WIDTH - column, break_on_hyphens=False)
    if len(left) >= column:
        lines.insert(0, "")
    return "\n".join([(first + lines[0]).rstrip(), *(" " * column + line for line in lines[1:])])


def progress_bar(total: int, unit: str, **options: Any) -> Any:
    """A tqdm bar, where standard error is a terminal, that leaves room for the ^C of a Ctrl-C.

    Otherwise the echo wraps into the next line, and the bar is drawn a second time.
    """

    def room(_: Any = None) -> tuple[int, None]:
        return shutil.get_terminal_size().columns - 3, None

    bar = tqdm(total=total, unit=unit, ncols=room()[0], **{"disable": None} | options)
    bar.dynamic_ncols = room
    return bar


class Output:
    """A text stream over another one that a run or a command does not fail at.

    Control characters are written as escapes, as are letters that the stream's encoding lacks, and
    each line is there at once. Where nothing can be written any more (`train.py ... | head -1`),
    standard error says so, once, and what would follow is dropped.

    Args:
      stream: the stream; None, as where a process has no standard output, takes nothing.

    Attributes:
      failed: whether something was lost that somebody still wanted, as on a full disk.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream, self._open, self.failed = stream, stream is not None, False

    def write(self, text: str) -> int:
        """Writes the text; returns its length."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._call("write", printable(text).encode(encoding, "backslashreplace").decode(encoding))
        if "\n" in text:
            self.flush()
        return len(text)

    def flush(self) -> None:
        """Hands on what has been written."""
        self._call("flush")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _call(self, method: str, *args: str) -> None:
        if not self._open:
            return
        try:
            getattr(self._stream, method)(*args)
        except OSError as error:
            closed = isinstance(error, BrokenPipeError)
            self._open, self.failed = False, not closed
            what = "was closed" if closed else f"cannot be written ({said(error)})"
            with contextlib.suppress(OSError, ValueError, AttributeError):
                # What is still in the stream's buffer shall not fail once more when Python ends.
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())  # type: ignore[union-attr]
                os.close(null)
            with contextlib.suppress(OSError):
                print(f"standard output {what}; the command goes on without it", file=sys.stderr)


@contextlib.contextmanager
def shown() -> Iterator[Output]:
    """Makes `sys.stdout` an `Output` for a while; one that is an `Output` already stays."""
    if isinstance(sys.stdout, Output):
        yield sys.stdout
        return
    output = Output(sys.stdout)
    with contextlib.redirect_stdout(output):  # type: ignore[type-var]
        yield output
