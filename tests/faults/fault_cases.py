"""Real runs of `train.py` on a tiny model, slow enough to be hit in a chosen moment."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.parallel.processes import ROOT, free_address
from tests.train.train_cases import files, read_metrics, tiny_config, write_arrays  # noqa: F401

# A configuration is code. This one makes each step, or the wait for a checkpoint, take its time;
# pictures are left out.
CONFIG = """
import os, time
from rollingq_jax.train import report
from rollingq_jax.train.checkpoint import Checkpoints
from rollingq_jax.train.logging import MetricAccumulator
from tests.train.train_cases import tiny_config

def slower(method, seconds):
    def slow(*args):
        time.sleep(seconds)
        return method(*args)
    return slow

report.draw = lambda *args, **kwargs: None
MetricAccumulator.add = slower(MetricAccumulator.add, float(os.environ.get("STEP_SECONDS", 0)))
Checkpoints.wait = slower(Checkpoints.wait, float(os.environ.get("WAIT_SECONDS", 0)))

def get_config():
    return tiny_config(os.environ["DATA"], **{"log_every": 1, "rolling.check_every": 5,
                                              "rolling.window": 0.5})
"""
ONE_LINE = r"error: [^\n]*\n"


class Command:
    """Starts `train.py` in processes of their own.

    Args:
      folder: for the configuration, the data and compiled programs.
    """

    def __init__(self, folder):
        self.folder = folder
        (folder / "config.py").write_text(CONFIG)
        write_arrays(folder / "tiny.npz")
        self.environment = {n: v for n, v in os.environ.items() if n != "XLA_FLAGS"} | {
            "DATA": str(folder / "tiny.npz"),
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "MPLBACKEND": "agg",
            # Of this test process alone: JAX warns on standard error, which is to stay empty, where
            # it reads a program that another process has written half of.
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        }

    def start(self, workdir, *arguments, json=None, **environment):
        """A live run, of `config.py` or a JSON file; its output goes to files beside the folder."""
        code = f"--config={self.folder / 'config.py'}"
        config = code if json is None else f"--config_json={json}"
        arguments = (config, f"--workdir={workdir}", *arguments)
        with open(f"{workdir}.out", "w") as out, open(f"{workdir}.err", "w") as err:
            return subprocess.Popen(
                [sys.executable, ROOT / "train.py", *arguments],
                env=self.environment | environment,
                stdout=out,
                stderr=err,
            )

    def start_two(self, workdir, *arguments, **environment):
        """Two live processes of one run; the second knows the folder as `second` beside it."""
        second = workdir.parent / "second"
        if not second.exists():
            workdir.mkdir()
            second.symlink_to(workdir)  # each has its own output files
        flags = [f"--coordinator={free_address()}", "--num_processes=2", *arguments]
        return [
            self.start(path, *flags, f"--process_id={number}", **environment)
            for number, path in enumerate((workdir, second))
        ]

    def run(self, workdir, *arguments, **options):
        """Exit code and what is on standard error; options as `start` has them."""
        process = self.start(workdir, *arguments, **options)
        return end(process), Path(f"{workdir}.err").read_text()


def end(process, timeout=300):
    """Exit code; the process is killed if it does not end."""
    try:
        return process.wait(timeout)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def until(condition, process, timeout=300):
    """Waits for a condition of a live run; returns whether it came true before the run's end."""
    deadline = time.monotonic() + timeout
    while not condition():
        if process.poll() is not None:
            return False
        assert time.monotonic() < deadline, "the run has not come so far"
        time.sleep(0.002)
    return True


def size(path):
    """Bytes of a file, 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def steps_saved(workdir):
    """Steps of committed checkpoints."""
    folder = workdir / "checkpoints"
    names = [path.name for path in folder.iterdir()] if folder.exists() else []
    return sorted(int(name) for name in names if name.isdecimal())


def result(workdir):
    """All that a run computed, to the last bit: state, record, rows, rotations, test."""
    last = max(steps_saved(workdir))
    record = json.loads((workdir / "checkpoints" / str(last) / "record" / "metadata").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    times = ("command", "versions", "device")
    return {
        "last": last,
        "arrays": record["record"]["arrays"],  # a checksum of each; verified at restore
        "best": record["record"]["best"],
        "rows": read_metrics(workdir),
        "rotations": {p.name: p.read_bytes() for p in sorted(workdir.glob("rotations/*.npz"))},
        "summary": {name: value for name, value in summary.items() if name not in times},
    }
