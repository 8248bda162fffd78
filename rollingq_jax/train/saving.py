"""When a checkpoint is due within an epoch, and what a failure leaves."""

import contextlib
import time
from collections.abc import Iterator

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError, UserError
from rollingq_jax.train.checkpoint import Checkpoints


class SaveSchedule:
    """Checkpoints by steps and by minutes since the last one.

    Args:
      every_steps, every_minutes: as in `config.checkpoint`; 0 turns one off.
      log_every: several processes agree on the time only where they wait for each other anyway.
    """

    def __init__(self, every_steps: int, every_minutes: float, log_every: int) -> None:
        self._steps, self._seconds, self._log_every = every_steps, 60 * every_minutes, log_every
        self.saved()

    def saved(self) -> None:
        """A checkpoint has been made: the minutes count from now."""
        self._last = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step; the same in all processes."""
        if self._steps and step % self._steps == 0:
            return True
        if not self._seconds:
            return False
        late = time.monotonic() - self._last >= self._seconds
        if jax.process_count() == 1:
            return late
        if step % self._log_every:
            return False
        return bool(multihost_utils.broadcast_one_to_all(np.asarray(late)))


@contextlib.contextmanager
def explained(workdir: epath.Path, checkpoints: Checkpoints) -> Iterator[None]:
    """Says in an error what is left: the step of the newest checkpoint.

    Raises:
      CheckpointError: the folder could not be written, as on a full disk.
      UserError: the error that came, with that added.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(f"{error}; {left(checkpoints)}") from error
    except Exception as error:
        if (reason := storage_failure(error)) is None:
            raise
        raise CheckpointError(
            f"workdir {workdir} cannot be written ({reason}); {left(checkpoints)}"
        ) from error


def left(checkpoints: Checkpoints) -> str:
    """The newest checkpoint in words, once the save that is under way has ended."""
    with contextlib.suppress(Exception):  # its failure is another error's to report
        checkpoints.wait()
    newest = checkpoints.newest
    if newest is None:
        return "there is no checkpoint yet"
    return f"the last good checkpoint is of step {newest}"


def storage_failure(error: BaseException | None) -> str | None:
    """What the file system said, if that is what an error or one of its causes came from.

    TensorStore, below Orbax, raises ValueError with the system's words in it.
    """
    while error is not None:
        if isinstance(error, OSError):
            name = "" if error.filename is None else f": {error.filename}"
            return f"{error.strerror or error}{name}"
        error = error.__cause__ or error.__context__
    return None
