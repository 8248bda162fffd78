"""Command lines: flags, their help, one line for each mistake, and exit codes.

A command has a table of flags, which absl reads. What a command raises becomes one line on standard
error and an exit code.
"""

import contextlib
import json
import logging
import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
from absl import flags
from etils import epath
from ml_collections import ConfigDict, config_flags

from rollingq_jax.data.options import fields_of
from rollingq_jax.errors import (
    ConfigError,
    UserError,
    did_you_mean,
    missing_package,
    printable,
    said,
)
from rollingq_jax.train.agreement import watched
from rollingq_jax.train.config import (
    allowed_in,
    field_names,
    fields_help,
    flatten,
    from_json,
    with_preset,
    with_typed_data_fields,
)
from rollingq_jax.train.distributed import TIMEOUT, USER_ERROR, Ending, join
from rollingq_jax.train.output import WIDTH, in_columns, shown, wrapped
from rollingq_jax.train.preemption import EXIT_CODE, Interrupted, Interruption

IO_ERROR = 74  # EX_IOERR of sysexits.h
KILLED_BY_SIGINT = 130
MOST_AT_ONCE = 2**20  # examples in a batch that a command line may ask for
COLUMN = 26  # where the second column of the help begins


class Flag(NamedTuple):
    """A flag of a command.

    Attributes:
      name: without dashes.
      metavar: its value in the help; empty for a switch.
      help: one or more sentences.
      parser: from text to a value.
      default: the value where the flag is not given; absl's parsers leave None as it is.
      required: whether the command needs it.
      repeated: whether it may be given several times; its value is a list then.
    """

    name: str
    metavar: str
    help: str
    parser: flags.ArgumentParser
    default: Any = None
    required: bool = False
    repeated: bool = False

    @property
    def shown(self) -> str:
        """The flag as it is typed."""
        return f"--{self.name} {self.metavar}" if self.metavar else f"--{self.name}"


def text(name: str, metavar: str, help: str, **fields: Any) -> Flag:
    """A flag whose value is any text; `fields` are those of `Flag`."""
    return Flag(name, metavar, help, flags.ArgumentParser(), **fields)


def integer(name: str, help: str, *, low: int, high: int, **fields: Any) -> Flag:
    """A flag whose value is an integer between two bounds."""
    return Flag(name, "N", help, flags.IntegerParser(low, high), **fields)


def switch(name: str, help: str) -> Flag:
    """A flag that is given or not: `--name`, or `--noname`."""
    return Flag(name, "", help, flags.BooleanParser(), default=False)


WORKDIR = text("workdir", "FOLDER", "the run's folder, local or gs://", required=True)
CONFIG_FLAGS = (
    text(
        "config",
        "FILE",
        "a Python file with get_config(), or the name of one that is installed, as av_digits",
    ),
    text("config_json", "FILE", "instead of it: a config.json, as a run leaves it"),
    text(
        "preset",
        "NAME",
        "upstream: rolls, schedule and data as in the authors' code; what is typed comes after it",
    ),
)
# In the help only: the configuration says which fields there are.
CONFIG_FIELD = switch("config.FIELD=VALUE", "sets a field, as --config.seed=1")
DISTRIBUTED_FLAGS = (
    switch("distributed", "join the other processes of a cluster that JAX knows"),
    text("coordinator", "HOST:PORT", "where there is none: an address of process 0"),
    integer("num_processes", "with it: how many there are", low=1, high=2**31 - 1),
    integer("process_id", "with it: which of them this is, from 0", low=0, high=2**31 - 1),
    integer(
        "initialization_timeout",
        f"seconds to wait for the other processes (default: {TIMEOUT})",
        low=1,
        high=1_000_000,
    ),
)


