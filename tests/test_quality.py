"""The quality bias, of norms and energies: its statistics and its place in the attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax import quality
from rollingq_jax.errors import ConfigError, UserError
from rollingq_jax.models import build_model

LENGTHS = {"audio": (5, 6), "visual": (3, 4)}


@functools.partial(jax.jit, static_argnums=0)
def apply(model, variables, batch):
    return model.apply(variables, batch, return_attention=True)


@functools.cache
def made_model(**fields):
    """A small model with a norm bias, its parameters and statistics away from 0, and a batch."""
    config = {"num_classes": 3, "dim": 8, "depth": 0, "quality_bias": 0.7}
    config |= {"encoders": {m: {"kind": "sequence"} for m in LENGTHS}} | fields
    model, rng = build_model(config), np.random.default_rng(0)
    batch = {
        m: jnp.asarray(rng.normal(size=(4, *shape)), jnp.float32) for m, shape in LENGTHS.items()
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    params = jax.tree.map(
        lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), variables["params"]
    )
    fusion = {"center": jnp.array([1.0, 2.0]), "scale": jnp.array([0.5, 0.25])}
    return model, {"params": params, "quality": {"fusion": fusion}}, batch


def test_statistics_are_those_of_the_samples():
    norms = np.random.default_rng(0).normal(5.0, 0.3, size=(3, 2, 8))  # 3 batches, M 2
    state = quality.init(2)
    for batch in norms:
        state = quality.observe(state, jnp.asarray(batch, jnp.float32))
    center, scale = quality.statistics(state)
    weights = np.repeat(quality.DECAY ** np.array([2.0, 1.0, 0.0]), 8)
    for m in range(2):
        flat = norms[:, m].ravel()
        mean = np.average(flat, weights=weights)
        spread = np.average((flat - mean) ** 2, weights=weights) ** 0.5
        np.testing.assert_allclose((center[m], scale[m]), (mean, spread), rtol=1e-4)


def test_weights_leave_samples_out_whatever_they_hold():
    norms = jnp.array([[1.0, 3.0, jnp.nan], [2.0, jnp.inf, 6.0]])
    weight = jnp.array([[1.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    state = quality.observe(quality.init(2), norms, weight)
    center, scale = quality.statistics(state)
    assert center.tolist() == [2.0, 4.0] and scale.tolist() == [1.0, 2.0]
    assert quality.standardize(jnp.array([4.0, 3.0]), center, scale).tolist() == [2.0, -0.5]
    again = quality.observe(
        state, norms, jnp.array([1.0, 0.0, 0.0])[None] * jnp.array([[0.0], [1.0]])
    )
    assert again.total[0] == state.total[0]  # no sample of the batch has the first
    assert again.total[1] == pytest.approx(quality.DECAY * 8.0 + 2.0)


def test_without_statistics_or_spread_the_bias_is_0():
    norms = jnp.array([[1.0, 9.0]])
    assert quality.standardize(norms, *quality.statistics(quality.init(2))).tolist() == [[0.0, 0.0]]
    state = quality.observe(quality.init(2), jnp.full([2, 64], 7.3))
    assert quality.statistics(state)[1].tolist() == [0.0, 0.0]


def test_sums_over_devices_are_those_of_the_batch():
    norms = jnp.arange(8.0).reshape(2, 4)
    weight = jnp.array([1.0, 1.0, 1.0, 0.0])
    whole = quality.observe(quality.init(2), norms, weight)
    over = jax.vmap(
        lambda n, w: quality.observe(quality.init(2), n, w, "data"), (1, 0), axis_name="data"
    )(norms.reshape(2, 2, 2), weight.reshape(2, 2))
    for ours, theirs in zip(over, whole, strict=True):
        assert ours[0].tolist() == ours[1].tolist() == theirs.tolist()
    with pytest.raises(UserError, match="norms has shape"):
        quality.observe(quality.init(3), norms)


def test_norm_is_that_of_the_mean_of_real_tokens():
    tokens = jnp.array([[[3.0, 0.0], [3.0, 8.0], [jnp.nan, 1.0]], [[1.0, 1.0]] * 3])
    mask = jnp.array([[True, True, False], [False] * 3])
    found = quality.token_norms([tokens, tokens[:, :2]], [mask, None])
    assert found.tolist() == [[5.0, 5.0], [0.0, pytest.approx(2**0.5)]]


@pytest.mark.parametrize("scale", (0.0, 1.0))
def test_a_modalitys_logits_rise_by_its_standardized_norm(scale):
    """Against the model without the bias: weights of softmax(logits + b) from those without b."""
    model, variables, batch = made_model(attention_scale=scale)
    _, out = apply(model, variables, batch)
    plain, _, _ = made_model(attention_scale=scale, quality_bias=0.0)
    _, before = apply(plain, {"params": variables["params"]}, batch)
    assert "quality_signal" not in before
    expected = np.array(before["attention"], np.float64)[:, 0]
    start = 1
    for m, (center, spread) in {"audio": (1.0, 0.5), "visual": (2.0, 0.25)}.items():
        mean = np.asarray(out["tokens"][m], np.float64).mean(axis=1)
        norm = np.linalg.norm(mean, axis=-1)
        np.testing.assert_allclose(out["quality_signal"][m], norm, rtol=1e-5)
        length = out["tokens"][m].shape[1]
        rise = np.exp(0.7 * (norm - center) / spread)[:, None]
        expected[:, start : start + length] *= rise
        start += length
    expected /= expected.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(out["attention"][:, 0], expected, rtol=2e-5, atol=1e-7)


def test_the_control_takes_the_bias_of_the_sample_before():
    model, variables, batch = made_model(attention_scale=0.0)
    control, _, _ = made_model(attention_scale=0.0, quality_shuffled=True)
    share = apply(model, variables, batch)[1]["attention_share"]["audio"]
    shuffled = apply(control, variables, batch)[1]["attention_share"]["audio"]
    np.testing.assert_allclose(shuffled, jnp.roll(share, 1, axis=0), rtol=1e-6)
    assert np.ptp(np.asarray(share)) > 0.05


def test_an_absent_modality_takes_no_attention_and_no_norm():
    model, variables, batch = made_model(dtype="bfloat16")
    present = jnp.array([True, False, True, True])
    logits, out = apply(model, variables, batch | {"audio_mask": present[:, None].repeat(5, 1)})
    assert out["quality_signal"]["audio"].dtype == jnp.float32
    assert out["attention_share"]["audio"][1].tolist() == [0.0]
    assert np.isfinite(np.asarray(logits)).all()


def test_no_gradient_through_norms_or_statistics():
    model, variables, batch = made_model(attention_scale=0.0)

    def total(v):
        out = apply(model, v, batch)[1]
        return sum(jnp.sum(x**2) for x in out["quality_signal"].values()) + jnp.sum(
            out["attention_share"]["audio"]
        )

    for leaf in jax.tree.leaves(jax.jit(jax.grad(total))(variables)):
        assert not np.asarray(leaf).any()


def test_what_the_model_refuses():
    model, variables, batch = made_model()
    with pytest.raises(ConfigError, match="no collection 'quality'"):
        model.apply({"params": variables["params"]}, batch)
    for fields, words in (
        ({"fusion_layers": 2}, "model.fusion_layers 2: 0"),
        ({"fusion": "concat"}, "with head 'concat'"),
        ({"quality_bias": -1.0}, "allowed: a number >= 0"),
        ({"quality_bias": 0.0, "quality_shuffled": True}, "model.quality_bias 0: False"),
        ({"quality_bias": 0.0, "quality_signal": "energy"}, "model.quality_bias 0: norm"),
        ({"quality_signal": "x"}, "allowed: norm, energy"),
    ):
        with pytest.raises(ConfigError, match=words) as error:
            made_model(**fields)
        assert "\n" not in str(error.value)


def test_the_energy_is_that_of_the_probes():
    model, variables, batch = made_model(quality_signal="energy", attention_scale=0.0)
    present = jnp.array([True, False, True, True])
    mask = {"audio_mask": present[:, None].repeat(5, 1)}
    out = apply(model, variables, batch | mask)[1]
    for m in LENGTHS:
        logits = np.asarray(out["probe_logits"][m], np.float64)
        energy = np.log(np.exp(logits).sum(axis=1))
        energy = np.where(present, energy, 0.0) if m == "audio" else energy
        np.testing.assert_allclose(out["quality_signal"][m], energy, rtol=1e-5)
    z = {
        "audio": (np.asarray(out["quality_signal"]["audio"], np.float64) - 1.0) / 0.5,
        "visual": (np.asarray(out["quality_signal"]["visual"], np.float64) - 2.0) / 0.25,
    }
    rise = {m: (1 + LENGTHS[m][0]) * np.exp(0.7 * z[m]) for m in z}  # its class token, too
    share = rise["audio"] / (rise["audio"] + rise["visual"])
    found = np.asarray(out["attention_share"]["audio"])[:, 0]
    np.testing.assert_allclose(found[[0, 2, 3]], share[[0, 2, 3]], rtol=1e-4)
    assert found[1] == 0.0
