"""ImageNet ViT weights: every file layout, into every kind of encoder that has patches."""

import functools

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import rollingq_jax as rq
from rollingq_jax import convert
from rollingq_jax.errors import DataError, UserError
from tests.convert import vit_reference as ref

WEIGHTS = ref.random_weights()
SIZE = ref.SIDE * ref.PATCH
VARIANTS = {
    "augreg": WEIGHTS,
    "pre_logits": ref.with_pre_logits(WEIGHTS),
    "training": ref.prefixed(WEIGHTS, "opt/target/"),
    "big_vision": ref.big_vision_names(WEIGHTS),
    "big_vision_stacked": ref.big_vision_names(ref.stacked(WEIGHTS)),
    "stacked": ref.stacked(WEIGHTS),
    "timm": ref.timm(WEIGHTS),
}
ENCODERS = {
    "image": {"kind": "image", "patch": (ref.PATCH, ref.PATCH)},
    "sound": {"kind": "spectrogram", "patch": (ref.PATCH, ref.PATCH)},
    "video": {"kind": "video", "patch": (1, ref.PATCH, ref.PATCH)},
    "words": {"kind": "tokens", "vocab_size": 11},
    "facts": {"kind": "vector"},
}
GRIDS = {"sound": (5, 3)}


def save(path, weights):
    """Writes .safetensors for timm's names and .npz for the others."""
    if "cls_token" in weights:
        path = path / "vit.safetensors"
        save_file(weights, path)
    else:
        path = path / "vit.npz"
        np.savez(path, **weights)
    return path


def example_batch():
    rng = np.random.default_rng(1)
    images = rng.standard_normal((2, SIZE, SIZE, 3)).astype(np.float32)
    return {
        "image": images,
        "sound": rng.standard_normal((2, 13, 22, 1)).astype(np.float32),  # [F, T]: 5 x 3 patches
        "video": np.stack([images, images[::-1]], axis=1),
        "words": np.array([[1, 2, 3], [4, 5, 0]], np.int32),
        "facts": rng.standard_normal((2, 9)).astype(np.float32),
    }


