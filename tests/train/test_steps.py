"""The training step: sums, rolls, NaN; and metrics against NumPy over all examples at once."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax import build_model, rolling_query
from rollingq_jax.train import steps
from rollingq_jax.train.parallel import WRAPPERS
from rollingq_jax.train.steps import (
    RollSchedule,
    add_sums,
    batch_sums,
    finish,
    flag_names,
    nonfinite_flags,
    nonfinite_names,
    select_if_finite,
    train_step,
)
from rollingq_jax.train.train_state import create_state
from rollingq_jax.train.upstream import with_last_batch_scores
from tests.parallel import small_model

BATCH_SIZE, RHO, BETA = 6, 1.5, 0.0
SCHEDULE = RollSchedule(period=4, window=2)


def batch(step, *, last=False):
    """A batch of two vectors; an example lacks the first, and the last two rows may be padding."""
    rng = np.random.default_rng(step)
    return {
        "a": rng.normal(size=(BATCH_SIZE, 5)).astype(np.float32),
        "a_mask": np.arange(BATCH_SIZE) != step % BATCH_SIZE,
        "b": rng.normal(size=(BATCH_SIZE, 3)).astype(np.float32) + 1,
        "label": rng.integers(0, 3, BATCH_SIZE).astype(np.int32),
        "example_mask": np.arange(BATCH_SIZE) < (BATCH_SIZE - 2 if last else BATCH_SIZE),
    }


def make_step(model, tx, roller, schedule, **options):
    """A compiled training step."""
    parts = {"model": model, "tx": tx, "roller": roller, "schedule": schedule}
    return jax.jit(functools.partial(train_step, **parts, **options))


@pytest.fixture(scope="module")
def parts():
    """Model, compiled step and first state."""
    encoders = {"a": {"kind": "vector"}, "b": {"kind": "vector"}}
    shape = {"dim": 8, "depth": 1, "num_heads": 2, "fusion_heads": 2, "mlp_ratio": 1.0}
    model = build_model({"num_classes": 3, "dropout": 0.2, "encoders": encoders, **shape})
    tx = optax.sgd(0.1, momentum=0.9)
    roller = rolling_query(beta=BETA, rho=RHO, max_rotations=2)
    state = create_state(model, tx, roller, seed=0, batch=batch(0))
    return model, make_step(model, tx, roller, SCHEDULE, skip_nonfinite=True), state


@pytest.fixture(scope="module")
def history(parts):
    """States before and after ten steps, and what each returned; every fourth batch is padded."""
    _, step, state = parts
    steps = []
    for k in range(10):
        given = batch(k, last=k % 4 == 3)
        after, sums, roll = step(state, given)
        steps.append((state, given, after, jax.device_get(sums), jax.device_get(roll)))
        state = after
    return steps


def test_schedule_of_observing_and_checking():
    schedule = RollSchedule.from_fraction(8, 0.25)
    assert schedule == RollSchedule(8, 2)
    assert [k for k in range(17) if schedule.in_window(k)] == [6, 7, 14, 15]
    assert [k for k in range(17) if schedule.is_due(k)] == [7, 15]
    assert RollSchedule.from_fraction(3, 0.01).window == 1
    assert RollSchedule.from_fraction(3, 1.0).window == 3


def test_rolls_only_at_the_periods_ends_and_at_most_twice(history):
    rolled = [bool(roll.info.rolled.any()) for *_, roll in history]
    assert [k for k, did in enumerate(rolled) if did] == [3, 7]
    for before, _, after, _, roll in history:
        same = np.array_equal(before.rotation, after.rotation)
        assert same != bool(roll.info.rolled.any())
    np.testing.assert_array_equal(history[-1][2].rolling.count, [2, 2])


def seen(model, state, given):
    """What a step observes, from the model alone: query [B, H, d], keys [M, B, H, d], weight."""
    rngs = {"dropout": jax.random.fold_in(state.rng, state.step)}
    variables = {"params": state.params}
    _, out = model.apply(variables, given, rotation=state.rotation, train=True, rngs=rngs)
    keys = np.stack([out["mean_keys"][m] for m in "ab"]).astype(np.float64)
    real = given["example_mask"]
    weight = np.stack([real & given["a_mask"], real]).astype(np.float64)
    return np.asarray(out["query"], np.float64), keys, weight


def cosine(x, y):
    """0 where a key is 0, which is that of a modality the example lacks."""
    norms = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return (x * y).sum(-1) / np.where(norms > 0, norms, 1)


@pytest.mark.parametrize("end", [3, 7])
def test_a_roll_uses_the_exact_weighted_sums_of_its_window(parts, history, end):
    model = parts[0]
    window = [seen(model, *history[k][:2]) for k in range(end - SCHEDULE.window + 1, end + 1)]
    total = sum(weight.sum(1) for *_, weight in window)  # [M]
    keys = sum(np.einsum("mb,mbhd->mhd", w, k) for _, k, w in window) / total[:, None, None]
    scores = sum(np.einsum("mb,mbh->mh", w, cosine(q[None], k)) for q, k, w in window)
    scores = (scores / total[:, None]).T  # [H, M]
    _, _, after, _, roll = history[end]
    np.testing.assert_allclose(roll.info.scores, scores, atol=1e-5)
    np.testing.assert_allclose(roll.info.imbalance, np.ptp(scores, axis=1), atol=1e-5)
    alpha = np.exp(-2 * RHO * scores)
    alpha /= alpha.sum(1, keepdims=True)
    np.testing.assert_allclose(roll.info.weights, alpha, atol=1e-5)
    query = model.apply(
        {"params": after.params}, history[end][0].rotation, method="class_query"
    )  # after the update, under the rotation before the roll
    np.testing.assert_allclose(roll.query, query, atol=1e-6)
    directions = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    mix = np.einsum("hm,mhd->hd", alpha, directions)
    norms = np.linalg.norm(query, axis=-1, keepdims=True)
    anchor = norms * mix / np.linalg.norm(mix, axis=-1, keepdims=True)
    np.testing.assert_allclose(roll.info.anchor, anchor, atol=1e-5)
    turned = model.apply({"params": after.params}, after.rotation, method="class_query")
    np.testing.assert_allclose(turned, roll.info.anchor, atol=1e-5)  # R_new q = q_b


def test_imbalance_before_and_after_is_that_of_the_steps_batch(parts, history):
    model = parts[0]
    before, given, _, _, roll = history[3]
    _, keys, weight = seen(model, before, given)
    for query, found in (
        (roll.query, roll.imbalance_before),
        (roll.info.anchor, roll.imbalance_after),
    ):
        scores = np.einsum("mb,mbh->mh", weight, cosine(np.asarray(query)[None, None], keys))
        scores /= weight.sum(1)[:, None]
        np.testing.assert_allclose(found, np.ptp(scores, axis=0), atol=1e-5)


def test_padding_counts_in_nothing(parts):
    """The rows that are padding may hold anything: loss, update and sums stay the same."""
    _, step, state = parts
    given = batch(3, last=True)
    other = {name: value.copy() for name, value in given.items()}
    other["a"][-2:], other["b"][-2:], other["label"][-2:] = 100.0, -7.0, 0
    first, second = step(state, given), step(state, other)
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, two, atol=1e-6)
    assert float(first[1]["weight"]) == BATCH_SIZE - 2


def test_loss_is_the_main_heads_and_each_probes(parts):
    """Checked through the gradient: that of the sum, divided by the number of real examples."""
    model, step, state = parts
    given = batch(3, last=True)

    def loss(params):
        rngs = {"dropout": jax.random.fold_in(state.rng, state.step)}
        logits, out = model.apply({"params": params}, given, state.rotation, True, rngs=rngs)
        losses = [
            optax.softmax_cross_entropy_with_integer_labels(z, given["label"])
            for z in (logits, *out["probe_logits"].values())
        ]
        return jnp.mean(sum(losses)[: BATCH_SIZE - 2])

    after, _, _ = step(state, given)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, jax.grad(loss)(state.params))
    for one, two in zip(jax.tree.leaves(after.params), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)


def test_the_rotation_turns_the_average_of_the_parameters_as_a_whole(parts):
    """Through a roll the averaged query keeps its distance to the trained one, which meets the
    anchor; and evaluation sees the average."""
    model, _, state = parts
    tx, roller = optax.sgd(0.1, momentum=0.9), rolling_query(beta=BETA, rho=RHO, max_rotations=2)
    step = make_step(model, tx, roller, SCHEDULE, skip_nonfinite=True, ema_decay=0.7)
    state, trained = state.replace(ema=jax.tree.map(jnp.zeros_like, state.params)), []

    def query(params, rotation=None):
        return model.apply({"params": params}, rotation, method="class_query")

    for k in range(4):
        state, _, roll = step(state, batch(k))
        trained.append(state.params)
    weights = 0.7 ** np.arange(3, -1, -1)
    weights /= weights.sum()
    expected = jax.tree.map(
        lambda *x: sum(w * v for w, v in zip(weights, x, strict=True)), *trained
    )
    for one, two in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    assert state.variables["params"] is state.ema and bool(roll.info.rolled.all())
    np.testing.assert_allclose(query(state.params, state.rotation), roll.info.anchor, atol=1e-5)
    gap = np.linalg.norm(query(state.ema) - query(state.params), axis=-1)
    turned = query(state.ema, state.rotation) - query(state.params, state.rotation)
    assert gap.min() > 1e-4
    np.testing.assert_allclose(np.linalg.norm(turned, axis=-1), gap, rtol=1e-3)
    skipped, _, _ = step(state, batch(4) | {"b": np.full([BATCH_SIZE, 3], np.nan, np.float32)})
    for one, two in zip(jax.tree.leaves(skipped.ema), jax.tree.leaves(state.ema), strict=True):
        np.testing.assert_array_equal(one, two)


def close(first, second, tolerance):
    """Trees of arrays; PRNG keys are left out."""
    for one, two in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        if not jax.dtypes.issubdtype(one.dtype, jax.dtypes.prng_key):
            np.testing.assert_allclose(one, two, atol=tolerance, rtol=tolerance)


def test_class_weights_are_of_the_weighted_mean(parts):
    """In the gradient; with padding, smoothed labels and rows in parts. What is told is plain."""
    model, step, state = parts
    given, weights, e = batch(3, last=True), np.array([1.0, 4.0, 0.5], np.float32), 0.1
    given["label"][:] = [0, 1, 2, 2, 1, 0]

    def loss(params):
        rngs = {"dropout": jax.random.fold_in(state.rng, state.step)}
        logits, out = model.apply({"params": params}, given, state.rotation, True, rngs=rngs)
        soft = (1 - e) * jax.nn.one_hot(given["label"], 3) + e / 3
        heads = (logits, *out["probe_logits"].values())
        losses = sum(optax.softmax_cross_entropy(z, soft) for z in heads)[: BATCH_SIZE - 2]
        return jnp.sum(losses * jnp.array([1.0, 4.0, 0.5, 0.5])) / 6.0

    weighted = make_step(
        model,
        optax.sgd(0.1, momentum=0.9),
        rolling_query(beta=BETA, rho=RHO, max_rotations=2),
        SCHEDULE,
        loss_fn=functools.partial(
            steps.supervised_loss, loss=functools.partial(steps.cross_entropy, label_smoothing=e)
        ),
        class_weights=jnp.asarray(weights),
        micro_batches=3,
    )
    after, sums, _ = weighted(state, given)
    expected = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, jax.grad(loss)(state.params))
    close(after.params, expected, 1e-6)
    plain = step(state, given)[1]
    for name in plain:
        np.testing.assert_allclose(sums[name], plain[name], rtol=1e-5, err_msg=name)


@pytest.mark.slow
def test_a_batch_in_parts_is_the_same_step():
    """With dropout, a quality bias, padding, and rolls at the fifth and tenth step."""
    step, first = small_model.step_and_state()
    whole, parted = (jax.jit(functools.partial(step, micro_batches=n)) for n in (1, 4))
    one = two = first
    for k in range(10):
        given = {name: jnp.asarray(value) for name, value in small_model.batch(k).items()}
        (one, sums, _), (two, others, _) = whole(one, given), parted(two, given)
        bound = 1e-6 if k == 0 else 1e-5
        assert not sums.pop("nonfinite").any() and not others.pop("nonfinite").any()
        count = sums["weight"]
        close(*({name: x / count for name, x in s.items()} for s in (sums, others)), bound)
        close(one.params, two.params, bound)
        for ours, theirs in zip(one.quality, two.quality, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6)
    np.testing.assert_array_equal(one.rolling.count, two.rolling.count)
    np.testing.assert_allclose(one.rolling.rotation, two.rolling.rotation, atol=1e-5)
    assert int(one.rolling.count.min()) == 2


@pytest.mark.slow
@pytest.mark.parametrize("layout", sorted(WRAPPERS))
def test_a_devices_rows_in_parts_are_the_same_step(layout):
    """Two rows on each of eight devices, one after the other."""
    step, first = small_model.step_and_state()
    ends = []
    for n in (1, 2):
        over = WRAPPERS[layout](functools.partial(step, micro_batches=n), steps.eval_step)
        state = over.put_state(jax.tree.map(jnp.copy, first))
        state, sums, _ = over.train_step(state, over.put_batch(small_model.batch(4)))  # padded
        ends.append(over.get((state.params, state.opt_state, state.rolling.key_sum, sums)))
    close(*ends, 1e-6)


def test_parts_of_a_batch_need_less_memory():
    def losses_of(params, state, batch, axis_name):
        x = batch["x"]
        for _ in range(6):
            x = jnp.tanh(x @ params)
        return x.sum(-1), steps.ForwardPass(x[:, :2], {}, x[:, 0], (), {})

    state = SimpleNamespace(params=jnp.ones([64, 64]) / 64)
    given, weight = {"x": jnp.ones([1024, 64])}, jnp.ones([1024])

    def program(n):
        gradient = functools.partial(steps.loss_and_gradient, micro_batches=n)
        return jax.jit(lambda p, b, w: gradient(losses_of, SimpleNamespace(params=p), b, w))

    compiled = [program(n).lower(state.params, given, weight).compile() for n in (1, 8)]
    one, eight = (c.memory_analysis().temp_size_in_bytes for c in compiled)
    assert eight < 0.4 * one
    close(*(c(state.params, given, weight) for c in compiled), 1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_skipped_step_changes_the_step_number_alone(parts, history, value):
    _, step, _ = parts
    before = history[7][0]  # its step lies in a window and checks the trigger
    given = batch(7)
    given["b"][2, 2] = value  # an example that has both
    after, sums, roll = step(before, given)
    assert int(after.step) == int(before.step) + 1
    for name in ("params", "opt_state"):
        ours, theirs = (jax.tree.leaves(getattr(state, name)) for state in (after, before))
        for one, two in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(one, two)
    names = nonfinite_names(sums["nonfinite"], flag_names(before.params))
    assert names[0] == "loss" and "gradient of encoder_b/embed/kernel" in names
    assert "gradient of encoder_a/embed/kernel" in names  # through the fusion's softmax
    assert not any(np.asarray(sums[name]).any() for name in sums if name != "nonfinite")
    # The roll that is due comes from the rest of the window.
    window = before.rolling
    scores = (window.cosine_sum / window.weight_sum[:, None]).T
    np.testing.assert_allclose(roll.info.scores, scores, atol=1e-6)
    assert bool(roll.info.rolled.all()) and np.isfinite(after.rotation).all()


def test_a_modality_that_the_bad_example_lacks_has_a_good_gradient(parts, history):
    _, step, _ = parts
    before, given = history[7][0], batch(7)
    assert not given["a_mask"][1]
    given["b"][1, 2] = np.nan
    _, sums, _ = step(before, given)
    names = nonfinite_names(sums["nonfinite"], flag_names(before.params))
    assert "gradient of encoder_b/embed/kernel" in names
    assert not any(name.startswith("gradient of encoder_a") for name in names)


def test_flags_are_off_where_all_is_finite(history):
    assert not any(sums["nonfinite"].any() for _, _, _, sums, _ in history)


def test_without_skipping_a_step_is_the_same_but_for_bad_numbers(parts, history):
    model, _, _ = parts
    tx, roller = optax.sgd(0.1, momentum=0.9), rolling_query(beta=BETA, rho=RHO, max_rotations=2)
    step = make_step(model, tx, roller, SCHEDULE)
    before, given, after, sums, _ = history[7]
    found, found_sums, _ = step(before, given)
    for one, two in zip(jax.tree.leaves(found.params), jax.tree.leaves(after.params), strict=True):
        np.testing.assert_allclose(one, two, atol=1e-6)
    np.testing.assert_allclose(found_sums["loss"], sums["loss"], rtol=1e-6)
    assert not found_sums["nonfinite"].any()
    given = given | {"b": given["b"] * np.float32(np.nan)}
    found, found_sums, _ = step(before, given)
    assert found_sums["nonfinite"].any()  # for the host to see before it saves


def test_one_flag_for_the_loss_and_one_for_each_leaf():
    gradient = {"x": {"y": jnp.array([1.0, jnp.inf])}, "z": jnp.array(3.0)}
    flags = nonfinite_flags(jnp.array(2.0), gradient)
    assert flags.tolist() == [False, True, False]
    assert nonfinite_names(flags, flag_names(gradient)) == ["gradient of x/y"]


def test_counts_move_on_where_arrays_do_not():
    new = {"count": jnp.array(4), "trace": jnp.array(jnp.nan)}
    old = {"count": jnp.array(3), "trace": jnp.array(1.0)}
    kept = select_if_finite(jnp.array(False), new, old)
    assert int(kept["count"]) == 4 and float(kept["trace"]) == 1.0
    taken = select_if_finite(jnp.array(True), new | {"trace": jnp.array(2.0)}, old)
    assert float(taken["trace"]) == 2.0


@pytest.mark.parametrize("last_batch_scores", [False, True])
def test_a_modality_that_a_window_lacks_triggers_nothing(parts, last_batch_scores):
    """Its score of 0 would be an imbalance of its own, far above beta."""
    model, _, state = parts
    tx, roller = optax.sgd(0.1, momentum=0.9), rolling_query(beta=BETA, rho=RHO)
    if last_batch_scores:
        roller = with_last_batch_scores(roller)
    step = make_step(model, tx, roller, RollSchedule(period=1, window=1))
    given = batch(0) | {"a_mask": np.zeros(BATCH_SIZE, bool)}
    after, sums, roll = step(state, given)
    assert not roll.info.rolled.any() and not (roll.info.imbalance > 0).any()
    np.testing.assert_array_equal(after.rotation, state.rotation)
    assert all(np.isfinite(x).all() for x in after.rolling)
    assert np.isnan(roll.imbalance_before).all() and float(sums["attended/a"]) == 0.0


CLASSES, HEADS, WIDTH = 3, 2, 4


def outputs(count, seed=0):
    """What a model returns for `count` examples, and their labels; some lack a modality."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    share = rng.uniform(size=(count, HEADS)).astype(np.float32)
    out = {
        "probe_logits": {m: normal(count, CLASSES) for m in "ab"},
        "present": {"a": np.arange(count) % 4 != 0, "b": np.ones(count, bool)},
        "query": normal(count, HEADS, WIDTH),
        "mean_keys": {m: normal(count, HEADS, WIDTH) for m in "ab"},
        "attention_share": {"a": share, "b": 1 - share},
    }
    label = rng.integers(0, CLASSES, count).astype(np.int32)
    return normal(count, CLASSES), out, {"label": label}


