"""Spectrograms of the paper's data sets in NumPy: upstream's log STFT and a Kaldi filter bank.

Both follow published recipes step by step, so that records made here can be used with models that
were trained on upstream's: librosa's ``stft`` with its defaults for CREMA-D, and for
Kinetics-Sounds ``torchaudio.compliance.kaldi.fbank`` with the arguments of the AST recipe (Gong et
al. 2021).
"""

import functools

import numpy as np

from rollingq_jax.errors import DataError

CREMA_D_RATE = 22_050
CREMA_D_SAMPLES = 3 * CREMA_D_RATE
N_FFT, HOP = 512, 353

FBANK_RATE = 16_000
FBANK_FRAMES, FBANK_BINS = 1024, 128
# Mean and half the divisor that upstream's preparation of Kinetics-Sounds uses.
FBANK_MEAN, FBANK_STD = -4.503877, 5.141276
# Kaldi floors the filters' energies at the smallest difference from 1 in float32.
FLOOR = float(np.finfo(np.float32).eps)


def tile(waveform: np.ndarray, length: int) -> np.ndarray:
    """float32 [samples], at least one -> [length]: repeated from its start, then cut."""
    return np.resize(waveform, length).astype(np.float32)


def log_stft(waveform: np.ndarray, n_fft: int = N_FFT, hop: int = HOP) -> np.ndarray:
    """log(|X| + 1e-7) of the short-time Fourier transform X, frames centred at multiples of hop.

    The window is the periodic Hann window, and half a window of zeros goes before and after the
    sound (librosa 0.10 and later; earlier versions mirrored it, which changes the first and last
    frame).

    Args:
      waveform: float [samples].
      n_fft: length of window and transform.
      hop: samples from one frame to the next.

    Returns:
      float32 [n_fft // 2 + 1, 1 + samples // hop].
    """
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(n_fft) / n_fft)
    padded = np.pad(np.asarray(waveform, np.float64), n_fft // 2)
    frames = np.lib.stride_tricks.sliding_window_view(padded, n_fft)[::hop]
    magnitude = np.abs(np.fft.rfft(frames * window, axis=1))
    return np.log(magnitude + 1e-7).T.astype(np.float32)


def crema_d_spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Upstream's audio for CREMA-D: three seconds by repetition, clipped to [-1, 1], log STFT.

    Upstream repeats three times at most; clips shorter than a second (CREMA-D has none) are
    repeated as often as needed here.

    Args:
      waveform: float [samples] at 22,050 Hz.

    Returns:
      float32 [257, 188], frequency by time; not normalised.
    """
    return log_stft(np.clip(tile(waveform, CREMA_D_SAMPLES), -1.0, 1.0))


def kaldi_fbank(
    waveform: np.ndarray,
    rate: int,
    num_bins: int = FBANK_BINS,
    *,
    frame_ms: float = 25.0,
    shift_ms: float = 10.0,
    low_frequency: float = 20.0,
    preemphasis: float = 0.97,
) -> np.ndarray:
    """Log energies of mel filters as Kaldi has them: Hanning window, no dither, no energy term.

    A frame is taken wherever it fits whole into the sound. From each its own mean is subtracted,
    then x[n] - 0.97 x[n - 1] (the first sample against itself), the symmetric Hanning window, zeros
    up to the next power of two, power spectrum, triangles on the scale 1127 ln(1 + f / 700) from
    20 Hz to half the sample rate, natural logarithm with floor 2^-23.

    Args:
      waveform: float [samples].
      rate: sample rate in Hz.
      num_bins: number of filters.
      frame_ms, shift_ms: length of a frame, and from one to the next.
      low_frequency: lower edge of the first filter.
      preemphasis: the factor 0.97 above.

    Returns:
      float32 [frames, num_bins]; no frames if the sound is shorter than one.
    """
    length, shift = int(rate * frame_ms * 0.001), int(rate * shift_ms * 0.001)
    samples = np.asarray(waveform, np.float64)
    if len(samples) < length:
        return np.zeros((0, num_bins), np.float32)
    frames = np.lib.stride_tricks.sliding_window_view(samples, length)[::shift]
    frames = frames - frames.mean(axis=1, keepdims=True)
    previous = np.concatenate([frames[:, :1], frames[:, :-1]], axis=1)
    frames = (frames - preemphasis * previous) * np.hanning(length)
    n_fft = 1 << (length - 1).bit_length()
    power = np.square(np.abs(np.fft.rfft(frames, n_fft, axis=1)))
    filters = mel_filters(rate, n_fft, num_bins, low_frequency)
    return np.log(np.maximum(power @ filters.T, FLOOR)).astype(np.float32)


@functools.lru_cache(maxsize=8)
def mel_filters(rate: int, n_fft: int, num_bins: int, low_frequency: float) -> np.ndarray:
    """Triangular filters, equally spaced and overlapping by half on the mel scale.

    Args:
      rate: sample rate in Hz; the last filter ends at half of it.
      n_fft: length of the transform.
      num_bins: number of filters.
      low_frequency: where the first filter begins, in Hz.

    Returns:
      float64 [num_bins, n_fft // 2 + 1]. Narrow filters at low frequencies may hold no frequency of
      the transform and be 0 throughout, as in Kaldi.
    """

    def mel(frequency: np.ndarray | float) -> np.ndarray:
        return 1127.0 * np.log1p(np.asarray(frequency) / 700.0)

    edges = np.linspace(mel(low_frequency), mel(rate / 2), num_bins + 2)
    left, centre, right = (edges[i : num_bins + i, None] for i in range(3))
    position = mel(np.arange(n_fft // 2 + 1) * rate / n_fft)[None]
    rising = (position - left) / (centre - left)
    falling = (right - position) / (right - centre)
    filters = np.maximum(0.0, np.minimum(rising, falling))
    filters[:, -1] = 0.0  # Kaldi leaves the highest frequency out
    filters.setflags(write=False)
    return filters


def kinetics_fbank(waveform: np.ndarray, rate: int = FBANK_RATE) -> np.ndarray:
    """Upstream's audio for Kinetics-Sounds: mean removed, 128 filters, 1,024 frames, normalised.

    Padding comes before (x + 4.503877) / (2 * 5.141276), as upstream has it, so a frame after the
    sound's end holds 0.438 throughout. Ten seconds give 998 frames.

    Args:
      waveform: float [samples].
      rate: sample rate in Hz.

    Returns:
      float32 [1024, 128], time by frequency.

    Raises:
      DataError: the sound is shorter than one frame, 25 ms.
    """
    samples = np.asarray(waveform, np.float64)
    features = kaldi_fbank(samples - samples.mean(), rate)[:FBANK_FRAMES]
    if len(features) == 0:
        raise DataError(f"sound of {len(samples)} samples at {rate} Hz; at least 25 ms are needed")
    padded = np.pad(features, ((0, FBANK_FRAMES - len(features)), (0, 0)))
    return (padded - FBANK_MEAN) / (2 * FBANK_STD)
