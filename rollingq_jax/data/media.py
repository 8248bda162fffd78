"""Sound, images and video; every failure is a one-line ``DataError`` that names the file."""

from rollingq_jax.data.images import (
    decode_image,
    encode_jpeg,
    read_image,
    resize_image,
    resize_short_side,
)
from rollingq_jax.data.sound import read_audio, resample, sound_seconds
from rollingq_jax.data.video import (
    count_video_frames,
    evenly_spaced,
    iterate_frames,
    read_video_audio,
    read_video_frames,
    video_seconds,
)

__all__ = [
    "count_video_frames",
    "decode_image",
    "encode_jpeg",
    "evenly_spaced",
    "iterate_frames",
    "read_audio",
    "read_image",
    "read_video_audio",
    "read_video_frames",
    "resample",
    "resize_image",
    "resize_short_side",
    "sound_seconds",
    "video_seconds",
]
