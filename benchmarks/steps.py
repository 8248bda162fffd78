"""Training steps at the paper's scale: PyTorch, RollingQ on and off, memory, devices."""

import functools
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from benchmarks import paper_scale
from benchmarks.paper_scale import Scale, Stepper, compiled_alone, compiled_step, model_flops
from benchmarks.timing import Row, cost, interleaved, ratio_with_interval, rows

PAPER = Scale()
SMALL = Scale(depth=1, batch_size=4)
PEAK_FLOPS = {
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H200": 989e12,
}  # bfloat16, dense (data sheet)


def train_step(scale: Scale = PAPER, rounds: int = 5) -> list[Row]:
    """The whole step, and the encoders alone, against eager PyTorch where it is installed."""
    step = Stepper(*compiled_step(scale))
    calls: dict[str, Any] = {"rollingq_jax": step}
    alone: dict[str, Any] = {"rollingq_jax": paper_scale.encoder_step(scale)[0]}
    baseline = "rollingq_jax"
    try:
        from benchmarks import torch_model
    except ImportError:
        print("train_step: torch is not installed; timed without it")
    else:
        calls["torch, eager"] = torch_model.train_step(scale)
        alone["torch, eager"] = torch_model.encoder_step(scale)
        baseline = "torch, eager"
    size = f"B {scale.batch_size}, d {scale.dim}, {scale.depth} layers, {scale.dtype}"
    table = rows(f"train step, {size}", interleaved(calls, rounds), baseline)
    flops = model_flops(scale)
    peak = PEAK_FLOPS.get(jax.devices()[0].device_kind)
    for row in table:
        rate = flops / (row["median_ms"] / 1e3)
        row |= {"model_flops": flops, "model_flops_per_second": rate}
        if peak and scale.dtype == "bfloat16":
            row["model_flops_utilization"] = rate / peak
    return table + rows(f"encoders alone, {size}", interleaved(alone, rounds), baseline)


def memory(scale: Scale = PAPER) -> list[Row]:
    """Temporary bytes of the step: unrolled, scanned, and scanned with remat."""
    variants = {
        "scanned": scale._replace(scan_layers=True),
        "unrolled": scale,
        "scanned, remat": scale._replace(scan_layers=True, remat=True),
    }
    found = {name: cost(compiled_alone(variant)) for name, variant in variants.items()}
    reference = found["scanned"]["temporary_bytes"]
    return [
        {"benchmark": f"memory, B {scale.batch_size}", "case": name, "baseline": "scanned"}
        | {"ratio": numbers["temporary_bytes"] / reference}
        | numbers
        for name, numbers in found.items()
    ]


def rolling_cost(scale: Scale = SMALL, counted: Scale = PAPER, rounds: int = 40) -> list[Row]:
    """RollingQ on against off, and on against on: paired ratios with their 95 % interval.

    Args:
      scale: of the steps that are timed.
      counted: of the steps whose FLOPs and bytes are compared.
      rounds: of timing.
    """
    programs = {
        name: compiled_step(scale, rolling=name != "off") for name in ("off", "on", "on again")
    }
    times = interleaved({name: Stepper(*p) for name, p in programs.items()}, rounds, calls=2)
    table = rows(f"RollingQ, B {scale.batch_size}, depth {scale.depth}", times, "off")
    for row in table:
        base = "on" if row["case"] == "on again" else "off"
        ratio, low, high = ratio_with_interval(times[row["case"]], times[base])
        row |= {"baseline": base, "ratio": ratio, "interval_low": low, "interval_high": high}
    return table + rolling_counts(counted)


def rolling_counts(scale: Scale = PAPER) -> list[Row]:
    """FLOPs and bytes of the compiled step, RollingQ on against off."""
    off, on = (cost(compiled_alone(scale, rolling)) for rolling in (False, True))
    return [
        {
            "benchmark": f"RollingQ's {what}, B {scale.batch_size}, depth {scale.depth}",
            "case": "on",
            "baseline": "off",
            "ratio": on[what] / off[what],
            what: on[what],
        }
        for what in ("flops", "bytes")
    ]


