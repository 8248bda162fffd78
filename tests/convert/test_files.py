"""Files of tensors: three formats, and what damaged or hostile ones do."""

import hashlib
import http.server
import os
import pickle
import re
import sys
import threading
import types
import zipfile

import numpy as np
import pytest
from safetensors.numpy import save_file

from rollingq_jax import convert
from rollingq_jax.errors import DataError

TENSORS = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b/c": np.ones(2, np.float16)}


class Evil:
    """Leaves a mark when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def same(found):
    assert set(found) == set(TENSORS)
    for name, value in TENSORS.items():
        np.testing.assert_array_equal(found[name], value)
        assert isinstance(found[name], np.ndarray)


def one_line(error):
    return "\n" not in str(error.value)


def test_npz(tmp_path):
    np.savez(tmp_path / "x.npz", **TENSORS)
    same(convert.load_state_dict(tmp_path / "x.npz"))
    same(convert.load_state_dict(str(tmp_path / "x.npz")))


def test_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "x.safetensors")
    same(convert.load_state_dict(tmp_path / "x.safetensors"))


def test_bfloat16_in_npz(tmp_path):
    """NumPy's format knows no bfloat16 and keeps two raw bytes a number."""
    import ml_dtypes

    values = np.array([1.0, -2.5, 3.0], ml_dtypes.bfloat16)
    np.savez(tmp_path / "x.npz", x=values)
    found = convert.load_state_dict(tmp_path / "x.npz")["x"]
    np.testing.assert_array_equal(found.astype(np.float32), [1.0, -2.5, 3.0])


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_truncated_and_garbled_files(tmp_path, suffix):
    path = tmp_path / f"x{suffix}"
    if suffix == ".npz":
        np.savez(path, **TENSORS)
    else:
        save_file(TENSORS, path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 1, max(1, len(whole) // 40)):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cannot be read as") as error:
            convert.load_state_dict(path)
        assert one_line(error)
    rng = np.random.default_rng(0)
    path.write_bytes(rng.bytes(200))
    with pytest.raises(DataError, match="cannot be read as"):
        convert.load_state_dict(path)


def test_a_safetensors_header_that_lies(tmp_path):
    path = tmp_path / "x.safetensors"
    for header in (
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4000000000000]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}',
        b"[" * 5000,
    ):
        path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
        with pytest.raises(DataError, match="cannot be read as") as error:
            convert.load_state_dict(path)
        assert one_line(error)
    path.write_bytes((2**63).to_bytes(8, "little") + b"{}")
    with pytest.raises(DataError):
        convert.load_state_dict(path)


def test_pickles_in_an_npz_are_not_run(tmp_path):
    mark = tmp_path / "mark"
    np.savez(tmp_path / "x.npz", a=np.array([Evil(mark)], dtype=object))
    with pytest.raises(DataError, match="cannot be read as .npz"):
        convert.load_state_dict(tmp_path / "x.npz")
    (tmp_path / "y.npz").write_bytes(pickle.dumps(Evil(mark)))
    with pytest.raises(DataError, match="cannot be read as .npz"):
        convert.load_state_dict(tmp_path / "y.npz")
    assert not mark.exists()


def test_an_npz_with_something_else_inside(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("note.txt", "hello")
    with pytest.raises(DataError, match="note.txt, a bytes; allowed: arrays"):
        convert.load_state_dict(tmp_path / "x.npz")
    with zipfile.ZipFile(tmp_path / "y.npz", "w"):
        pass
    with pytest.raises(DataError, match="holds no tensors"):
        convert.load_state_dict(tmp_path / "y.npz")


def test_a_single_array_is_no_file_of_tensors(tmp_path):
    np.save(tmp_path / "x.npy", np.ones(3))
    (tmp_path / "x.npy").rename(tmp_path / "x.npz")
    with pytest.raises(DataError, match="x.npz"):
        convert.load_state_dict(tmp_path / "x.npz")


@pytest.mark.parametrize("name", ["x.pkl", "x", "x.npz.bak", "x.bin"])
def test_other_suffixes(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"suffix .*; allowed: \.npz, \.safetensors, \.pth, \.pt"):
        convert.load_state_dict(tmp_path / name)


def test_no_such_file(tmp_path):
    with pytest.raises(DataError, match="x.npz is not a file"):
        convert.load_state_dict(tmp_path / "x.npz")
    (tmp_path / "d.npz").mkdir()
    with pytest.raises(DataError, match="d.npz is not a file"):
        convert.load_state_dict(tmp_path / "d.npz")


@pytest.mark.parametrize(
    ("suffix", "module"), [(".pth", "torch"), (".pt", "torch"), (".safetensors", "safetensors")]
)
def test_a_library_that_is_not_there(tmp_path, monkeypatch, suffix, module):
    for name in (module, f"{module}.numpy"):
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / f"x{suffix}").write_bytes(b"x")
    with pytest.raises(DataError, match=f"needs the package '{module}', which is not installed"):
        convert.load_state_dict(tmp_path / f"x{suffix}")


