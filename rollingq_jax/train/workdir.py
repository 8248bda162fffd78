"""The folder of a run: checked before anything is written, made, and claimed."""

import copy
import json
import os
import re
import secrets
from collections.abc import Mapping
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.errors import CheckpointError, ConfigError, said
from rollingq_jax.train.config import default_config, differing_fields, with_defaults
from rollingq_jax.train.writer import read_object, write_whole


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The folder as an absolute path, local or gs://."""
    path = epath.Path(workdir).expanduser()
    return path if "://" in os.fspath(path) else path.resolve()


def with_absolute_paths(config: Any) -> Any:
    """The configuration with `data.path` and `data.cache_dir` absolute, so that the run's data are
    found from another folder too; an address such as gs:// stays."""
    relative = {
        name: value
        for name in ("path", "cache_dir")
        if isinstance(value := config.data.get(name), str) and value and "://" not in value
    }
    if not relative:
        return config
    config = copy.deepcopy(config)
    for name, value in relative.items():
        config.data[name] = os.path.abspath(os.path.expanduser(value))
    return config


def check_path(workdir: epath.PathLike) -> None:
    """The absolute path of a folder is one that TensorStore, which keeps the arrays, can name.

    Raises:
      ConfigError: it holds a backslash, which TensorStore would take for `/`, or bytes that are not
        UTF-8; or it is `gs:/` with one slash.
    """
    path = os.fspath(workdir)
    if "\\" in path:
        raise ConfigError(
            f"workdir is {path!r}; allowed: a path without a backslash, which TensorStore, where "
            "checkpoints are kept, reads as /"
        )
    if not path.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in path):
        raise ConfigError(f"workdir is {path!r}; allowed: a path in UTF-8")
    for scheme in ("gs:", "s3:"):
        if scheme in path.split("/") and "://" not in path:
            raise ConfigError(
                f"workdir is {path!r}; allowed: a local folder, or {scheme}//BUCKET/FOLDER"
            )


def check_workdir(workdir: epath.PathLike) -> epath.Path:
    """The folder as an absolute path; it need not exist yet, and nothing is left in it.

    Raises:
      ConfigError: the name is empty, names a file, or the folder cannot be written, or not by all
        that writes there (see `check_path`).
    """
    if not os.fspath(workdir).strip():
        raise ConfigError("workdir is empty; allowed: a folder that can be written")
    try:
        path = nearest = absolute(workdir)
        check_path(path)
        remote = "://" in os.fspath(path)
        while not remote and not nearest.exists() and nearest != nearest.parent:
            nearest = nearest.parent
        probe = nearest / f".write-test-{secrets.token_hex(8)}"  # hosts may share a process id
        probe.write_text("")
        probe.unlink()
    except ConfigError:
        raise
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
    return with_defaults(read_object(path), default_config().to_dict())


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
        hint = ""
        if set(different) <= {"epochs", "optimizer.warmup_epochs"}:
            ours, before = different.get("epochs", (config.epochs, config.epochs))
            hint = (
                f"; allowed: the {before} epochs with which it began, or another workdir, in which "
                f"all {ours} are trained from the start: a run cannot be made longer, since the "
                "learning rate falls to 0 at the end of the epochs that it was planned for"
            )
        raise CheckpointError(f"{where} holds another run: {fields}{hint}")


def has_saved(workdir: epath.Path) -> bool:
    """Whether a run has left anything in the folder that another one must not touch: a checkpoint,
    damaged or not, or a summary."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    saved = any(re.fullmatch(r"\d+(\.damaged.*)?", name) for name in names)
    return saved or (workdir / "summary.json").exists()


def check_free(workdir: epath.Path, config: Any) -> None:
    """The folder holds nothing, this run, or one that ended before it had saved anything.

    Raises:
      CheckpointError: it holds another run, or checkpoints without a configuration.
    """
    theirs = read_config(workdir)
    if theirs is not None:
        if has_saved(workdir):
            check_same_run(config, theirs, f"workdir {workdir}")
    elif (workdir / "checkpoints").exists():
        raise CheckpointError(
            f"workdir {workdir} holds checkpoints and no config.json; "
            "allowed: an empty folder, or one with both"
        )


def claim(workdir: epath.Path, config: Any) -> None:
    """Makes the folder this run's by writing its configuration; to be called with the lock held.

    The configuration of a run that has saved something stays as it is until its data are known to
    be the same: see `remember`.

    Raises:
      CheckpointError: as `check_free`.
    """
    if jax.process_index() == 0:
        check_free(workdir, config)
        if not has_saved(workdir):
            rotations = workdir / "rotations"  # of a run that saved no checkpoint
            if rotations.is_dir():
                rotations.rmtree()
            remember(workdir, config)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir claimed")


def remember(workdir: epath.Path, config: Any) -> None:
    """Writes `config.json`, unless it says so already; of several processes, the first does."""
    if jax.process_index() == 0:
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        path = workdir / "config.json"
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
