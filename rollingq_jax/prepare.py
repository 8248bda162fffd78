"""Prepares a data set from its original distribution: ``python -m rollingq_jax.prepare``.

    python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir DIR
    python -m rollingq_jax.prepare kinetics_sounds --source KINETICS --data_dir DIR
    python -m rollingq_jax.prepare cmu_mosei --source mosei_senti_data.pkl --data_dir DIR

Afterwards ``--config.data.path=DIR`` trains on it. An interrupted preparation goes on when the same
command is given again. Files that cannot be read are left out and listed at the end, or stop it
with ``--strict``.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rollingq_jax.errors import UserError

# Each module has prepare(source, data_dir, *, strict, ...) -> Prepared; the options that it takes
# beside those of every set.
DATA_SETS = {
    "crema_d": ("rollingq_jax.data.crema_d", ("fps", "workers")),
    "kinetics_sounds": ("rollingq_jax.data.kinetics_sounds", ("fps", "workers")),
    "cmu_mosei": ("rollingq_jax.data.cmu_mosei", ()),
}
USER_ERROR, INTERRUPTED = 2, 130


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line as every other mistake: by one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see python -m rollingq_jax.prepare --help")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = _Parser(
        prog="python -m rollingq_jax.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _positive.__name__ = "whole number from 1"
    parser.add_argument("data_set", choices=DATA_SETS, help="which data set")
    parser.add_argument("--source", required=True, type=Path, help="the original distribution")
    parser.add_argument("--data_dir", required=True, type=Path, help="where prepared sets are kept")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first file that cannot be read"
    )
    parser.add_argument(
        "--fps", type=_positive, default=1, help="frames stored for each second of video (1)"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        default=min(os.cpu_count() or 1, 8),
        help="clips read at a time (one a processor, 8 at most)",
    )
    return parser


def run(argv: Sequence[str]) -> None:
    """Prepares what the arguments say.

    Raises:
      UserError: the arguments are wrong, or the data set cannot be prepared.
    """
    arguments = make_parser().parse_args(argv)
    module, options = DATA_SETS[arguments.data_set]
    chosen: dict[str, Any] = {name: getattr(arguments, name) for name in options}
    prepared = importlib.import_module(module).prepare(
        arguments.source, arguments.data_dir, strict=arguments.strict, **chosen
    )
    print(f"{arguments.data_set}: {prepared.summary()}")
    for name, reason in prepared.unreadable.items():
        print(f"  unreadable: {name}: {reason}", file=sys.stderr)
    if prepared.unreadable:
        print(f"{len(prepared.unreadable)} unreadable, left out", file=sys.stderr)
    print(f"train on it with --config.data.path={arguments.data_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a user's mistake (one line on standard error), 130 when interrupted."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
