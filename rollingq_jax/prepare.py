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
from typing import Any, NoReturn

from rollingq_jax.data.options import local_path
from rollingq_jax.errors import ConfigError, UserError

# Each module has prepare(source, data_dir, *, strict, ...) -> Prepared; the options that it takes
# beside those of every set.
DATA_SETS = {
    "crema_d": ("rollingq_jax.data.crema_d", ("fps", "workers")),
    "kinetics_sounds": ("rollingq_jax.data.kinetics_sounds", ("fps", "workers")),
    "cmu_mosei": ("rollingq_jax.data.cmu_mosei", ()),
}
DEFAULTS = {"fps": 1, "workers": min(os.cpu_count() or 1, 8)}
USER_ERROR, IO_ERROR, INTERRUPTED = 2, 74, 130


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
    parser.add_argument("--source", required=True, help="the original distribution")
    parser.add_argument("--data_dir", required=True, help="where prepared sets are kept")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first file that cannot be read"
    )
    video = "; of video sets alone"
    parser.add_argument(
        "--fps", type=_positive, help=f"frames stored for each second of video (1){video}"
    )
    parser.add_argument(
        "--workers",
        type=_positive,
        help=f"clips read at a time (one a processor, 8 at most){video}",
    )
    return parser


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The data set's own options: what was given, else their defaults.

    Raises:
      ConfigError: one was given that this set does not have.
    """
    _, own = DATA_SETS[arguments.data_set]
    given = {name: getattr(arguments, name) for name in DEFAULTS}
    for name, value in given.items():
        if value is not None and name not in own:
            takers = ", ".join(key for key, (_, options) in DATA_SETS.items() if name in options)
            raise ConfigError(
                f"--{name} is {value}; allowed with {takers}; {arguments.data_set} has no clips"
            )
    return {name: DEFAULTS[name] if given[name] is None else given[name] for name in own}


def run(argv: Sequence[str]) -> None:
    """Prepares what the arguments say.

    Raises:
      UserError: the arguments are wrong, or the data set cannot be prepared.
    """
    arguments = make_parser().parse_args(argv)
    chosen = _options(arguments)
    source = local_path(arguments.source, "--source")
    data_dir = local_path(arguments.data_dir, "--data_dir")
    module, _ = DATA_SETS[arguments.data_set]
    prepared = importlib.import_module(module).prepare(
        source, data_dir, strict=arguments.strict, **chosen
    )
    print(f"{arguments.data_set}: {prepared.summary()}")
    for name, reason in prepared.unreadable.items():
        print(f"  unreadable: {name}: {reason}", file=sys.stderr)
    if prepared.unreadable:
        print(f"{len(prepared.unreadable)} unreadable, left out", file=sys.stderr)
    print(f"train on it with --config.data.path={arguments.data_dir}")


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code: 0, 2 for a user's mistake, 74 where a file cannot be read or written, 130 when
    interrupted. All but 0 come with one line on standard error.
    """
    try:
        run(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except OSError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return IO_ERROR
    except KeyboardInterrupt:
        print("interrupted; give the same command again to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
