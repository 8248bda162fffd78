"""Fused class-token attention against the textbook form, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rollingq_jax as rq

B, L, D = 4, 19, 16
FORMS = (rq.class_token_attention, rq.reference_attention)


def inputs(num_heads, head_dim, per_example, seed=0):
    keys = jax.random.split(jax.random.key(seed), 6)
    query = (B, num_heads, head_dim) if per_example else (num_heads, head_dim)
    shapes = [
        (B, L, D),
        query,
        (D, num_heads, head_dim),
        (D, num_heads, head_dim),
        (num_heads, head_dim),
        (num_heads, head_dim),
    ]
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


def real(kind):
    if kind == "none":
        return None
    lengths = jnp.array([L, 3, 1, 11])
    return jnp.arange(L)[None] < lengths[:, None]


@pytest.mark.parametrize("mask", ["none", "padded"])
@pytest.mark.parametrize("dropout_rate", [0.0, 0.3])
@pytest.mark.parametrize(("num_heads", "head_dim"), [(1, 16), (8, 2), (8, 4)])
@pytest.mark.parametrize("per_example", [True, False])
def test_equals_the_reference(num_heads, head_dim, mask, dropout_rate, per_example):
    arguments = inputs(num_heads, head_dim, per_example)
    options = {"mask": real(mask), "dropout_rate": dropout_rate, "rng": jax.random.key(5)}

    def scalar(attention):
        def of(*arguments):
            output, weights = attention(*arguments, **options)
            cosine = jnp.cos(jnp.arange(output.size, dtype=jnp.float32)).reshape(output.shape)
            return jnp.sum(output * cosine) + jnp.sum(weights**2)

        return of

    got = rq.class_token_attention(*arguments, **options)
    want = rq.reference_attention(*arguments, **options)
    for a, b in zip(got, want, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-5 * max(1, np.abs(b).max())
    gradients = [
        jax.grad(scalar(f), argnums=range(6))(*arguments)
        for f in (rq.class_token_attention, rq.reference_attention)
    ]
    for a, b in zip(*gradients, strict=True):
        assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-4 * max(1, np.abs(b).max())
    assert np.abs(gradients[0][4]).max() == 0  # b_key cancels in the softmax


def test_equals_the_class_row_of_full_attention_in_numpy():
    tokens, query, w_key, w_value, b_key, b_value = (
        np.asarray(x, np.float64) for x in inputs(2, 8, per_example=False)
    )
    keys = np.einsum("bld,dhk->bhlk", tokens, w_key) + b_key[None, :, None]
    values = np.einsum("bld,dhk->bhlk", tokens, w_value) + b_value[None, :, None]
    scores = np.einsum("hk,bhlk->bhl", query, keys) / np.sqrt(8)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    got = rq.class_token_attention(*inputs(2, 8, per_example=False))
    np.testing.assert_allclose(got[1], weights, atol=1e-6)
    np.testing.assert_allclose(got[0], np.einsum("bhl,bhlk->bhk", weights, values), atol=1e-5)


def test_masked_tokens_change_nothing_and_a_row_without_tokens_is_zero():
    arguments = inputs(2, 8, per_example=True)
    mask = real("padded").at[2].set(False)
    output, weights = rq.class_token_attention(*arguments, mask=mask)
    spoiled = arguments.copy()
    spoiled[0] = jnp.where(mask[..., None], arguments[0], 1e4)
    again, _ = rq.class_token_attention(*spoiled, mask=mask)
    np.testing.assert_allclose(again, output, atol=1e-5)
    assert not np.asarray(weights[2]).any() and not np.asarray(output[2]).any()
    np.testing.assert_allclose(weights.sum(-1)[jnp.array([0, 1, 3])], 1.0, rtol=1e-6)
    gradient = jax.grad(lambda t: rq.class_token_attention(t, *arguments[1:], mask=mask)[0].sum())(
        arguments[0]
    )
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~np.asarray(mask)].any()


def test_dropout_keeps_the_mean_and_counts_the_value_bias():
    arguments = inputs(1, 16, per_example=False)
    keys = jax.random.split(jax.random.key(0), 3000)
    dropped = jax.vmap(
        lambda rng: rq.class_token_attention(*arguments, dropout_rate=0.5, rng=rng)[0]
    )(keys)
    want, _ = rq.class_token_attention(*arguments)
    error = np.abs(np.asarray(dropped).mean(0) - np.asarray(want))
    assert (error < 5 * np.asarray(dropped).std(0) / np.sqrt(3000) + 1e-6).all()


def test_keys_per_example_make_dropout_independent_of_the_batch():
    arguments = inputs(2, 8, per_example=True)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(1), jnp.arange(B))
    whole, _ = rq.class_token_attention(*arguments, dropout_rate=0.4, rng=keys)
    tokens, query, *rest = arguments
    part, _ = rq.class_token_attention(tokens[2:], query[2:], *rest, dropout_rate=0.4, rng=keys[2:])
    np.testing.assert_allclose(part, whole[2:], atol=1e-6)


def test_bfloat16_tokens_give_float32_results():
    arguments = inputs(2, 8, per_example=False)
    want = rq.class_token_attention(*arguments)
    got = rq.class_token_attention(arguments[0].astype(jnp.bfloat16), *arguments[1:])
    for a, b in zip(got, want, strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, atol=0.15)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("narrow", ["tokens", "the rest", "all"])
def test_bfloat16_arguments_give_float32_of_their_values(function, narrow):
    half = [x.astype(jnp.bfloat16) for x in inputs(2, 8, per_example=False)]
    wide = [x.astype(jnp.float32) for x in half]
    given = {"tokens": half[:1] + wide[1:], "the rest": wide[:1] + half[1:], "all": half}[narrow]
    exact = function is rq.reference_attention or narrow == "the rest"
    for got, want in zip(function(*given), rq.reference_attention(*wide), strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, atol=1e-5 if exact else 0.15)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("dtype", [jnp.int32, jnp.bool_])
def test_tokens_that_are_no_floats_count_as_their_values(function, dtype):
    tokens, *rest = inputs(2, 8, per_example=False)
    tokens = (3 * tokens).astype(dtype)
    want = function(tokens.astype(jnp.float32), *rest)
    for a, b in zip(function(tokens, *rest), want, strict=True):
        np.testing.assert_array_equal(a, b)


def test_float64_is_kept_and_both_forms_agree_in_it(float64):
    arguments = [np.asarray(x, np.float64) for x in inputs(2, 8, per_example=True)]
    mask = np.asarray(real("padded"))
    with float64:
        arguments = [jnp.asarray(x) for x in arguments]
        for options in ({}, {"mask": mask, "dropout_rate": 0.3, "rng": jax.random.key(2)}):
            got, want = (f(*arguments, **options) for f in FORMS)
            for a, b in zip(got, want, strict=True):
                assert a.dtype == b.dtype == jnp.float64
                assert np.abs(np.asarray(a) - np.asarray(b)).max() < 1e-12
        tokens, _, w_key, _, b_key, _ = arguments
        keys = np.einsum("bld,dhk->blhk", tokens, w_key) + np.asarray(b_key)[None, None]
        got = rq.mean_key(tokens, w_key.astype(jnp.float32), b_key)
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(rq.mean_key(tokens, w_key, b_key), keys.mean(1), atol=1e-12)


@pytest.mark.parametrize("function", FORMS)
@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_the_dropout_rate_may_be_traced(function, rate):
    arguments = inputs(2, 8, per_example=False)
    rng = jax.random.key(4)
    got = jax.jit(function)(*arguments, real("padded"), rate, rng)
    want = function(*arguments, real("padded"), rate, rng)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("function", FORMS)
def test_a_masked_token_may_hold_anything(function, value):
    arguments = inputs(2, 8, per_example=True)
    mask = real("padded").at[2].set(False)
    spoiled = [jnp.where(mask[..., None], arguments[0], value), *arguments[1:]]

    def scalar(*arguments):
        output, weights = function(*arguments, mask=mask)
        return jnp.sum(output**2) + jnp.sum(weights**2), (output, weights)

    differentiate = jax.grad(scalar, argnums=range(6), has_aux=True)
    got, want = differentiate(*spoiled), differentiate(*arguments)
    assert jax.tree.all(jax.tree.map(lambda a: bool(np.isfinite(a).all()), got))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_masked_token_may_hold_anything_in_the_mean_key(value):
    tokens, _, w_key, _, b_key, _ = inputs(2, 8, per_example=True)
    mask = real("padded").at[2].set(False)

    def scalar(*arguments):
        keys = rq.mean_key(*arguments, mask)
        return jnp.sum(keys**2), keys

    differentiate = jax.grad(scalar, argnums=range(3), has_aux=True)
    got = differentiate(jnp.where(mask[..., None], tokens, value), w_key, b_key)
    want = differentiate(tokens, w_key, b_key)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("mask", [None, jnp.ones((B, 0), bool)])
def test_no_tokens_at_all(mask):
    tokens, *rest = inputs(2, 8, per_example=False)
    for function in FORMS:
        output, weights = function(tokens[:, :0], *rest, mask)
        np.testing.assert_array_equal(output, np.zeros((B, 2, 8)))
        assert weights.shape == (B, 2, 0)
    got = rq.mean_key(tokens[:, :0], rest[1], rest[3], mask)
    np.testing.assert_array_equal(got, np.broadcast_to(rest[3], (B, 2, 8)))


def test_mean_key_is_the_mean_of_the_keys():
    tokens, _, w_key, _, b_key, _ = inputs(2, 8, per_example=True)
    mask = real("padded")
    keys = np.einsum("bld,dhk->blhk", tokens, w_key) + np.asarray(b_key)[None, None]
    np.testing.assert_allclose(rq.mean_key(tokens, w_key, b_key), keys.mean(1), atol=1e-5)
    want = np.stack([k[m].mean(0) for k, m in zip(keys, np.asarray(mask), strict=True)])
    np.testing.assert_allclose(rq.mean_key(tokens, w_key, b_key, mask), want, atol=1e-5)


def test_shares_leave_the_class_token_out_and_sum_to_one():
    weights = jnp.array([[[0.5, 0.1, 0.1, 0.3]], [[1.0, 0.0, 0.0, 0.0]]])
    shares = rq.attention_share(weights, (2, 1))
    np.testing.assert_allclose(shares, [[[0.4, 0.6]], [[0.5, 0.5]]], rtol=1e-6)
    with pytest.raises(ValueError, match="make 2 tokens, or 3 with a class token; .* has, 4"):
        rq.attention_share(weights, (1, 1))


def test_bad_dropout_rate():
    with pytest.raises(ValueError, match="dropout_rate is 1.0; allowed: 0 <= rate < 1"):
        rq.class_token_attention(*inputs(1, 16, True), dropout_rate=1.0, rng=jax.random.key(0))


def test_shares_without_a_class_token_and_from_segment_ids_agree():
    rng = np.random.default_rng(0)
    weights = rng.random((2, 3, 7)).astype(np.float32)
    ids = np.array([0, 0, 1, 1, 1, 2, 2])
    want = np.stack([weights[..., ids == m].sum(-1) for m in range(3)], -1)
    want /= want.sum(-1, keepdims=True)
    np.testing.assert_allclose(rq.attention_share(weights, (2, 3, 2)), want, rtol=1e-6)
    order = rng.permutation(7)
    each = jnp.asarray(np.stack([ids[order]] * 2))
    for given in (each[0], each):
        got = rq.attention_share(weights[..., order], segment_ids=given, num_modalities=3)
        np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("class_token", [0, 1])
def test_uniform_attention_over_unlike_lengths_is_one_per_token(class_token):
    lengths = (64, 72, 6)
    length = class_token + sum(lengths)
    weights = jnp.full((2, 2, length), 1 / length)
    share = rq.attention_share(weights, lengths, per_token=True)
    np.testing.assert_allclose(share, np.ones((2, 2, 3)), rtol=1e-5)
    plain = rq.attention_share(weights, lengths)
    np.testing.assert_allclose(plain[0, 0], rq.uniform_share(lengths), rtol=1e-5)
    real = np.arange(length)[None] < np.array([[length], [class_token + 100]])
    masked = real[:, None] / real.sum(-1)[:, None, None] * np.ones((1, 2, 1))
    share = rq.attention_share(masked.astype(np.float32), lengths, mask=real, per_token=True)
    np.testing.assert_allclose(share[0], np.ones((2, 3)), rtol=1e-5)
    np.testing.assert_allclose(share[1], [[1, 1, 0]] * 2, rtol=1e-5)
    even = rq.uniform_share(lengths, mask=real)
    np.testing.assert_allclose(even[1], [0.64, 0.36, 0.0], rtol=1e-5)


@pytest.mark.parametrize("num_heads", [2, 6])
def test_segment_mean_keys_of_interleaved_padded_and_grouped_keys(num_heads):
    """Against a loop in NumPy; what is padding or of no modality holds NaN."""
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(3, 8, 2, 4)).astype(np.float32)
    ids = np.array([[-1, 0, 1, 0, 2, 2, 1, 0], [0, 0, 0, 1, 1, 1, 2, -1], [0, 0, 1, 1, 0, 0, 1, 7]])
    mask = np.arange(8)[None] < np.array([[8], [6], [7]])
    want, has = np.zeros((3, 3, num_heads, 4)), np.zeros((3, 3))
    for m in range(3):
        for b in range(3):
            chosen = keys[b, (ids[b] == m) & mask[b]]
            has[m, b] = len(chosen) > 0
            for h in range(num_heads if len(chosen) else 0):
                want[m, b, h] = chosen[:, h * 2 // num_heads].mean(0)
    keys[(ids < 0) | (ids > 2) | ~mask] = np.nan
    got, weight = jax.jit(rq.segment_mean_keys, static_argnames=("num_modalities", "num_heads"))(
        keys, segment_ids=ids, num_modalities=3, mask=mask, num_heads=num_heads
    )
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_array_equal(weight, has)
    assert has.sum() == 7  # the second lacks its third modality, and so does the last sample


def test_segment_mean_keys_are_those_of_the_projected_tokens():
    tokens, _, w_key, _, b_key, _ = inputs(2, 8, per_example=True)
    keys = jnp.einsum("bld,dhk->blhk", tokens, w_key) + b_key[None, None]
    got, weight = rq.segment_mean_keys(keys, (10, L - 11))  # behind a class token
    parts = (tokens[:, 1:11], tokens[:, 11:])
    want = np.stack([rq.mean_key(part, w_key, b_key) for part in parts])
    np.testing.assert_allclose(got, want, atol=1e-5)
    assert np.all(weight == 1)
