"""Patches in the documented order, masks, encoders and bottleneck against NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import (
    Bottleneck,
    Encoder,
    EncoderSpec,
    dense_attention,
    infer_kind,
    mapped_attention,
)
from rollingq_jax.models.encoders import (
    ModalityMask,
    cut_patches,
    make_features,
    normalize_pixels,
    read_mask,
)
from rollingq_jax.models.resnet import BatchNorm, ResNet18
from rollingq_jax.models.spec import resnet_grid
from tests.models import numpy_reference
from tests.models.model_cases import BATCH, KINDS, batch, close, filled, run

# ----- from an array to features


def spec(kind, **fields):
    return EncoderSpec.from_config(
        "m", {"kind": kind, **KINDS[kind][0], **fields}, depth=1, width=8, num_heads=2
    )


def values(kind, seed=0):
    return batch({"m": kind}, seed=seed)["m"]


def test_image_patches_go_row_by_row():
    x = np.asarray(values("image"))  # [B, 9, 8, 3]: the ninth row is dropped
    expected = [x[:, r : r + 4, c : c + 4].reshape(BATCH, -1) for r in (0, 4) for c in (0, 4)]
    np.testing.assert_array_equal(cut_patches(x, (4, 4)), np.stack(expected, axis=1))


def test_video_patches_go_frame_row_column():
    x = np.asarray(values("video"))  # [B, 2, 8, 8, 3]
    expected = [
        x[:, t, r : r + 4, c : c + 4].reshape(BATCH, -1)
        for t in (0, 1)
        for r in (0, 4)
        for c in (0, 4)
    ]
    np.testing.assert_array_equal(cut_patches(x, (1, 4, 4)), np.stack(expected, axis=1))


def test_a_patch_over_frames_orders_its_values_frame_row_column_channel():
    x = np.asarray(values("video"))
    got = cut_patches(x, (2, 4, 4))
    np.testing.assert_array_equal(got[:, 1], x[:, 0:2, 0:4, 4:8].reshape(BATCH, -1))


def test_spectrogram_is_cut_after_its_axes_are_swapped():
    x = np.asarray(values("spectrogram"))  # [B, F=10, T=13, 1]
    got = make_features(spec("spectrogram"), jnp.asarray(x), ModalityMask())
    expected = [
        x[:, f : f + 4, t : t + 4, 0].swapaxes(1, 2).reshape(BATCH, -1)
        for t in (0, 4, 8)
        for f in (0, 4)
    ]
    np.testing.assert_array_equal(got, np.stack(expected, axis=1))


def test_a_patch_product_is_the_strided_convolution():
    x = values("image")
    kernel = jax.random.normal(jax.random.key(0), (4, 4, 3, 6))
    convolved = jax.lax.conv_general_dilated(
        x, kernel, (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    close(cut_patches(x, (4, 4)) @ kernel.reshape(1, -1, 6), convolved.reshape(BATCH, -1, 6))


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_number_of_tokens(kind):
    features = make_features(spec(kind), values(kind), ModalityMask())
    assert features.shape[:2] == (BATCH, KINDS[kind][2])


def test_an_input_smaller_than_a_patch_is_named():
    with pytest.raises(DataError, match=r"size is \(3, 8\).*patch \(4, 4\)"):
        cut_patches(jnp.zeros((1, 3, 8, 1)), (4, 4))


def test_uint8_is_normalised_a_channel_at_a_time():
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3)).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = normalize_pixels(spec("image", mean=mean, std=std), jnp.asarray(pixels))
    expected = (pixels / 255.0 - np.array(mean)) / np.array(std)
    close(got, expected, 1e-6)
    close(normalize_pixels(spec("image"), jnp.asarray(pixels)), pixels / 255.0, 1e-6)
    one = normalize_pixels(spec("image", mean=(0.5,), std=(0.5,)), jnp.asarray(pixels))
    close(one, pixels / 127.5 - 1.0, 1e-6)


def test_floats_are_taken_as_they_are():
    x = values("image")
    got = normalize_pixels(spec("image", mean=(0.5,), std=(0.5,)), x.astype(jnp.float16))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, x.astype(jnp.float16).astype(jnp.float32))


def test_channels_that_do_not_fit_the_mean_are_named():
    with pytest.raises(DataError, match="m has 3 channels; its mean and std have 2"):
        normalize_pixels(spec("image", mean=(0.5, 0.5)), jnp.zeros((1, 8, 8, 3), jnp.uint8))


def test_mask_of_positions_and_of_presence():
    x = values("sequence")
    positions = jnp.arange(7)[None] < jnp.array([7, 3, 0, 1])[:, None]
    read = read_mask(spec("sequence"), x, positions)
    np.testing.assert_array_equal(read.positions, positions)
    np.testing.assert_array_equal(read.present, [True, True, False, True])
    present = jnp.array([True, False, True, True])
    read = read_mask(spec("sequence"), x, present)
    assert read.positions is None
    np.testing.assert_array_equal(read.present, present)
    assert read_mask(spec("sequence"), x, None) == ModalityMask(None, None)


def test_ids_of_zero_are_padding():
    ids = jnp.array([[3, 0, 5], [0, 0, 0], [1, 2, 0], [4, 4, 4]], jnp.int32)
    read = read_mask(spec("tokens"), ids, None)
    np.testing.assert_array_equal(read.positions, ids != 0)
    np.testing.assert_array_equal(read.present, [True, False, True, True])
    read = read_mask(spec("tokens"), ids, jnp.array([False, True, True, True]))
    np.testing.assert_array_equal(read.present, [False, False, True, True])
    explicit = jnp.ones((4, 3), jnp.bool_)
    np.testing.assert_array_equal(read_mask(spec("tokens"), ids, explicit).positions, explicit)


@pytest.mark.parametrize("mask", [jnp.ones((4, 7)), jnp.ones((3, 7), bool), jnp.ones((3,), bool)])
def test_a_mask_of_another_dtype_or_batch_is_refused(mask):
    with pytest.raises(DataError, match="m_mask has shape"):
        read_mask(spec("sequence"), values("sequence"), mask)


def test_a_mask_of_another_length_is_refused():
    presence = read_mask(spec("image"), values("image"), jnp.ones((4, 9), bool))
    with pytest.raises(DataError, match=r"m_mask has shape \(4, 9\); allowed: \(4, 4\)"):
        make_features(spec("image"), values("image"), presence)


@pytest.mark.parametrize(
    ("shape", "dtype", "kind"),
    [
        ((5, 3, 8, 8, 3), np.uint8, "video"),
        ((5, 3, 8, 8, 3), np.float32, "video"),
        ((5, 8, 8, 3), np.uint8, "image"),
        ((5, 8, 8, 3), np.float32, "image"),
        ((5, 8, 8, 1), np.uint8, "image"),
        ((5, 129, 40, 1), np.float32, "spectrogram"),
        ((5, 50, 35), np.float64, "sequence"),
        ((5, 50), np.int64, "tokens"),
        ((5, 50), np.float32, "vector"),
        ((5, 50), jnp.bfloat16, "vector"),
    ],
)
def test_infer_kind(shape, dtype, kind):
    assert infer_kind(shape, dtype) == kind


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((5,), np.float32), ((5, 4, 4), np.uint8), ((5, 4), np.bool_), ((5, 4), "U3")],
)
def test_infer_kind_refuses_what_it_does_not_know(shape, dtype):
    with pytest.raises(DataError, match="allowed"):
        infer_kind(shape, dtype)


# ----- encoders


def made_encoder(kind="sequence", depth=2, width=8, dim=8, **fields):
    encoder_spec = EncoderSpec.from_config(
        "m", {"kind": kind, **KINDS[kind][0]}, depth=depth, width=width, num_heads=2
    )
    encoder = Encoder(encoder_spec, dim, mlp_ratio=2.0, **fields)
    x = batch({"m": kind})["m"]
    return encoder, filled(encoder, x), x


@pytest.mark.parametrize("kind", ["spectrogram", "image", "video", "sequence", "vector"])
def test_encoder_equals_numpy(kind):
    encoder, params, x = made_encoder(kind)
    features = make_features(encoder.spec, x, ModalityMask())
    expected = numpy_reference.encoder(params, features, num_heads=2, depth=2)
    close(run(encoder, params, x), expected)


def test_token_embedding_looks_up_rows():
    encoder, params, ids = made_encoder("tokens", depth=0)
    rows = np.asarray(params["embed"]["embedding"])[np.asarray(ids)]
    cls = np.broadcast_to(np.asarray(params["cls"]), (ids.shape[0], 1, 8))
    expected = np.concatenate([cls, rows], axis=1) + np.asarray(params["position"])
    close(encoder.apply({"params": params}, ids), expected, 1e-6)


def test_padded_positions_are_read_by_nobody():
    encoder, params, x = made_encoder()
    positions = jnp.arange(7)[None] < jnp.array([7, 3, 1, 5])[:, None]
    noisy = jnp.where(positions[..., None], x, jnp.nan)
    a, b = (run(encoder, params, y, ModalityMask(positions)) for y in (x, noisy))
    real = np.concatenate([np.ones((4, 1), bool), np.asarray(positions)], axis=1)
    np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])
    features = np.asarray(x)
    expected = numpy_reference.encoder(params, features, num_heads=2, depth=2, mask=real)
    close(np.asarray(a)[real], expected[real])


def test_nothing_leaks_from_padding_into_gradients():
    encoder, params, x = made_encoder()
    positions = jnp.arange(7)[None] < jnp.array([7, 3, 1, 5])[:, None]

    def loss(params, x):
        return jnp.sum(encoder.apply({"params": params}, x, ModalityMask(positions))[:, 0] ** 2)

    gradient = jax.jit(jax.grad(loss))
    noisy = jnp.where(positions[..., None], x, jnp.nan)
    close_trees(gradient(params, noisy), gradient(params, x), 1e-6)


def close_trees(a, b, tolerance):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for (path, x), (_, y) in zip(
        jax.tree_util.tree_leaves_with_path(a), jax.tree_util.tree_leaves_with_path(b), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance, err_msg=str(path))


@functools.cache
def value_and_gradient(rate, masked, scan=False, remat=False):
    encoder, params, x = made_encoder(
        depth=2, dropout=rate, scan_layers=scan, remat=remat, attention_fn=dense_attention
    )
    real = jnp.arange(7)[None] < jnp.array([7, 3, 1, 5])[:, None]
    presence = ModalityMask(real) if masked else ModalityMask()

    def loss(params):
        rngs = {"dropout": jax.random.key(5)}
        out = encoder.apply({"params": params}, x, presence, train=True, rngs=rngs)
        return jnp.sum(jnp.sin(out[:, 0])), out

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


@pytest.mark.parametrize(
    ("scan", "remat", "rate", "masked"),
    [
        (True, False, 0.4, True),
        (False, True, 0.4, True),
        (True, True, 0.4, True),
        (True, True, 0.0, False),
    ],
)
def test_scan_and_remat_change_neither_value_nor_gradient(scan, remat, rate, masked):
    (_, a), grads_a = value_and_gradient(rate, masked)
    (_, b), grads_b = value_and_gradient(rate, masked, scan, remat)
    close(a, b, 1e-5)
    close_trees(grads_a, grads_b, 1e-5)


@pytest.mark.parametrize(("scan", "remat"), [(True, False), (False, True), (True, True)])
def test_scan_and_remat_have_the_same_parameters(scan, remat):
    plain, _, x = made_encoder(depth=3)
    other = plain.clone(scan_layers=scan, remat=remat)
    params = [e.init(jax.random.key(0), x)["params"] for e in (plain, other)]
    close_trees(*params, 0)


def test_no_layers_can_be_scanned():
    encoder, params, x = made_encoder(depth=0, scan_layers=True)
    assert encoder.apply({"params": params}, x).shape == (4, 8, 8)


def test_a_scanned_program_has_one_block():
    def products(**fields):
        encoder, params, x = made_encoder(depth=4, **fields)
        text = jax.jit(encoder.apply).lower({"params": params}, x).as_text()
        return text.count("stablehlo.dot_general")

    plain, scanned = products(), products(scan_layers=True)
    per_block = (plain - scanned) / 3
    assert per_block == 6  # qkv, scores, weighted values, out, fc1, fc2


def test_another_width_is_projected_to_the_models():
    encoder, params, x = made_encoder(width=8, dim=12)
    inner = encoder.clone(dim=8)
    rest = {name: p for name, p in params.items() if name != "project"}
    expected = numpy_reference.linear(params["project"], np.asarray(run(inner, rest, x)))
    close(run(encoder, params, x), expected)


def test_the_attention_function_is_injected():
    encoder, params, x = made_encoder()
    asked = []

    def attention(q, k, v, mask):
        asked.append((q.shape, mask))
        return mapped_attention(q, k, v, mask)

    other = encoder.clone(attention_fn=attention)
    close(run(other, params, x), run(encoder, params, x), 1e-5)
    assert asked == [((4, 8, 2, 4), None)] * 2


def test_another_number_of_tokens_than_the_parameters_have_is_named():
    encoder, params, x = made_encoder()
    with pytest.raises(DataError, match="m has 5 tokens; allowed: 7"):
        encoder.apply({"params": params}, x[:, :5])


@pytest.mark.parametrize("x", [jnp.zeros((4, 7)), jnp.zeros((4, 7, 6), jnp.int32)])
def test_an_array_that_does_not_fit_the_kind_is_named(x):
    encoder, params, _ = made_encoder()
    with pytest.raises(DataError, match="m has shape .* allowed for kind 'sequence'"):
        encoder.apply({"params": params}, x)


# ----- the bottleneck


LENGTHS = {"audio": 5, "text": 3, "visual": 4}
INDEX = jnp.arange(3, dtype=jnp.int32)


def made_bottleneck(modalities=("audio", "visual"), **fields):
    module = Bottleneck(num_layers=2, num_tokens=4, mlp_ratio=2.0, **fields)
    keys = jax.random.split(jax.random.key(0), len(modalities))
    streams = {
        m: jax.random.normal(k, (3, LENGTHS[m], 8)) for m, k in zip(modalities, keys, strict=True)
    }
    everything = {m: ModalityMask() for m in modalities}
    params = filled(module, streams, everything, example_index=INDEX)
    return module, params, streams, everything


@pytest.mark.parametrize("modalities", [("audio", "visual"), ("audio", "text", "visual")])
def test_equals_the_loop(modalities):
    module, params, streams, everything = made_bottleneck(modalities)
    expected = numpy_reference.bottleneck(params, streams, num_layers=2, num_tokens=4)
    got = run(module, params, streams, everything, example_index=INDEX)
    for m in modalities:
        close(got[m], expected[m])


def test_an_absent_modality_adds_nothing_to_the_bottleneck():
    module, params, streams, everything = made_bottleneck(("audio", "text", "visual"))
    present = {"audio": [1, 0, 1], "text": [1, 1, 1], "visual": [0, 1, 1]}
    present = {m: jnp.array(x, jnp.bool_) for m, x in present.items()}
    presences = {m: ModalityMask(None, x) for m, x in present.items()}
    expected = numpy_reference.bottleneck(
        params, streams, num_layers=2, num_tokens=4, present=present
    )
    got = run(module, params, streams, presences, example_index=INDEX)
    for m in streams:
        real = np.asarray(present[m])
        close(np.asarray(got[m])[real], expected[m][real])


def test_an_example_without_any_modality_stays_finite():
    module, params, streams, _ = made_bottleneck()
    presences = {m: ModalityMask(None, jnp.array([True, False, True])) for m in streams}
    got = run(module, params, streams, presences, example_index=INDEX)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in got.values())


def test_padded_positions_change_no_stream_of_the_bottleneck():
    module, params, streams, everything = made_bottleneck()
    positions = jnp.arange(4)[None] < jnp.array([4, 1, 2])[:, None]
    presences = {**everything, "audio": ModalityMask(positions, jnp.any(positions, axis=1))}
    padding = jnp.concatenate([jnp.zeros((3, 1), jnp.bool_), ~positions], axis=1)[..., None]
    noisy = {**streams, "audio": jnp.where(padding, 50.0, streams["audio"])}
    a, b = (run(module, params, x, presences, example_index=INDEX) for x in (streams, noisy))
    np.testing.assert_array_equal(a["visual"], b["visual"])
    np.testing.assert_array_equal(a["audio"][:, 0], b["audio"][:, 0])


def test_remat_changes_nothing():
    module, params, streams, everything = made_bottleneck()

    def loss(module, params):
        out = run(module, params, streams, everything, example_index=INDEX)
        return sum(jnp.sum(jnp.sin(x)) for x in out.values())

    a = jax.jit(jax.value_and_grad(lambda p: loss(module, p)))(params)
    b = jax.jit(jax.value_and_grad(lambda p: loss(module.clone(remat=True), p)))(params)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(x, y, 1e-4)


def test_every_block_drops_independently():
    module, params, streams, everything = made_bottleneck(dropout=0.5)
    same = {m: streams["visual"] for m in streams}
    shared = {k.replace("visual", "audio"): p for k, p in params.items() if "visual" in k}
    params = {**params, **shared}  # two equal streams with equal parameters
    quiet = run(module, params, same, everything, example_index=INDEX)
    close(quiet["audio"], quiet["visual"], 1e-6)
    noisy = run(
        module,
        params,
        same,
        everything,
        example_index=INDEX,
        train=True,
        rngs={"dropout": jax.random.key(2)},
    )
    assert not np.allclose(noisy["audio"], noisy["visual"])


def test_averages_are_over_what_counts():
    """One of two images, in training; the running averages, otherwise."""
    module = BatchNorm()
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5)) + 2.0, jnp.float32)
    variables = module.init(jax.random.key(0), x, None, False, None)
    weight = jnp.array([1.0, 0.0])

    def train(weight):
        return module.apply(variables, x, weight, True, None, mutable=["batch_stats"])

    wide = np.asarray(x, np.float64)
    one = wide[0].reshape(-1, 5)
    y, changed = train(weight)
    close(y, (wide - one.mean(0)) / np.sqrt(one.var(0) + 1e-5), 1e-5)
    close(changed["batch_stats"]["mean"], 0.1 * one.mean(0), 1e-6)
    close(changed["batch_stats"]["var"], 0.9 + 0.1 * one.var(0, ddof=1), 1e-6)
    y, changed = train(0 * weight)  # nothing counts: all stays
    close(y, x / np.sqrt(1 + 1e-5), 1e-6)
    jax.tree.map(np.testing.assert_array_equal, changed["batch_stats"], variables["batch_stats"])
    close(module.apply(variables, x, None, False, None), y, 1e-6)
    with pytest.raises(ConfigError, match="the variables have no collection 'batch_stats'"):
        module.apply({"params": variables["params"]}, x, None, False, None)


@pytest.mark.parametrize(
    ("shape", "tokens"), [((33, 64, 1), 2 * 2), ((64, 64, 3), 4), ((3, 20, 40, 3), 3 * 2)]
)
def test_a_resnet_has_a_token_for_every_32_pixels_of_a_frame(shape, tokens):
    resnet = EncoderSpec.from_config("m", {"kind": "resnet18"}, depth=3, width=8, num_heads=2)
    assert (resnet.depth, resnet.width) == (0, 512)
    assert math.prod(resnet_grid(shape)) == tokens
    x = jax.ShapeDtypeStruct((BATCH, *shape), jnp.float32)
    made, variables = jax.eval_shape(
        lambda x: ResNet18(resnet, 16, remat=True).init_with_output(jax.random.key(0), x), x
    )
    assert made.shape == (BATCH, 1 + tokens, 16)
    backbone = {n: x for n, x in variables["params"].items() if n != "project"}
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(backbone))
    assert count == 11_176_512 - 64 * 49 * (3 - shape[-1])  # torchvision's without its head


def test_what_a_resnet_does_not_take():
    resnet = EncoderSpec.from_config("m", {"kind": "resnet18"}, depth=3, width=8, num_heads=2)

    def init(x, presence=None):
        jax.eval_shape(lambda: ResNet18(resnet, 8).init(jax.random.key(0), x, presence))

    with pytest.raises(DataError, match=r"allowed for kind 'resnet18': \[batch, row, column, chan"):
        init(jnp.ones((2, 7, 5)))
    with pytest.raises(DataError, match=r"'resnet18': \[batch\], whether an example has the modal"):
        init(jnp.ones((2, 7, 5, 1)), ModalityMask(jnp.ones((2, 3), bool), jnp.ones(2, bool)))
    for field, value in (("depth", 2), ("width", 64), ("patch", (4, 4))):
        with pytest.raises(ConfigError, match=f"m.{field} is .*; allowed for kind 'resnet18': to"):
            EncoderSpec.from_config(
                "m", {"kind": "resnet18", field: value}, depth=3, width=8, num_heads=2
            )
