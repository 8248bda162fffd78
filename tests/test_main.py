"""`python -m rollingq_jax`: its commands, their help, and how soon the list of them is there."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from rollingq_jax import __main__ as main_module
from rollingq_jax import errors

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = sorted(main_module.COMMANDS)


def test_every_command_is_listed(capsys):
    assert main_module.main(["/usr/bin/rollingq"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: rollingq COMMAND")
    assert all(f"\n  {name} " in printed for name in COMMANDS)
    assert max(map(len, printed.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_a_terminal_and_has_an_example(name, capsys):
    assert main_module.main(["rollingq", name, "--help"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"usage: rollingq {name} ")
    assert f"  rollingq {name} --" in "\n".join(lines) or f"  rollingq {name} crema_d" in str(lines)
    assert max(map(len, lines)) <= 80


def test_a_command_gets_its_arguments(capsys):
    assert main_module.main(["rollingq", "predict", "--path=x", "--wrokdir=y"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --wrokdir is not a flag (did you mean --workdir?); allowed: ")


def test_a_mistyped_command_suggests_the_nearest(capsys):
    assert main_module.main(["rollingq", "evalute\x1b"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed
    assert "is no command (did you mean evaluate?); allowed: train, evaluate" in printed


def test_a_package_that_is_missing_is_one_line(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'grain'", name="grain")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main_module.main(["rollingq", "check"]) == 2
    printed = capsys.readouterr().err
    assert 'pip install "rollingq-jax[train]"' in printed and printed.count("\n") == 1


def test_the_list_of_commands_loads_no_jax():
    code = (
        "import sys; from rollingq_jax.__main__ import main; main(['rollingq', '--help']);"
        "assert not {'jax', 'flax', 'numpy', 'absl'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_console_script():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["scripts"]["rollingq"].partition(":")
    assert getattr(importlib.import_module(module), function) is main_module.main


def test_the_nearest_name():
    assert errors.did_you_mean("seed", ["seeds", "workdir"]) == " (did you mean seeds?)"
    assert errors.did_you_mean("xyz", ["seeds", "workdir"]) == ""