def take(tree, rows):
    if isinstance(tree, dict):
        return {name: take(value, rows) for name, value in tree.items()}
    return jnp.asarray(tree[rows])


def padded(tree, size):
    """Rows up to `size`, of NaN where the dtype has it."""
    if isinstance(tree, dict):
        return {name: padded(value, size) for name, value in tree.items()}
    extra = np.full((size - len(tree), *tree.shape[1:]), np.nan if tree.dtype.kind == "f" else 0)
    return np.concatenate([tree, extra.astype(tree.dtype)])


def in_batches(logits, out, batch, size):
    """Means over batches of `size`, the last of them padded."""
    sums = {}
    for begin in range(0, len(logits), size):
        rows = slice(begin, begin + size)
        count = len(logits[rows])
        part = [padded(take_numpy(tree, rows), size) for tree in (logits, out, batch)]
        part[2]["example_mask"] = np.arange(size) < count
        sums = add_sums(sums, batch_sums(*(take(tree, slice(None)) for tree in part)))
    return finish(sums)


def take_numpy(tree, rows):
    if isinstance(tree, dict):
        return {name: take_numpy(value, rows) for name, value in tree.items()}
    return tree[rows]


def cross_entropy(logits, label):
    shifted = logits - logits.max(-1, keepdims=True)
    log_softmax = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return -log_softmax[np.arange(len(label)), label]