def initial(model, batch):
    """Random parameters of the right shapes, without compiling the initialisation."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    rng = np.random.default_rng(3)
    return jax.tree.map(lambda x: rng.standard_normal(x.shape).astype(x.dtype), shapes)


def tokens(model, params, batch):
    return jax.jit(lambda p, b: model.apply({"params": p}, b)[1]["tokens"])(params, batch)


@functools.cache
def build(modalities, depth=2, fusion="concat", **fields):
    """A model and its parameters."""
    encoders = {m: ENCODERS[m] for m in modalities}
    config = {"fusion": fusion, "num_classes": 3, "dim": ref.DIM, "depth": depth}
    config |= {"num_heads": ref.HEADS, "encoders": encoders} | fields
    model = rq.build_model(config)
    batch = {m: example_batch()[m] for m in modalities}
    return model, initial(model, batch)


def flat(params):
    paths, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="/"): np.asarray(x) for p, x in paths}


@pytest.mark.parametrize("variant", VARIANTS)
def test_tokens_are_those_of_the_file(tmp_path, variant):
    """The encoder computes what the Vision Transformer of the file computes, block by block."""
    model, params = build(("image",), fusion="unimodal", modality="image")
    loaded, report = convert.load_vit(save(tmp_path, VARIANTS[variant]), params)
    batch = {"image": example_batch()["image"]}
    out = tokens(model, loaded, batch)
    expected = ref.forward(WEIGHTS, batch["image"], depth=2)
    np.testing.assert_allclose(out["image"], expected, atol=1e-5)
    assert not report.reshaped
    assert all(name.startswith(("fusion/", "head")) for name in report.left)
    heads = {name for name in report.unused if "head" in name or "pre_logits" in name}
    assert len(heads) == (3 if variant == "pre_logits" else 2)
    others = set(report.unused) - heads
    assert bool(others) == ("stacked" not in variant)
    assert all("block_2/" in name or "blocks.2." in name for name in others)


@pytest.mark.parametrize("variant", ["augreg", "timm"])
def test_every_kind_of_encoder(tmp_path, variant):
    modalities = tuple(ENCODERS)
    model, params = build(modalities)
    path = save(tmp_path, VARIANTS[variant])
    loaded, report = convert.load_vit(path, params, grids=GRIDS)
    new, old = flat(loaded), flat(params)
    assert set(report.loaded) | set(report.reshaped) | set(report.left) == set(old)
    assert len(report.loaded) + len(report.reshaped) + len(report.left) == len(old)
    for name in report.left:
        np.testing.assert_array_equal(new[name], old[name])
    for name in (*report.loaded, *report.reshaped):
        assert new[name].shape == old[name].shape and new[name].dtype == old[name].dtype
        assert not np.array_equal(new[name], old[name]), name
    assert all(name.split("_")[1].split("/")[0] in "image sound video" for name in report.loaded)
    assert set(report.reshaped) == {
        "encoder_sound/embed/kernel",
        "encoder_sound/position",
        "encoder_video/position",
    }
    assert "5 x 3" in report.reshaped["encoder_sound/position"] and "5 x 3" in str(report)
    for name, value in new.items():
        if name.startswith(("encoder_video/block", "encoder_sound/block")):
            image = name.replace("video", "image").replace("sound", "image")
            np.testing.assert_array_equal(value, new[image])
    batch = example_batch()
    out = tokens(model, loaded, batch)
    expected = ref.forward(WEIGHTS, batch["image"], depth=2)
    np.testing.assert_allclose(out["image"], expected, atol=1e-5)


def test_a_video_of_one_frame_is_the_image(tmp_path):
    _, params = build(("video",), fusion="unimodal", modality="video")
    model, _ = build(("video",), fusion="unimodal", modality="video")
    images = example_batch()["image"]
    one = initial(model, {"video": images[:, None]})
    loaded, report = convert.load_vit(save(tmp_path, WEIGHTS), one)
    out = tokens(model, loaded, {"video": images[:, None]})
    np.testing.assert_allclose(out["video"], ref.forward(WEIGHTS, images, 2), atol=1e-5)
    assert not report.reshaped
    two, report = convert.load_vit(save(tmp_path, WEIGHTS), params)
    table = two["encoder_video"]["position"]
    np.testing.assert_array_equal(table[1 : 1 + ref.SIDE**2], table[1 + ref.SIDE**2 :])
    np.testing.assert_array_equal(table[: 1 + ref.SIDE**2], loaded["encoder_video"]["position"])
    assert report.reshaped == {"encoder_video/position": "repeated over 2 frames"}


def test_a_spectrogram_is_a_grey_image(tmp_path):
    """The summed kernel gives what three equal colors give, rows being time."""
    model, _ = build(("sound",), fusion="unimodal", modality="sound")
    grey = example_batch()["image"][..., :1]
    sound = np.swapaxes(grey, 1, 2)  # stored as [F, T]; rows of patches follow T
    params = initial(model, {"sound": sound})
    side = (ref.SIDE, ref.SIDE)
    loaded, report = convert.load_vit(save(tmp_path, WEIGHTS), params, grids={"sound": side})
    out = tokens(model, loaded, {"sound": sound})
    expected = ref.forward(WEIGHTS, np.repeat(grey, 3, axis=-1), depth=2)
    np.testing.assert_allclose(out["sound"], expected, atol=1e-5)
    assert set(report.reshaped) == {"encoder_sound/embed/kernel"}


def bilinear(table, rows, columns):
    """Separable linear interpolation at pixel centres, by `np.interp`."""

    def along(values, size):
        old = np.arange(len(values))
        new = (np.arange(size) + 0.5) * len(values) / size - 0.5
        return np.stack([np.interp(new, old, column) for column in values.T], axis=1)

    first = np.stack([along(table[:, j], rows) for j in range(table.shape[1])], axis=1)
    return np.stack([along(first[i], columns) for i in range(rows)])


@pytest.mark.parametrize("grid", [(5, 3), (3, 5), (15, 1)])
def test_positions_are_interpolated_bilinearly(tmp_path, grid):
    _, params = build(("sound",), fusion="unimodal", modality="sound")
    loaded, _ = convert.load_vit(save(tmp_path, WEIGHTS), params, grids={"sound": grid})
    file = WEIGHTS["Transformer/posembed_input/pos_embedding"][0]
    table = np.asarray(loaded["encoder_sound"]["position"])
    np.testing.assert_array_equal(table[0], file[0])
    expected = bilinear(np.float64(file[1:]).reshape(ref.SIDE, ref.SIDE, -1), *grid)
    np.testing.assert_allclose(table[1:].reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("has_cls", [True, False])
def test_position_table_without_a_class_token(tmp_path, has_cls):
    """big_vision adds positions before the class token, and some of its models have none."""
    weights = {**WEIGHTS}
    name = "Transformer/posembed_input/pos_embedding"
    weights[name] = weights[name][:, 1:]
    model, params = build(("image",), fusion="unimodal", modality="image")
    path = save(tmp_path, {n: v for n, v in weights.items() if has_cls or n != "cls"})
    loaded, report = convert.load_vit(path, params)
    images = example_batch()["image"]
    if has_cls:
        out = tokens(model, loaded, {"image": images})
        expected = ref.forward(weights, images, depth=2, cls_position=False)
        np.testing.assert_allclose(out["image"], expected, atol=1e-5)
    else:
        assert "encoder_image/cls" in report.left
        first = params["encoder_image"]["position"][0]
        np.testing.assert_array_equal(loaded["encoder_image"]["position"][0], first)
    assert "class token" in report.reshaped["encoder_image/position"]


def test_fewer_layers_in_the_file_than_in_the_model(tmp_path):
    _, params = build(("image",), depth=4, fusion="unimodal", modality="image")
    _, report = convert.load_vit(save(tmp_path, WEIGHTS), params)
    left = {name.split("/")[1] for name in report.left if name.startswith("encoder_image")}
    assert left == {"block_3"}


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_a_missing_tensor_is_named(tmp_path, suffix):
    _, params = build(("image",), fusion="unimodal", modality="image")
    weights = VARIANTS["augreg" if suffix == "npz" else "timm"]
    path = save(tmp_path, weights)
    needed = set(weights) - set(convert.load_vit(path, params)[1].unused)
    for name in needed - {"cls", "cls_token"}:  # a ViT may do without
        path = save(tmp_path, {n: v for n, v in weights.items() if n != name})
        with pytest.raises(DataError) as error:
            convert.load_vit(path, params)
        patches = "embedding/kernel", "patch_embed.proj.weight"
        assert name in str(error.value) or name.endswith("pos_embedding") or name in patches


def test_shapes_that_do_not_fit(tmp_path):
    _, params = build(("image",), fusion="unimodal", modality="image")
    path = save(tmp_path, {**WEIGHTS, "embedding/bias": np.zeros(5, np.float32)})
    with pytest.raises(DataError, match=r"encoder_image/embed/bias has shape \(12,\).*\(5,\)"):
        convert.load_vit(path, params)
    table = np.zeros((1, 13, ref.DIM), np.float32)
    path = save(tmp_path, {**WEIGHTS, "Transformer/posembed_input/pos_embedding": table})
    with pytest.raises(DataError, match="position table has 13 rows"):
        convert.load_vit(path, params)
    _, wide = build(("image",), dim=24, fusion="unimodal", modality="image")
    with pytest.raises(DataError, match=r"encoder_image has width 24; the file has 12"):
        convert.load_vit(save(tmp_path, WEIGHTS), wide)
    encoders = {"image": {"kind": "image", "patch": (2, 2)}}
    model = rq.build_model({"fusion": "concat", "num_classes": 3, "dim": 12, "encoders": encoders})
    batch = {"image": example_batch()["image"]}
    small = initial(model, batch)
    with pytest.raises(DataError, match="patches of 4x4x3; no encoder of the model takes these"):
        convert.load_vit(save(tmp_path, WEIGHTS), small)
    with pytest.raises(DataError, match=r"embed/kernel has shape \(12, 12\).*patches of 4 x 4"):
        convert.load_vit(save(tmp_path, WEIGHTS), small, grids={"image": (8, 8)})


def test_ambiguous_grids(tmp_path):
    _, params = build(("image", "sound"))
    path = save(tmp_path, WEIGHTS)
    with pytest.raises(UserError, match=r"15 patches of encoder_sound .*grids=\{'sound': \(rows"):
        convert.load_vit(path, params)
    with pytest.raises(
        UserError, match=r"grids\['sound'\] is \(4, 4\); the encoder has 15 patches"
    ):
        convert.load_vit(path, params, grids={"sound": (4, 4)})
    with pytest.raises(UserError, match="grids has text; allowed: image, sound"):
        convert.load_vit(path, params, grids={"text": (4, 4)})
    loaded, report = convert.load_vit(path, params, grids={"sound": None})
    assert any(name.startswith("encoder_sound/block_0") for name in report.left)
    np.testing.assert_array_equal(
        loaded["encoder_sound"]["position"], params["encoder_sound"]["position"]
    )


def test_four_frames_or_a_finer_grid(tmp_path):
    """4 frames of 4 x 4 and one of 8 x 8 look alike; the caller says which."""
    model, _ = build(("video",), fusion="unimodal", modality="video")
    video = np.zeros((1, 4, SIZE, SIZE, 3), np.float32)
    params = initial(model, {"video": video})
    path = save(tmp_path, WEIGHTS)
    with pytest.raises(UserError, match="64 patches of encoder_video can be arranged in more"):
        convert.load_vit(path, params)
    grids = convert.patch_grids(model.spec, {"video": video})
    assert grids == {"video": (4, 4)}
    _, report = convert.load_vit(path, params, grids=grids)
    assert report.reshaped == {"encoder_video/position": "repeated over 4 frames"}


def test_grids_of_a_batch(tmp_path):
    model, params = build(tuple(ENCODERS))
    grids = convert.patch_grids(model.spec, example_batch())
    expected = {"image": (4, 4), "sound": (5, 3), "video": (4, 4), "words": None, "facts": None}
    assert grids == expected
    convert.load_vit(save(tmp_path, WEIGHTS), params, grids=grids)


@pytest.mark.parametrize(
    ("dataset", "grid"), [("CREMAD", (11, 16)), ("KineticSound", (8, 64))], ids=["crema_d", "ks"]
)
@pytest.mark.parametrize("side", [14, 24, 2])
def test_the_papers_grids_need_no_help(tmp_path, dataset, grid, side):
    """The numbers of patches alone tell the paper's grids, whatever the file's own size."""
    rng = np.random.default_rng(2)
    weights = {**WEIGHTS}
    weights["embedding/kernel"] = rng.standard_normal((16, 16, 3, ref.DIM)).astype(np.float32)
    table = rng.standard_normal((1, 1 + side**2, ref.DIM)).astype(np.float32)
    weights["Transformer/posembed_input/pos_embedding"] = table
    model = convert.upstream_model(dataset=dataset, edim=ref.DIM, depth=2)
    shapes = convert.upstream_shapes(dataset)
    batch = {m: jax.ShapeDtypeStruct((1, *s), np.float32) for m, s in shapes.items()}
    loaded, report = convert.load_vit(save(tmp_path, weights), initial(model, batch))
    assert convert.patch_grids(model.spec, batch) == {"audio": grid, "visual": (14, 14)}
    square = np.float64(table[0, 1:]).reshape(side, side, -1)
    audio = np.asarray(loaded["encoder_audio"]["position"])[1:].reshape(*grid, -1)
    np.testing.assert_allclose(audio, bilinear(square, *grid), atol=1e-5)
    frames = np.asarray(loaded["encoder_visual"]["position"])[1:].reshape(3, 14, 14, -1)
    for frame in frames:
        np.testing.assert_allclose(frame, bilinear(square, 14, 14), atol=1e-5)
    kernel = weights["embedding/kernel"].sum(2).reshape(256, -1)
    np.testing.assert_allclose(loaded["encoder_audio"]["embed"]["kernel"], kernel, atol=1e-5)
    assert {name.split("/")[0] for name in report.left} == {"fusion", "probe_audio", "probe_visual"}


def test_other_files(tmp_path):
    _, params = build(("image",), fusion="unimodal", modality="image")
    np.savez(tmp_path / "x.npz", a=np.ones(3))
    with pytest.raises(DataError, match="is no ViT file"):
        convert.load_vit(tmp_path / "x.npz", params)
    with pytest.raises(DataError, match="is not a file"):
        convert.load_vit(tmp_path / "y.npz", params)


def test_parameters_given_are_not_changed(tmp_path):
    _, params = build(("image",), fusion="unimodal", modality="image")
    before = flat(params)
    convert.load_vit(save(tmp_path, WEIGHTS), params)
    for name, value in flat(params).items():
        np.testing.assert_array_equal(value, before[name])
