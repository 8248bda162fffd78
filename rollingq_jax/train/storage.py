"""What has no room left, in one line: a folder (full, read-only, over its quota), the memory."""

import contextlib
import errno
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any

from etils import epath

from rollingq_jax.errors import CheckpointError, ConfigError, UserError

ROOM = 1 << 20  # bytes beside the arrays: their metadata, one block at least a file, metrics
CODES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG, errno.EACCES, errno.EIO)


def check_room(directory: epath.Path, size: int) -> None:
    """A checkpoint fits on the disk. Orbax would say so too, in many lines and half-way through.

    Raises:
      OSError: it does not.
    """
    if "://" in os.fspath(directory):
        return
    free, wanted = shutil.disk_usage(directory).free, size + size // 8 + ROOM
    if free < wanted:
        reason = f"{os.strerror(errno.ENOSPC)}: {wanted:,} bytes are wanted and {free:,} are free"
        raise OSError(errno.ENOSPC, reason)


@contextlib.contextmanager
def saving(directory: epath.Path) -> Iterator[None]:
    """Turns what Orbax raises while it saves into one line.

    Raises:
      CheckpointError: the checkpoint is not saved.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # Orbax and TensorStore raise many types
        silence_closed_loops()
        raise CheckpointError(
            f"a checkpoint in {directory} is not saved ({reason_of(error)})"
        ) from error


def silence_closed_loops() -> None:
    """Drops reports that no caller can catch, of an error that is raised as well.

    Where a checkpoint cannot be read or written, TensorStore still reports to Orbax's event loop
    when Orbax has raised the error and closed the loop, and asyncio logs what nobody waits for.
    Called when the first such error has come; all other reports go where they went.
    """
    shown = sys.unraisablehook
    if getattr(shown, "drops_closed_loops", False):
        return

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            shown(unraisable)

    hook.drops_closed_loops = True  # type: ignore[attr-defined]
    sys.unraisablehook = hook
    logging.getLogger("asyncio").addFilter(
        lambda record: not (record.exc_info and "tensorstore_spec" in str(record.exc_info[1]))
    )


def reason_of(error: BaseException) -> str:
    """What the file system said; TensorStore has its words in the middle of a ValueError."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.strerror or text}" + (f": {error.filename}" if error.filename else "")
    for code in CODES:
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def writing(workdir: epath.Path) -> Iterator[None]:
    """Turns what the file system says of the run's folder into one line.

    Raises:
      CheckpointError: the folder could not be written, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"workdir {workdir} cannot be written ({reason_of(error)})"
        ) from error


@contextlib.contextmanager
def within_memory(config: Any) -> Iterator[None]:
    """Turns what XLA or Python raises where memory is exhausted into one line.

    Raises:
      ConfigError: names the fields that decide how much memory a run takes.
    """
    try:
        yield
    except UserError:
        raise
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and "RESOURCE_EXHAUSTED" not in reason:
            raise
        raise ConfigError(
            f"memory is exhausted with config.batch_size {config.batch_size} and config.model.dim "
            f"{config.model.dim}; allowed: what fits: a smaller batch_size, model.dim or "
            "model.depth, model.remat=True, data.prefetch=0, or more devices "
            f"({reason[:160] or type(error).__name__})"
        ) from error


@contextlib.contextmanager
def explained(newest: Callable[[], int | None]) -> Iterator[None]:
    """Says in an error what is left: the step of the newest checkpoint.

    Args:
      newest: tells that step, None if there is no checkpoint.

    Raises:
      UserError: the error that came, with that added.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}; {left(newest())}") from error


def left(step: int | None) -> str:
    """The newest checkpoint in words."""
    return (
        "there is no checkpoint yet"
        if step is None
        else f"the last good checkpoint is of step {step}"
    )
