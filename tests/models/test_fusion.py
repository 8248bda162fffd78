"""Each fusion against its equation in NumPy, and what an absent modality or a rotation does.

Attention in one layer and in several, against the textbook with every query, key and value.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from scipy.special import expit

import rollingq_jax as rq
from rollingq_jax.errors import ConfigError
from rollingq_jax.export import folded
from rollingq_jax.models import (
    AttentionFusion,
    ConcatFusion,
    FilmFusion,
    GatedFusion,
    SumFusion,
)
from rollingq_jax.models.cross_fusion import CROSS_FUSIONS
from rollingq_jax.train.loop import LoadedRun
from tests.models import numpy_reference as reference
from tests.models.model_cases import (
    BATCH,
    CLASSES,
    DIM,
    batch,
    close,
    config,
    filled,
    made_model,
    run,
)

B = 3
LENGTHS = {"audio": 5, "text": 3, "visual": 4}
TWO, THREE = ("audio", "visual"), ("audio", "text", "visual")
INDEX = jnp.arange(B, dtype=jnp.int32)
MASKS = {  # the second example has no audio, the third no visual modality
    "audio": jnp.array([[1, 1, 1, 0, 0], [0] * 5, [1] * 5], jnp.bool_),
    "visual": jnp.array([[1] * 4, [1, 1, 0, 0], [0] * 4], jnp.bool_),
}


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
    return reference.linear(p["head"], np.concatenate(xs, axis=1))


def added(p, *xs):
    names = sorted(p)  # head_<m>, alphabetical as the modalities are
    return sum(reference.linear(p[name], x) for name, x in zip(names, xs, strict=True))


def film(p, x, y):
    scale, shift = np.split(reference.linear(p["film"], x), 2, axis=1)
    return reference.linear(p["head"], scale * y + shift)


def gated(p, x, y):
    u, w = (reference.linear(p[f"in_{m}"], v) for m, v in zip(TWO, (x, y), strict=True))
    return reference.linear(p["head"], expit(u) * w)


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
def attention(modalities=TWO, num_heads=1, **fields):
    fields = {"block": FrozenDict(mlp_ratio=2.0)} | fields
    module = AttentionFusion(CLASSES, DIM, num_heads, **fields)
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


def rotations(count, num_heads=None, seed=0):
    """`[count, d_h, d_h]`, by default of one layer, in which `count` is the number of heads."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = (count, DIM // (num_heads or count))
    return rq.rotation_between(*(jax.random.normal(k, shape) for k in keys))


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
    logits, weights, means, shares = reference.fusion_attention(params, tokens, query, num_heads)
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


def test_uniform_share_is_each_modalitys_part_of_the_real_tokens():
    """That of attention whose logits are all 0, padded tokens left out."""
    for pooling in ("tokens", "class_tokens"):
        module, params, tokens = attention(TWO, 2, logit_scale=0.0, pooling=pooling)
        for masks in (MASKS, dict.fromkeys(TWO)):
            _, out = attend(module, params, tokens, masks)
            for m in TWO:
                close(out["uniform_share"][m], out["attention_share"][m][:, 0], 1e-6)


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


