"""Prepares a data set from its original distribution: ``python -m rollingq_jax.prepare``.

    python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir DIR
    python -m rollingq_jax.prepare kinetics_sounds --source KINETICS --data_dir DIR
    python -m rollingq_jax.prepare cmu_mosei --source mosei_senti_data.pkl --data_dir DIR

Afterwards ``--config.data.path=DIR`` trains on it. An interrupted preparation goes on when the same
command is given again. Files that cannot be read are left out and listed at the end, or stop it
with ``--strict``.
"""

if __name__ == "__main__":  # before the imports that need an extra, so that it can be named
    from rollingq_jax.__main__ import run

    raise SystemExit(run("prepare"))

import importlib
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from absl import flags

from rollingq_jax.data.options import local_path
from rollingq_jax.errors import ConfigError
from rollingq_jax.train.cli import Command, Flag, integer, switch, text, warn

# Each module has prepare(source, data_dir, *, strict, ...) -> Prepared; the options that it takes
# beside those of every set.
DATA_SETS = {
    "crema_d": ("rollingq_jax.data.sources.crema_d", ("fps", "workers")),
    "kinetics_sounds": ("rollingq_jax.data.sources.kinetics_sounds", ("fps", "workers")),
    "cmu_mosei": ("rollingq_jax.data.sources.cmu_mosei", ()),
}
DEFAULTS = {"fps": 1, "workers": min(os.cpu_count() or 1, 8)}


_VIDEO = "; only of video sets"
PREPARE = Command(
    "prepare",
    "Prepares a data set from its original distribution. Afterwards --config.data.path=DIR "
    "trains on it. An interrupted preparation resumes when the same command is given again.",
    (
        "crema_d --source CREMA-D --data_dir DATA",
        "kinetics_sounds --source CLIPS --data_dir DATA --fps 2",
    ),
    (
        text("source", "PATH", "the original distribution", required=True),
        text("data_dir", "DIR", "where prepared sets are kept", required=True),
        switch("strict", "stop at the first file that cannot be read, instead of leaving it out"),
        integer(
            "fps",
            f"frames stored for each second of video (default: 1){_VIDEO}",
            low=1,
            high=1000,
        ),
        integer(
            "workers",
            f"clips read at a time (default: one a processor, at most 8){_VIDEO}",
            low=1,
            high=1024,
        ),
    ),
    positional=Flag(
        "data_set", "DATA_SET", ", ".join(DATA_SETS), flags.EnumParser(list(DATA_SETS))
    ),
)


def _options(given: SimpleNamespace) -> dict[str, Any]:
    """The data set's own options: what was given, else their defaults.

    Raises:
      ConfigError: one was given that this set does not have.
    """
    _, own = DATA_SETS[given.data_set]
    chosen = {n: getattr(given, n) for n in DEFAULTS if getattr(given, n) is not None}
    for name, value in chosen.items():
        if name not in own:
            takers = ", ".join(key for key, (_, options) in DATA_SETS.items() if name in options)
            raise ConfigError(
                f"--{name} is {value}; allowed with {takers}; {given.data_set} has no clips"
            )
    return {name: DEFAULTS[name] for name in own} | chosen


def command(argv: Sequence[str]) -> None:
    """`python -m rollingq_jax prepare`; `argv` begins with the program's name.

    Raises:
      UserError: the arguments are wrong, or the data set cannot be prepared.
    """
    given = PREPARE.parse(argv)
    chosen = _options(given)
    source = local_path(given.source, "--source")
    data_dir = local_path(given.data_dir, "--data_dir")
    module, _ = DATA_SETS[given.data_set]
    try:
        prepared = importlib.import_module(module).prepare(
            source, data_dir, strict=given.strict, **chosen
        )
    except KeyboardInterrupt:
        raise KeyboardInterrupt("interrupted; give the same command again to resume") from None
    print(f"{given.data_set}: {prepared.summary()}")
    for name, reason in prepared.unreadable.items():
        warn(f"unreadable: {name}: {reason}")
    if prepared.unreadable:
        warn(f"{len(prepared.unreadable)} unreadable, left out")
    print(f"train on it with --config.data.path={given.data_dir}")
