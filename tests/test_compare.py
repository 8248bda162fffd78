"""The comparison: what is chosen on what, what a kill changes (nothing), and what is concluded."""

import csv
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rollingq_jax import compare
from rollingq_jax.analysis import report
from rollingq_jax.analysis.metrics import Predictions
from rollingq_jax.baselines.build import build_baseline
from rollingq_jax.comparison import results, runs
from rollingq_jax.data.corruption import parse_corruptions
from rollingq_jax.data.sources import av_digits
from rollingq_jax.errors import CheckpointError, ConfigError, NonFiniteError
from rollingq_jax.models import spec
from rollingq_jax.models.spec import ModelSpec
from rollingq_jax.train.cli import read_python, run_command
from rollingq_jax.train.config import check_config, default_config
from rollingq_jax.train.preemption import Interrupted

CONFIG = """
from ml_collections import ConfigDict
from rollingq_jax.train.config import default_config

def get_config():
    config = default_config()
    config.update_from_flattened_dict({
        "epochs": 2, "batch_size": 8, "log_every": 4, "optimizer.warmup_epochs": 0.5,
        "data.name": "arrays", "data.path": PATH, "rolling.rho": 4.0,
        "model.dim": 8, "model.depth": 1, "model.num_heads": 2, "model.mlp_ratio": 1.0,
    })
    config.compare.grid = ConfigDict({"optimizer": {"learning_rate": (0.01, 0.1)}})
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    """A configuration over two modalities of vectors with a known quality."""
    rng = np.random.default_rng(0)
    means = {"audio": rng.normal(size=(3, 6)), "visual": 2 * rng.normal(size=(3, 5))}
    arrays = {}
    for split, count in {"train": 24, "valid": 12, "test": 16}.items():
        label = np.arange(count, dtype=np.int32) % 3
        arrays[f"{split}/label"] = label
        for name, mean in means.items():
            noise = rng.uniform(0, 2, count)
            values = mean[label] + noise[:, None] * rng.normal(size=(count, mean.shape[1]))
            arrays[f"{split}/{name}"] = values.astype(np.float32)
            arrays[f"{split}/quality_{name}"] = -noise.astype(np.float32)
    np.savez(tmp_path / "data.npz", **arrays)
    path = tmp_path / "config.py"
    path.write_text(CONFIG.replace("PATH", repr(str(tmp_path / "data.npz"))))
    return path


class FakeTraining:
    """In place of `train_and_evaluate`: scores from a formula, calls written down."""

    def __init__(self, folder):
        self.folder, self.calls, self.stop_at = folder, [], None

    def __call__(self, config, workdir, *, interruption, quiet, test=True):
        rate, seed = config.optimizer.learning_rate, config.seed
        arm = config.model.fusion + ("+roll" if config.rolling.enabled else "")
        self.calls.append((arm, rate, seed, test, (self.folder / "selection.json").exists()))
        if len(self.calls) == self.stop_at:
            raise Interrupted(7)
        workdir.mkdir(parents=True, exist_ok=True)
        if arm == "attention" and rate == 0.1:
            raise NonFiniteError("step 3: loss is NaN or infinite")
        # On validation the higher rate is better but for concat; on test always the lower.
        validation = 0.6 + (rate if arm != "concat" else -rate) + 0.01 * seed
        best = {"step": 6, "epoch": 2, "accuracy": validation}
        if not test:
            return {"best": best}
        gain = {"concat": 0.0, "attention": 0.01, "attention+roll": 0.05}[arm]
        summary = {
            "best": best,
            "test_accuracy": 0.5 + gain - rate / 10 + 0.02 * (seed % 3) + gain * seed / 50,
            "test_macro_f1": 0.5 + gain,
            "test_weighted_f1": 0.5,
            "test_calibration_error": 0.1,
            "rotations": None if arm == "concat" else [2],
            "num_parameters": 10,
            "probe_accuracy": {"audio": 0.3},
        }
        if arm != "concat":
            summary["attention_share"] = {"audio": 0.4, "visual": 0.6}
            summary["quality_correlation"] = gain + 0.1 * (seed % 2)
        rows = [
            {"step": 3 * e, "epoch": e, "split": "valid", "accuracy": e / 4, "imbalance": 0.1 * e}
            for e in (1, 2)
        ]
        (workdir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (workdir / "summary.json").write_text(json.dumps(summary))
        return summary


def some_answers(folder):
    rng = np.random.default_rng(0)
    share = rng.uniform(size=30)
    quality = {m: rng.normal(size=30) for m in ("audio", "visual")}
    probabilities = np.full((30, 3), 1 / 3)
    return Predictions(
        probabilities, np.zeros(30, int), {"audio": share, "visual": 1 - share}, quality
    )


@pytest.fixture
def fake(tmp_path, monkeypatch):
    training = FakeTraining(tmp_path / "out")
    monkeypatch.setattr(runs, "train_and_evaluate", training)
    monkeypatch.setattr(compare, "answers_of", some_answers)
    # Figures are made and not drawn, which takes most of a second each: the tests of plots do.
    monkeypatch.setattr(report, "png_bytes", lambda figure: b"PNG")
    return training


def run(config_file, out, *more):
    arguments = ["--config", str(config_file), "--workdir", str(out), *more]
    return run_command(compare.command, ["compare", *arguments])


def test_settings_are_chosen_on_validation_before_any_test_is_read(
    config_file, tmp_path, fake, capsys
):
    assert run(config_file, tmp_path / "out", "--seeds", "4") == 0
    tuning = [call for call in fake.calls if not call[3]]
    tests = [call for call in fake.calls if call[3]]
    assert len(tuning) == 3 * 2 * 2  # arms, settings, seeds: every arm gets the same
    assert not any(chosen for *_, chosen in tuning) and all(chosen for *_, chosen in tests)
    assert len(tests) == len(set(tests)) == 3 * 4  # each read once
    # The best by validation, which is not the best by test; a rate that diverges is out.
    assert {(arm, rate) for arm, rate, *_ in tests} == {
        ("concat", 0.01), ("attention", 0.01), ("attention+roll", 0.1),
    }  # fmt: skip
    chosen = json.loads((tmp_path / "out" / "selection.json").read_text())
    assert chosen["rollingq"]["setting"] == {"optimizer.learning_rate": 0.1}
    assert chosen["rollingq"]["tried"][0]["validation_accuracy"] == pytest.approx([0.61, 0.62])
    assert chosen["attention"]["tried"][1]["validation_accuracy"] == [None, None]
    counts = {(e["settings_tried"], e["runs"], tuple(e["seeds"])) for e in chosen.values()}
    assert counts == {(2, 4, (0, 1))}
    assert {seed for _, _, seed, *_ in tests} == {2, 3, 4, 5}  # none that was chosen on
    told = " ".join(capsys.readouterr().out.split())
    assert "rollingq, optimizer.learning_rate=0.1, seed 1: validation accuracy 0.710" in told
    words = "Settings tried for each arm: 2, on validation data of seeds 0, 1; 12 runs in all."
    assert words in told and words in (tmp_path / "out" / "report.html").read_text()


def test_settings_are_not_chosen_where_no_validation_part_is_left(
    config_file, tmp_path, fake, capsys
):
    arguments = (config_file, tmp_path / "out", "--seeds", "1", "--config.data.validation=False")
    assert run(*arguments) == 2 and not fake.calls
    assert "config.data.validation is False; allowed with several" in capsys.readouterr().err


def test_seeds_used_to_choose_confirm_nothing_unless_that_is_asked_for(
    config_file, tmp_path, fake, capsys
):
    out = tmp_path / "out"
    arguments = ("--arms", "attention,rollingq", "--seeds", "3")
    for first in ("0", "1"):
        assert run(config_file, out, *arguments, "--first_seed", first) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and "--allow_reuse" in err and f"seed {first};" in err
        assert not out.exists() and not fake.calls

    def seeds_of(*more):
        fake.calls = []
        assert run(config_file, out, *arguments, *more) == 0
        return sorted({call[2] for call in fake.calls if call[3]})

    assert seeds_of("--first_seed", "40") == [40, 41, 42]
    assert seeds_of() == [2, 3, 4]
    assert seeds_of("--allow_reuse") == [0, 1]  # and 2, which is there already
    assert json.loads((out / "results.json").read_text())["seeds"] == [0, 1, 2]
    assert run(config_file, out, *arguments, "--first_seed=-1") == 2
    assert "--first_seed is -1" in capsys.readouterr().err


def test_files_hold_every_run_and_the_paired_table(config_file, tmp_path, fake, capsys):
    out = tmp_path / "out"
    assert run(config_file, out, "--seeds", "4") == 0
    result = json.loads((out / "results.json").read_text())
    lines = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert [(line["arm"], line["seed"]) for line in lines] == [
        (arm, str(seed)) for arm in ("concat", "attention", "rollingq") for seed in range(2, 6)
    ]
    accuracy = {(line["arm"], int(line["seed"])): float(line["test_accuracy"]) for line in lines}
    ours, theirs = (
        np.array([accuracy[arm, s] for s in range(2, 6)]) for arm in ("rollingq", "attention")
    )
    line = result["table"]["test_accuracy"]["rollingq"]
    assert line["mean"] == pytest.approx(ours.mean())
    assert line["sd"] == pytest.approx(ours.std(ddof=1))
    assert ours.min() <= line["mean_low"] < line["mean"] < line["mean_high"] <= ours.max()
    assert line["difference"] == pytest.approx((ours - theirs).mean())
    assert (line["wins"], line["losses"], line["pairs"]) == (4, 0, 4)
    assert line["low"] > 0
    assert "difference" not in result["table"]["test_accuracy"]["attention"]
    assert set(result["table"]["quality_correlation"]) == {"attention", "rollingq"}
    assert result["table"]["attention_share/audio"]["attention"]["mean"] == pytest.approx(0.4)
    assert result["verdicts"][0] == (
        "Is attention biased? Too few seeds to say: attention gives visual 0.600 [0.600, 0.600] of "
        "its attention; even is 0.500."
    )
    assert [line.partition("?")[0] for line in result["verdicts"][1:]] == [
        "Did the rolls last", "Did accuracy follow",
    ]  # fmt: skip
    assert result["second_reference"] == "concat"
    assert {path.name for path in (out / "figures").iterdir()} == {
        "accuracy.png", "differences.png", "dynamics.png", "share_quality.png",
    }  # fmt: skip
    assert "95 % bootstrap interval" in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    assert " ".join(printed.split()).count(" ".join(result["conclusion"].split())) == 1
    assert max(map(len, printed.splitlines()[:-1])) <= 80  # the last has the folder's path
    table = printed[printed.index("Is attention biased?") :]  # behind a line for each run
    assert table.index("Did accuracy follow?") < table.index("test accuracy, and its difference")


@pytest.mark.parametrize("stop_at", [1, 5, 12, 13, 20])
def test_stopped_anywhere_it_ends_with_the_same_files(config_file, tmp_path, fake, stop_at, capsys):
    assert run(config_file, tmp_path / "whole", "--seeds", "3") == 0
    whole = len(fake.calls)
    fake.calls, fake.stop_at = [], stop_at
    assert run(config_file, tmp_path / "out", "--seeds", "3") == 75
    assert "goes on from there" in capsys.readouterr().err
    fake.stop_at = None
    assert run(config_file, tmp_path / "out", "--seeds", "3") == 0
    assert len(fake.calls) == whole + 1  # only the one that was cut off is begun again
    for name in ("results.csv", "results.json", "selection.json"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("whole", "out"))
        assert first == second, name
    calls = len(fake.calls)
    assert run(config_file, tmp_path / "out", "--seeds", "3") == 0
    assert len(fake.calls) == calls


def test_seeds_and_arms_can_be_added_later(config_file, tmp_path, fake):
    out = tmp_path / "out"
    assert run(config_file, out, "--arms", "attention,concat", "--seeds", "2") == 0
    fake.calls = []
    assert run(config_file, out, "--arms", "attention,rollingq", "--seeds", "3") == 0
    assert [call[:4] for call in fake.calls if call[3] and call[0] == "attention"] == [
        ("attention", 0.01, 4, True)
    ]
    assert not [call for call in fake.calls if call[0] == "concat"]
    assert set(json.loads((out / "selection.json").read_text())) == {
        "attention", "concat", "rollingq",
    }  # fmt: skip


@pytest.mark.parametrize(
    "more, words",
    [
        (["--arms", "smell"], ["'smell'", "audio", "rollingq"]),
        (["--arms", "sum,sum"], ["'sum'", "twice"]),
        (["--arms", "a/b=sum"], ["'a/b'"]),
        (["--arms", "x=sum:model.dimm=3"], ["'x'", "model.dimm", "dim"]),
        (["--arms", "x=sum:model.dim=wide"], ["'x'", "model.dim", "'wide'", "integer >= 1"]),
        (["--arms", "x=sum:rolling.rho=-1"], ["'x'", "rolling.rho", "-1", ">= 0"]),
        (["--arms", "x=sum:rolling.rho"], ["rolling.rho", "FIELD=VALUE"]),
        (["--arms", "x=sum:rolling.rho={[]:1}"], ["'x'", "rolling.rho", ">= 0"]),
        (["--arms", "x=ogm:model.fusion=attention"], ["'x'", "ogm", "concat"]),
        (["--arms", "x=audio:baseline.name=pmr"], ["'x'", "pmr", "one modality"]),
        (["--arms", "x=sum:optimizer.learning_rate=1.0"], ["'x'", "grid"]),
        (["--arms", "x=sum:seed=3"], ["'x'", "config.seed"]),
        (["--arms", "x=sum:data.path=other.npz"], ["other.npz"]),
        (["--seeds", "0"], ["--seeds", "0"]),
        (["--seeds", "many"], ["seeds", "many"]),
        (["--reference", "sum"], ["--reference", "'sum'", "concat, attention"]),
        (["--config.compare.tune_seeds=0"], ["tune_seeds", "0"]),
        (["--config.data.path=nowhere.npz"], ["nowhere.npz"]),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(config_file, tmp_path, fake, capsys, more, words):
    assert run(config_file, tmp_path / "out", *more) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    for word in words:
        assert word in err
    assert not (tmp_path / "out").exists() and not fake.calls


def test_another_comparison_in_the_folder_is_refused(config_file, tmp_path, fake, capsys):
    out = tmp_path / "out"
    assert run(config_file, out, "--arms", "attention", "--seeds", "1") == 0
    assert run(config_file, out, "--config.rolling.rho=2.0") == 2
    assert "rolling.rho is 2.0 and was 4.0" in capsys.readouterr().err
    assert run(config_file, out, "--config.compare.tune_seeds=1") == 2
    assert "compare.tune_seeds is 1 and was 2" in capsys.readouterr().err
    assert run(config_file, out, "--arms", "attention=rollingq") == 2
    assert "'attention' with other fields" in capsys.readouterr().err
    data = tmp_path / "data.npz"
    arrays = dict(np.load(data))
    np.savez(data, **arrays | {"train/audio": arrays["train/audio"] + 1})
    assert run(config_file, out, "--arms", "attention", "--seeds", "1") == 2
    assert "on other data: test/audio has other values" in capsys.readouterr().err


FUSIONS = ("concat", "attention", "rollingq", "sum", "film", "gated", "mbt", "mbt+rollingq")
FUSIONS += ("mbt-paper", *runs.CROSS)


def test_arms_keep_what_the_configuration_sets(config_file, tmp_path, fake, capsys):
    """A loss for each modality and no limit on rotations, in every fusion; resets are told."""
    arms = runs.parse_arms(",".join((*FUSIONS, "ogm", "audio")), ("audio", "visual"))
    config = default_config()
    config.baseline.name = "joint"
    config.rolling.max_rotations = None
    config.rolling.check_every = 8
    made = {name: runs.with_fields(config, fields, name) for name, fields in arms.items()}
    names = {name: one.baseline.name for name, one in made.items()}
    assert names == dict.fromkeys(FUSIONS, "joint") | {"ogm": "ogm", "audio": ""}
    assert {(one.rolling.max_rotations, one.rolling.check_every) for one in made.values()} == {
        (None, 8)
    }
    assert runs.resets(config, arms) == [
        "arm ogm: config.baseline.name is 'ogm' and not 'joint'",
        "arm audio: config.baseline.name is '' and not 'joint'",
    ]
    config.baseline.name = ""
    assert runs.resets(config, arms) == []
    more = ("--arms", "attention,x=attention:baseline.name=:rolling.rho=2.0", "--seeds", "1")
    assert run(config_file, tmp_path / "out", "--config.baseline.name=joint", *more) == 0
    told = capsys.readouterr().out
    assert "arm x: config.baseline.name is '' and not 'joint'\n" in told
    assert "arm x: config.rolling.rho is 2.0 and not 4.0\n" in told
    assert "arm attention: config" not in told


def test_controls_are_arms(config_file):
    """Even attention, one rotation, rotations at epochs' ends, and noise that is fresh."""
    text = "uniform,rollingq-once,rollingq-epoch,uniform-fresh,attention-fresh,rollingq-fresh"
    arms = runs.parse_arms(text, ("audio", "visual"))
    config = read_python(str(ROOT / "configs" / "av_digits.py"))
    made = {name: runs.with_fields(config, fields, name) for name, fields in arms.items()}
    for one in made.values():
        check_config(one)
        assert one.model.fusion == "attention" and one.baseline.name == "joint"
    rolls = {name: one.rolling.enabled for name, one in made.items()}
    assert [name for name, does in rolls.items() if not does] == [
        "uniform", "uniform-fresh", "attention-fresh",
    ]  # fmt: skip
    assert [name for name, one in made.items() if one.model.attention_scale == 0.0] == [
        "uniform", "uniform-fresh",
    ]  # fmt: skip
    once, ends = made["rollingq-once"].rolling, made["rollingq-epoch"].rolling
    assert (once.max_rotations, once.check_every) == (1, 8)
    assert (ends.max_rotations, ends.check_every) == (None, 0)
    text = "concat,attention-quality,uniform-quality,rollingq-quality,uniform-shuffled"
    text += ",attention-energy,uniform-energy,rollingq-energy"
    config.model.quality_bias = 2.0
    found = {
        name: runs.with_fields(config, fields, name).model
        for name, fields in runs.parse_arms(text, ("audio", "visual")).items()
    }
    energies = [n for n, m in found.items() if m.quality_signal == "energy"]
    assert energies == ["attention-energy", "uniform-energy", "rollingq-energy"]
    assert {found.pop(n).quality_bias for n in energies} == {0.5}
    assert {n: (m.quality_bias, m.quality_shuffled) for n, m in found.items()} == {
        "concat": (0.0, False),
        "attention-quality": (1.0, False),
        "uniform-quality": (1.0, False),
        "rollingq-quality": (1.0, False),
        "uniform-shuffled": (1.0, True),
    }
    fresh = "audio=0.5, audio=0..3.0@0.3, visual=0.3, visual=0..1.5@0.3"
    assert {n for n, one in made.items() if one.data.corruptions == fresh} == {
        n for n in made if n.endswith("-fresh")
    }
    kinds = {(c.modality, c.amount, c.prob) for c in parse_corruptions(fresh, ("audio", "visual"))}
    assert kinds == {
        ("audio", 0.5, 1.0), ("audio", (0.0, 3.0), 0.3),
        ("visual", 0.3, 1.0), ("visual", (0.0, 1.5), 0.3),
    }  # fmt: skip


