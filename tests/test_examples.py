"""Each drop-in example is short, learns the digits, rolls, and keeps the rotation it has made."""

import contextlib
import importlib
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax.data.load import load_dataset
from rollingq_jax.examples import plain_jax, toy_data
from rollingq_jax.examples.nnx_attention import Model

NAMES = (
    "cross_attention",
    "decoder",
    "latent_query",
    "linen_attention",
    "nnx_attention",
    "plain_jax",
)
HEADS = {"decoder": 4, "latent_query": 6}  # three latents with two heads; others have two queries
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
def test_is_under_60_lines(name):
    lines = Path(example(name).__file__).read_text(encoding="utf-8").splitlines()
    assert len(lines) < 60


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


def test_nnx_keeps_the_rotation_out_of_the_optimizer(trained):
    model, rolling, _ = trained("nnx_attention")
    assert isinstance(model, Model)
    np.testing.assert_array_equal(model.rotation[...], rolling.rotation)


def test_decoder_is_restored_from_a_dict_and_rotates_its_last_token_only(trained, digits):
    variables, rolling, _ = trained("decoder")
    model = example("decoder").Model(variables["params"]["Dense_0"]["bias"].shape[0])
    batch = {name: column[:8] for name, column in digits.items()}
    apply = jax.jit(model.apply)
    saved = jax.tree.map(np.asarray, {"model": variables, "rolling": rolling._asdict()})
    with with_jax_defaults():
        logits, (query, mean_keys, weight) = apply(variables, batch, rolling.rotation)
        again, _ = apply(saved["model"], batch, saved["rolling"]["rotation"])
        plain, (unrotated, same_keys, _) = apply(variables, batch, roll_nothing(rolling.rotation))
        state, info = rq.rolling_query().update(saved["rolling"])  # goes on as a state
    np.testing.assert_array_equal(again, logits)
    np.testing.assert_allclose(query, rq.rotate(rolling.rotation, unrotated), atol=1e-5)
    np.testing.assert_array_equal(mean_keys, same_keys)
    assert np.abs(np.asarray(plain) - np.asarray(logits)).max() > 1e-4 and np.all(weight == 1)
    np.testing.assert_array_equal(state.rotation, rolling.rotation)
    assert not info.rolled.any()  # nothing was observed since


def test_plain_jax_folds(trained, digits):
    params, rolling, _ = trained("plain_jax")
    tree = {**params, "query": {"kernel": params["query"]}}
    folded = rq.fold_rotation(tree, rolling.rotation, query_path=("query",))
    folded = {**folded, "query": folded["query"]["kernel"]}
    batch = {name: column[:8] for name, column in digits.items()}
    with with_jax_defaults():
        loss, (query, _) = plain_jax.loss_fn(params, batch, rolling.rotation)
        again, (same, _) = plain_jax.loss_fn(folded, batch, roll_nothing(rolling.rotation))
    np.testing.assert_allclose(same, query, atol=1e-6)
    np.testing.assert_allclose(again, loss, atol=1e-6)


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
