"""Frames and sound of video files, through PyAV (imported on first use).

The file is opened here and handed over as a stream, and only plain container formats are admitted,
so that a file cannot make the decoder open other files or addresses (as a playlist with a video's
name could).
"""

import contextlib
import os
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from rollingq_jax.data.containers import Missing, find_missing
from rollingq_jax.data.images import MAX_PIXELS, check_pixels, resize_short_side
from rollingq_jax.data.reading import HEAD, check_impostor, reading
from rollingq_jax.data.sound import (
    average_channels,
    check_sound_format,
    check_waveform,
    samples_in,
)
from rollingq_jax.errors import DataError

# FFmpeg's demuxers for files that hold their own media. Its playlist formats (hls, dash, concat)
# stay out: they read whatever paths and addresses the file names.
VIDEO_FORMATS = "avi,flv,matroska,mov,mp4,mpeg,mpegts,webm"
# Of a file that was cut off, this much may be missing: the last frames of real files often are.
MISSING = 0.05
SLACK = 0.12  # seconds, however short the clip is


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
    """Frames of a video (FLV, MP4, AVI, MKV ...) as uint8 [T, H, W, 3], turned as players show it.

    At most one choice of frames may be given; none gives every frame. Only the chosen frames are
    held in memory.

    Args:
      path: the file.
      num_frames: this many, evenly spaced; a clip with fewer frames repeats some.
      indices: these frames, in ascending order; a number past the end gives the last frame.
      fps: the first frame at or after each multiple of 1 / fps seconds from the start.
      short_side: if given, each frame is scaled to this shorter side.

    Raises:
      DataError: the file is missing, damaged, cut off, has no video, or the video has no frames or
        frames of more than ``MAX_PIXELS``.
    """
    if sum(choice is not None for choice in (num_frames, indices, fps)) > 1:
        raise DataError("read_video_frames: give only one of num_frames, indices and fps")

    def convert(frame: Any) -> np.ndarray:
        image = _as_shown(frame)
        return image if short_side is None else resize_short_side(image, short_side)

    if num_frames is not None:
        count = count_video_frames(path)
        frames, found = _pick_frames(path, evenly_spaced(count, num_frames).tolist(), convert)
        if found < count:  # some packets hold no picture, or half of one
            wanted = evenly_spaced(found, num_frames).tolist()
            frames, _ = _pick_frames(path, wanted, convert)
    elif indices is not None:
        wanted = [int(index) for index in indices]
        if not wanted or wanted != sorted(wanted) or wanted[0] < 0:
            raise DataError(f"frame indices {wanted}; ascending and not negative")
        frames, _ = _pick_frames(path, wanted, convert)
    else:
        frames = list(iterate_frames(path, fps, short_side))
    with reading(path, "video"):
        return np.stack(frames)


def iterate_frames(
    path: str | os.PathLike, fps: float | None = None, short_side: int | None = None
) -> Iterator[np.ndarray]:
    """The frames uint8 [H, W, 3] of :func:`read_video_frames`, one at a time.

    Raises:
      DataError: as there, when the iteration comes to it.
    """
    for frame in _decoded_frames(path, fps):
        image = _as_shown(frame)
        yield image if short_side is None else resize_short_side(image, short_side)


def _pick_frames(
    path: str | os.PathLike, wanted: list[int], convert: Callable[[Any], np.ndarray]
) -> tuple[list[np.ndarray], int]:
    """The frames of these numbers, and how many the clip has if the last of them is past its end.

    A number past the end gives the last frame. The count is the largest integer if it is not.
    """
    frames: list[np.ndarray] = []
    last, number = None, -1
    for number, last in enumerate(_decoded_frames(path)):
        frames += [convert(last)] * wanted.count(number)
        if number >= wanted[-1]:
            return frames, sys.maxsize
    frames += [convert(last)] * (len(wanted) - len(frames))
    return frames, number + 1


def _decoded_frames(path: str | os.PathLike, fps: float | None = None) -> Iterator[Any]:
    """PyAV's frames, at least one; with ``fps`` those of :func:`read_video_frames`."""
    next_time, found = 0.0, False
    with _open_video(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or 25)
        for number, frame in enumerate(_decode(container, stream)):
            check_pixels(frame.width, frame.height, f"video {path}")
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


def _decode(container: Any, stream: Any) -> Iterator[Any]:
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
      DataError: as in :func:`read_video_frames`.
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
        :func:`~rollingq_jax.data.sound.samples_in` of it; None decodes all.

    Raises:
      DataError: the file is missing, damaged or cut off, or has no sound.
    """
    with _open_video(path, track="audio") as container:
        import av

        # Planar float without a layout or rate: the channels stay apart and are averaged below.
        to_float = av.AudioResampler(format="fltp")
        parts, count, rate, most = [], 0, 0, sys.maxsize
        for frame in _decode(container, container.streams.audio[0]):
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
      DataError: as in :func:`read_video_audio`.
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
    check_pixels(context.width, context.height, f"video {path}")
    context.options = {"max_pixels": str(MAX_PIXELS)}


def _check_track(container: Any, path: str | os.PathLike, track: str) -> None:
    if not getattr(container.streams, track):
        raise DataError(f"video {path}: has no {track} track, or its index was cut off")


def _check_whole(container: Any, path: str | os.PathLike, track: str, missing: Missing) -> None:
    """Compares what is left of a file that was cut off with what its header says.

    Raises:
      DataError: more than ``MISSING`` of the track is missing, and more than one frame or
        ``SLACK``; or the file ends within a fragment, and nothing says how many were to follow.
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
