"""The evaluate command: what it writes, and one line for each mistake."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from rollingq_jax import evaluate
from rollingq_jax.analysis import metrics
from rollingq_jax.analysis.tasks import SINGLE
from rollingq_jax.data.preprocessing import input_spec
from rollingq_jax.errors import CheckpointError
from rollingq_jax.train.cli import run_command
from tests.analysis import analysis_examples


@pytest.fixture
def workdir(tmp_path, monkeypatch):
    """A folder whose run is a small untrained model; any other folder holds none."""

    def load_run(workdir, fusion="attention"):
        if str(workdir) not in (str(tmp_path), f"{tmp_path}/concat"):
            raise CheckpointError(f"workdir is {str(workdir)!r}; allowed: the folder of a run")
        model, params, dataset, _ = analysis_examples.small_model(
            "concat" if str(workdir).endswith("concat") else fusion
        )
        config = ConfigDict(
            {
                "seed": 0,
                "batch_size": 4,
                "data": {"name": "noise"},
                "model": {"num_classes": 4, "fusion": "attention", "encoders": {}},
            }
        )
        return SimpleNamespace(
            model=model,
            variables={"params": params},
            rotation=None,
            config=config,
            dataset=dataset,
            inputs=input_spec(dataset),
            task=SINGLE,
            step=12,
        )

    monkeypatch.setattr(evaluate, "load_run", load_run)
    return tmp_path


def run(capsys, *arguments):
    code = run_command(evaluate.command, ["evaluate", *arguments])
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_it_writes_numbers_pictures_and_a_report(workdir, capsys):
    code, out, err = run(
        capsys, "--workdir", str(workdir), "--probes", "--levels", "0.5,2",
        "--corrupt", "audio=1.0", "--corrupt", "audio=drop,visual=0.5",
    )  # fmt: skip
    assert code == 0 and not err
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["split"] == "test" and result["num_examples"] == 9 and result["step"] == 12
    model, params, _, columns = analysis_examples.small_model()
    logits, shares = jax.jit(model.apply)({"params": params}, metrics.model_input(columns))
    right = (np.argmax(logits, -1) == columns["label"]).mean()
    assert result["accuracy"] == pytest.approx(right)
    share = np.asarray(shares["attention_share"]["audio"]).mean()
    assert result["attention_share"]["audio"] == pytest.approx(share, abs=1e-6)
    assert [found["corrupt"] for found in result["corrupted"]] == [
        "audio=1.0",
        "audio=drop,visual=0.5",
    ]
    dropped = result["corrupted"][1]  # nobody has audio, so nothing is known of its share
    assert dropped["attention_share"] == {"audio": None, "visual": pytest.approx(1.0)}
    assert dropped["modality_examples"] == {"audio": 0, "visual": 9} and dropped["kept"] == 0
    assert "kept" not in result["corrupted"][0]
    levels = [(p["modality"], p["level"]) for p in result["noise"]]
    assert levels == [(m, v) for m in ("audio", "visual") for v in (0.0, 0.5, 2.0)]
    assert set(result["reliance"]["audio"]) == {"shuffled", "swapped", "replaced"}
    points = {p["scale"]: p for p in result["attention_scale"]}
    assert list(points) == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert points[1.0]["accuracy"] == result["accuracy"]
    assert points[1.0]["attention_share"] == result["attention_share"]
    assert points[1.0]["quality_correlation"] == result["quality_correlation"]
    lengths = [shares["tokens"][m].shape[1] for m in ("audio", "visual")]  # weights are even
    assert points[0.0]["attention_share"]["audio"] == pytest.approx(lengths[0] / sum(lengths))
    assert points[0.0]["quality_correlation"] is None
    assert result["versions"]["jax"]
    assert {path.name for path in (workdir / "figures").iterdir()} == {
        "evaluation_attention.png",
        "evaluation_attention_scale.png",
        "evaluation_noise.png",
        "evaluation_share_quality.png",
    }
    assert "Reliance on each modality" in (workdir / "evaluation.html").read_text()
    assert "accuracy with the query times 0 " in out
    assert "audio=1.0" in out and "quality correlation" in out


def test_a_fusion_without_attention_is_evaluated_too(workdir, capsys):
    (workdir / "concat").mkdir()
    assert run(capsys, "--workdir", str(workdir / "concat"))[0] == 0
    result = json.loads((workdir / "concat" / "evaluation.json").read_text())
    assert "attention_share" not in result and result["corrupted"] == []
    assert not (workdir / "concat" / "figures").exists()


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--split", "tset"], ["split", "'tset'", "train, test"]),
        (["--corrupt", "smell=1"], ["smell", "audio, visual"]),
        (["--corrupt", "audio"], ["audio", "NUMBER"]),
        (["--corrupt", "audio=-1"], ["audio", "-1"]),
        (["--levels", "1,x"], ["--levels", "'1,x'", ">= 0"]),
        (["--levels", "1,-2"], ["--levels", ">= 0"]),
        (["--levels", "nan"], ["--levels", ">= 0"]),
        (["--levels", "0,1"], ["--levels", "without --probes"]),
        (["--batch_size", "0"], ["--batch_size is 0; allowed: an integer >= 1 and"]),
        (["--batch_size", "99999999999"], ["--batch_size", "at most 1,048,576"]),
        (["--seed", "-3"], ["--seed is -3; allowed: an integer >= 0"]),
        (["--seed", "4294967296"], ["--seed", "at most 4,294,967,295"]),
        (["--sed", "3"], ["--sed is not a flag (did you mean --seed?)"]),
        (["--probes=maybe"], ["--probes is 'maybe'; allowed: true or false"]),
        (["--split"], ["--split is given without a value"]),
        (["more"], ["argument 'more' is not known; allowed: --workdir FOLDER"]),
        (["--workdir", "nowhere"], ["nowhere", "folder of a run"]),
    ],
)
def test_a_mistake_is_one_line_and_changes_nothing(workdir, capsys, arguments, words):
    code, out, err = run(capsys, "--workdir", str(workdir), *arguments)
    assert code == 2
    assert err.count("\n") == 1 and "Traceback" not in err
    for word in words:
        assert word in err
    assert not list(workdir.iterdir()) and not out


def test_other_data_are_told_from_the_runs_own(workdir, capsys):
    _, _, dataset, _ = analysis_examples.small_model()
    examples = [dataset.splits["test"][place] for place in range(6)]
    foreign = {m: np.stack([one[m] for one in examples]) for m in dataset.modalities}
    np.savez(workdir / "other.npz", **foreign, label=np.full(6, 99))
    other = str(workdir / "other.npz")
    code, out, err = run(capsys, "--workdir", str(workdir), "--ood", other)
    assert code == 0 and not err and f"AUROC against {other}, mahalanobis" in out
    (found,) = json.loads((workdir / "evaluation.json").read_text())["ood"]
    assert found["path"] == other and found["num_examples"] == 6
    assert all(0 <= found[s]["auroc"] <= 1 for s in ("max_softmax", "energy", "mahalanobis"))
    assert "Other data" in (workdir / "evaluation.html").read_text()
    code, _, err = run(capsys, "--workdir", str(workdir), "--ood", str(workdir / "none.npz"))
    assert code == 2 and err.count("\n") == 1


def test_the_workdir_is_asked_for(capsys):
    code, _, err = run(capsys)
    assert code == 2 and "--workdir" in err and err.count("\n") == 1


def test_help_explains_the_corruptions(capsys):
    code, out, err = run(capsys, "--help")
    assert code == 0 and "audio=replace" in out and not err
