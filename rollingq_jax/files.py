"""Files: written so that a reader finds them whole or not at all; read with one kind of error."""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath

from rollingq_jax.errors import DataError

HEAD = 512  # bytes that tell what a file is
_POINTER = (b"version https://git-lfs.github.com/spec/", b"version https://hawser.github.com/spec/")
# What is often found under the name of a media file, by its first bytes.
_IMPOSTORS = (
    (b"\x00\x05\x16\x07", "macOS metadata (AppleDouble), not the file itself"),
    (b"\x1f\x8b", "gzip data; unpack it first"),
    (b"PK\x03\x04", "a ZIP archive; unpack it first"),
    (b"%PDF-", "a PDF document"),
)
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_MARKUP = (
    ((b"<!doctype html", b"<html"), "an HTML page"),
    ((b"<?xml", b"<error"), "an XML document"),
    ((b"{",), "JSON text"),
)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file so that a reader, or a later process, sees the old content or the new.

    Args:
      path: local, or on gs://.
      content: of the file; text is written in UTF-8.

    Raises:
      OSError: it cannot be written; what was there before is there still.
    """
    path = epath.Path(path)
    # The process's number: two that write one file at a time do not mix their parts.
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        if "://" not in os.fspath(path):
            commit(Path(temporary), Path(path))
        else:
            temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def commit(temporary: Path, path: Path) -> None:
    """Renames a local file once its content is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def read_json(path: Path) -> Any:
    """The file's content, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


@contextlib.contextmanager
def reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a missing or damaged file into one `DataError`."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        if os.path.islink(path):
            raise DataError(f"{what} {path}: a link to a file that is not there") from None
        raise DataError(f"{what} {path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{what} {path}: is a folder, not a file") from None
    except ImportError as error:
        raise DataError(f"{what} {path}: reading it needs the package {error.name}") from None
    except MemoryError:
        raise DataError(f"{what} {path}: does not fit into memory") from None
    except Exception as error:  # decoders raise almost any type on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} {path}: damaged or not supported ({reason[:200]})") from None


def check_lfs_pointer(content: bytes | str | os.PathLike, name: str | os.PathLike = "") -> None:
    """Refuses the small text that stands in a Git repository for a file kept by Git LFS.

    Args:
      content: a file, or the first bytes of one (64 are enough). A file that cannot be opened
        passes: whoever reads it says why.
      name: what the message calls it; the path where it is empty.

    Raises:
      DataError: it is a pointer.
    """
    if not isinstance(content, bytes):
        name = name or content
        try:
            with open(content, "rb") as file:
                content = file.read(HEAD)
        except OSError:
            return
    if content.startswith(_POINTER):
        raise DataError(f"{name}: a Git LFS pointer: run git lfs pull where the file came from")


def check_impostor(head: bytes, path: str | os.PathLike, what: str) -> None:
    """Refuses, by its first bytes, what is no sound, image or video but often stands for one.

    Args:
      head: the first bytes, at least `HEAD` of them unless there are fewer.
      path: for the message.
      what: what the file should be, for the message.

    Raises:
      DataError: the file is empty, a Git LFS or git-annex pointer, a web page, an archive ...
    """
    name = f"{what} {path}"
    if not head:
        raise DataError(f"{name}: the file is empty")
    if not head.strip(b"\0"):
        raise DataError(f"{name}: begins with zeros: its content was never written")
    check_lfs_pointer(head, name)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if re.match(rb"/annex/objects/|(\.\./)*\.git/annex/objects/", head):
        raise DataError(f"{name}: a git-annex pointer: run git annex get where the file came from")
    if what == "image" and head[4:8] == b"ftyp":
        kind = "a HEIC or AVIF image" if head[8:12] in _HEIF else "a video"
        raise DataError(f"{name}: {kind}, not one of the formats that are read; convert it to JPEG")
    for start, found in _IMPOSTORS:
        if head.startswith(start):
            raise DataError(f"{name}: {found}")
    for starts, found in _MARKUP:
        if text.startswith(starts):
            raise DataError(
                f"{name}: {found}, as servers send in place of a file; download it again"
            )
