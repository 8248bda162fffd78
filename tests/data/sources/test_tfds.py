"""A TFDS data set written here and read through a mapping of features."""

import io
import json
import logging
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollingq_jax.data.cache import build_once
from rollingq_jax.data.dataset import groups_of, ids_of, labels_of
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.records import RecordSource
from rollingq_jax.data.sources.av_digits import AvDigits, av_digits_config
from rollingq_jax.data.sources.tfds import open_tfds
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.train.cli import run_command, train_command


class RqToySet(tfds.core.GeneratorBasedBuilder):
    """Every form of feature; the image's pixels are the example's number."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, **kwargs):
        super().__init__(file_format="array_record", **kwargs)

    def _info(self):
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "gray": tfds.features.Image(shape=(4, 5, 1), encoding_format="png"),
            "steps": tfds.features.Tensor(shape=(None, 3), dtype=np.float32),
            "ids": tfds.features.Sequence(tfds.features.Scalar(np.int64)),
            "text": tfds.features.Text(),
            "nested": {"table": tfds.features.Tensor(shape=(4,), dtype=np.float64)},
            "odd": tfds.features.Tensor(shape=(None, None), dtype=np.float32, encoding="zlib"),
            "label": tfds.features.ClassLabel(names=["cat", "dog"]),
            "number": tfds.features.Scalar(np.int64),
            "broken": tfds.features.ClassLabel(num_classes=3),
            "speaker": tfds.features.Text(),
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
                    "gray": png((4, 5), number),
                    "steps": np.full((1 + number % 5, 3), number, np.float32),
                    "ids": list(range(1, 2 + number % 4)),
                    "text": f"no. {number}",
                    "nested": {"table": np.full(4, 1e6 * number)},
                    "odd": np.zeros((number % 2, 3), np.float32),
                    "label": number % 2,
                    "number": number,
                    "broken": -1,
                    "speaker": f"s{number // 4}",
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
        "photo=image, gray=gray, steps=steps, words=text, table=nested/table, ids=ids, label=label",
        image_size=16,
        text_length=6,
        sequence_length=4,
        vocab_size=10,
    )
    forms = {name: (info.kind, info.shape, info.dtype) for name, info in dataset.modalities.items()}
    assert forms == {
        "gray": ("image", (4, 5, 1), "uint8"),
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
        {"gray": "gray", "label": "label"},
        tfds_splits="train=train[:50%], valid=train[50%:], test=test",
        standardize=False,
    )
    assert [len(dataset.splits[s]) for s in ("train", "valid", "test")] == [20, 20, 8]


@pytest.mark.parametrize(
    ("features", "fields", "words"),
    [
        ("", {}, ["data.features", "visual=image, label=label", "nested/table"]),
        ("gray=gray", {}, ["data.features", "label"]),
        ("gray=grey,label=label", {}, ["gray=grey", "gray, ids"]),
        ("gray:gray", {}, ["name=value"]),
        ("odd=odd,label=label", {}, ["odd", "only the first axis"]),
        ("ids=ids,label=label", {}, ["vocab_size", "'ids'"]),
        ("ids=ids,label=label", {"vocab_size": 3}, ["ids", "below 3"]),
        ("gray=gray,label=number", {}, ["label=number", "ClassLabel"]),
        ("gray=gray,label=broken", {}, ["broken is -1", "0 to 2"]),
        ("a b=gray,label=label", {}, ["'a b'"]),
        ("gray=gray,label=label", {"tfds_splits": "train=train"}, ["tfds_splits", "test"]),
        ("gray=gray,label=label", {"tfds_splits": "train=nope,test=test"}, ["'nope'"]),
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


OWN = "tensorflow_datasets.core.features"


@pytest.fixture
def stranger(prepared, tmp_path, monkeypatch):
    """A copy of the data set, and beside the user a module that must not be imported."""
    shutil.copytree(prepared, tmp_path / "data")
    (tmp_path / "payload.py").write_text(
        "import pathlib\n"
        f"pathlib.Path({str(tmp_path / 'ran')!r}).touch()\n"
        "from tensorflow_datasets.core.features.tensor_feature import Tensor\n"
        "class Feature(Tensor):\n    pass\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    yield tmp_path
    sys.modules.pop("payload", None)


def refused(folder, *words, name="rq_toy_set"):
    with pytest.raises(DataError) as caught:
        read(str(folder / "data"), "gray=gray,label=label", name=name)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    for word in words:
        assert word in message, message
    assert not (folder / "ran").exists()


def features_file(folder):
    return folder / "data" / "rq_toy_set" / "1.0.0" / "features.json"


TENSOR = {"tensor": {"dtype": "float32", "shape": {}}}
OLD_TENSOR = {"shape": [], "dtype": "float32"}
PAYLOADS = {
    "at the top": lambda name: {"pythonClassName": name, **TENSOR},
    "a proto's own field name": lambda name: {"python_class_name": name, **TENSOR},
    "nested": lambda name: {
        "pythonClassName": f"{OWN}.features_dict.FeaturesDict",
        "featuresDict": {"features": {"a": {"pythonClassName": name, **TENSOR}}},
    },
    "in a sequence": lambda name: {
        "pythonClassName": f"{OWN}.sequence_feature.Sequence",
        "sequence": {"feature": {"pythonClassName": name, **TENSOR}},
    },
    "old form": lambda name: {"type": name, "content": OLD_TENSOR},
    "old form, nested": lambda name: {
        "type": f"{OWN}.features_dict.FeaturesDict",
        "content": {"a": {"type": name, "content": OLD_TENSOR}},
    },
    "json in a proto": lambda name: {
        "pythonClassName": f"{OWN}.features_dict.FeaturesDict",
        "jsonFeature": {"json": json.dumps({"a": {"type": name, "content": OLD_TENSOR}})},
    },
    "a proto in json": lambda name: {
        "type": f"{OWN}.features_dict.FeaturesDict",
        "proto_cls": "tensorflow_datasets.FeaturesDict",
        "content": json.dumps({"features": {"a": {"pythonClassName": name, **TENSOR}}}),
    },
}


@pytest.mark.parametrize("place", PAYLOADS)
def test_a_stranger_s_classes_are_not_imported(stranger, place):
    features_file(stranger).write_text(json.dumps(PAYLOADS[place]("payload.Feature")))
    refused(stranger, "features.json", "'payload.Feature'", "refused")


def test_the_payloads_would_run(stranger):
    """What is refused above is what TFDS imports."""
    content = PAYLOADS["json in a proto"]("payload.Feature")
    features_file(stranger).write_text(json.dumps(content))
    tfds.builder_from_directory(features_file(stranger).parent)
    assert (stranger / "ran").exists()


@pytest.mark.parametrize(
    "name",
    [
        "payload.Feature",
        "os.system",
        "tensorflow_datasets.payload.Feature",
        "tensorflow_datasets_evil.core.features.Feature",
        "tensorflow_datasets.core.features.feature.importlib.import_module",
        "tensorflow_datasets.core.features..payload.Feature",
        "test_tfds_source.RqToySet",
        " tensorflow_datasets.core.features.text_feature.Text",
        "Feature",
        "",
    ],
)
def test_only_classes_of_tfds_features(stranger, name):
    features_file(stranger).write_text(json.dumps(PAYLOADS["nested"](name)))
    refused(stranger, repr(name), "refused")


def test_prepared_records_are_guarded_too(stranger):
    """Those of CREMA-D and Kinetics-Sounds, whose folder a configuration names."""
    place = features_file(stranger).parent
    features_file(stranger).write_text(json.dumps(PAYLOADS["nested"]("payload.Feature")))
    with pytest.raises(DataError, match=r"'payload\.Feature' is refused"):
        RecordSource(place)
    assert not (stranger / "ran").exists()


def test_cached_digits_are_guarded_too(stranger):
    """A configuration names the cache, and its checksums are only as good as who wrote them."""
    cache = stranger / "cache"
    made = AvDigits(config=av_digits_config("clean", seed=0, test_pairings=3), data_dir=cache)
    place = Path(made.data_dir)
    shutil.copytree(features_file(stranger).parent, place)
    content = json.dumps(PAYLOADS["nested"]("payload.Feature"))
    (place / "features.json").write_text(content)
    build_once(place.with_name("again"), lambda scratch: shutil.copytree(place, scratch / "a"))
    shutil.rmtree(place)
    place.with_name("again").rename(place)
    with pytest.raises(DataError, match=r"'payload\.Feature' is refused"):
        load_dataset({"name": "av_digits", "regime": "clean", "cache_dir": str(cache)}, seed=0)
    assert not (stranger / "ran").exists()


def test_classes_under_older_names_of_tfds_pass(stranger):
    file = features_file(stranger)
    text = file.read_text()
    assert "tensor_feature.Tensor" in text
    file.write_text(text.replace("tensor_feature.Tensor", "feature.Tensor"))
    assert read(str(stranger / "data"), "table=nested/table,label=label").num_classes == 2


def test_every_way_to_the_files_is_guarded(stranger):
    """Of several versions, through links, by a default config, the files read are those checked."""
    root = stranger / "data" / "rq_toy_set"
    shutil.copytree(root / "1.0.0", stranger / "elsewhere")
    (stranger / "elsewhere" / "features.json").write_text(
        json.dumps(PAYLOADS["nested"]("payload.Feature"))
    )
    (root / "1.2.0").symlink_to(stranger / "elsewhere")
    refused(stranger, "1.2.0", "'payload.Feature'")
    refused(stranger, "'payload.Feature'", name="rq_toy_set:1.2.0")
    refused(stranger, "'payload.Feature'", name="rq_toy_set:1.*.*")
    refused(stranger, "'payload.Feature'", name="RqToySet")
    config = {"name": "rq_toy_set:1.0.0", "path": str(stranger / "data")}
    config |= {"features": "gray=gray,label=label"}
    assert load_dataset(config, seed=0).num_classes == 2
    other = stranger / "data" / "of_strangers"
    (other / ".config").mkdir(parents=True)
    (other / ".config" / "metadata.json").write_text('{"default_config_name": "small"}')
    (other / "small").mkdir()
    (other / "small" / "2.0.0").symlink_to(stranger / "elsewhere")
    refused(stranger, "'payload.Feature'", name="of_strangers")
    refused(stranger, "'payload.Feature'", name="of_strangers/small")
    (other / ".config" / "metadata.json").write_text('{"default_config_name": "../elsewhere"}')
    refused(stranger, "default_config_name", name="of_strangers")


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        json.dumps({"jsonFeature": {"json": "[" * 100_000}}),
        "[]",
        "null",
        "{",
        "\udcff",
        "{}" + " " * (17 << 20),
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
        json.dumps({"type": f"{OWN}.class_label_feature.ClassLabel",
                    "content": {"names_file": "/etc/passwd"}}),
    ],
    ids=range(10),
)  # fmt: skip
def test_odd_descriptions_of_features(stranger, content):
    features_file(stranger).write_text(content, errors="surrogateescape")
    refused(stranger, "features.json")


@pytest.mark.parametrize(
    "name",
    [
        "huggingface:mnist",
        "kaggle:rq_toy_set",
        "ns:rq_toy_set/a:1.0.0",
        "rq_toy_set/..",
        "rq_toy_set/../../data",
        "/etc/rq_toy_set",
        "./rq_toy_set",
        "rq_toy_set/",
        "rq_toy_set/a/b",
        "rq_toy_set/config=payload",
        "rq_toy_set:1.0",
        "rq_toy_set:../../x",
        "rq_toy_set\n",
        "payload.Feature",
        "",
        "x" * 10_000,
    ],
)
def test_names_of_other_forms(stranger, name):
    refused(stranger, repr(name[:100]), name=name)


def test_damaged_records_are_one_line(stranger):
    for shard in features_file(stranger).parent.glob("*.array_record*"):
        shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(stranger, "git lfs pull")


GROUPED = "gray=gray, label=label, group=speaker, id=number"


def test_groups_stay_whole(prepared, caplog):
    caplog.set_level(logging.WARNING, "rollingq_jax")
    dataset = read(prepared, GROUPED)
    groups = {split: set(groups_of(source)) for split, source in dataset.splits.items()}
    assert not groups["train"] & groups["valid"]
    assert groups["train"] | groups["valid"] == {f"s{number}" for number in range(10)}
    assert groups["test"] == {"s0", "s1"}
    assert "in both train and test" in caplog.text
    for source in dataset.splits.values():
        examples = [source[index] for index in range(len(source))]
        assert set(examples[0]) == {"gray", "label"}
        numbers = [int(example["gray"][0, 0, 0]) for example in examples]
        assert ids_of(source).tolist() == numbers
        assert groups_of(source).tolist() == [f"s{number // 4}" for number in numbers]
        assert labels_of(source).tolist() == [number % 2 for number in numbers]


def test_a_number_of_classes_beyond_reason(stranger):
    file = features_file(stranger)
    file.write_text(file.read_text().replace('"numClasses": "3"', '"numClasses": "1000000000"'))
    with pytest.raises(DataError, match="label=broken.*at most 100000"):
        read(str(stranger / "data"), "gray=gray,label=broken")


NODES = st.recursive(
    st.one_of(
        st.none(),
        st.integers(),
        st.text(max_size=5),
        st.sampled_from([f"{OWN}.text_feature.Text", f"{OWN}.tensor_feature.Tensor", "payload.F"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(
                ["type", "content", "pythonClassName", "featuresDict", "features", "tensor", "text",
                 "shape", "dimensions", "dtype", "sequence", "feature", "jsonFeature", "json"]
            ),
            st.one_of(inner, inner.map(json.dumps)),
            max_size=4,
        ),
    ),
    max_leaves=12,
)  # fmt: skip


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(content=NODES)
def test_any_description_opens_or_gives_one_line(stranger, content):
    features_file(stranger).write_text(json.dumps(content))
    with pytest.raises((DataError, ConfigError)) as caught:
        read(str(stranger / "data"), "gray=gray,label=label")
    assert "\n" not in str(caught.value) and not (stranger / "ran").exists()


def test_a_single_split_is_divided(stranger):
    info = features_file(stranger).with_name("dataset_info.json")
    content = json.loads(info.read_text())
    content["splits"] = [one for one in content["splits"] if one["name"] == "train"]
    info.write_text(json.dumps(content))
    for features in (GROUPED, GROUPED.replace("group=speaker, ", "")):
        dataset = read(str(stranger / "data"), features)
        ids = {split: set(ids_of(source).tolist()) for split, source in dataset.splits.items()}
        assert sorted(sum(map(list, ids.values()), [])) == list(range(40))
        assert [len(ids[split]) for split in ("train", "valid", "test")] == [28, 4, 8]
        if "group" in features:
            groups = [{number // 4 for number in of_split} for of_split in ids.values()]
            assert sum(map(len, groups)) == 10


def test_groups_that_cannot_be_used_are_named(prepared):
    for feature in ("nested/table", "steps"):
        with pytest.raises(DataError, match=f"group={feature}"):
            read(prepared, f"gray=gray, label=label, group={feature}")


def test_new_data_for_a_trained_model(prepared):
    config = types.SimpleNamespace(
        name="rq_toy_set",
        path="the place of the training data",
        features="photo=image, steps=steps, words=text, ids=ids, lost=absent, label=label",
        vocab_size=9,
        image_size=16,
        text_length=6,
        sequence_length=4,
    )
    trained = read(prepared, config.features.replace("lost=absent,", ""), **{
        name: getattr(config, name)
        for name in ("image_size", "text_length", "sequence_length", "vocab_size")
    })  # fmt: skip
    modalities = trained.preprocessing
    source, ids, labels = open_tfds(config, modalities, path=prepared, split="test")
    assert ids == [str(number) for number in range(8)] and len(source) == 8
    numbers = [int(source[index]["photo"][0, 0, 0]) for index in range(8)]
    assert labels == [("cat", "dog")[number % 2] for number in numbers]
    for index, number in enumerate(numbers):
        example = source[index]
        assert set(example) == {"photo", "steps", "steps_mask", "words", "ids"}
        assert (example["steps"][: 1 + number % 5] == number).all()  # raw, not standardized
        standardized = modalities["steps"].apply(example["steps"], example["steps_mask"])
        np.testing.assert_allclose(standardized, trained.splits["test"][index]["steps"], atol=1e-6)
    config.features = config.features.replace("label=label", "label=broken, id=speaker")
    source, ids, labels = open_tfds(config, modalities, path=prepared, split="train[:5]")
    assert labels == [""] * 5 and set(ids) <= {f"s{number}" for number in range(10)}
    with pytest.raises(DataError, match="none of lost"):
        open_tfds(config, {"lost": modalities["photo"]}, path=prepared, split="test")
    config.features = "steps=nested/table"
    with pytest.raises(DataError, match="data.features: steps"):
        open_tfds(config, modalities, path=prepared, split="test")


@pytest.mark.slow
def test_a_set_trains_with_nothing_but_flags(prepared, tmp_path):
    fields = {
        "name": "rq_toy_set",
        "path": prepared,
        "features": "gray=gray, steps=steps, words=text, label=label",
        "sequence_length": 4,
        "text_length": 6,
    }
    flags = [f"--config.data.{name}={value}" for name, value in fields.items()]
    small = ["--config.epochs=3", "--config.batch_size=8", "--config.model.dim=8"]
    small += ["--config.optimizer.name=sgd"]  # optax adds an integer in adam: strict here
    flags += [*small, "--config.model.depth=1", "--workdir", str(tmp_path), "--quiet"]
    assert run_command(train_command, ["train", "--config", "tfds", *flags]) == 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["test_accuracy"] >= 0 and summary["config"]["data"]["text_length"] == 6