def test_a_comparison_of_an_older_version_goes_on_where_its_arms_are_the_same(
    config_file, tmp_path, fake, capsys
):
    """Older versions wrote an empty `baseline.name` into each arm; then that was reset, too."""
    for method, code in (("", 0), ("joint", 2)):
        out = tmp_path / f"out{method}"
        arguments = ("--arms", "attention", "--seeds", "2", f"--config.baseline.name={method}")
        assert run(config_file, out, *arguments) == 0
        path = out / "comparison.json"
        stored = json.loads(path.read_text())
        stored["arms"]["attention"]["baseline.name"] = ""
        path.write_text(json.dumps(stored))
        fake.calls = []
        capsys.readouterr()
        assert run(config_file, out, *arguments) == code
        assert not fake.calls
    assert "holds an arm 'attention' with other fields" in capsys.readouterr().err


def test_arms_are_named_changes_of_the_configuration():
    parsed = runs.parse_arms(
        "audio, wide=rollingq:model.dim=128:rolling.method=svd,"
        "p=config:model.encoders.audio.patch=(4,8):rolling.joint=true",
        ("audio", "visual"),
    )
    assert parsed["audio"]["model.modality"] == "audio"
    assert parsed["audio"]["model.fusion"] == "unimodal"
    assert parsed["wide"] == runs.ARMS["rollingq"] | {"model.dim": 128, "rolling.method": "svd"}
    assert parsed["p"] == {"model.encoders.audio.patch": (4, 8), "rolling.joint": True}
    config = default_config()
    changed = runs.with_fields(config, parsed["wide"], "here")
    assert changed.model.dim == 128 and config.model.dim == 64
    one = runs.with_fields(config, parsed["audio"], "here")
    back = runs.with_fields(one, runs.ARMS["sum"], "here")
    assert one.model.modality == "audio" and back.model.modality is None


ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.findall(
    r'--arms "(.*?)"(?: --reference (\S+))?',
    (ROOT / "docs" / "howto" / "compare.md").read_text().replace("\\\n", ""),
)


