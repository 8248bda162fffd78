"""Each drop-in example learns the digits, rolls, is restored, and folds if it can."""

import contextlib
import importlib
import importlib.util
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from flax import nnx, serialization

import rollingq_jax as rq
from rollingq_jax.data.load import load_dataset
from rollingq_jax.examples import plain_jax, toy_data
from rollingq_jax.models import nnx_fusion

pytestmark = pytest.mark.slow

NAMES = (
    "cross_attention",
    "decoder",
    pytest.param(
        "equinox_attention",
        marks=pytest.mark.skipif(
            importlib.util.find_spec("equinox") is None, reason="Equinox is not installed"
        ),
    ),
    "latent_query",
    "linen_attention",
    "nnx_attention",
    "nnx_attention_fn",
    "plain_jax",
    "pooled_query",
    "scanned_layers",
)
# Three latents, or layers, with two heads; others have two queries.
HEADS = {"decoder": 4, "latent_query": 6, "scanned_layers": 6}
QUERY = {"nnx_attention": ("query",), "nnx_attention_fn": ("attention", "query")}
ROWS = 192


@pytest.fixture(scope="module")
def digits(av_digits_cache):
    """Some of the demo's digits: 32 time steps of a spectrogram, 8 rows of an image."""
    config = SimpleNamespace(name="av_digits", cache_dir=av_digits_cache)
    columns = load_dataset(config, seed=0).splits["train"].columns
    data = {m: columns[m][:ROWS, ..., 0] for m in ("audio", "visual")}
    return {
        "audio": data["audio"].swapaxes(1, 2),
        "visual": data["visual"],
        "label": columns["label"][:ROWS],
    }


def example(name):
    return importlib.import_module(f"rollingq_jax.examples.{name}")


def with_jax_defaults():
    """The examples are a reader's code, and run as in a reader's session (Adam needs it too)."""
    stack = contextlib.ExitStack()
    stack.enter_context(jax.numpy_dtype_promotion("standard"))
    stack.enter_context(jax.numpy_rank_promotion("allow"))
    return stack


@pytest.fixture(scope="module")
def trained(digits):
    """What each example returns after some epochs on the digits."""
    found = {}

    def get(name):
        if name not in found:
            with with_jax_defaults():
                found[name] = example(name).train(digits, num_epochs=4, batch_size=32)
        return found[name]

    return get


@pytest.mark.parametrize("name", NAMES)
def test_trains_on_the_digits_and_rolls(trained, name):
    _, rolling, losses = trained(name)
    assert rolling.count.shape == (HEADS.get(name, 2),)
    assert int(rolling.count.sum()) >= 1
    assert losses[-1] < losses[0]
    width = rolling.rotation.shape[-1]
    identity = np.broadcast_to(np.eye(width), rolling.rotation.shape)
    turned = np.abs(np.asarray(rolling.rotation) - identity).max(axis=(1, 2)) > 1e-3
    np.testing.assert_array_equal(turned, np.asarray(rolling.count) > 0)


@pytest.mark.parametrize("name", ("nnx_attention", "nnx_attention_fn"))
def test_nnx_keeps_the_rotation_out_of_the_optimizer(trained, name):
    model, rolling, _ = trained(name)
    assert isinstance(model, example(name).Model)
    np.testing.assert_array_equal(model.rotation[...], rolling.rotation)


def outputs(name, params, batch, rotation):
    """Logits, or the loss where the example returns that; of NNX the rotation is the model's."""
    with with_jax_defaults():
        if isinstance(params, nnx.Module):
            return np.asarray(nnx.jit(type(params).loss)(params, batch)[0])
        if name == "plain_jax":
            return np.asarray(plain_jax.loss_fn(params, batch, rotation)[0])
        if name == "equinox_attention":
            return np.asarray(params(batch, rotation)[0])
        model = example(name).Model(int(batch["num_classes"]))
        return np.asarray(jax.jit(model.apply)(params, batch, rotation)[0])


@pytest.fixture
def batch(digits):
    return {name: column[:8] for name, column in digits.items()} | {
        "num_classes": digits["label"].max() + 1
    }


