"""When a checkpoint is due within an epoch."""

import time

import jax
import numpy as np
from jax.experimental import multihost_utils


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
