"""The whole model: shapes, names, masks, precision, layout, and one compilation."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax.comparison.runs import ARMS
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import build_model, dense_attention
from tests.models.model_cases import (
    AUDIO_VISUAL,
    BATCH,
    CLASSES,
    CROSS,
    DIM,
    KINDS,
    STATIC,
    batch,
    close,
    config,
    made_model,
    run,
)

THREE = {"audio": "spectrogram", "text": "tokens", "visual": "video"}


def shapes(model, inputs, **fields):
    """Output shapes, without computing anything."""
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)
    return jax.eval_shape(lambda p, b: model.apply(p, b, **fields), params, inputs)


@pytest.mark.parametrize(
    ("kind", "fusion"),
    [(kind, "attention") for kind in sorted(KINDS)]
    + [("image", f) for f in (*STATIC, "mbt", *CROSS)],
)
def test_shapes_for_every_kind_and_fusion(kind, fusion):
    kinds = {"audio": "sequence", "other": kind}
    model = build_model(config(fusion, kinds, fusion_heads=2))
    logits, out = shapes(model, batch(kinds), return_attention=True)
    lengths = {m: 1 + KINDS[k][2] for m, k in kinds.items()}
    assert logits.shape == (BATCH, CLASSES) and logits.dtype == jnp.float32
    for m in kinds:
        assert out["probe_logits"][m].shape == (BATCH, CLASSES)
        assert out["tokens"][m].shape == (BATCH, lengths[m], DIM)
        assert out["present"][m].shape == (BATCH,) and out["present"][m].dtype == jnp.bool_
    if fusion in STATIC:
        assert set(out) == {"probe_logits", "tokens", "present"}
        return
    heads = {"mult": 4, "mmml": 4, "jmt": 6}.get(fusion, 2)
    assert model.spec.rolling_heads == heads
    assert out["query"].shape == (BATCH, heads, DIM // 2)
    assert out["attention"].shape == (BATCH, 2, 1 + sum(lengths.values()))
    for m in kinds:
        assert out["mean_keys"][m].shape == (BATCH, heads, DIM // 2)
        assert out["attention_share"][m].shape == (BATCH, heads)


@pytest.mark.parametrize("fusion", ["concat", "sum", "attention", "mbt", *CROSS])
def test_three_modalities(fusion):
    model, inputs = build_model(config(fusion, THREE)), batch(THREE)
    logits, out = shapes(model, inputs)
    assert logits.shape == (BATCH, CLASSES)
    assert sorted(out["tokens"]) == ["audio", "text", "visual"]
    assert "attention" not in out


@pytest.mark.parametrize("head", ["attention", "concat", "sum"])
def test_heads_of_the_bottleneck(head):
    model = build_model(config("mbt", mbt_head=head))
    _, out = shapes(model, batch())
    assert ("query" in out) == (head == "attention")


def test_unimodal_head_is_the_probe():
    model, params, inputs = made_model("unimodal", modality="visual")
    assert sorted(params) == ["encoder_visual", "fusion", "norm_visual"]
    logits, out = run(model, params, {"visual": inputs["visual"]})
    np.testing.assert_array_equal(out["probe_logits"]["visual"], logits)
    expected = out["tokens"]["visual"][:, 0] @ params["fusion"]["head_visual"]["kernel"]
    close(logits, expected + params["fusion"]["head_visual"]["bias"][None])


def test_parameter_tree():
    model = build_model(config("mbt", mbt_layers=1, mbt_tokens=3, fusion_heads=2))
    params = jax.eval_shape(model.init, jax.random.key(0), batch())["params"]
    got = {
        "/".join(k.key for k in path): leaf.shape
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
    }

    def linear(name, *shape):
        return {f"{name}/kernel": shape, f"{name}/bias": shape[1:]}

    def norm(name):
        return {f"{name}/scale": (DIM,), f"{name}/bias": (DIM,)}

    def block(name):
        return {
            **norm(f"{name}/norm1"),
            **linear(f"{name}/attention/qkv", DIM, 3 * DIM),
            **linear(f"{name}/attention/out", DIM, DIM),
            **norm(f"{name}/norm2"),
            **linear(f"{name}/mlp/fc1", DIM, 2 * DIM),
            **linear(f"{name}/mlp/fc2", 2 * DIM, DIM),
        }

    expected = {"bottleneck/tokens": (3, DIM), "fusion/cls": (DIM,)}
    for m, patch, length in (("audio", 16, 6), ("visual", 48, 4)):
        expected |= {f"encoder_{m}/cls": (DIM,), f"encoder_{m}/position": (1 + length, DIM)}
        expected |= linear(f"encoder_{m}/embed", patch, DIM) | block(f"encoder_{m}/block_0")
        expected |= block(f"bottleneck/{m}_block_0") | norm(f"norm_{m}")
        expected |= linear(f"probe_{m}", DIM, CLASSES)
    for name in ("query", "key", "value"):
        expected |= linear(f"fusion/{name}", DIM, 2, DIM // 2)
    expected |= linear("fusion/out", DIM, DIM) | linear("fusion/head", DIM, CLASSES)
    assert got == expected


def parameters_on_crema_d(frames=3, **fields):
    """Sizes of the parameters of a model of the paper's width and depth, in millions, by name."""
    encoders = {
        "audio": {"kind": "spectrogram", "patch": (16, 16)},
        "visual": {"kind": "video", "patch": (1, 16, 16)},
    }
    paper = {"num_classes": 6, "dim": 768, "depth": 4, "num_heads": 12, "encoders": encoders}
    model = build_model(paper | fields)
    inputs = {
        "audio": jax.ShapeDtypeStruct((1, 257, 188, 1), jnp.float32),
        "visual": jax.ShapeDtypeStruct((1, frames, 224, 224, 3), jnp.float32),
    }
    params = jax.eval_shape(model.init, jax.random.key(0), inputs)["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): math.prod(leaf.shape) / 1e6
        for path, leaf in leaves
    }


