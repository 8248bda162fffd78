import subprocess
import sys

import numpy as np
import pytest

from rollingq_jax.data import audio
from rollingq_jax.data.sources import av_digits
from rollingq_jax.errors import DataError

RATE = 22050


@pytest.fixture(scope="module")
def synthesizer():
    return av_digits.Synthesizer()


@pytest.mark.parametrize("voice", av_digits.VOICES)
@pytest.mark.parametrize("variant", ["", "+m1", "+f5", "+croak", "+whisper"])
def test_every_accent_speaks(synthesizer, voice, variant):
    waveform = synthesizer.say("seven", voice=voice + variant)
    assert waveform.dtype == np.float32
    assert 0.2 < len(waveform) / synthesizer.sample_rate < 1.5
    assert 0.05 < np.abs(waveform).max() <= 1


def test_every_variant_is_in_the_library_and_differs_from_the_plain_voice(synthesizer):
    # espeak-ng falls back on the plain voice, without an error, for a variant that it lacks.
    def timbre(voice):
        mels = [
            audio.log_mel(audio.trim_silence(synthesizer.say("five", voice=voice)), RATE)
            for _ in range(3)
        ]
        return np.mean(mels, axis=0)

    plain = timbre("en-us")
    drift = np.abs(timbre("en-us") - plain).mean()
    for variant in av_digits.VARIANTS:
        assert np.abs(timbre(f"en-us+{variant}") - plain).mean() > 2 * drift, variant


def test_a_higher_rate_is_shorter_and_a_higher_pitch_is_higher(synthesizer):
    def pitch_of(waveform):
        middle = waveform[len(waveform) // 3 : 2 * len(waveform) // 3].astype(np.float64)
        correlation = np.correlate(middle, middle, "full")[len(middle) :]
        lags = slice(RATE // 400, RATE // 60)
        return RATE / (lags.start + np.argmax(correlation[lags]))

    slow, fast = (len(synthesizer.say("three", voice="en-us", rate=r)) for r in (120, 240))
    assert fast < 0.8 * slow
    low, high = (pitch_of(synthesizer.say("nine", voice="en-us", pitch=p)) for p in (20, 80))
    assert high > 1.3 * low


def test_the_same_calls_give_the_same_samples():
    def speak():
        synthesizer = av_digits.Synthesizer()
        return [
            synthesizer.say(word, voice=f"en-gb+{variant}")
            for variant in ("m2", "whisper", "croak", "f4")
            for word in ("one", "one", "six")
        ]

    first = speak()
    av_digits.Synthesizer().say("whatever else was said", voice="en-us+whisper")
    second = speak()
    assert not np.array_equal(first[0], first[1])  # which is why each needs its own library
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistakes_are_named(synthesizer):
    with pytest.raises(DataError, match="'xx' is not one of en-029, en-gb"):
        synthesizer.say("one", voice="xx")
    with pytest.raises(DataError, match="'m9' is not one of m1"):
        synthesizer.say("one", voice="en-us+m9")
    with pytest.raises(DataError, match="rate: 10; from 80 to 450"):
        synthesizer.say("one", voice="en-us", rate=10)
    with pytest.raises(DataError, match="pitch: 101; from 0 to 100"):
        synthesizer.say("one", voice="en-us", pitch=101)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match="pip install espeakng-loader") as caught:
        av_digits.Synthesizer()
    assert "\n" not in str(caught.value)


def test_a_library_or_data_that_cannot_be_used_are_named(monkeypatch, tmp_path):
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="no usable data"):
        av_digits.Synthesizer()
    broken = tmp_path / "libespeak-ng.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(broken))
    with pytest.raises(DataError, match="cannot be loaded"):
        av_digits.Synthesizer()


def test_importing_the_module_loads_no_speech():
    module = "rollingq_jax.data.sources.av_digits"
    code = f"import sys, {module}; print('espeakng_loader' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


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
