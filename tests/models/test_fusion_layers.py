"""Several fusion layers against the textbook in NumPy, and what a layer's rotation reaches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

import rollingq_jax as rq
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import AttentionFusion
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
LENGTHS = {"audio": 5, "visual": 4}
INDEX = jnp.arange(B, dtype=jnp.int32)
MASKS = {  # the second example has no audio, the third no visual modality
    "audio": jnp.array([[1, 1, 1, 0, 0], [0] * 5, [1] * 5], jnp.bool_),
    "visual": jnp.array([[1] * 4, [1, 1, 0, 0], [0] * 4], jnp.bool_),
}
NO_MASKS = dict.fromkeys(LENGTHS)


def made(num_layers, num_heads=2, **fields):
    fields = {"dropout": 0.2, "block": FrozenDict(mlp_ratio=2.0)} | fields
    module = AttentionFusion(CLASSES, DIM, num_heads, num_layers=num_layers, **fields)
    rng = np.random.default_rng(0)
    tokens = {m: jnp.asarray(rng.normal(size=(B, n, DIM)), jnp.float32) for m, n in LENGTHS.items()}
    return module, filled(module, tokens, NO_MASKS, example_index=INDEX), tokens


def attend(module, params, tokens, masks=None, rotation=None, **fields):
    fields = {"return_attention": True, "example_index": INDEX} | fields
    return run(module, params, tokens, masks or NO_MASKS, rotation, **fields)


def rotations(count, seed=0):
    """`[count, d_h, d_h]` with heads 2."""
    keys = jax.random.split(jax.random.key(seed), 2)
    return rq.rotation_between(*(jax.random.normal(k, (count, DIM // 2)) for k in keys))


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


def textbook(params, tokens, masks, rotation, num_layers, num_heads):
    """Every layer of one sample after the other, with all queries, keys, values and L x L."""
    width, seen, logits = DIM // num_heads, [], []
    as64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    params, rotation = as64(params), as64(rotation).reshape(num_layers, num_heads, width, width)
    for b in range(B):
        x = np.concatenate([params["cls"][None]] + [np.asarray(t[b]) for t in tokens.values()])
        parts = (np.ones(n, bool) if masks[m] is None else masks[m][b] for m, n in LENGTHS.items())
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


@pytest.mark.parametrize("masks", [NO_MASKS, MASKS], ids=["all real", "masked"])
@pytest.mark.parametrize(("num_layers", "num_heads"), [(2, 1), (2, 2), (3, 2)])
def test_layers_are_the_textbooks(num_layers, num_heads, masks):
    module, params, tokens = made(num_layers, num_heads)
    keys = jax.random.split(jax.random.key(1), 2)
    shape = (num_layers * num_heads, DIM // num_heads)
    rotation = rq.rotation_between(*(jax.random.normal(k, shape) for k in keys))
    want, seen = textbook(params, tokens, masks, rotation, num_layers, num_heads)
    logits, out = attend(module, params, tokens, masks, rotation)
    close(logits, want, 2e-4)
    assert out["query"].shape == (B, num_layers * num_heads, DIM // num_heads)
    for b, (heads, real) in enumerate(seen):
        close(out["query"][b], [query for _, query, _, _ in heads], 2e-4)
        close(out["attention"][b], [weights for *_, weights in heads[-num_heads:]], 2e-4)
        start = 1
        for m, length in LENGTHS.items():
            where = np.arange(start, start + length)[real[start : start + length]]
            start += length
            shares = [w[where].sum() / w[1:].sum() for *_, w in heads]
            close(out["attention_share"][m][b], shares, 2e-4)
            if len(where):
                means = [keys[where].mean(0) for _, _, keys, _ in heads]
                close(out["mean_keys"][m][b], means, 2e-4)


def test_one_layer_has_the_parameters_it_always_had():
    params = made(1)[1]
    assert set(params) == {"cls", "query", "key", "value", "out", "head"}
    assert set(made(3)[1]) == set(params) | {"layer_0", "layer_1"}


def test_a_rotation_turns_the_class_tokens_query_alone():
    """Tokens first hear of a turned query two layers on, through the class token's output."""
    module, params, tokens = made(3)
    _, plain = attend(module, params, tokens)
    layers = [slice(0, 2), slice(2, 4), slice(4, 6)]
    for turned in range(3):
        rotation = only(turned, 3)
        _, out = attend(module, params, tokens, None, rotation)
        for layer, heads in enumerate(layers):
            if layer < turned:
                np.testing.assert_array_equal(out["query"][:, heads], plain["query"][:, heads])
            if layer == turned:
                want = rq.rotate(rotation[heads], plain["query"][:, heads])
                close(out["query"][:, heads], want, 1e-5)
            for m in LENGTHS:
                before, after = (o["mean_keys"][m][:, heads] for o in (plain, out))
                assert np.allclose(before, after, atol=1e-5) == (layer <= turned + 1)
                before, after = (o["attention_share"][m][:, heads] for o in (plain, out))
                assert np.allclose(before, after, atol=1e-5) == (layer < turned)


