"""Interleaved timing: machines are noisy, so what is compared runs in turn, told as a ratio."""

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from rollingq_jax.analysis.metrics import bootstrap_mean

Row = dict[str, Any]


def seconds(function: Callable[[], Any]) -> float:
    """Wall time of one call, until its result is there."""
    began = time.perf_counter()
    jax.block_until_ready(function())
    return time.perf_counter() - began


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """Seconds a call of each function in each round, the order turned about from round to round.

    Args:
      functions: by name; each is called once before the first round, to compile.
      rounds: number of rounds.
      calls: calls a round, for functions too short for the clock.
    """
    for function in functions.values():
        jax.block_until_ready(function())
    times: dict[str, list[float]] = {name: [] for name in functions}
    for round_number in range(rounds):
        names = list(functions) if round_number % 2 == 0 else list(functions)[::-1]
        for name in names:
            times[name].append(min(seconds(functions[name]) for _ in range(calls)))
    return times


def rows(benchmark: str, times: Mapping[str, list[float]], baseline: str) -> list[Row]:
    """A row a function: median seconds, and the median over rounds of its ratio to the baseline."""
    return [
        {
            "benchmark": benchmark,
            "case": name,
            "median_ms": 1e3 * statistics.median(values),
            "ratio": statistics.median(v / b for v, b in zip(values, times[baseline], strict=True)),
            "baseline": baseline,
            "rounds": len(values),
        }
        for name, values in times.items()
    ]


def ratio_with_interval(times: list[float], base: list[float]) -> tuple[float, float, float]:
    """The mean of the paired ratios of two lists of seconds, and its bootstrap 95 % interval."""
    found = bootstrap_mean(np.log(np.array(times) / np.array(base)))
    mean, low, high = (float(np.exp(x)) for x in (found.mean, found.low, found.high))
    return mean, low, high


def cost(compiled: Any) -> dict[str, float]:
    """FLOPs, bytes accessed and temporary bytes of a compiled function, as XLA counts them."""
    analysis = compiled.cost_analysis() or {}
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    memory = compiled.memory_analysis()
    return {
        "flops": float(analysis.get("flops", float("nan"))),
        "bytes": float(analysis.get("bytes accessed", float("nan"))),
        "temporary_bytes": float(getattr(memory, "temp_size_in_bytes", float("nan"))),
    }


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    found = {
        "platform": platform.platform(),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "backend": jax.default_backend(),
        "python": platform.python_version(),
    }
    for package in ("jax", "jaxlib", "flax", "optax", "torch", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def processor() -> str:
    """The processor's name."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":", 1)[1].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()
