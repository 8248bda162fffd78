"""The (init, observe, update) transformation against its definition, in NumPy."""

import flax.jax_utils
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rollingq_jax as rq

M, B, H, D = 3, 7, 2, 6


def batch(seed=0, size=B):
    keys = jax.random.split(jax.random.key(seed))
    query = jax.random.normal(keys[0], (size, H, D)) + jnp.ones((size, H, D))
    mean_keys = jax.random.normal(keys[1], (M, size, H, D))
    return query, mean_keys + jnp.arange(M, dtype=jnp.float32)[:, None, None, None]


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


@pytest.mark.parametrize("weight", [None, np.array([1, 1, 0, 1, 0, 1, 1.0]), "per modality"])
def test_update_uses_exact_weighted_sums_over_batches(weight):
    if isinstance(weight, str):
        weight = np.array(jax.random.bernoulli(jax.random.key(9), 0.6, (M, B)), np.float32)
    roller = rq.rolling_query(beta=0.0, rho=1.0, max_rotations=1)
    state = roller.init(num_modalities=M, dim=D, num_heads=H)
    queries, keys, weights = [], [], []
    for seed in range(3):
        query, mean_keys = batch(seed)
        state = roller.observe(
            state, query, mean_keys, None if weight is None else jnp.array(weight, jnp.float32)
        )
        queries.append(query), keys.append(mean_keys)
        weights.append(np.broadcast_to(1.0 if weight is None else weight, (M, B)))
    scores, means = expected_statistics(
        np.concatenate(queries), np.concatenate(keys, axis=1), np.concatenate(weights, axis=1)
    )
    now = queries[0][0]
    rolled, info = roller.update(state, now)
    np.testing.assert_allclose(info.scores, scores, atol=1e-6)
    np.testing.assert_allclose(info.imbalance, scores.max(1) - scores.min(1), atol=1e-6)
    alpha = np.exp(-2 * scores) / np.exp(-2 * scores).sum(1, keepdims=True)
    np.testing.assert_allclose(info.weights, alpha, atol=1e-6)
    u = (alpha[..., None] * means / np.linalg.norm(means, axis=-1, keepdims=True)).sum(1)
    norm = np.linalg.norm(now, axis=-1, keepdims=True)
    np.testing.assert_allclose(
        info.anchor, norm * u / np.linalg.norm(u, axis=-1, keepdims=True), atol=1e-5
    )
    np.testing.assert_allclose(rq.rotate(rolled.rotation, now), info.anchor, atol=1e-5)
    cosine = (now * info.anchor).sum(-1) / norm[:, 0] ** 2
    np.testing.assert_allclose(np.cos(info.angle), cosine, atol=1e-6)
    np.testing.assert_array_equal(rolled.count, [1, 1])
    for total in rolled[2:]:
        assert not np.asarray(total).any()


def test_zero_weight_hides_even_nan():
    roller = rq.rolling_query()
    query, mean_keys = batch()
    weight = jnp.ones(B).at[2].set(0.0)
    spoiled = roller.observe(
        roller.init(M, D, H), query.at[2].set(jnp.nan), mean_keys.at[:, 2].set(jnp.nan), weight
    )
    clean = roller.observe(roller.init(M, D, H), query, mean_keys, weight)
    for got, want in zip(spoiled, clean, strict=True):
        np.testing.assert_array_equal(got, want)


def test_heads_trigger_and_count_on_their_own():
    roller = rq.rolling_query(beta=0.5, rho=1.0, max_rotations=2)
    query = jnp.array([[1.0, 0.0], [1.0, 1.0]])
    mean_keys = jnp.array([[[[1.0, 0.0], [1.0, 0.0]]], [[[0.0, 1.0], [0.0, 1.0]]]])
    state = roller.observe(roller.init(2, 2, 2), query, mean_keys)
    state, info = roller.update(state)  # the observed mean query
    np.testing.assert_allclose(info.imbalance, [1.0, 0.0], atol=1e-6)
    np.testing.assert_array_equal(info.rolled, [True, False])
    np.testing.assert_array_equal(state.count, [1, 0])
    np.testing.assert_array_equal(state.rotation[1], np.eye(2))
    joint = rq.rolling_query(beta=0.4, rho=1.0, joint=True)
    _, together = joint.update(joint.observe(joint.init(2, 2, 2), query, mean_keys), query)
    np.testing.assert_array_equal(together.rolled, [True, True])
    np.testing.assert_allclose(together.imbalance, [0.5, 0.5], atol=1e-6)


