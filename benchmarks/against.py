"""The training step against that of an earlier revision: python -m benchmarks.against REVISION

Two processes, each with its own source tree, take steps in turn, so that both see the same machine;
what is printed is the mean of the paired ratios of their times, with its 95 % interval. The state
and the data are the same; whether the losses are is printed too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.paper_scale import Scale
from benchmarks.timing import ratio_with_interval

ROOT = Path(__file__).parents[1]

# Reads a line, takes a step, answers with its seconds and its loss.
WORKER = """
import sys, time
import jax
from benchmarks.paper_scale import Scale, compiled_step
step, state, batch = compiled_step(Scale(*map(int, sys.argv[1:])))
for _ in sys.stdin:
    start = time.perf_counter()
    state, sums, _ = jax.block_until_ready(step(state, batch))
    print(time.perf_counter() - start, float(sums["loss"]), flush=True)
"""


class Worker:
    """A process that takes one step whenever it is asked."""

    def __init__(self, root: Path, scale: Scale) -> None:
        environment = os.environ | {"PYTHONPATH": str(root)}
        sizes = map(str, (scale.batch_size, scale.dim, scale.depth, scale.num_heads))
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER, *sizes],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def step(self) -> tuple[float, float]:
        """Seconds and loss of one step."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print("step", file=self.process.stdin, flush=True)
        seconds, loss = self.process.stdout.readline().split()
        return float(seconds), float(loss)


def main() -> None:
    """Parses the command line and times."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=8)
    arguments = parser.parse_args()
    scale = Scale(batch_size=arguments.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        before = Path(folder) / "before"
        add = ["git", "-C", str(ROOT), "worktree", "add", "--detach", str(before)]
        subprocess.run([*add, arguments.revision], check=True, capture_output=True)
        workers = {}
        try:
            for name, root in (("before", before), ("now", ROOT)):
                workers[name] = Worker(root, scale)
                workers[name].step()  # compiled by then, and no other process at work meanwhile
            times, losses = {"before": [], "now": []}, {"before": [], "now": []}
            for number in range(arguments.rounds):
                order = list(workers) if number % 2 else list(workers)[::-1]
                for name in order:
                    seconds, loss = workers[name].step()
                    times[name].append(seconds)
                    losses[name].append(loss)
        finally:
            for worker in workers.values():
                worker.process.kill()
            remove = ["git", "-C", str(ROOT), "worktree", "remove", "--force", str(before)]
            subprocess.run(remove, check=False, capture_output=True)
    mean, low, high = ratio_with_interval(times["now"], times["before"])
    print(f"now / before: {mean:.3f} [{low:.3f}, {high:.3f}] over {arguments.rounds} pairs")
    for name in times:
        print(f"{name}: median {np.median(times[name]):.3f} s, last loss {losses[name][-1]!r}")


if __name__ == "__main__":
    main()
