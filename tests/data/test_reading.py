"""What stands for a media file and is none is named in one line."""

import pytest

from rollingq_jax.data import audio, video
from rollingq_jax.data.sources.media_folder import MediaSizes, read_value
from rollingq_jax.files import check_lfs_pointer
from tests.data.media_files import refuses

pytestmark = pytest.mark.filterwarnings("error")


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\nsize 123456\n"
)
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