def test_the_documentation_has_every_ablation():
    fields = {
        field
        for arms, _ in COMMANDS
        for changes in runs.parse_arms(arms, ("audio", "visual")).values()
        for field in changes
    }
    assert fields >= {
        *("rolling.rho", "rolling.beta", "rolling.max_rotations", "rolling.check_every"),
        *("rolling.window", "rolling.method", "rolling.joint", "batch_size"),
        *("model.depth", "model.fusion_heads", "model.fusion_layers"),
    }


@pytest.mark.parametrize(("arms", "reference"), COMMANDS, ids=lambda text: text[:30])
def test_the_ablations_of_the_documentation_are_arms(arms, reference):
    parsed = runs.parse_arms(arms, ("audio", "visual"))
    assert (reference or "attention") in parsed and len(parsed) > 2
    for name, fields in parsed.items():
        changed = runs.with_fields(
            read_python(str(ROOT / "configs" / "av_digits.py")), fields, name
        )
        check_config(changed)
        spec = ModelSpec.from_config(
            changed.model.to_dict()
            | {"num_classes": 3, "encoders": {m: {"kind": "vector"} for m in ("audio", "visual")}}
        )
        build_baseline(changed.baseline, spec, 10, 100)


def test_settings_are_all_combinations_and_ties_go_to_the_first():
    grid = ConfigDict({"optimizer": {"learning_rate": (0.1, 0.2)}, "rolling": {"rho": (1.0, 4.0)}})
    settings = runs.settings_of(grid)
    assert settings[1] == {"optimizer.learning_rate": 0.1, "rolling.rho": 4.0}
    assert len(settings) == 4 and runs.settings_of(ConfigDict()) == [{}]
    assert runs.choose([[0.5, 0.75], [0.75, 0.5], [0.9, None]]) == 0
    assert runs.choose([[None], [None]]) is None
    with pytest.raises(ConfigError, match="grid.rolling.rho is 1.0"):
        runs.settings_of(ConfigDict({"rolling": {"rho": 1.0}}))


