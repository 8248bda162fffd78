"""The paper's tables: rows that name arms, published figures, and what is measured beside them."""

import json

import numpy as np
import pytest

from rollingq_jax import reproduce
from rollingq_jax.comparison.runs import known_arms
from rollingq_jax.reproduce import SETS, TABLES, aligned, written_cells
from rollingq_jax.train.cli import run_command
from rollingq_jax.train.config import default_config


@pytest.mark.parametrize("name", TABLES)
def test_rows_name_arms_and_have_a_figure_for_each_column(name):
    spec = TABLES[name]
    arms = known_arms(("audio", "text", "vision", "visual"))
    names = [row.name for row in spec.rows]
    assert len(set(names)) == len(names)
    for row in spec.rows:
        assert (row.arm.partition("=")[2].partition(":")[0] or row.arm) in arms, row
        assert set(row.published) <= set(SETS)
        assert {len(values) for values in row.published.values()} <= {len(spec.levels)}


@pytest.fixture
def config(tmp_path):
    """Two modalities of one vector each, with their quality."""
    draw, arrays = np.random.default_rng(0), {}
    for split, count in {"train": 60, "test": 40}.items():
        label = np.arange(count) % 2
        arrays[f"{split}/label"] = label
        for m in ("audio", "visual"):
            quality = -draw.uniform(0, 2, count)
            noise = draw.normal(size=(count, 4, 3)) * -quality[:, None, None]
            arrays[f"{split}/{m}"] = (label[:, None, None] + noise).astype(np.float32)
            arrays[f"{split}/quality_{m}"] = quality.astype(np.float32)
    np.savez(tmp_path / "data.npz", **arrays)
    made = default_config()
    made.data.update(name="arrays", path=str(tmp_path / "data.npz"))
    made.model.update(dim=8, depth=1)
    made.update(epochs=3, batch_size=16)
    made.optimizer.warmup_epochs = 1.0
    return made


def fake_compare(asked):
    """Accuracy .5 + seed / 100, a point more with rotations; no quality in the data."""

    def compare(config, folder, *, arms, num_seeds, interruption):
        asked.append((dict(arms), num_seeds, config.compare.grid.to_dict()))
        runs = [
            {
                "arm": arm,
                "seed": seed,
                "test_accuracy": 0.5 + seed / 100 + 0.01 * ("rolling" in arm),
                "quality_correlation": 0.1 * seed + 0.5 * ("rolling" in arm),
            }
            for arm in arms
            for seed in range(num_seeds)
        ]
        return {"runs": runs, "selection": {a: {"chosen": 0, "setting": {}} for a in arms}}

    return compare


def test_a_table_has_means_and_paired_differences_beside_the_papers_figures(
    config, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(reproduce, "compare", fake_compare(asked))
    result = reproduce.reproduce("table2", config, tmp_path / "out", num_seeds=3)
    assert asked[0][0].keys() == {"attention", "rollingq"} and asked[0][1:] == (3, {})
    first, second = (row["measured"][0] for row in result["rows"])
    assert first["mean"] == pytest.approx(0.1) and second["mean"] == pytest.approx(0.6)
    assert second["difference"] == pytest.approx(0.5) and "difference" not in first
    head, *lines = written_cells(result)
    assert head[:4] == ["", "paper, CREMA-D", "paper, Kinetics-Sounds", "measured, arrays"]
    assert lines[1][:3] == ["attention + RollingQ", "0.76", "0.78"]
    assert lines[1][3].startswith("0.60 [") and lines[1][4] == "+0.50 [+0.50, +0.50]"
    assert (tmp_path / "out" / "table2.md").read_text().count("|\n") == 4
    assert json.loads((tmp_path / "out" / "table2.json").read_text())["rows"] == result["rows"]
    assert len({len(line) for line in aligned([["a", "bb"], ["ccc", "d"]])}) == 1


def test_rows_that_the_data_do_not_have_or_that_are_not_asked_for_stay_empty(
    config, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(reproduce, "compare", fake_compare(asked))
    result = reproduce.reproduce("table1", config, tmp_path, num_seeds=2)
    measured = {row["arm"]: row["measured"] for row in result["rows"]}
    assert measured["vision"] is None and measured["text"] is None and measured["audio"]
    asked.clear()
    only = ["concat", "attention"]
    result = reproduce.reproduce("table1", config, tmp_path, num_seeds=2, only=only)
    assert asked[0][0].keys() == set(only)
    layers = reproduce.reproduce("layers", config, tmp_path, num_seeds=2)
    pair = {row["arm"]: row["measured"][0] for row in layers["rows"]}
    assert pair["rollingq-3"]["difference"] == pytest.approx(0.01)
    assert asked[1][0]["rollingq-3"]["model.fusion_layers"] == 3


def test_parameters_are_counted_with_the_rotation_and_without_a_run(config, tmp_path):
    rows = {r["arm"]: r for r in reproduce.reproduce("table4", config, tmp_path)["rows"]}
    sizes = {arm: row["measured"][0]["mean"] for arm, row in rows.items()}
    assert sizes["rollingq"] - sizes["attention"] == 8 * 8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table9"], "table is 'table9'; allowed: table1"),
        (["table2"], "wanted one of --config"),
        (["table2", "--data", "av_digits", "--config", "x.py"], "wanted one of --config"),
        (["table2", "--data", "av_digits", "--arms", "ogm"], "'ogm' is no arm of table2"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, tmp_path, capsys):
    line = ["reproduce", *arguments, "--workdir", str(tmp_path / "out")]
    assert run_command(reproduce.command, line) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_tables_run_what_is_missing_and_share_their_runs(config, tmp_path, capsys):
    out = tmp_path / "out"
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    arguments = ["--config_json", str(file), "--workdir", str(out), "--seeds", "2"]
    assert run_command(reproduce.command, ["reproduce", "table2", *arguments]) == 0
    told = capsys.readouterr().out
    assert "attention + RollingQ" in told and "0.76" in told
    made = {p: p.stat().st_mtime_ns for p in (out / "compare" / "runs").rglob("summary.json")}
    assert len(made) == 4
    assert run_command(reproduce.command, ["reproduce", "table3", *arguments]) == 0
    assert made == {p: p.stat().st_mtime_ns for p in made}
    rows = json.loads((out / "table3.json").read_text())["rows"]
    assert [len(row["measured"]) for row in rows] == [4, 4]
    kept = json.loads(next((out / "compare" / "runs").rglob("reproduce.json")).read_text())
    assert set(kept) == {f"audio={n:g}, visual={n:g}" for n in (0.25, 0.5, 1)}
