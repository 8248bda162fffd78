"""Each fusion against its equation in NumPy, and what an absent modality or a rotation does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import expit

import rollingq_jax as rq
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import (
    AttentionFusion,
    ConcatFusion,
    FilmFusion,
    GatedFusion,
    SumFusion,
)
from tests.models import numpy_reference
from tests.models.model_cases import CLASSES, DIM, close, filled, run

B = 3
LENGTHS = {"audio": 5, "text": 3, "visual": 4}
TWO, THREE = ("audio", "visual"), ("audio", "text", "visual")
INDEX = jnp.arange(B, dtype=jnp.int32)


def made_tokens(modalities, seed=0):
    rng = np.random.default_rng(seed)
    return {m: jnp.asarray(rng.normal(size=(B, LENGTHS[m], DIM)), jnp.float32) for m in modalities}


def everything(tokens):
    return dict.fromkeys(tokens)


def static(fusion, modalities):
    module, tokens = fusion(CLASSES), made_tokens(modalities)
    return module, filled(module, tokens, everything(tokens)), tokens


def class_tokens(tokens):
    return [np.asarray(x[:, 0], np.float64) for x in tokens.values()]


def concat(p, *xs):
    return numpy_reference.linear(p["head"], np.concatenate(xs, axis=1))


def added(p, *xs):
    names = sorted(p)  # head_<m>, alphabetical as the modalities are
    return sum(numpy_reference.linear(p[name], x) for name, x in zip(names, xs, strict=True))


def film(p, x, y):
    scale, shift = np.split(numpy_reference.linear(p["film"], x), 2, axis=1)
    return numpy_reference.linear(p["head"], scale * y + shift)


def gated(p, x, y):
    u, w = (numpy_reference.linear(p[f"in_{m}"], v) for m, v in zip(TWO, (x, y), strict=True))
    return numpy_reference.linear(p["head"], expit(u) * w)


STATIC = [
    (ConcatFusion, TWO, concat),
    (ConcatFusion, THREE, concat),
    (SumFusion, TWO, added),
    (SumFusion, THREE, added),
    (SumFusion, ("audio",), added),
    (FilmFusion, TWO, film),
    (GatedFusion, TWO, gated),
]


@pytest.mark.parametrize(("fusion", "modalities", "equation"), STATIC)
def test_static_fusions_are_their_equations(fusion, modalities, equation):
    module, params, tokens = static(fusion, modalities)
    logits, out = run(module, params, tokens, everything(tokens))
    close(logits, equation(params, *class_tokens(tokens)))
    assert out == {}


@pytest.mark.parametrize(("fusion", "modalities", "equation"), STATIC)
def test_an_absent_modality_counts_as_a_class_token_of_zeros(fusion, modalities, equation):
    module, params, tokens = static(fusion, modalities)
    present = {m: np.array([i != n for i in range(B)]) for n, m in enumerate(modalities)}
    masks = {
        m: jnp.broadcast_to(jnp.asarray(p)[:, None], (B, LENGTHS[m])) for m, p in present.items()
    }
    zeroed = [
        np.where(p[:, None], x, 0.0)
        for p, x in zip(present.values(), class_tokens(tokens), strict=True)
    ]
    logits, _ = run(module, params, tokens, masks)
    close(logits, equation(params, *zeroed))


@functools.cache
def attention(modalities=TWO, num_heads=1, dropout=0.2):
    module = AttentionFusion(CLASSES, DIM, num_heads, dropout)
    tokens = made_tokens(modalities)
    params = filled(module, tokens, everything(tokens), example_index=INDEX)
    return module, params, tokens


def attend(module, params, tokens, masks=None, rotation=None, **fields):
    masks = masks or everything(tokens)
    return run(
        module,
        params,
        tokens,
        masks,
        rotation,
        return_attention=True,
        example_index=fields.pop("example_index", INDEX),
        **fields,
    )


def rotations(num_heads, seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    source, target = (jax.random.normal(k, (num_heads, DIM // num_heads)) for k in keys)
    return rq.rotation_between(source, target)


def query_of(params):
    p = params["query"]
    kernel, cls = np.asarray(p["kernel"], np.float64), np.asarray(params["cls"], np.float64)
    return np.einsum("d,dhk->hk", cls, kernel) + np.asarray(p["bias"])


@pytest.mark.parametrize("num_heads", [1, 4])
@pytest.mark.parametrize("modalities", [TWO, THREE])
def test_attention_is_the_textbooks(modalities, num_heads):
    module, params, tokens = attention(modalities, num_heads)
    rotation = rotations(num_heads)
    query = np.einsum("hij,hj->hi", np.asarray(rotation, np.float64), query_of(params))
    logits, weights, means, shares = numpy_reference.fusion_attention(
        params, tokens, query, num_heads
    )
    got, out = attend(module, params, tokens, rotation=rotation)
    close(got, logits)
    close(out["attention"], weights)
    close(out["query"], np.repeat(query[None], B, axis=0))
    for m in modalities:
        close(out["mean_keys"][m], means[m])
        close(out["attention_share"][m], shares[m])


def test_the_identity_rotation_is_none():
    module, params, tokens = attention(num_heads=2)
    identity = jnp.broadcast_to(jnp.eye(DIM // 2)[None], (2, DIM // 2, DIM // 2))
    a, out_a = attend(module, params, tokens)
    b, out_b = attend(module, params, tokens, rotation=identity)
    np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(out_a["query"], out_b["query"])


def test_the_query_is_rotated_and_nothing_else():
    module, params, tokens = attention(num_heads=2)
    rotation = rotations(2)
    _, before = attend(module, params, tokens)
    _, after = attend(module, params, tokens, rotation=rotation)
    close(after["query"], rq.rotate(rotation, before["query"]), 1e-6)
    for m in tokens:
        np.testing.assert_array_equal(after["mean_keys"][m], before["mean_keys"][m])


def test_no_gradient_asks_for_a_rotation_that_is_not_there():
    module, params, tokens = attention()
    rotation = rotations(1)

    def loss(params, rotation):
        return jnp.sum(attend(module, params, tokens, rotation=rotation)[0] ** 2)

    grads = jax.jit(jax.grad(loss))(params, rotation)
    assert jax.tree.structure(grads) == jax.tree.structure(params)
    assert all(bool(jnp.any(x != 0)) for name, x in leaves(grads) if name != "key/bias")


def leaves(tree):
    return [
        ("/".join(k.key for k in path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    ]


def test_a_rotation_of_another_shape_is_named():
    module, params, tokens = attention(num_heads=2)
    with pytest.raises(
        ConfigError, match=r"rotation has shape \(1, 16, 16\); allowed: \(2, 8, 8\)"
    ):
        attend(module, params, tokens, rotation=rotations(1))


def test_an_absent_modality_takes_no_attention_and_the_others_share_it():
    module, params, tokens = attention(THREE)
    present = {"audio": [1, 0, 1], "text": [1, 1, 0], "visual": [1, 1, 0]}
    masks = {
        m: jnp.broadcast_to(jnp.array(p, jnp.bool_)[:, None], (B, LENGTHS[m]))
        for m, p in present.items()
    }
    logits, out = attend(module, params, tokens, masks)
    shares = np.stack([out["attention_share"][m][:, 0] for m in THREE], axis=1)
    np.testing.assert_array_equal(shares > 0, np.array(list(present.values())).T.astype(bool))
    close(shares.sum(axis=1), np.ones(B), 1e-6)
    close(shares[2], [1.0, 0.0, 0.0], 1e-6)
    noisy = {m: jnp.where(masks[m][..., None], x, 9.0) for m, x in tokens.items()}
    np.testing.assert_array_equal(attend(module, params, noisy, masks)[0], logits)


def test_an_example_without_any_modality_stays_finite():
    module, params, tokens = attention()
    masks = {m: jnp.zeros((B, LENGTHS[m]), jnp.bool_) for m in tokens}

    def loss(params):
        logits, out = attend(module, params, tokens, masks)
        return jnp.sum(logits) + sum(jnp.sum(x) for x in out["attention_share"].values())

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    assert bool(jnp.isfinite(value))
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))


def test_dropout_follows_the_example_through_any_layout():
    module, params, tokens = attention(dropout=0.5)
    options = {"train": True, "rngs": {"dropout": jax.random.key(4)}}
    whole, out = attend(module, params, tokens, **options)
    quiet, quiet_out = attend(module, params, tokens)
    assert not np.allclose(whole, quiet)
    close(out["attention"], quiet_out["attention"], 0)  # weights are those before dropout
    order = jnp.array([2, 0])
    part = {m: x[order] for m, x in tokens.items()}
    again, _ = attend(module, params, part, example_index=INDEX[order], **options)
    close(again, whole[order], 1e-5)


def test_without_dropout_no_rng_is_needed_to_train():
    module, params, tokens = attention(dropout=0.0)
    a, _ = attend(module, params, tokens, train=True)
    b, _ = attend(module, params, tokens)
    np.testing.assert_array_equal(a, b)
