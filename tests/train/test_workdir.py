"""The folder of a run: written whole, locked, checked."""

import errno
import fcntl
import os
import subprocess
import sys

import jax
import pytest
from etils import epath

from rollingq_jax.errors import CheckpointError, ConfigError
from rollingq_jax.train.workdir import check_workdir, locked
from tests.train.train_cases import files


def test_lock_is_exclusive_and_gone_with_its_holder(tmp_path):
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'a+'); fcntl.flock(f, fcntl.LOCK_EX);"
        "f.write('process 7 on elsewhere'); f.flush(); print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path / ".lock"], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    line = r"in use by another run \(process 7 on elsewhere\); allowed: a folder that no live run"
    with pytest.raises(CheckpointError, match=line), locked(epath.Path(tmp_path)):
        pass
    holder.kill()  # as a crash would: nothing is left to clean up
    holder.wait()
    with locked(epath.Path(tmp_path)):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    with locked(epath.Path(tmp_path)):
        pass


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch, caplog):
    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(epath.Path(tmp_path)):
        assert "cannot be locked: [Errno" in caplog.text


def test_of_several_processes_the_first_holds_the_lock(tmp_path, monkeypatch):
    with locked(epath.Path(tmp_path)):
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        with locked(epath.Path(tmp_path)):
            pass


def test_a_folder_is_checked_without_being_made(tmp_path):
    before = files(tmp_path)
    path = check_workdir(tmp_path / "a" / "b" / "c")
    assert path == epath.Path(tmp_path / "a" / "b" / "c")
    assert files(tmp_path) == before and list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="allowed: a folder that can be written"):
        check_workdir("/proc/nothing/here")
