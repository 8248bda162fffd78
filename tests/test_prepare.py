"""The preparation's command line: one line for a mistake, exit codes, going on after a kill."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rollingq_jax import prepare
from rollingq_jax.data.records import open_records
from rollingq_jax.train.cli import run_command
from tests.data import crema_d_tree

ROOT = Path(__file__).resolve().parents[1]
CLIPS = crema_d_tree.clip_names()


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "rollingq_jax.prepare", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, timeout=120, **options,
    )  # fmt: skip


def prepared(*arguments):
    """The exit code."""
    return run_command(prepare.command, ["prepare", *arguments])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["data_set, --source, --data_dir are missing"]),
        (["imagenet", "--source", "a", "--data_dir", "b"], ["'imagenet'", "crema_d"]),
        (["crema_d", "--data_dir", "b"], ["--source"]),
        (
            ["crema_d", "--source", "a", "--data_dir", "b", "--fps", "0"],
            ["--fps is 0; allowed: an integer >= 1"],
        ),
        (
            ["crema_d", "--source", "a", "--data_dir", "b", "--fps", "x"],
            ["--fps is 'x'; allowed: an integer >= 1"],
        ),
        (["crema_d", "--source", "a", "--data_dir", "b", "--sorce", "c"], ["--sorce"]),
        (["crema_d", "--source", "/nowhere", "--data_dir", "b"], ["/nowhere: no such folder"]),
        (["kinetics_sounds", "--source", "/nowhere", "--data_dir", "b"], ["no such folder"]),
        (["cmu_mosei", "--source", "/nowhere", "--data_dir", "b"], ["no such file"]),
        (
            ["cmu_mosei", "--source", "a", "--data_dir", "b", "--fps", "7"],
            ["--fps is 7; allowed with crema_d, kinetics_sounds;"],
        ),
        (
            ["cmu_mosei", "--source", "a", "--data_dir", "b", "--workers", "1"],
            ["--workers is 1; allowed with crema_d, kinetics_sounds;"],
        ),
        (
            ["crema_d", "--source", "gs://bucket/a", "--data_dir", "b"],
            ["--source: 'gs://bucket/a'; allowed: a local path"],
        ),
        (
            ["cmu_mosei", "--source", "a", "--data_dir", "gs://bucket/data"],
            ["--data_dir: 'gs://bucket/data'; allowed: a local path"],
        ),
    ],
)
def test_a_mistake_is_one_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert prepared(*arguments) == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert all(word in lines[0] for word in words), lines
    assert not list(tmp_path.iterdir())


def test_a_folder_without_rights_is_one_line(capsys, tmp_path, monkeypatch):
    def is_dir(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.chdir(tmp_path)
    for name in prepare.DATA_SETS:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "is_dir", is_dir)
            assert prepared(name, "--source", "locked", "--data_dir", "b") == 74
        printed = capsys.readouterr().err
        assert printed == "error: [Errno 13] Permission denied: 'locked'\n"
    assert not list(tmp_path.iterdir())


def test_help_names_every_set(capsys):
    assert prepared("--help") == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in prepare.DATA_SETS)


@pytest.mark.slow
def test_the_command(tmp_path):
    source = crema_d_tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=2)
    (source / "AudioWAV" / f"{CLIPS[0]}.wav").write_bytes(b"RIFF")
    done = run("crema_d", "--source", source, "--data_dir", tmp_path / "data")
    assert done.returncode == 0, done.stderr
    assert "5 clips" in done.stdout and f"--config.data.path={tmp_path / 'data'}" in done.stdout
    assert done.stderr.splitlines()[-1] == "1 unreadable, left out"
    assert "Traceback" not in done.stderr

    again = run("crema_d", "--source", source, "--data_dir", tmp_path / "data", "--strict")
    assert again.returncode == 2 and CLIPS[0] in again.stderr.splitlines()[-1]
    assert "Traceback" not in again.stderr
    other = run("crema_d", "--source", source, "--data_dir", tmp_path / "data", "--fps", 1)
    assert other.returncode == 0 and "already prepared" in other.stderr


def test_interrupt_leaves_a_note_and_goes_on(capsys, tmp_path, monkeypatch):
    from rollingq_jax.data.sources import crema_d

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    source = crema_d_tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=1)
    command = ["crema_d", "--source", str(source), "--data_dir", str(tmp_path / "data")]
    with monkeypatch.context() as patch:
        patch.setattr(crema_d, "read_audio", stop)
        assert prepared(*command) == 130
    assert "give the same command again" in capsys.readouterr().err
    assert prepared(*command) == 0


@pytest.mark.faults
@pytest.mark.parametrize("delay", [0.5, 1.0, 1.5, 2.0])
def test_kill_and_go_on(tmp_path, delay):
    """Whenever it is killed: no half set, and the next run's is the undisturbed one's."""
    source = crema_d_tree.make_tree(tmp_path / "CREMA-D", frames=2)
    command = [sys.executable, "-m", "rollingq_jax.prepare", "crema_d", "--source", str(source)]
    with subprocess.Popen(
        [*command, "--data_dir", str(tmp_path / "a")], cwd=ROOT, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    for name in ("a", "b"):
        done = run("crema_d", "--source", source, "--data_dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    killed, whole = (open_records(tmp_path / name / "crema_d", "") for name in ("a", "b"))
    assert killed.rows == whole.rows and len(whole.rows) == len(CLIPS)
    for number in range(len(CLIPS)):
        first, second = killed.source()[number], whole.source()[number]
        assert first["clip"] == second["clip"] and list(first["frames"]) == list(second["frames"])
        assert (first["audio"] == second["audio"]).all()
