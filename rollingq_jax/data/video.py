"""Frames and sound of video files, through PyAV (imported on first use).

The file is opened here and handed over as a stream, and only plain container formats are admitted,
so that a file cannot make the decoder open other files or addresses (as a playlist with a video's
name could).
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from rollingq_jax.data.images import resize_short_side
from rollingq_jax.data.reading import reading
from rollingq_jax.data.sound import average_channels
from rollingq_jax.errors import DataError

# FFmpeg's demuxers for files that hold their own media. Its playlist formats (hls, dash, concat)
# stay out: they read whatever paths and addresses the file names.
VIDEO_FORMATS = "avi,flv,matroska,mov,mp4,mpeg,mpegts,webm"


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
    wanted = None if indices is None else [int(index) for index in indices]
    if num_frames is not None:
        wanted = evenly_spaced(count_video_frames(path), num_frames).tolist()
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
        return average_channels(np.concatenate(parts, axis=1).T, path), rate


def video_seconds(path: str | os.PathLike) -> float:
    """The length of a video that has sound, from its header; 0 where the header does not say.

    Raises:
      DataError: the file is missing or damaged, or has no sound.
    """
    with _open_video(path, track="audio") as container:
        return (container.duration or 0) / 1_000_000  # FFmpeg counts in microseconds


@contextlib.contextmanager
def _open_video(path: str | os.PathLike, track: str = "video") -> Iterator[Any]:
    """An open PyAV container that has the track ("video" or "audio")."""
    with reading(path, "video"):
        import av

        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size == 0:
                raise DataError(f"video {path}: the file is empty")
            options = {"format_whitelist": VIDEO_FORMATS}
            with av.open(file, options=options) as container:
                if not getattr(container.streams, track):
                    raise DataError(f"video {path}: has no {track} track, or its index was cut off")
                yield container
