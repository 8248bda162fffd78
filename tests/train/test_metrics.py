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
