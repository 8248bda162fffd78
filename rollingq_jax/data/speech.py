"""Synthetic speech for the demo's data, and log-mel spectrograms.

The speech comes from espeak-ng (GPL-3) through the shared library in the package espeakng_loader.
It is called to build data only; nothing of it is part of a model or of this package.
"""

import ctypes
import functools
import os
import pathlib
import shutil
import tempfile

import numpy as np

from rollingq_jax.errors import DataError

# Our name of a voice -> the name espeak-ng finds it by ("en-gb" is a language there, not a name).
_VOICE_FILES = {
    "en-029": "gmw/en-029",
    "en-gb": "gmw/en",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-us": "gmw/en-US",
}
VOICES = tuple(_VOICE_FILES)
VARIANTS = (*(f"m{i}" for i in range(1, 8)), *(f"f{i}" for i in range(1, 6)), "croak", "whisper")

# From espeak-ng's speak_lib.h.
_SYNCHRONOUS = (
    2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when the last sample was handed over
)
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report missing data instead of ending the process
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_POS_CHARACTER, _CHARS_UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_RANGES = {"rate": (80, 450), "pitch": (0, 100)}


class Synthesizer:
    """Turns text into samples with espeak-ng.

    The library keeps state from one utterance to the next (where its flutter stands) that no call
    resets. So each Synthesizer works on a copy of the library of its own: the same calls in the
    same order give the same samples, whatever was said before in the process. Not thread-safe.

    Attributes:
      sample_rate: samples per second.
      version: of espeak-ng.

    Raises:
      DataError: espeakng_loader is not installed, or its library or data cannot be used.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise DataError(
                "espeakng_loader: not installed, and spoken digits need it; "
                "pip install espeakng-loader"
            ) from error
        self._library = _load_copy(pathlib.Path(espeakng_loader.get_library_path()))
        data = os.fsencode(espeakng_loader.get_data_path())
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(
                f"espeakng_loader: espeak-ng finds no usable data in {os.fsdecode(data)}; "
                "reinstall espeakng-loader"
            )
        self._spoken = 0
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept here, since the library only points to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version = self._library.espeak_Info(None).decode()

    def say(self, text: str, *, voice: str, rate: int = 160, pitch: int = 50) -> np.ndarray:
        """Speaks a text.

        Args:
          text: what to say.
          voice: one of :data:`VOICES`, or with a variant (one of :data:`VARIANTS`) "en-us+f3".
          rate: words per minute, 80 to 450.
          pitch: 0 to 100.

        Returns:
          Samples in [-1, 1], float32 [n].

        Raises:
          DataError: the voice, its variant, the rate or the pitch is not allowed, or espeak-ng
            fails.
        """
        language, plus, variant = voice.partition("+")
        if language not in _VOICE_FILES:
            raise DataError(f"voice {voice!r}: {language!r} is not one of {', '.join(VOICES)}")
        if plus and variant not in VARIANTS:  # espeak-ng would fall back on its plain voice
            raise DataError(f"voice {voice!r}: {variant!r} is not one of {', '.join(VARIANTS)}")
        for name, value in (("rate", rate), ("pitch", pitch)):
            low, high = _RANGES[name]
            if not low <= value <= high:
                raise DataError(f"{name}: {value}; from {low} to {high}")
        file = (_VOICE_FILES[language] + plus + variant).encode()
        if self._library.espeak_SetVoiceByName(file) != 0:
            raise DataError(f"voice {voice!r}: this espeak-ng ({self.version}) does not have it")
        self._library.espeak_SetParameter(_RATE, int(rate), 0)
        self._library.espeak_SetParameter(_PITCH, int(pitch), 0)
        # Breath is drawn from the C library's generator, which the whole process shares.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(self._spoken))
        self._spoken += 1
        data = text.encode() + b"\0"
        self._chunks.clear()
        failed = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data)), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if failed or not self._chunks:
            raise DataError(f"text {text!r}: espeak-ng fails to speak it")
        return np.concatenate(self._chunks).astype(np.float32) / np.float32(2**15)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


def _load_copy(path: pathlib.Path) -> ctypes.CDLL:
    """Loads a copy of a shared library, which has variables of its own.

    The loader recognises a file that it has open already, so the copy is needed; it may go once
    loaded (where the system allows that).
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return ctypes.CDLL(shutil.copy(path, folder))
        except OSError as error:
            raise DataError(f"espeakng_loader: {path} cannot be loaded ({error})") from error


def trim_silence(waveform: np.ndarray, threshold: float = 0.01) -> np.ndarray:
    """The part between the first and the last sample above ``threshold`` times the peak."""
    loud = np.flatnonzero(np.abs(waveform) > threshold * np.abs(waveform).max(initial=0.0))
    return waveform[loud[0] : loud[-1] + 1] if len(loud) else waveform


def log_mel(
    waveform: np.ndarray,
    rate: int,
    bins: int = 32,
    frames: int = 32,
    *,
    window: float = 0.025,
    dynamic_range: float = 80.0,
) -> np.ndarray:
    """Log-mel spectrogram with a fixed number of frames.

    The hop is what lets ``frames`` windows of ``window`` seconds span the waveform from its first
    sample to its last: short and long utterances are stretched to one length. A waveform shorter
    than one window is padded with zeros behind.

    Args:
      waveform: samples, [n].
      rate: samples per second.
      bins: number of mel bands between 0 and rate / 2.
      frames: number of windows.
      window: length of the (periodic Hann) window in seconds.
      dynamic_range: values more than this many decibels under the largest are raised to there.

    Returns:
      Decibels relative to the spectrogram's largest value, in [-dynamic_range, 0], float32
      [bins, frames]; silence gives -dynamic_range throughout.
    """
    length = round(window * rate)
    samples = np.asarray(waveform, np.float64)
    samples = np.pad(samples, (0, max(0, length - len(samples))))
    starts = np.rint(np.linspace(0, len(samples) - length, frames)).astype(np.int64)
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / length)
    pieces = samples[starts[:, None] + np.arange(length)] * hann
    size = 2 ** int(np.ceil(np.log2(length)))
    power = np.abs(np.fft.rfft(pieces, size, axis=1)) ** 2
    # Not a BLAS product, whose order of summation may depend on the number of threads.
    mel = np.einsum("tf,mf->tm", power, mel_filters(rate, size, bins))
    peak = max(mel.max(), np.finfo(np.float64).tiny)
    floor = peak * 10 ** (-dynamic_range / 10)
    decibels = 10 * np.log10(np.maximum(mel, floor) / peak)
    if mel.max() <= 0:
        decibels[:] = -dynamic_range
    return decibels.T.astype(np.float32)


@functools.cache
def mel_filters(rate: int, size: int, bins: int) -> np.ndarray:
    """Triangular filters, equally spaced in mel, each with a peak of 1.

    The mel scale is that of the HTK book (Young et al., section 5.4): m = 2595 log10(1 + f / 700).

    Args:
      rate: samples per second.
      size: length of the Fourier transform.
      bins: number of filters between 0 and rate / 2.

    Returns:
      float64 [bins, size // 2 + 1]; one array for all callers, so not writable.
    """
    top = 2595 * np.log10(1 + rate / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, bins + 2) / 2595) - 1)
    frequencies = np.arange(size // 2 + 1) * rate / size
    low, centre, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising = (frequencies - low) / (centre - low)
    falling = (high - frequencies) / (high - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters.flags.writeable = False
    return filters