@pytest.mark.parametrize(("layers", "millions"), [(1, 72.28), (2, 86.46), (3, 100.63), (4, 114.81)])
def test_parameters_of_upstreams_bottleneck_model_on_crema_d(layers, millions):
    sizes = parameters_on_crema_d(fusion="mbt", mbt_head="concat", mbt_layers=layers)
    assert abs(sum(sizes.values()) - millions) < 0.006


@pytest.mark.parametrize(
    ("arm", "millions"),
    [
        ("attention", 59.87),
        ("mbt-paper", 114.21),
        ("mmml", 77.88),
        ("jmt", 80.10),  # 38.25 d^2 over the encoders; the paper's 62.23 leaves two attentions
        ("mult", 118.94),  # 104 d^2; not in the table
    ],
)
def test_parameters_of_the_papers_table_4(arm, millions):
    """One frame of a video; class tokens and positions, which are no layer's, are left out."""
    fields = {n.removeprefix("model."): v for n, v in ARMS[arm].items() if n.startswith("model.")}
    sizes = parameters_on_crema_d(1, **fields)
    counted = [v for n, v in sizes.items() if not n.endswith(("/cls", "/position", "/tokens"))]
    assert abs(sum(counted) - millions) < 0.006


@pytest.mark.parametrize("fusion", ["concat", "attention", "mbt", *CROSS])
def test_the_content_of_an_absent_modality_does_not_matter(fusion):
    model, params, inputs = made_model(fusion)
    present = jnp.array([True, False, True, False])
    inputs["audio_mask"] = present
    noisy = dict(inputs)
    noisy["audio"] = jnp.where(present[:, None, None, None], inputs["audio"], jnp.nan)
    a, out = run(model, params, inputs)
    b, _ = run(model, params, noisy)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(out["present"]["audio"], present)
    np.testing.assert_array_equal(out["present"]["visual"], np.ones(BATCH, bool))
    if fusion != "concat":
        share = {m: np.asarray(x).mean(1) for m, x in out["attention_share"].items()}
        close(share["audio"] + share["visual"], np.ones(BATCH), 1e-6)
        np.testing.assert_array_equal(share["audio"] > 0, present)


