"""Methods of comparison on one small example of two modalities, against values in NumPy.

A late fusion z = x_a W_a + x_v W_v + b of two examples and three classes. The expected numbers were
computed apart from this package, in float64.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.baselines import agm, arl, cggm, gblend, inforeg, lfm, opm
from rollingq_jax.baselines.build import build_baseline
from rollingq_jax.baselines.dgl import disentangle
from rollingq_jax.baselines.hooks import RunningMean, scale_encoders
from rollingq_jax.baselines.mmpareto import mmpareto, pareto_gradient
from rollingq_jax.baselines.ogm import modality_scores
from rollingq_jax.errors import ConfigError
from rollingq_jax.train.config import default_config
from tests.baselines.baseline_cases import small_model

AUDIO, VISUAL = jnp.asarray([[1.0, 0.0], [0.0, 2.0]]), jnp.asarray([[0.5, 0.5], [-1.0, 1.0]])
LABEL = jnp.asarray([0, 2])
W_AUDIO = jnp.asarray([[1.0, 0.0, -1.0], [0.0, 1.0, 0.5]])
W_VISUAL = jnp.asarray([[0.2, -0.2, 0.4], [-0.4, 0.3, 0.1]])
BIAS = jnp.asarray([0.1, -0.1, 0.2])[None]
Z = AUDIO @ W_AUDIO + VISUAL @ W_VISUAL + BIAS
PARTS = jnp.stack([AUDIO @ W_AUDIO + BIAS / 2, VISUAL @ W_VISUAL + BIAS / 2])  # z_m
ALONE = jnp.stack([AUDIO @ W_AUDIO + BIAS, VISUAL @ W_VISUAL + BIAS])  # u_m: the whole bias
BOTH = ("audio", "visual")


def near(value, expected, tolerance=1e-5):
    np.testing.assert_allclose(value, expected, atol=tolerance, rtol=0)


def test_mmpareto_weighs_gradients_that_conflict_by_the_min_norm_point():
    g, u = {"w": jnp.asarray([2.0, 0.0])}, {"w": jnp.asarray([-1.0, 1.0])}
    # c = u.(u - g) / |g - u|^2 = (2 + 2) / 10; G = .8 g + 1.2 u = (.4, 1.2), and |g + u| > |G|
    # = 1.264911 by 1.118034.
    near(pareto_gradient(g, u, 1.0)["w"], 1.118034 * np.array([0.4, 1.2]))
    near(pareto_gradient(g, {"w": jnp.asarray([1.0, 1.0])}, 1.5)["w"], [4.5, 1.5])  # they agree
    nothing = jax.tree.map(jnp.zeros_like, g)
    near(pareto_gradient(nothing, nothing, 1.5)["w"], [0, 0])
    # u = 0 is the nearest point itself, c = .001, and the length that of the sum: g is left.
    near(pareto_gradient(g, nothing, 1.0)["w"], [2, 0])


def test_mmpareto_changes_the_encoders_only():
    def tree(audio, head):
        encoder = {"encoder_audio": {"w": jnp.asarray(audio)}, "norm_audio": {"scale": jnp.ones(1)}}
        return encoder | {"fusion": jnp.asarray(head)}

    joint, alone = tree([2.0, 0.0], [1.0]), tree([-1.0, 0.5], [0.25])
    transform = mmpareto(1.5, ("audio",))
    moved, _ = transform.update(joint, transform.init(joint), apart=alone)
    near(moved["fusion"], [1.25])
    # g.u = -2 + 1 over the whole encoder, the norm's scale included: c = u.(u - g) / |g - u|^2.
    c = (1.25 + 1 + 1) / (9 + 0.25)
    mixed = np.array([4 * c - 2 * (1 - c), 1 - c])
    length = max(1, np.hypot(1.0, 0.5) / np.hypot(*mixed))
    near(moved["encoder_audio"]["w"], 1.5 * length * mixed)
    near(moved["norm_audio"]["scale"], [1.5 * 2])
    still, _ = transform.update(joint, transform.init(joint), apart=alone, active=jnp.asarray(0))
    near(still["encoder_audio"]["w"], [1.0, 0.5])


def test_agm_parts_of_two_modalities_are_the_split_head_and_add_up():
    alone = dict(zip(BOTH, ALONE, strict=True))
    parts = agm.shapley_parts(lambda seen: alone[seen[0]], Z, BOTH)
    near(parts, PARTS)
    near(jnp.sum(parts, axis=0), Z)


def test_agm_parts_of_three_modalities_are_shapley_values():
    worth = {"a": 1.0, "b": 2.0, "c": 4.0, "ab": 5.0, "ac": 6.0, "bc": 9.0, "abc": 12.0}
    whole = jnp.full((1, 1), 12.0)
    parts = agm.shapley_parts(
        lambda seen: jnp.full((1, 1), worth["".join(seen)]), whole, tuple("abc")
    )
    # The mean over the six orders of what a modality adds.
    near(parts[:, 0, 0], [13 / 6, 25 / 6, 34 / 6])


def test_agm_factors_compare_this_step_with_the_mean_of_those_before():
    scores = agm.mean_losses(PARTS, LABEL, jnp.ones(2))
    near(scores, [0.847135, 1.275769])
    running = RunningMean.of_nothing(2)
    near(agm.factors(scores, running, 1.0), [1, 1])
    running = agm.add_scores(
        agm.add_scores(running, jnp.asarray([1.0, 1.0])), jnp.asarray([2.0, 1.0])
    )
    near(running.mean, [1.5, 1.0])
    gap = 1.275769 - 0.847135
    expected = [np.exp(0.5 * (np.exp(t * -0.5) - np.exp(t * gap))) for t in (1, -1)]
    near(agm.factors(scores, running, 0.5), expected)


def test_agm_loss_multiplies_the_gradient_of_each_part():
    factor = jnp.asarray([0.5, 3.0])

    def total(tokens):
        parts = jnp.stack([tokens[0] @ W_AUDIO, tokens[1] @ W_VISUAL]) + BIAS[None] / 2
        z = jnp.sum(parts, axis=0)
        losses = -jnp.take_along_axis(jax.nn.log_softmax(z), LABEL[:, None], axis=1)[:, 0]
        return jnp.sum(losses + agm.modulation_loss(z, parts, LABEL, factor))

    gradient = jax.grad(total)((AUDIO, VISUAL))
    error = np.asarray(jax.nn.softmax(Z)) - np.eye(3)[LABEL]
    near(gradient[0], 0.5 * error @ W_AUDIO.T)
    near(gradient[1], 3.0 * error @ W_VISUAL.T)


def test_gblend_weights_prefer_heads_that_generalize():
    start = jnp.full(3, 1.8)
    ends = jnp.asarray([1.0, 1.5, 0.8]), jnp.asarray([1.4, 1.6, 1.3])
    near(gblend.blending_weights(start, start, *ends), [0.102041, 0.816327, 0.081633])
    worse = gblend.blending_weights(start, start, ends[0], jnp.asarray([1.4, 1.9, 2.0]))
    near(worse, [1, 0, 0])
    near(gblend.blending_weights(start, start, ends[0], start), [1 / 3] * 3)


def test_gblend_reads_of_each_training_the_head_that_was_trained():
    """Each training ruins the heads that it leaves alone; all start at the same state."""
    end = np.asarray([[1.0, 1.5, 0.8], [1.4, 1.6, 1.3]])

    def train_alone(state, head):
        assert state == 1.8
        return head

    def losses(state):
        if state == 1.8:
            return jnp.full(3, 1.8), jnp.full(3, 1.8)
        return tuple(jnp.asarray(np.where(np.arange(3) == state, row, 9.0)) for row in end)

    near(gblend.weigh_heads(1.8, train_alone, losses), [0.102041, 0.816327, 0.081633])


def test_gblend_takes_weights_or_makes_them():
    config = default_config().baseline
    config.update({"name": "gblend", "gblend_weights": (1.0, 1.0, 1.0), "gblend_every": 2})
    with pytest.raises(ConfigError, match="gblend_weights is .* allowed: one of both"):
        build_baseline(config, small_model("concat")[0].spec, 2, 4)


def mean_loss(logits):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), LABEL[:, None], axis=1))


def test_dgl_gives_each_part_of_the_model_one_of_two_gradients():
    params = {
        "encoder_audio": AUDIO, "encoder_visual": VISUAL,
        "fusion": {"audio": W_AUDIO, "visual": W_VISUAL, "bias": BIAS[0]},
    }  # fmt: skip

    def parts(params):
        head = params["fusion"]
        return [params[f"encoder_{m}"] @ head[m] for m in BOTH], head["bias"][None]

    def joint(params):
        (audio, visual), bias = parts(params)
        return mean_loss(audio + visual + bias)

    def alone(params):
        each, bias = parts(params)
        return sum(mean_loss(z + bias) for z in each)

    gradients = jax.grad(joint)(params), jax.grad(alone)(params)
    transform = disentangle(4.0)
    found, _ = transform.update(gradients[0], transform.init(params), apart=gradients[1])
    near(found["encoder_audio"], [[-0.827608, 0.518318], [1.601312, 0.502262]])
    near(found["encoder_visual"], [[-0.037976, 0.823980], [-0.676880, -0.003263]])
    near(found["fusion"]["bias"], [-0.158411, 0.503192, -0.344781])
    expected = [[-0.179936, 0.112003, 0.067933], [0.043049, 0.782379, -0.825428]]
    near(found["fusion"]["audio"], expected)


def test_lfm_aligns_by_the_divergence_from_each_prediction():
    near(jnp.mean(lfm.alignment(PARTS)), 0.061672)
    mean = jnp.mean(PARTS, axis=0)
    near(mean_loss(mean), 1.001821)
    total = 2 * (0.95 * mean_loss(mean) + 0.05 * jnp.mean(lfm.alignment(PARTS)))
    near(total, 1.909627)
    three = jnp.concatenate([PARTS, PARTS[:1]])  # of three pairs one is equal, the others are this
    near(lfm.alignment(three), 2 / 3 * lfm.alignment(PARTS))


def test_lfm_schedule_is_the_authors():
    epochs = jnp.asarray([0.0, 100.0, 199.0, 200.0])
    near(jax.vmap(lfm.share_of_task)(epochs / 200), [0.2046, 0.5392, 0.9160, 0.9160], 5e-5)


def test_arl_pushes_the_sure_and_little_used_modality():
    weight = jnp.ones(2)
    near(arl.encoder_factors(ALONE, weight, 1.0), [1.443984, 1.556016])
    near(arl.encoder_factors(ALONE, weight, 8.0), [1.141843, 1.858157])
    padded = jnp.concatenate([ALONE, 9 * ALONE[:, :1]], axis=1)
    near(arl.encoder_factors(padded, jnp.asarray([1.0, 1, 0]), 8.0), [1.141843, 1.858157])


def test_cggm_gives_more_to_the_modality_that_improves_less():
    before, after = jnp.asarray([0.5, 0.25]), jnp.asarray([0.75, 0.75])
    near(cggm.balance(before, after), [2 / 3, 1 / 3])
    near(cggm.balance(before, before), [0.5, 0.5])
    near(cggm.balance(before, jnp.asarray([0.4, 0.36])), [2.0, 0.0])  # 11 and -10 without bounds
    first = cggm.observe(RunningMean.of_nothing(2), before, 0.9)
    near(first.mean, before)
    near(cggm.observe(first, after, 0.9).mean, [0.525, 0.3])


def test_encoders_are_scaled_with_their_norms():
    names = ("encoder_audio", "norm_audio", "encoder_visual", "norm_visual", "fusion")
    transform = scale_encoders(BOTH)
    scaled, _ = transform.update(
        dict.fromkeys(names, jnp.ones(2)), (), factors=jnp.asarray([2.0, 3])
    )
    assert [float(scaled[name][0]) for name in names] == [2, 2, 3, 3, 1]


def scores_of(parts):
    logits = dict(zip(BOTH, parts, strict=True))
    return modality_scores(logits, LABEL, jnp.ones(2))


def test_opm_drops_what_is_ahead_by_how_far_it_is():
    scores = scores_of(PARTS)
    near(scores[0] / scores[1], 1.699181)
    near(opm.drop_rates(scores, 0.5, 0.5), [0.650962, 0.0])
    near(opm.drop_rates(jnp.asarray([1.0, 1.0]), 0.5, 0.5), [0, 0])
    near(opm.drop_rates(jnp.asarray([9.0, 1.0, 2.0]), 0.8, 1.0), [1, 0, 0])


def test_inforeg_holds_the_encoder_that_is_ahead_while_information_rises():
    scores = scores_of(PARTS)
    near(inforeg.strengths(scores, 0.95), [1.377776, 0.0])
    past = jnp.asarray([[2.0] * 9 + [3.0, 2.5], [0.0] * 11])
    near(inforeg.rise(past), [0.5 / 21.5, 1.0])

    def tree(kernel):
        kernel = jnp.asarray([kernel])
        return {f"{part}_{m}": {"kernel": kernel} for part in ("encoder", "norm") for m in BOTH}

    transform = inforeg.inforeg(0.95, BOTH)
    now, gradient = tree([1.0, -1.0]), tree([0.2, 0.2])
    first = transform.init(tree([0.5, -0.5]))
    where = {"scores": scores, "begins": jnp.asarray(False)}
    held, state = transform.update(gradient, first, now, **where)
    for name in now:
        expected = [0.888888, -0.488888] if name.endswith("audio") else [0.2, 0.2]
        near(held[name]["kernel"][0], expected)
    squares = [(0.888888**2 + 0.488888**2) / 2, 0.2**2]  # of encoder and norm
    near(state.current, 2 * np.asarray(squares))
    held, begun = transform.update(gradient, state, now, **where | {"begins": jnp.asarray(True)})
    near(held["encoder_audio"]["kernel"][0], [0.2, 0.2])  # it is where the epoch begins
    near(begun.past[:, -1], state.current)
    near(begun.current, [0.08, 0.08])
    # F falls from epoch to epoch: nothing is held any more
    falling = first._replace(past=jnp.asarray([[3.0] + [2.0] * 10] * 2))
    held, _ = transform.update(gradient, falling, now, **where)
    near(held["encoder_audio"]["kernel"][0], [0.2, 0.2])
