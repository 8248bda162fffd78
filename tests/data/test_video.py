"""Images and video: read as a player shows them, stored and cropped, or refused in one line."""

import collections
import io
import struct
import threading
import warnings
import zlib
from fractions import Fraction

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from rollingq_jax.data import audio, video
from rollingq_jax.data.sources.media_folder import load
from rollingq_jax.data.video import decode_image, encode_jpeg, find_missing, resize_image
from rollingq_jax.errors import DataError
from tests.data import media_files
from tests.data.media_files import cut, peak_of, refuses

pytestmark = pytest.mark.filterwarnings("error")


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
    refuses(lambda: video.read_image(tmp_path / "a.jpg"), "a.jpg", "no such file")
    path = tmp_path / "cut.jpg"
    media_files.write_jpeg(path, (200, 200))
    path.write_bytes(path.read_bytes()[:300])
    refuses(lambda: video.read_image(path), path, "damaged")


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
    assert levels(np.stack(list(video.iterate_frames(path, fps=5)))) == [0, 5]
    assert levels(np.stack(list(video.iterate_frames(path, fps=12.5)))) == [0, 2, 4, 6, 8]


def test_a_short_clip_repeats_frames(tmp_path):
    path = tmp_path / "short.mp4"
    media_files.write_video(path, num_frames=2)
    assert video.evenly_spaced_frames(2, 5).tolist() == [0, 0, 1, 1, 1]
    frames = video.read_video_frames(path, 5)
    assert frames.shape[0] == 5
    assert np.array_equal(frames[0], frames[1]) and not np.array_equal(frames[1], frames[2])


def test_video_sound(tmp_path):
    path = tmp_path / "v.mp4"
    media_files.write_video(path, num_frames=25, audio_rate=22050)
    waveform, rate = video.read_video_audio(path)
    assert video.video_seconds(path) == pytest.approx(1.0, abs=0.1)
    assert rate == 22050 and waveform.dtype == np.float32 and waveform.shape[0] >= 22050
    spectrum = np.abs(np.fft.rfft(waveform[:22050]))
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_video_failures(tmp_path):
    refuses(lambda: video.read_video_frames(tmp_path / "v.mp4", 3), "no such file")
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    refuses(lambda: video.read_video_frames(empty, 3), empty, "empty")
    silent = tmp_path / "silent.mp4"
    media_files.write_video(silent)
    refuses(lambda: video.read_video_audio(silent), "no audio track")
    zero = tmp_path / "zero.flv"
    media_files.write_video(zero, num_frames=0)
    refuses(lambda: video.read_video_frames(zero, 3), "zero.flv")
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(silent.read_bytes()[:700])
    refuses(lambda: video.read_video_frames(cut, 3), "cut.mp4", "cut off")
    refuses(lambda: video.read_video_frames(silent, 0), "at least 1")


def test_a_playlist_cannot_open_other_files(tmp_path):
    media_files.write_video(tmp_path / "v.mp4")
    playlist = tmp_path / "list.mp4"
    playlist.write_text(
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{tmp_path}/v.mp4\n#EXT-X-ENDLIST\n"
    )
    refuses(lambda: video.read_video_frames(playlist), "list.mp4", "damaged or not supported")
    concat = tmp_path / "concat.mp4"
    concat.write_text(f"ffconcat version 1.0\nfile {tmp_path}/v.mp4\n")
    refuses(lambda: video.read_video_frames(concat), "concat.mp4")


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


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("p.webm", {"codec": "libvpx", "sound": "libopus", "audio_rate": 48000, "pipe": True}),
        ("only.webm", {"codec": None, "sound": "libopus", "audio_rate": 48000, "pipe": True}),
        ("p.mkv", {"pipe": True}),
        ("p.flv", {"codec": "flv1", "sound": "libmp3lame", "audio_rate": 44100, "pipe": True}),
        ("p.avi", {"sound": "pcm_s16le", "pipe": True}),
        ("frag.mp4", {"movflags": "frag_keyframe+empty_moov", "pipe": True}),
        ("live.mkv", {"live": "1"}),
    ],
)
def test_sound_of_a_video_without_a_length_is_measured(tmp_path, name, options):
    path = tmp_path / name
    media_files.write_clip(path, 50, **options)  # 2 s
    assert video.video_seconds(path) == pytest.approx(2.0, abs=0.15)
    assert video.video_seconds(path, 0.5) == pytest.approx(0.5, abs=0.01)
    if options.get("codec", True):
        assert video.count_video_frames(path) == 50
        assert video.read_video_frames(path, 3).shape == (3, 48, 64, 3)


