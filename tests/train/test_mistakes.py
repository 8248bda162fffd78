"""Mistakes on the command line: one line, an exit code that is not 0, nothing written.

Each row goes through `train.py`'s own command; a few do so in a process of their own.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rollingq_jax.train import loop
from rollingq_jax.train.cli import TRAIN, run_command, train_command
from tests.train.train_cases import files, tiny_config, write_arrays

ROOT = Path(__file__).resolve().parents[2]

CONFIGS = {
    "tiny.py": "from tests.train.train_cases import tiny_config\n"
    "def get_config():\n    return tiny_config('tiny.npz')\n",
    "ill_typed.py": "from tests.train.train_cases import tiny_config\n"
    "def get_config():\n    config = tiny_config('tiny.npz')\n"
    "    config.epochs = 'many'\n    return config\n",
    "no_function.py": "config = {}\n",
    "a_dict.py": "def get_config():\n    return {'epochs': 3}\n",
    "syntax.py": "def get_config(:\n",
    "no_prefetch.py": "from tests.train.train_cases import tiny_config\n"
    "def get_config():\n    config = tiny_config('tiny.npz')\n"
    "    config.data = {'name': 'arrays', 'path': 'tiny.npz'}\n    return config\n",
    "unknown_field.py": "from tests.train.train_cases import tiny_config\n"
    "def get_config():\n    config = tiny_config('tiny.npz')\n"
    "    with config.unlocked():\n        config.optimizer.nesterov = True\n    return config\n",
}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with configurations and data, which is the current one."""
    monkeypatch.chdir(tmp_path)
    write_arrays(tmp_path / "tiny.npz")
    for name, text in CONFIGS.items():
        (tmp_path / name).write_text(text)
    resolved = tiny_config("tiny.npz").to_dict()
    (tmp_path / "config.json").write_text(json.dumps(resolved))
    (tmp_path / "list.json").write_text("[1, 2]")
    (tmp_path / "cut.json").write_text(json.dumps(resolved)[:100])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "latin.json").write_bytes(b'{"seed": "\xe9"}')
    (tmp_path / "dotted.json").write_text('{"optimizer": {"a.b": 1}}')
    (tmp_path / "section.json").write_text('{"optimizer": 3}')
    (tmp_path / "extra.json").write_text(json.dumps(resolved | {"epoch": 3}))
    huge = json.dumps(resolved).replace('"learning_rate": 0.05', f'"learning_rate": {10**400}')
    (tmp_path / "huge.json").write_text(huge)
    (tmp_path / "a_file").write_text("x")
    return tmp_path


