"""Exported weights come back as they were, and the exported function needs nothing but jax."""

import dataclasses
import hashlib
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from etils import epath
from flax import traverse_util

import rollingq_jax as rq
from rollingq_jax import export as export_module
from rollingq_jax.convert import load_state_dict
from rollingq_jax.data.dataset import ModalityInfo
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.errors import UserError
from rollingq_jax.export import (
    command,
    export_run,
    input_shapes,
    is_upstream,
    read_exported,
    serialize,
)
from rollingq_jax.inference import Predictor
from rollingq_jax.models import build_model
from rollingq_jax.train.cli import run_command
from tests.export.export_cases import INPUTS, made_run, make_batch, upstream_run


def assert_trees_equal(ours, theirs):
    ours, theirs = (traverse_util.flatten_dict(tree, sep="/") for tree in (ours, theirs))
    assert sorted(ours) == sorted(theirs)
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)


def exported(run, folder, **options):
    path = epath.Path(folder) / "out" / "model.safetensors"
    return path, export_run(run, epath.Path(folder), path, **options)


def test_our_names_come_back(run, tmp_path):
    path, card = exported(run, tmp_path)
    params, rotation = read_exported(path)
    assert_trees_equal(params, run.params)
    np.testing.assert_array_equal(rotation, run.rotation)
    assert card["weights"]["names"] == "own" and card["weights"]["rotation"] == "rolling.rotation"
    assert "fusion.query.kernel" in load_state_dict(path)