def only(layer, num_layers, num_heads=2):
    """A rotation in one layer, the identity in the others."""
    identity = np.eye(DIM // num_heads, dtype=np.float32)
    turned = np.repeat(identity[None], num_layers * num_heads, axis=0)
    heads = slice(layer * num_heads, (layer + 1) * num_heads)
    turned[heads] = rotations(num_heads)
    return jnp.asarray(turned)


def class_heads(x, real, kernels, biases, rotation):
    """One layer, a head at a time: all outputs, the class query, all keys, the class weights."""
    for h, turn in enumerate(rotation):
        q, k, v = (x @ w[:, h] + b[h] for w, b in zip(kernels, biases, strict=True))
        q[0] = turn @ q[0]
        scores = np.where(real, q @ k.T / np.sqrt(k.shape[-1]), -np.inf)
        weights = np.stack([reference.softmax(row) for row in scores])
        yield weights @ v, q[0], k, weights[0]


def lengths_of(tokens):
    return {m: x.shape[1] for m, x in tokens.items()}


def textbook(params, tokens, masks, rotation, num_layers, num_heads):
    """Every layer of one sample after the other, with all queries, keys, values and L x L."""
    width, seen, logits = DIM // num_heads, [], []
    as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    params, rotation = as64(params), as64(rotation).reshape(num_layers, num_heads, width, width)
    for b in range(B):
        x = np.concatenate([params["cls"][None]] + [np.asarray(t[b]) for t in tokens.values()])
        parts = (
            np.ones(n, bool) if masks is None else masks[m][b]
            for m, n in lengths_of(tokens).items()
        )
        real = np.concatenate([[True], *parts])
        heads = []
        for layer in range(num_layers - 1):
            p = params[f"layer_{layer}"]
            qkv = p["attention"]["qkv"]
            kernels = qkv["kernel"].reshape(DIM, 3, num_heads, width).swapaxes(0, 1)
            biases = qkv["bias"].reshape(3, num_heads, width)
            h = reference.layer_norm(p["norm1"], x)
            found = list(class_heads(h, real, kernels, biases, rotation[layer]))
            heads += found
            joined = np.concatenate([out for out, *_ in found], axis=1)
            x = x + reference.linear(p["attention"]["out"], joined)
            h = reference.layer_norm(p["norm2"], x)
            x = x + reference.linear(
                p["mlp"]["fc2"], reference.gelu(reference.linear(p["mlp"]["fc1"], h))
            )
        names = ("query", "key", "value")
        kernels = [params[n]["kernel"].reshape(DIM, num_heads, width) for n in names]
        biases = [params[n]["bias"].reshape(num_heads, width) for n in names]
        found = list(class_heads(x, real, kernels, biases, rotation[-1]))
        heads += found
        joined = np.concatenate([out[0] for out, *_ in found])
        logits.append(reference.linear(params["head"], reference.linear(params["out"], joined)))
        seen.append((heads, real))
    return np.array(logits), seen


@pytest.mark.parametrize("masks", [None, MASKS], ids=["all real", "masked"])
@pytest.mark.parametrize(("num_layers", "num_heads"), [(2, 1), (2, 2), (3, 2)])
def test_layers_are_the_textbooks(num_layers, num_heads, masks):
    module, params, tokens = attention(TWO, num_heads, num_layers=num_layers)
    keys = jax.random.split(jax.random.key(1), 2)
    shape = (num_layers * num_heads, DIM // num_heads)
    rotation = rq.rotation_between(*(jax.random.normal(k, shape) for k in keys))
    want, seen = textbook(params, tokens, masks, rotation, num_layers, num_heads)
    logits, out = attend(module, params, tokens, masks, rotation=rotation)
    close(logits, want, 2e-4)
    assert out["query"].shape == (B, num_layers * num_heads, DIM // num_heads)
    for b, (heads, real) in enumerate(seen):
        close(out["query"][b], [query for _, query, _, _ in heads], 2e-4)
        close(out["attention"][b], [weights for *_, weights in heads[-num_heads:]], 2e-4)
        start = 1
        for m, length in lengths_of(tokens).items():
            where = np.arange(start, start + length)[real[start : start + length]]
            start += length
            shares = [w[where].sum() / w[1:].sum() for *_, w in heads]
            close(out["attention_share"][m][b], shares, 2e-4)
            if len(where):
                means = [keys[where].mean(0) for _, _, keys, _ in heads]
                close(out["mean_keys"][m][b], means, 2e-4)


def test_one_layer_has_the_parameters_it_always_had():
    params = attention(TWO, 2)[1]
    assert set(params) == {"cls", "query", "key", "value", "out", "head"}
    assert set(attention(TWO, 2, num_layers=3)[1]) == set(params) | {"layer_0", "layer_1"}


def test_a_rotation_turns_the_class_tokens_query_alone():
    """Tokens first hear of a turned query two layers on, through the class token's output."""
    module, params, tokens = attention(TWO, 2, num_layers=3)
    _, plain = attend(module, params, tokens)
    layers = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for turned in range(3):
        rotation = only(turned, 3)
        _, out = attend(module, params, tokens, rotation=rotation)
        for layer, heads in enumerate(layers):
            if layer < turned:
                np.testing.assert_array_equal(out["query"][:, heads], plain["query"][:, heads])
            if layer == turned:
                want = rq.rotate(rotation[heads], plain["query"][:, heads])
                close(out["query"][:, heads], want, 1e-5)
            for m in TWO:
                before, after = (o["mean_keys"][m][:, heads] for o in (plain, out))
                assert np.allclose(before, after, atol=1e-5) == (layer <= turned + 1)
                before, after = (o["attention_share"][m][:, heads] for o in (plain, out))
                assert np.allclose(before, after, atol=1e-5) == (layer < turned)


def test_padding_means_nothing_in_any_layer():
    module, params, tokens = attention(TWO, 2, num_layers=3)
    noisy = {m: jnp.where(MASKS[m][..., None], x, 9.0) for m, x in tokens.items()}
    logits, out = attend(module, params, tokens, MASKS)
    again, out_again = attend(module, params, noisy, MASKS)
    close(again, logits, 1e-5)
    for m in TWO:
        close(out_again["mean_keys"][m], out["mean_keys"][m], 1e-5)
        close(out_again["attention_share"][m], out["attention_share"][m], 1e-5)


@pytest.mark.parametrize("masks", [MASKS, {m: jnp.zeros_like(x) for m, x in MASKS.items()}])
def test_gradients_are_finite_and_reach_every_parameter_of_all_layers(masks):
    module, params, tokens = attention(TWO, 2, num_layers=3)

    def loss(params):
        logits, out = attend(module, params, tokens, masks, rotation=rotations(6, 2))
        return jnp.sum(logits**2) + sum(jnp.sum(x) for x in out["attention_share"].values())

    grads = jax.tree_util.tree_leaves_with_path(jax.grad(loss)(params))
    for path, x in grads:
        name = jax.tree_util.keystr(path)
        assert bool(jnp.all(jnp.isfinite(x))), name
        if masks is MASKS and "'key']['bias'" not in name:
            assert bool(jnp.any(x != 0)), name


def test_recomputing_changes_no_gradient():
    grads = []
    for remat in (False, True):
        module, params, tokens = attention(TWO, 2, num_layers=2, remat=remat)
        loss = functools.partial(
            lambda module, tokens, p: jnp.sum(attend(module, p, tokens, MASKS)[0] ** 2),
            module,
            tokens,
        )
        grads.append(jax.grad(loss)(params))
    jax.tree.map(close, *grads)


def test_dropout_in_the_blocks_follows_the_example_too():
    block = FrozenDict(mlp_ratio=2.0, dropout=0.5)
    module, params, tokens = attention(TWO, 2, num_layers=3, dropout=0.3, block=block)
    options = {"train": True, "rngs": {"dropout": jax.random.key(4)}}
    whole, out = attend(module, params, tokens, **options)
    quiet, quiet_out = attend(module, params, tokens)
    assert not np.allclose(whole, quiet)
    assert not np.allclose(out["attention"], quiet_out["attention"])  # the blocks drop too
    order = jnp.array([2, 0])
    part = {m: x[order] for m, x in tokens.items()}
    again, _ = attend(module, params, part, example_index=INDEX[order], **options)
    close(again, whole[order], 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("fusion", ["attention", "mbt"])
def test_the_whole_model_has_a_query_for_every_layers_heads(fusion, dtype):
    fields = {"fusion_layers": 3, "fusion_heads": 2, "remat": True}
    model, params, inputs = made_model(fusion, dtype=dtype, **fields)
    rotation = rotations(6, 2)
    logits, out = run(model, params, inputs, rotation)
    assert logits.shape == (BATCH, CLASSES) and logits.dtype == jnp.float32
    assert out["query"].shape == (BATCH, 6, DIM // 2) and out["query"].dtype == jnp.float32
    assert {x.shape for x in out["attention_share"].values()} == {(BATCH, 6)}
    first = model.apply({"params": params}, rotation, method="class_query")
    close(out["query"][:, :2], np.repeat(first[None], BATCH, axis=0), 1e-5)
    assert np.ptp(np.asarray(out["query"][:, 2:]), axis=0).max() > 1e-3  # a sample's own
    if dtype == "bfloat16":
        exact = run(made_model(fusion, **fields)[0], params, inputs, rotation)[1]
        close(out["query"], exact["query"], 0.2)
        assert float(jnp.mean(jnp.abs(out["query"] - exact["query"]))) < 0.03


def test_where_several_layers_are_not_allowed():
    for fields, says in (
        ({"fusion": "concat"}, "model.fusion_layers is 2; allowed for fusion 'concat': 1, since"),
        ({"fusion": "mbt", "mbt_head": "sum"}, "for fusion 'mbt' with mbt_head 'sum': 1"),
        ({"fusion": "unimodal", "modality": "audio"}, "for fusion 'unimodal': 1"),
        ({"fusion": "jmt"}, "for fusion 'jmt': 1"),
    ):
        with pytest.raises(ConfigError, match=says):
            rq.build_model(config(**fields, fusion_layers=2))


def test_a_rotation_for_one_layer_of_two_is_named():
    model, params, _ = made_model(fusion_layers=2, fusion_heads=2)
    with pytest.raises(ConfigError, match=r"\(2, 8, 8\); allowed: \(4, 8, 8\), one matrix a head"):
        model.apply({"params": params}, batch(), rotations(2))


def test_folding_is_refused_and_says_why():
    model, params, _ = made_model(fusion_layers=2, fusion_heads=2)
    with pytest.raises(rq.UserError, match="for 4 heads, and the kernel at 'query' makes 2"):
        rq.fold_rotation(params, rotations(4, 2))
    alone = only(1, 2)  # the last layer's rotation by itself does fold
    folded = rq.fold_rotation(params, alone[2:])
    close(
        model.apply({"params": folded}, batch())[0],
        model.apply({"params": params}, batch(), alone)[0],
    )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_scale_of_zero_weighs_every_token_alike(num_layers):
    """And the query that is scored is as without it; masked tokens still count nothing."""
    module, params, tokens = attention(TWO, 2, num_layers=num_layers)
    _, plain = attend(module, params, tokens, MASKS)
    logits, out = attend(module.clone(logit_scale=0.0), params, tokens, MASKS)
    real = np.concatenate([np.ones((B, 1), bool), *(np.asarray(MASKS[m]) for m in TWO)], axis=1)
    even = np.repeat((real / real.sum(1, keepdims=True))[:, None], 2, axis=1)
    np.testing.assert_allclose(out["attention"], even, atol=1e-6)
    np.testing.assert_array_equal(out["query"][:, :2], plain["query"][:, :2])
    assert np.isfinite(logits).all()
    if num_layers == 1:  # then the output is the mean of the values
        params = jax.tree.map(np.asarray, params)
        x = np.concatenate([np.tile(params["cls"], (B, 1, 1)), *tokens.values()], axis=1)
        mean = (np.where(real[..., None], x, 0)).sum(1) / real.sum(1, keepdims=True)
        value, final = params["value"], params["out"]
        pooled = np.einsum("bd,dhk->bhk", mean, value["kernel"]) + value["bias"]
        hidden = pooled.reshape(B, DIM) @ final["kernel"] + final["bias"]
        expected = hidden @ params["head"]["kernel"] + params["head"]["bias"]
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_a_scale_is_one_of_the_logits():
    """Twice the scale is twice the class token and the bias that make the query."""
    module, params, tokens = attention(TWO, 2)
    _, out = attend(module.clone(logit_scale=2.0), params, tokens)
    query = params["query"]
    doubled = params | {"query": jax.tree.map(lambda x: 2 * x, query)}
    _, expected = attend(module, doubled, tokens)
    np.testing.assert_allclose(out["attention"], expected["attention"], atol=1e-6)
    np.testing.assert_allclose(2 * out["query"], expected["query"], atol=1e-6)


OPTIONS = {"pooling": "class_tokens", "residual": True, "norm": True}


@pytest.mark.parametrize("fields", [*({k: v} for k, v in OPTIONS.items()), OPTIONS])
def test_what_stands_beside_the_papers_layer_is_its_equation(fields):
    """z = LayerNorm(A W_o + b_o + mean x_m) W + b, A over all tokens or over the x_m."""
    module, params, tokens = attention(THREE, 2, **fields)
    rotation = rotations(2)
    query = np.einsum("hij,hj->hi", np.asarray(rotation, np.float64), query_of(params))
    attended = {m: x[:, :1] if "pooling" in fields else x for m, x in tokens.items()}
    identity = {"kernel": np.eye(DIM), "bias": np.zeros(DIM)}
    y, weights, means, shares = reference.fusion_attention(
        params | {"head": identity}, attended, query, 2
    )
    if "residual" in fields:
        y = y + np.mean(class_tokens(tokens), axis=0)
    if "norm" in fields:
        y = reference.layer_norm(params["out_norm"], y)
    logits, out = attend(module, params, tokens, rotation=rotation)
    close(logits, reference.linear(params["head"], y), 1e-4)
    close(out["attention"], weights)
    close(out["query"], np.repeat(query[None], B, axis=0))
    for m in THREE:
        close(out["mean_keys"][m], means[m])
        close(out["attention_share"][m], shares[m])
    folded = rq.fold_rotation(params, rotation, ("query",))
    close(attend(module, folded, tokens)[0], logits, 1e-4)


@pytest.mark.parametrize("num_layers", [1, 2])
def test_an_absent_modality_adds_nothing_with_any_option(num_layers):
    module, params, tokens = attention(TWO, 2, num_layers=num_layers, **OPTIONS)
    logits, out = attend(module, params, tokens, MASKS)
    noisy = {m: jnp.where(MASKS[m][..., None], x, 9.0) for m, x in tokens.items()}
    close(attend(module, params, noisy, MASKS)[0], logits, 1e-5)
    share = out["attention_share"]["audio"]
    close(share[1:], [[0.0] * 2 * num_layers, [1.0] * 2 * num_layers], 1e-6)
    whole, _ = attend(module, params, tokens)
    assert np.allclose(logits[0], whole[0], atol=1e-5)  # padding is no class token
    assert not np.allclose(logits[1:], whole[1:], atol=1e-3)
    if num_layers == 1:  # the mean is over the modalities that are there
        alone = attention(("audio",), 2, **OPTIONS)[0]
        only_audio, _ = attend(alone, params, {"audio": tokens["audio"]})
        close(logits[2], only_audio[2], 1e-5)


def test_gradients_with_every_option_are_finite_and_reach_every_parameter():
    module, params, tokens = attention(TWO, 2, num_layers=2, **OPTIONS)
    nothing = {m: jnp.zeros_like(x) for m, x in MASKS.items()}

    def loss(params, masks):
        return jnp.sum(attend(module, params, tokens, masks, rotation=rotations(4, 2))[0] ** 2)

    gradient = jax.jit(jax.grad(loss))
    for masks in (MASKS, nothing):
        for path, x in jax.tree_util.tree_leaves_with_path(gradient(params, masks)):
            name = jax.tree_util.keystr(path)
            assert bool(jnp.all(jnp.isfinite(x))), name
            if masks is MASKS and "'key']['bias" not in name:
                assert bool(jnp.any(x != 0)), name


def test_without_options_the_parameters_are_the_papers():
    assert set(attention(TWO, 2)[1]) == {"cls", "query", "key", "value", "out", "head"}
    assert set(attention(TWO, 2, **OPTIONS)[1]) == {*attention(TWO, 2)[1], "out_norm"}


def test_the_whole_model_takes_the_options_in_bfloat16():
    fields = {f"fusion_{name}": value for name, value in OPTIONS.items()}
    model, params, inputs = made_model(dtype="bfloat16", **fields)
    logits, out = run(model, params, inputs)
    exact, _ = run(made_model(**fields)[0], params, inputs)
    assert logits.dtype == jnp.float32
    assert set(out["mean_keys"]) == {"audio", "visual"}
    close(logits, exact, 0.1)


def cross(fusion, modalities, heads=2, layers=1):
    """A fusion in which modalities attend to each other, its parameters and tokens."""
    layers = 1 if fusion == "jmt" else layers
    module = CROSS_FUSIONS[fusion](CLASSES, DIM, heads, dropout=0.3, num_layers=layers)
    tokens = made_tokens(modalities)
    params = filled(module, tokens, everything(tokens), example_index=INDEX)
    return module, params, tokens


@pytest.mark.parametrize("modalities", [TWO, pytest.param(THREE, marks=pytest.mark.slow)], ids=len)
@pytest.mark.parametrize("fusion", sorted(CROSS_FUSIONS))
def test_fusions_between_modalities_are_their_equations(fusion, modalities):
    module, params, tokens = cross(fusion, modalities, layers=2)
    count = len(modalities)
    attentions = {"mult": 2 * count * (count - 1), "mmml": 2 * count, "jmt": count + 1}[fusion]
    turns = rotations(2 * attentions, 2)
    logits, out = attend(module, params, tokens, rotation=turns)
    wide = {m: np.asarray(x, np.float64) for m, x in tokens.items()}
    turned = np.asarray(turns, np.float64).reshape(attentions, 2, DIM // 2, DIM // 2)
    close(logits, getattr(reference, fusion)(params, wide, turned, module.num_layers, 2), 1e-4)
    assert out["query"].shape == (B, 2 * attentions, DIM // 2)
    _, quiet = attend(module, params, tokens)
    first = slice(0, 2)  # an attention whose inputs no rotation reaches
    close(out["query"][:, first], rq.rotate(turns[None, first], quiet["query"][:, first]), 1e-5)
    close(out["mean_keys"]["audio"][:, first], quiet["mean_keys"]["audio"][:, first], 1e-5)
    for share in (out["attention_share"], out["uniform_share"]):
        close(sum(share.values()), jnp.ones_like(share["audio"]), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", sorted(CROSS_FUSIONS))
def test_fusions_between_modalities_read_real_tokens_only(fusion):
    module, params, tokens = cross(fusion, TWO)

    def loss(params, tokens):
        logits, out = attend(module, params, tokens, MASKS)
        return jnp.sum(logits**2) + sum(jnp.sum(x) for x in out["attention_share"].values()), out

    (value, out), grads = jax.value_and_grad(loss, has_aux=True)(params, tokens)
    noisy = {m: jnp.where(MASKS[m][..., None], x, 100 * x + 1) for m, x in tokens.items()}
    close(loss(params, noisy)[0], value, 1e-5)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(grads))
    share = {m: np.asarray(x).mean(1) for m, x in out["attention_share"].items()}
    np.testing.assert_array_equal(share["audio"] > 0, [True, False, True])
    np.testing.assert_array_equal(share["visual"] > 0, [True, True, False])
    quiet = np.zeros(out["attention"].shape[-1], bool)
    quiet[0] = True
    for m, place in (("audio", 1), ("visual", 1 + LENGTHS["audio"])):
        padded = ~np.asarray(MASKS[m][0])
        quiet[place : place + LENGTHS[m]] = padded
    np.testing.assert_array_equal(np.asarray(out["attention"][0]).sum(0) == 0, quiet)


@pytest.mark.slow
@pytest.mark.parametrize("fusion", sorted(CROSS_FUSIONS))
def test_dropout_between_modalities_follows_the_example(fusion):
    module, params, tokens = cross(fusion, TWO)
    options = {"train": True, "rngs": {"dropout": jax.random.key(4)}}
    whole, _ = attend(module, params, tokens, **options)
    assert not np.allclose(whole, attend(module, params, tokens)[0])
    order = jnp.array([2, 0])
    part = {m: x[order] for m, x in tokens.items()}
    again, _ = attend(module, params, part, example_index=INDEX[order], **options)
    close(again, whole[order], 1e-5)


@pytest.mark.slow
def test_the_rotation_of_jmt_folds_and_that_of_the_others_does_not():
    encoders = {m: {"kind": "vector"} for m in TWO}
    for fusion in sorted(CROSS_FUSIONS):
        fields = {"fusion": fusion, "fusion_heads": 2, "dim": DIM, "depth": 0, "num_classes": 3}
        model = rq.build_model(fields | {"encoders": encoders})
        inputs = {m: jnp.ones((B, 4)) * i for i, m in enumerate(TWO, 1)}
        params = filled(model, inputs)
        turns = rotations(model.spec.rolling_heads, 2)
        trained = LoadedRun(model, params, turns, None, None, 0)
        if fusion != "jmt":
            with pytest.raises(rq.UserError, match=f"model.fusion is {fusion!r}; allowed: attenti"):
                folded(trained)
            continue
        plain = model.apply({"params": folded(trained)}, inputs)[0]
        close(plain, model.apply({"params": params}, inputs, turns)[0], 1e-4)
        with pytest.raises(ConfigError, match="a class query or its rotation is asked for"):
            model.apply({"params": params}, method="class_query")
