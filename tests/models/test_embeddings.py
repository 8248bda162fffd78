"""Patches in the documented order, normalisation, masks, and the kind that a shape speaks for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from model_cases import BATCH, KINDS, batch, close

from rollingq_jax.errors import DataError
from rollingq_jax.models import EncoderSpec, infer_kind
from rollingq_jax.models.embeddings import (
    Presence,
    cut_patches,
    make_features,
    normalise,
    read_mask,
)


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
    got = make_features(spec("spectrogram"), jnp.asarray(x), Presence())
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
    features = make_features(spec(kind), values(kind), Presence())
    assert features.shape[:2] == (BATCH, KINDS[kind][2])


def test_an_input_smaller_than_a_patch_is_named():
    with pytest.raises(DataError, match=r"size is \(3, 8\).*patch \(4, 4\)"):
        cut_patches(jnp.zeros((1, 3, 8, 1)), (4, 4))


def test_uint8_is_normalised_a_channel_at_a_time():
    pixels = np.random.default_rng(0).integers(256, size=(2, 8, 8, 3)).astype(np.uint8)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    got = normalise(spec("image", mean=mean, std=std), jnp.asarray(pixels))
    expected = (pixels / 255.0 - np.array(mean)) / np.array(std)
    close(got, expected, 1e-6)
    close(normalise(spec("image"), jnp.asarray(pixels)), pixels / 255.0, 1e-6)
    one = normalise(spec("image", mean=(0.5,), std=(0.5,)), jnp.asarray(pixels))
    close(one, pixels / 127.5 - 1.0, 1e-6)


def test_floats_are_taken_as_they_are():
    x = values("image")
    got = normalise(spec("image", mean=(0.5,), std=(0.5,)), x.astype(jnp.float16))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, x.astype(jnp.float16).astype(jnp.float32))


def test_channels_that_do_not_fit_the_mean_are_named():
    with pytest.raises(DataError, match="m has 3 channels; its mean and std have 2"):
        normalise(spec("image", mean=(0.5, 0.5)), jnp.zeros((1, 8, 8, 3), jnp.uint8))


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
    assert read_mask(spec("sequence"), x, None) == Presence(None, None)


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
