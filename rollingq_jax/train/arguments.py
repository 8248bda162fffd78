"""A command's configuration: a Python file or a JSON file, with fields set on the command line.

A Python file is code and is run; a `config.json` is data and is only read.
"""

import argparse
import json
import os
import re
import runpy
import traceback
from collections.abc import Sequence
from typing import Any, NoReturn

from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from rollingq_jax.errors import ConfigError, said
from rollingq_jax.train.config import allowed_in, from_json

USAGE = "--config FILE or --config_json FILE, --config.FIELD=VALUE, --workdir FOLDER"
TRAIN_USAGE = (
    f"{USAGE}; optional: --profile, --compilation_cache=FOLDER, --distributed, or "
    "--coordinator=HOST:PORT --num_processes=N --process_id=I; with several processes "
    "--initialization_timeout=SECONDS"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; allowed: {USAGE}")


def parse(argv: Sequence[str], values: flags.FlagValues | None = None) -> flags.FlagValues:
    """Flags from a command line: `config` and `workdir`, and those that `values` defines already.

    Args:
      argv: the program's name and its arguments.
      values: flags of the command's own.

    Raises:
      ConfigError: a flag or a field is unknown, ill-typed or missing, or the file cannot be read.
    """
    values = flags.FlagValues() if values is None else values
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", "-config")
    parser.add_argument("--config_json", "-config_json")
    given, rest = parser.parse_known_args(list(argv[1:]))
    if (given.config is None) == (given.config_json is None):
        raise ConfigError(f"wanted one of --config and --config_json; allowed: {USAGE}")
    if given.config_json is None:
        config = read_python(given.config)
    else:
        config = read_json(given.config_json)
    flags.DEFINE_string("workdir", None, "The run's folder, local or gs://.", flag_values=values)
    _parse_flags([argv[0], *rest], values, config)
    if values["workdir"].value is None:
        raise ConfigError(f"--workdir is missing; allowed: {USAGE}")
    return values


def read_python(path: str) -> ConfigDict:
    """What `get_config()` of a file returns; `FILE:TEXT` calls `get_config("TEXT")`.

    Raises:
      ConfigError: there is no such file, it fails, or it returns something else.
    """
    path, *argument = path.split(":", 1)
    if not os.path.isfile(path):
        raise ConfigError(
            f"--config {path}: no such file; allowed: a Python file with get_config()"
        )
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = None if get_config is None else get_config(*argument)
    except Exception as error:  # whatever a user's file may raise
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        where = f"--config {path}" + (f", line {lines[-1]}" if lines else "")
        reason = " ".join(str(error).split()) or "no message"
        raise ConfigError(f"{where}: {type(error).__name__}: {reason}") from error
    if not isinstance(config, ConfigDict):
        found = "there is no get_config()" if get_config is None else f"get_config() is {config!r}"
        raise ConfigError(f"--config {path}: {found}; allowed: one that returns a ConfigDict")
    return config


def read_json(path: str) -> ConfigDict:
    """The configuration in a `config.json`, with defaults for the fields that it does not have.

    Raises:
      ConfigError: there is no such file, or it does not hold a JSON object of fields.
    """
    try:
        content = json.loads(epath.Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"--config_json {path}: not JSON ({error})") from None
    except Exception as error:  # of the system, or whatever a client of gs:// raises
        raise ConfigError(f"--config_json {path}: {said(error)}; allowed: a file") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"--config_json {path}: holds {type(content).__name__}; allowed: a JSON object"
        )
    return from_json(content)


def _parse_flags(argv: list[str], values: flags.FlagValues, config: ConfigDict) -> None:
    """Sets the flags, and in the configuration every `--config.FIELD`."""
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        rest = values(argv)
    except (AttributeError, KeyError) as error:
        raise ConfigError(_unknown_field(argv, config) or str(error)) from None
    except flags.UnrecognizedFlagError as error:
        raise ConfigError(f"--{error.flagname} is not a flag; allowed: {USAGE}") from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise ConfigError(_refused_value(str(error), config)) from None
    if len(rest) > 1:
        raise ConfigError(f"argument {rest[1]!r} is not known; allowed: {USAGE}")


def _unknown_field(argv: Sequence[str], config: ConfigDict) -> str | None:
    """The line for the first field on the command line that the configuration does not have."""
    for argument in argv:
        found = re.match(r"--?(?:no)?(config\.[^=]*)", argument)
        if found is None:
            continue
        node: Any = config
        for name in found.group(1).split(".")[1:]:
            if not hasattr(node, "keys") or name not in node:
                names = ", ".join(sorted(node.keys())) if hasattr(node, "keys") else ""
                return f"{found.group(1)} is not a field; allowed there: {names or 'no fields'}"
            node = node[name]
    return None


def _refused_value(message: str, config: ConfigDict) -> str:
    """The line for a value that does not fit its field's type, from the flag's own message."""
    message = " ".join(message.split())
    found = re.match(r"flag --config\.([\w.]+)=(.*?): ", message)
    if found is None:
        return message
    field, value = found.groups()
    return f"config.{field} is {value!r}; allowed: {allowed_in(field, config)}"