def test_of_an_error_less_is_better():
    assert runs.choose([[0.5], [0.2], [0.4]], "mae") == 1 and runs.choose([[None]], "mae") is None
    records = [
        {"arm": arm, "seed": seed, "test_mae": value + seed / 10, "test_acc7": 0.5}
        for arm, value in (("attention", 1.0), ("rollingq", 0.9))
        for seed in range(5)
    ]
    table = results.make_table(records, ("attention", "rollingq"), "attention")
    assert list(table) == ["test_mae", "test_acc7"] and results.main_of(table) == "test_mae"
    line = table["test_mae"]["rollingq"]
    assert (line["wins"], line["losses"]) == (5, 0) and line["difference"] == pytest.approx(-0.1)
    assert results.verdict("test_mae", line) == "a gain"
    said = results.conclude(table, None, "attention", "concat", 5)
    assert "Test MAE against attention (1.200" in said and "5 won and 0 lost: a gain" in said


def test_compiled_programs_are_kept_in_the_folder_unless_the_user_has_another(tmp_path):
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)  # tests have one
    with runs.compiled_programs(tmp_path / "unused"):
        assert getattr(jax.config, name) == before
    jax.config.update(name, None)
    try:
        with runs.compiled_programs(tmp_path / "compiled"):
            jax.jit(lambda x: 3 * x + len(name))(np.float32(1))
        assert getattr(jax.config, name) is None
    finally:
        jax.config.update(name, before)
    assert list((tmp_path / "compiled").iterdir()) and not (tmp_path / "unused").exists()


