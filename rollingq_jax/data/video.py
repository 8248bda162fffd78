"""Images and video: files decoded, frames kept as JPEG bytes, and chosen and cropped for a model.

Images go through Pillow, video files and their sound through PyAV (both imported on first use).
Every failure is a one-line `DataError` that names the file. Everything here gives uint8; the model
normalizes on the device.
"""

import contextlib
import dataclasses
import io
import math
import os
import re
import struct
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np

from rollingq_jax.data.audio import (
    average_channels,
    check_sound_format,
    check_waveform,
    left_open,
    samples_in,
)
from rollingq_jax.data.dataset import Example
from rollingq_jax.errors import DataError
from rollingq_jax.files import HEAD, check_impostor, reading

IMAGE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
# Of an image or a video's frame. Decoding takes up to ten bytes a pixel, of all threads together.
MAX_PIXELS = 1 << 26
# A baseline JPEG can be decoded at half its height and width, which is done above MAX_PIXELS.
MAX_JPEG_PIXELS = 2 * MAX_PIXELS
# FFmpeg's demuxers for files that hold their own media. Its playlist formats (hls, dash, concat)
# stay out: they read whatever paths and addresses the file names.
VIDEO_FORMATS = "avi,flv,matroska,mov,mp4,mpeg,mpegts,webm"
# Of a file that was cut off, this much may be missing: the last frames of real files often are.
MISSING = 0.05
SLACK = 0.12  # seconds, however short the clip is
SHORT_SIDE = 256
# Channel mean and deviation of ImageNet on the scale [0, 1], which upstream normalizes with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_BLOCK = 4096  # of a file system: fewer zeros at the end may be samples or padding
# (frames in the clip, frames wanted, generator) -> indices in ascending order.
Pick = Callable[[int, int, np.random.Generator], np.ndarray]
# (left, top, right, bottom) in pixels.
Box = tuple[int, int, int, int]


def read_image(path: str | os.PathLike) -> np.ndarray:
    """An image file as uint8 [H, W, 3]; see `decode_image`.

    Raises:
      DataError: the file is missing, damaged or not an image.
    """
    with reading(path, "image"), open(path, "rb") as file:
        return _decode_image(file, path)


def decode_image(data: bytes, name: str | os.PathLike = "(bytes)") -> np.ndarray:
    """Encoded image bytes as uint8 [H, W, 3]; `name` is for the error message.

    Gray-scale, palette and transparent images become RGB (transparency dropped), 16-bit values are
    scaled to 8 bits, floats from [0, 1], and the orientation that a camera noted (EXIF) is applied.
    Of an animation or a file with several pages the first is taken. A baseline JPEG of more than
    `MAX_PIXELS` comes at half its height and width.

    Raises:
      DataError: the bytes are damaged, not an image, or one of more than `MAX_PIXELS`; or its
        numbers do not say what is black and white: 32-bit or negative integers, floats outside
        [0, 1].
    """
    with reading(name, "image"):
        return _decode_image(io.BytesIO(data), name)