class Command(NamedTuple):
    """A command line: its flags, and what its help says.

    Attributes:
      name: as in `python -m rollingq_jax NAME`.
      summary: what it does, in a few sentences.
      examples: what may be typed behind its name.
      flags: in the order of the help.
      positional: an argument without a name, which is required, if there is one.
      reads_config: whether it takes `CONFIG_FLAGS`, and `--config.FIELD=VALUE` for any field.
      epilog: more help, made when it is asked for.
    """

    name: str
    summary: str
    examples: tuple[str, ...]
    flags: tuple[Flag, ...]
    positional: Flag | None = None
    reads_config: bool = False
    epilog: Callable[[], str] = str

    @property
    def known(self) -> tuple[Flag, ...]:
        """Its flags, and those that name a configuration where it reads one."""
        return self.flags + (CONFIG_FLAGS if self.reads_config else ())

    def parse(self, argv: Sequence[str]) -> SimpleNamespace:
        """Values by the names of the flags; `config` is a `ConfigDict` if the command reads one.

        Args:
          argv: the program's name and its arguments.

        Raises:
          ConfigError: a flag or a field is unknown, ill-typed or missing, or the configuration
            cannot be read.
          SystemExit: the help was asked for, and has been printed.
        """
        given, rest = self.parse_flags(argv)
        if self.reads_config:
            given.config = self.read_config(given, rest)
        return given

    def parse_flags(self, argv: Sequence[str]) -> tuple[SimpleNamespace, list[str]]:
        """The first half of `parse`: values by flag, and the fields of the configuration as typed.

        Nothing is read and no device used, so that processes can be joined between the halves.
        """
        if {"-h", "--help"} & set(argv[1:]):
            print(self.help(argv[0]))
            raise SystemExit(0)
        values = flags.FlagValues()
        for one in self.known:
            kind = flags.MultiFlag if one.repeated else flags.Flag
            parser = _Parser(one.parser, f"--{one.name}", allowed=partial(_allowed, one.parser))
            switch = not one.metavar
            flag: Any = kind(parser, None, one.name, one.default, one.help, boolean=switch)
            flags.DEFINE_flag(flag, values)
        rest = _read_flags(values, argv)
        given = SimpleNamespace(**{one.name: values[one.name].value for one in self.known})
        needed = [one.name for one in self.flags if one.required]
        missing = [f"--{name}" for name in needed if values[name].value is None]
        if self.positional is not None:
            found = rest.pop(0) if rest and not rest[0].startswith("-") else None
            setattr(given, self.positional.name, self._read_positional(found))
            missing = [self.positional.name] * (found is None) + missing
        if not self.reads_config:
            self._refuse(rest)
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise ConfigError(f"{', '.join(missing)} {verb} missing; allowed: {self.usage()}")
        return given, rest

    def read_config(self, given: SimpleNamespace, rest: Sequence[str]) -> ConfigDict:
        """The configuration that the flags name, with the fields that were typed."""
        named = [given.config, getattr(given, "data", None)]  # `reproduce` has both names for it
        python = [name for name in named if name is not None]
        if len(python) + (given.config_json is not None) != 1:
            raise ConfigError(f"wanted one of --config and --config_json; allowed: {self.usage()}")
        config = read_python(python[0]) if python else read_json(given.config_json)
        if given.preset is not None:
            config = with_preset(config, given.preset)
        # absl makes a flag of each field that is there, so those that are typed have to be first.
        config = with_typed_data_fields(config, rest)
        values, argv = flags.FlagValues(), [self.name, *rest]
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
        except (AttributeError, KeyError) as error:
            raise ConfigError(_unknown_field(rest, config) or str(error)) from None
        except (flags.Error, TypeError, ValueError) as error:
            raise ConfigError(" ".join(str(error).split())) from None
        for name in values:
            if name.startswith("config."):
                allowed = partial(allowed_in, name.removeprefix("config."), config)
                values[name].parser = _Parser(values[name].parser, name, allowed=allowed)
        self._refuse(_read_flags(values, argv))
        return values.config

    def names(self) -> list[str]:
        """The flags, and the fields of the configuration where it takes them, as typed."""
        fields = field_names() if self.reads_config else []
        return [*(f"--{one.name}" for one in self.known), *fields]

    def usage(self) -> str:
        """The flags in one line: those that are needed, then the others."""
        config = ["--config FILE or --config_json FILE", "--config.FIELD=VALUE"]
        needed = config if self.reads_config else []
        needed = needed + [one.shown for one in self.flags if one.required]
        if self.positional is not None:
            needed.insert(0, self.positional.metavar)
        others = [one.shown for one in self.flags if not one.required]
        return ", ".join(needed) + (f"; optional: {', '.join(others)}" if others else "")

    def help(self, program: str) -> str:
        """The help, in columns that fit a terminal of 80 characters."""
        if not program.startswith("rollingq "):
            base = os.path.basename(program)
            program = (
                "python train.py" if base == "train.py" else f"python -m rollingq_jax {self.name}"
            )
        named = (self.positional,) if self.positional is not None else ()
        needed = [one.shown for one in self.flags if one.required]
        needed += ["--config FILE"] if self.reads_config and needed else []
        usage = " ".join([f"usage: {program}", *(one.metavar for one in named), *needed, "[flags]"])
        config = (*CONFIG_FLAGS, CONFIG_FIELD) if self.reads_config else ()
        rows = [(one.metavar, one.help) for one in named]
        rows += [(one.shown, one.help) for one in (*config, *self.flags)]
        parts = [
            wrapped(usage, "    "),
            wrapped(self.summary, ""),
            "\n".join(in_columns(f"  {left}", right, COLUMN) for left, right in rows),
            "\n".join(["examples:", *(_as_typed(f"{program} {one}") for one in self.examples)]),
            self.epilog(),
        ]
        return "\n\n".join(part for part in parts if part)

    def _read_positional(self, found: str | None) -> Any:
        if found is None or self.positional is None:
            return None
        try:
            return self.positional.parser.parse(found)
        except ValueError:
            allowed = _allowed(self.positional.parser)
            raise ConfigError(f"{self.positional.name} is {found!r}; allowed: {allowed}") from None

    def _refuse(self, rest: Sequence[str]) -> None:
        """Raises for the first of the arguments that nothing has read, if there is any."""
        if not rest:
            return
        if not rest[0].startswith("-"):
            raise ConfigError(f"argument {rest[0]!r} is not known; allowed: {self.usage()}")
        name, dot, field = rest[0].lstrip("-").partition("=")[0].partition(".")
        names = [one.name for one in self.known]
        meant = did_you_mean(name, names, lambda found: f"--{found}{dot}{field}")
        raise ConfigError(f"--{name}{dot}{field} is not a flag{meant}; allowed: {self.usage()}")