TINY = ["--config", "tiny.py"]
# What is typed after --workdir new, and what the line has to hold.
ROWS = [
    # a configuration that cannot be read
    ([], "one of --config and --config_json"),
    (["--config"], "--config is given without a value; allowed: "),
    (["--config", "missing.py"], "missing.py: no such file"),
    (["--config", "."], "no such file"),
    (["--config", "syntax.py"], "syntax.py: SyntaxError"),
    (["--config", "no_function.py"], "no_function.py: there is no get_config()"),
    (["--config", "a_dict.py"], "get_config() is {'epochs': 3}; allowed: one that returns a Conf"),
    (["--config", "ill_typed.py"], "ill_typed.py, line 4: TypeError: Could not override field"),
    (["--config", "unknown_field.py"], "config.optimizer.nesterov is not a field; allowed: clip"),
    (["--config", "tiny.py:large"], "takes 0 positional arguments"),
    (["--config_json", "missing.json"], "missing.json: No such file or directory"),
    (["--config_json", "."], "Is a directory"),
    (["--config_json", "list.json"], "list.json: holds list; allowed: a JSON object"),
    (["--config_json", "cut.json"], "cut.json: not JSON"),
    (["--config_json", "deep.json"], "deep.json: not JSON"),
    (["--config_json", "latin.json"], "latin.json: not JSON"),
    (["--config_json", "dotted.json"], "not a mapping of fields"),
    (["--config_json", "section.json"], "config.optimizer is 3; allowed: a mapping of fields"),
    (
        ["--config_json", "extra.json"],
        "config.epoch is not a field (did you mean epochs?); allowed: batch_size, ",
    ),
    ([*TINY, "--config_json", "config.json"], "one of --config and --config_json"),
    # flags and fields
    ([*TINY, "--wrokdir=x"], "--wrokdir is not a flag (did you mean --workdir?); allowed: --c"),
    ([*TINY, "--confg.epochs=3"], "--confg.epochs is not a flag (did you mean --config.epochs?);"),
    ([*TINY, "runs/demo"], "argument 'runs/demo' is not known; allowed: --config FILE"),
    ([*TINY, "--config.optimizer.lr=1"], "config.optimizer.lr is not a field; allowed there: clip"),
    (
        [*TINY, "--config.optimizer.learning_rat=1"],
        "learning_rat is not a field (did you mean config.optimizer.learning_rate?); allowed",
    ),
    (
        [*TINY, "--config.optimzer.learning_rate=1"],
        "config.optimzer.learning_rate is not a field "
        "(did you mean config.optimizer.learning_rate?); allowed there: baseline",
    ),
    ([*TINY, "--config.learning_rate=1"], "(did you mean config.optimizer.learning_rate?); allow"),
    ([*TINY, "--config.rolling.betta=1"], "(did you mean config.rolling.beta?); allowed there: b"),
    ([*TINY, "--config.model.encoders.c.kind=vector"], "says nothing of modality 'c'; allowed: "),
    ([*TINY, "--config.epochs.x=1"], "config.epochs.x is not a field; allowed there: no fields"),
    (
        [*TINY, "--config.epochs"],
        "config.epochs is given without a value; allowed: an integer >= 1",
    ),
    # a value of the wrong type, or out of range
    ([*TINY, "--config.epochs=abc"], "config.epochs is 'abc'; allowed: an integer >= 1"),
    ([*TINY, "--config.epochs=2.5"], "config.epochs is '2.5'; allowed: an integer >= 1"),
    ([*TINY, "--config.epochs=0"], "config.epochs is 0; allowed: an integer >= 1"),
    ([*TINY, "--config.seed=-1"], "config.seed is -1; allowed: an integer >= 0"),
    ([*TINY, "--config.optimizer=3"], "config.optimizer is 3; allowed: a mapping of fields"),
    ([*TINY, "--config.optimizer.learning_rate=fast"], "is 'fast'; allowed: a number > 0"),
    ([*TINY, "--config.optimizer.learning_rate=nan"], "is nan; allowed: a number > 0"),
    ([*TINY, "--config.optimizer.momentum=1"], "config.optimizer.momentum is 1.0; allowed: a numb"),
    ([*TINY, "--config.optimizer.name=adagrad"], "is 'adagrad'; allowed: sgd, adam"),
    (
        [*TINY, "--config.optimizer.name=adam"],
        "config.optimizer.weight_decay is 0.0001; allowed with optimizer.name adam",
    ),
    ([*TINY, "--config.optimizer.layer_decay=0"], "layer_decay is 0.0; allowed: a number in (0, 1"),
    (
        [*TINY, "--config.optimizer.warmup_epochs=3"],
        "is 3.0; allowed: less than epochs, which is 3",
    ),
    ([*TINY, "--config.rolling.enabled=maybe"], "is 'maybe'; allowed: True or False"),
    ([*TINY, "--config.rolling.beta=-0.1"], "config.rolling.beta is -0.1; allowed: a number >= 0"),
    ([*TINY, "--config.rolling.window=0"], "config.rolling.window is 0.0; allowed: a number in (0"),
    ([*TINY, "--config.rolling.max_rotations=-1"], "is -1; allowed: an integer >= 0"),
    ([*TINY, "--config.rolling.max_rotations=many"], "is 'many'; allowed: an integer >= 0"),
    ([*TINY, "--config.rolling.max_rotations=1.5"], "is 1.5; allowed: an integer >= 0"),
    ([*TINY, "--config.rolling.max_rotations=True"], "is True; allowed: an integer >= 0"),
    ([*TINY, "--config.parallel=pjit"], "config.parallel is 'pjit'; allowed: jit, pmap"),
    ([*TINY, "--config.nonfinite=ignore"], "config.nonfinite is 'ignore'; allowed: stop, skip"),
    (
        [*TINY, "--config.checkpoint.keep=0"],
        "config.checkpoint.keep is 0; allowed: an integer >= 1",
    ),
    ([*TINY, "--config.checkpoint.every_minutes=-1"], "is -1.0; allowed: a number >= 0"),
    ([*TINY, "--config.checkpoint.every_steps=1.5"], "is '1.5'; allowed: an integer >= 0"),
    ([*TINY, "--config.model.dim=wide"], "config.model.dim is 'wide'; allowed: an integer >= 1"),
    (
        [*TINY, "--config.model.fusion=late"],
        "model.fusion is 'late'; allowed: unimodal, sum, concat",
    ),
    ([*TINY, "--config.model.num_heads=3"], "num_heads is 3; allowed: a divisor of"),
    ([*TINY, "--config.model.num_classes=2"], "num_classes"),
    # integers without end
    ([*TINY, "--config.epochs=1000000000"], "allowed with 6 steps an epoch: at most 357,913,941"),
    ([*TINY, f"--config.epochs={2**70}"], "allowed: an integer >= 1 and at most 2,147,483,647"),
    ([*TINY, f"--config.seed={2**32}"], "allowed: an integer >= 0 and at most 4,294,967,295"),
    ([*TINY, f"--config.batch_size={2**31}"], "an integer >= 1 and at most 2,147,483,647"),
    ([*TINY, f"--config.rolling.max_rotations={10**12}"], "is 1000000000000; allowed: an integer"),
    ([*TINY, f"--config.rolling.check_every={2**63}"], "config.rolling.check_every is 92233720"),
    ([*TINY, f"--config.log_every={10**400}"], "allowed: an integer >= 1 and at most"),
    ([*TINY, f"--config.optimizer.learning_rate={10**400}"], "is inf; allowed: a number > 0"),
    ([*TINY, "--config.checkpoint.keep=99999999999"], "is 99999999999; allowed: an integer >= 1"),
    ([*TINY, "--config.data.prefetch=1000000"], "allowed: an integer >= 0 and at most 1,024"),
    ([*TINY, "--config.model.dim=9999999"], "model.dim is 9999999; allowed: an integer >= 1"),
    ([*TINY, "--config.model.depth=5000"], "model.depth is 5000; allowed: an integer >= 0 and at"),
    ([*TINY, "--config.model.num_heads=4294967296"], "model.num_heads is 4294967296; allowed: an"),
    ([*TINY, "--config.model.mlp_ratio=1e300"], "is 1e+300; allowed: a number > 0 and at most 10"),
    (["--config_json", "huge.json"], "allowed: a number > 0"),
    # the data
    ([*TINY, "--config.batch_size=64"], "is 64; allowed: at most the number of training examples"),
    ([*TINY, "--config.batch_size=12"], "is 12; allowed: a multiple of the number of devices"),
    ([*TINY, "--config.data.path=missing.npz"], "missing.npz: no such file"),
    ([*TINY, "--config.data.path=a_file"], "a_file: "),
    ([*TINY, "--config.data.path="], "data.path: not given"),
    ([*TINY, "--config.data.prefetch=-1"], "config.data.prefetch is -1; allowed: an integer >= 0"),
    ([*TINY, "--config.data.prefetch=few"], "config.data.prefetch is 'few'; allowed: an integer"),
    (["--config", "no_prefetch.py"], "config.data.prefetch is missing; allowed: an integer"),
    # the folder
    ([*TINY, "--workdir=a\\b"], r"allowed: a path without a backslash"),
    ([*TINY, "--workdir=gs:/bucket/run"], "allowed: a local folder, or gs://BUCKET/FOLDER"),
    ([*TINY, "--workdir=\udcff"], "allowed: a path in UTF-8"),
    ([*TINY, "--workdir="], "workdir is empty; allowed: a folder that can be written"),
    ([*TINY, "--workdir", " "], "workdir is empty"),
    ([*TINY, "--workdir=a_file"], "workdir is 'a_file'; allowed: a folder that can be written"),
    ([*TINY, "--workdir=a_file/run"], "workdir is 'a_file/run'; allowed: a folder that can be"),
    (
        [*TINY, "--workdir=/proc/run"],
        "workdir is '/proc/run'; allowed: a folder that can be written",
    ),
]


