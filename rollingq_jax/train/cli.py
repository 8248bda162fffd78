"""The command line of `train.py`: reads flags, calls the loop, turns mistakes into one line."""

import argparse
import logging
import runpy
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.train.interrupt import EXIT_CODE, Interrupted

USER_ERROR = 2


def define_flags(values: flags.FlagValues) -> None:
    """Adds `--config` (with `--config.FIELD=VALUE`) and `--workdir`."""
    config_flags.DEFINE_config_file(
        "config", None, "A file with get_config(), which is run as Python.", flag_values=values
    )
    flags.DEFINE_string("workdir", None, "The run's folder, local or gs://.", flag_values=values)


def parse(argv: Sequence[str], values: flags.FlagValues | None = None) -> flags.FlagValues:
    """Flags from a command line.

    Raises:
      ConfigError: a flag or a field is unknown, ill-typed or missing.
    """
    values = flags.FlagValues() if values is None else values
    define_flags(values)
    try:
        rest = values(list(argv))
    except AttributeError as error:
        raise ConfigError(unknown_field(argv, error)) from None
    except (flags.Error, OSError, TypeError, ValueError, SyntaxError, ImportError) as error:
        raise ConfigError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise ConfigError(f"argument {rest[1]!r} is not known; allowed: flags that begin with --")
    for name in ("config", "workdir"):
        if values[name].value is None:
            raise ConfigError(f"--{name} is missing; allowed: --config FILE --workdir FOLDER")
    return values


def unknown_field(argv: Sequence[str], error: AttributeError) -> str:
    """The line for a field that the configuration does not have."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--config", "-config")
    path = parser.parse_known_args(list(argv))[0].config
    overrides = [a.split("=")[0].lstrip("-") for a in argv if a.lstrip("-").startswith("config.")]
    for override in overrides:
        node = runpy.run_path(path)["get_config"]()
        for name in override.split(".")[1:]:
            if not hasattr(node, "keys") or name not in node:
                allowed = ", ".join(sorted(node.keys())) if hasattr(node, "keys") else "no fields"
                return f"{override} is not a field of the configuration; allowed there: {allowed}"
            node = node[name]
    return str(error)


def run_command(command: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code: 0, 2 for a user's mistake, 75 when interrupted.

    A mistake becomes one line on standard error, without a traceback.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        command(argv)
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        return EXIT_CODE
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    return 0


def train_command(argv: Sequence[str]) -> None:
    """`train.py`."""
    values = parse(argv)
    from rollingq_jax.train.loop import train_and_evaluate

    train_and_evaluate(values.config, values.workdir)
