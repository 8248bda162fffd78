"""The methods of comparison against values worked out by hand or in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax.baselines import pmr
from rollingq_jax.baselines.joint import unimodal_losses
from rollingq_jax.baselines.modality_dropout import drop_modalities
from rollingq_jax.baselines.ogm import damping, modality_scores, ogm
from rollingq_jax.baselines.unimodal import unimodal_logits
from tests.baselines.baseline_cases import NAMES, small_model


@pytest.mark.parametrize("fusion", ["concat", "sum"])
def test_unimodal_logits_add_up_to_the_logits(fusion):
    model, params, batch = small_model(fusion)
    params = jax.tree.map(lambda x: x + 0.1, params)  # biases are 0 at the start
    batch["audio_mask"] = jnp.asarray([True, True, False, True])
    logits, out = model.apply({"params": params}, batch)
    parts = unimodal_logits(params, out, model.spec)
    np.testing.assert_allclose(parts["audio"] + parts["visual"], logits, atol=1e-5)
    if fusion == "concat":  # nothing but its share of the bias is left of an absent modality
        np.testing.assert_allclose(parts["audio"][2], params["fusion"]["head"]["bias"] / 2)


def test_ogm_scores_and_damping_by_hand():
    # softmax of log-probabilities gives the probabilities back.
    logits = {
        "audio": jnp.log(jnp.asarray([[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]])),
        "visual": jnp.log(jnp.asarray([[0.5, 0.5], [0.5, 0.5], [0.5, 0.5]])),
    }
    label, weight = jnp.asarray([0, 1, 0]), jnp.asarray([1.0, 1.0, 0.0])
    scores = modality_scores(logits, label, weight)
    np.testing.assert_allclose(scores, [1.7, 1.0], rtol=1e-6)
    scales = damping(scores, 0.3)
    np.testing.assert_allclose(scales, [1 - np.tanh(0.3 * 1.7), 1.0], rtol=1e-6)
    np.testing.assert_array_equal(damping(jnp.asarray([2.0, 2.0]), 0.3), [1.0, 1.0])


def gradients():
    rng = np.random.default_rng(1)

    def of(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    encoders = {
        f"encoder_{m}": {"embed": {"kernel": of(40, 50), "bias": of(50)}, "cls": of(8)}
        for m in NAMES
    }
    return encoders | {"fusion": {"kernel": of(3, 4)}}


def test_ogm_damps_the_tensors_of_the_stronger_encoder_alone():
    gradient = gradients()
    transform = ogm(0.5, NAMES)
    scores = jnp.asarray([1.0, 3.0])
    damped, _ = transform.update(gradient, transform.init(gradient), scores=scores)
    factor = np.float32(1 - np.tanh(1.5))
    kernel = gradient["encoder_visual"]["embed"]["kernel"]
    np.testing.assert_allclose(damped["encoder_visual"]["embed"]["kernel"], factor * kernel, 1e-5)
    damped["encoder_visual"]["embed"]["kernel"] = kernel
    jax.tree.map(np.testing.assert_array_equal, damped, gradient)  # everything else is as it was
    idle, _ = transform.update(gradient, optax.EmptyState(), scores=scores, active=jnp.asarray(0))
    jax.tree.map(np.testing.assert_array_equal, idle, gradient)


def test_ogm_ge_adds_noise_as_wide_as_the_unscaled_gradient_to_both():
    gradient = gradients()
    transform = optax.chain(ogm(0.5, NAMES, noise=True), optax.sgd(1.0))
    arguments = {"scores": jnp.asarray([1.0, 3.0]), "rng": jax.random.key(3)}
    steps, _ = transform.update(gradient, transform.init(gradient), **arguments)
    for m, factor in (("audio", 1.0), ("visual", 1 - np.tanh(1.5))):
        before = np.asarray(gradient[f"encoder_{m}"]["embed"]["kernel"])
        noise = -np.asarray(steps[f"encoder_{m}"]["embed"]["kernel"]) - factor * before
        assert noise.std() == pytest.approx(before.std(ddof=1), rel=0.1)  # 2000 values
        assert abs(noise.mean()) < 0.1
        np.testing.assert_array_equal(
            -steps[f"encoder_{m}"]["embed"]["bias"], gradient[f"encoder_{m}"]["embed"]["bias"]
        )
    audio, visual = (
        -steps[f"encoder_{m}"]["embed"]["kernel"] - f * gradient[f"encoder_{m}"]["embed"]["kernel"]
        for m, f in (("audio", 1.0), ("visual", 1 - np.tanh(1.5)))
    )
    assert abs(np.corrcoef(np.ravel(audio), np.ravel(visual))[0, 1]) < 0.1


def known_prototypes():
    state = pmr.init_prototypes(2, 2, 2)
    tokens = jnp.asarray([[[0.0, 0.0], [4.0, 0.0], [0.0, 2.0]], [[1.0, 1.0]] * 3])
    weight = jnp.asarray([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    return pmr.add_tokens(state, tokens, jnp.asarray([0, 1, 0]), weight)


def test_no_array_of_the_first_state_is_used_twice():
    state = pmr.init_prototypes(2, 3, 4)  # a step that donates it may not be given one twice
    places = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(places)) == len(places) == 4


def test_prototypes_are_class_means_and_move_by_momentum():
    state = pmr.renew(known_prototypes(), 0.2)
    np.testing.assert_allclose(state.prototype[0], [[0, 1], [4, 0]])
    np.testing.assert_allclose(state.prototype[1], [[1, 1], [1, 1]])
    np.testing.assert_array_equal(state.known, np.ones((2, 2)))
    assert not np.any(state.weight) and not np.any(state.total)
    tokens = jnp.asarray([[[10.0, 1.0]], [[1.0, 1.0]]])
    again = pmr.add_tokens(state, tokens, jnp.asarray([0]), jnp.ones((2, 1)))
    again = pmr.renew(again, 0.2)
    np.testing.assert_allclose(again.prototype[0], [[8.0, 1.0], [4, 0]])  # .8 * 10 + .2 * 0
    np.testing.assert_array_equal(again.known, np.ones((2, 2)))  # class 1 keeps what it had


def softmax(x):
    return np.exp(x) / np.exp(x).sum()


def test_the_prototype_loss_is_that_of_the_weak_modality():
    state = pmr.renew(known_prototypes(), 0.2)._replace(
        prototype=jnp.asarray([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]])
    )
    tokens = jnp.asarray([[[0.0, 0.0], [3.0, 0.0]], [[0.0, 0.0], [0.0, 0.0]]])
    label, weight = jnp.asarray([0, 1]), jnp.ones(2)
    losses = pmr.prototype_loss(tokens, label, weight, state)
    # audio: distances (0, 3) and (3, 0), both right; visual: (0, 1) twice, the second wrong.
    visual = [-np.log(softmax(np.array([0.0, -1.0]))[y]) for y in (0, 1)]
    np.testing.assert_allclose(losses, visual, rtol=1e-5)
    even = pmr.prototype_loss(tokens[:1].repeat(2, 0), label, weight, state._replace(
        prototype=state.prototype[:1].repeat(2, 0)
    ))  # fmt: skip
    np.testing.assert_array_equal(even, [0, 0])  # neither is behind


def test_the_prototype_loss_has_finite_gradients_everywhere():
    state = pmr.init_prototypes(2, 2, 2)
    tokens, label = jnp.zeros((2, 3, 2)), jnp.asarray([0, 1, 1])

    def total(tokens, state):
        return jnp.sum(pmr.prototype_loss(tokens, label, jnp.ones(3), state))

    assert total(tokens, state) == 0  # no prototypes yet
    half = state._replace(known=jnp.asarray([[1.0, 0.0], [1.0, 1.0]]))  # tokens lie on them
    for case in (state, half):
        assert np.all(np.isfinite(jax.grad(total)(tokens, case)))
    # class 1 has no prototype in one modality: its examples take no part
    np.testing.assert_array_equal(pmr.prototype_loss(tokens, label, jnp.ones(3), half)[1:], [0, 0])


def test_joint_losses_are_the_probes_cross_entropies_with_a_gradient():
    model, params, batch = small_model("attention")
    batch["visual_mask"] = jnp.asarray([True, False, True, True])

    def losses(params):
        _, out = model.apply({"params": params}, batch)
        return unimodal_losses(params, out, batch["label"], NAMES), out

    values, out = losses(params)
    for i, m in enumerate(NAMES):
        expected = [
            -np.log(softmax(np.asarray(z))[y])
            for z, y in zip(out["probe_logits"][m], batch["label"], strict=True)
        ]
        if m == "visual":
            expected[1] = 0.0
        np.testing.assert_allclose(values[i], expected, rtol=1e-4, atol=1e-6)
    gradient = jax.grad(lambda p: jnp.sum(losses(p)[0]))(params)
    assert np.any(gradient["encoder_audio"]["cls"])
    assert not np.any(gradient["probe_audio"]["kernel"])
    assert not np.any(gradient["fusion"]["head"]["kernel"])


def test_modality_dropout_drops_at_its_rate_and_never_all():
    size = 4000
    batch = {
        "audio_mask": jnp.arange(size) % 10 != 0,  # a tenth lacks audio already
        "visual_mask": jnp.ones((size, 3), bool).at[:, 2].set(False),
        "label": jnp.zeros(size, jnp.int32),
    }
    index = jnp.arange(size, dtype=jnp.int32)

    def drop(batch, index):
        return drop_modalities(batch, jax.random.key(0), index, rate=0.4, modalities=NAMES)

    dropped = drop(batch, index)
    audio = np.asarray(dropped["audio_mask"])
    visual = np.asarray(dropped["visual_mask"])
    assert not visual[:, 2].any() and (visual[:, 0] == visual[:, 1]).all()
    assert (audio | visual[:, 0]).all()
    whole = np.arange(size) % 10 != 0
    assert not audio[~whole].any() and visual[~whole, 0].all()
    # dropped alone: .4 * .6; neither: 1 - 2 * .24
    assert (~audio[whole]).mean() == pytest.approx(0.24, abs=0.03)
    assert (~visual[whole, 0]).mean() == pytest.approx(0.24, abs=0.03)
    # what an example loses depends on its number, not on where it lies
    part = drop({k: v[100:200] for k, v in batch.items()}, index[100:200])
    np.testing.assert_array_equal(part["audio_mask"], audio[100:200])
    free = drop({"label": batch["label"]}, index)
    assert free["visual_mask"].shape == (size,)