def test_damaged_files_are_named(tmp_path):
    path = tmp_path / "selection.json"
    path.write_text("[1")
    with pytest.raises(CheckpointError, match="selection.json is damaged"):
        runs.read_json(path)


def table_with(differences):
    """A table of two arms with these differences to attention, accuracy 0.5."""
    made = []
    for seed, gap in enumerate(differences):
        made.append({"arm": "attention", "seed": seed, "test_accuracy": 0.5})
        made.append({"arm": "x", "seed": seed, "test_accuracy": 0.5 + gap})
    return results.make_table(made, ["attention", "x"], "attention")


@pytest.mark.parametrize(
    "differences, words",
    [
        ([0.02, 0.03, 0.01, 0.02, 0.04], "x +2.4 points [+"),
        ([0.02, 0.03, 0.01, 0.02, 0.04], "5 won and 0 lost: a gain"),
        ([-0.02, -0.03, -0.01, -0.02, -0.04], "0 won and 5 lost: a loss"),
        ([0.02, -0.03, 0.01, -0.02, 0.03], "no difference is shown"),
        ([0.02], "1 seed: too few for any difference to count"),
        ([0.02, 0.03], "[+2.0, +3.0], 2 won and 0 lost: too few pairs to count"),
    ],
)
def test_the_conclusion_says_what_the_intervals_allow(differences, words):
    table = table_with(differences)
    text = results.conclude(table, None, "attention", "concat", len(differences))
    assert words in text and "against attention (50.0 %" in text
    detects = "difference to attention in test accuracy is detected with probability 0.8 from"
    assert (detects in text) == (len(differences) >= 5)
    assert ("gain;" not in text) and text.endswith("data set and model.")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_real_runs_killed_in_the_middle_give_the_same_table(config_file, tmp_path, monkeypatch):
    arguments = ("--arms", "attention,rollingq", "--seeds", "2", "--config.compare.tune_seeds=1")
    assert run(config_file, tmp_path / "whole", *arguments, "--noise") == 0
    real, calls = runs.train_and_evaluate, []

    def cut_short(config, workdir, **options):
        calls.append(workdir)
        cut = len(calls) in (2, 8)  # in the search, and in the tests
        return real(config, workdir, max_steps=2 if cut else None, **options)

    monkeypatch.setattr(runs, "train_and_evaluate", cut_short)
    codes = [run(config_file, tmp_path / "cut", *arguments) for _ in range(3)]
    assert codes == [75, 75, 0]
    for name in ("results.csv", "selection.json"):
        first, second = ((tmp_path / f / name).read_bytes() for f in ("whole", "cut"))
        assert first == second, name
    tables = [
        json.loads((tmp_path / f / "results.json").read_text())["table"] for f in ("whole", "cut")
    ]
    assert tables[0] == tables[1]
    assert (tmp_path / "whole" / "figures" / "noise.png").exists()
    noise = json.loads((tmp_path / "whole" / "noise.json").read_text())
    assert {p["modality"] for p in noise["rollingq"][1]} == {"audio", "visual"}


