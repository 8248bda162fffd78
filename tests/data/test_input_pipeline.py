"""The benchmark of the input pipeline runs, and the pipeline is as fast as it should be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import input_pipeline

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path, capsys):
    cores = os.sched_getaffinity(0)
    out = tmp_path / "made" / "result.json"
    assert input_pipeline.main(["--clips", "30", "--seconds", "0.2", "--out", str(out)]) == 0
    assert os.sched_getaffinity(0) == cores
    printed = capsys.readouterr().out
    assert "3 JPEG frames of 341 x 256" in printed and "examples/s a core" in printed
    result = json.loads(out.read_text())
    assert result["stored_frame"] == [256, 341] and result["output_size"] == 224
    assert result["examples_per_core_second"] > 0


@pytest.mark.benchmarks
def test_200_examples_a_second_on_one_core(tmp_path):
    out = tmp_path / "result.json"
    subprocess.run(
        [sys.executable, "-m", "benchmarks.input_pipeline", "--out", str(out)], cwd=ROOT, check=True
    )
    assert json.loads(out.read_text())["examples_per_core_second"] >= 200
