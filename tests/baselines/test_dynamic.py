"""Dynamic fusions, QMF's ranking loss and UMT against values in NumPy and gradients written out."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rollingq_jax.baselines import qmf
from rollingq_jax.baselines.hooks import StepContext
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import CosineFusion, DynamicFusion, ModelSpec
from rollingq_jax.models.fusion import confidence_weights, energy, energy_weights, entropy_weights
from rollingq_jax.train.config import check_config, default_config
from rollingq_jax.train.parallel import make_mesh
from rollingq_jax.train.steps import eval_step, finish
from tests.baselines.baseline_cases import NAMES, small_model, training
from tests.baselines.test_numbers import (
    AUDIO,
    BOTH,
    LABEL,
    PARTS,
    VISUAL,
    W_AUDIO,
    W_VISUAL,
    near,
)
from tests.baselines.test_steps import close, cross_entropy, difference

HERE = jnp.ones((2, 2))
TOKENS = {"audio": AUDIO[:, None], "visual": VISUAL[:, None]}
DYNAMIC = ("entropy", "pdf", "qmf")


def losses_of(logits, label=LABEL):
    return jnp.stack([cross_entropy(z[None], y[None]) for z, y in zip(logits, label, strict=True)])


def test_energy_weights_and_the_fused_answer():
    weights = energy_weights(PARTS, HERE)
    near(weights, [[0.143876, 0.240551], [0.121500, 0.108654]])
    near(energy_weights(PARTS - 9, HERE), np.zeros((2, 2)))  # where the authors' are negative
    answers = dict(zip(BOTH, PARTS, strict=True))
    masks = dict.fromkeys(BOTH)
    z, out = DynamicFusion("qmf").apply({}, answers, TOKENS, masks)
    near(losses_of(z), [0.975241, 1.119872])
    near(out["attention_share"]["audio"][:, 0], weights[0] / weights.sum(0))
    near(out["uniform_share"]["visual"], [0.5, 0.5])


def test_ranking_loss_enforces_the_margin():
    losses = jnp.stack([losses_of(z) for z in PARTS])
    hard, sure = qmf.scaled_history(losses), energy(PARTS)
    swapped = sure[:, ::-1], hard[:, ::-1]  # of two examples, each is the other's next
    pairs = qmf.ranking_loss(sure, swapped[0], hard, swapped[1])
    near(jnp.mean(pairs, axis=1), [1.096676, 0.987154])
    near(qmf.scaled_history(jnp.ones((2, 3))), np.zeros((2, 3)))


def test_confidence_weights_in_training_and_calibrated():
    confidence = jnp.asarray([[0.8, 0.6], [0.4, 0.9]])
    near(confidence_weights(confidence, HERE)[0], [0.732692, 0.277274])
    near(confidence_weights(confidence, HERE, PARTS)[0], [0.810379, 0.412303])
    gone = jnp.asarray([[1.0, 0.0], [1.0, 1.0]])
    near(confidence_weights(confidence, gone, PARTS)[:, 1], [0, 1])
    sure = confidence_weights(jnp.ones((3, 2)), jnp.ones((3, 2)))  # all alike, and no log of 1
    near(sure, np.full((3, 2), 1 / 3))


def test_entropy_weights():
    weights = entropy_weights(PARTS, HERE)
    near(weights[0], [0.563824, 0.536097])
    near(jnp.sum(weights, axis=0), [1, 1])
    near(entropy_weights(PARTS, jnp.zeros((2, 2))), np.zeros((2, 2)))


def test_cosine_head_reads_directions_only():
    params = {"head_audio": 3 * W_AUDIO.T, "head_visual": W_VISUAL.T}
    apply = functools.partial(CosineFusion(3).apply, {"params": params})
    z = apply(TOKENS, dict.fromkeys(BOTH))[0]
    # (1, 0) to (1, 0), (0, 1), (-1, .5); (.5, .5) to (.2, -.4), (-.2, .3), (.4, .1)
    audio, visual = [1, 0, -0.894427], [-0.316228, 0.196116, 0.857493]
    near(z[0], 15 * np.add(audio, visual), 2e-5)
    near(apply(jax.tree.map(lambda x: 5 * x, TOKENS), dict.fromkeys(BOTH))[0], z, 2e-5)
    masks = {"audio": None, "visual": jnp.asarray([[False], [True]])}
    near(apply(TOKENS, masks)[0][0], 15 * np.asarray(audio), 2e-5)
    dead = jax.grad(lambda x: jnp.sum(apply({"audio": x, "visual": x}, masks)[0]))
    assert np.all(np.isfinite(dead(jnp.zeros((2, 1, 2)))))


def written_out(model, params, batch, kind):
    """The loss of a dynamic fusion, from the class tokens and the probes' parameters."""
    _, out = model.apply({"params": params}, batch, train=True)
    still, label = jax.lax.stop_gradient, batch["label"]
    tokens = {m: out["tokens"][m][:, 0] for m in NAMES}
    z = jnp.stack([
        tokens[m] @ params[f"probe_{m}"]["kernel"] + params[f"probe_{m}"]["bias"][None]
        for m in NAMES
    ])  # fmt: skip
    total = sum(cross_entropy(one, label) for one in z)
    ones = jnp.ones(z.shape[:2])
    if kind == "entropy":
        return total
    weights = energy_weights(z, ones)
    if kind == "pdf":
        heads = [params["fusion"][f"confidence_{m}"] for m in NAMES]
        c = jnp.stack([
            jax.nn.sigmoid(still(tokens[m]) @ head["kernel"][:, 0] + head["bias"])
            for m, head in zip(NAMES, heads, strict=True)
        ])  # fmt: skip
        right = jnp.stack([jax.nn.softmax(one)[jnp.arange(4), label] for one in z])
        total += jnp.sum(jnp.mean(jnp.abs(c - still(right)), axis=1))
        weights = confidence_weights(c, ones)
    return total + cross_entropy(jnp.einsum("mb,mbc->bc", still(weights), z), label)


