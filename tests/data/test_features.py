"""Spectrograms against slow versions of the definitions and other implementations' output."""

import cmath
import math

import numpy as np
import pytest

from rollingq_jax.data import audio
from rollingq_jax.data.sources import crema_d, kinetics_sounds
from rollingq_jax.errors import DataError


def signal(count=16_000, rate=16_000):
    """A chirp in noise, the same everywhere."""
    n = np.arange(count)
    noise = np.modf(np.abs(np.sin(n * 12.9898) * 43758.5453))[0] - 0.5
    t = n / rate
    return (0.3 * np.sin(2 * np.pi * (200 + 1500 * t) * t) + 0.1 * noise).astype(np.float32)


def slow_fbank(samples, rate, num_bins):
    """Kaldi's filter bank, one sample at a time, from torchaudio's documentation of each step."""
    length, shift = int(rate * 0.025), int(rate * 0.010)
    size = 1
    while size < length:
        size *= 2
    low, high = mel(20.0), mel(rate / 2)
    width = (high - low) / (num_bins + 1)
    rows = []
    for start in range(0, len(samples) - length + 1, shift):
        frame = [float(value) for value in samples[start : start + length]]
        mean = sum(frame) / length
        frame = [value - mean for value in frame]
        frame = [frame[i] - 0.97 * frame[max(i - 1, 0)] for i in range(length)]
        frame = [
            value * (0.5 - 0.5 * math.cos(2 * math.pi * i / (length - 1)))
            for i, value in enumerate(frame)
        ]
        row = []
        power = [
            abs(sum(frame[i] * cmath.exp(-2j * math.pi * k * i / size) for i in range(length))) ** 2
            for k in range(size // 2)  # Kaldi leaves the highest frequency out
        ]
        for b in range(num_bins):
            left, center, right = (low + (b + j) * width for j in range(3))
            energy = 0.0
            for k in range(size // 2):
                place = mel(rate * k / size)
                if left < place <= center:
                    energy += power[k] * (place - left) / (center - left)
                elif center < place < right:
                    energy += power[k] * (right - place) / (right - center)
            row.append(math.log(max(energy, 1.1920928955078125e-07)))
        rows.append(row)
    return np.array(rows)


def mel(frequency):
    """HTK's scale."""
    return 1127.0 * math.log(1.0 + frequency / 700.0)


@pytest.mark.parametrize(
    ("rate", "num_bins", "count"), [(8000, 23, 440), (11_025, 128, 400), (4000, 10, 250)]
)
def test_fbank_equals_the_definition(rate, num_bins, count):
    samples = signal(count, rate)
    expected = slow_fbank(samples, rate, num_bins)
    assert expected.shape[0] >= 2
    np.testing.assert_allclose(
        audio.kaldi_fbank(samples, rate, num_bins), expected, rtol=1e-4, atol=1e-4
    )


def test_fbank_equals_kaldi():
    """Frames 0, 50, 97 and every sixth of 40 filters, computed with kaldi-native-fbank 1.23."""
    expected = [
        [-6.73421, -5.37194, -4.97345, -2.79668, 0.17262, 0.76922, 1.2531],
        [-7.46785, -5.28568, -2.88639, 3.48951, -0.4342, 0.46294, 1.44613],
        [-7.09841, -4.67759, -3.6071, -0.71432, -0.56152, 0.48849, 1.92752],
    ]
    actual = audio.kaldi_fbank(signal(), 16_000, 40)
    assert actual.shape == (98, 40)
    np.testing.assert_allclose(actual[[0, 50, 97]][:, ::6], expected, atol=2e-4)


def test_stft_equals_librosa():
    """A few values of log(|librosa.stft| + 1e-7), computed with librosa 0.11."""
    expected = [
        [1.3943, -0.89367, 0.02556, -0.68196],
        [-2.45549, -1.38257, -1.60177, -0.15912],
        [-1.63514, -0.93121, -0.98413, -1.21212],
        [-2.03981, -0.60617, -1.07998, -1.25033],
        [-2.61062, -3.38816, -0.80745, -1.96842],
    ]
    actual = audio.log_stft(signal(), crema_d.N_FFT, crema_d.HOP)
    assert actual.shape == (257, 46) and actual.dtype == np.float32
    np.testing.assert_allclose(actual[::64][:, [0, 1, 20, 45]], expected, atol=2e-4)


def test_stft_of_one_frame_by_hand():
    samples = signal(2000)
    actual = audio.log_stft(samples, crema_d.N_FFT, crema_d.HOP)
    frame = 3  # centered on sample 3 * 353, whole inside the signal
    for k in (0, 7, 256):
        total = sum(
            float(samples[frame * 353 - 256 + i])
            * (0.5 - 0.5 * math.cos(2 * math.pi * i / 512))
            * cmath.exp(-2j * math.pi * k * i / 512)
            for i in range(512)
        )
        assert actual[k, frame] == pytest.approx(math.log(abs(total) + 1e-7), abs=1e-4)


def test_crema_d_spectrogram():
    second = signal(22_050, 22_050)
    spectrogram = crema_d.crema_d_spectrogram(second)
    assert spectrogram.shape == (257, 188) and spectrogram.dtype == np.float32
    np.testing.assert_array_equal(spectrogram, crema_d.crema_d_spectrogram(np.tile(second, 3)))
    np.testing.assert_array_equal(
        crema_d.crema_d_spectrogram(10 * second),
        crema_d.crema_d_spectrogram(np.clip(10 * second, -1, 1)),
    )
    np.testing.assert_array_equal(
        crema_d.crema_d_spectrogram(np.zeros(5, np.float32)),
        np.full((257, 188), np.log(np.float32(1e-7))),
    )


def test_tile_repeats_short_sounds_as_often_as_needed():
    np.testing.assert_array_equal(audio.tile(np.float32([1, 2, 3]), 8), [1, 2, 3, 1, 2, 3, 1, 2])


def test_kinetics_fbank_pads_then_scales():
    samples = signal(16_000) + 0.2  # the mean is taken off first
    result = kinetics_sounds.kinetics_fbank(samples)
    assert result.shape == (1024, 128) and result.dtype == np.float32
    fbank = audio.kaldi_fbank(samples - samples.mean(), 16_000)
    np.testing.assert_allclose(result[:98] * 2 * 5.141276 - 4.503877, fbank, atol=1e-4)
    np.testing.assert_allclose(result[98:], 0.438, atol=1e-4)


def test_kinetics_fbank_of_ten_seconds_and_more():
    assert len(audio.kaldi_fbank(np.zeros(160_000), 16_000)) == 998
    long = signal(11 * 16_000)
    assert kinetics_sounds.kinetics_fbank(long).shape == (1024, 128)


def test_kinetics_fbank_of_almost_nothing():
    with pytest.raises(DataError, match="399 samples at 16000 Hz; at least 25 ms"):
        kinetics_sounds.kinetics_fbank(np.zeros(399))
