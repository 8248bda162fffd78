"""Damage to the newest checkpoint: found every time, the one before used, nothing deleted."""

import json
import logging
import shutil

import pytest

from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.preemption import Interrupted
from tests.faults.fault_cases import files, result, steps_saved, tiny_config

NEWEST, BEFORE = 16, 12
pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture(scope="module")
def config(command):
    saves = {"checkpoint.every_steps": 4, "checkpoint.keep": 3}
    return tiny_config(command.folder / "tiny.npz", log_every=1, **saves)


@pytest.fixture(scope="module")
def expected(config, tmp_path_factory):
    """The result of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_and_evaluate(config, workdir)
    return result(workdir)


@pytest.fixture(scope="module")
def stopped(config, tmp_path_factory):
    """A run that stopped at step 16, with checkpoints of the steps 8, 12 and 16."""
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(Interrupted):
        train_and_evaluate(config, workdir, max_steps=NEWEST)
    assert steps_saved(workdir)[-2:] == [BEFORE, NEWEST]
    return workdir


def largest(folder):
    """The file that holds most of the arrays."""
    data = (path for path in folder.rglob("d/*") if path.is_file())
    return max(data, key=lambda path: path.stat().st_size)


def truncated(folder):
    path = largest(folder)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def deleted(folder):
    largest(folder).unlink()


def zeroed(folder):
    path = largest(folder)
    path.write_bytes(bytes(path.stat().st_size))


def bit_flipped(folder):
    path = largest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 16
    path.write_bytes(bytes(content))


def all_files_emptied(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")


def folder_emptied(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def replaced_by_a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("not a checkpoint")


def without_its_manifest(folder):
    (folder / "state" / "manifest.ocdbt").unlink()


def without_its_metadata(folder):
    (folder / "state" / "_METADATA").unlink()


def without_its_state(folder):
    shutil.rmtree(folder / "state")


def without_its_record(folder):
    shutil.rmtree(folder / "record")


def with_a_record_cut_short(folder):
    path = folder / "record" / "metadata"
    path.write_text(path.read_text()[:-40])


def with_a_record_changed(folder):
    path = folder / "record" / "metadata"
    content = json.loads(path.read_text())
    content["record"]["best"]["accuracy"] = 1.0
    path.write_text(json.dumps(content))


def with_the_state_of_another_step(folder):
    shutil.rmtree(folder / "state")
    shutil.copytree(folder.parent / str(BEFORE) / "state", folder / "state")


KINDS = [
    truncated,
    deleted,
    zeroed,
    bit_flipped,
    all_files_emptied,
    folder_emptied,
    replaced_by_a_file,
    without_its_manifest,
    without_its_state,
    without_its_record,
    with_a_record_cut_short,
    with_a_record_changed,
    with_the_state_of_another_step,
]


def content_of(path):
    if path.is_file():
        return path.read_bytes()
    return {name: content for name, (content, _) in files(path).items()}


@pytest.mark.parametrize("damage", KINDS, ids=lambda damage: damage.__name__)
def test_damage(config, expected, stopped, tmp_path, caplog, damage):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    damaged = workdir / "checkpoints" / str(NEWEST)
    damage(damaged)
    content = content_of(damaged)
    with caplog.at_level(logging.WARNING), pytest.raises(Interrupted):
        train_and_evaluate(config, workdir, max_steps=BEFORE + 1)
    named = [r.getMessage() for r in caplog.records if f"checkpoint {NEWEST}" in r.getMessage()]
    assert named and "trying the one before" in named[0], caplog.text
    assert content_of(workdir / "checkpoints" / f"{NEWEST}.damaged") == content
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["step"] for row in rows][-1] == BEFORE + 1  # it went on from before
    train_and_evaluate(config, workdir)
    assert result(workdir) == expected


def test_metadata_that_are_gone_are_not_missed(config, expected, stopped, tmp_path):
    """The record says what arrays there are, and their checksums tell that they are right."""
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    without_its_metadata(workdir / "checkpoints" / str(NEWEST))
    train_and_evaluate(config, workdir)
    assert result(workdir) == expected


def test_a_damaged_best_checkpoint_is_told_and_the_newest_is_tested(
    config, tmp_path, monkeypatch, caplog
):
    """Here validation gets worse from epoch to epoch, so that the best is the oldest."""
    evaluate = Experiment.evaluate

    def worse(self, state, split, check=lambda: None):
        means, columns = evaluate(self, state, split, check)
        return means | ({"accuracy": 1 / int(state.step)} if split == "valid" else {}), columns

    monkeypatch.setattr(Experiment, "evaluate", worse)
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=NEWEST)
    assert steps_saved(tmp_path) == [6, 8, 12, 16]
    bit_flipped(tmp_path / "checkpoints" / "6")
    with caplog.at_level(logging.WARNING):
        summary = train_and_evaluate(config, tmp_path)
    assert "the best checkpoint 6 " in caplog.text
    assert summary["best"] == {"step": 18, "epoch": 3, "accuracy": 1 / 18}