def test_padding_means_nothing_in_any_layer():
    module, params, tokens = made(3)
    noisy = {m: jnp.where(MASKS[m][..., None], x, 9.0) for m, x in tokens.items()}
    logits, out = attend(module, params, tokens, MASKS)
    again, out_again = attend(module, params, noisy, MASKS)
    close(again, logits, 1e-5)
    for m in LENGTHS:
        close(out_again["mean_keys"][m], out["mean_keys"][m], 1e-5)
        close(out_again["attention_share"][m], out["attention_share"][m], 1e-5)


@pytest.mark.parametrize("masks", [MASKS, {m: jnp.zeros_like(x) for m, x in MASKS.items()}])
def test_gradients_are_finite_and_reach_every_parameter(masks):
    module, params, tokens = made(3)

    def loss(params):
        logits, out = attend(module, params, tokens, masks, rotations(6))
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
        module, params, tokens = made(2, remat=remat)
        loss = functools.partial(
            lambda module, tokens, p: jnp.sum(attend(module, p, tokens, MASKS)[0] ** 2),
            module,
            tokens,
        )
        grads.append(jax.grad(loss)(params))
    jax.tree.map(close, *grads)


def test_dropout_follows_the_example_through_any_layout():
    module, params, tokens = made(3, dropout=0.3, block=FrozenDict(mlp_ratio=2.0, dropout=0.5))
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
    rotation = rotations(6)
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
        rq.fold_rotation(params, rotations(4))
    alone = only(1, 2)  # the last layer's rotation by itself does fold
    folded = rq.fold_rotation(params, alone[2:])
    close(
        model.apply({"params": folded}, batch())[0],
        model.apply({"params": params}, batch(), alone)[0],
    )


@pytest.mark.parametrize("num_layers", [1, 2])
def test_a_scale_of_zero_weighs_every_token_alike(num_layers):
    """And the query that is scored is as without it; masked tokens still count nothing."""
    module, params, tokens = made(num_layers)
    _, plain = attend(module, params, tokens, MASKS)
    logits, out = attend(module.clone(logit_scale=0.0), params, tokens, MASKS)
    real = np.concatenate([np.ones((B, 1), bool), *(np.asarray(MASKS[m]) for m in LENGTHS)], axis=1)
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
    module, params, tokens = made(1)
    _, out = attend(module.clone(logit_scale=2.0), params, tokens)
    query = params["query"]
    doubled = params | {"query": jax.tree.map(lambda x: 2 * x, query)}
    _, expected = attend(module, doubled, tokens)
    np.testing.assert_allclose(out["attention"], expected["attention"], atol=1e-6)
    np.testing.assert_allclose(2 * out["query"], expected["query"], atol=1e-6)