def test_a_mask_of_nothing_but_false_is_an_absent_modality():
    kinds = {"audio": "sequence", "visual": "image"}
    model, params, inputs = made_model("attention", kinds)
    present = jnp.array([True, False, True, False])
    positions = jnp.broadcast_to(present[:, None], (BATCH, 7))
    a, _ = run(model, params, {**inputs, "audio_mask": present})
    b, _ = run(model, params, {**inputs, "audio_mask": positions})
    close(a, b, 1e-5)


def test_content_at_padded_positions_does_not_matter():
    kinds = {"a": "sequence", "b": "tokens"}
    model, params, inputs = made_model("mbt", kinds)
    real = jnp.arange(7)[None] < jnp.array([7, 2, 4, 1])[:, None]
    inputs["a_mask"] = real
    inputs["b"] = inputs["b"].at[:, 4:].set(0)
    noisy = {**inputs, "a": jnp.where(real[..., None], inputs["a"], jnp.nan)}
    a, out_a = run(model, params, inputs)
    b, out_b = run(model, params, noisy)
    np.testing.assert_array_equal(a, b)
    for m in kinds:
        np.testing.assert_array_equal(out_a["mean_keys"][m], out_b["mean_keys"][m])


def test_a_full_mask_is_no_mask():
    model, params, inputs = made_model("attention", {"a": "sequence", "b": "image"})
    a, _ = run(model, params, inputs)
    b, _ = run(model, params, {**inputs, "a_mask": jnp.ones((BATCH, 7), jnp.bool_)})
    c, _ = run(model, params, {**inputs, "a_mask": jnp.ones(BATCH, jnp.bool_)})
    close(a, b, 1e-5)
    close(a, c, 1e-5)


@pytest.mark.parametrize("fusion", ["attention", "concat"])
def test_probes_give_no_gradient_to_the_encoders(fusion):
    model, params, inputs = made_model(fusion)

    def loss(params):
        _, out = model.apply({"params": params}, inputs)
        return sum(jnp.sum(jnp.sin(x)) for x in out["probe_logits"].values())

    for name, grads in jax.jit(jax.grad(loss))(params).items():
        moved = any(bool(jnp.any(x != 0)) for x in jax.tree.leaves(grads))
        assert moved == name.startswith("probe_"), name


