"""Small real media files for the tests."""

import numpy as np


def write_video(path, num_frames=10, size=(48, 64), fps=25, codec=None, audio_rate=None):
    """A video whose frame i is grey level 20 i (mod 256), with a 440 Hz tone if audio_rate."""
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
