"""Reading sound, images and video; every failure is a one-line ``DataError`` that names the file.

Sound needs ``soundfile`` (WAV and FLAC), resampling SciPy, images Pillow, video PyAV; each is
imported on first use. Files are opened here and handed over as streams, and only plain container
formats are admitted, so that a file cannot make a decoder open other files or addresses (as a
playlist with a video's name could).
"""

import contextlib
import io
import os
import struct
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.errors import DataError

# FFmpeg's demuxers for files that hold their own media. Its playlist formats (hls, dash, concat)
# stay out: they read whatever paths and addresses the file names.
VIDEO_FORMATS = "avi,flv,matroska,mov,mp4,mpeg,mpegts,webm"
IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")


@contextlib.contextmanager
def _reading(path: str | os.PathLike, what: str) -> Iterator[None]:
    """Turns whatever a decoder raises on a missing or damaged file into one ``DataError``."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{what} {path}: no such file") from None
    except IsADirectoryError:
        raise DataError(f"{what} {path}: is a folder, not a file") from None
    except ImportError as error:
        raise DataError(f"{what} {path}: reading it needs the package {error.name}") from None
    except Exception as error:  # decoders raise almost any type on damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{what} {path}: damaged or not supported ({reason[:200]})") from None


def read_audio(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """A WAV or FLAC file as float32 [samples] in [-1, 1], channels averaged, and its sample rate.

    Raises:
      DataError: the file is missing, damaged, empty, or a WAV shorter than its header says.
    """
    with _reading(path, "audio"):
        import soundfile

        with open(path, "rb") as file:
            _check_wav_length(file, path)
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        if samples.shape[0] == 0:
            raise DataError(f"audio {path}: holds no samples")
        return _mono(samples, path), int(rate)


def audio_seconds(path: str | os.PathLike) -> float:
    """The length of a WAV or FLAC file from its header.

    Raises:
      DataError: the file is missing or damaged.
    """
    with _reading(path, "audio"):
        import soundfile

        with open(path, "rb") as file:
            info = soundfile.info(file)
        return info.frames / info.samplerate


def _mono(samples: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """[samples, channels] -> [samples]."""
    waveform = samples.mean(axis=1, dtype=np.float32)
    if not np.isfinite(waveform).all():
        raise DataError(f"audio {path}: holds samples that are NaN or infinite")
    return waveform


def _check_wav_length(file: Any, path: str | os.PathLike) -> None:
    """Compares the sample bytes that a RIFF header promises with those that follow.

    libsndfile shortens the sound without a word when the file was cut off.
    """
    header = file.read(12)
    if header[:4] == b"RIFF" and header[8:12] == b"WAVE":
        size = os.fstat(file.fileno()).st_size
        while len(chunk := file.read(8)) == 8:
            name, length = struct.unpack("<4sI", chunk)
            remaining = size - file.tell()
            # Encoders that write to a pipe cannot know the length and leave all ones.
            if name == b"data" and remaining < length != 0xFFFFFFFF:
                raise DataError(
                    f"audio {path}: truncated WAV, {remaining} of {length} sample bytes are there"
                )
            file.seek(length + length % 2, os.SEEK_CUR)
    file.seek(0)


def resample(waveform: np.ndarray, rate: int, target_rate: int) -> np.ndarray:
    """Band-limited (polyphase) resampling of float32 [samples] from ``rate`` to ``target_rate``.

    Raises:
      DataError: a rate is not positive.
    """
    if rate <= 0 or target_rate <= 0:
        raise DataError(f"sample rates: {rate} to {target_rate}; both must be positive")
    if rate == target_rate:
        return waveform.astype(np.float32)
    from scipy.signal import resample_poly

    ratio = Fraction(int(target_rate), int(rate))
    resampled = resample_poly(waveform, ratio.numerator, ratio.denominator)
    return resampled.astype(np.float32)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; see :func:`decode_image`.

    Raises:
      DataError: the file is missing, damaged or not an image.
    """
    with _reading(path, "image"):
        return decode_image(Path(path).read_bytes(), name=path)


def decode_image(data: bytes, name: str | os.PathLike = "(bytes)") -> np.ndarray:
    """Encoded image bytes as uint8 [H, W, 3]; ``name`` is for the error message.

    Grey-scale, palette and transparent images become RGB (transparency dropped), 16-bit grey is
    scaled to 8 bits, and the orientation that a camera noted (EXIF) is applied. Of an animation
    the first frame is taken.

    Raises:
      DataError: the bytes are damaged or not an image.
    """
    with _reading(name, "image"):
        from PIL import Image, ImageOps

        with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
            image.load()
            image = ImageOps.exif_transpose(image)
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


