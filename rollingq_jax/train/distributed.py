"""Several processes as one run: joined before anything uses a device."""

import argparse
from collections.abc import Sequence

import jax

from rollingq_jax.errors import ConfigError

FLAGS = ("coordinator", "num_processes", "process_id")


def join(argv: Sequence[str]) -> list[str]:
    """Joins the processes that the command line speaks of; returns it without these flags.

    `--distributed` finds the others through the cluster (TPU pods, Slurm, Open MPI and what else
    `jax.distributed.initialize` knows). Where there is none, `--coordinator=HOST:PORT` (an address
    of process 0 that all reach), `--num_processes=N` and `--process_id=I` say the same.

    Raises:
      ConfigError: a flag is ill-typed or missing, or the processes do not find each other.
    """
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--distributed", action="store_true")
    parser.add_argument("--coordinator")
    parser.add_argument("--num_processes", type=int)
    parser.add_argument("--process_id", type=int)
    given, rest = parser.parse_known_args(list(argv[1:]))
    values = {name: getattr(given, name) for name in FLAGS}
    missing = [f"--{name}" for name, value in values.items() if value is None]
    if 0 < len(missing) < len(FLAGS):
        raise ConfigError(f"{', '.join(missing)} is missing; allowed: all of {_names()}, or none")
    if given.distributed or not missing:
        if not missing and not 0 <= given.process_id < given.num_processes:
            raise ConfigError(
                f"--process_id is {given.process_id}; allowed: 0 to {given.num_processes - 1}"
            )
        try:
            jax.distributed.initialize(given.coordinator, given.num_processes, given.process_id)
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the run's processes do not find each other ({error}); allowed: --distributed in "
                f"a cluster that JAX knows, elsewhere {_names()}"
            ) from None
    return [argv[0], *rest]


def _names() -> str:
    return ", ".join(f"--{name}" for name in FLAGS)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:  # type: ignore[override]
        raise ConfigError(f"{message}; allowed: --distributed, {_names()}")
