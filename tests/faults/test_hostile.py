"""Inputs made to do harm, or made of noise: refused in one line, or harmless."""

import json
import os
import pickle
import re
import shutil

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import UserError
from rollingq_jax.train.cli import read_json, run_command, train_command
from rollingq_jax.train.config import check_config, from_json
from rollingq_jax.train.experiment import Experiment
from rollingq_jax.train.logging import read_rows
from rollingq_jax.train.loop import load_run, train_and_evaluate
from rollingq_jax.train.workdir import read_config
from tests.faults.fault_cases import ONE_LINE, files
from tests.train.train_cases import make_arrays, tiny_config

SCRIPT = "<script>alert(1)</script>"


class Payload:
    """Unpickling this makes a folder."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def attempt(tmp_path, capsys):
    """Runs `train.py` on data, which must be refused; returns the line."""
    (tmp_path / "config.py").write_text(
        "from tests.train.train_cases import tiny_config\n"
        "def get_config():\n    config = tiny_config('')\n    return config\n"
    )

    def run(*arguments):
        before = files(tmp_path)
        line = ["train.py", f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
        assert run_command(train_command, [*line, *arguments]) == 2
        printed = capsys.readouterr().err
        assert re.fullmatch(ONE_LINE, printed)
        assert files(tmp_path) == before and not (tmp_path / "run").exists()
        return printed

    return run


def with_objects(path, target):
    arrays = {n: a for n, a in make_arrays().items() if n != "train/a"}
    objects = np.empty(44, object)
    objects[:] = [Payload(str(target))] * 44
    np.savez(path, **arrays, **{"train/a": objects})


def test_an_npz_that_holds_a_pickle(attempt, tmp_path):
    with_objects(tmp_path / "data.npz", tmp_path / "owned")
    printed = attempt(f"--config.data.path={tmp_path / 'data.npz'}")
    assert "'train/a': holds Python objects (a pickle), which are refused" in printed
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("name", ["data.npz", "data.csv", "data.jsonl"])
def test_a_pickle_under_another_name(attempt, tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Payload(str(tmp_path / "owned"))))
    attempt(f"--config.data.path={tmp_path / name}")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("path", ["../outside.txt", "/etc/hostname", "a/../../outside.txt", "link"])
def test_a_manifest_that_leads_out_of_its_folder(attempt, tmp_path, path):
    folder = tmp_path / "data"
    (folder / "a").mkdir(parents=True)
    (tmp_path / "outside.txt").write_text("secret")
    (folder / "link").symlink_to(tmp_path / "outside.txt")
    (folder / "in.txt").write_text("in")
    rows = [f"{split},{n % 2},in.txt,{path}" for split in ("train", "test") for n in range(20)]
    (folder / "manifest.csv").write_text("\n".join(["split,label,x:text,y:text", *rows]) + "\n")
    printed = attempt("--config.data.name=folder", f"--config.data.path={folder / 'manifest.csv'}")
    assert "secret" not in printed and "manifest.csv" in printed


def test_a_script_in_a_class_name_is_shown_and_not_run(tmp_path):
    names = np.array([SCRIPT, '"><img src=x onerror=alert(1)>', "plain"])
    np.savez(tmp_path / "data.npz", **make_arrays(), class_names=names)
    train_and_evaluate(tiny_config(tmp_path / "data.npz", epochs=2), tmp_path / "run")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<script" not in report.lower() and "<img src=x" not in report
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in report
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert SCRIPT in summary["per_class"]  # data keep it as it is


def test_a_workdir_that_holds_pickles_for_checkpoints(tmp_path):
    folder = tmp_path / "run"
    payload = pickle.dumps(Payload(str(tmp_path / "owned")))
    config = tiny_config(tmp_path / "data.npz")
    np.savez(tmp_path / "data.npz", **make_arrays())
    run = Experiment(config, load_dataset(config.data, seed=0))
    for item in ("state", "record"):
        (folder / "checkpoints" / "6" / item).mkdir(parents=True)
        for name in ("metadata", "_METADATA", "manifest.ocdbt", "checkpoint", "commit_success.txt"):
            (folder / "checkpoints" / "6" / item / name).write_bytes(payload)
    (folder / "config.json").write_text(json.dumps(run.config.to_dict(), indent=2) + "\n")
    before = files(folder)
    for use in (load_run, lambda workdir: train_and_evaluate(config, workdir)):
        with pytest.raises(UserError, match="none of the checkpoints .* is intact"):
            use(folder)
    after = files(folder)
    after.pop(".lock")
    assert after == before and not (tmp_path / "owned").exists()


FUZZ = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=12,
)


@FUZZ
@given(content=st.binary(max_size=200))
def test_noise_for_a_config_json(tmp_path, content):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (lambda: read_json(str(path)), lambda: read_config(tmp_path)):
        try:
            read()
        except UserError as error:
            assert str(path) in str(error)


@FUZZ
@given(data=st.data())
def test_a_config_json_in_which_a_field_is_anything(data):
    """Whatever stands in one place, the answer is a configuration or one line."""
    fields = tiny_config("tiny.npz").to_dict()
    section = data.draw(
        st.sampled_from([fields, *(v for v in fields.values() if isinstance(v, dict))])
    )
    section[data.draw(st.sampled_from(sorted(section)) | st.text(max_size=8))] = data.draw(JSON)
    try:
        check_config(from_json(json.loads(json.dumps(fields))))
    except UserError as error:
        assert "\n" not in str(error) or len(str(error)) < 2000


@FUZZ
@given(lines=st.lists(JSON.map(json.dumps) | st.text(max_size=20), max_size=5))
def test_noise_for_metrics(tmp_path, lines):
    path = tmp_path / "metrics.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
    try:
        rows = read_rows(path)
    except UserError as error:
        assert "metrics.jsonl line" in str(error)
    else:
        assert all({"step", "split"} <= row.keys() for row in rows)


@settings(FUZZ, max_examples=40)
@given(data=st.data())
def test_noise_in_a_checkpoint(noisy, data):
    """Any file of a checkpoint, changed anywhere: an error, or the values that were saved."""
    from rollingq_jax.train.checkpoint import Checkpoints
    from tests.train.test_checkpoint import assert_same, make_state

    folder, intact = noisy
    shutil.rmtree(folder)
    shutil.copytree(intact, folder)
    step = folder / "3"
    names = sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())
    path = step / data.draw(st.sampled_from(names))
    content = bytearray(path.read_bytes())
    begin = data.draw(st.integers(0, len(content)))
    content[begin : begin + data.draw(st.integers(0, 8))] = data.draw(st.binary(max_size=8))
    path.write_bytes(bytes(content))
    with Checkpoints(folder, read_only=True) as checkpoints:
        try:
            state, _ = checkpoints.restore(3, make_state(0))
        except UserError as error:
            assert "checkpoint 3" in str(error)
        else:
            assert_same(state, make_state(3))


@pytest.fixture(scope="module")
def noisy(tmp_path_factory):
    """A folder to damage and one to copy from, with a checkpoint of step 3."""
    from etils import epath

    from rollingq_jax.train.checkpoint import Checkpoints
    from tests.train.test_checkpoint import make_state, record

    base = tmp_path_factory.mktemp("noisy")
    with Checkpoints(epath.Path(base / "intact"), keep=1) as checkpoints:
        checkpoints.save(make_state(3), record())
    shutil.copytree(base / "intact", base / "folder")
    return base / "folder", base / "intact"