def evenly_spaced(count: int, num: int) -> np.ndarray:
    """The ``num`` indices at the centres of equal parts of ``range(count)``; some repeat if fewer.

    Raises:
      DataError: ``count`` is 0 or ``num`` below 1.
    """
    if count < 1 or num < 1:
        raise DataError(f"cannot pick {num} of {count} frames; both must be at least 1")
    return (2 * np.arange(num) + 1) * count // (2 * num)


def read_video_frames(
    path: str | os.PathLike,
    num_frames: int | None = None,
    *,
    indices: Sequence[int] | None = None,
    fps: float | None = None,
    short_side: int | None = None,
) -> np.ndarray:
    """Frames of a video (FLV, MP4, AVI, MKV ...) as uint8 [T, H, W, 3].

    At most one choice of frames may be given; none gives every frame. Only the chosen frames are
    held in memory. Rotation that the container notes is not applied.

    Args:
      path: the file.
      num_frames: this many, evenly spaced; a clip with fewer frames repeats some.
      indices: these frames, in ascending order; a number past the end gives the last frame.
      fps: the first frame at or after each multiple of 1 / fps seconds from the start.
      short_side: if given, each frame is scaled to this shorter side.

    Raises:
      DataError: the file is missing, damaged, has no video, or the video has no frames.
    """
    if sum(choice is not None for choice in (num_frames, indices, fps)) > 1:
        raise DataError("read_video_frames: give only one of num_frames, indices and fps")
    if num_frames is not None:
        indices = evenly_spaced(count_video_frames(path), num_frames)
    wanted = None if indices is None else [int(index) for index in indices]
    if wanted is not None and (not wanted or wanted != sorted(wanted) or wanted[0] < 0):
        raise DataError(f"frame indices {wanted}; ascending and not negative")

    def convert(frame: Any) -> np.ndarray:
        image = frame.to_ndarray(format="rgb24")
        return image if short_side is None else resize_short_side(image, short_side)

    frames, last, next_time = [], None, 0.0
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(container.decode(stream)):
            last = frame
            if wanted is not None:
                frames += [convert(frame)] * wanted.count(number)
                if number >= wanted[-1]:
                    break
            elif fps is None:
                frames.append(convert(frame))
            else:
                seconds = number / rate if frame.time is None else frame.time
                if seconds >= next_time - 1e-6:
                    frames.append(convert(frame))
                    next_time = (int(seconds * fps + 1e-6) + 1) / fps
        if last is None:
            raise DataError(f"video {path}: holds no frames")
        if wanted is not None:
            frames += [convert(last)] * (len(wanted) - len(frames))
        return np.stack(frames)


def count_video_frames(path: str | os.PathLike) -> int:
    """The number of encoded frames, counted without decoding them.

    Raises:
      DataError: as in :func:`read_video_frames`.
    """
    with _open_video(path) as container:
        packets = container.demux(container.streams.video[0])
        count = sum(packet.size > 0 for packet in packets)
    if count == 0:
        raise DataError(f"video {path}: holds no frames")
    return count


def read_video_audio(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """The first sound track of a video as float32 [samples], channels averaged, and its rate.

    Raises:
      DataError: the file is missing or damaged, or has no sound.
    """
    with _open_video(path, track="audio") as container:
        import av

        stream = container.streams.audio[0]
        # Planar float without a layout or rate: the channels stay apart and are averaged below.
        to_float = av.AudioResampler(format="fltp")
        parts, rate = [], int(stream.rate)
        for frame in container.decode(stream):
            parts += [part.to_ndarray() for part in to_float.resample(frame)]
        if not sum(part.shape[1] for part in parts):
            raise DataError(f"video {path}: its sound track is empty")
        return _mono(np.concatenate(parts, axis=1).T, path), rate


@contextlib.contextmanager
def _open_video(path: str | os.PathLike, track: str = "video") -> Iterator[Any]:
    """An open PyAV container that has the track ("video" or "audio")."""
    with _reading(path, "video"):
        import av

        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError(f"video {path}: the file is empty")
            options = {"format_whitelist": VIDEO_FORMATS}
            with av.open(file, options=options) as container:
                if not getattr(container.streams, track):
                    raise DataError(f"video {path}: has no {track} track, or its index was cut off")
                yield container