def layered(*imbalanced):
    """Query [H, 2] and keys [2, 1, H, 2] whose heads have imbalance 1 or 0."""
    query = jnp.tile(jnp.array([[1.0, 0.0]]), (len(imbalanced), 1))
    second = [[[0.0, 1.0] if is_so else [1.0, 0.0] for is_so in imbalanced]]
    return query, jnp.stack([query[None], jnp.array(second)])


def test_layers_roll_one_after_the_other():
    """Three layers of two heads: only the lowest layer with a head that is due rolls."""
    roller = rq.rolling_query(beta=0.4, rho=1.0, max_rotations=1, layers=3)
    state = roller.init(num_modalities=2, dim=2, num_heads=6)
    rolled = []
    for imbalanced in [(0, 0, 1, 0, 1, 1)] * 3 + [(0, 1, 0, 0, 0, 1)] * 2:
        query, keys = layered(*imbalanced)
        state, info = roller.update(roller.observe(state, query, keys), query)
        np.testing.assert_allclose(info.imbalance, imbalanced, atol=1e-6)
        rolled.append(np.flatnonzero(info.rolled).tolist())
        assert not np.any(state.key_sum)  # what was seen above a layer that rolled is gone
    assert rolled == [[2], [4, 5], [], [1], []]
    np.testing.assert_array_equal(state.count, [0, 1, 1, 0, 1, 1])
    turned = [bool(np.any(r != np.eye(2))) for r in np.asarray(state.rotation)]
    assert turned == [False, True, True, False, True, True]


def test_joint_heads_are_those_of_a_layer():
    roller = rq.rolling_query(beta=0.4, rho=1.0, joint=True, layers=3)
    state = roller.init(num_modalities=2, dim=2, num_heads=6)
    rolled = []
    for _ in range(3):
        query, keys = layered(0, 0, 1, 0, 1, 1)
        state, info = roller.update(roller.observe(state, query, keys), query)
        np.testing.assert_allclose(info.imbalance, [0, 0, 0.5, 0.5, 1, 1], atol=1e-6)
        rolled.append(np.flatnonzero(info.rolled).tolist())
    assert rolled == [[2, 3], [4, 5], []]


@pytest.mark.parametrize("joint", [False, True])
def test_one_layer_is_the_default(joint):
    query, mean_keys = batch()
    found = []
    for options in ({}, {"layers": 1}):
        roller = rq.rolling_query(rho=2.0, joint=joint, **options)
        state = roller.observe(roller.init(M, D, H), query, mean_keys)
        found.append(roller.update(state, query[0]))
    jax.tree.map(np.testing.assert_array_equal, *found)


def test_layers_divide_the_heads():
    roller = rq.rolling_query(layers=2)
    assert len(roller.init(M, D).count) == 2
    with pytest.raises(ValueError, match="num_heads is 3; allowed: a multiple of layers, .* 2"):
        roller.init(M, D, 3)


def test_rotations_compose_up_to_the_maximum():
    roller = rq.rolling_query(beta=0.0, rho=3.0, max_rotations=2)
    state, query = roller.init(M, D, H), batch()[0][0]
    for seed in range(4):
        before = state.rotation
        rotated = rq.rotate(before, query)
        state, info = roller.update(roller.observe(state, rotated, batch(seed)[1]), rotated)
        if seed < 2:
            step = rq.rotation_between(rotated, info.anchor)
            np.testing.assert_allclose(state.rotation, step @ before, atol=1e-5)
        else:
            np.testing.assert_array_equal(state.rotation, before)
            assert not np.asarray(info.rolled).any()
    np.testing.assert_array_equal(state.count, [2, 2])


