"""Sound: values against what was written and what other libraries compute, one line for damage."""

import cmath
import math
import struct
import tracemalloc

import numpy as np
import pytest

from rollingq_jax.data import audio
from rollingq_jax.data.audio import MAX_RATE, MIN_RATE
from rollingq_jax.data.sources import crema_d, kinetics_sounds
from rollingq_jax.data.sources.media_folder import MediaSizes, read_value
from rollingq_jax.errors import DataError
from tests.data import media_files
from tests.data.media_files import cut, peak_of, refuses

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize("channels", [1, 2])
def test_sound_reads_back(tmp_path, suffix, channels):
    path = tmp_path / f"a.{suffix}"
    media_files.write_wav(path, seconds=0.25, rate=8000, channels=channels)
    waveform, rate = audio.read_audio(path)
    assert (rate, waveform.shape, waveform.dtype) == (8000, (2000,), np.float32)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(2000) / 8000)
    np.testing.assert_allclose(waveform, expected, atol=1e-4)
    assert audio.sound_seconds(path) == pytest.approx(0.25)


def test_truncated_wav(tmp_path):
    path = tmp_path / "cut.wav"
    media_files.write_wav(path)
    path.write_bytes(path.read_bytes()[:5000])
    refuses(lambda: audio.read_audio(path), path, "truncated WAV", "4956 of 16000")


def test_wav_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "pipe.wav"
    media_files.write_wav(path, seconds=0.1)
    data = path.read_bytes()
    where = data.index(b"data") + 4
    path.write_bytes(data[:where] + struct.pack("<I", 0xFFFFFFFF) + data[where + 4 :])
    assert audio.read_audio(path)[0].shape == (1600,)


def test_sound_failures(tmp_path):
    refuses(lambda: audio.read_audio(tmp_path / "none.wav"), "none.wav", "no such file")
    refuses(lambda: audio.read_audio(tmp_path), "is a folder")
    empty = tmp_path / "empty.wav"
    media_files.write_wav(empty, seconds=0)
    refuses(lambda: audio.read_audio(empty), "no samples")
    flac = tmp_path / "cut.flac"
    media_files.write_wav(flac)
    flac.write_bytes(flac.read_bytes()[:500])
    refuses(lambda: audio.read_audio(flac), "cut.flac", "damaged")
    nan = tmp_path / "nan.wav"
    import soundfile

    soundfile.write(nan, np.full(10, np.nan, np.float32), 8000, subtype="FLOAT")
    refuses(lambda: audio.read_audio(nan), "NaN")


def test_resampling_keeps_a_tone():
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 100 * time).astype(np.float32)
    resampled = audio.resample(tone, 8000, 11025)
    assert resampled.shape == (11025,) and resampled.dtype == np.float32
    expected = np.sin(2 * np.pi * 100 * np.arange(11025) / 11025)
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=2e-3)
    assert audio.resample(tone, 8000, 8000).shape == (8000,)
    refuses(lambda: audio.resample(tone, 0, 8000), "positive")


def wav_bytes(length, samples, *, riff=0, before=b"", behind=b"", rate=16000, channels=1,
              magic=b"RIFF"):  # fmt: skip
    """A WAV file, with its two lengths as they are given."""
    block = 2 * channels
    header = struct.pack(
        "<HHIIHH", 1, channels, rate, min(rate * block, 2**32 - 1), block % 65536, 16
    )
    body = b"WAVE" + before + b"fmt " + struct.pack("<I", 16) + header
    body += b"data" + struct.pack("<I", length) + samples + behind
    return magic + struct.pack("<I", riff or len(body)) + body


RAMP = np.arange(-800, 800, dtype="<i2") * 20
UNKNOWN = [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0x7FFFEFFE, 0x80000000, 0x7FFFFFDB, 0xFFFFFFDB]


@pytest.mark.parametrize("length", UNKNOWN)
@pytest.mark.parametrize("seconds", [None, 0.05])
def test_wav_from_a_pipe_is_read_to_its_end(tmp_path, length, seconds):
    path = tmp_path / "pipe.wav"
    listing = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"  # an odd size is padded
    path.write_bytes(wav_bytes(length, RAMP.tobytes(), riff=length + 36 & 0xFFFFFFFF,
                               before=listing))  # fmt: skip
    waveform, rate = audio.read_audio(path, seconds)
    assert rate == 16000 and len(waveform) == (1600 if seconds is None else 801)
    np.testing.assert_allclose(waveform, RAMP[: len(waveform)] / 32768, atol=1e-7)
    assert audio.sound_seconds(path, 10) == pytest.approx(0.1)


