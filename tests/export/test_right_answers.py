"""A trained run, taken out of the loop, gives the numbers of its summary: from raw data, without
the training data, in three ways. Each kind of data is one run, in the slow suite."""

import csv
import json
import subprocess
import sys
import wave

import jax
import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax.evaluate import evaluate
from rollingq_jax.export import export
from rollingq_jax.predict import predict
from rollingq_jax.train import default_config, train_and_evaluate

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_pictures")]
CLASSES = 3
COUNTS = {"train": 48, "valid": 16, "test": 24}

ALONE = """
import sys
sys.modules["rollingq_jax"] = None
import jax, jax.export, numpy as np
arrays = dict(np.load(sys.argv[2]))
function = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
probabilities, share = function.call(arrays)
np.save(sys.argv[3], probabilities)
"""


def features(rng, label, scale, offset):
    """Vectors that tell the class, in units of their own."""
    signal = np.eye(CLASSES, len(scale))[label] * 2 + rng.normal(size=(len(label), len(scale)))
    return signal * scale + offset


def skewed(rng, split, label):
    """Features of very different scales, one of them stored as float64 and one as integers."""
    audio = features(rng, label, 10.0 ** np.array([-6, -1, 0, 3]), np.array([0, 5, -2, 1e4]))
    visual = features(rng, label, 10.0 ** np.array([3, 1, 2, 2, 2]), 500.0)
    return {"audio": audio, "visual": visual.round().astype(np.int16)}


def masked(rng, split, label):
    """Three modalities; positions and whole modalities are missing, and hold anything there."""
    count = len(label)
    series = features(rng, np.repeat(label, 6), np.array([1.0, 50.0, 0.01]), 7.0)
    arrays = {
        "audio": series.reshape(count, 6, 3).astype(np.float32),
        "text": (1 + label[:, None] * 2 + rng.integers(2, size=(count, 5))).astype(np.int64),
        "visual": features(rng, label, np.array([3.0, 100.0, 1.0]), -40.0).astype(np.float32),
    }
    arrays["mask_audio"] = np.arange(6) < rng.integers(1, 7, size=(count, 1))
    arrays["mask_visual"] = rng.random(count) < 0.7
    arrays["audio"][~arrays["mask_audio"]] = np.nan
    arrays["visual"][~arrays["mask_visual"]] = 1e30
    return arrays


def pixels(rng, split, label):
    """uint8 images, and a grey one without a channel axis stored as float."""
    color = rng.integers(60, size=(len(label), 8, 8, 3)) + 60 * label[:, None, None, None]
    grey = 100.0 + 1e3 * (rng.normal(size=(len(label), 8, 8)) + label[:, None, None])
    return {"color": color.astype(np.uint8), "grey": grey.astype(np.float32)}


def make_arrays(folder, make):
    """The path of an .npz file, and the raw test arrays."""
    rng, arrays = np.random.default_rng(0), {}
    for split, count in COUNTS.items():
        label = np.arange(count) % CLASSES
        found = make(rng, split, label) | {"label": label}
        arrays |= {f"{split}/{key}": value for key, value in found.items()}
    kinds = {skewed: {"kind/visual": "vector"}, pixels: {"kind/grey": "image"}}.get(make, {})
    np.savez(folder / "data.npz", **arrays, **kinds)
    return folder / "data.npz", found


def make_media(folder):
    """A manifest of sounds, pictures and texts, and the test split's cells."""
    from PIL import Image

    rng, lines, test = np.random.default_rng(0), ["split,label,sound,picture,text"], []
    for split, count in COUNTS.items():
        for number in range(count):
            label, name = number % CLASSES, f"{split}{number}"
            time = np.arange(4000) / 8000
            tone = np.sin(2 * np.pi * 400 * (1 + label) * time) + rng.normal(size=4000)
            with wave.open(str(folder / f"{name}.wav"), "wb") as file:
                file.setnchannels(1)
                file.setsampwidth(2)
                file.setframerate(8000)
                file.writeframes((tone * 6000).astype("<i2").tobytes())
            picture = rng.integers(120, size=(20, 24, 3)) + 60 * label
            Image.fromarray(picture.astype(np.uint8)).save(folder / f"{name}.jpg")
            (folder / f"{name}.txt").write_text("abc"[label] * 3 + "xyz"[rng.integers(3)])
            lines.append(f"{split},{'uvw'[label]},{name}.wav,{name}.jpg,{name}.txt")
            if split == "test":
                test.append([label, *(folder / f"{name}{end}" for end in (".wav", ".jpg", ".txt"))])
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    names = ("label", "sound", "picture", "text")
    return folder / "manifest.csv", dict(
        zip(names, map(list, zip(*test, strict=True)), strict=True)
    )


def make_config(path):
    config = default_config()
    config.epochs, config.batch_size = 3, 16
    config.optimizer.warmup_epochs = 0.5
    config.optimizer.learning_rate = 0.05
    config.data.name, config.data.path = "arrays", str(path)
    config.model.dim, config.model.depth, config.model.num_heads = 8, 1, 2
    return config


