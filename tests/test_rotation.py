"""Rotations: where they send vectors, orthogonality, degenerate inputs, gradients, folding."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

import rollingq_jax as rq
from rollingq_jax.rotation import orthogonality_error, orthonormalize, rotate, rotation_between

ANGLES = [0.0, 1e-3, 45.0, 90.0, 135.0, 175.0, 179.0, 179.9, 179.95, 179.99, 179.999, 180.0]


def pair(angle, dim, seed=0):
    """Two float32 vectors of unlike norms at `angle` degrees, and their float64 directions."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=dim)
    x /= np.linalg.norm(x)
    z = rng.normal(size=dim)
    z -= (z @ x) * x
    z /= np.linalg.norm(z)
    y = np.cos(np.deg2rad(angle)) * x + np.sin(np.deg2rad(angle)) * z
    source, target = (7.3 * x).astype(np.float32), (0.31 * y).astype(np.float32)
    directions = [
        v.astype(np.float64) / np.linalg.norm(v.astype(np.float64)) for v in (source, target)
    ]
    return source, target, *directions


@pytest.mark.parametrize("angle", ANGLES)
def test_sends_source_to_target_at_full_width(angle):
    source, target, x, y = pair(angle, 768)
    rotation = np.asarray(rotation_between(source, target), np.float64)
    assert np.abs(rotation @ x - y).max() < 2e-6
    assert np.abs(rotation.T @ rotation - np.eye(768)).max() < 2e-6
    sign, logdet = np.linalg.slogdet(rotation)
    assert sign == 1 and abs(logdet) < 1e-4


@pytest.mark.parametrize("dim", [2, 3, 24])
@pytest.mark.parametrize("angle", ANGLES)
def test_moves_nothing_off_the_plane(angle, dim):
    source, target, x, y = pair(angle, dim, seed=3)
    rotation = np.asarray(rotation_between(source, target), np.float64)
    assert np.abs(rotation @ x - y).max() < 3e-6
    # A rotation of one plane has trace d - 2 + 2 cos(angle).
    assert np.trace(rotation) == pytest.approx(dim - 2 + 2 * x @ y, abs=1e-5)
    if dim > 2 and 0.01 < angle < 179.5:
        off = np.random.default_rng(1).normal(size=dim)
        basis = np.linalg.qr(np.stack([x, y], axis=1))[0]
        off -= basis @ (basis.T @ off)
        assert np.abs(rotation @ off - off).max() < 1e-5


def test_hand_values():
    quarter = rotation_between(jnp.array([2.0, 0.0]), jnp.array([0.0, 5.0]))
    np.testing.assert_allclose(quarter, [[0, -1], [1, 0]], atol=1e-6)
    # 180 degrees: z is the basis vector of the smallest component, here the second.
    half = rotation_between(jnp.array([1.0, 0.0, 0.0]), jnp.array([-1.0, 0.0, 0.0]))
    np.testing.assert_allclose(half, np.diag([-1.0, -1.0, 1.0]), atol=1e-6)


def test_geodesic_is_continuous_through_a_right_angle_and_near_180():
    for angle, step in ((90.0, 1e-3), (179.0, 1e-3)):
        below = rotation_between(*pair(angle - step, 24)[:2])
        above = rotation_between(*pair(angle + step, 24)[:2])
        assert np.abs(np.asarray(below) - np.asarray(above)).max() < 1e-4


@pytest.mark.parametrize("method", ["geodesic", "svd"])
@pytest.mark.parametrize("degenerate", [0.0, 1e-13, 1e-38])
def test_no_direction_gives_the_identity(method, degenerate):
    short, other = jnp.full([4], degenerate), jnp.arange(1.0, 5.0)
    for source, target in ((short, other), (other, short), (short, short)):
        np.testing.assert_array_equal(rotation_between(source, target, method), np.eye(4))