@pytest.mark.parametrize(
    "what", ["nothing", "absent modality", "opposite keys", "zero query", "nan", "inf"]
)
def test_degenerate_statistics_never_roll(what):
    roller = rq.rolling_query()
    state, query = roller.init(2, 2, 1), jnp.array([[1.0, 0.5]])
    keys = jnp.array([[[[1.0, 0.3]]], [[[0.0, 1.0]]]])
    weight = jnp.ones([2, 1])
    if what == "absent modality":
        weight = weight.at[1].set(0.0)
    elif what == "opposite keys":
        keys = keys.at[1].set(-keys[0])
    elif what == "zero query":
        query = jnp.zeros_like(query)
    elif what in ("nan", "inf"):
        keys = keys.at[0, 0, 0, 0].set(float(what))
    if what != "nothing":
        state = roller.observe(state, query, keys, weight)
    state, info = roller.update(state, query)
    assert not bool(info.rolled[0])
    np.testing.assert_array_equal(state.rotation[0], np.eye(2))
    np.testing.assert_array_equal(state.count, [0])


def test_inside_scan_and_vmap_without_recompiling():
    roller = rq.rolling_query(beta=0.0, rho=1.0, max_rotations=3)
    query, mean_keys = batch()
    traces = []

    def step(state, i):
        traces.append(i)
        state = roller.observe(state, rq.rotate(state.rotation, query), mean_keys)
        return jax.lax.cond(
            i % 2 == 1, lambda s: roller.update(s)[0], lambda s: s, state
        ), state.count

    scanned, counts = jax.jit(lambda s: jax.lax.scan(step, s, jnp.arange(8)))(roller.init(M, D, H))
    np.testing.assert_array_equal(counts[:, 0], [0, 0, 1, 1, 2, 2, 3, 3])
    assert len(traces) == 1
    looped = roller.init(M, D, H)
    for i in range(8):
        looped, _ = step(looped, i)
    np.testing.assert_allclose(scanned.rotation, looped.rotation, atol=1e-5)
    states = jax.vmap(lambda _: roller.init(M, D, H))(jnp.arange(4))
    stepped = jax.vmap(lambda s, q: roller.update(roller.observe(s, q, mean_keys))[0])(
        states, jnp.stack([query * (i + 1.0) for i in range(4)])
    )
    np.testing.assert_array_equal(stepped.count, np.ones([4, H]))


def test_a_check_that_is_not_due_changes_no_bit():
    roller = rq.rolling_query(rho=1.0)
    query, mean_keys = batch()
    state = roller.observe(roller.init(M, D, H), query, mean_keys)
    update = jax.jit(roller.update)
    rolled, info = update(state, query[0], when=jnp.array(True))
    jax.tree.map(np.testing.assert_array_equal, (rolled, info), update(state, query[0]))
    assert info.rolled.all()
    same, info = update(state, query[0], when=jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, same, state)
    assert not info.rolled.any() and not info.mended.any()
    with pytest.raises(rq.UserError, match="when has dtype int32; allowed: bool"):
        roller.update(state, when=jnp.array(1))
    with pytest.raises(rq.UserError, match=r"when has shape \(2,\); allowed: \[\]"):
        roller.update(state, when=jnp.ones(2, bool))


def test_sums_over_devices_are_those_of_the_whole_batch():
    roller = rq.rolling_query()
    query, mean_keys = batch(size=16)
    state = roller.init(M, D, H)
    whole = roller.observe(state, query, mean_keys)
    parts = jax.pmap(
        lambda q, k: roller.observe(state, q, k, axis_name="data"), axis_name="data", in_axes=(0, 1)
    )(query.reshape(8, 2, H, D), mean_keys.reshape(M, 8, 2, H, D))
    for part, want in zip(parts, whole, strict=True):
        np.testing.assert_allclose(part[0], want, atol=1e-5)
        for device in range(1, 8):
            np.testing.assert_array_equal(part[device], part[0])


def test_no_gradient_flows_through_the_state():
    roller = rq.rolling_query(rho=1.0)
    query, mean_keys = batch()

    def through(query):
        state = roller.observe(roller.init(M, D, H), query, mean_keys)
        return roller.update(state, query[0])[0].rotation.sum()

    assert not np.asarray(jax.grad(through)(query)).any()


