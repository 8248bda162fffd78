"""A full disk, a read-only one, and data that disappear while a run goes on."""

import contextlib
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.fault_cases import ONE_LINE, end, result, steps_saved, until


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(path)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield path
    subprocess.run(["umount", "-l", str(path)], check=True)


def fill(path):
    """Takes all the room that is left, and more is not to be had."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while True:
            file.write(b"x" * 4096)


def saved_and_quiet(disk):
    """There is a checkpoint, and none is being written."""
    return steps_saved(disk) and not any(disk.glob("checkpoints/*.orbax-checkpoint-tmp"))


@contextlib.contextmanager
def paused_between_saves(process, disk):
    """The run does not go on meanwhile; gives the steps saved so far, however many they are."""
    while True:
        assert until(lambda: saved_and_quiet(disk), process)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        if saved_and_quiet(disk):  # still, now that it has stopped
            break
        process.send_signal(signal.SIGCONT)
    yield steps_saved(disk)
    process.send_signal(signal.SIGCONT)


def test_a_disk_that_fills_up(command, undisturbed, disk, tmp_path):
    workdir = tmp_path / "run"
    workdir.symlink_to(disk)  # the output is on another disk
    process = command.start(workdir, "--config.checkpoint.every_steps=3", STEP_SECONDS="0.5")
    with paused_between_saves(process, disk) as saved:
        fill(disk / "filler")
    assert end(process) == 2
    printed = Path(f"{workdir}.err").read_text()
    assert re.fullmatch(ONE_LINE, printed) and "No space left on device" in printed
    assert printed.endswith(f"; the last good checkpoint is of step {saved[-1]}\n")
    code, printed = command.run(workdir)
    assert code == 2 and re.fullmatch(ONE_LINE, printed)
    assert steps_saved(disk) == saved
    (disk / "filler").unlink()
    assert command.run(workdir) == (0, "")
    assert result(workdir) == undisturbed


def test_a_disk_that_becomes_read_only(command, undisturbed, disk, tmp_path):
    workdir = tmp_path / "run"
    workdir.symlink_to(disk)
    process = command.start(workdir, "--config.checkpoint.every_steps=3", STEP_SECONDS="1")
    with paused_between_saves(process, disk) as saved:
        read_only = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True)
    if read_only.returncode:
        process.kill()
        process.wait()
        pytest.skip("the file system was being written")
    assert end(process) == 2
    printed = Path(f"{workdir}.err").read_text()
    assert re.fullmatch(ONE_LINE, printed) and "Read-only file system" in printed
    assert f"the last good checkpoint is of step {saved[-1]}\n" in printed
    code, printed = command.run(workdir)
    assert code == 2 and "allowed: a folder that can be written (Read-only file sys" in printed
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert command.run(workdir) == (0, "")
    assert result(workdir) == undisturbed


@pytest.fixture
def texts(tmp_path):
    """A manifest of two text files an example, 24 of them in the training split."""
    folder = tmp_path / "texts"
    folder.mkdir()
    lines = ["split,label,first:text,second:text"]
    for number in range(40):
        split = "train" if number < 24 else "valid" if number < 32 else "test"
        names = [f"{number}{letter}.txt" for letter in "ab"]
        for name in names:
            (folder / name).write_text(f"{name} of class {number % 2}")
        lines.append(",".join([split, str(number % 2), *names]))
    (folder / "manifest.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_data_file_that_disappears(command, tmp_path, texts):
    """In the second epoch; with the file back, the run goes on from the first one's end."""
    workdir = tmp_path / "run"
    data = ["--config.data.name=folder", f"--config.data.path={texts / 'manifest.csv'}"]
    process = command.start(workdir, *data, STEP_SECONDS="0.5")
    assert until(lambda: steps_saved(workdir), process)
    content = {path: path.read_text() for path in texts.glob("*a.txt")}
    for path in content:
        path.unlink()
    assert end(process) == 2
    printed = Path(f"{workdir}.err").read_text()
    assert re.fullmatch(ONE_LINE, printed) and re.search(r"texts/\d+a\.txt: ", printed)
    assert re.search(r"the last good checkpoint is of step \d+\n", printed)
    before = steps_saved(workdir)
    code, printed = command.run(workdir, *data)
    assert code == 2 and re.fullmatch(ONE_LINE, printed) and "a.txt" in printed
    assert steps_saved(workdir) == before
    for path, text in content.items():
        path.write_text(text)
    assert command.run(workdir, *data) == (0, "")