def fake_torch(version, load):
    module = types.ModuleType("torch")
    module.__version__, module.load = version, load
    return module


def test_torch_is_only_asked_for_weights(tmp_path, monkeypatch):
    asked = []

    def load(path, **options):
        asked.append(options)
        return {"model": TENSORS, "optimizer": {"state": 1}, "acc": 0.5}

    monkeypatch.setitem(sys.modules, "torch", fake_torch("2.6.0+cu124", load))
    (tmp_path / "x.pth").write_bytes(b"x")
    same(convert.load_state_dict(tmp_path / "x.pth"))
    assert asked == [{"map_location": "cpu", "weights_only": True}]


def test_a_torch_that_could_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch("2.5.1", pytest.fail))
    (tmp_path / "x.pth").write_bytes(b"x")
    with pytest.raises(DataError, match=r"torch is 2\.5\.1; allowed: 2\.6 or later"):
        convert.load_state_dict(tmp_path / "x.pth")


def test_a_pickle_that_torch_refuses(tmp_path, monkeypatch):
    """The message does not pass on the advice to load it without safety."""

    def load(path, **options):
        raise pickle.UnpicklingError("Re-running `torch.load` with `weights_only` set to `False`")

    monkeypatch.setitem(sys.modules, "torch", fake_torch("2.8.0", load))
    (tmp_path / "x.pt").write_bytes(b"x")
    with pytest.raises(DataError, match="holds more than tensors") as error:
        convert.load_state_dict(tmp_path / "x.pt")
    assert "weights_only" not in str(error.value)


def test_real_torch_files(tmp_path):
    torch = pytest.importorskip("torch")
    state = {name: torch.tensor(value) for name, value in TENSORS.items()}
    torch.save({"model": state, "saved_epoch": 3}, tmp_path / "x.pth")
    same(convert.load_state_dict(tmp_path / "x.pth"))
    torch.save({"b": torch.ones(2, dtype=torch.bfloat16)}, tmp_path / "b.pt")
    np.testing.assert_array_equal(convert.load_state_dict(tmp_path / "b.pt")["b"], [1.0, 1.0])
    mark = tmp_path / "mark"
    torch.save({"model": {"a": Evil(mark)}}, tmp_path / "e.pth")
    (tmp_path / "p.pth").write_bytes(pickle.dumps(Evil(mark), protocol=2))
    for name in ("e.pth", "p.pth"):
        with pytest.raises(DataError):
            convert.load_state_dict(tmp_path / name)
    assert not mark.exists()


@pytest.fixture
def server(tmp_path):
    """The address of a folder that is served on this machine, and the paths that were asked for."""
    (tmp_path / "served").mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, form, *args):
            asked.append(self.path)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}", asked
        found.shutdown()


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_weights_from_an_address_are_fetched_once_and_checked(tmp_path, server, scheme):
    np.savez(tmp_path / "served" / "x.npz", **TENSORS)
    content = (tmp_path / "served" / "x.npz").read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    root, asked = (server[0] if scheme == "http" else f"file://{tmp_path}/served"), server[1]
    kept = tmp_path / "cache" / f"{digest}.npz"
    for _ in range(2):
        assert convert.fetch_weights(f"{root}/x.npz#sha256={digest}", tmp_path / "cache") == kept
        assert kept.read_bytes() == content
    assert len(asked) == (scheme == "http")
    same(convert.load_state_dict(kept))
    kept.write_bytes(b"cut")  # a damaged copy is fetched again
    assert convert.fetch_weights(f"{root}/x.npz#sha256={digest}", kept.parent) == kept
    assert kept.read_bytes() == content
    for address, words in (
        (f"{root}/x.npz#sha256={'0' * 64}", f"have sha256 {digest}; allowed: {'0' * 64}"),
        (f"{root}/nowhere.npz#sha256={digest[::-1]}", "cannot be fetched"),
        (f"{root}/x.npz", "allowed: a local path, or an address"),
        (f"{root}/x.npz#sha256={digest[:-1]}", "allowed: a local path, or an address"),
        (f"ftp://127.0.0.1/x.npz#sha256={digest}", "allowed: a local path, or an address"),
    ):
        with pytest.raises(DataError, match=re.escape(words)) as error:
            convert.fetch_weights(address, kept.parent)
        assert one_line(error)
    assert [path.name for path in kept.parent.iterdir()] == [kept.name]
