"""One live run in a folder, at most."""

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator

import jax
from etils import epath

from rollingq_jax.errors import CheckpointError

log = logging.getLogger(__name__)


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder and holds its lock; the kernel lets go of it when the process ends.

    The file `.lock` stays, with the number of the process that held it last. An object store
    (gs://) has no locks. Of several processes the first holds the lock for all.

    Raises:
      CheckpointError: another live run holds it.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    if "://" in os.fspath(workdir) or jax.process_index() != 0:
        yield
        return
    path = workdir / ".lock"
    path.touch()
    with open(path, encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = " ".join(file.read(200).split()) or "unknown"
            raise CheckpointError(
                f"workdir {workdir} is in use by another run ({holder}); "
                "allowed: a folder that no live run uses"
            ) from None
        except OSError as error:
            log.warning("workdir %s cannot be locked: %s", workdir, error)
        with contextlib.suppress(OSError):  # a full disk; the lock holds without the note
            path.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
        yield