def test_an_evaluation_says_what_uniform_attention_would_give():
    """By hand: a vector has its class token and one more, a text that and as many as are real."""
    encoders = {"a": {"kind": "vector"}, "b": {"kind": "tokens", "vocab_size": 9}}
    model = build_model({"num_classes": 3, "dim": 8, "depth": 0, "encoders": encoders})
    text = np.array([[1, 2, 3, 4], [5, 0, 0, 0], [6, 7, 0, 0], [0, 0, 0, 0]])
    batch = {"a": np.ones((4, 5), np.float32), "b": text, "label": np.zeros(4, np.int32)}
    batch["example_mask"] = np.array([True, True, False, True])  # the third row is padding
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    evaluate = jax.jit(functools.partial(steps.eval_step, model=model))
    sums, examples = evaluate(variables, None, batch)
    even = [[2 / 7, 5 / 7], [2 / 4, 2 / 4], [2 / 5, 3 / 5], [1.0, 0.0]]
    np.testing.assert_allclose(examples["uniform_share"], even, rtol=1e-6)
    row = finish(sums)
    np.testing.assert_allclose(row["uniform_share/a"], (2 / 7 + 2 / 4 + 1) / 3, rtol=1e-6)
    np.testing.assert_allclose(row["uniform_share/b"], (5 / 7 + 2 / 4) / 2, rtol=1e-6)
    keys = [np.asarray(examples[f"mean_keys/{m}"]) for m in "ab"]
    keys = [keys[0][[0, 1, 3]], keys[1][:2]]  # of those that have the modality
    spread = [np.sum(np.var(np.float64(k), axis=0)) for k in keys]
    gap = np.linalg.norm(keys[0].mean(0) - keys[1].mean(0)) / np.sqrt(np.mean(spread))
    np.testing.assert_allclose(row["key_gap"], gap, rtol=1e-4)