@pytest.mark.parametrize("wide", ["query", "keys", "both"])
def test_float64_is_observed_and_rolled_in_float32(wide, float64):
    """With 64-bit types a loop goes on, and rolls as it does without them."""
    roller = rq.rolling_query(rho=1.0)
    query, mean_keys = (np.asarray(x) for x in batch())
    state, want = roller.update(roller.observe(roller.init(M, D, H), query, mean_keys), query[0])
    with float64:
        wide_query = query.astype(np.float64) if wide != "keys" else query
        wide_keys = jnp.asarray(mean_keys, jnp.float64 if wide != "query" else jnp.float32)

        def step(state, _):
            return roller.observe(state, wide_query, wide_keys), None

        seen = jax.jit(lambda s: jax.lax.scan(step, s, None, length=3)[0])(roller.init(M, D, H))
        rolled, info = roller.update(seen, wide_query[0])
        for got in (seen, rolled):
            assert [x.dtype for x in got] == [x.dtype for x in state]
        assert [x.dtype for x in info] == [x.dtype for x in want]
    np.testing.assert_allclose(rolled.rotation, state.rotation, atol=1e-6)
    np.testing.assert_allclose(info.anchor, want.anchor, atol=1e-5)


@pytest.mark.parametrize(("limit", "counts"), [(0, 0), (2, 2), (None, 7)])
def test_rotations_up_to_the_limit_or_without_end(limit, counts):
    """The query is turned away between the checks, so every one of the seven finds it due."""
    roller = rq.rolling_query(max_rotations=limit)
    state = roller.init(num_modalities=2, dim=2)
    keys = jnp.array([[[[1.0, 0.0]]], [[[0.0, 1.0]]]])
    for i in range(7):
        query = jnp.array([[1.0, 0.1 * i]])
        state, info = jax.jit(roller.update)(roller.observe(state, query, keys), query)
        assert bool(info.rolled[0]) == (limit is None or i < limit)
    assert state.count.tolist() == [counts]


def test_rho_is_zero_by_default_so_the_anchor_lies_halfway():
    roller = rq.rolling_query()
    query, keys = jnp.array([[2.0, 0.0]]), jnp.array([[[[3.0, 0.0]]], [[[0.0, 1.0]]]])
    state = roller.observe(roller.init(num_modalities=2, dim=2), query, keys)
    _, info = roller.update(state, query)
    np.testing.assert_allclose(info.anchor, [[2**0.5, 2**0.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"beta": -0.1}, "beta is -0.1; allowed: 0 or more"),
        ({"rho": float("nan")}, "rho is nan"),
        ({"max_rotations": -1}, "max_rotations is -1; allowed: 0 or more, or None for no limit"),
        ({"layers": 0}, "layers is 0; allowed: an integer >= 1"),
        ({"method": "qr"}, "method is 'qr'; allowed: geodesic, svd"),
    ],
)
def test_bad_arguments(arguments, says):
    with pytest.raises(ValueError, match=says):
        rq.rolling_query(**arguments)


def test_bad_sizes():
    with pytest.raises(ValueError, match="num_modalities is 1; allowed: an integer >= 2"):
        rq.rolling_query().init(1, 4)


@pytest.mark.parametrize("made", ["replicate", "stacked"])
def test_a_state_with_a_leading_axis_is_refused_with_its_shapes(made):
    roller = rq.rolling_query()
    query, mean_keys = batch()
    state = roller.observe(roller.init(M, D, H), query, mean_keys)
    if made == "replicate":
        many = flax.jax_utils.replicate(state)
    else:
        many = jax.tree.map(lambda *x: jnp.stack(x), *[state] * 5)
    size = len(many.weight_sum)
    shapes = rf"rotation \({size}, {H}, {D}, {D}\), .*query_weight \({size},\); allowed: a state wi"
    words = (
        "leading axis that `flax.jax_utils.replicate`, pmap or vmap gives: call this inside pmap"
    )
    for call in (lambda: roller.update(many), lambda: roller.observe(many, query, mean_keys)):
        with pytest.raises(rq.UserError, match=f"state has the shapes {shapes}.*{words}"):
            call()
    inside = jax.vmap(lambda s: roller.update(s)[0].rotation)(many)
    outside = roller.update(state)[0].rotation
    np.testing.assert_allclose(inside, np.stack([outside] * size), atol=1e-6)


def test_a_state_whose_arrays_do_not_fit_together_is_refused():
    state = rq.rolling_query().init(M, D, H)
    other = state._replace(rotation=state.rotation[:1])
    with pytest.raises(
        rq.UserError, match=r"state has the shapes rotation \(1, 6, 6\).* unchanged"
    ):
        rq.rolling_query().update(other)
