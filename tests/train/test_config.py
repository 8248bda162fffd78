"""The schema: ranges, suggestions, the pages made from it, and None in every form of a config."""

import dataclasses
import json
from pathlib import Path

import pytest

from rollingq_jax.errors import ConfigError
from rollingq_jax.models.spec import section_fields
from rollingq_jax.train.cli import TRAIN
from rollingq_jax.train.config import (
    SECTIONS,
    check_config,
    config_page,
    default_config,
    differing_fields,
    fields_help,
    flatten,
    from_json,
    with_preset,
)


@pytest.mark.parametrize("said, held", [("None", None), ("0", 0), ("3", 3)])
def test_a_limit_of_rotations_or_none_goes_through_every_form(tmp_path, said, held):
    """Python file -> command line -> config.json -> command line."""
    source = tmp_path / "config.py"
    source.write_text("from rollingq_jax.train.config import default_config as get_config\n")
    flag, work = f"--config.rolling.max_rotations={said}", "--workdir=w"
    config = TRAIN.parse(["train.py", "--config", str(source), work, flag]).config
    check_config(config)
    assert config.rolling.max_rotations == held
    stored = tmp_path / "config.json"
    stored.write_text(json.dumps(config.to_dict()))
    again = TRAIN.parse(["train.py", "--config_json", str(stored), work]).config
    assert again.to_dict() == config.to_dict() and not differing_fields(again, config)
    for text, value in (("None", None), ("7", 7)):
        flag = f"--config.rolling.max_rotations={text}"
        changed = TRAIN.parse(["train.py", "--config_json", str(stored), work, flag]).config
        check_config(changed)
        assert changed.rolling.max_rotations == value


def test_the_page_of_the_documentation_is_made_from_the_fields():
    page = Path(__file__).parents[2] / "docs" / "config.md"
    made = "make it anew: python -m rollingq_jax.train.config > docs/config.md"
    assert page.read_text() == config_page(), made


def test_the_help_names_every_field_within_80_columns():
    lines = fields_help().splitlines()
    assert max(map(len, lines)) <= 80
    names = {line.split()[0] for line in lines if line.startswith("    ") and line[4] != " "}
    flat = flatten(default_config())
    assert {name.rpartition(".")[2] for name in flat} - {"grid", "encoders"} <= names


def test_each_default_is_allowed_and_has_a_meaning():
    for section, known in ((s, section_fields(c)) for s, c in SECTIONS.items()):
        for name, field in known.items():
            assert field.meaning and field.allowed, (section, name)
            if field.default is not dataclasses.MISSING:
                assert field.rule.accepts(field.default), (section, name)


def test_a_decay_that_adam_never_applied_is_read_as_none():
    """Of a file from before `weight_decay_on`; a newer one that asks for it is refused."""
    stored = json.loads(json.dumps(default_config().to_dict()))
    stored["optimizer"] |= {"name": "adam", "weight_decay": 1e-4}
    with pytest.raises(ConfigError, match="weight_decay is 0.0001; allowed with .* adam.*: 0"):
        check_config(from_json(stored))
    del stored["optimizer"]["weight_decay_on"]
    config = from_json(stored)
    check_config(config)
    assert config.optimizer.weight_decay == 0.0


@pytest.mark.parametrize(
    "field, value, line",
    [
        (
            "rolling.btea",
            1.0,
            r"config.rolling.btea is not a field \(did you mean beta\?\); a",
        ),
        ("data.regmie", "clean", r"config.data.regmie is not a field.*did you mean .?regime"),
        ("model.dmi", 8, r"model.dmi is not a field \(did you mean dim\?\); allowed"),
        ("model.dim", 0, "model.dim is 0; allowed: an integer >= 1"),
        ("model.encoders", {"a": {"knid": "vector"}}, r"model.encoders.a.knid .*did you mean kind"),
        ("sede", 1, r"config.sede is not a field \(did you mean seed\?\)"),
        (
            "rolling.max_rotations",
            -1,
            "an integer >= 0 and at most 2,147,483,647, or None for",
        ),
    ],
)
def test_every_section_is_checked_and_the_nearest_name_suggested(field, value, line):
    config = default_config()
    with config.unlocked():
        config.update_from_flattened_dict({field: value})
    with pytest.raises(ConfigError, match=line):
        check_config(config)


def test_the_preset_sets_upstreams_choices_and_typed_fields_come_after_it():
    arguments = ["train", "--config", "crema_d", "--workdir=w", "--preset", "upstream"]
    config = TRAIN.parse([*arguments, "--config.rolling.rho=0.5"]).config
    check_config(config)
    plain = TRAIN.parse(arguments[:4]).config
    assert {name: ours for name, (ours, _) in differing_fields(config, plain).items()} == {
        "rolling.rho": 0.5,
        "rolling.method": "svd",
        "data.validation": False,
        "data.crop_per": "frame",
        **{f"upstream_compat.{name}": True for name in config.upstream_compat},
    }
    assert not config.compare.grid
    with pytest.raises(ConfigError, match="--preset is 'paper'; allowed: upstream"):
        TRAIN.parse([*arguments[:4], "--preset=paper"])


def test_the_preset_leaves_out_what_the_data_do_not_have():
    config = with_preset(default_config(), "upstream")
    check_config(config)
    assert "crop_per" not in config.data and not config.data.validation


def test_every_field_of_the_data_set_can_be_typed_and_no_other():
    own = ["train", "--config", "own_data", "--workdir=w", "--config.data.path=x.csv"]
    plain = TRAIN.parse(own).config
    config = TRAIN.parse(
        [*own, "--config.data.image_size=32", "--config.data.audio_rate=8000"]
    ).config
    check_config(config)
    assert (config.data.image_size, config.data.audio_rate) == (32, 8000)
    assert differing_fields(config, plain) == {
        "data.image_size": (32, 64),
        "data.audio_rate": (8000, 16000),
    }
    named = TRAIN.parse([*own, "--config.data.name=my_set", "--config.data.features=a=b,label=c"])
    check_config(named.config)
    assert named.config.data.features == "a=b,label=c"
    with pytest.raises(ConfigError, match="did you mean config.data.image_size"):
        TRAIN.parse([*own, "--config.data.imge_size=32"])


def test_another_data_set_leaves_behind_the_fields_of_the_files_own():
    demo = ["train", "--config", "av_digits", "--workdir=w", "--config.data.name=arrays"]
    config = TRAIN.parse([*demo, "--config.data.path=x.npz"]).config
    check_config(config)
    assert not {"regime", "test_pairings"} & set(config.data.keys())
    assert TRAIN.parse([*demo[:4], "--config.data.name=av_digits"]).config.data.regime
    with pytest.raises(ConfigError, match="regime is a field of av_digits, not of data.name"):
        check_config(TRAIN.parse([*demo, "--config.data.regime=clean"]).config)


def test_a_field_that_a_configuration_did_not_list_yet_is_its_default():
    older = TRAIN.parse(["train", "--config", "crema_d", "--workdir=w"]).config
    with older.data.unlocked():
        del older.data["crop_per"]
    assert not differing_fields(
        older, TRAIN.parse(["train", "--config", "crema_d", "--workdir=w"]).config
    )
