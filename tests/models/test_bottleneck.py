"""Bottleneck fusion against a loop in NumPy, for two and three modalities."""

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from model_cases import close, filled, run

from rollingq_jax.models import Bottleneck
from rollingq_jax.models.embeddings import Presence

LENGTHS = {"audio": 5, "text": 3, "visual": 4}
INDEX = jnp.arange(3, dtype=jnp.int32)


def made_bottleneck(modalities=("audio", "visual"), **fields):
    module = Bottleneck(num_layers=2, num_tokens=4, mlp_ratio=2.0, **fields)
    keys = jax.random.split(jax.random.key(0), len(modalities))
    streams = {
        m: jax.random.normal(k, (3, LENGTHS[m], 8)) for m, k in zip(modalities, keys, strict=True)
    }
    everything = {m: Presence() for m in modalities}
    params = filled(module, streams, everything, example_index=INDEX)
    return module, params, streams, everything


@pytest.mark.parametrize("modalities", [("audio", "visual"), ("audio", "text", "visual")])
def test_equals_the_loop(modalities):
    module, params, streams, everything = made_bottleneck(modalities)
    expected = numpy_reference.bottleneck(params, streams, num_layers=2, num_tokens=4)
    got = run(module, params, streams, everything, example_index=INDEX)
    for m in modalities:
        close(got[m], expected[m])


def test_an_absent_modality_adds_nothing_to_the_bottleneck():
    module, params, streams, everything = made_bottleneck(("audio", "text", "visual"))
    present = {"audio": [1, 0, 1], "text": [1, 1, 1], "visual": [0, 1, 1]}
    present = {m: jnp.array(x, jnp.bool_) for m, x in present.items()}
    presences = {m: Presence(None, x) for m, x in present.items()}
    expected = numpy_reference.bottleneck(
        params, streams, num_layers=2, num_tokens=4, present=present
    )
    got = run(module, params, streams, presences, example_index=INDEX)
    for m in streams:
        real = np.asarray(present[m])
        close(np.asarray(got[m])[real], expected[m][real])


def test_an_example_without_any_modality_stays_finite():
    module, params, streams, _ = made_bottleneck()
    presences = {m: Presence(None, jnp.array([True, False, True])) for m in streams}
    got = run(module, params, streams, presences, example_index=INDEX)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in got.values())


def test_padded_positions_are_read_by_nobody():
    module, params, streams, everything = made_bottleneck()
    positions = jnp.arange(4)[None] < jnp.array([4, 1, 2])[:, None]
    presences = {**everything, "audio": Presence(positions, jnp.any(positions, axis=1))}
    padding = jnp.concatenate([jnp.zeros((3, 1), jnp.bool_), ~positions], axis=1)[..., None]
    noisy = {**streams, "audio": jnp.where(padding, 50.0, streams["audio"])}
    a, b = (run(module, params, x, presences, example_index=INDEX) for x in (streams, noisy))
    np.testing.assert_array_equal(a["visual"], b["visual"])
    np.testing.assert_array_equal(a["audio"][:, 0], b["audio"][:, 0])


def test_remat_changes_nothing():
    module, params, streams, everything = made_bottleneck()

    def loss(module, params):
        out = run(module, params, streams, everything, example_index=INDEX)
        return sum(jnp.sum(jnp.sin(x)) for x in out.values())

    a = jax.jit(jax.value_and_grad(lambda p: loss(module, p)))(params)
    b = jax.jit(jax.value_and_grad(lambda p: loss(module.clone(remat=True), p)))(params)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        close(x, y, 1e-4)


def test_every_block_drops_independently():
    module, params, streams, everything = made_bottleneck(dropout=0.5)
    same = {m: streams["visual"] for m in streams}
    shared = {k.replace("visual", "audio"): p for k, p in params.items() if "visual" in k}
    params = {**params, **shared}  # two equal streams with equal parameters
    quiet = run(module, params, same, everything, example_index=INDEX)
    close(quiet["audio"], quiet["visual"], 1e-6)
    noisy = run(
        module,
        params,
        same,
        everything,
        example_index=INDEX,
        train=True,
        rngs={"dropout": jax.random.key(2)},
    )
    assert not np.allclose(noisy["audio"], noisy["visual"])
