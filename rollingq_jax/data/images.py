"""Images, through Pillow (imported on first use)."""

import io
import os
import re
from typing import Any

import numpy as np

from rollingq_jax.data.reading import HEAD, check_impostor, quiet_pillow, reading
from rollingq_jax.errors import DataError

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Of an image or a video's frame. Decoding takes up to ten bytes a pixel, of all threads together.
MAX_PIXELS = 1 << 26
# A baseline JPEG can be decoded at half its height and width, which is done above MAX_PIXELS.
MAX_JPEG_PIXELS = 2 * MAX_PIXELS


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; see :func:`decode_image`.

    Raises:
      DataError: the file is missing, damaged or not an image.
    """
    with reading(path, "image"), open(path, "rb") as file:
        return _decode(file, path)


def decode_image(data: bytes, name: str | os.PathLike = "(bytes)") -> np.ndarray:
    """Encoded image bytes as uint8 [H, W, 3]; ``name`` is for the error message.

    Grey-scale, palette and transparent images become RGB (transparency dropped), 16-bit values are
    scaled to 8 bits, floats from [0, 1], and the orientation that a camera noted (EXIF) is applied.
    Of an animation or a file with several pages the first is taken. A baseline JPEG of more than
    ``MAX_PIXELS`` comes at half its height and width.

    Raises:
      DataError: the bytes are damaged, not an image, or one of more than ``MAX_PIXELS``; or its
        numbers do not say what is black and white: 32-bit or negative integers, floats outside
        [0, 1].
    """
    with reading(name, "image"):
        return _decode(io.BytesIO(data), name)


def _decode(stream: Any, name: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W, 3]; errors of the decoder come as it raises them."""
    from PIL import Image, ImageOps

    check_impostor(stream.read(HEAD), name, "image")
    stream.seek(0)
    with quiet_pillow():
        try:
            file = Image.open(stream, formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            count = re.search(r"\d+", str(error))
            raise DataError(
                f"image {name}: {int(count[0]) if count else 2 * MAX_PIXELS:,} pixels; "
                f"at most {MAX_PIXELS:,} are read"
            ) from None
        with file:
            _limit_size(file, name)
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode == "F" or image.mode.startswith("I") or _is_signed(file):
                return np.repeat(_grey_to_bytes(image, file, name)[:, :, None], 3, axis=2)
            if image.mode == "La":  # multiplied by its transparency
                image = image.convert("LA")
            return np.asarray(image.convert("RGB"), np.uint8)


def _limit_size(file: Any, name: str | os.PathLike) -> None:
    """Refuses, by its header, an image that would fill the memory; halves a large JPEG."""
    width, height = file.size
    # Of a progressive JPEG the decoder holds every coefficient, at whatever size it is decoded.
    halves = file.format in ("JPEG", "MPO") and not file.info.get("progressive")
    most = MAX_JPEG_PIXELS if halves else MAX_PIXELS
    check_pixels(width, height, f"image {name}", most)
    if width * height > MAX_PIXELS:
        file.draft(None, (-(-width // 2), -(-height // 2)))


def check_pixels(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    """Refuses what would fill the memory; ``name`` begins the message.

    Raises:
      DataError: there are more than ``most`` pixels.
    """
    if width * height > most:
        raise DataError(
            f"{name}: {width} x {height} = {width * height:,} pixels; at most {most:,} are read"
        )


def _is_signed(file: Any) -> bool:
    """Whether a TIFF holds signed integers, which Pillow reads as unsigned ones in 8 bits."""
    return file.format == "TIFF" and 2 in tuple(file.tag_v2.get(339, ()))


def _grey_to_bytes(image: Any, file: Any, name: str | os.PathLike) -> np.ndarray:
    """An image of one channel that is not in bytes as uint8 [H, W]; Pillow would clip it at 255.

    Raises:
      DataError: nothing says which of its values are black and white.
    """
    values = np.asarray(image)
    tags = file.tag_v2 if file.format == "TIFF" else {}
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # NaN too
            raise DataError(
                f"image {name}: floats from {low:g} to {high:g}; must be in [0, 1], for black to "
                "white. Scale them, or store the image in 8 or 16 bits"
            )
        grey = np.rint(values * 255).astype(np.uint8)
    elif image.mode.startswith("I;16") and not _is_signed(file):
        bits = int(np.max(tags.get(258, 16)))  # some cameras and scanners use 12 of them
        grey = np.minimum(values.astype(np.uint16) >> (bits - 8), 255).astype(np.uint8)
    else:
        kind = "signed integers" if _is_signed(file) else "32-bit integers"
        values = values.view(np.int8) if values.dtype == np.uint8 else values
        raise DataError(
            f"image {name}: {kind} from {values.min()} to {values.max()}; nothing says which are "
            "black and white. Store the image in 8 or 16 bits, unsigned, or as floats in [0, 1]"
        )
    return 255 - grey if tags.get(262) == 0 else grey  # TIFF: 0 is white


def encode_jpeg(image: np.ndarray, quality: int = 95) -> bytes:
    """uint8 [H, W, 3] as JPEG bytes."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size[0], size[1], 3], bilinear with antialiasing."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8)


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] scaled so that its shorter side has ``size`` pixels, aspect kept."""
    height, width = image.shape[:2]
    short = min(height, width)
    return resize_image(
        image, (max(round(height * size / short), 1), max(round(width * size / short), 1))
    )