def _decode_image(stream: Any, name: str | os.PathLike) -> np.ndarray:
    """uint8 [H, W, 3]; errors of the decoder come as it raises them."""
    from PIL import Image, ImageOps

    check_impostor(stream.read(HEAD), name, "image")
    stream.seek(0)
    with _quiet_pillow():
        try:
            file = Image.open(stream, formats=IMAGE_FORMATS)
        except Image.DecompressionBombError as error:
            count = re.search(r"\d+", str(error))
            raise DataError(
                f"image {name}: {int(count[0]) if count else 2 * MAX_PIXELS:,} pixels; "
                f"at most {MAX_PIXELS:,} are read"
            ) from None
        with file:
            # Before anything is decoded: what the header promises may not fit into memory. Of a
            # progressive JPEG the decoder holds every coefficient, at whatever size it is decoded.
            width, height = file.size
            halves = file.format in ("JPEG", "MPO") and not file.info.get("progressive")
            _check_pixels(width, height, f"image {name}", MAX_JPEG_PIXELS if halves else MAX_PIXELS)
            if width * height > MAX_PIXELS:
                file.draft(None, (-(-width // 2), -(-height // 2)))
            file.load()
            image = ImageOps.exif_transpose(file)
            if image.mode == "F" or image.mode.startswith("I") or _is_signed(file):
                return np.repeat(_gray_to_bytes(image, file, name)[:, :, None], 3, axis=2)
            if image.mode == "La":  # multiplied by its transparency
                image = image.convert("LA")
            return np.asarray(image.convert("RGB"), np.uint8)


def _check_pixels(width: int, height: int, name: str, most: int = MAX_PIXELS) -> None:
    """Refuses what would fill the memory; `name` begins the message."""
    if width * height > most:
        raise DataError(
            f"{name}: {width} x {height} = {width * height:,} pixels; at most {most:,} are read"
        )


def _is_signed(file: Any) -> bool:
    """Tells a TIFF of signed integers, which Pillow reads as unsigned ones in 8 bits."""
    return file.format == "TIFF" and 2 in tuple(file.tag_v2.get(339, ()))


def _gray_to_bytes(image: Any, file: Any, name: str | os.PathLike) -> np.ndarray:
    """An image of one channel that is not in bytes as uint8 [H, W]; Pillow would clip it at 255."""
    values = np.asarray(image)
    tags = file.tag_v2 if file.format == "TIFF" else {}
    if image.mode == "F":
        low, high = float(values.min()), float(values.max())
        if not 0 <= low <= high <= 1:  # NaN too
            raise DataError(
                f"image {name}: floats from {low:g} to {high:g}; allowed: in [0, 1], for black to "
                "white. Scale them, or store the image in 8 or 16 bits"
            )
        gray = np.rint(values * 255).astype(np.uint8)
    elif image.mode.startswith("I;16") and not _is_signed(file):
        bits = int(np.max(tags.get(258, 16)))  # some cameras and scanners use 12 of them
        gray = np.minimum(values.astype(np.uint16) >> (bits - 8), 255).astype(np.uint8)
    else:
        kind = "signed integers" if _is_signed(file) else "32-bit integers"
        values = values.view(np.int8) if values.dtype == np.uint8 else values
        raise DataError(
            f"image {name}: {kind} from {values.min()} to {values.max()}; nothing says which are "
            "black and white. Store the image in 8 or 16 bits, unsigned, or as floats in [0, 1]"
        )
    return 255 - gray if tags.get(262) == 0 else gray  # TIFF: 0 is white


def encode_jpeg(image: np.ndarray, short_side: int | None = None) -> bytes:
    """uint8 [H, W, 3] as JPEG bytes, its shorter side at most `short_side` if that is given."""
    from PIL import Image

    if short_side is not None and min(image.shape[:2]) > short_side:
        image = resize_short_side(image, short_side)
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95)
    return buffer.getvalue()


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [size[0], size[1], 3], bilinear with antialiasing."""
    from PIL import Image

    if image.shape[:2] == tuple(size):
        return image
    resized = Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.asarray(resized, np.uint8)


def resize_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 3] scaled so that its shorter side has `size` pixels, aspect kept."""
    height, width = image.shape[:2]
    short = min(height, width)
    return resize_image(
        image, (max(round(height * size / short), 1), max(round(width * size / short), 1))
    )


_lock = threading.Lock()
_quiet = 0
_filters = contextlib.ExitStack()


@contextlib.contextmanager
def _quiet_pillow() -> Iterator[None]:
    """Keeps Pillow's warnings on odd files away from the user; any number of threads at once.

    `warnings.catch_warnings` does not serve: threads that leave in another order than they
    entered would leave the filter behind. Here the first sets it and the last takes it away.
    """
    global _quiet
    with _lock:
        if _quiet == 0:
            _filters.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _quiet += 1
    try:
        yield
    finally:
        with _lock:
            _quiet -= 1
            if _quiet == 0:
                _filters.close()


def read_video_frames(path: str | os.PathLike, num_frames: int | None = None) -> np.ndarray:
    """Frames of a video (FLV, MP4, AVI, MKV ...) as uint8 [T, H, W, 3], turned as players show it.

    Args:
      path: the file.
      num_frames: this many, evenly spaced; a clip with fewer frames repeats some. None gives all.

    Raises:
      DataError: the file is missing, damaged, cut off, has no video, or the video has no frames or
        frames of more than `MAX_PIXELS`.
    """
    if num_frames is None:
        frames = list(iterate_frames(path))
    else:
        count = count_video_frames(path)
        frames, found = _pick_frames(path, evenly_spaced_frames(count, num_frames).tolist())
        if len(frames) < num_frames:  # some packets hold no picture, or half of one
            frames, _ = _pick_frames(path, evenly_spaced_frames(found, num_frames).tolist())
    with reading(path, "video"):
        return np.stack(frames)


def iterate_frames(path: str | os.PathLike, fps: float | None = None) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of a video, one at a time.

    Args:
      path: the file.
      fps: only the first frame at or after each multiple of 1 / fps seconds from the start.

    Raises:
      DataError: as in `read_video_frames`, when the iteration comes to it.
    """
    yield from map(_as_shown, _decoded_frames(path, fps))


def evenly_spaced_frames(count: int, num: int) -> np.ndarray:
    """The `num` indices at the centers of equal parts of `range(count)`; some repeat if fewer.

    Raises:
      DataError: `count` is 0 or `num` below 1.
    """
    if count < 1 or num < 1:
        raise DataError(f"cannot pick {num} of {count} frames; allowed: both at least 1")
    return (2 * np.arange(num) + 1) * count // (2 * num)


def _pick_frames(path: str | os.PathLike, wanted: list[int]) -> tuple[list[np.ndarray], int]:
    """The frames of these ascending numbers, as far as there are some; how many were decoded."""
    frames: list[np.ndarray] = []
    found = 0
    for found, frame in enumerate(_decoded_frames(path), start=1):
        if again := wanted.count(found - 1):
            frames += [_as_shown(frame)] * again
        if found > wanted[-1]:
            break
    return frames, found


def _decoded_frames(path: str | os.PathLike, fps: float | None = None) -> Iterator[Any]:
    """PyAV's frames, at least one; with `fps` those of `iterate_frames`."""
    next_time, found = 0.0, False
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(_decode_packets(container, stream)):
            _check_pixels(frame.width, frame.height, f"video {path}")
            found = True
            if fps is None:
                yield frame
                continue
            seconds = number / rate if frame.time is None else frame.time
            if seconds >= next_time - 1e-6:
                yield frame
                next_time = (int(seconds * fps + 1e-6) + 1) / fps
        if not found:
            raise DataError(f"video {path}: holds no frames")


def _decode_packets(container: Any, stream: Any) -> Iterator[Any]:
    """The frames of a stream. Of a file whose end was cut off, the last packet may be damaged."""
    import av

    failure, found = None, False
    for packet in container.demux(stream):
        if failure and packet.size:
            raise failure
        try:
            frames = packet.decode()
        except av.error.InvalidDataError as error:
            failure, frames = failure or error, []
        found |= bool(frames)
        yield from frames
    if failure and not found:
        raise failure


def _as_shown(frame: Any) -> np.ndarray:
    """uint8 [H, W, 3] as a player shows the frame: turned and mirrored to the nearest right angle.

    The file may hold a matrix that takes the point (x, y) of the picture to (a x + c y, b x + d y)
    on the screen; both have y downwards. Phones write one instead of turning the pixels.
    """
    image = frame.to_ndarray(format="rgb24")
    matrix = next((bytes(s) for s in frame.side_data if s.type.name == "DISPLAYMATRIX"), None)
    if matrix is None:
        return image
    a, b, _, c, d = struct.unpack("=5i", matrix[:20])
    if abs(b) + abs(c) > abs(a) + abs(d):  # x and y change places
        image = image.transpose(1, 0, 2)
        a, d = c, b
    return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])


