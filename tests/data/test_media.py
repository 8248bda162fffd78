"""Media readers: values against what was written, one clear line for each kind of damage."""

import io
import struct

import media_files
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax.data import audio, video
from rollingq_jax.errors import DataError


def fails_clearly(call, *words):
    """The call raises DataError with all the words in one line."""
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    for word in words:
        assert str(word) in message, message
    return message


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
    fails_clearly(lambda: audio.read_audio(path), path, "truncated WAV", "4956 of 16000")


def test_wav_of_unknown_length_is_read(tmp_path):
    path = tmp_path / "pipe.wav"
    media_files.write_wav(path, seconds=0.1)
    data = path.read_bytes()
    where = data.index(b"data") + 4
    path.write_bytes(data[:where] + struct.pack("<I", 0xFFFFFFFF) + data[where + 4 :])
    assert audio.read_audio(path)[0].shape == (1600,)


def test_sound_failures(tmp_path):
    fails_clearly(lambda: audio.read_audio(tmp_path / "none.wav"), "none.wav", "no such file")
    fails_clearly(lambda: audio.read_audio(tmp_path), "is a folder")
    empty = tmp_path / "empty.wav"
    media_files.write_wav(empty, seconds=0)
    fails_clearly(lambda: audio.read_audio(empty), "no samples")
    flac = tmp_path / "cut.flac"
    media_files.write_wav(flac)
    flac.write_bytes(flac.read_bytes()[:500])
    fails_clearly(lambda: audio.read_audio(flac), "cut.flac", "damaged")
    nan = tmp_path / "nan.wav"
    import soundfile

    soundfile.write(nan, np.full(10, np.nan, np.float32), 8000, subtype="FLOAT")
    fails_clearly(lambda: audio.read_audio(nan), "NaN")


def test_resampling_keeps_a_tone():
    time = np.arange(8000) / 8000
    tone = np.sin(2 * np.pi * 100 * time).astype(np.float32)
    resampled = audio.resample(tone, 8000, 11025)
    assert resampled.shape == (11025,) and resampled.dtype == np.float32
    expected = np.sin(2 * np.pi * 100 * np.arange(11025) / 11025)
    np.testing.assert_allclose(resampled[500:-500], expected[500:-500], atol=2e-3)
    assert audio.resample(tone, 8000, 8000).shape == (8000,)
    fails_clearly(lambda: audio.resample(tone, 0, 8000), "positive")


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_images_become_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    media_files.write_jpeg(path, (20, 30), mode)
    image = video.read_image(path)
    assert (image.shape, image.dtype) == ((20, 30, 3), np.uint8)
    assert np.abs(image.astype(int) - 128).max() <= 1


def test_sixteen_bit_grey_is_scaled():
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 5), 128 * 256, np.uint16)).save(buffer, format="PNG")
    image = video.decode_image(buffer.getvalue())
    assert image.shape == (4, 5, 3) and (image == 128).all()


def test_camera_orientation_is_applied():
    from PIL import Image

    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees
    Image.fromarray(np.zeros((10, 20, 3), np.uint8)).save(buffer, format="JPEG", exif=exif)
    assert video.decode_image(buffer.getvalue()).shape == (20, 10, 3)


def test_image_failures(tmp_path):
    fails_clearly(lambda: video.read_image(tmp_path / "a.jpg"), "a.jpg", "no such file")
    path = tmp_path / "cut.jpg"
    media_files.write_jpeg(path, (200, 200))
    path.write_bytes(path.read_bytes()[:300])
    fails_clearly(lambda: video.read_image(path), path, "damaged")


def test_resizing():
    image = np.zeros((40, 60, 3), np.uint8)
    assert video.resize_short_side(image, 20).shape == (20, 30, 3)
    assert video.resize_image(image, (8, 9)).shape == (8, 9, 3)
    assert video.resize_image(image, (40, 60)) is image
    decoded = video.decode_image(video.encode_jpeg(np.full((16, 16, 3), 77, np.uint8)))
    assert np.abs(decoded.astype(int) - 77).max() <= 1