def test_the_gap_of_keys_is_in_units_of_their_spread():
    means = np.array([[[0.0, 0.0], [1, 1]], [[3, 4], [1, 1]], [[3, 4], [1, 1]]])  # [M, H, d]
    squares = np.sum(means**2, axis=-1) + np.array([[4.0, 0.0], [4, 0], [0, 0]])
    np.testing.assert_allclose(steps.key_gap(means[:2], squares[:2]), [5 / 2, np.nan])
    third = (5 / 2 + 5 / np.sqrt(2) + 0) / 3  # the mean over three pairs
    np.testing.assert_allclose(steps.key_gap(means, squares)[0], third)


@pytest.mark.parametrize("size", [10, 4, 3])
def test_means_do_not_depend_on_how_the_data_are_batched(size):
    logits, out, batch = outputs(10)
    row = in_batches(logits, out, batch, size)
    label = batch["label"]
    np.testing.assert_allclose(row["loss"], cross_entropy(logits, label).mean(), rtol=1e-6)
    np.testing.assert_allclose(row["accuracy"], np.mean(logits.argmax(-1) == label), rtol=1e-6)
    cosines = {}
    for m in "ab":
        probe, has = out["probe_logits"][m], out["present"][m]
        expected = cross_entropy(probe, label)[has].mean()
        np.testing.assert_allclose(row[f"probe_loss/{m}"], expected, rtol=1e-6)
        expected = np.mean((probe.argmax(-1) == label)[has])
        np.testing.assert_allclose(row[f"probe_accuracy/{m}"], expected, rtol=1e-6)
        share = out["attention_share"][m][has].mean()
        np.testing.assert_allclose(row[f"attention_share/{m}"], share, rtol=1e-6)
        q, k = out["query"], out["mean_keys"][m]
        cosine = (q * k).sum(-1) / np.linalg.norm(q, axis=-1) / np.linalg.norm(k, axis=-1)
        cosines[m] = cosine[has].mean(0)  # [H], over the examples that have the modality
        np.testing.assert_allclose(row[f"cosine/{m}"], cosines[m].mean(), rtol=1e-5)
    difference = cosines["a"] - cosines["b"]
    np.testing.assert_allclose(row["imbalance"], np.abs(difference).mean(), rtol=1e-5)
    np.testing.assert_allclose(row["air"], difference.mean(), rtol=1e-5)
    assert row["examples/a"] == 7 and "examples/b" not in row and "nonfinite" not in row


