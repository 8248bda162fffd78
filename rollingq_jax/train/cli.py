"""Command lines: what a command raises becomes one line on standard error and an exit code."""

import contextlib
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from absl import flags

from rollingq_jax.errors import UserError, printable
from rollingq_jax.train.arguments import TRAIN_USAGE, parse
from rollingq_jax.train.distributed import join
from rollingq_jax.train.interrupt import EXIT_CODE, Interrupted, Interruption
from rollingq_jax.train.output import shown
from rollingq_jax.train.profiling import default_cache, keep_compiled

USER_ERROR = 2
IO_ERROR = 74  # EX_IOERR of sysexits.h
KILLED_BY_SIGINT = 130


def run_command(command: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    """Runs a command and returns its exit code.

    0, or 2 for a user's mistake, 74 where reading or writing failed, 75 when interrupted with the
    state saved, 130 for SIGINT elsewhere. All but 0 come with one line on standard error, without a
    traceback.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax prints what it also raises
    with shown() as output:
        code = _run(command, argv)
    return code or (IO_ERROR if output.failed else 0)


def _run(command: Callable[[Sequence[str]], Any], argv: Sequence[str]) -> int:
    try:
        command(argv)
    except Interrupted as stopped:
        return _fail(str(stopped), EXIT_CODE)
    except UserError as error:
        return _fail(f"error: {error}", USER_ERROR)
    except OSError as error:
        return _fail(f"error: {error}", IO_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", KILLED_BY_SIGINT)
    except Exception:
        problem = platform_problem()
        if problem is None:
            raise
        return _fail(f"error: {problem}", USER_ERROR)
    return 0


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


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # `2>&1 | head -1`: the exit code is left to tell
        print(printable(" ".join(message.split())), file=sys.stderr)
    return code


def train_command(argv: Sequence[str]) -> None:
    """`train.py`."""
    if {"-h", "--help"} & set(argv):
        print(f"usage: {os.path.basename(argv[0])} {TRAIN_USAGE}")
        return
    argv = join(argv)  # before a device is used, and before signals are taken
    values = flags.FlagValues()
    flags.DEFINE_bool("profile", False, "Trace some steps.", flag_values=values)
    cache = "Folder of compiled programs; empty: none."
    flags.DEFINE_string("compilation_cache", default_cache(), cache, flag_values=values)
    with Interruption(ends_process=True) as interruption:
        parse(argv, values)
        keep_compiled(values.compilation_cache)
        from rollingq_jax.train.loop import train_and_evaluate

        train_and_evaluate(
            values.config, values.workdir, interruption=interruption, profile=values.profile
        )
