"""`python -m rollingq_jax`: its commands, their help, and how soon the list of them is there."""

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import rollingq_jax
from rollingq_jax import __main__ as main_module
from rollingq_jax import errors
from rollingq_jax.train.cli import own_configs, read_python

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
    assert sum(line.startswith(f"  rollingq {name} ") for line in lines) >= 2
    assert "\nexamples:\n" in "\n".join(lines)
    assert max(map(len, lines)) <= 80


def test_the_examples_can_be_read(monkeypatch):
    """Every example is accepted by the flags that it stands under."""
    monkeypatch.chdir(ROOT)
    for name, (module, _, _) in main_module.COMMANDS.items():
        members = vars(importlib.import_module(f"rollingq_jax.{module}")).values()
        command = next(one for one in members if getattr(one, "name", None) == name)
        for example in command.examples:
            given, rest = command.parse_flags([name, *example.split()])
            assert rest == [] or command.read_config(given, rest)


def test_what_a_comparison_means_is_in_its_help(capsys):
    assert main_module.main(["rollingq", "compare", "--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n{word}\n  " in printed for word in ("seeds", "reference", "noise", "sweep"))


def test_a_command_gets_its_arguments(capsys):
    assert main_module.main(["rollingq", "predict", "--path=x", "--wrokdir=y"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: --wrokdir is not a flag (did you mean --workdir?); allowed: ")


def test_a_mistyped_command_suggests_the_nearest(capsys):
    assert main_module.main(["rollingq", "evalute\x1b"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1 and "\x1b" not in printed
    assert "is no command (did you mean evaluate?); allowed: train, evaluate" in printed
    assert main_module.main(["rollingq", "sweep"]) == 2
    assert "'sweep' is no command (it is compare, with settings" in capsys.readouterr().err


def test_a_package_that_is_missing_is_one_line(capsys, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError("No module named 'grain'", name="grain.sources")

    monkeypatch.setattr(importlib, "import_module", missing)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main_module.main(["rollingq", "check"]) == 2
    printed = capsys.readouterr().err
    assert 'pip install "rollingq-jax[train]"' in printed and printed.count("\n") == 1
    with pytest.raises(ModuleNotFoundError, match=r'grain.*pip install "rollingq-jax\[train\]"'):
        _ = rollingq_jax.load


def test_with_the_core_alone_a_command_names_the_extra():
    """Run as modules of their own, where no package of the extra can be imported."""
    code = """
import runpy, sys
sys.modules |= dict.fromkeys(["absl", "etils", "grain", "matplotlib", "ml_collections", "tqdm"])
for name in ("check", "compare", "evaluate", "export", "predict", "prepare"):
    sys.argv = [name, "--help"]
    try:
        runpy.run_module(f"rollingq_jax.{name}", run_name="__main__")
    except SystemExit as done:
        assert done.code == 2, (name, done.code)
from rollingq_jax.__main__ import main
sys.exit(main(["rollingq", "--completion"]))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 7, done.stderr
    assert all("is not installed" in line and '"rollingq-jax[train]"' in line for line in lines)


def test_a_module_that_fails_of_itself_is_not_called_missing():
    assert errors.missing_package(ImportError("cannot import name x", name="json")) is None
    assert errors.missing_package(ModuleNotFoundError(name="rollingq_jax.nowhere")) is None
    assert "rollingq-jax[train]" in errors.missing_package(ModuleNotFoundError(name="nowhere.x"))


def test_each_named_extra_brings_its_package():
    """The packages that an extra other than [train] is named for, by what pip calls them."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {"PIL": "pillow", "sklearn": "scikit-learn"}
    for package, extra in errors._EXTRAS.items():
        name = names.get(package, package.replace("_", "-"))
        listed = project["optional-dependencies"][extra]
        assert any(line.startswith(f"{name}>=") for line in listed), package
        assert not any(
            line.startswith(f"{name}>=") for line in project["optional-dependencies"]["train"]
        )


@pytest.mark.parametrize(
    "typed, completed",
    [
        (["rollingq", "ex"], ["export"]),
        (["rollingq", "predict", "--ba"], ["--batch_size"]),
        (["rollingq", "compare", "--config.rolling.b"], ["--config.rolling.beta="]),
    ],
)
def test_completion(typed, completed):
    script = (
        main_module.completion()
        + f"\nCOMP_WORDS=({' '.join(typed)}) COMP_CWORD={len(typed) - 1} COMPREPLY=()\n"
        + '_rollingq; echo "${COMPREPLY[@]}"'
    )
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.split() == completed, done.stderr


def test_configurations_by_name(tmp_path, monkeypatch):
    """From any folder; a file of that name in it comes first."""
    monkeypatch.chdir(tmp_path)
    assert sorted(own_configs()) == sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    assert read_python("av_digits") == read_python(str(ROOT / "configs" / "av_digits.py"))
    with pytest.raises(errors.ConfigError, match=r"did you mean own_data\?.*: av_digits, "):
        read_python("own_date")
    (tmp_path / "av_digits").write_text("raise ValueError('this one')")
    with pytest.raises(errors.ConfigError, match="this one"):
        read_python("av_digits")


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
