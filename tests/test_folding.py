"""Folding a rotation into the query projection leaves every output as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rollingq_jax as rq

D, H, K = 12, 3, 4


def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    kernel, bias = jax.random.normal(keys[0], (D, H, K)), jax.random.normal(keys[1], (H, K))
    rotation = rq.rotation_between(
        jax.random.normal(keys[2], (H, K)), jax.random.normal(keys[3], (H, K))
    )
    params = {
        "fusion": {"query": {"kernel": kernel, "bias": bias}, "cls": jnp.ones(D)},
        "other": jnp.ones(2),
    }
    return params, rotation


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_folded_projection_gives_the_rotated_query(flat, with_bias):
    params, rotation = setting()
    projection = dict(params["fusion"]["query"])
    token = jax.random.normal(jax.random.key(7), (5, D))
    query = jnp.einsum("bd,dhk->bhk", token, projection["kernel"])
    query = query + projection["bias"][None] if with_bias else query
    if flat:
        projection = {
            "kernel": projection["kernel"].reshape(D, H * K),
            "bias": projection["bias"].reshape(-1),
        }
    if not with_bias:
        del projection["bias"]
    folded = rq.fold_rotation({"a": {"q": projection}}, rotation, ("a", "q"))["a"]["q"]
    got = token @ folded["kernel"].reshape(D, H * K)
    got = got + folded["bias"].reshape(1, -1) if with_bias else got
    np.testing.assert_allclose(got.reshape(5, H, K), rq.rotate(rotation, query), atol=1e-5)
    assert set(folded) == set(projection) and folded["kernel"].shape == projection["kernel"].shape


def test_inputs_are_left_alone_and_other_leaves_shared():
    params, rotation = setting()
    before = np.asarray(params["fusion"]["query"]["kernel"])
    folded = rq.fold_rotation(params, rotation)
    np.testing.assert_array_equal(params["fusion"]["query"]["kernel"], before)
    assert folded["other"] is params["other"] and folded["fusion"]["cls"] is params["fusion"]["cls"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("fusion", "key"), "the parameters have no 'key'"),
        (("fusion",), "no projection with a kernel"),
        (("other",), "no projection with a kernel"),
    ],
)
def test_wrong_paths(path, says):
    params, rotation = setting()
    with pytest.raises(rq.UserError, match=says):
        rq.fold_rotation(params, rotation, path)


def test_fused_projection_is_refused():
    _, rotation = setting()
    fused = {"qkv": {"kernel": jnp.ones([D, 3 * H * K]), "bias": jnp.ones([3 * H * K])}}
    with pytest.raises(rq.UserError, match="cannot take the rotation"):
        rq.fold_rotation(fused, rotation, ("qkv",))
    with pytest.raises(rq.UserError, match="allowed: \\[H, d_h, d_h\\]"):
        rq.fold_rotation(setting()[0], rotation[0])


@pytest.mark.parametrize("fusion", ["attention", "mbt"])
@pytest.mark.parametrize("heads", [1, 4])
def test_the_whole_model_answers_alike_without_a_rotation(heads, fusion):
    config = {"num_classes": 5, "dim": 16, "depth": 1, "fusion": fusion, "mbt_layers": 1}
    config |= {"fusion_heads": heads, "fusion_token_scale": 1.0}
    config["encoders"] = {"audio": {"kind": "sequence"}, "visual": {"kind": "vector"}}
    model = rq.build_model(config)
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "audio": jax.random.normal(keys[0], (3, 6, 4)),
        "visual": jax.random.normal(keys[1], (3, 7)),
        "visual_mask": jnp.array([True, False, True]),
    }
    params = jax.jit(model.init)(keys[2], batch)["params"]
    pair = jax.random.normal(keys[3], (2, heads, 16 // heads))
    rotation = rq.rotation_between(pair[0], pair[1])

    @jax.jit
    def run(params, rotation):
        return model.apply({"params": params}, batch, rotation, return_attention=True)

    turned, plain = run(params, rotation), run(params, None)
    folded = run(rq.fold_rotation(params, rotation), None)
    assert jax.tree.structure(folded) == jax.tree.structure(turned)
    for ours, theirs in zip(jax.tree.leaves(folded), jax.tree.leaves(turned), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(plain[0] - turned[0])).max() > 1e-3  # the rotation matters here