@pytest.mark.slow
@pytest.mark.parametrize("kind", DYNAMIC)
def test_a_step_follows_the_loss_written_out(kind):
    model, state, step, batch = training("", kind)
    wanted = jax.jit(jax.grad(lambda p: written_out(model, p, batch, kind)))(state.params)
    after, sums, record = jax.jit(step)(state, batch)
    close(difference(state.params, after.params), wanted)
    assert record is None and state.rolling is None
    row = finish(sums)
    near(row["attention_share/audio"] + row["attention_share/visual"], 1.0)
    assert not {"imbalance", "air", "cosine/audio"} & row.keys()


@pytest.mark.parametrize("kind", DYNAMIC)
def test_an_absent_modality_has_no_vote(kind):
    model, params, batch = small_model(kind)
    present = jnp.asarray([True, False, True, False])
    batch |= {"audio_mask": present, "visual_mask": jnp.asarray([True, True, True, False])}
    sums, examples = eval_step({"params": params}, None, batch, model=model)
    near(examples["attention_share"][1], [0, 1])
    near(examples["uniform_share"], [[0.5, 0.5], [0, 1], [0.5, 0.5], [0, 0]])
    assert not np.isnan(examples["probabilities"]).any()
    assert "mean_keys/audio" not in examples and "cosine/audio" not in sums
    changed = batch | {"audio": jnp.where(present[:, None], batch["audio"], 7.0)}
    again = eval_step({"params": params}, None, changed, model=model)[1]
    near(again["probabilities"], examples["probabilities"])


@pytest.mark.slow
def test_ranking_begins_with_the_second_epoch_and_knows_the_examples():
    _, state, step, batch = training("qmf", "qmf", epoch_steps=1, qmf_weight=1.0)
    _, plain, plain_step, _ = training("", "qmf")
    step, plain_step = jax.jit(step), jax.jit(plain_step)
    first, without = step(state, batch)[0], plain_step(plain, batch)[0]
    close(first.params, without.params)
    logits = small_model("qmf")[0].apply({"params": state.params}, batch)[1]["probe_logits"]
    losses = [losses_of(logits[m], batch["label"]) for m in NAMES]
    near(first.baseline[:, ::-1], losses)  # row i of the batch is example 3 - i
    second, without = step(first, batch)[0], plain_step(without, batch)[0]
    gaps = jax.tree.leaves(difference(second.params, without.params))
    assert max(np.abs(gap).max() for gap in gaps) > 1e-4


def test_the_next_example_is_that_of_the_whole_batch():
    mesh, spec = make_mesh([8], ["data"]), PartitionSpec("data")
    place = jnp.arange(16, dtype=jnp.int32)

    def look(place):
        reduce = functools.partial(jax.lax.psum, axis_name="data")
        context = StepContext(*[None] * len(StepContext._fields))._replace(
            batch={"example_index": place}, reduce=reduce
        )
        return qmf.following(context, place)

    found = jax.shard_map(look, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(place)
    np.testing.assert_array_equal(found, np.roll(np.arange(16), -1))


@pytest.mark.slow
def test_umt_draws_class_tokens_to_the_teachers():
    model, state, step, batch = training("umt", "concat", umt_weight=3.0)
    teachers = jax.tree.map(lambda x: 1.5 * x, state.baseline)
    assert set(teachers) == {f"{part}_{m}" for part in ("encoder", "norm") for m in NAMES}
    state = state.replace(baseline=teachers)
    _, plain, plain_step, _ = training("", "concat")
    theirs = model.apply({"params": {**state.params, **teachers}}, batch)[1]["tokens"]

    def distance(params):
        ours = model.apply({"params": params}, batch)[1]["tokens"]
        gaps = [jnp.mean((ours[m][:, 0] - theirs[m][:, 0]) ** 2) for m in NAMES]
        return 3.0 * sum(gaps)

    wanted = jax.jit(jax.grad(distance))(state.params)
    after, without = jax.jit(step)(state, batch)[0], jax.jit(plain_step)(plain, batch)[0]
    close(difference(without.params, after.params), wanted, 5e-5)
    close(after.baseline, teachers, 0)


@pytest.mark.parametrize(
    "fields, words",
    [
        ({"model.fusion": "qmf"}, ["rolling.enabled is True", "'qmf'", "False"]),
        ({"model.fusion": "nmf"}, ["'nmf'", "qmf"]),
    ],
)
def test_dynamic_fusions_refuse_rotations(fields, words):
    config = default_config()
    config.update_from_flattened_dict(fields)
    with pytest.raises(ConfigError) as caught:
        check_config(config)
    assert all(word in str(caught.value) for word in words)


def test_a_scale_of_cosines_needs_cosines():
    encoders = {"a": {"kind": "vector"}, "b": {"kind": "vector"}}
    fields = {"num_classes": 2, "encoders": encoders, "cosine_scale": 10.0}
    assert ModelSpec.from_config(fields | {"fusion": "mmcosine"}).cosine_scale == 10
    with pytest.raises(ConfigError, match=r"cosine_scale is 10; allowed .*'attention'.*: 15"):
        ModelSpec.from_config(fields)
