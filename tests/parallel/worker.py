"""One of several processes: 20 steps on its rows of each batch, their results into a file."""

import sys

import jax
import numpy as np

from rollingq_jax.train.cli import TRAIN, join_processes
from tests.parallel import small_model

jax.config.update("jax_num_cpu_devices", 2)
parallel, path, *flags = sys.argv[1:]
join_processes(TRAIN.parse_flags(["worker", "--workdir=unused", *flags])[0])
mine = small_model.BATCH_SIZE // jax.process_count()
rows = slice(mine * jax.process_index(), mine * (jax.process_index() + 1))
records, state, _ = small_model.run_layout(small_model.LAYOUTS[parallel], rows)
np.savez(
    path,
    devices=[jax.device_count(), jax.local_device_count()],
    losses=[r["loss"] / r["weight"] for r in records],
    rotation=state.rolling.rotation,
    count=state.rolling.count,
)