LAYOUT = Scale(batch_size=16, dim=192, depth=2, num_heads=4)


def in_process(devices: int, expression: str) -> Any:
    """The value of an expression in a process that sees so many devices on the processor."""
    flag = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flag}
    code = f"import json; from benchmarks import steps; print(json.dumps({expression}))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def one_layout(parallel: str) -> float:
    """Median seconds of a small step, whose batch is laid out over all devices."""
    from rollingq_jax.train.parallel import WRAPPERS
    from rollingq_jax.train.steps import eval_step

    step, state = paper_scale.step_of(LAYOUT)
    evaluate = functools.partial(eval_step, model=paper_scale.model_of(LAYOUT))
    layout = WRAPPERS[parallel](step, evaluate)
    state = layout.put_state(state)
    batch = layout.put_batch({k: np.asarray(v) for k, v in paper_scale.batch_of(LAYOUT).items()})
    times = []
    for _ in range(5):
        began = time.perf_counter()
        state, sums, _ = layout.train_step(state, batch)
        jax.block_until_ready(sums)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first compiles


def devices() -> list[Row]:
    """One device against eight, on the processor, where eight share its cores."""
    found = {}
    for count in (1, 8):
        for parallel in ("jit", "pmap"):
            median = in_process(count, f"steps.one_layout({parallel!r})")
            found[f"{count} device(s), {parallel}"] = [median]
    return rows("devices on one processor, B 16, d 192", found, "1 device(s), jit")


def sharding(rounds: int = 7) -> list[Row]:
    """The state whole on each of 8 devices, in parts by `with_fsdp`, and in parts by XLA alone."""
    from rollingq_jax.train.parallel import make_mesh, state_specs, with_fsdp, with_jit
    from rollingq_jax.train.steps import eval_step

    step, state = paper_scale.step_of(LAYOUT)
    evaluate = functools.partial(eval_step, model=paper_scale.model_of(LAYOUT))
    mesh, min_size = make_mesh((2, 4), ("data", "fsdp")), 2**14
    specs = state_specs(state, 4, min_size=min_size)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    replicated = NamedSharding(mesh, PartitionSpec())
    parts = with_fsdp(step, evaluate, state, (2, 4), min_size=min_size)
    by_xla = jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated, replicated))
    layouts = {
        "replicated": with_jit(step, evaluate),
        "2 x 4": parts,
        "2 x 4, XLA's own": parts._replace(train_step=by_xla),
    }
    batch = {name: np.asarray(value) for name, value in paper_scale.batch_of(LAYOUT).items()}
    steppers, counts = {}, {}
    for name, layout in layouts.items():
        placed = layout.put_state(paper_scale.step_of(LAYOUT)[1])  # its own: steps donate it
        rows_of_batch = layout.put_batch(batch)
        state_bytes = sum(
            shard.data.nbytes
            for leaf in jax.tree.leaves((placed.params, placed.opt_state, placed.rolling))
            for shard in leaf.addressable_shards
            if shard.device == jax.devices()[0]
        )
        compiled = layout.train_step.lower(placed, rows_of_batch).compile()
        counts[name] = {"state_bytes": state_bytes}
        counts[name] |= {"temporary_bytes": cost(compiled)["temporary_bytes"]}
        steppers[name] = Stepper(compiled, placed, rows_of_batch)
    table = rows("state over 8 devices, B 16, d 192", interleaved(steppers, rounds), "replicated")
    for row in table:
        row |= counts[row["case"]]
        row["state_ratio"] = row["state_bytes"] / counts["replicated"]["state_bytes"]
    return table


def fsdp() -> list[Row]:
    """`sharding` in a process that sees eight devices."""
    return in_process(8, "steps.sharding()")