def typed(arguments):
    return [
        "train.py",
        *([] if "--workdir" in " ".join(arguments) else ["--workdir=new"]),
        *arguments,
    ]


@pytest.mark.parametrize(("arguments", "line"), ROWS, ids=lambda v: " ".join(v)[-40:] or "nothing")
def test_one_line_and_nothing_written(here, capsys, arguments, line):
    before = files(here)
    code = run_command(train_command, typed(arguments))
    printed = capsys.readouterr().err
    assert code == 2, printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert line in printed
    assert files(here) == before and not (here / "new").exists()


def test_workdir_is_needed(here, capsys):
    assert run_command(train_command, ["train.py", *TINY]) == 2
    assert "--workdir is missing; allowed: --config FILE" in capsys.readouterr().err


@pytest.mark.parametrize("flags, quiet", [([], False), (["--quiet"], True)])
def test_quiet_is_handed_on(here, monkeypatch, flags, quiet):
    given = {}
    monkeypatch.setattr(loop, "train_and_evaluate", lambda *_, **options: given.update(options))
    assert run_command(train_command, ["train.py", *TINY, "--workdir", "new", *flags]) == 0
    assert given["quiet"] is quiet


def test_help_is_no_mistake(capsys):
    assert run_command(train_command, ["train.py", "--help"]) == 0
    assert "--config FILE" in capsys.readouterr().out


