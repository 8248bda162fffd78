"""The cache of generated data and measurements, in which everything is whole."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from rollingq_jax.data.options import local_path
from rollingq_jax.errors import DataError
from rollingq_jax.files import read_json, write_whole

T = TypeVar("T")

_MANIFEST = "sha256.json"


def cache_root(cache_dir: str = "") -> pathlib.Path:
    """`cache_dir`, else the environment's ROLLINGQ_CACHE, else ~/.cache/rollingq_jax.

    Raises:
      ConfigError: it is not a local path.
    """
    if cache_dir:
        return local_path(cache_dir, "data.cache_dir")
    chosen = os.environ.get("ROLLINGQ_CACHE") or "~/.cache/rollingq_jax"
    return local_path(chosen, "environment's ROLLINGQ_CACHE")


def build_once(target: pathlib.Path, build: Callable[[pathlib.Path], pathlib.Path]) -> None:
    """Makes the directory `target` unless it is there.

    `build` works in a scratch directory next to it, and its result is moved into place by one
    rename, with a list of its files' checksums. So `target` is either absent or whole: a build
    that dies leaves only its scratch directory, and of two that run at once one gives up its result
    for the other's.

    Args:
      target: the directory to make.
      build: given an empty directory, makes a directory inside it and returns that one's path.

    Raises:
      DataError: the place cannot be written, or `target` is there and not as it was made.
    """
    if not target.exists():
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            scratch = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
        except OSError as error:
            raise DataError(
                f"cache_dir: {target.parent} cannot be written ({error.strerror}); set "
                "config.data.cache_dir or the environment's ROLLINGQ_CACHE to a directory that can"
            ) from error
        try:
            made = build(pathlib.Path(scratch))
            (made / _MANIFEST).write_text(json.dumps(_checksums(made), indent=1))
            try:
                os.rename(made, target)
            except OSError:
                if not target.exists():  # not another process's result in the same place
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if read_json(target / _MANIFEST) != _checksums(target):
        raise DataError(f"cache_dir: {target} is damaged; delete it, and it is made again")


SAMPLES = 16  # of a file's bytes, evenly spaced, by which it is known again
SAMPLE_BYTES = 4096


def file_states(files: Iterable[pathlib.Path]) -> list[list[Any]]:
    """Name, size, time of change and a digest of some bytes of each file, as JSON can hold them."""
    states = []
    for file in files:
        stat, digest = file.stat(), hashlib.sha256()
        with open(file, "rb") as opened:
            for number in range(SAMPLES):
                opened.seek(max(0, stat.st_size - SAMPLE_BYTES) * number // (SAMPLES - 1))
                digest.update(opened.read(SAMPLE_BYTES))
        states.append([str(file), stat.st_size, stat.st_mtime_ns, digest.hexdigest()])
    return states


def remembered(
    folder: pathlib.Path,
    key: Any,
    *,
    make: Callable[[], T],
    read: Callable[[Any], T],
    write: Callable[[T], Any],
) -> T:
    """Returns what `make` returns, or returned for an equal key before.

    A cache that is damaged, or that cannot be written, is passed over.

    Args:
      folder: where the results lie, each a JSON file.
      key: all that the result depends on, as JSON can hold it.
      make: called where nothing is found.
      read: from JSON; may raise whatever it likes on what it does not know.
      write: to JSON.
    """
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    place = folder / f"{name}.json"
    try:
        return read(json.loads(place.read_text(encoding="utf-8")))
    except Exception:  # it is not there, or it is anything but what was written
        made = make()
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(place, json.dumps(write(made)))
    return made


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