@pytest.mark.parametrize("magic", [b"RF64", b"BW64"])
@pytest.mark.parametrize("known", [True, False])
def test_wav_of_64_bit_lengths(tmp_path, magic, known):
    path = tmp_path / "long.wav"
    lengths = (3200 + 80, 3200, 1600) if known else (2**64 - 1, 2**64 - 1, 0)
    before = b"ds64" + struct.pack("<IQQQI", 28, *lengths, 0)
    data = wav_bytes(0xFFFFFFFF, RAMP.tobytes(), riff=0xFFFFFFFF, before=before, magic=magic)
    path.write_bytes(data)
    np.testing.assert_allclose(audio.read_audio(path)[0], RAMP / 32768, atol=1e-7)
    if known:
        path.write_bytes(data[:-1000])
        refuses(lambda: audio.read_audio(path), "truncated WAV, 2200 of 3200")


def test_big_endian_wav(tmp_path):
    import soundfile

    path = tmp_path / "big.wav"
    soundfile.write(path, RAMP, 16000, endian="BIG")
    data = path.read_bytes()
    assert data[:4] == b"RIFX"
    where = data.index(b"data") + 4
    for length in (b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xf0\0"):
        path.write_bytes(data[:where] + length + data[where + 4 :])
        np.testing.assert_allclose(audio.read_audio(path)[0], RAMP / 32768, atol=1e-7)
    path.write_bytes(data[:-200])
    refuses(lambda: audio.read_audio(path), "truncated WAV, 3000 of 3200")


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "DOUBLE", "ULAW", "IMA_ADPCM", "MS_ADPCM"])
def test_wav_of_other_encodings_from_a_pipe(tmp_path, subtype):
    import soundfile

    path = tmp_path / "a.wav"
    tone = 0.5 * np.sin(2 * np.pi * 440 * np.arange(32000) / 16000)
    soundfile.write(path, np.stack([tone, tone], 1), 16000, subtype=subtype)
    whole, _ = audio.read_audio(path)
    data = path.read_bytes()
    where = data.index(b"data") + 4
    path.write_bytes(data[:where] + b"\0\0\0\0" + data[where + 4 :])
    np.testing.assert_array_equal(audio.read_audio(path)[0], whole)
    np.testing.assert_array_equal(audio.read_audio(path, 0.5)[0], whole[:8001])


def test_wav_that_is_cut_or_empty_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    for behind in (b"", b"LIST" + struct.pack("<I", 4) + b"INFO"):
        path.write_bytes(wav_bytes(0, b"", behind=behind))
        refuses(lambda: audio.read_audio(path), "holds no samples")
    for length in (3202, 0x10000000, 0x7FF00000):
        path.write_bytes(wav_bytes(length, RAMP.tobytes()))
        refuses(lambda: audio.read_audio(path, 0.01), f"truncated WAV, 3200 of {length}")
        refuses(lambda: audio.sound_seconds(path), "truncated WAV")


def flac_bytes(tmp_path, seconds=1.0, rate=16000):
    path = tmp_path / "whole.flac"
    media_files.write_wav(path, seconds, rate)
    return bytearray(path.read_bytes())


def test_flac_from_a_pipe_is_read_to_its_end(tmp_path):
    data = flac_bytes(tmp_path)
    data[21] &= 0xF0  # 36 bits of STREAMINFO: the total of samples
    data[22:26] = b"\0\0\0\0"
    path = tmp_path / "pipe.flac"
    path.write_bytes(data)
    expected = 0.5 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    np.testing.assert_allclose(audio.read_audio(path)[0], expected, atol=1e-4)
    assert len(audio.read_audio(path, 0.25)[0]) == 4001
    assert audio.sound_seconds(path, 10) == 1.0
    assert audio.sound_seconds(path, 0.5) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_flac_that_is_cut_is_refused_even_if_the_part_used_is_there(tmp_path, share):
    whole = tmp_path / "noise.flac"
    import soundfile

    noise = 0.1 * np.random.default_rng(0).standard_normal(40000)
    soundfile.write(whole, noise, 16000)
    refuses(lambda: audio.read_audio(cut(whole, share), 0.1), "cut off", "40000 samples")


def test_flac_that_promises_too_much_is_refused(tmp_path):
    data = flac_bytes(tmp_path)
    data[22:26] = struct.pack(">I", 2_000_000_000)
    path = tmp_path / "a.flac"
    path.write_bytes(data)
    refuses(lambda: audio.read_audio(path), "2000000000 samples")


@pytest.mark.parametrize(
    "rate", [0, 1, MIN_RATE - 1, MAX_RATE + 1, 1_000_003, 2**31 - 1, 2**32 - 1]
)
def test_absurd_rates_are_refused(tmp_path, rate):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(3200, RAMP.tobytes(), rate=rate))
    for reader in (audio.read_audio, audio.sound_seconds):
        refuses(lambda r=reader: r(path), f"{rate} Hz", f"[{MIN_RATE}, {MAX_RATE}]")


@pytest.mark.parametrize("channels", [0, 1025, 65535])
def test_absurd_numbers_of_channels_are_refused(tmp_path, channels):
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(3200, RAMP.tobytes(), channels=channels))
    refuses(lambda: audio.read_audio(path), f"{channels} channels", "[1, 1024]")