OURS = tiny_config("tiny.npz").to_dict()
OURS["model"] |= {"num_classes": 3, "encoders": {m: {"kind": "vector"} for m in "ab"}}


@pytest.mark.parametrize(
    ("content", "line"),  # None: a folder
    [
        ({"config.json": '{"seed": '}, "config.json is not JSON"),
        ({"config.json": "[]"}, "config.json holds list; allowed: a JSON object"),
        (
            {"config.json": json.dumps(OURS | {"seed": 5}), "checkpoints/6": None},
            "holds another run: config.seed is 0 and was 5",
        ),
        (
            {"checkpoints": None},
            "holds checkpoints and no config.json; allowed: an empty folder, or one with both",
        ),
        (
            {"config.json": json.dumps(OURS), "summary.json": "{}"},
            "summary.json is damaged; allowed: the summary of a run",
        ),
    ],
    ids=["cut", "a list", "another seed", "checkpoints alone", "summary"],
)
def test_a_folder_that_holds_something_else(here, capsys, content, line):
    for name, text in content.items():
        path = here / "new" / name
        if text is None:
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    before = files(here)
    assert run_command(train_command, typed(TINY)) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ") and printed.count("\n") == 1 and line in printed
    assert files(here) == before


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--config", "missing.py", "--workdir=new"], "missing.py: no such file"),
        ([*TINY, "--workdir=new", "--config.rolling.beta=-1"], "config.rolling.beta is -1.0"),
        ([*TINY, "--workdir=a_file"], "workdir is 'a_file'"),
    ],
)
def test_in_a_process_of_its_own(here, arguments, line):
    before = files(here)
    done = subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch(rf"error: .*{re.escape(line)}.*\n", done.stderr)
    assert files(here) == before


def test_a_config_json_runs_with_fields_set_on_the_command_line(here):
    """Up to the data, which are missing: nothing was wrong with the configuration."""
    values = TRAIN.parse(
        [
            "train.py",
            "--config_json=config.json",
            "--workdir=new",
            "--config.epochs=7",
            "--noconfig.rolling.enabled",
        ]
    )
    expected = tiny_config("tiny.npz", epochs=7, **{"rolling.enabled": False})
    assert values.config.to_dict() == expected.to_dict() and values.workdir == "new"


def test_a_config_json_of_an_older_version_gets_defaults(here):
    old = tiny_config("tiny.npz").to_dict()
    del old["nonfinite"], old["checkpoint"]["every_minutes"]
    old["model"]["encoders"] = {"a": {"kind": "vector", "mean": [0.5, 1.0]}}
    (here / "old.json").write_text(json.dumps(old))
    config = TRAIN.parse(["train.py", "--config_json=old.json", "--workdir=new"]).config
    assert config.nonfinite == "stop" and config.checkpoint.every_minutes == 0.0
    assert config.model.encoders.a.mean == (0.5, 1.0)  # a tuple, as configurations have them
