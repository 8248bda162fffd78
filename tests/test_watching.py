"""Measurements of a model without a rotation: against NumPy, and what the verdict says."""

import jax
import numpy as np
import pytest

import rollingq_jax as rq

B, H, D = 5, 2, 4


def made_batches(seed=0):
    rng = np.random.default_rng(seed)
    batches = []
    for size in (B, B - 2):  # the last batch is smaller
        audio, text = (rng.normal(size=(size, 3)).astype(np.float32) + 2 for _ in range(2))
        batches.append({"audio": audio, "text": text, "quality_audio": audio.mean(axis=1)})
    return batches


def look(batch):
    """A model whose query lies along audio, and whose share is a function of what audio holds."""
    size = len(batch["audio"])
    query = np.tile(np.eye(D, dtype=np.float32)[0], (size, H, 1))
    audio = query + 0.1 * batch["audio"].mean(axis=1)[:, None, None]
    share = 1 / (1 + np.exp(-np.tile(batch["audio"].mean(axis=1)[:, None], (1, H))))
    return {
        "query": query,
        "mean_keys": {"text": np.roll(query, 1, axis=-1), "audio": audio},
        "attention_share": {"audio": share, "text": 1 - share},
    }


def test_measurements_are_those_of_numpy_and_stand_in_the_verdict(capsys):
    batches = made_batches()
    got = rq.report(look, batches, uniform_shares={"audio": 0.25, "text": 0.75})
    audio = np.concatenate([look(b)["mean_keys"]["audio"] for b in batches])
    cosine = (audio[..., 0] / np.linalg.norm(audio, axis=-1)).mean()
    share = np.concatenate([look(b)["attention_share"]["audio"][:, 0] for b in batches])
    quality = np.concatenate([b["quality_audio"] for b in batches])
    assert got.modalities == ("audio", "text") and got.num_examples == 2 * B - 2
    assert got.scores == pytest.approx({"audio": cosine, "text": 0.0}, abs=1e-5)
    np.testing.assert_allclose(got.imbalance, [cosine, cosine], atol=1e-5)
    assert got.shares["audio"] == pytest.approx(share.mean(), abs=1e-6)
    assert got.quality_correlation == pytest.approx(
        {"audio": np.corrcoef(share, quality)[0, 1]}, abs=1e-6
    )
    says = [
        f"audio is favored: cosine {cosine:.2f} against 0.00 of text",
        f"audio gets {share.mean():.2f} of the attention, {share.mean() / 0.25:.1f} times what",
        f"replacing audio by noise leaves its share at {got.noise_shares['audio']:.2f}",
        f"follows its quality with r = {got.quality_correlation['audio']:.2f}",
        "2 of 2 heads would roll at beta = 0.1",
    ]
    assert all(line in got.verdict for line in says), got.verdict
    assert capsys.readouterr().out == f"{got}\n" and got.verdict in str(got)


def test_noise_tells_a_share_that_reads_the_sample_from_one_that_does_not():
    def fixed(batch):
        size = len(batch["audio"])
        share = {"audio": np.full((size, H), 0.6), "text": np.full((size, H), 0.4)}
        return look(batch) | {"attention_share": share}

    batches = [{**b, "audio": b["audio"] * [5.0, 0.1, 0.1]} for b in made_batches()]
    blind = rq.report(fixed, batches, quiet=True)
    assert blind.noise_shares == pytest.approx({"audio": 0.6, "text": 0.4})
    assert np.isnan(blind.quality_correlation["audio"])
    seeing = rq.report(look, batches, quiet=True)
    assert abs(seeing.noise_shares["audio"] - seeing.shares["audio"]) > 0.005
    assert rq.report(look, batches, noise=False, quiet=True).noise_shares == {}


def test_padding_and_absent_modalities_count_nowhere():
    batch = made_batches()[0]
    whole = rq.report(look, [{m: x[:3] for m, x in batch.items()}], noise=False, quiet=True)
    mask = np.arange(B) < 3
    padded = {**batch, "example_mask": mask}
    padded["audio"] = np.where(mask[:, None], batch["audio"], 50.0).astype(np.float32)
    got = rq.report(look, [padded], noise=False, quiet=True)
    assert got.num_examples == 3 and got.verdict == whole.verdict
    assert got.scores == pytest.approx(whole.scores, abs=1e-6)

    def lacking(batch):
        return look(batch) | {"present": {"audio": mask, "text": np.ones(B, bool)}}

    absent = rq.report(lacking, [batch], noise=False, quiet=True)
    assert absent.shares["audio"] == pytest.approx(whole.shares["audio"], abs=1e-6)
    assert absent.num_examples == B


def test_a_balanced_model_is_said_to_be_one():
    def balanced(batch):
        keys = look(batch)["mean_keys"]["text"]
        return {"query": np.ones((H, D)), "mean_keys": {"a": keys, "b": keys}}

    got = rq.report(balanced, made_batches(), quiet=True)
    assert got.verdict == (
        "no modality is favored: imbalance 0.00 does not exceed beta = 0.1; "
        "0 of 2 heads would roll at beta = 0.1"
    )


def test_heads_that_favor_different_modalities_are_no_favor_of_one():
    def against(batch):  # each head's query lies along another modality's keys
        query = np.tile(np.eye(D, dtype=np.float32)[0], (H, 1))
        along = np.tile(query[None], (len(batch["audio"]), 1, 1))
        a, b = along.copy(), along.copy()
        a[:, 1], b[:, 0] = np.roll(a[:, 1], 1, axis=-1), np.roll(b[:, 0], 1, axis=-1)
        return {"query": query, "mean_keys": {"a": a, "b": b}}

    got = rq.report(against, made_batches(), quiet=True)
    assert got.verdict.startswith(
        "the heads favor different modalities: imbalance 1.00, but a cosine 0.50 against 0.50 of"
    )


def test_our_own_model_is_seen_by_its_second_output():
    encoders = {"audio": {"kind": "vector"}, "text": {"kind": "tokens", "vocab_size": 9}}
    model = rq.build_model({"num_classes": 3, "dim": 8, "depth": 0, "encoders": encoders})
    batch = {"audio": np.ones((2, 5), np.float32), "text": np.array([[3, 1, 0], [2, 0, 0]])}
    variables = jax.jit(model.init)(jax.random.key(0), batch)
    see = jax.jit(lambda b: model.apply(variables, b)[1])
    got = rq.report(see, [batch], quiet=True)
    assert got.modalities == ("audio", "text") and set(got.noise_shares) == {"audio", "text"}
    assert sum(got.shares.values()) == pytest.approx(1.0, abs=1e-5)
    # The means of 2 / (2 + 3) and 2 / (2 + 2): class tokens too, padding not.
    assert got.uniform_shares == pytest.approx({"audio": 0.45, "text": 0.55})


@pytest.mark.parametrize(
    ("see", "batches", "says"),
    [
        (look, [], "batches is empty; allowed: at least one batch"),
        (
            lambda batch: {"query": np.ones((H, D))},
            [{}],
            "see gives query; allowed: a mapping with",
        ),
        (lambda batch: {}, [{}], "see gives nothing; allowed: a mapping with query and mean_keys"),
    ],
)
def test_mistakes(see, batches, says):
    with pytest.raises(rq.UserError, match=says):
        rq.report(see, batches)
