"""Built-in sets in another folder go the way of the model that was trained, not their own."""

import numpy as np
from ml_collections import ConfigDict

from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.new_data import open_new_data
from rollingq_jax.data.preprocessing import input_spec
from tests.data import media_files


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def av_mnist(root, level, spread):
    """Sounds whose values lie around `level`."""
    for split, count in {"train": 24, "test": 5}.items():
        steps = np.arange(count * 112 * 112, dtype=np.float32).reshape(count, 112, 112) % 7
        save(root / "audio" / f"{split}_data.npy", level + spread * steps)
        save(root / "image" / f"{split}_data.npy", np.zeros((count, 784), np.uint8))
        save(root / f"{split}_labels.npy", np.arange(count) % 3)


def opened(config, trained, path):
    inputs = input_spec(trained)
    return inputs, open_new_data(str(path), ConfigDict(config), inputs, list(inputs.modalities))


def test_the_statistics_are_those_of_the_training_data(tmp_path):
    av_mnist(tmp_path / "old", 0.0, 1.0)
    av_mnist(tmp_path / "new", 3.0, 2.0)
    config = {"name": "av_mnist", "path": str(tmp_path / "old")}
    _, data = opened(config, load_dataset(config, seed=0), tmp_path / "new")
    read = data.source[0]["audio"].ravel()
    # 0 .. 6 in turn: mean 3 and variance 4; the new values are 3 + 2 s.
    np.testing.assert_allclose(read[:7], (3 + 2 * np.arange(7) - 3) / 2, atol=1e-3)
    assert data.labels == ["0", "1", "2", "0", "1"]


def food_101(root, classes, words):
    for split, count in {"train": 12, "test": 2 * len(classes)}.items():
        rows = ["Image_path,text,label"]
        for n in range(count):
            label = classes[n % len(classes)]
            place = root / "images" / split / label
            place.mkdir(parents=True, exist_ok=True)
            media_files.write_jpeg(place / f"{n}.jpg")
            rows.append(f"{n}.jpg,{words},{label}")
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{split}_titles.csv").write_text("\n".join(rows))


def test_lengths_and_class_numbers_are_the_models(tmp_path):
    food_101(tmp_path / "old", ["bread", "pizza", "soup"], "hot")
    food_101(tmp_path / "new", ["pizza", "soup"], "hot and long")
    config = {"name": "food_101", "path": str(tmp_path / "old"), "image_size": 8}
    inputs, data = opened(config, load_dataset(config, seed=0), tmp_path / "new")
    assert inputs.modalities["text"].info.shape == (3,)
    np.testing.assert_array_equal(data.source[0]["text"], 1 + np.frombuffer(b"hot", np.uint8))
    assert data.labels == ["pizza", "soup", "pizza", "soup"]
