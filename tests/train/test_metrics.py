"""Sums over batches against NumPy over all examples at once."""

import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.train.metrics import add_sums, batch_sums, finish

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