def test_a_manifest_measures_what_the_header_leaves_out(tmp_path):
    path = tmp_path / "p.webm"
    media_files.write_clip(path, 50, codec="libvpx", sound="libopus", audio_rate=48000, pipe=True)
    rows = ["split,label,voice:audio", *(f"train,{n % 2},p.webm" for n in range(8))]
    (tmp_path / "m.csv").write_text("\n".join([*rows, "test,0,p.webm", "test,1,p.webm"]))
    config = {"path": str(tmp_path / "m.csv"), "audio_bins": 8, "audio_frames": 10}
    example = load(config | {"standardize": False}, seed=0).splits["train"][0]["voice"]
    assert (example.max(axis=0) > -60).all()  # a tone from the beginning to the end


@pytest.mark.parametrize("seconds", [0.0, -3.0, 0.05, 3600.0])
def test_a_wrong_length_in_the_header_is_not_believed(tmp_path, seconds):
    path = tmp_path / "a.mkv"
    media_files.write_clip(path, 50)
    data = path.read_bytes()
    where = data.index(b"\x44\x89\x88") + 3  # Duration, a double, in milliseconds
    assert struct.unpack(">d", data[where : where + 8])[0] == pytest.approx(2000, abs=100)
    path.write_bytes(data[:where] + struct.pack(">d", 1000 * seconds) + data[where + 8 :])
    assert video.video_seconds(path, 10) == pytest.approx(2.0, abs=0.15)
    assert video.count_video_frames(path) == 50


CONTAINERS = [
    ("a.mp4", {"movflags": "faststart"}),
    ("a.mov", {"movflags": "faststart", "codec": "libx264"}),
    ("a.avi", {"sound": "pcm_s16le"}),
    ("mp3.avi", {"sound": "libmp3lame"}),
    ("a.mkv", {}),
    ("a.webm", {"codec": "libvpx", "sound": "libopus", "audio_rate": 48000}),
    ("a.flv", {"codec": "flv1", "sound": "libmp3lame", "audio_rate": 44100}),
    ("frag.mp4", {"movflags": "frag_keyframe+default_base_moof"}),
]


@pytest.mark.parametrize(("name", "options"), CONTAINERS)
def test_a_cut_video_is_refused(tmp_path, name, options):
    path = tmp_path / name
    media_files.write_clip(path, 50, **options)
    assert video.count_video_frames(path) == 50
    assert video.read_video_frames(path).shape[0] == 50
    assert video.video_seconds(path) == pytest.approx(2.0, abs=0.15)
    with path.open("rb") as file:
        assert find_missing(file).bytes == 0
    for share in (0.5, 0.75, 0.9):
        part = cut(path, share)
        refuses(lambda p=part: video.count_video_frames(p), part, "cut off", "video are there")
        refuses(lambda p=part: video.read_video_frames(p, 3), "cut off")
        refuses(lambda p=part: list(video.iterate_frames(p, fps=1)), "cut off")
        refuses(lambda p=part: video.read_video_audio(p), "cut off", "audio are there")
        refuses(lambda p=part: video.video_seconds(p, 0.1), "cut off")


def test_the_counts_of_a_cut_video_are_named(tmp_path):
    path = tmp_path / "a.mp4"
    media_files.write_clip(path, 50, sound=None, movflags="faststart")
    data = path.read_bytes()
    where = data.index(b"stsz") + 16  # the sizes of the 50 encoded frames
    sizes = struct.unpack(">50I", data[where : where + 200])
    start = data.index(b"mdat") + 4
    path.write_bytes(data[: start + sum(sizes[:20])])
    refuses(lambda: video.read_video_frames(path, 3), "20 of 50 frames")


@pytest.mark.parametrize(("name", "options"), CONTAINERS[:-1])
def test_a_video_that_lacks_its_last_frame_is_read(tmp_path, name, options):
    path = tmp_path / name
    media_files.write_clip(path, 50, **options)
    part = cut(path, 0.985)
    assert 48 <= video.count_video_frames(part) <= 50
    assert video.read_video_frames(part, 4).shape == (4, 48, 64, 3)
    assert video.video_seconds(part) == pytest.approx(2, abs=0.15)


