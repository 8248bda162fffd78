"""Fields that may be None, from a Python file to the command line and through config.json."""

import json

import pytest

from rollingq_jax.train.cli import TRAIN
from rollingq_jax.train.config import check_config, differing_fields


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