ODD_RATES = [(44101, 16000), (999983, 16000), (8009, 16000), (16001, 16000), (127, 16000),
             (44100, 16000), (48000, 44100), (15991, 999983), (1_000_000, 1000)]  # fmt: skip


@pytest.mark.parametrize(("rate", "target"), ODD_RATES)
def test_odd_rates_are_cheap_and_keep_the_pitch(rate, target):
    seconds, pitch = max(1.0, 2000 / rate), min(rate, target) / 5
    waveform = np.sin(2 * np.pi * pitch * np.arange(int(rate * seconds)) / rate).astype(np.float32)
    tracemalloc.start()
    resampled = audio.resample(waveform, rate, target)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 64e6
    assert len(resampled) == pytest.approx(target * seconds, rel=1e-4, abs=2)
    # The phase that the tone has gained at the end, against that of exact resampling.
    time = np.arange(len(resampled)) / target
    beat = resampled * np.exp(-2j * np.pi * pitch * time)
    edge, part = len(beat) // 10, max(len(beat) // 10, 5)
    early, late = beat[edge : edge + part].mean(), beat[-edge - part : -edge].mean()
    gained = np.angle(late / early) / (2 * np.pi)
    assert abs(gained) / (0.7 * pitch * seconds) < 1e-4
    assert 2 * abs(late) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_of_a_long_recording_only_the_part_in_use_is_decoded(tmp_path, suffix):
    import soundfile

    path = tmp_path / f"long.{suffix}"
    with soundfile.SoundFile(path, "w", 8000, 2) as file:  # 20 minutes, a tone and then silence
        tone = np.sin(2 * np.pi * 440 * np.arange(16000) / 8000)
        file.write(np.stack([tone, tone], 1))
        for _ in range(20):
            file.write(np.zeros((480_000, 2)))
    sizes = MediaSizes(audio_seconds=1.0, audio_bins=8, audio_frames=10)
    features, peak = peak_of(lambda: read_value(path, "audio", sizes))
    assert peak < 8e6  # all of it would take 77 MB
    path.unlink()
    soundfile.write(path, np.stack([tone, tone], 1), 8000)
    np.testing.assert_array_equal(features, read_value(path, "audio", sizes))


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


RATE = 22050


def mel_of(frequency):
    return 2595 * np.log10(1 + frequency / 700)


@pytest.mark.parametrize("frequency", [200, 440, 1000, 3000, 8000])
def test_a_tone_shows_in_its_band_all_the_time(frequency):
    time = np.arange(RATE) / RATE
    spectrogram = audio.log_mel(np.sin(2 * np.pi * frequency * time), RATE)
    assert spectrogram.shape == (32, 32) and spectrogram.dtype == np.float32
    expected = mel_of(frequency) / mel_of(RATE / 2) * 33 - 1  # band 0 is centered on 1 of 33 steps
    assert (np.abs(spectrogram.argmax(axis=0) - expected) <= 1).all()
    assert spectrogram.max() == 0 and spectrogram.min() >= -80


def test_frames_span_the_waveform_whatever_its_length():
    for seconds in (0.05, 0.3, 2.0):
        time = np.arange(int(seconds * RATE)) / RATE
        waveform = np.where(
            time < seconds / 2, np.sin(2 * np.pi * 500 * time), np.sin(2 * np.pi * 4000 * time)
        )
        peaks = audio.log_mel(waveform, RATE).argmax(axis=0)
        assert len(peaks) == 32
        assert (peaks[:12] == peaks[0]).all() and (peaks[-12:] == peaks[-1]).all()
        assert peaks[-1] > peaks[0] + 5


def test_loudness_does_not_matter_and_silence_is_the_floor():
    waveform = np.random.default_rng(0).standard_normal(RATE // 2)
    loud, soft = (audio.log_mel(gain * waveform, RATE) for gain in (1.0, 1e-3))
    np.testing.assert_allclose(loud, soft, atol=1e-4)
    for silence in (np.zeros(RATE // 2), np.zeros(0), np.zeros(10)):
        assert (audio.log_mel(silence, RATE) == -80).all()


def test_filters_cover_the_range_without_gaps():
    filters = audio.mel_filters(RATE, 1024, 32)
    assert filters.shape == (32, 513)
    inside = filters.sum(axis=0)[3:-40]
    assert (filters >= 0).all() and inside.min() > 0.5 and inside.max() <= 1 + 1e-9


def test_silence_is_trimmed_at_both_ends():
    waveform = np.concatenate([np.zeros(50), np.ones(20), np.zeros(5), np.ones(3), np.zeros(70)])
    assert len(audio.trim_silence(waveform)) == 28
    assert len(audio.trim_silence(np.zeros(9))) == 9
    assert len(audio.trim_silence(np.zeros(0))) == 0
