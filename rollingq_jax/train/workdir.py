"""The folder of a run: checked before anything is written, made, and claimed."""

import json
import os
import secrets
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError, ConfigError, said
from rollingq_jax.train.config import default_config, differing_fields, with_defaults
from rollingq_jax.train.writer import write_whole


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The folder as an absolute path, local or gs://."""
    path = epath.Path(workdir).expanduser()
    return path if "://" in os.fspath(path) else path.resolve()


def check_workdir(workdir: epath.PathLike) -> epath.Path:
    """The folder as an absolute path; it need not exist yet, and nothing is left in it.

    Raises:
      ConfigError: the name is empty, names a file, or the folder cannot be written.
    """
    if not os.fspath(workdir).strip():
        raise ConfigError("workdir is empty; allowed: a folder that can be written")
    try:
        path = nearest = absolute(workdir)
        remote = "://" in os.fspath(path)
        while not remote and not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        probe = nearest / f".write-test-{secrets.token_hex(8)}"  # hosts may share a process id
        probe.write_text("")
        probe.unlink()
    except Exception as error:  # of the system, or whatever a client of gs:// raises
        raise ConfigError(
            f"workdir is {os.fspath(workdir)!r}; "
            f"allowed: a folder that can be written ({said(error)})"
        ) from None
    return path


def read_config(workdir: epath.Path) -> dict[str, Any] | None:
    """The configuration of the run in the folder; None if there is none.

    Raises:
      CheckpointError: the file is there and is not a JSON object.
    """
    path = workdir / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}; allowed: a JSON object")
    return with_defaults(config, default_config().to_dict())


def check_same_run(config: Any, theirs: Mapping[str, Any], where: str) -> None:
    """A run goes on only with the configuration that it began with.

    Raises:
      CheckpointError: says in which fields `where`, the folder or checkpoint, differs.
    """
    different = differing_fields(config, theirs)
    if different:
        lines = [f"config.{name} is {a!r} and was {b!r}" for name, (a, b) in different.items()]
        more = [f"and {len(lines) - 8} other fields"] if len(lines) > 8 else []
        fields = "; ".join(lines[:8] + more)
        raise CheckpointError(f"{where} holds another run: {fields}")


def check_free(workdir: epath.Path, config: Any) -> None:
    """The folder holds nothing, or this run.

    Raises:
      CheckpointError: it holds another run, or checkpoints without a configuration.
    """
    theirs = read_config(workdir)
    if theirs is not None:
        check_same_run(config, theirs, f"workdir {workdir}")
    elif (workdir / "checkpoints").exists():
        raise CheckpointError(
            f"workdir {workdir} holds checkpoints and no config.json; "
            "allowed: an empty folder, or one with both"
        )


def claim(workdir: epath.Path, config: Any) -> None:
    """Makes the folder this run's by writing its configuration; to be called with the lock held.

    Raises:
      CheckpointError: as `check_free`.
    """
    if jax.process_index() == 0:
        check_free(workdir, config)
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        path = workdir / "config.json"
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir claimed")