def test_verdicts_say_what_the_intervals_show():
    def run(arm, seed, share, accuracy):
        shares = {"attention_share/a": share, "attention_share/b": 1 - share}
        rotations = 2 if arm == "rollingq" else None
        return {
            "arm": arm,
            "seed": seed,
            "rotations": rotations,
            "test_accuracy": accuracy,
        } | shares

    wobble = [0.01 * (seed - 3) for seed in range(7)]
    made = [run("attention", s, 0.7 + w, 0.5) for s, w in enumerate(wobble)]
    made += [run("rollingq", s, 0.55 + w / 2, 0.6 + w) for s, w in enumerate(wobble)]
    table = results.make_table(made, ["attention", "rollingq"], "attention")
    biased, lasted, followed = results.verdicts(table, made, "attention")
    assert biased.startswith("Is attention biased? Yes: attention gives a 0.700 [0.6")
    assert biased.endswith("of its attention; even is 0.500.")
    assert lasted.startswith("Did the rolls last? Yes: rollingq gives a 0.550 [")
    assert followed.startswith("Did accuracy follow? Yes: rollingq +10.0 points [")
    assert results.verdicts({"test_accuracy": table["test_accuracy"]}, made, "attention") == []
    # Of a modality that has four fifths of the tokens, 0.7 of the attention is little.
    made = [one | {"uniform_share/a": 0.8, "uniform_share/b": 0.2} for one in made]
    biased, lasted, _ = results.verdicts(table, made, "attention")
    assert biased.startswith("Is attention biased? Yes: attention gives b 0.300 [0.2")
    assert biased.endswith("of its attention; even is 0.200.")
    assert lasted.startswith("Did the rolls last? No: rollingq gives b 0.450 [")


