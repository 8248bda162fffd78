"""A TFDS data set written here and read through a mapping of features."""

import io
import types

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.errors import ConfigError, DataError


class RqToySet(tfds.core.GeneratorBasedBuilder):
    """Every form of feature; the image's pixels are the example's number."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "grey": tfds.features.Image(shape=(4, 5, 1), encoding_format="png"),
            "steps": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
            "ids": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
            "text": tfds.features.Text(),
            "nested": {"table": tfds.features.Tensor(shape=(4,), dtype=np.float64)},
            "odd": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "number": tfds.features.Scalar(np.int64),
            "broken": tfds.features.ClassLabel(num_classes=3),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(40), "test": self._generate_examples(8)}

    def _generate_examples(self, count):
        from PIL import Image

        def png(shape, value):
            buffer = io.BytesIO()
            Image.fromarray(np.full(shape, value, np.uint8)).save(buffer, format="PNG")
            buffer.seek(0)
            return buffer

        for number in range(count):
            yield (
                str(number),
                {
                    "image": png((20, 25 + number, 3), number),
                    "grey": png((4, 5), number),
                    "steps": np.full((1 + number % 5, 3), number, np.float32),
                    "ids": list(range(1, 2 + number % 4)),
                    "text": f"no. {number}",
                    "nested": {"table": np.full(4, 1e6 * number)},
                    "odd": np.zeros((number % 2, 3), np.float32),
                    "label": number % 2,
                    "number": number,
                    "broken": -1,
                },
            )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    RqToySet(data_dir=folder).download_and_prepare()
    return str(folder)


def read(folder, features, name="rq_toy_set", **fields):
    config = types.SimpleNamespace(name=name, path=folder, features=features, **fields)
    return load_dataset(config, seed=0)


def test_features_become_modalities(prepared):
    dataset = read(
        prepared,
        "photo=image, grey=grey, steps=steps, words=text, table=nested/table, ids=ids, label=label",
        image_size=16,
        text_length=6,
        sequence_length=4,
        vocab_size=10,
    )
    forms = {name: (info.kind, info.shape, info.dtype) for name, info in dataset.modalities.items()}
    assert forms == {
        "grey": ("image", (4, 5, 1), "uint8"),
        "ids": ("tokens", (4,), "int32"),
        "photo": ("image", (16, 16, 3), "uint8"),
        "steps": ("sequence", (4, 3), "float32"),
        "table": ("vector", (4,), "float32"),
        "words": ("tokens", (6,), "int32"),
    }
    assert dataset.class_names == ("cat", "dog")
    assert [len(dataset.splits[s]) for s in ("train", "valid", "test")] == [36, 4, 8]
    assert len(dataset.modalities["photo"].mean) == 3
    batch = next(iter(eval_batches(dataset.splits["test"], batch_size=8)))
    numbers = batch["photo"][:, 0, 0, 0].astype(int)
    assert sorted(numbers.tolist()) == list(range(8))
    np.testing.assert_array_equal(batch["label"], numbers % 2)
    np.testing.assert_array_equal(batch["steps_mask"].sum(axis=1), np.minimum(1 + numbers % 5, 4))
    np.testing.assert_array_equal((batch["ids"] > 0).sum(axis=1), 1 + numbers % 4)
    assert bytes((batch["words"][0] - 1).astype(np.uint8)).startswith(b"no. ")
    tables = np.concatenate(
        [b["table"] for b in eval_batches(dataset.splits["train"], batch_size=9)]
    )
    np.testing.assert_allclose(tables.mean(axis=0), 0, atol=1e-5)
    np.testing.assert_allclose(tables.std(axis=0), 1, atol=1e-5)


def test_splits_can_be_given_and_mappings_used(prepared):
    dataset = read(
        prepared,
        {"grey": "grey", "label": "label"},
        tfds_splits="train=train[:50%], valid=train[50%:], test=test",
        standardize=False,
    )
    assert [len(dataset.splits[s]) for s in ("train", "valid", "test")] == [20, 20, 8]


@pytest.mark.parametrize(
    ("features", "fields", "words"),
    [
        ("", {}, ["data.features", "visual=image, label=label", "nested/table"]),
        ("grey=grey", {}, ["data.features", "label"]),
        ("grey=gray,label=label", {}, ["grey=gray", "grey, steps"]),
        ("grey:grey", {}, ["name=value"]),
        ("odd=odd,label=label", {}, ["odd", "only the first axis"]),
        ("ids=ids,label=label", {}, ["vocab_size", "'ids'"]),
        ("ids=ids,label=label", {"vocab_size": 3}, ["ids", "below 3"]),
        ("grey=grey,label=number", {}, ["label=number", "ClassLabel"]),
        ("grey=grey,label=broken", {}, ["broken is -1", "0 to 2"]),
        ("a b=grey,label=label", {}, ["'a b'"]),
        ("grey=grey,label=label", {"tfds_splits": "train=train"}, ["tfds_splits", "test"]),
        ("grey=grey,label=label", {"tfds_splits": "train=nope,test=test"}, ["'nope'"]),
    ],
)
def test_mistakes_are_named(prepared, features, fields, words):
    with pytest.raises((ConfigError, DataError)) as caught:
        read(prepared, features, **fields)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("arrayss", ["'arrayss'", "arrays, av_digits", "nor a TFDS data set"]),
        ("../etc", ["'../etc'", "nor a TFDS data set"]),
        ("mnist", ["'mnist' is not prepared under", "download_and_prepare", "array_record"]),
    ],
)
def test_a_data_set_that_is_not_there(tmp_path, name, words):
    with pytest.raises(DataError) as caught:
        read(str(tmp_path), "visual=image,label=label", name=name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message
    assert list(tmp_path.iterdir()) == []
