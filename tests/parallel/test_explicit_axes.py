"""Models and core functions over a mesh whose axes are explicit, or automatic, as on one device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import rollingq_jax as rq
from rollingq_jax.models import resnet
from tests.models.model_cases import batch, config

pytestmark = pytest.mark.slow

KINDS = {"audio": "spectrogram", "text": "tokens", "visual": "image"}
SIZE = 8


def over(axis_type):
    """A mesh of all devices along "data", and the layout of a batch there."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(axis_type,))
    return mesh, NamedSharding(mesh, PartitionSpec("data"))


def assert_close(ours, theirs):
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=1e-5, rtol=1e-4),
        ours,
        theirs,
    )


@pytest.fixture(scope="module")
def inputs():
    """A batch in which some texts are padded and one is missing."""
    made = batch(KINDS, SIZE)
    made["text"] = made["text"].at[:3, 4:].set(0).at[5].set(0)
    return made


def check_model(model, inputs):
    """Values, statistics and gradients are those of one device; results keep the batch's layout."""
    variables = jax.jit(model.init)(jax.random.key(0), inputs)

    def loss(params, batch):
        logits, out = model.apply(
            variables | {"params": params}, batch, train=True, rngs={"dropout": jax.random.key(1)}
        )
        return jnp.mean(logits**2), (logits, out)

    step = jax.value_and_grad(loss, has_aux=True)
    expected = jax.jit(step)(variables["params"], inputs)
    mesh, rows = over(AxisType.Explicit)
    with jax.set_mesh(mesh):
        (value, (logits, out)), grads = jax.jit(step)(
            variables["params"], jax.device_put(inputs, rows)
        )
    assert_close(((value, (logits, out)), grads), expected)
    for leaf in jax.tree.leaves((logits, out)):
        assert leaf.sharding.spec[0] == "data"


def test_every_kind_of_encoder(inputs):
    check_model(rq.build_model(config(kinds=KINDS)), inputs)


def test_a_resnet(monkeypatch):
    monkeypatch.setattr(resnet, "WIDTHS", (4, 8))
    encoders = {"visual": {"kind": "resnet18"}, "text": {"kind": "tokens", "vocab_size": 11}}
    made = batch({"text": "tokens"}, SIZE) | {"visual_mask": jnp.arange(SIZE) != 3}
    made["visual"] = jax.random.normal(jax.random.key(2), (SIZE, 2, 20, 24, 3))
    check_model(rq.build_model(config(encoders=encoders)), made)


LAYERS = {"fusion_layers": 2, "depth": 2, "scan_layers": True}
OPTIONS = {"fusion_pooling": "class_tokens", "fusion_residual": True, "fusion_norm": True}
CROSS = [{"fusion": "mult"}, {"fusion": "mmml", "fusion_layers": 2}, {"fusion": "jmt"}]
BIAS = {"quality_bias": 0.5, "quality_shuffled": True}


@pytest.mark.parametrize(
    "fields",
    [LAYERS, {"fusion": "mbt", "mbt_layers": 1}, BIAS | OPTIONS, *CROSS],
    ids=["layers", "mbt", "quality_bias_and_options", "mult", "mmml", "jmt"],
)
def test_every_fusion(fields):
    kinds = {"audio": "vector", "text": "tokens"}
    inputs = batch(kinds, SIZE)
    inputs["text"] = inputs["text"].at[:3, 2:].set(0).at[5].set(0)
    check_model(
        rq.build_model(config(kinds=kinds, **{"depth": 0, "dropout": 0.1, **fields})), inputs
    )


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto], ids=str)
def test_the_core_rolls_as_on_one_device(axis_type):
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.normal(size=(SIZE, 7, 6)) + 1.0, jnp.float32)
    w_key, w_value = (jnp.asarray(rng.normal(size=(6, 2, 4)), jnp.float32) for _ in range(2))
    query, bias = jnp.asarray(rng.normal(size=(2, 4)), jnp.float32), jnp.zeros((2, 4))
    roller = rq.rolling_query(rho=1.0)
    mask = jnp.asarray(rng.random((SIZE, 7)) < 0.8)

    def run(tokens, mask, state):
        rotated = rq.rotate(state.rotation, query)
        out, weights = rq.class_token_attention(
            tokens, rotated, w_key, w_value, bias, bias, mask, 0.1, jax.random.key(0)
        )
        textbook = rq.reference_attention(tokens, rotated, w_key, w_value, bias, bias, mask)
        shares = [rq.attention_share(weights, (3, 4), mask=mask, per_token=p) for p in (0, 1)]
        keys = jnp.einsum("bld,dhk->blhk", tokens, w_key)
        mean_keys, weight = rq.segment_mean_keys(keys, (3, 4), mask=mask)
        each = rq.rotate(state.rotation, out)  # a query for each sample
        state = roller.observe(state, rotated, mean_keys)
        state = roller.observe(state, each, mean_keys, weight)
        own = [rq.mean_key(x, w_key, bias) for x in jnp.split(tokens, [3], axis=1)]
        state = roller.observe(state, rotated, jnp.stack(own), jnp.ones(SIZE))
        state, info = roller.update(state, rotated)
        return state, info, out, textbook, shares, rq.cosine_scores(each[:, 0], mean_keys[:, :, 0])

    state = roller.init(num_modalities=2, dim=4, num_heads=2)
    expected = jax.jit(run)(tokens, mask, state)
    mesh, rows = over(axis_type)
    with jax.set_mesh(mesh):
        found = jax.jit(run)(jax.device_put(tokens, rows), jax.device_put(mask, rows), state)
    assert expected[1].rolled.all()
    assert_close(found, expected)