@pytest.mark.parametrize("method", ["geodesic", "svd"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_has_no_direction(method, value):
    spoiled, other = jnp.array([value, 0.0, 1.0]), jnp.arange(1.0, 4.0)
    for source, target in ((spoiled, other), (other, spoiled)):
        np.testing.assert_array_equal(rotation_between(source, target, method), np.eye(3))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        (np.zeros(4), np.ones(4)),
        (np.ones(4), np.zeros(4)),
        (np.ones(4), np.ones(4)),
        (np.ones(4), -np.ones(4)),
        (np.array([1.0, 0, 0, 0]), np.array([0, 1.0, 0, 0])),
        (np.full(4, 1e-30), np.ones(4)),
        (np.full(4, 1e30), np.full(4, -1e25)),
    ],
)
def test_no_nan_in_value_or_gradient(source, target):
    source, target = source.astype(np.float32), target.astype(np.float32)
    assert np.isfinite(rotation_between(source, target)).all()
    for argument in (0, 1):
        assert np.isfinite(jax.jacobian(rotation_between, argument)(source, target)).all()


@pytest.mark.parametrize("angle", [30.0, 120.0])
def test_gradient_against_differences(angle, float64):
    source, target, _, _ = pair(angle, 3)
    with float64:
        source, target = jnp.asarray(source, jnp.float64), jnp.asarray(target, jnp.float64)
        check_grads(rotation_between, (source, target), order=1, modes=["rev"])


def test_svd_is_a_rotation_at_full_width_whatever_the_sign_of_the_factors():
    for seed in range(4):
        source, target, x, y = pair(70.0, 768, seed)
        rotation = np.asarray(rotation_between(source, target, method="svd"), np.float64)
        assert np.abs(rotation @ x - y).max() < 2e-5
        assert np.linalg.slogdet(rotation)[0] == 1


def test_leading_axes_and_dtypes():
    source = jax.random.normal(jax.random.key(0), (5, 2, 6))
    target = jax.random.normal(jax.random.key(1), (2, 6))
    rotation = rotation_between(source, target)
    assert rotation.shape == (5, 2, 6, 6)
    np.testing.assert_allclose(rotation[3, 1], rotation_between(source[3, 1], target[1]), atol=1e-6)
    assert rotation_between(source.astype(jnp.bfloat16), target).dtype == jnp.float32
    np.testing.assert_allclose(
        jnp.linalg.norm(rotate(rotation, source), axis=-1),
        jnp.linalg.norm(source, axis=-1),
        rtol=1e-5,
    )
    assert rotate(rotation[0], source.astype(jnp.bfloat16)).dtype == jnp.bfloat16
    expected = np.einsum("hij,bhj->bhi", rotation[0], source)
    np.testing.assert_allclose(rotate(rotation[0], source), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, bool])
def test_an_integer_query_is_not_truncated(dtype):
    half_a_right_angle = rotation_between(jnp.array([1.0, 0.0]), jnp.array([1.0, 1.0]))
    rotated = rotate(half_a_right_angle, np.array([1, 0], dtype))
    assert rotated.dtype == jnp.float32
    np.testing.assert_allclose(rotated, [np.sqrt(0.5), np.sqrt(0.5)], rtol=1e-6)


@pytest.mark.filterwarnings("error")
def test_a_float64_query_of_numpy_is_taken_as_jax_takes_it():
    assert rotate(jnp.eye(2), np.ones(2)).dtype == jnp.float32


def test_works_under_jit_and_vmap():
    source = jax.random.normal(jax.random.key(0), (4, 8))
    target = jax.random.normal(jax.random.key(1), (4, 8))
    mapped = jax.jit(jax.vmap(rotation_between))(source, target)
    np.testing.assert_allclose(mapped, rotation_between(source, target), atol=1e-6)


def test_many_compositions_stay_orthogonal():
    rotation = jnp.eye(16)
    for i in range(300):
        source, target, _, _ = pair(100.0, 16, seed=i)
        rotation = rotation_between(source, target) @ rotation
    drift = float(orthogonality_error(rotation))
    mended = float(orthogonality_error(orthonormalize(rotation)))
    assert mended < 2e-6 <= drift * 10
    spoiled = rotation + 1e-3
    assert (
        float(orthogonality_error(orthonormalize(spoiled)))
        < float(orthogonality_error(spoiled)) / 50
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((jnp.ones(3), jnp.ones(3), "qr"), "method is 'qr'; allowed: geodesic, svd"),
        ((jnp.ones(3), jnp.ones(4)), r"shapes \(3,\) and \(4,\)"),
        ((jnp.ones(1), jnp.ones(1)), "d >= 2"),
    ],
)
def test_errors(arguments, says):
    with pytest.raises(ValueError, match=says):
        rotation_between(*arguments)


# ----- folding

D, H, K = 12, 3, 4