def read_table(path):
    with open(path, newline="") as file:
        lines = list(csv.DictReader(file))
    columns = [name for name in lines[0] if name.startswith("probability/")]
    return lines, np.array([[float(line[name]) for name in columns] for line in lines])


@pytest.mark.parametrize("kind", ["skewed", "masked", "pixels", "media"])
def test_the_summarys_accuracy_comes_back_from_raw_data(kind, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    if kind == "media":
        path, test = make_media(data)
    else:
        path, test = make_arrays(data, {"skewed": skewed, "masked": masked, "pixels": pixels}[kind])
    workdir = tmp_path / "run"
    promised = train_and_evaluate(make_config(path), workdir, quiet=True)["test_accuracy"]
    assert promised > 0.5, "a run that has learned nothing shows nothing"

    evaluated = evaluate(workdir)
    _, by_evaluate = read_table(workdir / "predictions.csv")
    new = tmp_path / "new"
    if kind == "media":  # only the test files are left
        for file in data.iterdir():
            if file.name.startswith(("train", "valid")):
                file.unlink()
        lines = path.read_text().splitlines()
        kept = [lines[0], *(line for line in lines if line.startswith("test"))]
        path.write_text("\n".join(kept) + "\n")
        new = path
    else:
        path.unlink()
        np.savez(f"{new}.npz", **test)
        new = tmp_path / "new.npz"
    label = np.asarray(test["label"])

    predictor = rq.load(workdir)
    by_load = predictor(test).probabilities
    found = predict(workdir, str(new), tmp_path / "predictions.csv", quiet=True)
    lines, by_predict = read_table(tmp_path / "predictions.csv")
    export(workdir, tmp_path / "model.safetensors", stablehlo=tmp_path / "model.bin")
    by_function = run_alone(tmp_path, predictor, test)

    for probabilities in (by_load, by_predict, by_function, by_evaluate):
        assert (probabilities.argmax(-1) == label).mean() == pytest.approx(promised, abs=1e-9)
        np.testing.assert_allclose(probabilities, by_load, atol=1e-5)
    assert found["accuracy"] == evaluated["accuracy"] == pytest.approx(promised)
    assert [line["predicted"] == line["label"] for line in lines] == list(
        by_load.argmax(-1) == label
    )
    shares = [[float(v) for k, v in line.items() if k.startswith("share/")] for line in lines]
    np.testing.assert_allclose(np.sum(shares, axis=1), 1.0, atol=1e-5)
    again = evaluate(workdir, path=str(new))  # the training data are gone
    assert again["accuracy"] == pytest.approx(promised)


def run_alone(tmp_path, predictor, test):
    """The exported function's answers in a process without this package."""
    card = json.loads((tmp_path / "model.json").read_text())
    raw = predictor.read(test)
    count = len(raw[next(iter(predictor.modalities))])
    arrays = {}
    for name, form in card["inputs"].items():
        m = name.removesuffix("_mask")
        if name == m:
            arrays[name] = raw[m]
            assert arrays[name].shape[1:] == tuple(form["shape"][1:])
        else:
            given = raw.get(name, raw.get(f"mask_{m}", np.ones(count, bool)))
            wanted = (count, *form["shape"][1:])
            axes = (1,) * (len(wanted) - given.ndim)
            arrays[name] = np.broadcast_to(given.reshape(*given.shape, *axes), wanted)
    np.savez(tmp_path / "arrays.npz", **arrays)
    answer = tmp_path / "answer.npy"
    files = [str(tmp_path / "model.bin"), str(tmp_path / "arrays.npz"), str(answer)]
    subprocess.run([sys.executable, "-c", ALONE, *files], check=True, cwd=tmp_path)
    return np.load(answer)


def test_a_run_of_an_older_version_is_told_what_to_do(tmp_path):
    """Its checkpoints restore; the same command adds what was not recorded, and trains nothing."""
    path, test = make_arrays(tmp_path, skewed)
    config = make_config(path)
    workdir = tmp_path / "run"
    from rollingq_jax.train.experiment import Experiment

    identity = Experiment.identity
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Experiment,
            "identity",
            lambda self: {k: v for k, v in identity(self).items() if k != "inputs"},
        )
        summary = train_and_evaluate(config, workdir, quiet=True)
    with pytest.raises(rq.CheckpointError, match="older version, .* allowed: .*train.py"):
        rq.load(workdir)
    again = train_and_evaluate(config, workdir, quiet=True)
    assert {k: v for k, v in again.items() if k != "inputs"} == summary
    probabilities = rq.load(workdir)(test).probabilities
    assert (probabilities.argmax(-1) == test["label"]).mean() == summary["test_accuracy"]


def test_inference_needs_no_random_numbers(tmp_path):
    path, test = make_arrays(tmp_path, skewed)
    with jax.default_prng_impl("rbg"):
        summary = train_and_evaluate(make_config(path), tmp_path / "run", quiet=True)
    probabilities = rq.load(tmp_path / "run")(test).probabilities
    assert (probabilities.argmax(-1) == test["label"]).mean() == summary["test_accuracy"]
