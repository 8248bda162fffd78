"""A cached directory is whole or absent, whatever happens while it is made."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time

import pytest

from rollingq_jax.data.cache import build_once, cache_root
from rollingq_jax.errors import DataError


def build(scratch):
    made = scratch / "made"
    (made / "deep").mkdir(parents=True)
    (made / "a.bin").write_bytes(b"a" * 1000)
    (made / "deep" / "b.bin").write_bytes(b"b")
    return made


def never(scratch):
    raise AssertionError("built again")


def test_the_second_time_nothing_is_built(tmp_path):
    target = tmp_path / "name" / "1.0.0"
    build_once(target, build)
    assert (target / "deep" / "b.bin").read_bytes() == b"b"
    build_once(target, never)
    assert os.listdir(target.parent) == ["1.0.0"]


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def fail(scratch):
        build(scratch)
        raise RuntimeError("power cut")

    target = tmp_path / "name"
    with pytest.raises(RuntimeError, match="power cut"):
        build_once(target, fail)
    assert os.listdir(tmp_path) == []
    build_once(target, build)


def test_a_killed_build_is_not_taken_for_a_whole_one(tmp_path):
    code = f"""
import pathlib, sys, time
from rollingq_jax.data.cache import build_once
def build(scratch):
    made = scratch / "made"
    made.mkdir()
    (made / "a.bin").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
build_once(pathlib.Path({str(tmp_path / "name")!r}), build)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout.readline() == "half\n"
        process.send_signal(signal.SIGKILL)
    build_once(tmp_path / "name", build)
    assert (tmp_path / "name" / "a.bin").read_bytes() == b"a" * 1000


def build_slowly(target, barrier, results):
    def slow(scratch):
        barrier.wait(20)  # both have found the target absent
        time.sleep(0.05)
        return build(scratch)

    build_once(target, slow)
    results.put((target / "a.bin").read_bytes())


def test_two_at_once_do_not_break_each_other(tmp_path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(2), context.Queue()
    target = tmp_path / "name"
    processes = [
        context.Process(target=build_slowly, args=(target, barrier, results)) for _ in range(2)
    ]
    for process in processes:
        process.start()
    got = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    assert got == [b"a" * 1000] * 2
    assert os.listdir(tmp_path) == ["name"]


@pytest.mark.parametrize("damage", ["truncate", "flip", "delete", "extra", "manifest"])
def test_damage_is_one_line_that_says_what_to_delete(tmp_path, damage):
    target = tmp_path / "name"
    build_once(target, build)
    if damage == "truncate":
        (target / "a.bin").write_bytes(b"a" * 999)
    elif damage == "flip":
        (target / "a.bin").write_bytes(b"a" * 500 + b"A" + b"a" * 499)
    elif damage == "delete":
        (target / "deep" / "b.bin").unlink()
    elif damage == "extra":
        (target / "c.bin").write_bytes(b"")
    else:
        (target / "sha256.json").write_text("{")
    with pytest.raises(DataError, match=f"{target} is damaged; delete it") as caught:
        build_once(target, never)
    assert "\n" not in str(caught.value)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="cache_dir: .*file.* cannot be written"):
        build_once(tmp_path / "file" / "name", build)


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("ROLLINGQ_CACHE", raising=False)
    assert cache_root() == tmp_path / ".cache" / "rollingq_jax"
    monkeypatch.setenv("ROLLINGQ_CACHE", "/somewhere")
    assert str(cache_root()) == "/somewhere"
    assert str(cache_root("/else")) == "/else"
