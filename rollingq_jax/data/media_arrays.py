"""From a media file to an array of a fixed size."""

import dataclasses
from pathlib import Path

import numpy as np

from rollingq_jax.data import media
from rollingq_jax.data.manifest import SUFFIXES
from rollingq_jax.data.reading import HEAD, check_lfs_pointer
from rollingq_jax.data.sound import samples_in
from rollingq_jax.data.speech import log_mel
from rollingq_jax.errors import DataError

BYTE_VOCABULARY = 257
DYNAMIC_RANGE = 80.0  # decibels


@dataclasses.dataclass(frozen=True)
class MediaSizes:
    """To what sizes files are brought; the fields are those of ``config.data``."""

    audio_features: str = "mel"
    audio_rate: int = 16000
    audio_seconds: float = 0.0
    audio_bins: int = 64
    audio_frames: int = 96
    image_size: int = 64
    video_frames: int = 4
    text_length: int = 0
    stats_examples: int = 256


def example_form(type_: str, sizes: MediaSizes) -> tuple[tuple[int, ...], str]:
    """Shape and dtype of an example of the type."""
    side = sizes.image_size
    return {
        "audio": ((sizes.audio_bins, sizes.audio_frames, 1), "float32"),
        "image": ((side, side, 3), "uint8"),
        "video": ((sizes.video_frames, side, side, 3), "uint8"),
        "text": ((sizes.text_length,), "int32"),
        "string": ((sizes.text_length,), "int32"),
    }[type_]


def is_video(path: Path | str) -> bool:
    """Whether the name is that of a video file."""
    return Path(path).suffix.lower() in SUFFIXES["video"]


def read_value(value: Path | str, type_: str, sizes: MediaSizes) -> np.ndarray:
    """A manifest's cell as the array that :func:`example_form` describes.

    Raises:
      DataError: the file is missing or damaged; the message names it.
    """
    size = (sizes.image_size, sizes.image_size)
    if type_ == "audio":
        reader = media.read_video_audio if is_video(value) else media.read_audio
        return sound_features(*reader(value, sizes.audio_seconds), sizes)
    if type_ == "image":
        return media.resize_image(media.read_image(value), size)
    if type_ == "video":
        frames = media.read_video_frames(value, sizes.video_frames)
        return np.stack([media.resize_image(frame, size) for frame in frames])
    if isinstance(value, Path):
        try:
            with value.open("rb") as file:
                data = file.read(max(sizes.text_length, HEAD))
        except OSError as error:
            raise DataError(f"text {value}: cannot be read ({error.strerror})") from None
        check_lfs_pointer(data, f"text {value}")
    else:
        data = value.encode("utf-8", "replace")
    return byte_tokens(data, sizes.text_length)


def byte_tokens(data: bytes, length: int) -> np.ndarray:
    """Bytes as token ids, int32 [length]: 1 + the value of each; cut off or padded with 0."""
    data = data[:length]
    ids = np.zeros(length, np.int32)
    ids[: len(data)] = np.frombuffer(data, np.uint8).astype(np.int32) + 1
    return ids


def sound_features(waveform: np.ndarray, rate: int, sizes: MediaSizes) -> np.ndarray:
    """float32 [samples] -> [audio_bins, audio_frames, 1], decibels under the loudest."""
    length = round(sizes.audio_seconds * sizes.audio_rate)
    # Cut before resampling: of a long recording only the beginning is used.
    waveform = waveform[: samples_in(sizes.audio_seconds, rate)]
    samples = media.resample(waveform, rate, sizes.audio_rate)[:length]
    samples = np.pad(samples, (0, length - len(samples)))
    hop = sizes.audio_seconds / sizes.audio_frames
    if sizes.audio_features == "mel":
        window = max(0.025, 1.5 * hop)  # so that no sound falls between two windows
        features = log_mel(
            samples, sizes.audio_rate, sizes.audio_bins, sizes.audio_frames, window=window
        )
    else:
        features = _log_stft(samples, sizes.audio_bins, sizes.audio_frames)
    return features[:, :, None]


def _log_stft(samples: np.ndarray, bins: int, frames: int) -> np.ndarray:
    """[samples] -> float32 [bins, frames] decibels, from windows of 2 (bins - 1) samples."""
    length = 2 * (bins - 1)
    samples = np.pad(samples.astype(np.float64), (0, max(0, length - len(samples))))
    starts = np.rint(np.linspace(0, len(samples) - length, frames)).astype(np.int64)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    power = np.abs(np.fft.rfft(samples[starts[:, None] + np.arange(length)] * hann, axis=1)) ** 2
    peak = max(power.max(), np.finfo(np.float64).tiny)
    decibels = 10 * np.log10(np.maximum(power / peak, 10 ** (-DYNAMIC_RANGE / 10)))
    return decibels.T.astype(np.float32)
