"""A whole training run in a process of its own: CONFIG.json WORKDIR MAX_STEPS [flags of `join`]."""

import json
import sys

import jax

from rollingq_jax.train.config import from_json
from rollingq_jax.train.distributed import join
from rollingq_jax.train.interrupt import Interrupted
from rollingq_jax.train.loop import train_and_evaluate

if any(argument.startswith("--coordinator") for argument in sys.argv):
    jax.config.update("jax_num_cpu_devices", 2)
_, config, workdir, max_steps = join(sys.argv)
with open(config, encoding="utf-8") as file:
    fields = json.load(file)
try:
    train_and_evaluate(from_json(fields), workdir, max_steps=int(max_steps) or None, quiet=True)
except Interrupted:
    print("stopped")