def test_frames_that_an_edit_list_hides_are_not_counted(tmp_path):
    import av

    path = tmp_path / "edit.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        packets = []
        for number in range(30):
            image = np.full((48, 64, 3), 8 * number, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24"))
        for packet in [*packets, *stream.encode()]:
            packet.pts, packet.dts = packet.pts - 10, packet.dts - 10
            container.mux(packet)
    shown = video.read_video_frames(path)
    assert video.count_video_frames(path) == len(shown) == 20
    levels = video.read_video_frames(path, 4).mean(axis=(1, 2, 3))
    assert np.rint(levels / 8).tolist() == [12, 17, 22, 27]


def turned(path, matrix):
    """A video whose top left quarter is white, with a display matrix (a, b, c, d)."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        image = np.zeros((48, 64, 3), np.uint8)
        image[:24, :32] = 255
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    data = path.read_bytes()
    where = data.index(b"tkhd") + 4 + 40
    one = 1 << 16
    assert struct.unpack(">9i", data[where : where + 36]) == (one, 0, 0, 0, one, 0, 0, 0, 1 << 30)
    a, b, c, d = (one * value for value in matrix)
    changed = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data[:where] + changed + data[where + 36 :])


@pytest.mark.parametrize(
    ("matrix", "shape", "corner"),
    [
        ((1, 0, 0, 1), (48, 64), "top left"),
        ((0, 1, -1, 0), (64, 48), "top right"),  # 90 degrees clockwise: a phone held upright
        ((-1, 0, 0, -1), (48, 64), "bottom right"),
        ((0, -1, 1, 0), (64, 48), "bottom left"),
        ((-1, 0, 0, 1), (48, 64), "top right"),  # mirrored: a camera that faces its owner
        ((1, 0, 0, -1), (48, 64), "bottom left"),
        ((0, 1, 1, 0), (64, 48), "top left"),
        ((0, -1, -1, 0), (64, 48), "bottom right"),
    ],
)
def test_a_turned_video_is_shown_upright(tmp_path, matrix, shape, corner, monkeypatch):
    path = tmp_path / "v.mp4"
    turned(path, matrix)
    frames = video.read_video_frames(path, 2)
    assert frames.shape == (2, *shape, 3) and video.count_video_frames(path) == 5

    def white(frame):
        h, w = frame.shape[0] // 2, frame.shape[1] // 2
        means = {
            "top left": frame[:h, :w].mean(),
            "top right": frame[:h, w:].mean(),
            "bottom left": frame[h:, :w].mean(),
            "bottom right": frame[h:, w:].mean(),
        }
        assert max(means.values()) > 240
        return max(means, key=means.get)

    assert white(frames[0]) == white(frames[1]) == corner
    monkeypatch.setattr(video, "SHORT_SIDE", 24)
    (stored,) = video.clip_from_video(path, fps=1)
    small = video.decode_image(stored)
    assert small.shape == (shape[0] // 2, shape[1] // 2, 3) and white(small) == corner


def encoded(image, format="TIFF", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def tiff(values, bits, sample_format=1, photometric=1, channels=1, order="<"):
    """A TIFF of integers or floats, made by hand."""
    height, width = values.shape[:2]
    pixels = np.ascontiguousarray(values).astype(values.dtype.newbyteorder(order)).tobytes()
    kinds = {258: bits, 262: photometric, 339: sample_format, 277: channels, 259: 1}
    entries = {256: (4, 1, width), 257: (4, 1, height), 278: (4, 1, height),
               279: (4, 1, len(pixels))}  # fmt: skip
    extra = b""
    offset = 8 + 2 + 12 * 10 + 4
    for tag, value in kinds.items():
        if channels > 1 and tag in (258, 339):
            entries[tag] = (3, channels, offset + len(extra))
            extra += struct.pack(f"{order}{channels}H", *[value] * channels)
        else:
            entries[tag] = (3, 1, value)
    entries[273] = (4, 1, offset + len(extra))
    data = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, (kind, count, value) in sorted(entries.items()):
        short = kind == 3 and count == 1
        field = struct.pack(f"{order}HH" if short else f"{order}I", *[value, 0][: 1 + short])
        data += struct.pack(f"{order}HHI", tag, kind, count) + field
    return data + struct.pack(f"{order}I", 0) + extra + pixels


SIXTEEN = np.array([[0, 256, 32768, 65535]], np.uint16)
BYTES = [0, 1, 128, 255]


@pytest.mark.parametrize("order", ["<", ">"])
def test_sixteen_bits_are_scaled(order):
    def levels(data):
        image = video.decode_image(data)
        assert (image[..., 0] == image[..., 2]).all()
        return image[0, :, 0].tolist()

    assert levels(tiff(SIXTEEN, 16, order=order)) == BYTES
    color = np.repeat(SIXTEEN[:, :, None], 3, 2)
    assert levels(tiff(color, 16, photometric=2, channels=3, order=order)) == BYTES
    if order == "<":
        assert levels(tiff(SIXTEEN, 16, photometric=0)) == [255, 254, 127, 0]  # 0 is white


def png_bytes(rows, width, height, bits, color):
    """A PNG by hand; ``rows`` are those of all pixels, each behind a filter byte."""

    def chunk(name, data):
        check = zlib.crc32(name + data)
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9))
            + chunk(b"IEND", b""))  # fmt: skip


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (4, 2), (6, 4)])
def test_sixteen_bit_png_is_scaled(color, channels):
    row = b"\0" + np.repeat(SIXTEEN[0, :, None], channels, 1).astype(">u2").tobytes()
    image = video.decode_image(png_bytes(row, 4, 1, 16, color))
    assert image.shape == (1, 4, 3) and image[0, :, 1].tolist() == BYTES


def test_floats_are_scaled_from_zero_to_one():
    values = np.array([[0, 0.5, 1, 0.25]], np.float32)
    for order in "<>":
        assert video.decode_image(tiff(values, 32, 3, order=order))[0, :, 0].tolist() == [
            0, 128, 255, 64]  # fmt: skip
    assert (video.decode_image(tiff(0 * values, 32, 3)) == 0).all()


@pytest.mark.parametrize("odd", [np.nan, np.inf, -0.5, 1.5, 255.0])
def test_floats_outside_zero_to_one_are_refused(odd):
    values = np.array([[0, odd]], np.float32)
    refuses(lambda: video.decode_image(tiff(values, 32, 3), "f.tif"), "f.tif", "[0, 1]")


@pytest.mark.parametrize(
    ("values", "bits", "sample_format", "words"),
    [
        (np.array([[0, 65535]], np.int32), 32, 2, "0 to 65535"),
        (np.array([[0, 65535]], np.uint32), 32, 1, "0 to 65535"),
        (np.array([[-5, 7]], np.int32), 32, 2, "-5 to 7"),
        (np.array([[-5, 7]], np.int16), 16, 2, "-5 to 7"),
        (np.array([[-5, 7]], np.int8), 8, 2, "-5 to 7"),
    ],
)
def test_integers_without_a_meaning_are_refused(values, bits, sample_format, words):
    data = tiff(values, bits, sample_format)
    refuses(lambda: video.decode_image(data, "i.tif"), "i.tif", words, "8 or 16 bits")


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "PA", "RGB", "RGBA", "CMYK", "YCbCr"])
def test_other_modes_become_rgb(mode):
    from PIL import Image

    white = Image.new("RGBA", (4, 3), "white").convert("RGB").convert(mode if mode != "PA" else "P")
    white = white.convert("PA") if mode == "PA" else white
    format = {"CMYK": "TIFF", "PA": "TIFF", "YCbCr": "JPEG"}.get(mode, "PNG")
    image = video.decode_image(encoded(white, format))
    assert image.shape == (3, 4, 3) and image.min() >= 254


def test_of_several_pages_the_first_is_taken():
    from PIL import Image

    pages = [Image.new("RGB", (4, 3), color) for color in ("red", "blue")]
    for format in ("TIFF", "GIF", "PNG", "WEBP"):
        data = encoded(pages[0], format, save_all=True, append_images=pages[1:])
        assert video.decode_image(data)[0, 0].argmax() == 0


def test_of_a_long_video_only_the_sound_in_use_is_decoded(tmp_path):
    path = tmp_path / "long.mkv"
    media_files.write_clip(path, 1500, codec=None, sound="pcm_s16le", audio_rate=16000)
    (waveform, rate), peak = peak_of(lambda: video.read_video_audio(path, 2.0))
    assert rate == 16000 and len(waveform) == 32001 and peak < 2e6
    assert len(video.read_video_audio(path)[0]) == 960_000


def test_an_image_that_would_fill_the_memory_is_refused(tmp_path):
    path = tmp_path / "bomb.png"
    for side in (9000, 13000, 60000):
        # What is behind the header does not matter: it is not decoded.
        path.write_bytes(png_bytes(bytes(1000), side, side, 8, 6))
        _, peak = peak_of(
            lambda s=side: refuses(
                lambda: video.read_image(path), f"{s * s:,} pixels", "67,108,864"
            )
        )
        assert peak < 1e6


def test_a_large_photograph_is_read_at_half_its_size(tmp_path):
    from PIL import Image

    path = tmp_path / "a.jpg"
    Image.new("L", (10000, 8000), 77).save(path, quality=20)  # 80 million pixels
    image = video.read_image(path)
    assert image.shape == (4000, 5000, 3) and abs(int(image[0, 0, 0]) - 77) <= 1


def test_a_video_of_huge_frames_is_refused(tmp_path):
    import av

    path = tmp_path / "huge.avi"
    rows = b"".join(b"\0" + bytes(20) for _ in range(10))
    with av.open(str(path), "w") as container:
        stream = container.add_stream("png", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16000, 16000, "rgb24"
        packet = av.Packet(png_bytes(rows, 16000, 16000, 8, 2))
        packet.stream, packet.pts, packet.dts, packet.time_base = stream, 0, 0, Fraction(1, 25)
        container.mux(packet)
    for reader in (video.count_video_frames, video.read_video_frames):
        refuses(lambda r=reader: r(path), path, "more than 67,108,864 pixels")


def test_a_video_whose_end_was_never_written_is_refused(tmp_path):
    for name, options in (
        ("a.mkv", {}),
        ("a.avi", {"sound": "pcm_s16le"}),
        ("a.mp4", {"movflags": "faststart"}),
    ):
        path = tmp_path / name
        media_files.write_clip(path, 50, **options)
        data = path.read_bytes()
        assert len(data) > 10_000
        path.write_bytes(data[: len(data) // 2].ljust(len(data), b"\0"))
        refuses(lambda p=path: video.read_video_frames(p, 3), path)
        refuses(lambda p=path: video.read_video_audio(p), path)


def test_a_video_that_ends_in_silence_is_whole(tmp_path):
    import av

    path = tmp_path / "silence.mkv"
    with av.open(str(path), "w", format="matroska", options={"live": "1"}) as container:
        stream = container.add_stream("pcm_s16le", rate=16000)
        stream.layout = "mono"
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.int16), "s16", "mono")
        silence.sample_rate, silence.pts = 16000, 0
        container.mux(stream.encode(silence))
        container.mux(stream.encode())
    assert len(video.read_video_audio(path)[0]) == 16000


def test_what_pillow_warns_of_stays_quiet_in_threads():
    from PIL import Image

    palette = Image.new("P", (8, 8))
    data = encoded(palette, "PNG", transparency=bytes(range(256)))
    before = list(warnings.filters)
    failures = []

    def decode():
        try:
            for _ in range(20):
                video.decode_image(data)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=decode) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and warnings.filters == before


def rng(seed=0):
    return np.random.default_rng(seed)


def gradient(height=40, width=60, offset=0):
    """A smooth image whose red grows to the right and green downwards."""
    x = np.linspace(0, 200, width)[None].repeat(height, 0)
    y = np.linspace(0, 200, height)[:, None].repeat(width, 1)
    return np.stack([x, y, np.full_like(x, offset)], axis=-1).astype(np.uint8)


def jpeg(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "expected"),
    # Upstream's 1-based frames are 1, 3, 5 of 7; 1, 4, 7 of 9 and 10; 2, 6, 10 of 12, where
    # its name for frame 10 does not exist. Up to 6 frames it takes frame 1 three times.
    [
        (7, [0, 2, 4]),
        (9, [0, 3, 6]),
        (10, [0, 3, 6]),
        (12, [1, 5, 9]),
        (30, [4, 14, 24]),
        (6, [0, 2, 4]),
        (3, [0, 1, 2]),
        (2, [0, 1, 1]),
        (1, [0, 0, 0]),
    ],
)
def test_segment_frames_in_evaluation(count, expected):
    assert video.segment_frames(count, 3).tolist() == expected


@pytest.mark.parametrize("count", [3, 4, 10, 12, 31])
def test_segment_frames_in_training(count):
    draws = np.array([video.segment_frames(count, 3, rng(seed)) for seed in range(400)])
    segment = count // 3
    for i in range(3):
        assert set(draws[:, i]) == set(range(i * segment, (i + 1) * segment))


def test_random_frames_are_ascending_and_uniform():
    draws = np.array([video.random_frames(5, 3, rng(seed)) for seed in range(2000)])
    assert (np.diff(draws, axis=1) >= 0).all()
    counts = np.bincount(draws.ravel(), minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), 0.2, atol=0.03)


@pytest.mark.parametrize("pick", [video.random_frames, video.segment_frames])
def test_a_clip_without_frames(pick):
    with pytest.raises(DataError, match="without frames"):
        pick(0, 3, rng())


def test_crop_boxes_fit_and_cover_the_range():
    width, height = 341, 256
    boxes = [video.random_crop_box(width, height, rng(seed)) for seed in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    areas = np.array([(r - x) * (b - y) for x, y, r, b in boxes]) / (width * height)
    ratios = np.array([(r - x) / (b - y) for x, y, r, b in boxes])
    assert 0.07 < areas.min() < 0.12 and 0.9 < areas.max() <= 1.0
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.35


def test_crop_box_of_an_image_that_no_draw_fits():
    assert video.random_crop_box(1000, 10, rng()) == (493, 0, 506, 10)
    assert video.random_crop_box(10, 1000, rng()) == (0, 493, 10, 506)


def clip(number):
    return {"visual": [jpeg(gradient(offset=10 * i)) for i in range(number)], "label": np.int32(1)}


def test_evaluation_takes_whole_frames():
    example = clip(5)
    result = video.EvalFrames("visual", 3, 24).map(example)
    assert result["visual"].shape == (3, 24, 24, 3) and result["visual"].dtype == np.uint8
    assert result["label"] == 1 and isinstance(example["visual"], list)
    for frame, index in zip(result["visual"], [0, 2, 4], strict=True):
        whole = resize_image(decode_image(example["visual"][index]), (24, 24))
        np.testing.assert_array_equal(frame, whole)


@pytest.mark.parametrize("count", [1, 2])
def test_short_clips_repeat_frames(count):
    result = video.EvalFrames("visual", 3, 16).map(clip(count))["visual"]
    assert result.shape == (3, 16, 16, 3)
    assert len({frame.tobytes() for frame in result}) == count


def test_training_crops_all_frames_of_a_clip_alike():
    """Frames differ in blue alone, so red and green show the crop."""
    transform = video.TrainFrames("visual", 3, 32)
    same = {"visual": [jpeg(gradient())] * 4}
    seen = []
    for seed in range(30):
        clip_frames = transform.random_map(same, rng(seed))["visual"]
        assert clip_frames.shape == (3, 32, 32, 3) and clip_frames.dtype == np.uint8
        np.testing.assert_array_equal(clip_frames[0], clip_frames[1])
        np.testing.assert_array_equal(clip_frames[0], clip_frames[2])
        seen.append(clip_frames[0])
    flipped = [int(image[:, 0, 0].mean()) > int(image[:, -1, 0].mean()) for image in seen]
    assert 5 < sum(flipped) < 25
    assert len({image.tobytes() for image in seen}) == 30


def test_training_crops_each_frame_by_itself_where_asked():
    transform = video.TrainFrames("visual", 3, 16, crop_per="frame")
    same = {"visual": [jpeg(gradient())] * 4}
    frames = transform.random_map(same, rng(0))["visual"]
    assert frames.shape == (3, 16, 16, 3) and len({frame.tobytes() for frame in frames}) == 3


def test_training_crop_is_the_box_that_was_drawn():
    image = gradient()
    data = jpeg(image)
    box, generator = None, rng(3)
    video.random_frames(1, 2, generator)
    flip = generator.random() < 0.5
    box = video.random_crop_box(60, 40, generator)
    transform = video.TrainFrames("visual", 2, 20)
    clip_frames = transform.random_map({"visual": [data]}, rng(3))["visual"]
    left, top, right, bottom = box
    expected = resize_image(decode_image(data)[top:bottom, left:right], (20, 20))
    expected = expected[:, ::-1] if flip else expected
    # Pillow filters with pixels outside of the box where there are some: only borders differ.
    np.testing.assert_allclose(
        clip_frames[0, 2:-2, 2:-2].astype(int), expected[2:-2, 2:-2].astype(int), atol=3
    )


def test_training_draws_depend_on_the_generator_alone():
    transform = video.TrainFrames("visual", 3, 16)
    first = transform.random_map(clip(6), rng(1))["visual"]
    np.testing.assert_array_equal(first, transform.random_map(clip(6), rng(1))["visual"])
    assert isinstance(transform, grain.transforms.RandomMap)


def test_training_uses_every_frame_in_time():
    transform = video.TrainFrames("visual", 1, 8)
    example = clip(4)
    blues = collections.Counter(
        int(round(transform.random_map(example, rng(seed))["visual"][0, :, :, 2].mean() / 10))
        for seed in range(200)
    )
    assert set(blues) == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_grey_and_cmyk_jpegs_become_rgb(mode):
    image = Image.fromarray(gradient()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    clip_frames = video.decode_frames([buffer.getvalue()], np.array([0]), 16)
    assert clip_frames.shape == (1, 16, 16, 3)
    if mode == "L":
        np.testing.assert_array_equal(clip_frames[..., 0], clip_frames[..., 2])
    else:
        expected = resize_image(gradient(), (16, 16)).astype(int)
        np.testing.assert_allclose(clip_frames[0].astype(int), expected, atol=12)


def test_grey_frames_equal_their_rgb_copies():
    gray = gradient()[:, :, 0]
    box = (5, 3, 40, 33)
    data = jpeg(gray)
    rgb = decode_image(data)
    expected = Image.fromarray(rgb).resize((16, 16), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(
        video.decode_frames([data], np.array([0]), 16, lambda w, h: box)[0], np.asarray(expected)
    )


def test_stored_frames_have_short_side_256():
    stored = video.stored_jpeg(jpeg(gradient(360, 480)))
    assert decode_image(stored).shape == (256, 341, 3)
    stored = video.stored_jpeg(jpeg(gradient(480, 360)))
    assert decode_image(stored).shape == (341, 256, 3)


def test_small_jpegs_are_stored_byte_for_byte():
    data = jpeg(gradient(40, 60))
    assert video.stored_jpeg(data) is data
    gray = jpeg(gradient()[:, :, 0])
    assert video.stored_jpeg(gray) is gray
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, format="PNG")
    stored = video.stored_jpeg(buffer.getvalue())
    assert stored[:2] == b"\xff\xd8"


def test_turned_photographs_are_stored_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    stored = video.stored_jpeg(jpeg(gradient(40, 60), exif=exif))
    assert decode_image(stored).shape == (60, 40, 3)
    assert not Image.open(io.BytesIO(stored)).getexif()


def test_damaged_frames_are_named():
    data = encode_jpeg(gradient())
    with pytest.raises(DataError, match="00001.jpg"):
        video.stored_clip([("00000.jpg", data), ("00001.jpg", data[:200])])
    with pytest.raises(DataError, match="40 x 60|60 x 40"):
        video.stored_clip([("a", data), ("b", encode_jpeg(gradient(60, 40)))])
    with pytest.raises(DataError, match="without frames"):
        video.stored_clip([])


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 100, 1):
        (tmp_path / f"frame_{number}.jpg").write_bytes(jpeg(gradient(offset=2 * number)))
    (tmp_path / "notes.txt").write_text("x")
    stored = video.clip_from_folder(tmp_path)
    blues = [decode_image(data)[:, :, 2].mean() for data in stored]
    np.testing.assert_allclose(blues, [2, 18, 20, 200], atol=1)


def test_evenly_spaced_is_the_evaluation_default():
    assert video.EvalFrames("visual", 3, 8).pick is video.evenly_spaced_frames