def count_video_frames(path: str | os.PathLike) -> int:
    """The number of encoded frames, counted without decoding them.

    Frames that the file says not to show (before the start that an edit list sets) are left out.

    Raises:
      DataError: as in `read_video_frames`.
    """
    with _open_video(path) as container:
        packets = container.demux(container.streams.video[0])
        count = sum(packet.size > 0 and not packet.is_discard for packet in packets)
    if count == 0:
        raise DataError(f"video {path}: holds no frames")
    return count


def read_video_audio(
    path: str | os.PathLike, seconds: float | None = None
) -> tuple[np.ndarray, int]:
    """The first sound track of a video as float32 [samples], channels averaged, and its rate.

    Args:
      path: the file.
      seconds: only the beginning is decoded,
        `samples_in` of it; None decodes all.

    Raises:
      DataError: the file is missing, damaged or cut off, or has no sound.
    """
    with _open_video(path, track="audio") as container:
        import av

        # Planar float without a layout or rate: the channels stay apart and are averaged below.
        to_float = av.AudioResampler(format="fltp")
        parts, count, rate, most = [], 0, 0, sys.maxsize
        for frame in _decode_packets(container, container.streams.audio[0]):
            if not rate:  # that of the header may be half of it (HE-AAC)
                rate = int(frame.sample_rate)
                check_sound_format(rate, frame.layout.nb_channels, path)
                most = sys.maxsize if seconds is None else samples_in(seconds, rate)
            for part in to_float.resample(frame):
                parts.append(average_channels(part.to_ndarray().T))
                count += len(parts[-1])
            if count >= most:
                break
        if not count:
            raise DataError(f"video {path}: its sound track is empty")
        return check_waveform(np.concatenate(parts)[:most], path), rate


