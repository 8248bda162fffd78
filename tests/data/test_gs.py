"""Paths on gs://: arrays and configurations are read there, anything else is refused in one line.

The store is a folder behind fsspec's interface, which is where etils.epath looks for gcsfs.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from rollingq_jax.data.cache import cache_root
from rollingq_jax.data.load import LOADERS, load_dataset
from rollingq_jax.errors import CheckpointError, UserError
from rollingq_jax.train.cli import TRAIN, run_command, train_command
from rollingq_jax.train.loop import load_run
from tests.data.sources import test_arrays
from tests.train.train_cases import make_arrays, tiny_config

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(tmp_path, monkeypatch):
    """The folder whose contents are at gs://."""
    folder = tmp_path / "store"
    folder.mkdir()

    class Store(DirFileSystem):
        def _join(self, path):
            return super()._join(path.removeprefix("gs://"))

    files = Store(str(folder), LocalFileSystem())
    monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", lambda name: files)
    return folder


def put(folder, arrays):
    """The same arrays as bucket/d.npz and as the folder bucket/d."""
    (folder / "bucket").mkdir()
    np.savez(folder / "bucket" / "d.npz", **arrays)
    for key, array in arrays.items():
        (folder / "bucket" / "d" / key).parent.mkdir(parents=True, exist_ok=True)
        np.save(folder / "bucket" / "d" / f"{key}.npy", array)


@pytest.mark.parametrize("name", ["d.npz", "d"])
def test_arrays_are_those_of_a_local_file(store, name):
    put(store, test_arrays.make_arrays() | {"class_names": np.array(["x", "y", "z"])})
    there, here = (
        load_dataset({"name": "arrays", "path": f"{root}bucket/{name}"}, seed=1)
        for root in ("gs://", f"{store}/")
    )
    assert there.class_names == here.class_names == ("x", "y", "z")
    assert there.modalities == here.modalities and there.splits.keys() == here.splits.keys()
    for split, source in here.splits.items():
        for index in range(len(source)):
            for key, value in source[index].items():
                np.testing.assert_array_equal(there.splits[split][index][key], value, strict=True)


def test_pickles_are_refused_there_too(store, tmp_path):
    hostile = np.array([test_arrays.Hostile(tmp_path / "bomb")] * 60, object)
    put(store, test_arrays.make_arrays() | {"train/audio": hostile})
    for name in ("d.npz", "d"):
        with pytest.raises(UserError, match="gs://bucket/d.*: 'train/audio': .*refused"):
            load_dataset({"name": "arrays", "path": f"gs://bucket/{name}"}, seed=0)
    assert not (tmp_path / "bomb").exists()


def refused(path, line):
    with pytest.raises(UserError, match=line) as caught:
        load_dataset({"name": "arrays", "path": path}, seed=0)
    assert "\n" not in str(caught.value)


def test_what_is_missing_or_damaged_is_named(store):
    put(store, test_arrays.make_arrays())
    (store / "bucket" / "empty").mkdir()
    whole = (store / "bucket" / "d.npz").read_bytes()
    (store / "bucket" / "cut.npz").write_bytes(whole[:-200])
    refused("gs://bucket/none.npz", "gs://bucket/none.npz: no such file")
    refused("gs://bucket/empty", "gs://bucket/empty: the folder holds no .npy files")
    refused("gs://bucket/cut.npz", "gs://bucket/cut.npz: damaged")


def test_without_gcsfs_the_line_says_what_to_install():
    code = (
        "import sys; sys.modules['gcsfs'] = None; from rollingq_jax.data.load import load_dataset; "
        "load_dataset({'name': 'arrays', 'path': 'gs://bucket/d.npz'}, seed=0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    line = "DataError: data.path: gs://bucket/d.npz: cannot be reached (Please install gcsfs"
    assert line in done.stderr.splitlines()[-1]


def fields_of(name):
    """A loader's `config.data` with an address where it wants a local path."""
    path = "gs://bucket/m.csv" if name == "arrays" else "gs://bucket/data"
    field = "cache_dir" if name == "av_digits" else "path"
    return {"name": name, field: path}, f"^data.{field}: '{path}'; allowed: a local path"


@pytest.mark.parametrize("name", [*LOADERS, "mnist"])
def test_other_data_are_refused_before_anything_is_written(name, tmp_path, monkeypatch):
    """Whatever the loader, a TFDS name among them."""
    monkeypatch.chdir(tmp_path)
    fields, line = fields_of(name)
    with pytest.raises(UserError, match=line):
        load_dataset(fields, seed=0)
    assert list(tmp_path.iterdir()) == []


def test_other_schemes_and_the_environment_are_refused(monkeypatch):
    refused("s3://bucket/d.npz", "^data.path: 's3://bucket/d.npz'; allowed: a local path")
    monkeypatch.setenv("ROLLINGQ_CACHE", "gs://bucket/cache")
    with pytest.raises(
        UserError, match="^environment's ROLLINGQ_CACHE: 'gs://bucket/cache'; allowed"
    ):
        cache_root()


def test_a_configuration_that_lies_there(store, tmp_path, capsys):
    put(store, make_arrays())
    config = tiny_config("gs://bucket/d.npz", epochs=2)
    (store / "bucket" / "config.json").write_text(json.dumps(config.to_dict()))
    command = ["train.py", f"--workdir={tmp_path / 'run'}"]
    found = TRAIN.parse([*command, "--config_json=gs://bucket/config.json"]).config
    assert found.to_dict() == config.to_dict()
    assert len(load_dataset(found.data, seed=0).splits["train"]) == 44
    assert run_command(train_command, [*command, "--config_json=gs://bucket/none.json"]) == 2
    line = "--config_json gs://bucket/none.json: No such file or directory; allowed: a file"
    assert capsys.readouterr().err == f"error: {line}\n" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "unknown://bucket/run"])
def test_a_workdir_that_cannot_be_reached_is_one_line(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    backend._FileSystemSpecBackend._get_filesystem.cache_clear()
    np.savez(tmp_path / "d.npz", **make_arrays())
    (tmp_path / "config.json").write_text(json.dumps(tiny_config(tmp_path / "d.npz").to_dict()))
    command = ["train.py", f"--config_json={tmp_path / 'config.json'}", f"--workdir={workdir}"]
    assert run_command(train_command, command) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: workdir is '{workdir}'; allowed: a folder that can be ")
    assert printed.count("\n") == 1
    with pytest.raises(
        CheckpointError, match=f"workdir is '{workdir}'; allowed: the folder of a run"
    ):
        load_run(workdir)
