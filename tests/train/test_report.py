"""Summaries: odd content is refused in one line or shown."""

import json
import re

import pytest
from etils import epath

from rollingq_jax.errors import CheckpointError
from rollingq_jax.train.report import print_summary
from rollingq_jax.train.workdir import (
    read_config,
    read_summary,
)

ODD_OBJECTS = [
    ("", "not JSON"),
    ("{", "not JSON"),
    ("\udcff", "not JSON"),
    ("[" * 100_000, "not JSON"),
    ("null", "holds NoneType; allowed: a JSON object"),
    ("[]", "holds list; allowed: a JSON object"),
    ('{"a": ' * 400 + "1" + "}" * 400, "is nested too deep; allowed: at most 50 levels"),
    (None, "cannot be read (Is a directory)"),
]


@pytest.mark.parametrize("name", ["config.json", "summary.json"])
@pytest.mark.parametrize(("content", "line"), ODD_OBJECTS)
def test_odd_content_in_the_place_of_a_runs_json(tmp_path, name, content, line):
    read = {"config.json": read_config, "summary.json": read_summary}[name]
    assert read(epath.Path(tmp_path)) is None
    if content is None:
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text(content, errors="surrogateescape")
    with pytest.raises(CheckpointError, match=f"{name} .*{re.escape(line)}"):
        read(epath.Path(tmp_path))


@pytest.mark.parametrize("value", [None, float("nan")])
def test_a_correlation_that_is_not_defined_is_a_dash(value, tmp_path, capsys):
    summary = {
        "best": {"epoch": 2, "accuracy": 0.5},
        "test_accuracy": 0.5,
        "test_macro_f1": 0.5,
        "probe_accuracy": {},
        "quality_correlation": value,
        "rotations": None,
    }
    print_summary(summary, tmp_path)
    printed = capsys.readouterr().out
    assert re.search(r"correlation of share and quality +-\n", printed) and "nan" not in printed


SUMMARY = {
    "best": {"step": 6, "epoch": 1, "accuracy": 0.25},
    "test_accuracy": 0.5,
    "test_macro_f1": 0.75,
    "probe_accuracy": {"a": 0.125},
    "attention_share": {"a": 0.375},
    "quality_correlation": 0.0625,
    "rotations": [1, 2],
}
ABSENT = ...
ODD_VALUES = [None, [], {}, "x", True, -1, 10**400, {"a": None}, {"a": []}, [None], [[1]], ABSENT]


def put(summary, name, value):
    """The summary with a field replaced, or without it."""
    summary = json.loads(json.dumps(summary))
    *outer, last = name.split(".")
    place = summary
    for part in outer:
        place = place[part]
    if value is ABSENT:
        del place[last]
    else:
        place[last] = value
    return summary


@pytest.mark.parametrize("value", ODD_VALUES, ids=repr)
def test_a_summary_of_odd_content_is_refused_in_one_line_or_shown(tmp_path, capsys, value):
    """Field by field; what is still there is shown."""
    names = [
        *SUMMARY,
        "examples",
        "signature",
        *(f"best.{name}" for name in SUMMARY["best"]),
        "modality_examples",
    ]
    for name in names:
        if name not in SUMMARY and "." not in name and value is ABSENT:
            continue
        (tmp_path / "summary.json").write_text(json.dumps(put(SUMMARY, name, value)))
        try:
            summary = read_summary(epath.Path(tmp_path))
        except CheckpointError as error:
            assert "summary.json is damaged" in str(error)
            assert name.partition(".")[0] in ("best", "test_accuracy", "examples", "signature")
        else:
            print_summary(summary, tmp_path)
            printed = capsys.readouterr().out
            for field, shown in (("test_macro_f1", "0.750"), ("probe_accuracy", "0.125")):
                assert name in (field, "modality_examples") or shown in printed


def test_a_best_epoch_whose_accuracy_is_not_known_is_shown(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(put(SUMMARY, "best.accuracy", None)))
    print_summary(read_summary(epath.Path(tmp_path)), tmp_path)
    assert re.search(r"best epoch by validation +1 \(-\)\n", capsys.readouterr().out)
