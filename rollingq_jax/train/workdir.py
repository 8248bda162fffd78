"""The folder of a run: made, checked and claimed before anything is written into it."""

import json
import os
from typing import Any

from etils import epath

from rollingq_jax.errors import CheckpointError, ConfigError
from rollingq_jax.train.config import differing_fields
from rollingq_jax.train.writer import write_whole


def open_workdir(workdir: epath.PathLike) -> epath.Path:
    """The folder, made if need be.

    Raises:
      ConfigError: the name is empty, names a file, or the folder cannot be written.
    """
    if not os.fspath(workdir).strip():
        raise ConfigError("workdir is empty; allowed: a folder that can be written")
    path = epath.Path(workdir).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".write-test-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ConfigError(
            f"workdir is {os.fspath(workdir)!r}; allowed: a folder that can be written "
            f"({error.strerror or error})"
        ) from None
    if "://" not in os.fspath(path):
        path = path.resolve()
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
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds {type(config).__name__}; allowed: a JSON object")
    return config


def claim(workdir: epath.Path, config: Any) -> None:
    """Makes the folder this run's by writing its configuration; a continuation must have the same.

    Args:
      workdir: from `open_workdir`.
      config: the resolved configuration.

    Raises:
      CheckpointError: the folder holds another run; says in which fields it differs.
    """
    theirs = read_config(workdir)
    if theirs is None:
        if (workdir / "checkpoints").exists():
            raise CheckpointError(
                f"workdir {workdir} holds checkpoints and no config.json; "
                "allowed: an empty folder, or one with both"
            )
    else:
        different = differing_fields(config, theirs)
        if different:
            fields = "; ".join(
                f"config.{name} is {ours!r} and was {old!r}"
                for name, (ours, old) in different.items()
            )
            raise CheckpointError(f"workdir {workdir} holds another run: {fields}")
    write_whole(workdir / "config.json", json.dumps(config.to_dict(), indent=2) + "\n")
