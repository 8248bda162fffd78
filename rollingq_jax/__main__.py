"""`python -m rollingq_jax COMMAND`, and the console script `rollingq`.

Nothing is imported before a command is chosen, so that the list of commands is there at once.
"""

import importlib
import os
import sys
from collections.abc import Sequence

import rollingq_jax
from rollingq_jax.errors import did_you_mean, printable

# name -> its module, the function in it that takes the command line, and what it does.
COMMANDS = {
    "train": ("train.cli", "train_command", "train a run, and test it once at the end"),
    "evaluate": ("evaluate", "command", "evaluate a run, and probe what its attention follows"),
    "compare": ("compare", "command", "compare arms over seeds"),
    "predict": ("predict", "command", "a trained run's answers on new data, as a table"),
    "prepare": ("prepare", "command", "prepare a data set from its original distribution"),
    "export": ("export", "command", "a run's weights, and a function that runs without us"),
    "check": ("check", "command", "what a data set holds, before anything is trained on it"),
}


def help_text(program: str) -> str:
    """The list of commands."""
    lines = [f"  {name:<10}{does}" for name, (_, _, does) in COMMANDS.items()]
    return "\n".join(
        [
            f"usage: {program} COMMAND [flags]",
            "",
            "Rolling Query (RollingQ) for multimodal Transformers, in JAX.",
            "",
            *lines,
            "",
            f"{program} COMMAND --help shows the flags of a command.",
            "",
            "example:",
            f"  {program} train --config configs/av_digits.py --workdir runs/demo",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names; returns its exit code.

    Args:
      argv: the program's name and its arguments; by default `sys.argv`.
    """
    argv = list(sys.argv if argv is None else argv)
    script = os.path.basename(argv[0]) == "rollingq"
    program = "rollingq" if script else "python -m rollingq_jax"
    name = argv[1] if len(argv) > 1 else "--help"
    if name in ("-h", "--help", "help"):
        print(help_text(program))
        return 0
    if name == "--version":
        print(rollingq_jax.__version__)
        return 0
    if name not in COMMANDS:
        meant = did_you_mean(name, COMMANDS)
        return _fail(f"{name!r} is no command{meant}; allowed: {', '.join(COMMANDS)}")
    module, function, _ = COMMANDS[name]
    try:
        command = getattr(importlib.import_module(f"rollingq_jax.{module}"), function)
        run_command = importlib.import_module("rollingq_jax.train.cli").run_command
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "rollingq_jax":
            raise
        return _fail(
            f"the package {error.name!r} is not installed; allowed: it is, as after "
            'pip install "rollingq-jax[train]"'
        )
    return run_command(command, [f"{program} {name}", *argv[2:]])


def _fail(message: str) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
