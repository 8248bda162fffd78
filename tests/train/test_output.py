"""What commands print: in any encoding, with any name, whether or not somebody still reads it."""

import io
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rollingq_jax.errors import DataError, printable
from rollingq_jax.train.cli import run_command
from rollingq_jax.train.logging import table
from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.output import Output, shown
from tests.train.train_cases import make_arrays, tiny_config, write_arrays

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("日本", "\x1b[31mred\x1b]0;title\x07", "a\nb")
CONFIG = (
    "from tests.train.train_cases import tiny_config\n"
    "def get_config():\n    return tiny_config('data.npz', epochs=2, log_every=1)\n"
)


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A folder with data whose classes have odd names, and a configuration."""
    folder = tmp_path_factory.mktemp("here")
    np.savez(folder / "data.npz", **make_arrays(), class_names=np.array(NAMES))
    (folder / "config.py").write_text(CONFIG)
    return folder


def run(here, command, *, pipe=None, **environment):
    """A command in a process of its own; `pipe` is a shell's command that reads its output."""
    path = str(ROOT)
    environment = {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "agg"} | environment
    line = f"{sys.executable} {command}"
    if pipe:
        line = f"{{ {line}; echo code $? >&2; }} {pipe}"
    return subprocess.run(
        ["bash", "-c", line],
        cwd=here,
        env=os.environ | environment,
        capture_output=True,
        timeout=300,
    )


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_names_in_other_scripts_in_whatever_encoding(here, encoding):
    done = run(here, "-m rollingq_jax.check --path data.npz", PYTHONIOENCODING=encoding)
    assert done.returncode == 0 and done.stderr == b""
    printed = done.stdout.decode(encoding)
    name = "日本" if encoding == "utf-8" else r"\u65e5\u672c"
    assert f"\n  {name}: train 15, valid 6, test 7\n" in printed
    assert "\x1b" not in printed and "\x07" not in printed
    assert r"  \x1b[31mred\x1b]0;title\x07: train 15" in printed and r"  a\nb: train 14" in printed


@pytest.mark.slow
def test_a_run_whose_output_is_closed_goes_on_to_its_end(here):
    done = run(here, f"{ROOT / 'train.py'} --config config.py --workdir piped", pipe="| head -1")
    assert done.stdout.startswith(b"devices: ") and done.stdout.count(b"\n") == 1
    told = done.stderr.decode().splitlines()
    assert told == ["standard output was closed; the command goes on without it", "code 0"]
    assert json.loads((here / "piped" / "summary.json").read_text())["best"]["epoch"] in (1, 2)


def test_check_with_nobody_who_reads_it(here):
    done = run(here, "-m rollingq_jax.check --path data.npz 2>&1", pipe="| true")
    assert done.returncode == 0 and done.stderr == b"code 0\n"


@pytest.mark.parametrize(("target", "code"), [("> /dev/full", 74), (">&-", 0), ("> /dev/null", 0)])
def test_an_output_that_takes_nothing(here, target, code):
    done = run(here, f"-m rollingq_jax.check --path data.npz {target}")
    assert done.returncode == code
    line = b"standard output cannot be written (No space left on device); the command goes on"
    assert done.stderr.startswith(line if code else b"") and done.stderr.count(b"\n") == (code > 0)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["cuda", "gpuu"])
def test_a_platform_that_the_machine_lacks_is_one_line(here, platform):
    command = f"{ROOT / 'train.py'} --config config.py --workdir lacking"
    done = run(here, command, JAX_PLATFORMS=platform)
    line = rf"error: JAX_PLATFORMS is '{platform}'; allowed: a platform that this machine[^\n]*\n"
    if b"allowed: " not in done.stderr and "gpuu" not in platform:
        pytest.skip("this machine has it")
    assert done.returncode == 2 and re.fullmatch(line, done.stderr.decode())
    assert not (here / "lacking").exists()


def test_a_bug_is_no_lack_of_a_platform():
    def command(argv):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        run_command(command, ["x"])


class Closed(io.StringIO):
    """Takes some writes and fails from then on."""

    def __init__(self, most, error=None):
        super().__init__()
        self.most, self.error = most, error or BrokenPipeError(32, "Broken pipe")

    def write(self, text):
        if not self.most:
            raise self.error
        self.most -= 1
        return super().write(text)


@pytest.mark.slow
def test_a_run_from_python_goes_on_without_its_output(tmp_path, monkeypatch, capsys):
    write_arrays(tmp_path / "data.npz")
    stream = Closed(4)
    monkeypatch.setattr(sys, "stdout", stream)
    config = tiny_config(tmp_path / "data.npz", epochs=2)
    assert train_and_evaluate(config, tmp_path / "run")["test_accuracy"] > 0
    assert sys.stdout is stream
    assert capsys.readouterr().err.count("standard output was closed; the command goes on") == 1


def test_what_is_lost_is_told_once_and_remembered(capsys):
    for error, failed in ((BrokenPipeError(), False), (OSError(5, "Input/output error"), True)):
        output = Output(Closed(1, error))
        for text in ("one\n", "two\n", "three\n"):
            assert output.write(text) == len(text)
        output.flush()
        assert output.failed == failed
        assert capsys.readouterr().err.count("\n") == 1


def test_an_output_stays_and_is_that_of_the_inner_part(capsys):
    with shown() as outer, shown() as inner:
        assert inner is outer is sys.stdout
        print("日本\x1b[2J")
    assert capsys.readouterr().out == "日本\\x1b[2J\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("plain, ünd 日本 \U0001f600\n\tx", "plain, ünd 日本 \U0001f600\n\tx"),
        ("\x1b]8;;http://x\x1b\\", "\\x1b]8;;http://x\\x1b\\"),
        ("a\rb\x08c\x00d\x7fe\x9bf", r"a\rb\x08c\x00d\x7fe\x9bf"),
        ("left\u202eright\u2066\u2028", r"left\u202eright\u2066\u2028"),
        ("name\udcff", r"name\udcff"),
        ("می\u200cخواهم", "می\u200cخواهم"),  # what joins letters of a script stays
    ],
)
def test_printable(text, expected):
    assert printable(text) == expected


def test_names_in_a_table_stay_on_their_line():
    assert table([("a\nb", "1"), ("\x1b[1m", "22")]) == "  a\\nb      1\n  \\x1b[1m  22"


def test_control_characters_in_errors_and_warnings_are_escaped(capsys):
    def command(argv):
        logging.getLogger("rollingq_jax").warning("file %s is odd", "\x1b[31mx")
        raise DataError("file '\x1b]0;title\x07' is no file\x85")

    root = logging.getLogger()
    before, root.handlers = root.handlers, []
    try:
        assert run_command(command, ["x"]) == 2
    finally:
        root.handlers = before
    printed = capsys.readouterr().err
    assert printed == (
        "WARNING: file \\x1b[31mx is odd\nerror: file '\\x1b]0;title\\x07' is no file\n"
    )
