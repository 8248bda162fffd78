"""Benchmarks as ratios in one run: python -m benchmarks.run [NAME ...] [--out FILE]

Prints a table and writes JSON with machine and versions. Without names it runs everything.
"""

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks import kernels, steps
from benchmarks.paper_scale import Scale
from benchmarks.timing import Row, machine


def gpu_train_step() -> list[Row]:
    """The training step in bfloat16 at B 64: for accelerators."""
    return steps.train_step(Scale(batch_size=64, dtype="bfloat16"), rounds=9)


def input_pipeline() -> list[Row]:
    """Examples a second on one core, where the data packages are installed."""
    try:
        from benchmarks import input_pipeline as pipeline
    except ImportError as error:
        print(f"input_pipeline: skipped, since {error.name} is not installed")
        return []
    found = pipeline.run(num_clips=192, seconds=10.0)
    rate = found["examples_per_core_second"]
    return [
        {"benchmark": "input pipeline, one core", "case": "CREMA-D clips", "median_ms": 1e3 / rate}
        | {"baseline": "itself", "ratio": 1.0}
        | found
    ]


BENCHMARKS: dict[str, Callable[[], list[Row]]] = {
    "rotation": kernels.rotation,
    "fusion": kernels.fusion,
    "train_step": steps.train_step,
    "memory": steps.memory,
    "rolling_cost": steps.rolling_cost,
    "devices": steps.devices,
    "fsdp": steps.fsdp,
    "input_pipeline": input_pipeline,
    "gpu_train_step": gpu_train_step,
}
ACCELERATOR_ONLY = ("gpu_train_step",)


def line(row: Row) -> str:
    """One row of the printed table."""
    time = f"{row['median_ms']:12.3f} ms" if "median_ms" in row else " " * 15
    extra = "".join(
        f"  {name} {row[name]:.4g}"
        for name in (
            "interval_low",
            "interval_high",
            "flops_ratio",
            "examples_per_core_second",
            "temporary_bytes",
            "state_bytes",
            "state_ratio",
            "model_flops_utilization",
        )
        if name in row
    )
    return f"  {row['case']:<24}{time}  {row['ratio']:9.4f} x {row['baseline']}{extra}"


def main(argv: Sequence[str]) -> int:
    """Parses the command line and runs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(BENCHMARKS))
    parser.add_argument("--out", type=Path, default=Path("benchmarks.json"))
    arguments = parser.parse_args(argv)
    for name in arguments.names:
        if name not in BENCHMARKS:
            parser.error(f"{name!r} is no benchmark; allowed: {', '.join(BENCHMARKS)}")
    on = machine()
    everything = [n for n in BENCHMARKS if n not in ACCELERATOR_ONLY or on["backend"] != "cpu"]
    print(json.dumps(on, indent=2))
    table: list[Row] = []
    for name in arguments.names or everything:
        title = None
        for row in BENCHMARKS[name]():
            if row["benchmark"] != title:
                title = row["benchmark"]
                print(title)
            print(line(row), flush=True)
            table.append(row)
        arguments.out.write_text(json.dumps({"machine": on, "rows": table}, indent=2) + "\n")
    print(f"written to {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