FEW = {"train": 16, "valid": 8, "test": 8}  # of the demo's examples
EVERY_METHOD = [name for name, fields in runs.ARMS.items() if fields.get("baseline.name")]
EVERY_FUSION = {  # the first arm of each
    fields["model.fusion"]: name
    for name, fields in reversed(runs.ARMS.items())
    if "model.fusion" in fields
}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_every_fusion_and_method_ends_in_a_row(av_digits_cache, tmp_path, monkeypatch, capsys):
    """On some of the demo's data, with a model as small as they allow."""
    monkeypatch.setattr(report, "png_bytes", lambda figure: b"PNG")
    monkeypatch.setattr(compare, "answers_of", some_answers)
    digits = av_digits.load(SimpleNamespace(cache_dir=av_digits_cache), seed=0)
    few = {
        split: list(itertools.islice((one for one in digits.splits[split] if one["label"] < 3), n))
        for split, n in FEW.items()
    }
    arrays = {
        f"{split}/{name}": np.stack([example[name] for example in examples])
        for split, examples in few.items()
        for name in examples[0]
    }
    np.savez(tmp_path / "data.npz", **arrays)
    text = CONFIG.replace("PATH", repr(str(tmp_path / "data.npz")))
    changes = '"model.encoders": {"audio": {"kind": "spectrogram", "patch": (32, 16)}, '
    changes += '"visual": {"kind": "image", "patch": (8, 4)}}, "epochs": 1,'
    text = text.replace('"epochs": 2,', changes).replace("(0.01, 0.1)", "(0.1,)")
    text = text.replace(
        '"model.depth": 1', '"model.depth": 0, "model.mbt_layers": 1, "model.dropout": 0.0'
    )
    (tmp_path / "config.py").write_text(text)
    assert {*EVERY_FUSION} == {*spec.FUSIONS} - {"unimodal"}
    arms = dict.fromkeys(("audio", "rollingq", *EVERY_FUSION.values(), *EVERY_METHOD))
    out = tmp_path / "out"
    assert run(tmp_path / "config.py", out, "--seeds", "1", "--arms", ",".join(arms)) == 0
    printed = capsys.readouterr().out
    table = json.loads((out / "results.json").read_text())["table"]
    assert list(table["test_accuracy"]) == list(arms)
    assert all(re.search(rf"^ +{re.escape(arm)} ", printed, re.MULTILINE) for arm in arms)
    shares = {"rollingq", "attention", "mbt", *runs.CROSS_FUSIONS, "entropy", "pdf", "qmf"}
    assert set(table["attention_share/audio"]) == shares
    assert {"attention", "rollingq"} <= set(table["quality_correlation"]) <= shares
