"""Encoders against NumPy; scanned and rematerialised layers against the plain ones; masks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from model_cases import KINDS, batch, close, filled, run

from rollingq_jax.errors import DataError
from rollingq_jax.models import Encoder, EncoderSpec, dense_attention, mapped_attention
from rollingq_jax.models.embeddings import Presence, make_features


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
    features = make_features(encoder.spec, x, Presence())
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
    a, b = (run(encoder, params, y, Presence(positions)) for y in (x, noisy))
    real = np.concatenate([np.ones((4, 1), bool), np.asarray(positions)], axis=1)
    np.testing.assert_array_equal(np.asarray(a)[real], np.asarray(b)[real])
    features = np.asarray(x)
    expected = numpy_reference.encoder(params, features, num_heads=2, depth=2, mask=real)
    close(np.asarray(a)[real], expected[real])


def test_nothing_leaks_from_padding_into_gradients():
    encoder, params, x = made_encoder()
    positions = jnp.arange(7)[None] < jnp.array([7, 3, 1, 5])[:, None]

    def loss(params, x):
        return jnp.sum(encoder.apply({"params": params}, x, Presence(positions))[:, 0] ** 2)

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
    presence = Presence(real) if masked else Presence()

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