@pytest.mark.parametrize("suffix", ["mp4", "flv", "avi"])
def test_video_frames(tmp_path, suffix):
    path = tmp_path / f"v.{suffix}"
    media_files.write_video(path, num_frames=10)
    assert video.count_video_frames(path) == 10

    def levels(frames):
        return np.rint(frames.mean(axis=(1, 2, 3)) / 20).astype(int).tolist()

    every = video.read_video_frames(path)
    assert (every.shape, every.dtype) == ((10, 48, 64, 3), np.uint8)
    assert levels(every) == list(range(10))
    assert levels(video.read_video_frames(path, 3)) == [1, 5, 8]
    assert levels(video.read_video_frames(path, indices=[0, 4, 4, 7])) == [0, 4, 4, 7]
    assert video.read_video_frames(path, 2, short_side=24).shape == (2, 24, 32, 3)
    assert levels(video.read_video_frames(path, fps=5)) == [0, 5]
    assert levels(video.read_video_frames(path, fps=12.5)) == [0, 2, 4, 6, 8]


def test_a_short_clip_repeats_frames(tmp_path):
    path = tmp_path / "short.mp4"
    media_files.write_video(path, num_frames=2)
    assert video.evenly_spaced_frames(2, 5).tolist() == [0, 0, 1, 1, 1]
    frames = video.read_video_frames(path, 5)
    assert frames.shape[0] == 5
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[1], frames[2])
    assert video.read_video_frames(path, indices=[0, 9, 12]).shape[0] == 3


def test_video_sound(tmp_path):
    path = tmp_path / "v.mp4"
    media_files.write_video(path, num_frames=25, audio_rate=22050)
    waveform, rate = video.read_video_audio(path)
    assert video.video_seconds(path) == pytest.approx(1.0, abs=0.1)
    assert rate == 22050 and waveform.dtype == np.float32 and waveform.shape[0] >= 22050
    spectrum = np.abs(np.fft.rfft(waveform[:22050]))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_video_failures(tmp_path):
    fails_clearly(lambda: video.read_video_frames(tmp_path / "v.mp4", 3), "no such file")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    fails_clearly(lambda: video.read_video_frames(empty, 3), empty, "empty")
    silent = tmp_path / "silent.mp4"
    media_files.write_video(silent)
    fails_clearly(lambda: video.read_video_audio(silent), "no audio track")
    zero = tmp_path / "zero.flv"
    media_files.write_video(zero, num_frames=0)
    fails_clearly(lambda: video.read_video_frames(zero, 3), "zero.flv")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(silent.read_bytes()[:700])
    fails_clearly(lambda: video.read_video_frames(cut, 3), "cut.mp4", "cut off")
    fails_clearly(lambda: video.read_video_frames(silent, 3, fps=1.0), "only one of")
    fails_clearly(lambda: video.read_video_frames(silent, indices=[3, 1]), "ascending")
    fails_clearly(lambda: video.read_video_frames(silent, 0), "at least 1")


def test_a_playlist_cannot_open_other_files(tmp_path):
    media_files.write_video(tmp_path / "v.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/v.mp4\n#EXT-X-ENDLIST\n"
    )
    fails_clearly(lambda: video.read_video_frames(playlist), "list.mp4", "damaged or not supported")
    concat = tmp_path / "concat.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile {tmp_path}/v.mp4\n")
    fails_clearly(lambda: video.read_video_frames(concat), "concat.mp4")


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300), prefix=st.sampled_from(["", "wav", "mp4", "jpg", "flv"]))
def test_any_bytes_raise_only_data_errors(tmp_path_factory, data, prefix):
    folder = tmp_path_factory.getbasetemp()
    good = folder / f"good.{prefix}"
    if prefix and not good.exists():
        writers = {"wav": media_files.write_wav, "jpg": media_files.write_jpeg}
        writers.get(prefix, media_files.write_video)(good)
    start = good.read_bytes()[:60] if prefix else b""
    path = folder / "fuzzed"
    path.write_bytes(start + data)
    readers = (
        audio.read_audio,
        audio.sound_seconds,
        video.read_image,
        video.read_video_frames,
        video.read_video_audio,
    )
    for reader in readers:
        try:
            reader(path)
        except DataError as error:
            assert "\n" not in str(error)
