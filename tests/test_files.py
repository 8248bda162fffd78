"""Files are whole or absent, whatever happens while they are written."""

import errno

import pytest
from etils import epath

from rollingq_jax.files import read_json, write_whole
from tests.train.train_cases import files


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, "old")

    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:1])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(epath.Path(path)), "write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        write_whole(path, "new")
    assert files(tmp_path).keys() == {"config.json"} and path.read_text() == "old"


def test_text_and_bytes_read_back(tmp_path):
    write_whole(tmp_path / "a.json", '{"a": "\u00e9"}')
    assert read_json(tmp_path / "a.json") == {"a": "\u00e9"}
    write_whole(tmp_path / "a.json", b"\xff{")
    assert (tmp_path / "a.json").read_bytes() == b"\xff{"
    assert read_json(tmp_path / "a.json") is None and read_json(tmp_path / "b.json") is None
