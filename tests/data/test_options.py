"""The fields of config.data: the table, what loaders read, and what a user may write."""

import ast
import dataclasses
import importlib.util
import runpy
from pathlib import Path

import pytest

from rollingq_jax.data.load import ANY_TFDS_NAME, LOADERS, load_dataset
from rollingq_jax.data.options import (
    ANY_TFDS,
    COMMON_FIELDS,
    FIELDS,
    check_fields,
    option,
)
from rollingq_jax.data.sources import av_digits, cmu_mosei
from rollingq_jax.data.sources.media_folder import MediaSizes
from rollingq_jax.errors import ConfigError
from rollingq_jax.train.cli import TRAIN
from rollingq_jax.train.config import check_config, default_config, from_json

ROOT = Path(__file__).parents[2]
MODULES = {
    **{
        name: [place, LOADERS["folder"]] if place == LOADERS["ave"] else [place]
        for name, place in LOADERS.items()
    },
    "arrays": [LOADERS["arrays"], LOADERS["folder"]],
    ANY_TFDS: [ANY_TFDS_NAME],
}
SIZES = {field.name: field.default for field in dataclasses.fields(MediaSizes)}
# Read by functions of other loaders.
BORROWED = {
    "huggingface": {*SIZES, "features", "sequence_length", "standardize", "vocab_size"}
    - {"video_frames"}
}


def read_in(module):
    """{field: default as written} of every call in a module's source that reads a field."""
    tree = ast.parse(Path(importlib.util.find_spec(module).origin).read_text())
    found = {}
    for node in ast.walk(tree):
        name = getattr(getattr(node, "func", None), "id", None)
        if name not in ("option", "choice", "mapping_option"):
            continue
        if isinstance(node.args[1], ast.Constant):
            default = node.args[2] if name == "option" else None
            found[node.args[1].value] = None if default is None else ast.unparse(default)
    return found | (SIZES if module == LOADERS["folder"] else {})


@pytest.mark.parametrize("loader", FIELDS)
def test_the_table_is_what_loaders_read(loader):
    found = {}
    for module in MODULES[loader]:
        found |= read_in(module)
    if "folder" not in loader and LOADERS["folder"] in MODULES[loader] and loader != "arrays":
        del found["columns"], found["task"]  # there is no manifest, and each example has a class
    named = found.keys() | BORROWED.get(loader, set())
    assert named - COMMON_FIELDS.keys() == FIELDS[loader].keys()
    for name, default in found.items():
        if isinstance(default, str) and name in FIELDS[loader] and name not in SIZES:
            assert ast.literal_eval(default) == FIELDS[loader][name].default, name


def test_the_table_has_the_loaders_choices_and_sizes():
    assert FIELDS.keys() == {*LOADERS, ANY_TFDS}
    assert FIELDS["av_digits"]["regime"].choices == tuple(av_digits.REGIMES)
    assert FIELDS["cmu_mosei"]["label_rule"].choices == tuple(cmu_mosei.LABEL_RULES)
    for field in (f for fields in FIELDS.values() for f in fields.values()):
        assert field.meaning and field.allowed
        assert not field.choices or field.choices[0] == field.default
    assert {name: FIELDS["folder"][name].default for name in SIZES} == SIZES


def config_of(**data):
    config = default_config().to_dict()
    return from_json(config | {"data": config["data"] | data})


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"regmie": "clean"}, "config.data.regmie is not a field (did you mean regime?)"),
        ({"regime": "x"}, "data.regime: 'x'; allowed: one of varied_test, noisy_audio"),
        ({"name": "arrays", "modalitis": ["a"]}, "(did you mean modalities?)"),
        ({"name": "arrays", "kinds": 3}, "data.kinds: 3"),
        ({"name": "arrays", "modalities": [1]}, "data.modalities: 1; allowed: names"),
        ({"name": "arrays", "regime": "clean"}, "is a field of av_digits, not of data.name"),
        ({"name": "arrays", "standardize": 1}, "data.standardize: 1; allowed: of type bool"),
        ({"name": "folder", "kinds": "a=image"}, "is a field of arrays"),
        ({"name": "folder", "image_size": 0}, "data.image_size: 0; allowed: at least 1"),
        ({"name": "folder", "audio_seconds": float("nan")}, "data.audio_seconds: nan"),
        ({"name": "folder", "image_size": 10**12}, "at most 4,096"),
        ({"name": "my_set", "feature": "a=b"}, "(did you mean features?)"),
        ({"name": "crema_d", "frames": 3}, "allowed for 'crema_d': cache_dir, corruptions, "),
        ({"name": 3}, "data.name: 3; allowed: of type str"),
        ({"path": None, "prefetch": -1}, "config.data.prefetch is -1"),
    ],
)
def test_fields_that_are_none_are_refused(data, words):
    config = config_of(**data)
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    if "prefetch" not in data:
        with pytest.raises(ConfigError):
            load_dataset(config.data, seed=0)


def test_a_field_of_other_data_may_stand_where_it_says_nothing():
    check_fields({"name": "folder", "kinds": "", "regime": "varied_test", "features": {}})
    check_fields({"name": "cifar10", "modalities": (), "path": None})


@pytest.mark.parametrize("given", ["a,b", "a, b,", ("a,b",), ("a", "b"), ["a", "b"], ("a,b", "a")])
def test_names_are_split_at_commas(given):
    assert option({"modalities": given}, "modalities", ()) == ("a", "b")
    assert option({"modalities": ""}, "modalities", ("a",)) == ()


def written(value):
    return ",".join(value) if isinstance(value, tuple) else str(value)


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.py")), ids=lambda f: f.stem)
def test_every_field_of_a_configuration_can_be_set_on_the_command_line(file):
    declared = runpy.run_path(str(file))["get_config"]()
    check_config(declared)
    values = {
        name: {bool: "True", int: "1000", float: "0.5", tuple: "a,b"}.get(type(value), "")
        or {"audio_features": "stft", "label_rule": "seven", "regime": "clean"}.get(name, value)
        for name, value in declared.data.items()
    }
    arguments = [f"--config.data.{name}={value}" for name, value in values.items()]
    config = TRAIN.parse(["train", "--config", str(file), "--workdir=x", *arguments]).config
    check_config(config)
    for name, value in config.data.items():
        if isinstance(value, tuple):
            assert option(config.data, name, ()) == ("a", "b")
        else:
            assert written(value) == written(values[name])


def test_the_command_line_says_what_a_field_may_be():
    arguments = ["--config", str(ROOT / "configs" / "own_data.py"), "--workdir=x"]
    with pytest.raises(ConfigError, match="data.standardize is 'maybe'; allowed: True or False"):
        TRAIN.parse(["train", *arguments, "--config.data.standardize=maybe"])
