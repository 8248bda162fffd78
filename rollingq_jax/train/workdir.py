"""The folder of a run: checked before anything is written, locked, claimed, read and written."""

import contextlib
import copy
import errno
import fcntl
import json
import logging
import math
import os
import re
import secrets
import socket
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from rollingq_jax.analysis.tasks import MAIN, task_name
from rollingq_jax.errors import CheckpointError, ConfigError, said
from rollingq_jax.files import write_whole
from rollingq_jax.train.config import (
    default_config,
    differing_fields,
    upgraded,
    with_defaults,
)

log = logging.getLogger(__name__)

MAX_DEPTH = 50
TOKENIZER = "tokenizer.json"  # in the run's folder, of texts that are read with one
DISK_ERRORS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EFBIG,
    errno.EACCES,
    errno.EIO,
)


def absolute(workdir: epath.PathLike) -> epath.Path:
    """The folder as an absolute path, local or gs://."""
    path = epath.Path(workdir).expanduser()
    return path if "://" in os.fspath(path) else path.resolve()


def with_absolute_paths(config: Any) -> Any:
    """The configuration with the paths of `data` absolute, so that the run's data are found from
    another folder too; an address such as gs:// stays."""
    config = copy.deepcopy(config)
    for name in ("path", "cache_dir", "tokenizer"):
        value = config.data.get(name)
        if isinstance(value, str) and value and "://" not in value:
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
    if any("\ud800" <= letter <= "\udfff" for letter in path):
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
    return with_defaults(upgraded(read_object(path)), default_config().to_dict())


def check_same_run(config: Any, theirs: Mapping[str, Any], where: str) -> None:
    """Checks that a run resumes only with the configuration that it began with.

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
    """Tells if a run has left anything in the folder that another one must not touch: a checkpoint,
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
    """Writes `config.json`, unless it says so already, and a copy of the tokenizer, if the data
    have one; of several processes, the first does."""
    if jax.process_index() == 0:
        text = json.dumps(config.to_dict(), indent=2) + "\n"
        path = workdir / "config.json"
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
        tokenizer = config.data.get("tokenizer")
        if tokenizer and not (workdir / TOKENIZER).exists():
            write_whole(workdir / TOKENIZER, epath.Path(tokenizer).read_bytes())


def read_summary(workdir: epath.Path) -> dict[str, Any] | None:
    """The summary of a finished run; None if the run has not finished."""
    path = workdir / "summary.json"
    if not path.exists():
        return None
    try:
        summary = read_object(path)
        best = summary["best"]
        main = MAIN[task_name(summary)]
        fits = is_number(best["step"]) and "epoch" in best and main in best
        fits &= summary[f"test_{main}"] is None or is_number(summary[f"test_{main}"])
        fits &= all(isinstance(summary.get(n, {}), dict) for n in ("examples", "signature"))
        if not fits:
            raise TypeError("numbers are missing")
    except (CheckpointError, TypeError, KeyError) as error:
        reason = f" ({error})" if isinstance(error, CheckpointError) else ""
        raise CheckpointError(
            f"{path} is damaged{reason}; allowed: the summary of a run, or none, to make it anew"
        ) from None
    return summary


def updated(
    workdir: epath.Path, summary: dict[str, Any], config: Any, inputs: Any
) -> dict[str, Any]:
    """A finished run's summary with the place where its data are now, which `config` says, and with
    what inference needs of them, which older versions left out.

    To be called when the data are known to be the same. The files are written anew where that has
    changed.
    """
    told, new = summary.get("config"), summary
    if isinstance(told, dict) and isinstance(told.get("data"), dict):
        places = {name: config.data.get(name) for name in ("path", "cache_dir")}
        if any(told["data"].get(name) != place for name, place in places.items()):
            new = new | {"config": told | {"data": told["data"] | places}}
            remember(workdir, config)
    if "inputs" not in summary:
        new = new | {"inputs": json_ready(inputs.to_json())}
    if new is not summary and jax.process_index() == 0:
        write_json(workdir / "summary.json", new)
    return new


@contextlib.contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Makes the folder and holds its lock, so that at most one live run uses it.

    The kernel lets go of it when the process ends. `fcntl.flock` itself and not the package
    filelock, which cannot say who holds the lock. The file `.lock` stays, with the number of the
    process that held it last. An object store (gs://) has no locks. Of several processes the first
    holds the lock for all.

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


def read_object(path: epath.Path) -> dict[str, Any]:
    """Reads a JSON file of a run.

    Raises:
      CheckpointError: it is no file, not JSON, or not an object of at most 50 levels.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({said(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({said(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; allowed: a JSON object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested too deep; allowed: at most {MAX_DEPTH} levels")
    return content


def is_number(value: Any) -> bool:
    """Tells if a value from JSON is a number that float64 holds; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1023


def json_ready(value: Any) -> Any:
    """The same with Python's own numbers; NaN and infinity become null, as JSON has neither."""
    if isinstance(value, Mapping):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes a JSON file whole."""
    write_whole(path, json.dumps(json_ready(content), indent=2) + "\n")


def reason_of(error: BaseException) -> str:
    """The file system's words; TensorStore has its words in the middle of a ValueError."""
    text = " ".join(str(error).split())
    if isinstance(error, OSError):
        return f"{error.strerror or text}" + (f": {error.filename}" if error.filename else "")
    for code in DISK_ERRORS:
        if os.strerror(code) in text:
            return os.strerror(code)
    return text[:200] or type(error).__name__


@contextlib.contextmanager
def convert_io_errors(workdir: epath.Path) -> Iterator[None]:
    """Turns an error of the file system, in the run's folder, into one line.

    Raises:
      CheckpointError: the folder could not be written, as on a full disk.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"workdir {workdir} cannot be written ({reason_of(error)})"
        ) from error
