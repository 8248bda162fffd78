"""A Hugging Face data set saved here and read from disk."""

import io
import sys

import numpy as np
import pytest
from ml_collections import ConfigDict

from rollingq_jax.data.dataset import groups_of, ids_of, labels_of
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.new_data import open_new_data
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.preprocessing import input_spec
from rollingq_jax.data.video import encode_jpeg
from rollingq_jax.errors import ConfigError, DataError

FEATURES = "picture=img, sound=snd, words=txt, ids=ids, table=mat, steps=steps, label=label"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    import soundfile

    folder, rows = tmp_path_factory.mktemp("hub"), []
    for number in range(40):
        wave = io.BytesIO()
        tone = np.sin(np.arange(800 + 40 * (number % 3)) / (2 + number % 2))
        soundfile.write(wave, tone, 8000, format="WAV")
        pixels = np.full((10, 12, 3), number, np.uint8)
        rows.append(
            {
                "img": {"bytes": encode_jpeg(pixels), "path": None},
                "snd": {"bytes": wave.getvalue(), "path": "x.wav"},
                "txt": None if number == 3 else f"no. {number}",
                "ids": list(range(1, 2 + number % 4)),
                "mat": np.full((2, 3), number).tolist(),
                "steps": [[float(number)] * 2] * (1 + number % 3),
                "label": number % 2,
                "speaker": f"s{number // 4}",
                "number": number,
            }
        )
    form = datasets.Features(
        {
            "img": datasets.Image(),
            "snd": {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
            "txt": datasets.Value("string"),
            "ids": datasets.List(datasets.Value("int64")),
            "mat": datasets.Array2D((2, 3), "float32"),
            "steps": datasets.List(datasets.List(datasets.Value("float32"))),
            "label": datasets.ClassLabel(names=["cat", "dog"]),
            "speaker": datasets.Value("string"),
            "number": datasets.Value("int64"),
        }
    )
    whole = datasets.Dataset.from_list(rows, features=form)
    whole = whole.cast_column("snd", datasets.Audio(decode=False))  # encoding one needs PyTorch
    parts = {"train": whole.select(range(32)), "test": whole.select(range(32, 40))}
    datasets.DatasetDict(parts).save_to_disk(str(folder / "both"))
    whole.save_to_disk(str(folder / "one"))
    return folder


def read(folder, features=FEATURES, **fields):
    config = {"name": "huggingface", "path": str(folder), "features": features, **fields}
    return load_dataset(config, seed=0)


SIZES = {"image_size": 8, "audio_bins": 6, "audio_frames": 5, "audio_rate": 8000}
SIZES |= {"sequence_length": 3, "vocab_size": 9}


def test_features_become_modalities(saved):
    data = read(saved / "both", **SIZES)
    assert {m: (i.kind, i.shape, i.dtype) for m, i in data.modalities.items()} == {
        "ids": ("tokens", (3,), "int32"),
        "picture": ("image", (8, 8, 3), "uint8"),
        "sound": ("spectrogram", (6, 5, 1), "float32"),
        "steps": ("sequence", (3, 2), "float32"),
        "table": ("sequence", (2, 3), "float32"),
        "words": ("tokens", (6,), "int32"),
    }
    assert data.class_names == ("cat", "dog")
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [28, 4, 8]
    batch = next(iter(eval_batches(data.splits["test"], batch_size=8)))
    numbers = np.arange(32, 40)
    np.testing.assert_array_equal(labels_of(data.splits["test"]), numbers % 2)
    np.testing.assert_allclose(batch["picture"][:, 0, 0, 0], numbers, atol=2)
    np.testing.assert_array_equal(batch["steps_mask"].sum(axis=1), 1 + numbers % 3)
    np.testing.assert_array_equal((batch["ids"] > 0).sum(axis=1), np.minimum(1 + numbers % 4, 3))
    assert bytes((batch["words"][0] - 1).astype(np.uint8)) == b"no. 32"


def test_one_table_is_divided_with_groups_whole_and_gaps_masked(saved):
    features = "words=txt, label=label, group=speaker, id=number"
    data = read(saved / "one", features, text_length=4)
    groups = [set(groups_of(data.splits[s]).tolist()) for s in ("train", "valid", "test")]
    assert not groups[0] & groups[1] and not groups[0] & groups[2] and all(groups)
    masks = {}
    for source in data.splits.values():
        for place, number in enumerate(ids_of(source).tolist()):
            masks[number] = bool(source[place]["words_mask"])
    assert [number for number, there in masks.items() if not there] == [3] and len(masks) == 40


def test_what_was_measured_goes_with_the_model(saved, tmp_path):
    features = "words=txt, picture=img, label=label"
    inputs = input_spec(read(saved / "both", features, **SIZES, text_length=4))
    config = ConfigDict({"name": "huggingface", "features": features, **SIZES})
    other = open_new_data(str(saved / "both"), config, inputs, ["picture", "words"])
    assert other.source[0]["words"].shape == (4,) and other.labels[:2] == ["cat", "dog"]
    (tmp_path / "new.csv").write_text("words:string,label\nno. 32,cat\n")
    files = open_new_data(str(tmp_path / "new.csv"), config, inputs, ["picture", "words"])
    np.testing.assert_array_equal(files.source[0]["words"], other.source[0]["words"])


@pytest.mark.parametrize(
    ("features", "error", "words"),
    [
        ("", ConfigError, "must give the label"),
        ("a=img", ConfigError, "must give the label"),
        ("a=imgs, label=label", DataError, "a=imgs; there are ids, img"),
        ("ids=ids, label=label", ConfigError, "data.vocab_size: 0"),
    ],
)
def test_mistakes_are_told_in_one_line(saved, features, error, words):
    with pytest.raises(error, match=words):
        read(saved / "both", features)


def test_the_package_and_the_folder_are_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="reading it needs the package datasets"):
        read(tmp_path)
    with pytest.raises(DataError, match="data.path: not given"):
        read("")
