"""How much of a video file is missing, by the lengths that its container notes.

FFmpeg reads a file that was cut off to its end without a word.
"""

import os
import struct
from typing import Any, NamedTuple

_BLOCK = 4096  # of a file system: fewer zeros at the end may be samples or padding


class Missing(NamedTuple):
    """What a container's lengths show to be missing.

    Attributes:
      bytes: at least so many; 0 where nothing shows that any are.
      fragment: the file ends within one of a sequence of fragments. How many were to follow is
        written nowhere.
    """

    bytes: int
    fragment: bool = False


def find_missing(file: Any) -> Missing:
    """What is missing at the end of an MP4, MOV, AVI, Matroska, WebM or FLV, or is zeros there.

    No more than zeros for other formats, for lengths that were left open because the file was
    written to a pipe, and for what is no such file at all. ``file`` is binary and seekable, and is
    left at its start.
    """
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    head = file.read(12)
    file.seek(0)
    end, fragment = 0, False
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"free", b"skip", b"wide", b"styp", b"pnot"):
        end, fragment = _end_of_boxes(file, size)
    elif head[:4] == b"RIFF" and head[8:] == b"AVI ":
        end = _end_of_riff(file, size)
    elif head[:4] == b"\x1a\x45\xdf\xa3":
        end = _end_of_segment(file)
    elif head[:3] == b"FLV":
        end = _end_of_tags(file, size)
    missing = (
        Missing(end - size, fragment) if end > size else Missing(_zeros_at_the_end(file, size))
    )
    file.seek(0)
    return missing


def _zeros_at_the_end(file: Any, size: int) -> int:
    """How many bytes at the end were reserved and never written, as broken downloads leave them."""
    end = size
    while end > 0:
        start = max(end - _BLOCK, 0)
        file.seek(start)
        written = len(file.read(end - start).rstrip(b"\0"))
        end = start + written
        if written:
            break
    return size - end if size - end >= _BLOCK else 0


def _end_of_boxes(file: Any, size: int) -> tuple[int, bool]:
    """MP4 and MOV: where the last of the outermost boxes ends; whether it is of a fragment."""
    position, name, fragments = 0, b"", False
    while position < size:
        file.seek(position)
        length, name = struct.unpack(">I4s", file.read(8).ljust(8, b"\0"))
        if length == 1:
            (length,) = struct.unpack(">Q", file.read(8).ljust(8, b"\0"))
        if length < 8 or not name.isalnum():  # 0 reaches to the end of the file
            break
        position += length
        fragments |= name == b"moof"
    return position, fragments and name in (b"moof", b"mdat")


def _end_of_riff(file: Any, size: int) -> int:
    """AVI: where the last of its RIFF lists (one a gigabyte) ends."""
    position = 0
    while position < size:
        file.seek(position)
        name, length = struct.unpack("<4sI", file.read(8).ljust(8, b"\0"))
        left_open = length == 0 or length >= 0xFFFF0000 or abs(length - (1 << 31)) <= 1 << 16
        if name != b"RIFF" or left_open:
            break
        position += 8 + length + length % 2
    return position if position - size != 1 else size  # the last byte may only be padding


def _end_of_segment(file: Any) -> int:
    """Matroska and WebM: where the segment ends; 0 if its length was left open."""
    file.seek(4)
    header = _read_length(file)
    if header is None:
        return 0
    file.seek(header, os.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    length = _read_length(file)
    return 0 if length is None else file.tell() + length


def _read_length(file: Any) -> int | None:
    """A length of EBML: the zeros before the first one tell the number of further bytes."""
    first = file.read(1)
    if not first or first[0] == 0:
        return None
    further = 8 - first[0].bit_length()
    bits = 7 * (further + 1)
    value = int.from_bytes(first + file.read(further), "big") & ((1 << bits) - 1)
    return None if value == (1 << bits) - 1 else value  # all ones: not known


def _end_of_tags(file: Any, size: int) -> int:
    """FLV: where the last tag ends."""
    file.seek(5)
    (header,) = struct.unpack(">I", file.read(4).ljust(4, b"\0"))
    position = header + 4  # the length of the tag before, 0, stands between the two
    while header >= 9 and position < size:
        file.seek(position)
        tag = file.read(11)
        if len(tag) < 11 or tag[0] & 0x1F not in (8, 9, 18):
            break
        position += 11 + int.from_bytes(tag[1:4], "big")
        if position >= size:
            break
        position += 4
    return position