def video_seconds(path: str | os.PathLike, at_most: float | None = None) -> float:
    """The length of a video's sound track, by decoding it: headers often lack it or are wrong.

    Args:
      path: the file.
      at_most: decoding ends there, so that a longer track counts as about this long.

    Raises:
      DataError: as in `read_video_audio`.
    """
    waveform, rate = read_video_audio(path, at_most)
    return len(waveform) / rate


@contextlib.contextmanager
def _open_video(path: str | os.PathLike, track: str = "video") -> Iterator[Any]:
    """An open PyAV container that has the track ("video" or "audio") and was not cut off."""
    with reading(path, "video"):
        import av

        with open(path, "rb") as file:
            head = file.read(HEAD)
            check_impostor(head, path, "video")
            missing = find_missing(file)
            options: dict[str, Any] = {"container_options": {"format_whitelist": VIDEO_FORMATS}}
            # FLV and MPEG tell of their tracks as they come; older PyAV then crashes on options.
            if not head.startswith((b"FLV", b"G", b"\0\0\1\xba", b"\0\0\1\xb3")):
                # FFmpeg would decode a huge frame to learn of its properties.
                options["options"] = {"max_pixels": str(MAX_PIXELS)}
            if missing.bytes:
                with av.open(file, **options) as container:
                    _check_whole(container, path, track, missing)
                file.seek(0)
            with av.open(file, **options) as container:
                _check_track(container, path, track)
                if track == "video":
                    _limit_pixels(container.streams.video[0].codec_context, path)
                yield container


def _limit_pixels(context: Any, path: str | os.PathLike) -> None:
    """Refuses huge frames by the header, and keeps the decoder from making them later on."""
    if context.width == 0:  # FFmpeg gives up on what is above the limit
        raise DataError(
            f"video {path}: its frames have no size, or more than {MAX_PIXELS:,} pixels, the limit"
        )
    _check_pixels(context.width, context.height, f"video {path}")
    context.options = {"max_pixels": str(MAX_PIXELS)}


def _check_track(container: Any, path: str | os.PathLike, track: str) -> None:
    """Refuses a container in which FFmpeg finds no such track."""
    if not getattr(container.streams, track):
        raise DataError(f"video {path}: has no {track} track, or its index was cut off")


class Missing(NamedTuple):
    """The bytes that a container's lengths show to be missing.

    Attributes:
      bytes: at least so many; 0 where nothing shows that any are.
      fragment: the file ends within one of a sequence of fragments. How many were to follow is
        written nowhere.
    """

    bytes: int
    fragment: bool = False


def _check_whole(container: Any, path: str | os.PathLike, track: str, missing: Missing) -> None:
    """Compares what is left of a file that was cut off with what its header says.

    Raises:
      DataError: more than `MISSING` of the track is missing, and more than one frame or
        `SLACK`; or the file ends within a fragment, and nothing says how many were to follow.
        Where the header does not say how long it was, as of a live stream, what is there counts.
    """
    _check_track(container, path, track)
    stream = getattr(container.streams, track)[0]
    count, own_end, any_end = 0, 0.0, 0.0
    for packet in container.demux():
        if packet.size == 0:
            continue
        count += packet.stream.index == stream.index
        if packet.pts is not None:
            end = float((packet.pts + (packet.duration or 0)) * packet.time_base)
            any_end = max(any_end, end)
            own_end = max(own_end, end) if packet.stream.index == stream.index else own_end
    name = container.format.name
    # What the header promises, in the unit that is most exact for the format.
    if missing.fragment:
        there, promised, unit, slack = own_end, 0.0, "s", 0.0
    elif track == "video" and stream.frames:
        there, promised, unit, slack = float(count), float(stream.frames), "frames", 1.0
    elif name == "avi":  # its header counts in units of the track
        there, promised, unit, slack = own_end, float(stream.frames * stream.time_base), "s", SLACK
    elif stream.duration:
        promised = float(stream.duration * stream.time_base)
        there, unit, slack = own_end, "s", SLACK
    else:
        there, promised, unit, slack = any_end, (container.duration or 0) / 1e6, "s", SLACK
    if promised - there > max(MISSING * promised, slack) or missing.fragment:
        of = f"{there:.4g} of {promised:.4g} {unit}" if promised > 0 else f"only {there:.4g} s"
        raise DataError(
            f"video {path}: was cut off: {of} of its {track} are there, at least "
            f"{missing.bytes:,} bytes at its end are missing or zeros"
        )