class _Parser(flags.ArgumentParser):
    """Another parser, with a line for what it refuses."""

    def __init__(
        self, parser: flags.ArgumentParser, name: str, *, allowed: Callable[[], str]
    ) -> None:
        self._parser, self._name, self._allowed = parser, name, allowed

    def parse(self, argument: Any) -> Any:
        try:
            return self._parser.parse(argument)
        except (TypeError, ValueError, OverflowError):
            number = str(argument).removeprefix("-").isdecimal()
            shown = argument if number else repr(argument)
            raise ConfigError(f"{self._name} is {shown}; allowed: {self._allowed()}") from None

    def refuse_nothing(self) -> ConfigError:
        """The line where the flag is the last argument and its value is missing."""
        return ConfigError(f"{self._name} is given without a value; allowed: {self._allowed()}")


def _read_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Sets the flags; returns the arguments that are none of them.

    Raises:
      ConfigError: a value is missing or is refused.
    """
    values.set_gnu_getopt(True)  # flags may stand behind other arguments
    last = argv[-1] if len(argv) > 1 else ""
    flag = values[last.lstrip("-")] if last.startswith("-") and last.lstrip("-") in values else None
    if flag is not None and not flag.boolean and isinstance(flag.parser, _Parser):
        raise flag.parser.refuse_nothing()
    try:
        return values(argv, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        if isinstance(error.__context__, ConfigError):  # absl has put words of its own around it
            raise error.__context__ from None
        raise ConfigError(str(error)) from None
    except (flags.Error, OSError, TypeError, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from None


def _allowed(parser: flags.ArgumentParser) -> str:
    if isinstance(parser, flags.IntegerParser):
        return f"an integer >= {parser.lower_bound} and at most {parser.upper_bound:,}"
    if isinstance(parser, flags.EnumParser):
        return ", ".join(parser.enum_values)
    if isinstance(parser, flags.BooleanParser):
        return "true or false"
    return parser.syntactic_help or "a text"


def _as_typed(line: str) -> str:
    """A command over several lines, broken before flags, as a shell takes it."""
    lines = [""]
    for part in line.replace(" --", "\n--").split("\n"):
        if len(lines[-1]) + len(part) + 5 > WIDTH:
            lines.append("")
        lines[-1] += f" {part}" if lines[-1] else part
    return "  " + " \\\n    ".join(lines)


def _unknown_field(argv: Sequence[str], config: ConfigDict) -> str | None:
    """The line for the first field on the command line that the configuration does not have.

    A near name in the section that was typed is suggested, else a field of that name elsewhere.
    """
    elsewhere = {path.rpartition(".")[2]: f"config.{path}" for path in flatten(config)}
    for argument in argv:
        name = argument.lstrip("-").partition("=")[0]
        name = name.removeprefix("no") if name.startswith("noconfig.") else name
        if not argument.startswith("-") or not name.startswith("config."):
            continue
        node: Any = config
        parts = name.split(".")
        for place, part in enumerate(parts[1:], 1):
            if not hasattr(node, "keys") or part not in node:
                names = sorted(node.keys()) if hasattr(node, "keys") else []
                if parts[1:place] == ["model", "encoders"]:
                    meant = did_you_mean(part, names)
                    return (
                        f"{name}: this configuration says nothing of modality {part!r}{meant}; "
                        f"allowed: {', '.join(names) or 'none'}, and what a file adds to "
                        "config.model.encoders"
                    )
                if node is config.get("data"):  # those that are typed would be there
                    names = sorted({*names, *fields_of(str(node.get("name", "")))})
                near = {n: ".".join([*parts[:place], n, *parts[place + 1 :]]) for n in names}
                meant = did_you_mean(part, near, near.__getitem__)
                meant = meant or did_you_mean(parts[-1], elsewhere, elsewhere.__getitem__)
                allowed = ", ".join(names) or "no fields"
                return f"{name} is not a field{meant}; allowed there: {allowed}"
            node = node[part]
    return None


def own_configs() -> dict[str, str]:
    """The files of `configs/` by name: in the installed package, or in the clone around it."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    folder = inside if inside.is_dir() else package.parent / "configs"
    return {path.stem: str(path) for path in sorted(folder.glob("*.py"))}


