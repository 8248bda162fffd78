"""Media as people have them on disk: read as a player would, or refused in one line."""

import io
import struct
import threading
import tracemalloc
import warnings
import zlib
from fractions import Fraction

import media_files
import numpy as np
import pytest

from rollingq_jax.data import audio, video
from rollingq_jax.data.audio import MAX_RATE, MIN_RATE
from rollingq_jax.data.reading import check_lfs_pointer
from rollingq_jax.data.sources.media_folder import MediaSizes, load, read_value
from rollingq_jax.data.video import find_missing
from rollingq_jax.errors import DataError

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\nsize 123456\n"
)


@pytest.fixture(autouse=True)
def no_warnings():
    """Whatever a decoder warns of is an error here."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def refuses(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    for word in words:
        assert str(word) in message, message


def cut(path, share):
    """A copy of the first part of a file."""
    other = path.with_name(f"cut{round(100 * share)}_{path.name}")
    data = path.read_bytes()
    other.write_bytes(data[: int(len(data) * share)])
    return other


# Lengths that are not in the header, or wrong.


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


# Files that were cut off.


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
        refuses(lambda p=part: video.read_video_frames(p, fps=1), "cut off")
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


# Videos that are turned.


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
def test_a_turned_video_is_shown_upright(tmp_path, matrix, shape, corner):
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
    (stored,) = video.clip_from_video(path, fps=1, short_side=24)
    small = video.decode_image(stored)
    assert small.shape == (shape[0] // 2, shape[1] // 2, 3) and white(small) == corner


# Images whose numbers are not bytes.


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


# What is no media file at all.

IMPOSTORS = [
    (POINTER, "a Git LFS pointer: run git lfs pull"),
    (b"", "the file is empty"),
    (b"\n<!DOCTYPE html>\n<html><body>404 Not Found", "an HTML page"),
    (b"\xef\xbb\xbf<html lang=en>", "an HTML page"),
    (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "an XML document"),
    (b'{"message": "rate limit exceeded"}', "JSON text"),
    (b"/annex/objects/SHA256E-s12--0123.jpg\n", "run git annex get"),
    (b"../.git/annex/objects/xx/yy/SHA256E-s12--0123.jpg", "run git annex get"),
    (b"PK\x03\x04" + b"0" * 60, "a ZIP archive"),
    (bytes(5000), "never written"),
]


@pytest.mark.parametrize(("content", "words"), IMPOSTORS, ids=lambda value: str(value)[:24])
def test_impostors_are_named(tmp_path, content, words):
    for name, reader in {
        "a.wav": audio.read_audio,
        "b.flac": audio.sound_seconds,
        "c.jpg": video.read_image,
        "d.mp4": video.read_video_frames,
        "e.flv": video.read_video_audio,
        "f.webm": video.video_seconds,
    }.items():
        path = tmp_path / name
        path.write_bytes(content)
        refuses(lambda p=path, r=reader: r(p), path, words)
    refuses(lambda: video.decode_image(content, "frame 3"), "frame 3", words)


def test_a_telephones_picture_under_another_name():
    heic = b"\0\0\0\x18ftypheic" + bytes(40)
    refuses(lambda: video.decode_image(heic, "a.jpg"), "a.jpg", "HEIC", "convert it to JPEG")


def test_a_pointer_in_place_of_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(POINTER)
    for length in (1, 500):
        refuses(lambda n=length: read_value(path, "text", MediaSizes(text_length=n)),
                path, "run git lfs pull")  # fmt: skip
    path.write_bytes(b"version 2 of the text")
    assert (read_value(path, "text", MediaSizes(text_length=4)) > 0).all()


def test_pointers_can_be_told_by_others(tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(POINTER)
    refuses(lambda: check_lfs_pointer(path), path, "run git lfs pull")
    refuses(lambda: check_lfs_pointer(POINTER, "y.csv"), "y.csv", "run git lfs pull")
    check_lfs_pointer(b"PK\x03\x04", "x.npz")
    check_lfs_pointer(tmp_path / "none.npz")


def test_a_link_to_nowhere_is_named(tmp_path):
    path = tmp_path / "a.jpg"
    path.symlink_to(tmp_path / "gone.jpg")
    refuses(lambda: video.read_image(path), path, "link to a file that is not there")


# Numbers in a header that cost time and memory.


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


def peak_of(call):
    tracemalloc.start()
    try:
        result = call()
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return result, peak


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
