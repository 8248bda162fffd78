"""The frames of a clip as the JPEG bytes that a record holds."""

import io
import re
from collections.abc import Sequence
from pathlib import Path

from rollingq_jax.data.media import (
    decode_image,
    encode_jpeg,
    iterate_frames,
    resize_short_side,
)
from rollingq_jax.errors import DataError

SHORT_SIDE = 256


def check_count(count: int) -> None:
    """A clip has frames.

    Raises:
      DataError: it has none.
    """
    if count < 1:
        raise DataError("a clip without frames; at least 1 is needed")


def stored_jpeg(data: bytes, short_side: int = SHORT_SIDE, name: str = "(bytes)") -> bytes:
    """Encoded image bytes as the JPEG to store: RGB, its shorter side at most ``short_side``.

    A JPEG in RGB or grey that is small enough already stays as it is, byte for byte, after it has
    been decoded once to see that it is whole.

    Raises:
      DataError: the bytes are damaged or not an image; ``name`` is in the message.
    """
    from PIL import Image

    pixels = decode_image(data, name)
    with Image.open(io.BytesIO(data)) as image:
        keep = image.format == "JPEG" and image.mode in ("RGB", "L") and not image.getexif()
    if min(pixels.shape[:2]) <= short_side:
        return data if keep else encode_jpeg(pixels)
    return encode_jpeg(resize_short_side(pixels, short_side))


def stored_clip(frames: Sequence[tuple[str, bytes]], short_side: int = SHORT_SIDE) -> list[bytes]:
    """The frames (name, encoded bytes) of one clip as the JPEGs to store; see :func:`stored_jpeg`.

    Raises:
      DataError: there are none, one is damaged, or they differ in size, so that one crop could not
        serve them all.
    """
    stored = [stored_jpeg(data, short_side, name) for name, data in frames]
    check_count(len(stored))
    check_sizes(stored)
    return stored


def check_sizes(stored: Sequence[bytes]) -> None:
    """The JPEGs of a clip have one size.

    Raises:
      DataError: they differ.
    """
    sizes = {_jpeg_size(data) for data in stored}
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise DataError(f"frames of different sizes in one clip: {found}")


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """(width, height) from the header."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.size


def clip_from_folder(folder: Path, short_side: int = SHORT_SIDE) -> list[bytes]:
    """The extracted frames of a clip, in the order of their numbers, as the JPEGs to store.

    Raises:
      DataError: the folder is missing or holds no JPEG, or as in :func:`stored_clip`.
    """
    if not folder.is_dir():
        raise DataError(f"frames {folder}: no such folder")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")]
    paths.sort(key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))
    if not paths:
        raise DataError(f"frames {folder}: holds no .jpg file")
    return stored_clip([(str(path), path.read_bytes()) for path in paths], short_side)


def clip_from_video(path: Path, fps: float, short_side: int = SHORT_SIDE) -> list[bytes]:
    """``fps`` frames of each second of a video as the JPEGs to store, the first frame among them.

    Raises:
      DataError: the file is missing or damaged, holds no frame, or frames of different sizes.
    """
    stored = []
    for frame in iterate_frames(path, fps):
        small = min(frame.shape[:2]) <= short_side
        stored.append(encode_jpeg(frame if small else resize_short_side(frame, short_side)))
    check_sizes(stored)
    return stored
