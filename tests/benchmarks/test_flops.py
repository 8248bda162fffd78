"""The FLOP formula against XLA's count of a program without loops, and the benchmarks' command."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import flops, kernels, paper_scale, run, timing
from rollingq_jax import build_model
from rollingq_jax.models import dense_attention

ROOT = Path(__file__).parents[2]


def counted(function, *arguments):
    """XLA's FLOPs of a function, compiled for one device."""
    return timing.cost(jax.jit(function).lower(*arguments).compile())["flops"]


@pytest.mark.slow
@pytest.mark.parametrize("fusion_layers", [1, 3])
def test_formula_is_what_xla_counts(fusion_layers):
    """XLA adds the elementwise work (norms, GELU, softmax, biases), a few per cent at this width.

    The formula counts products alone, so XLA's count lies above it, and not far.
    """
    config = {
        "num_classes": 6,
        "dim": 192,
        "depth": 1,
        "num_heads": 4,
        "fusion_layers": fusion_layers,
        "encoders": {
            "audio": {"kind": "spectrogram", "patch": (16, 16)},
            "visual": {"kind": "image", "patch": (16, 16)},
        },
    }
    model = build_model(config, dense_attention)
    batch = {
        "audio": jnp.ones((2, 64, 64, 1)),  # 16 patches of 256 numbers
        "visual": jnp.ones((2, 96, 96, 3)),  # 36 patches of 768 numbers
    }
    params = model.init(jax.random.key(0), batch)["params"]

    def loss(params, batch):
        logits, _ = model.apply({"params": params}, batch)
        return jnp.sum(jnp.square(logits))

    formula = 2 * flops.train_step_flops(
        model.spec, {"audio": 16, "visual": 36}, {"audio": 256, "visual": 768}
    )
    ratio = counted(jax.grad(loss), params, batch) / formula
    assert 1.0 < ratio < 1.06


def test_a_block_by_hand():
    # L = 3, d = 2, ratio 4: qkv 2*3*2*6, scores and sum 2 * 2*3*3*2, out 2*3*2*2, MLP 2 * 2*3*2*8.
    assert flops.block_flops(3, 2) == 72 + 72 + 24 + 192


def test_paper_scale_is_the_papers():
    """2 B multiply-adds for B 8: the step is about 1.17 TFLOP."""
    assert paper_scale.model_flops(paper_scale.Scale()) == pytest.approx(1.17e12, rel=0.02)


def test_fused_fusion_needs_a_hundredth_of_the_textbooks_flops():
    rows = kernels.fusion(batch_size=2, length=256, dim=256, rounds=1)
    found = {row["case"]: row for row in rows if "with gradient" in row["benchmark"]}
    assert found["fused"]["flops_ratio"] < 0.01


def test_command_writes_what_it_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run.BENCHMARKS, "rotation", lambda: kernels.rotation(dim=8, rounds=2))
    path = tmp_path / "found.json"
    assert run.main(["rotation", "--out", str(path)]) == 0
    found = json.loads(path.read_text())
    assert found["machine"]["jax"] == jax.__version__
    assert {row["case"] for row in found["rows"]} == {"geodesic", "svd"}
    assert "geodesic" in capsys.readouterr().out


def test_command_refuses_an_unknown_name(capsys):
    with pytest.raises(SystemExit) as stopped:
        run.main(["nosuch"])
    assert stopped.value.code == 2
    assert "'nosuch' is no benchmark; allowed: rotation" in capsys.readouterr().err


BARE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ImportError(name, name=name)

sys.meta_path.insert(0, Absent())
from benchmarks import paper_scale, run, steps
small = paper_scale.Scale(batch_size=2, dim=16, depth=1, num_heads=2, dtype="bfloat16")
assert [row["case"] for row in steps.train_step(small, rounds=1)]
assert run.input_pipeline() == []
"""


@pytest.mark.slow
def test_a_machine_with_the_core_alone_is_enough(capfd):
    absent = {"grain", "ml_collections", "orbax", "PIL", "tensorflow_datasets"}
    absent |= {"matplotlib", "sklearn", "tensorboardX", "torch", "tqdm", "av", "soundfile"}
    code = BARE.replace("{absent}", repr(absent))
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert "input_pipeline: skipped, since " in capfd.readouterr().out
