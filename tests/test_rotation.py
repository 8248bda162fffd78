"""Rotations: where they send vectors, orthogonality, degenerate inputs, gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from rollingq_jax.rotation import orthogonality_error, orthonormalise, rotate, rotation_between

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
    mended = float(orthogonality_error(orthonormalise(rotation)))
    assert mended < 2e-6 <= drift * 10
    spoiled = rotation + 1e-3
    assert (
        float(orthogonality_error(orthonormalise(spoiled)))
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
