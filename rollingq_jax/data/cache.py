"""Where generated data are kept, and how they get there whole."""

import hashlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

from rollingq_jax.data.options import local_path
from rollingq_jax.errors import DataError

_MANIFEST = "sha256.json"


def cache_root(cache_dir: str = "") -> pathlib.Path:
    """``cache_dir``, else the environment's ROLLINGQ_CACHE, else ~/.cache/rollingq_jax.

    Raises:
      ConfigError: it is not a local path.
    """
    if cache_dir:
        return local_path(cache_dir, "data.cache_dir")
    chosen = os.environ.get("ROLLINGQ_CACHE") or "~/.cache/rollingq_jax"
    return local_path(chosen, "environment's ROLLINGQ_CACHE")


def build_once(target: pathlib.Path, build: Callable[[pathlib.Path], pathlib.Path]) -> None:
    """Makes the directory ``target`` unless it is there.

    ``build`` works in a scratch directory beside it, and its result is moved into place by one
    rename, with a list of its files' checksums. So ``target`` is either absent or whole: a build
    that dies leaves only its scratch directory, and of two that run at once one gives up its result
    for the other's.

    Args:
      target: the directory to make.
      build: given an empty directory, makes a directory inside it and returns that one's path.

    Raises:
      DataError: the place cannot be written, or ``target`` is there and not as it was made.
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
            _move(made, target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    if _recorded(target) != _checksums(target):
        raise DataError(f"cache_dir: {target} is damaged; delete it, and it is made again")


def _move(made: pathlib.Path, target: pathlib.Path) -> None:
    try:
        os.rename(made, target)
    except OSError:
        if not target.exists():  # not another process's result in the same place
            raise


def _recorded(folder: pathlib.Path) -> dict[str, str] | None:
    try:
        return json.loads((folder / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _checksums(folder: pathlib.Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != _MANIFEST)
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }
