"""The method against its definition in NumPy, hand values, the paper's forms and edge cases."""

import functools
import math

import chex
import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import rollingq_jax as rq

M, B, H, D = 3, 7, 2, 6

# Programs that the tests share: thresholds are traced, so that each shape is compiled once.
cosine_scores, weights_of, anchor_of = map(
    jax.jit, (rq.cosine_scores, rq.rebalance_weights, rq.rebalance_anchor)
)
observe = jax.jit(rq.rolling_query().observe)


@functools.partial(jax.jit, static_argnames=("joint", "layers", "roll_layers"))
def update(state, query=None, when=True, beta=0.0, rho=1.0, max_rotations=1, **options):
    return rq.rolling_query(beta, rho, max_rotations, **options).update(state, query, when=when)


def new_state(num_modalities=M, dim=D, num_heads=H):
    return rq.rolling_query().init(num_modalities, dim, num_heads)


def batch(seed=0, size=B):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(size, H, D)) + 1.0
    mean_keys = rng.normal(size=(M, size, H, D)) + np.arange(M)[:, None, None, None]
    return query.astype(np.float32), mean_keys.astype(np.float32)


def observed(seed=0):
    return observe(new_state(), *batch(seed))


# ----- scores, weights and anchor


def test_cosine_scores_by_hand():
    query = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    keys = jnp.array([[[3.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [1.0, 1.0]]])
    np.testing.assert_allclose(cosine_scores(query, keys), [1.0, np.sqrt(0.5) / 2], rtol=1e-6)
    weighted = cosine_scores(query, keys, jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(weighted, [1.0, np.sqrt(0.5)], rtol=1e-6)
    air = jax.jit(rq.attention_imbalance_rate)(query, keys[0], keys[1])
    np.testing.assert_allclose(air, 1.0 - np.sqrt(0.5) / 2, rtol=1e-6)


def test_no_direction_has_cosine_zero_and_finite_gradient():
    query, keys = jnp.zeros([2, 2]), jnp.ones([2, 2, 2])
    np.testing.assert_array_equal(cosine_scores(query, keys), [0.0, 0.0])
    gradient = jax.jit(jax.grad(lambda q: rq.cosine_scores(q, keys).sum()))(query)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_cosine_zero(value):
    query, keys = np.array([[1.0, 0.0], [value, 0.0]], np.float32), np.ones([2, 2, 2], np.float32)
    np.testing.assert_allclose(cosine_scores(query, keys), np.full(2, np.sqrt(0.125)), rtol=1e-6)
    keys[1, 0, 1] = value
    np.testing.assert_allclose(cosine_scores(query, keys), [np.sqrt(0.125), 0.0], rtol=1e-6)


@pytest.mark.parametrize("weight", [None, np.ones(0, np.float32)])
def test_a_batch_without_samples_scores_zero(weight):
    query, keys = jnp.ones([0, 3]), jnp.ones([2, 0, 3])
    np.testing.assert_array_equal(cosine_scores(query, keys, weight), [0.0, 0.0])
    assert rq.attention_imbalance_rate(query, *keys) == 0.0


@pytest.mark.parametrize("rho", [0.0, 0.3, 1.0, 5.0])
def test_weights_are_the_papers_tanh_for_two_modalities(rho):
    scores = jnp.array([0.7, -0.1])
    first = (1 - np.tanh(rho * 0.8)) / 2
    np.testing.assert_allclose(weights_of(scores, rho), [first, 1 - first], atol=1e-6)
    assert float(rq.imbalance(scores)) == pytest.approx(0.8, abs=1e-6)


def test_weights_of_three_modalities_sum_to_one_and_favor_the_neglected():
    weights = weights_of(jnp.array([0.5, -0.5, 0.0]), 2.0)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-6)
    assert weights[1] > weights[2] > weights[0]
    np.testing.assert_allclose(weights_of(jnp.arange(3.0), 0.0), np.full(3, 1 / 3), rtol=1e-6)


def test_anchor_by_hand():
    anchor = anchor_of(
        jnp.array([0.0, 3.0]), jnp.array([[4.0, 0.0], [0.0, 0.1]]), jnp.array([0.5, 0.5])
    )
    np.testing.assert_allclose(anchor, np.array([3.0, 3.0]) / np.sqrt(2), rtol=1e-6)


anchor_gradients = jax.jit(jax.jacobian(rq.rebalance_anchor, (0, 1, 2)))


@pytest.mark.parametrize(
    ("query", "keys", "weights"),
    [
        ([1.0, 2.0], [[1.0, 0.3], [-1.0, -0.3]], [0.5, 0.5]),  # opposite keys
        ([1.0, 2.0], [[0.0, 0.0], [1.0, 0.0]], [0.5, 0.5]),  # a zero mean key
        ([1.0, 2.0], [[1e-13, 0.0], [1.0, 0.0]], [0.5, 0.5]),
        ([0.0, 0.0], [[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),  # a zero query
    ],
)
def test_degenerate_anchor_returns_the_query(query, keys, weights):
    query, keys, weights = (np.array(x, np.float32) for x in (query, keys, weights))
    np.testing.assert_array_equal(anchor_of(query, keys, weights), query)
    for gradient in anchor_gradients(query, keys, weights):
        assert np.isfinite(gradient).all()


def test_gradient_of_everything_together_and_heads_by_vmap(float64):
    query = np.random.default_rng(0).normal(size=(5, 4))
    keys = np.random.default_rng(1).normal(size=(3, 5, 4))

    def total(query, keys):
        scores = rq.cosine_scores(query, keys)
        weights = rq.rebalance_weights(scores, 1.0)
        anchor = rq.rebalance_anchor(query.mean(0), keys.mean(1), weights)
        return rq.rotation_between(query.mean(0), anchor).sum() + rq.imbalance(scores)

    with float64:
        check_grads(jax.jit(total), (jnp.asarray(query), jnp.asarray(keys)), 1, modes=["rev"])
    query, keys = query.astype(np.float32), keys.astype(np.float32)
    heads = jax.jit(jax.vmap(rq.cosine_scores, (1, 2)))(
        np.stack([query] * 2, 1), np.stack([keys] * 2, 2)
    )
    np.testing.assert_allclose(heads, np.stack([cosine_scores(query, keys)] * 2), rtol=1e-6)


# ----- observing and updating


def expected_statistics(query, mean_keys, weight):
    """Scores [H, M] and mean keys [H, M, D] from their definitions, float64."""
    query, mean_keys = np.asarray(query, np.float64), np.asarray(mean_keys, np.float64)
    cosine = (query[None] * mean_keys).sum(-1)
    cosine /= np.linalg.norm(query, axis=-1)[None] * np.linalg.norm(mean_keys, axis=-1)
    weight = np.broadcast_to(weight, mean_keys.shape[:2]).astype(np.float64)
    total = weight.sum(1)[:, None]
    scores = (weight[..., None] * cosine).sum(1) / total
    means = (weight[..., None, None] * mean_keys).sum(1) / total[..., None]
    return scores.T, means.transpose(1, 0, 2)


@pytest.mark.parametrize("weight", [None, "per example", "per modality"])
def test_update_uses_exact_weighted_sums_over_batches(weight):
    if weight == "per example":
        weight = np.array([1, 1, 0, 1, 0, 1, 1], np.float32)
    elif weight == "per modality":
        weight = (np.random.default_rng(9).random((M, B)) < 0.6).astype(np.float32)
    state, batches = new_state(), [batch(seed) for seed in range(3)]
    for query, mean_keys in batches:
        state = observe(state, query, mean_keys, weight)
    queries, keys = zip(*batches, strict=True)
    weights = np.tile(np.broadcast_to(1.0 if weight is None else weight, (M, B)), 3)
    scores, means = expected_statistics(
        np.concatenate(queries), np.concatenate(keys, axis=1), weights
    )
    now = queries[0][0]
    rolled, info = update(state, now)
    np.testing.assert_allclose(info.scores, scores, atol=1e-6)
    np.testing.assert_allclose(info.imbalance, scores.max(1) - scores.min(1), atol=1e-6)
    alpha = np.exp(-2 * scores) / np.exp(-2 * scores).sum(1, keepdims=True)
    np.testing.assert_allclose(info.weights, alpha, atol=1e-6)
    u = (alpha[..., None] * means / np.linalg.norm(means, axis=-1, keepdims=True)).sum(1)
    norm = np.linalg.norm(now, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        info.anchor, norm * u / np.linalg.norm(u, axis=-1, keepdims=True), atol=1e-5
    )
    turned = np.einsum("hij,hj->hi", rolled.rotation, now)
    np.testing.assert_allclose(turned, info.anchor, atol=1e-5)
    cosine = (now * info.anchor).sum(-1) / norm[:, 0] ** 2
    np.testing.assert_allclose(np.cos(info.angle), cosine, atol=1e-6)
    np.testing.assert_array_equal(rolled.count, [1, 1])
    for total in rolled[2:]:
        assert not np.asarray(total).any()


def test_zero_weight_hides_even_nan():
    query, mean_keys = batch()
    weight = np.ones(B, np.float32)
    weight[2] = 0.0
    clean = observe(new_state(), query, mean_keys, weight)
    query[2], mean_keys[:, 2] = np.nan, np.nan
    chex.assert_trees_all_equal(observe(new_state(), query, mean_keys, weight), clean)


def test_a_check_that_is_not_due_changes_no_bit():
    state, query = observed(), batch()[0][0]
    rolled, info = update(state, query)
    assert info.rolled.all()
    chex.assert_trees_all_equal(jax.jit(rq.rolling_query(rho=1.0).update)(state, query)[0], rolled)
    same, info = update(state, query, when=False)
    chex.assert_trees_all_equal(same, state)
    assert not info.rolled.any() and not info.reorthogonalized.any()


def layered(*imbalanced):
    """Query [H, 2] and keys [2, 1, H, 2] whose heads have imbalance 1 or 0."""
    query = np.tile(np.array([[1.0, 0.0]], np.float32), (len(imbalanced), 1))
    second = [[[0.0, 1.0] if is_so else [1.0, 0.0] for is_so in imbalanced]]
    return query, np.stack([query[None], np.array(second, np.float32)])


def rolled_heads(rows, **options):
    """Which of six heads roll at each check, their imbalance, and the last state."""
    state, rolled, found = new_state(2, 2, 6), [], []
    for imbalanced in rows:
        query, keys = layered(*imbalanced)
        state, info = update(observe(state, query, keys), query, **options)
        rolled.append(np.flatnonzero(info.rolled).tolist())
        found.append(info.imbalance)
        assert not np.any(state.key_sum)  # what was seen above a layer that rolled is gone
    return rolled, np.array(found), state


def test_heads_trigger_and_count_on_their_own():
    rows = [(1, 0, 0, 1, 0, 0)] * 3
    rolled, found, state = rolled_heads(rows, beta=0.5, max_rotations=2)
    assert rolled == [[0, 3], [0, 3], []]
    np.testing.assert_allclose(found, rows, atol=1e-6)
    np.testing.assert_array_equal(state.count, [2, 0, 0, 2, 0, 0])
    np.testing.assert_array_equal(state.rotation[1], np.eye(2))


def test_layers_roll_one_after_the_other():
    """Three layers of two heads: only the lowest layer with a head that is due rolls."""
    rows = [(0, 0, 1, 0, 1, 1)] * 3 + [(0, 1, 0, 0, 0, 1)] * 2
    rolled, found, state = rolled_heads(rows, beta=0.4, layers=3)
    assert rolled == [[2], [4, 5], [], [1], []]
    np.testing.assert_allclose(found, rows, atol=1e-6)
    np.testing.assert_array_equal(state.count, [0, 1, 1, 0, 1, 1])
    turned = [bool(np.any(r != np.eye(2))) for r in np.asarray(state.rotation)]
    assert turned == [False, True, True, False, True, True]


@pytest.mark.parametrize(
    ("roll_layers", "want"),
    [("all", [[0, 2, 4], [0, 2, 4], []]), ((0, 2), [[0, 4], [0, 4], []])],
)
def test_layers_roll_all_at_once_or_only_those_that_are_named(roll_layers, want):
    rows = [(1, 0, 1, 0, 1, 0)] * 3
    options = {"max_rotations": 2, "layers": 3}
    rolled, _, _ = rolled_heads(rows, roll_layers=roll_layers, **options)
    assert rolled == want


def test_joint_heads_are_those_of_a_layer():
    rolled, found, _ = rolled_heads([(0, 0, 1, 0, 1, 1)] * 3, beta=0.4, joint=True, layers=3)
    assert rolled == [[2, 3], [4, 5], []]
    np.testing.assert_allclose(found, [[0, 0, 0.5, 0.5, 1, 1]] * 3, atol=1e-6)


def test_joint_heads_of_one_layer_decide_together():
    rolled, found, _ = rolled_heads([(1, 0, 0, 1, 0, 1)], beta=0.4, joint=True)
    assert rolled == [[0, 1, 2, 3, 4, 5]]
    np.testing.assert_allclose(found, np.full((1, 6), 0.5), atol=1e-6)


def test_layers_divide_the_heads():
    roller = rq.rolling_query(layers=2)
    assert len(roller.init(M, D).count) == 2
    with pytest.raises(rq.UserError, match="num_heads is 3; allowed: a multiple of layers, .* 2"):
        roller.init(M, D, 3)


def test_rotations_compose_up_to_the_maximum():
    state, query = new_state(), batch()[0][0]
    between = jax.jit(rq.rotation_between)
    for seed in range(4):
        before = np.asarray(state.rotation)
        rotated = np.einsum("hij,hj->hi", before, query)
        state, info = update(
            observe(state, np.broadcast_to(rotated, (B, H, D)), batch(seed)[1]),
            rotated,
            rho=3.0,
            max_rotations=2,
        )
        if seed < 2:
            np.testing.assert_allclose(
                state.rotation, between(rotated, info.anchor) @ before, atol=1e-5
            )
        else:
            np.testing.assert_array_equal(state.rotation, before)
            assert not np.asarray(info.rolled).any()
    np.testing.assert_array_equal(state.count, [2, 2])


@pytest.mark.parametrize(("limit", "counts"), [(0, 0), (2, 2), (None, 5)])
def test_rotations_up_to_the_limit_or_without_end(limit, counts):
    """The query is turned away between the checks, so every one of the five finds it due."""
    state = new_state(2, 2, 1)
    keys = np.array([[[[1.0, 0.0]]], [[[0.0, 1.0]]]], np.float32)
    for i in range(5):
        query = np.array([[1.0, 0.1 * i]], np.float32)
        state, info = update(observe(state, query, keys), query, max_rotations=limit)
        assert bool(info.rolled[0]) == (limit is None or i < limit)
    assert state.count.tolist() == [counts]


@pytest.mark.parametrize(
    "what", ["nothing", "absent modality", "opposite keys", "zero query", "nan", "inf"]
)
def test_degenerate_statistics_never_roll(what):
    state, query = new_state(2, 2, 1), np.array([[1.0, 0.5]], np.float32)
    keys = np.array([[[[1.0, 0.3]]], [[[0.0, 1.0]]]], np.float32)
    weight = np.ones([2, 1], np.float32)
    if what == "absent modality":
        weight[1] = 0.0
    elif what == "opposite keys":
        keys[1] = -keys[0]
    elif what == "zero query":
        query = np.zeros_like(query)
    elif what in ("nan", "inf"):
        keys[0, 0, 0, 0] = float(what)
    if what != "nothing":
        state = observe(state, query, keys, weight)
    state, info = update(state, query, rho=0.0)
    assert not bool(info.rolled[0])
    np.testing.assert_array_equal(state.rotation[0], np.eye(2))
    np.testing.assert_array_equal(state.count, [0])


def test_without_a_query_the_observed_mean_is_rolled_halfway_at_rho_zero():
    query, keys = layered(1)
    state = observe(new_state(2, 2, 1), 2.0 * query, keys)
    _, info = jax.jit(rq.rolling_query().update)(state)
    np.testing.assert_allclose(info.anchor, [[2**0.5, 2**0.5]], atol=1e-6)
    np.testing.assert_allclose(info.angle, [np.pi / 4], atol=1e-6)


# ----- under JAX's transformations


def test_inside_scan_and_vmap_without_recompiling():
    roller = rq.rolling_query(beta=0.0, rho=1.0, max_rotations=3)
    query, mean_keys = batch()

    @chex.assert_max_traces(n=1)
    def step(state, i):
        state = roller.observe(state, rq.rotate(state.rotation, query), mean_keys)
        return roller.update(state, when=i % 2 == 1)[0], state.count

    scanned, counts = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(8)))(new_state())
    np.testing.assert_array_equal(counts[:, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    looped = new_state()
    for i in range(8):
        rotated = np.einsum("hij,bhj->bhi", looped.rotation, query)
        looped = observe(looped, rotated, mean_keys)
        looped, _ = update(looped, when=i % 2 == 1, max_rotations=3)
    np.testing.assert_allclose(scanned.rotation, looped.rotation, atol=1e-5)
    many = jax.tree.map(lambda x: np.stack([x] * 4), new_state())
    queries = np.stack([query * (i + 1.0) for i in range(4)])
    stepped = jax.jit(jax.vmap(lambda s, q: roller.update(roller.observe(s, q, mean_keys))[0]))(
        many, queries
    )
    np.testing.assert_array_equal(stepped.count, np.ones([4, H]))
    with pytest.raises(AssertionError, match="traced"):
        jax.eval_shape(step, new_state(), jnp.array(0))
        jax.eval_shape(step, new_state(), jnp.array(0.0))


def test_a_grid_of_thresholds_in_one_program_gives_the_separate_results():
    state, query = observed(), batch()[0][0]
    betas, rhos = np.linspace(0.0, 1.2, 5, dtype=np.float32), np.linspace(0, 4, 5, dtype=np.float32)

    @chex.assert_max_traces(n=1)
    def rolled(beta, rho):
        return rq.rolling_query(beta, rho).update(state, query)

    grid = jax.jit(jax.vmap(jax.vmap(rolled, (None, 0)), (0, None)))(betas, rhos)
    single = [[update(state, query, beta=b, rho=r) for r in rhos] for b in betas]
    want = [jax.tree.map(lambda *x: np.stack(x), *row) for row in single]
    want = jax.tree.map(lambda *x: np.stack(x), *want)
    chex.assert_trees_all_close(grid, want, atol=1e-6)
    assert 0 < grid[1].rolled.sum() < grid[1].rolled.size


def test_a_schedule_is_a_roller_made_inside_the_step():
    query, keys = layered(1)
    schedule = optax.linear_schedule(2.0, 0.0, transition_steps=8)

    def step(state, i):
        roller = rq.rolling_query(beta=schedule(i), max_rotations=i)
        state, info = roller.update(roller.observe(state, query, keys), query)
        return state, info.rolled[0]

    _, rolled = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(8)))(new_state(2, 2, 1))
    assert np.flatnonzero(rolled).tolist() == [5, 6, 7]  # from the step on at which beta is below 1


def test_sums_over_an_axis_are_those_of_the_whole_batch():
    query, mean_keys = batch(size=16)
    whole = observe(new_state(), query, mean_keys)
    share = functools.partial(rq.rolling_query().observe, new_state(), axis_name="data")
    parts = jax.jit(jax.vmap(share, in_axes=(0, 1), axis_name="data"))(
        query.reshape(8, 2, H, D), mean_keys.reshape(M, 8, 2, H, D)
    )
    for part, want in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part[0], want, atol=1e-5)
        np.testing.assert_array_equal(part, np.broadcast_to(part[0], part.shape))


def test_no_gradient_flows_through_the_state():
    roller = rq.rolling_query(rho=1.0)
    query, mean_keys = batch()

    def through(query):
        state = roller.observe(new_state(), query, mean_keys)
        return roller.update(state, query[0])[0].rotation.sum()

    assert not np.asarray(jax.jit(jax.grad(through))(query)).any()


def test_float64_is_observed_and_rolled_in_float32(float64):
    """With 64-bit types a loop goes on, and rolls as it does without them."""
    query, mean_keys = batch()
    state, want = update(observed(), query[0])

    def step(query, mean_keys):
        roller = rq.rolling_query(rho=1.0)
        return roller.update(roller.observe(new_state(), query, mean_keys), query[0])

    with float64:
        wide_query, wide_keys = query.astype(np.float64), mean_keys.astype(np.float64)
        for arguments in ((wide_query, mean_keys), (query, wide_keys), (wide_query, wide_keys)):
            shapes = jax.eval_shape(step, *arguments)
            assert [x.dtype for x in jax.tree.leaves(shapes)] == [
                x.dtype for x in jax.tree.leaves((state, want))
            ]
        rolled, info = jax.jit(step)(wide_query, wide_keys)
    np.testing.assert_allclose(rolled.rotation, state.rotation, atol=1e-6)
    np.testing.assert_allclose(info.anchor, want.anchor, atol=1e-5)
    np.testing.assert_array_equal(rolled.count, [1, 1])


# ----- names, and states from a checkpoint

NAMES = ("visual", "audio", "text")  # in an order of their own
named = rq.rolling_query(rho=1.0, modalities=NAMES)


def test_names_bring_keys_and_weights_into_the_order_of_the_state():
    query, mean_keys = batch()
    weight = (np.arange(M * B).reshape(M, B) % 3).astype(np.float32)
    want = observe(new_state(), query, mean_keys, weight)
    keys, weights = ({m: x[NAMES.index(m)] for m in sorted(NAMES)} for x in (mean_keys, weight))
    got = jax.jit(named.observe)(named.init(dim=D, num_heads=H), query, keys, weights)
    chex.assert_trees_all_equal(got, want)
    scalars = jax.jit(lambda state: named.update(state)[1].scalars())(got)
    info = update(want)[1]
    assert scalars["cosine/audio"] == pytest.approx(float(info.scores[:, 1].mean()), abs=1e-6)
    assert scalars["imbalance/head_1"] == pytest.approx(float(info.imbalance[1]), abs=1e-6)
    assert int(scalars["rolled"]) == 2 and all(np.shape(x) == () for x in scalars.values())
    assert info.scalars().keys() == {
        n.replace("visual", "0").replace("audio", "1").replace("text", "2") for n in scalars
    }


@pytest.mark.parametrize(
    ("keys", "weight", "says"),
    [
        ("array", None, r"mean_keys is one array \(3, 7, 2, 6\) and .* mapping with visual, audio"),
        ("lacking", None, "mean_keys has audio, visual; allowed: visual, audio, text"),
        ("named", np.ones((M, B), np.float32), "weight is one array .*; allowed: a mapping with"),
        ("named", {"audio": np.ones(B)}, "weight has audio; allowed: visual, audio, text"),
        ("short", None, r"mean_keys\['text'\] has shape \(6, 2, 6\); allowed: .* with B = 7"),
    ],
)
def test_other_names_and_arrays_without_names_are_refused(keys, weight, says):
    query, mean_keys = batch()
    by_name = dict(zip(NAMES, mean_keys, strict=True))
    given = {
        "array": mean_keys,
        "named": by_name,
        "lacking": {m: by_name[m] for m in ("audio", "visual")},
        "short": by_name | {"text": by_name["text"][:6]},
    }[keys]
    with pytest.raises(rq.UserError, match=says):
        named.observe(new_state(), query, given, weight)


def test_mappings_without_names_are_taken_in_alphabetical_order():
    query, mean_keys = batch()
    got = observe(new_state(), query, dict(zip("bca", mean_keys[[1, 2, 0]], strict=True)))
    chex.assert_trees_all_equal(got, observe(new_state(), query, mean_keys))
    with pytest.raises(rq.UserError, match="mean_keys has a, b; allowed: 3 modalities"):
        rq.rolling_query().observe(new_state(), query, {"a": mean_keys[0], "b": mean_keys[1]})


@pytest.mark.parametrize("form", [lambda state: dict(state._asdict()), list, tuple])
def test_what_a_checkpoint_library_gives_back_is_a_state(form):
    state = observed()
    plain = form(jax.tree.map(np.asarray, state))
    chex.assert_trees_all_equal(update(plain), update(state))
    chex.assert_trees_all_equal(observe(plain, *batch()), observe(state, *batch()))
    with pytest.raises(rq.UserError, match="state is a dict with rotation; allowed: .* by name or"):
        rq.rolling_query().update({"rotation": state.rotation})


# ----- mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"beta": -0.1}, "beta is -0.1; allowed: 0 or more"),
        ({"beta": np.ones(2)}, "beta is .*; allowed: 0 or more"),
        ({"rho": math.nan}, "rho is nan"),
        ({"rho": np.float32(math.inf)}, "rho is .*inf.*; allowed: 0 or more, and finite"),
        ({"max_rotations": -1}, "max_rotations is -1; allowed: 0 or more, or None for no limit"),
        ({"layers": 0}, "layers is 0; allowed: an integer >= 1"),
        ({"layers": 2, "roll_layers": (0, 2)}, "roll_layers is .0, 2.; .* numbers .* from 0 to 1"),
        ({"roll_layers": "some"}, "roll_layers is 'some'; allowed: 'lowest first', 'all', or"),
        ({"modalities": ("audio",)}, "modalities is .*; allowed: two or more names"),
        ({"modalities": "audio"}, "modalities is 'audio'; allowed: two or more names"),
        ({"method": "qr"}, "method is 'qr'; allowed: geodesic, svd"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(rq.UserError, match=says):
        rq.rolling_query(**arguments)


def test_bad_sizes():
    with pytest.raises(rq.UserError, match="num_modalities is 1; allowed: an integer >= 2"):
        rq.rolling_query().init(1, 4)
    with pytest.raises(rq.UserError, match="num_modalities is 2; allowed: 3, for visual, audio"):
        named.init(2, 4)


@pytest.mark.parametrize("made", ["replicate", "stacked"])
def test_a_state_with_a_leading_axis_is_refused_with_its_shapes(made):
    state, roller = observed(), rq.rolling_query()
    if made == "replicate":
        many = flax.jax_utils.replicate(state)
    else:
        many = jax.tree.map(lambda x: np.stack([x] * 5), state)
    size = len(many.weight_sum)
    shapes = rf"rotation \({size}, {H}, {D}, {D}\), .*query_weight \({size},\); allowed: a state wi"
    words = (
        "leading axis that `flax.jax_utils.replicate`, pmap or vmap gives: call this inside pmap"
    )
    for call in (lambda: roller.update(many), lambda: roller.observe(many, *batch())):
        with pytest.raises(rq.UserError, match=f"state has the shapes {shapes}.*{words}"):
            call()
    jax.eval_shape(jax.vmap(roller.update), many)  # inside vmap it is a state like any other


def test_a_state_whose_arrays_do_not_fit_together_is_refused():
    state = new_state()
    other = state._replace(rotation=state.rotation[:1])
    with pytest.raises(
        rq.UserError, match=r"state has the shapes rotation \(1, 6, 6\).* unchanged"
    ):
        rq.rolling_query().update(other)


def test_info_has_its_former_name_too():
    info = rq.RollInfo(*range(7))
    assert info.mended is info.reorthogonalized
