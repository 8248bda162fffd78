"""The methods of comparison in a training step, one SGD step of rate 1 against gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax.baselines.build import BUILDERS, build_baseline
from rollingq_jax.baselines.hooks import encoder_part
from rollingq_jax.baselines.mmpareto import pareto_gradient
from rollingq_jax.errors import ConfigError
from rollingq_jax.models import ModelSpec
from rollingq_jax.train.config import default_config
from rollingq_jax.train.parallel import WRAPPERS
from rollingq_jax.train.steps import RollSchedule, eval_step, supervised_loss, with_baseline
from tests.baselines.baseline_cases import NAMES, small_model, training


def cross_entropy(logits, label):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], axis=1))


def losses(model, params, batch, *, joint=0.0):
    """The loss written out, with the probes' own and, times `joint`, their gradient to x_m."""
    logits, out = model.apply({"params": params}, batch)
    total = cross_entropy(logits, batch["label"])
    for m in NAMES:
        head, token = params[f"probe_{m}"], out["tokens"][m][:, 0]
        still = jax.lax.stop_gradient
        total += cross_entropy(still(token) @ head["kernel"] + head["bias"][None], batch["label"])
        fixed = still(head["kernel"]), still(head["bias"])[None]
        total += joint * cross_entropy(token @ fixed[0] + fixed[1], batch["label"])
    return total


def difference(first, second):
    return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), first, second)


def close(first, second, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=tolerance), first, second)


def test_ogm_takes_its_scale_from_the_logits_of_the_batch():
    model, state, step, batch = training("ogm", ogm_alpha=0.4)
    after, _, _ = jax.jit(step)(state, batch)
    gradient = jax.jit(jax.grad(lambda p: losses(model, p, batch)))(state.params)
    _, out = model.apply({"params": state.params}, batch)
    head = state.params["fusion"]["head"]
    scores = []
    for i, m in enumerate(NAMES):
        z = out["tokens"][m][:, 0] @ head["kernel"][8 * i : 8 * i + 8] + head["bias"][None] / 2
        scores.append(float(sum(jax.nn.softmax(z)[b, y] for b, y in enumerate(batch["label"]))))
    scales = [1 - np.tanh(0.4 * s / min(scores)) if s > min(scores) else 1.0 for s in scores]
    assert sorted(scales)[0] < 0.7 and sorted(scales)[1] == 1
    for m, scale in zip(NAMES, scales, strict=True):
        gradient[f"encoder_{m}"] = jax.tree.map(
            lambda g, scale=scale: scale * g if g.ndim > 1 else g, gradient[f"encoder_{m}"]
        )
    close(difference(state.params, after.params), gradient)


def test_joint_sends_the_unimodal_losses_to_the_encoders():
    model, state, step, batch = training("joint", "attention", joint_weight=0.5)
    state = state.replace(rolling=None)
    model = model.clone(spec=model.spec)
    gradient = jax.jit(jax.grad(lambda p: losses(model, p, batch, joint=0.5)))(state.params)
    plain = jax.jit(jax.grad(lambda p: losses(model, p, batch)))(state.params)
    after, _, _ = jax.jit(step)(state, batch)
    got = difference(state.params, after.params)
    # The fusion's dropout is random, and not in the loss above: the heads of the probes tell.
    close({m: got[f"probe_{m}"] for m in NAMES}, {m: plain[f"probe_{m}"] for m in NAMES})
    _, state, step, _ = training("", "attention")
    without, _, _ = jax.jit(step)(state, batch)
    gap = difference(
        difference(state.params, after.params), difference(state.params, without.params)
    )
    wanted = difference(gradient, plain)
    close({m: gap[f"encoder_{m}"] for m in NAMES}, {m: wanted[f"encoder_{m}"] for m in NAMES})


def test_prototypes_come_with_the_first_epochs_end_and_pull_from_then_on():
    model, state, step, batch = training("pmr", pmr_momentum=0.0)
    _, plain_state, plain_step, _ = training("")
    step, plain_step = jax.jit(step), jax.jit(plain_step)
    for _ in range(2):
        before = state
        state, plain_state = step(state, batch)[0], plain_step(plain_state, batch)[0]
        close(state.params, plain_state.params)
    _, out = model.apply({"params": before.params}, batch)
    label = np.asarray(batch["label"])
    for i, m in enumerate(NAMES):
        tokens = np.asarray(out["tokens"][m][:, 0])
        means = np.stack([tokens[label == c].mean(0) for c in range(3)])
        np.testing.assert_allclose(state.baseline.prototype[i], means, atol=1e-5)
    after, without = step(state, batch)[0], plain_step(plain_state, batch)[0]
    gaps = [
        max(np.abs(x).max() for x in jax.tree.leaves(difference(
            after.params[f"encoder_{m}"], without.params[f"encoder_{m}"]
        )))
        for m in NAMES
    ]  # fmt: skip
    assert min(gaps) < 1e-5 < 1e-3 < max(gaps)  # one modality alone, the weak one


