"""The check command, and the configurations for data of one's own."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from rollingq_jax.check import CHECK, command, describe, next_command, read_examples
from rollingq_jax.data.dataset import ArraySource, Dataset, ModalityInfo, infer_model
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import build_model
from tests.data import media_files

ROOT = Path(__file__).parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rollingq_jax.check", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def save_arrays(path):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", 40), ("test", 8)):
        for name, width in (("audio", 5), ("text", 6), ("vision", 7)):
            arrays[f"{split}/{name}"] = rng.normal(size=(count, 9, width))
        arrays[f"{split}/label"] = np.arange(count) % 4
        arrays[f"{split}/quality_text"] = -np.arange(count) / 10
    np.savez(path, **arrays)


def save_media(folder):
    lines = ["split,label,audio:audio,visual:video,image,text:string,words"]
    for number in range(10):
        media_files.write_video(folder / f"{number}.mp4", 5, audio_rate=8000)
        media_files.write_jpeg(folder / f"{number}.jpg", value=20 * number)
        (folder / f"{number}.txt").write_text("some words")
        split, label = "train" if number < 6 else "test", ["yes", "no"][number % 2]
        files = f"{number}.mp4,{number}.mp4,{number}.jpg,hello,{number}.txt"
        lines.append(f"{split},{label},{files}")
    (folder / "manifest.csv").write_text("\n".join(lines))


def test_what_is_printed(tmp_path, capsys):
    save_arrays(tmp_path / "d.npz")
    command(["check", "--path", str(tmp_path / "d.npz")])
    out = capsys.readouterr().out
    assert "train: 36 examples\nvalid: 4 examples\ntest: 8 examples\n" in out
    assert "classes: 4\n  0: train 9, valid 1, test 2\n" in out
    assert "audio: sequence [9, 5] float32, 9 tokens" in out
    assert "test: 8 of 8 examples read\n  quality of text: -0.7 to 0\n" in out


def test_a_single_table_with_groups_and_names(tmp_path, capsys, caplog):
    classes = np.array(["ant", "bee\x1b[31m", "cow"])
    arrays = {"m": np.random.default_rng(0).normal(size=(100, 3)), "group": np.arange(100) // 5}
    np.savez(tmp_path / "d.npz", label=classes[np.arange(100) % 3], **arrays)
    command(["check", "--path", str(tmp_path / "d.npz")])
    out = capsys.readouterr().out
    assert "train: 70 examples\nvalid: 10 examples\ntest: 20 examples\n" in out
    assert "\x1b" not in out and r"bee\x1b[31m: train" in out and not caplog.records
    np.savez(tmp_path / "d.npz", label=np.arange(100) % 3 + 1, **arrays)
    command(["check", "--path", str(tmp_path / "d.npz")])
    assert "class 0 never occurs; the model gets 4 outputs" in caplog.text


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["rollingq check", "--path", "a b.npz"], "rollingq train --config own_data "
         "--config.batch_size=20 '--config.data.path=a b.npz' --workdir 'runs/a b'"),
        (["check.py", "--config_json", "c.json", "--workdir", "w"],
         "python -m rollingq_jax train --config_json c.json --workdir w"),
        (["check.py", "--config", "x.py", "--config.data.path=d/mine.csv"],
         "python -m rollingq_jax train --config x.py --config.data.path=d/mine.csv "
         "--workdir runs/mine"),
    ],
)  # fmt: skip
def test_the_command_that_trains_on_it(arguments, expected):
    """As it can be pasted into a shell; a small table gets batches that it has examples for."""
    given, fields = CHECK.parse_flags(arguments)
    fields += [f"--config.data.path={given.path}"] * (given.path is not None)
    found = shlex.split(next_command(arguments[0], given, fields, 20))
    assert sorted(found) == sorted(shlex.split(expected))


def test_many_classes_and_missing_modalities():
    labels = np.arange(60, dtype=np.int32) % 30
    columns = {
        "m": np.zeros((60, 4, 4, 1), np.float32),
        "m_mask": labels > 0,
        "n": np.zeros((60, 3), np.int32),
        "label": labels,
    }
    infos = {
        "m": ModalityInfo("m", "spectrogram", (4, 4, 1)),
        "n": ModalityInfo("n", "tokens", (3,), "int32", vocab_size=9),
    }
    source = ArraySource(columns)
    dataset = Dataset({"train": source, "test": source}, infos, 30)
    lines = list(describe(dataset, {"m": {"patch": (4, 2)}}))
    assert "  ... and 10 more classes" in lines
    assert "m: spectrogram [4, 4, 1] float32, patch 4x2, 2 tokens" in lines
    assert "n: tokens [3] int32, 9 ids, 3 tokens" in lines
    assert list(read_examples(dataset, 31))[:2] == [
        "train: 31 of 60 examples read",
        "  m is missing in 2 examples",
    ]


def test_unreadable_files_are_listed_and_counted(tmp_path, capsys):
    save_media(tmp_path)
    config = {"name": "folder", "path": str(tmp_path), "image_size": 8, "modalities": ("image",)}
    dataset = load_dataset(config, seed=0)
    for number in (7, 9):
        (tmp_path / f"{number}.jpg").write_bytes(b"not an image")
    lines = []
    with pytest.raises(DataError, match="2 examples cannot be read"):
        for line in read_examples(dataset):
            lines.append(line)
    assert sum("cannot be read: image" in line and ".jpg: damaged" in line for line in lines) == 2


def test_wrong_shapes_are_found():
    source = ArraySource({"m": np.zeros((4, 3), np.float32), "label": np.zeros(4, np.int32)})
    dataset = Dataset({"train": source}, {"m": ModalityInfo("m", "vector", (5,))}, 2)
    with pytest.raises(DataError, match="4 examples"):
        assert "allowed: float32[5]" in next(iter(read_examples(dataset)))
        list(read_examples(dataset))


@pytest.mark.slow
def test_the_command_line(tmp_path):
    save_arrays(tmp_path / "d.npz")
    done = run("--config", "configs/own_data.py", f"--config.data.path={tmp_path}/d.npz", "--quick")
    assert done.returncode == 0 and done.stderr == "" and "vision: sequence" in done.stdout
    (tmp_path / "m.csv").write_text("split,label,p\n" + "train,0,a.png\n" * 30)
    np.savez(tmp_path / "one.npz", m=np.ones((30, 2)), label=np.arange(30) % 3 + 1)
    done = run("--path", tmp_path / "one.npz")  # warnings as other commands print them
    assert re.fullmatch("WARNING: train/label: .*class 0 never occurs.*\n", done.stderr)
    done = run("--path", tmp_path / "m.csv")
    assert done.returncode == 2 and done.stdout.count("missing: 'a.png'") == 20
    assert "... and 10 more missing files" in done.stdout
    assert done.stderr.count("\n") == 1 and "30 missing files" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--path", "nowhere.npz"], "nowhere.npz: no such file"),
        (["--path", ""], "data.path: not given"),
        (["--config", "configs/own_data.py", "--config.data.size=3"], "config.data.size"),
        (["--path"], "--path"),
        ([], "--config"),
    ],
)
def test_mistakes_are_one_line(arguments, words, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((ConfigError, DataError)) as caught:
        command(["check", *arguments])
    assert words in str(caught.value) and "\n" not in str(caught.value)


CONFIGS = {
    "own_data": (save_arrays, "d.npz", {}),
    "sentiment": (save_arrays, "d.npz", {}),
    "video_understanding": (save_media, "manifest.csv", {"audio": 16, "visual": 16}),
    "image_text": (save_media, "manifest.csv", {"image": 16, "text": 5}),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_build_a_model_for_own_data(tmp_path, name):
    save, file, _ = CONFIGS[name]
    save(tmp_path / file if file == "d.npz" else tmp_path)
    config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
    config.data.path = str(tmp_path / file)
    dataset = load_dataset(config.data, seed=0, encoders=config.model.encoders)
    model = build_model(infer_model(dataset, config.model.to_dict()))
    batch = next(iter(eval_batches(dataset.splits["test"], batch_size=2)))
    (logits, out), _ = jax.eval_shape(model.init_with_output, jax.random.key(0), batch)
    assert logits.shape == (2, dataset.num_classes)
    assert all(tokens.shape[1] <= 201 for tokens in out["tokens"].values())
