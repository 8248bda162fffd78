"""Small real media files for the tests."""

import tracemalloc

import numpy as np
import pytest

from rollingq_jax.errors import DataError


def write_video(path, num_frames=10, size=(48, 64), fps=25, codec=None, audio_rate=None):
    """A video whose frame i is gray level 20 i (mod 256), with a 440 Hz tone if audio_rate."""
    import av

    codec = codec or ("flv1" if str(path).endswith(".flv") else "mpeg4")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps)
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        sound = None
        if audio_rate:
            name = "pcm_s16le" if str(path).endswith((".avi", ".flv")) else "aac"
            sound = container.add_stream(name, rate=audio_rate)
            sound.layout = "stereo"
        for number in range(num_frames):
            image = np.full((*size, 3), 20 * number % 256, np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
        if sound:
            seconds = num_frames / fps
            time = np.arange(int(seconds * audio_rate)) / audio_rate
            tone = (0.5 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([tone, tone]), "fltp", "stereo")
            frame.sample_rate = audio_rate
            for packet in sound.encode(frame):
                container.mux(packet)
            for packet in sound.encode():
                container.mux(packet)


def write_jpeg(path, size=(20, 30), mode="RGB", value=128):
    """A flat JPEG or PNG of one value."""
    from PIL import Image

    shape = size if mode == "L" else (*size, 3)
    Image.fromarray(np.full(shape, value, np.uint8)).save(path)


def write_wav(path, seconds=0.5, rate=16000, frequency=440.0, channels=1):
    """A sine, as 16-bit WAV or FLAC by the name."""
    import soundfile

    time = np.arange(int(seconds * rate)) / rate
    tone = 0.5 * np.sin(2 * np.pi * frequency * time)
    soundfile.write(path, np.repeat(tone[:, None], channels, axis=1), rate)


class Pipe:
    """A file to write to that cannot be sought in, as a pipe."""

    def __init__(self, path):
        self.file = open(path, "wb")

    def write(self, data):
        return self.file.write(data)

    def close(self):
        self.file.close()


def write_clip(
    path,
    num_frames=50,
    *,
    codec="mpeg4",
    sound="aac",
    audio_rate=16000,
    size=(48, 64),
    fps=25,
    pipe=False,
    format=None,
    **options,
):
    """Noise over gray level 2 i in frame i, and a tone of the same length, interleaved.

    Either track is left out with None. ``pipe``: written without seeking back, so that what is not
    known at the beginning stays open. ``options`` are the muxer's.
    """
    import av

    rng = np.random.default_rng(0)
    format = format or {"mkv": "matroska", "m4v": "mp4"}.get(*[str(path).rsplit(".", 1)[-1]] * 2)
    target = Pipe(path) if pipe else str(path)
    with av.open(target, "w", format=format, options=options) as container:
        video = tone = None
        if codec:
            video = container.add_stream(codec, rate=fps)
            video.height, video.width = size
            video.pix_fmt = "yuv420p"
        if sound:
            tone = container.add_stream(sound, rate=audio_rate)
            tone.layout = "mono"
        done = 0
        for number in range(num_frames):
            if video:
                image = np.clip(2 * number + rng.integers(0, 40, (*size, 3)), 0, 255)
                frame = av.VideoFrame.from_ndarray(image.astype(np.uint8), format="rgb24")
                container.mux(video.encode(frame))
            if tone:
                until = round((number + 1) / fps * audio_rate)
                samples = 0.5 * np.sin(2 * np.pi * 440 * np.arange(done, until) / audio_rate)
                layout = tone.format.name
                if layout.startswith("s16"):
                    samples = np.rint(32767 * samples).astype(np.int16)
                elif layout.startswith("s32"):
                    samples = np.rint((2**31 - 1) * samples).astype(np.int32)
                else:
                    samples = samples.astype(np.float32)
                frame = av.AudioFrame.from_ndarray(samples[None], layout, "mono")
                frame.sample_rate, frame.pts = audio_rate, done
                container.mux(tone.encode(frame))
                done = until
        for stream in (video, tone):
            if stream:
                container.mux(stream.encode())
    if pipe:
        target.close()


def refuses(call, *words, error=DataError):
    """The call raises the error with all the words in one line."""
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert str(word) in message, message
    return message


def cut(path, share):
    """A copy of the first part of a file."""
    other = path.with_name(f"cut{round(100 * share)}_{path.name}")
    data = path.read_bytes()
    other.write_bytes(data[: int(len(data) * share)])
    return other


def peak_of(call):
    tracemalloc.start()
    try:
        result = call()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result, peak
