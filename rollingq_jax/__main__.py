"""`python -m rollingq_jax COMMAND`, and the console script `rollingq`.

Nothing is imported before a command is chosen, so that the list of commands is there at once.
"""

import os
import sys
from collections.abc import Sequence

from rollingq_jax.errors import did_you_mean, import_or_say, printable

# name -> its module, the function in it that takes the command line, and what it does.
COMMANDS = {
    "train": ("train.cli", "train_command", "train a run, and test it once at the end"),
    "evaluate": ("evaluate", "command", "evaluate a run, and probe what its attention follows"),
    "compare": ("compare", "command", "compare arms over seeds; sweep over settings"),
    "reproduce": ("reproduce", "command", "the paper's tables beside what is measured here"),
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
            f"{program} COMMAND --help shows the flags of a command;",
            f"{program} --completion prints what completes them in bash and zsh.",
            "",
            "examples:",
            f"  {program} train --config av_digits --workdir runs/demo",
            f"  {program} evaluate --workdir runs/demo --corrupt audio=1.0",
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
        print(import_or_say("rollingq_jax").__version__)
        return 0
    if name == "--completion":
        try:
            print(completion())
        except ModuleNotFoundError as error:
            return _fail(str(error))
        return 0
    if name not in COMMANDS:
        sweep = " (it is compare, with settings as arms or in a grid)" if name == "sweep" else ""
        meant = sweep or did_you_mean(name, COMMANDS)
        return _fail(f"{name!r} is no command{meant}; allowed: {', '.join(COMMANDS)}")
    return run(name, [f"{program} {name}", *argv[2:]])


def run(name: str, argv: Sequence[str] | None = None) -> int:
    """Runs one of the commands; returns its exit code.

    Args:
      name: of the command.
      argv: the program, as its help shall name it, and the command's arguments; by default
        `sys.argv`.
    """
    module, function, _ = COMMANDS[name]
    try:
        command = getattr(import_or_say(f"rollingq_jax.{module}"), function)
        run_command = import_or_say("rollingq_jax.train.cli").run_command
    except ModuleNotFoundError as error:
        return _fail(str(error))
    return run_command(command, sys.argv if argv is None else argv)


def completion() -> str:
    """A script that completes the commands of `rollingq` and their flags, for bash and zsh."""
    cases = []
    for name, (module, _, _) in COMMANDS.items():
        parsers = vars(import_or_say(f"rollingq_jax.{module}")).values()
        command = next(one for one in parsers if getattr(one, "name", None) == name)
        cases.append(f"    {name}) words='{' '.join(command.names())}' ;;")
    return "\n".join(
        [
            '[ -z "$ZSH_VERSION" ] || { autoload -U +X compinit bashcompinit; '
            "compinit; bashcompinit; }",
            "_rollingq() {",
            f"  local words='{' '.join(COMMANDS)}'",
            '  [ "$COMP_CWORD" -le 1 ] || case ${COMP_WORDS[1]} in',
            *cases,
            "  esac",
            '  COMPREPLY=($(compgen -W "$words" -- "${COMP_WORDS[COMP_CWORD]}"))',
            "  case $COMPREPLY in *=) compopt -o nospace 2>/dev/null ;; esac",
            "}",
            "complete -o default -F _rollingq rollingq",
        ]
    )


def _fail(message: str) -> int:
    print(printable(f"error: {message}"), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