def test_three_modalities_have_an_imbalance_and_no_air():
    sums = {"weight": 2.0, "cosine/a": [1.0, 0.0], "cosine/b": [0.5, 0.2], "cosine/c": [0.0, 1.0]}
    row = finish(sums | {f"weight/{m}": 2.0 for m in "abc"})
    assert row["imbalance"] == pytest.approx((0.5 + 0.5) / 2) and "air" not in row


def test_means_over_no_example_are_nan():
    row = finish({"weight": 0.0, "loss": 0.0, "skipped": 3.0})
    assert np.isnan(row["loss"]) and row["skipped"] == 3


def test_sums_that_only_one_has_stay():
    total = add_sums({"a": 1.0}, {"a": np.float32(2.0), "b": np.ones(2, np.float32)})
    assert total["a"] == 3.0 and total["b"].tolist() == [1.0, 1.0]
    assert total["b"].dtype == np.float64


def test_what_no_example_has_is_nan_and_not_part_of_the_imbalance():
    logits, out, batch = outputs(10)
    out["present"]["b"][:] = False
    row = in_batches(logits, out, batch, 4)
    for name in ("probe_accuracy/b", "probe_loss/b", "cosine/b", "attention_share/b"):
        assert np.isnan(row[name])
    assert np.isnan(row["imbalance"]) and np.isnan(row["air"])  # of one modality alone
    assert row["examples/b"] == 0 and np.isfinite(row["cosine/a"])
    sums = {"weight": 2.0, "cosine/a": [1.0], "cosine/b": [0.25], "cosine/c": [0.0]}
    row = finish(sums | {"weight/a": 2.0, "weight/b": 1.0, "weight/c": 0.0})
    assert row["imbalance"] == pytest.approx(1 / 2 - 1 / 4) and np.isnan(row["cosine/c"])