def setting():
    keys = jax.random.split(jax.random.key(0), 4)
    kernel, bias = jax.random.normal(keys[0], (D, H, K)), jax.random.normal(keys[1], (H, K))
    rotation = rq.rotation_between(
        jax.random.normal(keys[2], (H, K)), jax.random.normal(keys[3], (H, K))
    )
    params = {
        "fusion": {"query": {"kernel": kernel, "bias": bias}, "cls": jnp.ones(D)},
        "other": jnp.ones(2),
    }
    return params, rotation


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_folded_projection_gives_the_rotated_query(flat, with_bias):
    params, rotation = setting()
    projection = dict(params["fusion"]["query"])
    token = jax.random.normal(jax.random.key(7), (5, D))
    query = jnp.einsum("bd,dhk->bhk", token, projection["kernel"])
    query = query + projection["bias"][None] if with_bias else query
    if flat:
        projection = {
            "kernel": projection["kernel"].reshape(D, H * K),
            "bias": projection["bias"].reshape(-1),
        }
    if not with_bias:
        del projection["bias"]
    folded = rq.fold_rotation({"a": {"q": projection}}, rotation, ("a", "q"))["a"]["q"]
    got = token @ folded["kernel"].reshape(D, H * K)
    got = got + folded["bias"].reshape(1, -1) if with_bias else got
    np.testing.assert_allclose(got.reshape(5, H, K), rq.rotate(rotation, query), atol=1e-5)
    assert set(folded) == set(projection) and folded["kernel"].shape == projection["kernel"].shape


def test_inputs_are_left_alone_and_other_leaves_shared():
    params, rotation = setting()
    before = np.asarray(params["fusion"]["query"]["kernel"])
    folded = rq.fold_rotation(params, rotation)
    np.testing.assert_array_equal(params["fusion"]["query"]["kernel"], before)
    assert folded["other"] is params["other"] and folded["fusion"]["cls"] is params["fusion"]["cls"]


@pytest.mark.parametrize(
    ("path", "says"),
    [
        (("fusion", "key"), "the parameters have no 'key'"),
        (("fusion",), "no projection with a kernel"),
        (("other",), "no projection with a kernel"),
    ],
)
def test_wrong_paths(path, says):
    params, rotation = setting()
    with pytest.raises(rq.UserError, match=says):
        rq.fold_rotation(params, rotation, path)


def test_fused_projection_is_refused():
    _, rotation = setting()
    fused = {"qkv": {"kernel": jnp.ones([D, 3 * H * K]), "bias": jnp.ones([3 * H * K])}}
    with pytest.raises(rq.UserError, match="cannot take the rotation"):
        rq.fold_rotation(fused, rotation, ("qkv",))
    with pytest.raises(rq.UserError, match="allowed: \\[H, d, d\\]"):
        rq.fold_rotation(setting()[0], rotation[0])


@pytest.mark.parametrize(("heads", "fusion"), [(1, "attention"), (4, "mbt")])
def test_the_whole_model_answers_alike_without_a_rotation(heads, fusion):
    config = {"num_classes": 5, "dim": 16, "depth": 1, "fusion": fusion, "mbt_layers": 1}
    config |= {"fusion_heads": heads, "fusion_token_scale": 1.0}
    config["encoders"] = {"audio": {"kind": "sequence"}, "visual": {"kind": "vector"}}
    model = rq.build_model(config)
    keys = jax.random.split(jax.random.key(0), 4)
    batch = {
        "audio": jax.random.normal(keys[0], (3, 6, 4)),
        "visual": jax.random.normal(keys[1], (3, 7)),
        "visual_mask": jnp.array([True, False, True]),
    }
    params = jax.jit(model.init)(keys[2], batch)["params"]
    pair = jax.random.normal(keys[3], (2, heads, 16 // heads))
    rotation = rq.rotation_between(pair[0], pair[1])

    @jax.jit
    def run(params, rotation):
        return model.apply({"params": params}, batch, rotation, return_attention=True)

    turned, plain = run(params, rotation), run(params, None)
    folded = run(rq.fold_rotation(params, rotation), None)
    assert jax.tree.structure(folded) == jax.tree.structure(turned)
    for ours, theirs in zip(jax.tree.leaves(folded), jax.tree.leaves(turned), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    assert np.abs(np.asarray(plain[0] - turned[0])).max() > 1e-3  # the rotation matters here
