"""Sound: WAV and FLAC through ``soundfile``, resampling through SciPy (imported on first use)."""

import os
import struct
from fractions import Fraction
from typing import Any

import numpy as np

from rollingq_jax.data.reading import reading
from rollingq_jax.errors import DataError


def read_audio(path: str | os.PathLike) -> tuple[np.ndarray, int]:
    """A WAV or FLAC file as float32 [samples] in [-1, 1], channels averaged, and its sample rate.

    Raises:
      DataError: the file is missing, damaged, empty, or a WAV shorter than its header says.
    """
    with reading(path, "audio"):
        import soundfile

        with open(path, "rb") as file:
            _check_wav_length(file, path)
            samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
        if samples.shape[0] == 0:
            raise DataError(f"audio {path}: holds no samples")
        return average_channels(samples, path), int(rate)


def sound_seconds(path: str | os.PathLike) -> float:
    """The length of a WAV or FLAC file from its header.

    Raises:
      DataError: the file is missing or damaged.
    """
    with reading(path, "audio"):
        import soundfile

        with open(path, "rb") as file:
            info = soundfile.info(file)
        return info.frames / info.samplerate


def average_channels(samples: np.ndarray, path: str | os.PathLike) -> np.ndarray:
    """float32 [samples, channels] -> [samples]; ``path`` is for the error message.

    Raises:
      DataError: a sample is NaN or infinite.
    """
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
