"""Images, through Pillow (imported on first use)."""

import io
import os
from pathlib import Path

import numpy as np

from rollingq_jax.data.reading import reading

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; see :func:`decode_image`.

    Raises:
      DataError: the file is missing, damaged or not an image.
    """
    with reading(path, "image"):
        return decode_image(Path(path).read_bytes(), name=path)


def decode_image(data: bytes, name: str | os.PathLike = "(bytes)") -> np.ndarray:
    """Encoded image bytes as uint8 [H, W, 3]; ``name`` is for the error message.

    Grey-scale, palette and transparent images become RGB (transparency dropped), 16-bit grey is
    scaled to 8 bits, and the orientation that a camera noted (EXIF) is applied. Of an animation
    the first frame is taken.

    Raises:
      DataError: the bytes are damaged or not an image.
    """
    with reading(name, "image"):
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
                grey = (np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            return np.asarray(image.convert("RGB"), np.uint8)


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
