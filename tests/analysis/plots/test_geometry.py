"""The polar plot is a true projection."""

import numpy as np
import pytest

from rollingq_jax.analysis.plots import geometry
from tests.analysis import analysis_examples as examples


def cosine(a, b):
    return a @ b / np.linalg.norm(a, axis=-1) / np.linalg.norm(b)


def test_a_points_height_is_its_cosine_and_no_point_leaves_the_disc():
    query, keys = examples.cloud()
    view = geometry.project(keys, query, anchor=2 * query)
    for name, points in view.points.items():
        np.testing.assert_allclose(points[:, 0], cosine(keys[name], query), atol=1e-12)
        assert (np.linalg.norm(points, axis=1) <= 1 + 1e-12).all()
        assert view.cosines[name] == pytest.approx(cosine(keys[name], query).mean())
        np.testing.assert_allclose(view.means[name], points.mean(axis=0))
    np.testing.assert_allclose(view.anchor, [1.0, 0.0], atol=1e-12)


def test_it_is_an_orthogonal_projection_on_a_plane_that_holds_query_and_difference():
    query, keys = examples.cloud(dim=16)
    view = geometry.project(keys, query)
    unit = {m: k / np.linalg.norm(k, axis=1, keepdims=True) for m, k in keys.items()}
    difference = unit["visual"].mean(0) - unit["audio"].mean(0)
    # Least squares on (query, difference) gives the same shadow, in oblique coordinates.
    plane = np.stack([query, difference], axis=1)
    shadow = plane @ np.linalg.lstsq(plane, unit["audio"].T, rcond=None)[0]
    lengths = np.linalg.norm(shadow, axis=0)
    np.testing.assert_allclose(np.linalg.norm(view.points["audio"], axis=1), lengths, rtol=1e-9)


def test_the_view_does_not_depend_on_the_basis_or_the_lengths():
    query, keys = examples.cloud(dim=24)
    turn = np.linalg.qr(np.random.default_rng(5).normal(size=(24, 24)))[0]
    first = geometry.project(keys, query, query)
    second = geometry.project({m: 3 * k @ turn for m, k in keys.items()}, 0.1 * query @ turn)
    for name in keys:
        np.testing.assert_allclose(first.points[name], second.points[name], atol=1e-9)


def test_modalities_lie_on_their_sides_before_and_after():
    query, keys = examples.cloud()
    anchor = sum(k.mean(0) / np.linalg.norm(k.mean(0)) for k in keys.values())
    for q in (query, anchor):
        means = geometry.project(keys, q).means
        assert means["audio"][1] < means["visual"][1]


@pytest.mark.parametrize("case", ["zero query", "zero keys", "parallel", "identical", "one"])
def test_degenerate_input_gives_numbers(case):
    query, keys = examples.cloud(samples=5, dim=12)
    if case == "zero query":
        query = 0 * query
    elif case == "zero keys":
        keys = {m: 0 * k for m, k in keys.items()}
    elif case == "parallel":
        keys = {"audio": np.tile(query, (3, 1)), "visual": np.tile(-query, (3, 1))}
    elif case == "identical":
        keys["visual"] = keys["audio"]
    else:
        keys.pop("visual")
    view = geometry.project(keys, query)
    for name in keys:
        assert np.isfinite(view.points[name]).all() and np.isfinite(view.means[name]).all()


def test_heads_one_at_a_time_or_all():
    query, keys = examples.cloud(dim=12)
    heads = {m: k.reshape(-1, 3, 4) for m, k in keys.items()}
    whole = geometry.view(heads, query.reshape(3, 4))
    np.testing.assert_allclose(whole.points["audio"], geometry.project(keys, query).points["audio"])
    second = geometry.view(heads, query.reshape(3, 4), query.reshape(3, 4), head=1)
    alone = geometry.project({m: k[:, 1] for m, k in heads.items()}, query[4:8])
    np.testing.assert_allclose(second.points["visual"], alone.points["visual"])
