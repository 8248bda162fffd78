"""A training run in a process of its own: CONFIG.json FIELDS WORKDIR MAX_STEPS [flags to join].

FIELDS are those of the configuration that differ, as JSON.
"""

import json
import sys

import jax

from rollingq_jax.train import report
from rollingq_jax.train.cli import TRAIN, join_processes
from rollingq_jax.train.config import from_json
from rollingq_jax.train.loop import train_and_evaluate
from rollingq_jax.train.preemption import Interrupted

if any(argument.startswith("--coordinator") for argument in sys.argv):
    jax.config.update("jax_num_cpu_devices", 2)
report.draw = lambda *args, **kwargs: None  # pictures take as long as all the rest
config, settings, workdir, max_steps, *flags = sys.argv[1:]
join_processes(TRAIN.parse_flags(["worker", "--workdir=unused", *flags])[0])
with open(config, encoding="utf-8") as file:
    fields = json.load(file)
try:
    config = from_json(fields)
    config.update_from_flattened_dict(json.loads(settings))
    train_and_evaluate(config, workdir, max_steps=int(max_steps) or None, quiet=True)
except Interrupted:
    print("stopped")