def read_python(path: str) -> ConfigDict:
    """What `get_config()` of a file returns; `FILE:TEXT` calls `get_config("TEXT")`.

    A name without a folder and a suffix, as `av_digits`, is that of a file that comes with us.

    Raises:
      ConfigError: there is no such file, it fails, or it returns something else.
    """
    path, *argument = path.split(":", 1)
    ours = own_configs()
    path = path if os.path.isfile(path) else ours.get(path, path)
    if not os.path.isfile(path):
        meant = did_you_mean(path, ours)
        raise ConfigError(
            f"--config {path}: no such file{meant}; allowed: a Python file with get_config(), or "
            f"one of ours by its name: {', '.join(ours)}"
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


def run_command(command: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code.

    0, or 2 for a user's mistake, 74 where reading or writing failed, 75 when interrupted with the
    state saved, 130 for SIGINT elsewhere. All but 0 come with one line on standard error, without a
    traceback.
    """
    _show_warnings()
    with shown() as output:
        code = _run(command, argv)
    return code or (IO_ERROR if output.failed else 0)


def _show_warnings() -> None:
    """Warnings on standard error, as "WARNING: text"."""
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        # Importing Orbax may have made it already, with absl's format.
        if type(handler) is logging.StreamHandler:
            handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax prints what it also raises


def _run(command: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    try:
        command(argv)
    except SystemExit as done:
        if done.code:
            raise
        return 0  # the help has been shown
    except (Exception, KeyboardInterrupt) as error:
        found = outcome(error)
        if found is None:
            raise
        message, code = found
        warn(message)
        return code
    return 0


def outcome(error: BaseException) -> tuple[str, int] | None:
    """The line and the exit code of what a command raised; None where it wants a traceback."""
    match error:
        case Interrupted():
            return str(error), EXIT_CODE
        case UserError():
            return f"error: {error}", USER_ERROR
        case OSError():
            return f"error: {error}", IO_ERROR
        case KeyboardInterrupt():
            return str(error) or "interrupted", KILLED_BY_SIGINT
        case ImportError() if line := missing_package(error):
            return f"error: {line}", USER_ERROR
    backend = isinstance(error, (RuntimeError, AssertionError))
    problem = platform_problem() if backend else None
    return None if problem is None else (f"error: {problem}", USER_ERROR)


def platform_problem() -> str | None:
    """Why JAX has no device at all, as where `JAX_PLATFORMS` names what the machine lacks."""
    try:
        jax.devices()
    except Exception as error:  # a RuntimeError, or for cuda without its package an AssertionError
        reason = " ".join(str(error).split()) or "JAX finds no such device"
        platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
        return (
            f"JAX_PLATFORMS is {platforms!r}; allowed: a platform that this machine and the "
            f"installed jaxlib have, as cpu, or none, to let JAX choose ({reason})"
        )
    return None


class _Printable(logging.Formatter):
    """Lines without control characters, which a name in a message may hold."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def warn(message: str) -> None:
    """Writes a line on standard error, whatever stands in it and whoever has left."""
    with contextlib.suppress(OSError):  # `2>&1 | head -1`: the exit code is left to tell
        print(printable(" ".join(message.split())), file=sys.stderr)


TRAIN = Command(
    "train",
    "Trains as the configuration says, resumes what the folder holds, and tests once at the end.",
    (
        "--config av_digits --workdir runs/demo --config.optimizer.learning_rate=0.01",
        "--config own_data --config.data.path=mine.npz --workdir runs/mine",
    ),
    (
        WORKDIR,
        switch("quiet", "print nothing but warnings and errors; the files are as ever"),
        switch("profile", "write a trace of some steps into `profile` in the folder"),
        text(
            "compilation_cache",
            "FOLDER",
            "where compiled programs are kept; empty: nowhere (default: in the user's cache)",
        ),
        *DISTRIBUTED_FLAGS,
    ),
    reads_config=True,
    epilog=fields_help,
)


def join_processes(given: SimpleNamespace) -> Ending:
    """Joins the processes that `DISTRIBUTED_FLAGS` speak of; see `distributed.join`."""
    return join(**{flag.name: getattr(given, flag.name) for flag in DISTRIBUTED_FLAGS})


def default_cache() -> str:
    """`rollingq_jax/xla` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "rollingq_jax", "xla")


def keep_compiled(folder: str) -> None:
    """Keeps compiled programs in a folder, local or gs://; none where the name is empty.

    A folder that JAX was given already (`JAX_COMPILATION_CACHE_DIR`) stays.
    """
    if folder and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", folder)


def train_command(argv: Sequence[str]) -> None:
    """`train.py`, `python -m rollingq_jax train`; `argv` begins with the program's name."""
    given, fields = TRAIN.parse_flags(argv)
    ending = join_processes(given)  # before a device is used, and before signals are taken
    with watched(ending, outcome), Interruption(ends_process=True) as interruption:
        config = TRAIN.read_config(given, fields)
        cache = given.compilation_cache
        keep_compiled(default_cache() if cache is None else cache)
        from rollingq_jax.train.loop import train_and_evaluate

        timeout = given.initialization_timeout
        train_and_evaluate(
            config,
            given.workdir,
            interruption=interruption,
            profile=given.profile,
            quiet=given.quiet,
            initialization_timeout=TIMEOUT if timeout is None else timeout,
        )