def test_an_example_that_lacks_everything_counts_in_the_accuracy_alone():
    logits, out, batch = outputs(8)
    out["present"] = {m: np.arange(8) > 0 for m in "ab"}
    batch["label"] = logits.argmax(-1).astype(np.int32)
    first = in_batches(logits, out, batch, 8)
    assert first["accuracy"] == 1.0
    out["probe_logits"]["a"][0] += 50.0
    out["attention_share"]["a"][0] = 0.9
    batch["label"][0] = (batch["label"][0] + 1) % CLASSES
    second = in_batches(logits, out, batch, 8)
    assert second["accuracy"] == 7 / 8
    for name in first:
        if name.partition("/")[0] not in ("accuracy", "loss"):
            assert first[name] == second[name]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_never_right(value):
    """NaN's argmax is class 0, which would make every example of that class right."""
    logits, out, batch = outputs(10)
    batch["label"][:] = 0
    logits[:, 0] = 3.0
    logits[3], logits[5, 1] = value, value
    out["probe_logits"]["b"][:, 0], out["probe_logits"]["b"][7] = 9.0, value
    out["attention_share"]["a"][3] = np.nan
    row = in_batches(logits, out, batch, 4)
    finite = np.array([i not in (3, 5) for i in range(10)])
    assert row["accuracy"] == 0.8 and row["nonfinite"] == 2
    expected = cross_entropy(logits[finite], batch["label"][finite]).mean()
    np.testing.assert_allclose(row["loss"], expected, rtol=1e-6)
    assert row["probe_accuracy/b"] == 0.9 and row["nonfinite/b"] == 1
    assert np.isfinite([v for v in row.values()]).all()
    share = out["attention_share"]["a"][finite & out["present"]["a"]].mean()
    np.testing.assert_allclose(row["attention_share/a"], share, rtol=1e-6)


def test_what_a_corruption_could_not_drop_is_counted():
    logits, out, batch = outputs(10)
    kept = np.arange(10) % 3 == 0
    row = in_batches(logits, out, batch | {"kept/a": kept}, 4)
    assert row["kept/a"] == 4


def test_smoothed_labels_are_optaxs():
    rng = np.random.default_rng(0)
    logits, label = rng.normal(size=(5, 4)).astype(np.float32), np.arange(5) % 4
    soft = optax.smooth_labels(jnp.eye(4)[label], 0.1)
    expected = optax.softmax_cross_entropy(logits, soft)
    found = steps.cross_entropy(jnp.asarray(logits), jnp.asarray(label, jnp.int32), 0.1)
    np.testing.assert_allclose(found, expected, rtol=1e-6)
