"""The NNX fusion is the Linen one: values, gradients, and what rolls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import rollingq_jax as rq
from rollingq_jax.models import nnx_fusion
from tests.models.model_cases import close, filled

B, DIM, HEADS, CLASSES = 4, 8, 2, 3


@pytest.fixture(scope="module")
def case():
    """Linen module, its parameters, tokens, masks, labels."""
    rng = np.random.default_rng(0)
    tokens = {
        m: jnp.asarray(rng.normal(size=(B, n, DIM)) + shift, jnp.float32)
        for m, n, shift in (("audio", 5, 1.0), ("visual", 3, 0.0))
    }
    masks = {"audio": jnp.asarray(rng.random((B, 5)) < 0.7), "visual": None}
    linen = rq.models.AttentionFusion(CLASSES, DIM, HEADS)
    params = filled(linen, tokens, masks, example_index=jnp.arange(B))
    return linen, params, tokens, masks, jnp.array([0, 1, 2, 1])


def made(params, **fields):
    fusion = nnx_fusion.AttentionFusion(CLASSES, DIM, HEADS, rngs=nnx.Rngs(0), **fields)
    nnx_fusion.copy_params(fusion, params)
    return fusion


def loss_of(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1))


def test_values_gradients_and_rolling_state_are_those_of_linen(case):
    linen, params, tokens, masks, labels = case
    fusion = made(params)
    fusion.eval()
    roller = rq.rolling_query(rho=1.0, max_rotations=None)
    ours = theirs = roller.init(num_modalities=2, dim=DIM // HEADS, num_heads=HEADS)

    @jax.jit
    def linen_step(params, rolling):
        def loss(params):
            logits, out = linen.apply(
                {"params": params},
                tokens,
                masks,
                rolling.rotation,
                return_attention=True,
                example_index=jnp.arange(B),
            )
            return loss_of(logits, labels), (logits, out)

        (value, seen), grads = jax.value_and_grad(loss, has_aux=True)(params)
        rolling = roller.observe(rolling, seen[1]["query"], seen[1]["mean_keys"])
        return (value, seen, grads), *roller.update(rolling)

    @nnx.jit
    def nnx_step(fusion, rolling):
        def loss(fusion):
            logits, out = fusion(tokens, masks, return_attention=True)
            return loss_of(logits, labels), (logits, out)

        (value, seen), grads = nnx.value_and_grad(loss, has_aux=True)(fusion)
        rolling = roller.observe(rolling, seen[1]["query"], seen[1]["mean_keys"])
        return (value, seen, nnx.to_pure_dict(grads)), *roller.update(rolling)

    for step in range(2):
        expected, theirs, _ = linen_step(params, theirs)
        found, ours, info = nnx_step(fusion, ours)
        jax.tree.map(close, found, expected)
        jax.tree.map(close, ours, theirs)
        assert step or info.rolled.all()
        fusion.rotation[...] = ours.rotation
    assert np.abs(np.asarray(ours.rotation) - np.eye(DIM // HEADS)).max() > 0.1
    turned = linen.apply({"params": params}, ours.rotation, method="class_query")
    close(fusion.class_query(), turned)


def test_parameters_come_back_and_fold(case):
    linen, params, tokens, masks, _ = case
    fusion = made(params)
    fusion.eval()
    back = nnx.to_pure_dict(nnx.state(fusion, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, back, dict(params))
    assert isinstance(fusion.rotation, nnx_fusion.Rotation)
    rotation = rq.rotation_between(jnp.eye(DIM // HEADS)[:HEADS], jnp.ones((HEADS, DIM // HEADS)))
    fusion.rotation[...] = rotation
    before = fusion(tokens, masks)[0]
    nnx_fusion.copy_params(fusion, rq.fold_rotation(back, rotation, ("query",)))
    fusion.rotation[...] = jnp.broadcast_to(jnp.eye(DIM // HEADS), rotation.shape)
    close(fusion(tokens, masks)[0], before)


def test_dropout_is_on_in_training_and_belongs_to_the_example(case):
    _, params, tokens, _, _ = case
    fusion = made(params, dropout=0.5)
    whole = nnx.clone(fusion)(tokens)[0]
    part = {m: x[2:] for m, x in tokens.items()}
    close(nnx.clone(fusion)(part, example_index=jnp.arange(2, B))[0], whole[2:])
    assert not np.allclose(fusion(tokens)[0], fusion(tokens)[0])
    fusion.eval()
    close(fusion(tokens)[0], fusion(tokens)[0])


def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    params = case[1]
    fusion = made(params)
    head = {"kernel": jnp.ones((DIM, 9)), "bias": jnp.ones(9)}
    with pytest.raises(rq.UserError, match=r"^params has head/bias \(9,\); allowed: \(3,\)$"):
        nnx_fusion.copy_params(fusion, {**params, "head": head})
    with pytest.raises(rq.UserError, match="params has layer/x .*; allowed: no such parameter"):
        nnx_fusion.copy_params(fusion, {**params, "layer": {"x": jnp.ones(1)}})
    close(fusion.head.kernel[...], params["head"]["kernel"])
    with pytest.raises(rq.UserError, match="num_heads is 3; allowed: a divisor of dim"):
        nnx_fusion.AttentionFusion(CLASSES, DIM, 3, rngs=nnx.Rngs(0))