@pytest.mark.slow
@pytest.mark.parametrize("name", ["joint", "modality_dropout"])
def test_a_batch_may_come_in_parts(name):
    """Of four examples in two parts; what compares over the batch says that it may not."""
    _, state, step, batch = training(name, drop_rate=0.5)
    ends = [jax.jit(functools.partial(step, micro_batches=n))(state, batch) for n in (1, 2)]
    close(ends[0][0].params, ends[1][0].params, tolerance=1e-6)
    close(ends[0][1], ends[1][1], tolerance=1e-5)


def test_mmpareto_gets_the_unimodal_gradient_apart():
    model, state, step, batch = training("mmpareto", mmpareto_gamma=1.5)

    def gradient(joint):
        return jax.grad(lambda p: losses(model, p, batch, joint=joint))(state.params)

    joint, both = jax.jit(lambda: (gradient(0.0), gradient(1.0)))()
    alone = difference(both, joint)
    after, sums, _ = jax.jit(step)(state, batch)
    got = difference(state.params, after.params)
    assert not np.any(sums["nonfinite"])
    for m in NAMES:
        both |= pareto_gradient(encoder_part(joint, m), encoder_part(alone, m), 1.5)
    close(got, both)


@pytest.fixture(scope="module")
def rolled():
    """A model with attention fusion, its state, step and batch."""
    return training("", "attention")


@pytest.mark.parametrize("name", sorted(set(BUILDERS) - {"", "ogm", "ogm_ge", "qmf"}))
def test_a_step_under_attention_that_rolls_keeps_the_form_of_the_state(rolled, name):
    model, state, step, batch = rolled
    config = default_config().baseline
    config.name = name
    baseline = build_baseline(config, model.spec, 2, 20)
    tx = optax.chain(baseline.transform or optax.identity(), optax.sgd(1.0))
    state = state.replace(opt_state=tx.init(state.params), baseline=baseline.init(state.params, 4))
    loss_fn = with_baseline(supervised_loss, baseline)
    step = functools.partial(step, tx=tx, loss_fn=loss_fn, schedule=RollSchedule(1, 1))
    after, _, record = jax.eval_shape(step, state, batch)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    assert form(after) == form(state) and record is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ogm_ge", "pmr", "modality_dropout", "mmpareto", "agm", "arl", "inforeg", "qmf"]
)
def test_the_layout_over_devices_changes_nothing(name):
    ends, fusion = [], "qmf" if name == "qmf" else "concat"
    for layout in ("jit", "pmap"):
        model, state, step, batch = training(name, fusion, size=16, epoch_steps=1, drop_rate=0.5)
        parallel = WRAPPERS[layout](step, functools.partial(eval_step, model=model))
        state = parallel.put_state(state)
        for _ in range(2):
            state, _, _ = parallel.train_step(state, parallel.put_batch(batch))
        state = parallel.get(state)
        ends.append(jax.device_get((state.params, state.baseline)))
    close(*ends, tolerance=1e-4)


@pytest.mark.parametrize(
    "name, fusion, words",
    [
        ("ogm", "attention", ["'ogm'", "'attention'", "concat, sum"]),
        ("ogm_ge", "film", ["'ogm_ge'", "'film'"]),
        ("qmf", "attention", ["'qmf'", "'attention'"]),
        ("umt", "mbt", ["'umt'", "'mbt'"]),
        ("pmr", "unimodal", ["'pmr'", "one modality"]),
    ],
)
def test_a_method_that_does_not_fit_the_fusion_is_refused(name, fusion, words):
    fields = {"modality": "audio"} if fusion == "unimodal" else {}
    model, _, _ = small_model(fusion, **fields)
    config = default_config().baseline
    config.name = name
    with pytest.raises(ConfigError) as caught:
        build_baseline(config, model.spec, 2, 4)
    for word in words:
        assert word in str(caught.value)


def test_teachers_have_no_running_averages():
    config = default_config().baseline
    config.name = "umt"
    encoders = {"a": {"kind": "resnet18"}, "b": {"kind": "vector"}}
    spec = ModelSpec.from_config({"num_classes": 2, "fusion": "concat", "encoders": encoders})
    with pytest.raises(ConfigError, match="an encoder is of kind 'resnet18', whose running"):
        build_baseline(config, spec, 2, 4)