@pytest.mark.parametrize("name", NAMES)
def test_is_restored_from_bytes(trained, digits, batch, name):
    """A checkpoint of parameters and rolling state gives the same outputs, which need both."""
    params, rolling, _ = trained(name)
    expected = outputs(name, params, batch, rolling.rotation)
    if name == "equinox_attention":
        return _check_equinox_restored(params, rolling, batch, expected)
    saved = params
    if isinstance(params, nnx.Module):
        saved = nnx.to_pure_dict(nnx.state(params))
    saved = {"params": saved, "rolling": rolling._asdict()}
    empty = jax.tree.map(np.zeros_like, saved)
    restored = serialization.from_bytes(empty, serialization.to_bytes(saved))
    rotation = restored["rolling"]["rotation"]
    if isinstance(params, nnx.Module):
        with with_jax_defaults():
            again = type(params)(digits, nnx.Rngs(1))
        assert np.abs(outputs(name, again, batch, rotation) - expected).max() > 1e-4
        nnx.update(again, restored["params"])
        np.testing.assert_array_equal(again.rotation[...], rotation)
    else:
        again = restored["params"]
        unrotated = outputs(name, again, batch, roll_nothing(rotation))
        assert np.abs(unrotated - expected).max() > 1e-4
    np.testing.assert_allclose(outputs(name, again, batch, rotation), expected, atol=1e-6)
    state, info = rq.rolling_query().update(restored["rolling"])  # goes on as a state
    np.testing.assert_array_equal(state.rotation, rolling.rotation)
    assert not info.rolled.any()  # nothing was observed since


def _check_equinox_restored(model, rolling, batch, expected):
    import equinox as eqx

    file = io.BytesIO()
    eqx.tree_serialise_leaves(file, (model, rolling))
    file.seek(0)
    empty = jax.tree.map(lambda x: np.zeros_like(x) if eqx.is_array(x) else x, (model, rolling))
    again, state = eqx.tree_deserialise_leaves(file, empty)
    jax.tree.map(np.testing.assert_array_equal, (again, state), (model, rolling))
    found = outputs("equinox_attention", again, batch, state.rotation)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def fold(name, params, rotation):
    """What the example's own function makes; an NNX model is folded in a copy."""
    if name == "plain_jax":
        tree = rq.fold_rotation({"query": {"kernel": params["query"]}}, rotation, ("query",))
        return {**params, "query": tree["query"]["kernel"]}
    if name in QUERY:
        params = nnx.clone(params)
        nnx_fusion.fold_rotation(params, params.rotation, QUERY[name])
        np.testing.assert_array_equal(params.rotation[...], roll_nothing(rotation))
        return params
    return example(name).fold(params, rotation)


@pytest.mark.parametrize("name", NAMES)
def test_folds_or_says_why_it_cannot(trained, batch, name):
    """Folded parameters give without a rotation what the others give under it."""
    params, rolling, _ = trained(name)
    identity = roll_nothing(rolling.rotation)
    if name in ("decoder", "latent_query"):
        assert "not fold" in example(name).__doc__
        return
    expected = outputs(name, params, batch, rolling.rotation)
    if name not in QUERY:  # of these the rotation is the model's
        assert np.abs(outputs(name, params, batch, identity) - expected).max() > 1e-4
    folded = fold(name, params, rolling.rotation)
    np.testing.assert_allclose(outputs(name, folded, batch, identity), expected, atol=1e-5)


def test_scanned_layers_have_a_rotation_each(trained):
    _, rolling, _ = trained("scanned_layers")
    by_layer = np.asarray(rolling.count).reshape(3, 2)
    assert (by_layer.sum(axis=1) >= 1).all()  # `roll_layers="all"`


def test_decoder_rotates_its_last_token_only(trained, digits):
    variables, rolling, _ = trained("decoder")
    model = example("decoder").Model(variables["params"]["Dense_0"]["bias"].shape[0])
    batch = {name: column[:8] for name, column in digits.items()}
    apply = jax.jit(model.apply)
    with with_jax_defaults():
        logits, (query, mean_keys, weight) = apply(variables, batch, rolling.rotation)
        plain, (unrotated, same_keys, _) = apply(variables, batch, roll_nothing(rolling.rotation))
    np.testing.assert_allclose(query, rq.rotate(rolling.rotation, unrotated), atol=1e-5)
    np.testing.assert_array_equal(mean_keys, same_keys)
    assert np.abs(np.asarray(plain) - np.asarray(logits)).max() > 1e-4 and np.all(weight == 1)


def roll_nothing(rotation):
    """The identity in the shape of a rotation."""
    return jax.numpy.broadcast_to(jax.numpy.eye(rotation.shape[-1])[None], rotation.shape)


def test_toy_data_have_the_pattern_in_both_modalities():
    data = toy_data.make_data(num_examples=256, num_classes=3, seed=1)
    again = toy_data.make_data(num_examples=256, num_classes=3, seed=1)
    assert all(np.array_equal(data[name], again[name]) for name in data)
    for modality in ("audio", "visual"):
        flat = data[modality].reshape(256, -1)
        means = np.stack([flat[:128][data["label"][:128] == c].mean(axis=0) for c in range(3)])
        guess = ((flat[128:, None] - means) ** 2).sum(axis=-1).argmin(axis=-1)
        assert (guess == data["label"][128:]).mean() > 0.8
    seen = np.concatenate([b["label"] for b in toy_data.batches(data, 64, epoch=0)])
    assert sorted(seen) == sorted(data["label"])