def test_rotation_turns_the_class_query():
    model, params, inputs = made_model("attention", depth=0, fusion_heads=2)
    keys = jax.random.split(jax.random.key(0), 2)
    rotation = rq.rotation_between(*(jax.random.normal(k, (2, DIM // 2)) for k in keys))
    quiet, turned = (run(model, params, inputs, r)[1]["query"] for r in (None, rotation))
    close(turned, rq.rotate(rotation, quiet), 1e-6)
    for r, expected in ((None, quiet), (rotation, turned)):
        query = model.apply({"params": params}, r, method="class_query")
        close(query, expected[0], 1e-6)


@pytest.mark.parametrize("fields", [{"fusion": "concat"}, {"fusion": "mbt", "mbt_head": "sum"}])
def test_a_static_fusion_has_no_query_to_rotate(fields):
    model = build_model(config(**fields))
    params = jax.eval_shape(model.init, jax.random.key(0), batch())
    with pytest.raises(ConfigError, match="model.fusion is"):
        jax.eval_shape(lambda p: model.apply(p, batch(), jnp.eye(DIM)[None]), params)
    with pytest.raises(ConfigError, match="model.fusion is"):
        jax.eval_shape(lambda p: model.apply(p, method="class_query"), params)


def test_dropout_follows_the_example_through_any_layout():
    model, params, inputs = made_model("attention", dropout=0.4, encoder_dropout=0.3)

    @jax.jit
    def train(inputs, index):
        rngs = {"dropout": jax.random.key(7)}
        return model.apply({"params": params}, inputs, train=True, example_index=index, rngs=rngs)

    index = jnp.arange(BATCH, dtype=jnp.int32)
    logits, _ = train(inputs, index)
    order = jnp.array([3, 1, 0, 2])
    permuted, _ = train(jax.tree.map(lambda x: x[order], inputs), index[order])
    close(permuted, logits[order], 1e-5)
    elsewhere, _ = train(inputs, index + BATCH)
    assert not np.allclose(elsewhere, logits)
    assert not np.allclose(run(model, params, inputs)[0], logits)


def test_examples_are_numbered_from_zero_by_default():
    model, params, inputs = made_model("attention", depth=0, dropout=0.4)
    options = {"train": True, "rngs": {"dropout": jax.random.key(7)}}
    index = jnp.arange(BATCH, dtype=jnp.int32)
    default, _ = run(model, params, inputs, **options)
    given, _ = run(model, params, inputs, example_index=index, **options)
    np.testing.assert_array_equal(default, given)


def test_bfloat16_computes_near_float32_and_reports_float32():
    model, params, inputs = made_model("mbt", scan_layers=True)
    half = build_model(config("mbt", dtype="bfloat16", scan_layers=True))
    small = jax.tree.map(lambda x: 0.3 * x, params)
    (a, exact), (b, out) = run(model, small, inputs), run(half, small, inputs)
    assert b.dtype == jnp.float32
    assert {x.dtype for x in out["tokens"].values()} == {jnp.dtype("bfloat16")}
    for name in ("probe_logits", "query", "mean_keys", "attention_share"):
        assert {x.dtype for x in jax.tree.leaves(out[name])} == {jnp.dtype("float32")}, name
    close(out["query"], exact["query"], 1e-6)
    close(b, a, 0.1)
    grads = jax.eval_shape(jax.grad(lambda p: jnp.sum(half.apply({"params": p}, inputs)[0])), small)
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_options_of_memory_change_no_output():
    model, params, inputs = made_model("mbt", depth=2)
    other = build_model(config("mbt", depth=2, scan_layers=True, remat=True))
    close(run(model, params, inputs)[0], run(other, params, inputs)[0], 1e-5)


def test_one_compilation_serves_every_batch_and_rotation():
    model, params, inputs = made_model("attention", attention_fn=dense_attention)
    traced = 0

    def forward(params, inputs, rotation, rng):
        nonlocal traced
        traced += 1
        return model.apply({"params": params}, inputs, rotation, train=True, rngs={"dropout": rng})[
            0
        ]

    step = jax.jit(forward)
    for seed in range(3):
        rotation = jnp.eye(DIM)[None] * (1.0 if seed else -1.0)
        step(params, batch(seed=seed), rotation, jax.random.key(seed))
    assert traced == 1
    # Models with equal fields are equal, so that they can be static arguments of a jitted function.
    assert build_model(config()) == build_model(config())
    assert hash(build_model(config())) == hash(build_model(config()))


def test_uint8_frames_are_normalised_in_the_model():
    fields = {"kind": "image", "patch": (4, 4), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    model = build_model(config("unimodal", modality="visual", encoders={"visual": fields}))
    pixels = np.random.default_rng(0).integers(256, size=(BATCH, 9, 8, 3)).astype(np.uint8)
    floats = (pixels / 255.0 - np.array(fields["mean"])) / np.array(fields["std"])
    _, params, _ = made_model("unimodal", {"visual": "image"}, modality="visual")
    a, _ = run(model, params, {"visual": jnp.asarray(pixels)})
    b, _ = run(model, params, {"visual": jnp.asarray(floats, jnp.float32)})
    close(a, b, 1e-4)


def test_numpy_batches_are_taken():
    model, params, inputs = made_model("concat", depth=0)
    as_numpy = {name: np.asarray(x) for name, x in inputs.items()}
    close(run(model, params, as_numpy)[0], run(model, params, inputs)[0], 0)


def test_a_batch_without_a_modality_is_named():
    model, _, inputs = made_model("concat")
    del inputs["visual"]
    with pytest.raises(DataError, match="the batch has no 'visual'; it has: audio, label"):
        model.init(jax.random.key(0), inputs)


def test_masks_of_other_names_are_not_read():
    model, params, inputs = made_model("concat", AUDIO_VISUAL)
    extra = {**inputs, "example_mask": jnp.zeros(BATCH, bool), "quality_audio": jnp.zeros(BATCH)}
    np.testing.assert_array_equal(run(model, params, extra)[0], run(model, params, inputs)[0])