def test_the_file_is_what_the_library_writes(run, tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    path, card = exported(run, tmp_path)
    assert card["weights"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    tensors = library.load_file(str(path))
    library.save_file(tensors, str(tmp_path / "again.safetensors"))
    again = library.load_file(str(tmp_path / "again.safetensors"))
    assert sorted(tensors) == sorted(again)
    assert all(np.array_equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_upstreams_names_come_back(fusion, tmp_path):
    run = upstream_run(fusion)
    path, card = exported(run, tmp_path)
    assert card["weights"]["names"] == "upstream"
    tensors = load_state_dict(path)
    assert tensors["encoder.pos_embed_audio"].ndim == 3 or "encoder.norm_audio.weight" in tensors
    params, rotation = rq.convert.from_upstream(tensors)
    assert_trees_equal(params, run.params)
    if fusion == "concat":
        assert rotation is None and card["weights"]["rotation"] is None
    else:
        assert card["weights"]["rotation"] == "fusion_module.rotate"
        np.testing.assert_array_equal(rotation, run.rotation)
    assert_trees_equal(read_exported(path)[0], run.params)


def test_upstreams_names_fold(tmp_path):
    run = upstream_run()
    path, card = exported(run, tmp_path, fold=True)
    params, rotation = read_exported(path)
    np.testing.assert_array_equal(rotation, np.eye(12)[None])
    assert card["weights"]["rotation"] == "folded"
    assert_trees_equal(params, rq.fold_rotation(run.params, run.rotation))


@pytest.mark.parametrize(
    "change", [{"gelu": "tanh"}, {"fusion_heads": 2}, {"num_heads": 6}, {"mlp_ratio": 2.0}]
)
def test_what_a_state_dict_cannot_say_has_to_be_upstreams(change):
    run = upstream_run()
    assert is_upstream(run)
    spec = run.model.spec
    if "num_heads" in change:
        encoders = tuple(dataclasses.replace(e, num_heads=6) for e in spec.encoders)
        change = {**change, "encoders": encoders}
    assert not is_upstream(
        dataclasses.replace(run, model=build_model(dataclasses.replace(spec, **change)))
    )


def test_inputs_of_another_size_keep_our_names(run):
    theirs = upstream_run()
    one = theirs.inputs.modalities["audio"]
    info = dataclasses.replace(one.info, shape=(128, 128, 1))
    modalities = theirs.inputs.modalities | {"audio": dataclasses.replace(one, info=info)}
    inputs = dataclasses.replace(theirs.inputs, modalities=modalities)
    assert not is_upstream(dataclasses.replace(theirs, inputs=inputs))
    assert not is_upstream(run)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [1, 4])
def test_folded_weights_answer_alike_without_a_rotation(heads, tmp_path):
    run = made_run(heads=heads)
    path, card = exported(run, tmp_path, fold=True)
    params, rotation = read_exported(path)
    assert rotation is None and card["weights"]["rotation"] == "folded"
    batch = make_batch(4)
    found = Predictor(run.model, params, None, INPUTS)(batch)
    expected = Predictor(run.model, run.params, run.rotation, INPUTS)(batch)
    np.testing.assert_allclose(found.probabilities, expected.probabilities, atol=1e-6)
    for m, share in expected.attention_share.items():
        np.testing.assert_allclose(found.attention_share[m], share, atol=1e-6)


ALONE = """
import sys
import jax, jax.export
import numpy as np

function, inputs, outputs = sys.argv[1:]
call = jax.export.deserialize(bytearray(open(function, "rb").read())).call
found = {}
for size in (1, 3):
    batch = {name: x[:size] for name, x in np.load(inputs).items()}
    probabilities, share = call(batch)
    found |= {f"{size}/{m}": x for m, x in share.items()} | {f"{size}/p": probabilities}
assert not {"rollingq_jax", "flax", "optax", "orbax"} & {m.split(".")[0] for m in sys.modules}
np.savez(outputs, **found)
"""


@pytest.mark.parametrize("fold", [False, True])
def test_the_function_runs_with_jax_alone(run, tmp_path, fold):
    path, card = exported(run, tmp_path, function_path=tmp_path / "model.bin", fold=fold)
    batch = make_batch(3)
    batch["audio_mask"] = np.arange(5)[None] < np.array([[5], [0], [3]])
    batch["text_mask"] = np.arange(6)[None] < np.array([[6], [4], [0]])
    batch["visual_mask"] = np.ones(3, bool)
    assert sorted(batch) == sorted(card["inputs"])
    np.savez(tmp_path / "in.npz", **batch)
    files = [str(tmp_path / name) for name in ("model.bin", "in.npz", "out.npz")]
    done = subprocess.run(
        [sys.executable, "-I", "-c", ALONE, *files], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    expected = Predictor(run.model, run.params, run.rotation, INPUTS)(batch)
    found = np.load(tmp_path / "out.npz")
    for size in (1, 3):
        np.testing.assert_allclose(found[f"{size}/p"], expected[0][:size], atol=1e-5)
        for m, share in expected.attention_share.items():
            np.testing.assert_allclose(found[f"{size}/{m}"], share[:size], atol=1e-5)


def test_weights_too_large_for_a_function_are_refused(run):
    large = dataclasses.replace(run, params={"x": jax.ShapeDtypeStruct((2**29,), np.float32)})
    with pytest.raises(UserError, match="the weights have 2147483648 bytes; allowed"):
        serialize(large, fold=False)


def test_nothing_to_fold(tmp_path):
    with pytest.raises(UserError, match="--fold is given and model.fusion is 'concat'"):
        exported(made_run("concat"), tmp_path, fold=True)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_weights_and_a_card(workdir, tmp_path, capsys):
    out = tmp_path / "new" / "model.safetensors"
    code = run_command(command, ["export", "--workdir", str(workdir), "--out", str(out)])
    printed, err = capsys.readouterr()
    assert code == 0 and not err
    assert "own names" in printed and "stored as rolling.rotation" in printed
    card = json.loads(out.with_suffix(".json").read_text())
    summary = json.loads((workdir / "summary.json").read_text())
    assert card["metrics"]["test_accuracy"] == summary["test_accuracy"] and card["finished"]
    assert card["data"] == summary["data"]
    assert card["config"]["model"]["dim"] == 8
    assert card["versions"]["rollingq-jax"] == rq.__version__
    assert card["inputs"]["audio"] == {"shape": ["N", 4], "dtype": "float32"}
    params, rotation = read_exported(out)
    loaded = rq.load(workdir)
    assert_trees_equal(params, loaded.params)
    np.testing.assert_array_equal(rotation, loaded.rotation)
    assert sorted(p.name for p in out.parent.iterdir()) == ["model.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--workdir", "w"], "--out is missing; allowed: --workdir FOLDER, --out FILE"),
        (["--workdir", "w", "--out", "model.pt"], "allowed: a path that ends in .safetensors"),
        (
            ["--workdir", "w", "--out", "m.safetensors", "--stablehlo", "m.json"],
            "--stablehlo is 'm.json', which is written by --out as well",
        ),
        (["--workdir", "/nowhere", "--out", "m.safetensors"], "allowed: the folder of a run"),
    ],
)
def test_mistakes_are_one_line(arguments, says, capsys):
    assert run_command(export_module.command, ["export", *arguments]) == 2
    out, err = capsys.readouterr()
    assert says in err and err.count("\n") == 1 and "Traceback" not in err


@pytest.mark.parametrize(
    ("raw", "mean", "std", "taken"),
    [
        (">f4", 0.0, 1.0, "float32"),  # a run of before: such a dtype is a matter of files
        ("float64", 0.0, 1.0, "float32"),
        ("int64", 0.0, 1e3, "int32"),
        ("int64", 0.0, 1e9, "float32"),
        ("int64", 1e12, 1.0, "float32"),
        ("uint64", 1e3, 1e3, "uint32"),
        ("uint64", 1e9, 1e9, "float32"),
        ("int64", None, None, "float32"),  # nothing is known of what they may be
        (">i2", 0.0, 1e3, "int16"),
    ],
)
def test_the_function_takes_a_dtype_that_holds_the_raw_values(run, raw, mean, std, taken):
    info = ModalityInfo("audio", "sequence", (4, 1))
    scale = {} if mean is None else {"mean": (mean,), "std": (std,)}
    one = Preprocessing(info, (4, 1), raw, **scale)
    inputs = dataclasses.replace(run.inputs, modalities={**run.inputs.modalities, "audio": one})
    shapes = input_shapes(dataclasses.replace(run, inputs=inputs), 3)
    assert shapes["audio"].dtype == np.dtype(taken) and shapes["audio"].dtype.isnative