def find_missing(file: Any) -> Missing:
    """Finds what is missing, or zeros, at the end of an MP4, MOV, AVI, Matroska, WebM or FLV.

    FFmpeg reads a file that was cut off to its end without a word; the lengths that the container
    notes tell.

    No more than zeros for other formats, for lengths that were left open because the file was
    written to a pipe, and for what is no such file at all. `file` is binary and seekable, and is
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
    """The number of bytes at the end that were never written, as broken downloads leave them."""
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
        if name != b"RIFF" or left_open(length):
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


def stored_jpeg(data: bytes, name: str = "(bytes)") -> bytes:
    """Encoded image bytes as the JPEG to store: RGB, its shorter side at most `SHORT_SIDE`.

    A JPEG in RGB or gray that is small enough already stays as it is, byte for byte, after it has
    been decoded once to see that it is whole.

    Raises:
      DataError: the bytes are damaged or not an image; `name` is in the message.
    """
    from PIL import Image

    pixels = decode_image(data, name)
    with Image.open(io.BytesIO(data)) as image:
        keep = image.format == "JPEG" and image.mode in ("RGB", "L") and not image.getexif()
    keep = keep and min(pixels.shape[:2]) <= SHORT_SIDE
    return data if keep else encode_jpeg(pixels, SHORT_SIDE)


def stored_clip(frames: Sequence[tuple[str, bytes]]) -> list[bytes]:
    """The frames (name, encoded bytes) of one clip as the JPEGs to store; see `stored_jpeg`.

    Raises:
      DataError: there are none, one is damaged, or they differ in size, so that one crop could not
        serve them all.
    """
    stored = [stored_jpeg(data, name) for name, data in frames]
    _check_count(len(stored))
    return _check_sizes(stored)


def _check_count(count: int) -> None:
    if count < 1:
        raise DataError("a clip without frames; at least 1 is needed")


def _check_sizes(stored: list[bytes]) -> list[bytes]:
    """The JPEGs of a clip, whose headers have to say one size."""
    from PIL import Image

    sizes = set()
    for data in stored:
        with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
            sizes.add(image.size)
    if len(sizes) > 1:
        found = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise DataError(f"frames of different sizes in one clip: {found}")
    return stored


def clip_from_folder(folder: Path) -> list[bytes]:
    """The extracted frames of a clip, in the order of their numbers, as the JPEGs to store.

    Raises:
      DataError: as in `frame_paths` and `stored_clip`.
    """
    return stored_clip([(str(path), path.read_bytes()) for path in frame_paths(folder)])


def frame_paths(folder: Path) -> list[Path]:
    """The JPEGs in a folder, in the order of their numbers.

    Raises:
      DataError: the folder is missing or holds none.
    """
    if not folder.is_dir():
        raise DataError(f"frames {folder}: no such folder")
    paths = [path for path in folder.iterdir() if path.suffix.lower() in (".jpg", ".jpeg")]
    paths.sort(key=lambda path: ([int(n) for n in re.findall(r"\d+", path.stem)], path.name))
    if not paths:
        raise DataError(f"frames {folder}: holds no .jpg file")
    return paths


def clip_from_video(path: Path, fps: float) -> list[bytes]:
    """`fps` frames of each second of a video as the JPEGs to store, the first frame among them.

    Raises:
      DataError: the file is missing or damaged, holds no frame, or frames of different sizes.
    """
    return _check_sizes([encode_jpeg(frame, SHORT_SIDE) for frame in iterate_frames(path, fps)])


def random_frames(count: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """`num` of `range(count)` drawn uniformly with replacement, ascending, as upstream draws.

    Raises:
      DataError: `count` is 0.
    """
    _check_count(count)
    return np.sort(rng.integers(count, size=num))


def segment_frames(count: int, num: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One frame from each of `num` equal segments: upstream's rule for Kinetics-Sounds, mended.

    With s = floor(count / num), segment i holds the frames i s .. i s + s - 1 (the remainder at
    the clip's end is not used). A generator draws one of them; without one it is the frame
    i s + max(floor(s / 2), 1) - 1. Frames count from 0 here, from 1 in upstream's files.

    Upstream writes the number behind `frame_0000`, so that frame 10 and later have names that do
    not exist: in training 10 becomes 9, in evaluation the file is missing. Here there is no such
    limit. It also takes the first frame three times from clips of up to six frames; here the rule
    holds for every clip of `num` frames or more, and shorter ones repeat frames, evenly spaced.

    Raises:
      DataError: `count` is 0.
    """
    _check_count(count)
    if count < num:
        return evenly_spaced_frames(count, num)
    segment = count // num
    starts = segment * np.arange(num)
    if rng is None:
        return starts + max(segment // 2, 1) - 1
    return starts + rng.integers(segment, size=num)


def random_crop_box(width: int, height: int, rng: np.random.Generator) -> Box:
    """A random part of an image, as torchvision's RandomResizedCrop chooses it.

    Its share of the area is uniform in [0.08, 1] and the logarithm of its aspect ratio uniform from
    that of 3/4 to that of 4/3. If ten draws do not fit into the image, the largest centered part
    whose aspect ratio lies in the range is taken.

    Returns:
      (left, top, right, bottom) in pixels, for Pillow.
    """
    narrow, wide = 3 / 4, 4 / 3
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1.0)
        aspect = math.exp(rng.uniform(math.log(narrow), math.log(wide)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * wide)), min(height, round(width / narrow))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode_frames(
    frames: Sequence[bytes],
    indices: np.ndarray,
    size: int,
    choose_box: Callable[[int, int], Box] | None = None,
    flip: bool = False,
) -> np.ndarray:
    """Some frames of a clip, all with the same crop and flip.

    Args:
      frames: JPEG bytes of every frame, all of one size.
      indices: [T] those wanted; one that is wanted twice is decoded once.
      size: height and width of the result.
      choose_box: (width, height) of the frames -> the part to take; None takes all.
      flip: whether left and right change places.

    Returns:
      uint8 [T, size, size, 3]: the part scaled bilinearly, with antialiasing.
    """
    from PIL import Image

    video = np.empty((len(indices), size, size, 3), np.uint8)
    box: Box | None = None
    done: dict[int, int] = {}
    for place, index in enumerate(indices.tolist()):
        if index in done:
            video[place] = video[done[index]]
            continue
        done[index] = place
        data = frames[index]
        with (
            reading(f"{index} of a clip", "frame"),
            Image.open(io.BytesIO(data), formats=("JPEG",)) as file,
        ):
            if choose_box is not None and box is None:
                box = choose_box(*file.size)
            # Gray frames are scaled first and become RGB after: the same for a third of the work.
            image = file if file.mode in ("RGB", "L") else file.convert("RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image)
        video[place] = pixels if pixels.ndim == 3 else pixels[:, :, None]
    return video


@dataclasses.dataclass(frozen=True)
class TrainFrames(grain.transforms.RandomMap):
    """Replaces a clip's JPEG frames by `num` drawn ones, randomly cropped and flipped.

    Attributes:
      name: the modality, a sequence of JPEG bytes in the example; all of one size.
      num: frames wanted.
      size: height and width of the result, uint8 [num, size, size, 3].
      pick: which frames.
      crop_per: whether one crop and flip serve the "clip", so that its motion stays, or each
        "frame" has its own, as upstream's.
    """

    name: str
    num: int
    size: int
    pick: Pick = random_frames
    crop_per: str = "clip"

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """One example."""
        frames: Any = element[self.name]
        indices = self.pick(len(frames), self.num, rng)

        def choose_box(width: int, height: int) -> Box:
            return random_crop_box(width, height, rng)

        def decoded(chosen: np.ndarray) -> np.ndarray:
            flip = bool(rng.random() < 0.5)
            return decode_frames(frames, chosen, self.size, choose_box, flip)

        parts = [indices] if self.crop_per == "clip" else np.split(indices, len(indices))
        return {**element, self.name: np.concatenate([decoded(part) for part in parts])}


@dataclasses.dataclass(frozen=True)
class EvalFrames(grain.transforms.Map):
    """Replaces a clip's JPEG frames by fixed ones, whole and scaled without keeping the aspect.

    Attributes:
      name, num, size: as in `TrainFrames`.
      pick: (frames in the clip, frames wanted) -> indices.
    """

    name: str
    num: int
    size: int
    pick: Callable[[int, int], np.ndarray] = evenly_spaced_frames

    def map(self, element: Example) -> Example:
        """One example."""
        frames: Any = element[self.name]
        indices = self.pick(len(frames), self.num)
        return {**element, self.name: decode_frames(frames, indices, self.size)}
