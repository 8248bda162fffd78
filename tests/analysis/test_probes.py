"""Probes on models whose answers are known by construction."""

import warnings

import jax
import numpy as np
import pytest

from rollingq_jax.analysis import metrics, plots, probes, report
from rollingq_jax.analysis.metrics import Predictions
from rollingq_jax.analysis.plots import ModalityView
from rollingq_jax.data.corruption import ModalityDropout
from rollingq_jax.data.dataset import ArraySource, Dataset, ModalityInfo
from rollingq_jax.errors import ConfigError, NonFiniteError
from tests.analysis import analysis_examples

CLASSES = analysis_examples.CLASSES


def make_dataset(count=50, quality=True):
    """Two vectors that both show the class; the train split has standard deviation 1."""
    rng = np.random.default_rng(0)
    splits = {}
    for name, size in (("train", 40), ("test", count)):
        label = rng.integers(0, CLASSES, size).astype(np.int32)
        code = np.eye(CLASSES, dtype=np.float32)[label]
        code = (code - 1 / CLASSES) / code.std()
        columns = {"audio": code, "visual": code.copy(), "label": label}
        if quality:
            columns |= {f"quality_{m}": np.zeros(size, np.float32) for m in ("audio", "visual")}
        splits[name] = ArraySource(columns)
    modalities = {m: ModalityInfo(m, "vector", (CLASSES,)) for m in ("audio", "visual")}
    return Dataset(splits, modalities, CLASSES, ("a", "b", "c", "d"))


def looks_at_audio(batch):
    """Reads the class from the audio alone, and says that it attends by its norm."""
    audio = np.asarray(batch["audio"])
    share = np.stack([np.abs(audio).sum(-1)] * 2, axis=-1) / 100  # two heads
    return {
        "probabilities": np.asarray(jax.nn.softmax(8 * audio)),
        "attention_share": {"audio": share, "visual": 1 - share},
    }


def make_probe(**kwargs):
    return probes.Probe(looks_at_audio, make_dataset(**kwargs), batch_size=16)


def test_every_example_counts_once_and_padding_never():
    probe = make_probe(count=37)
    found = probes.predict(probe)
    labels = probe.dataset.splits["test"].columns["label"]
    np.testing.assert_array_equal(found.label, labels)
    assert found.accuracy == 1.0
    assert found.attention_share["audio"].shape == (37,)
    assert sorted(found.quality) == ["audio", "visual"]


def test_quality_counts_only_where_all_of_it_is_known():
    def one_quality(batch):
        return looks_at_audio(batch)

    batch = {
        "audio": np.ones((2, CLASSES), np.float32),
        "label": np.zeros(2, np.int32),
        "quality_audio": np.zeros(2, np.float32),
    }
    assert metrics.collect(one_quality, [batch]).quality == {}
    with pytest.raises(ValueError, match="nothing to evaluate"):
        metrics.collect(one_quality, [])


def test_noise_curve_falls_from_the_clean_value_to_chance_for_the_used_modality_alone():
    probe = make_probe(count=400)
    clean = probes.predict(probe)
    curve = probes.corruption_curve(probe, "audio", (0.0, 0.5, 50.0), clean=clean)
    accuracy = [point["accuracy"] for point in curve]
    assert accuracy[0] == 1.0 > accuracy[1] > accuracy[2]
    assert accuracy[2] == pytest.approx(1 / CLASSES, abs=0.08)
    assert [point["level"] for point in curve] == [0.0, 0.5, 50.0]
    assert curve[0]["attention_share"] == metrics.mean_shares(clean)
    assert curve[2]["attention_share"]["audio"] > 10 * curve[0]["attention_share"]["audio"]
    for point in probes.corruption_curve(probe, "visual", (50.0,)):
        assert point["accuracy"] == 1.0


def test_a_noised_split_has_lower_quality():
    found = probes.predict(make_probe(), "audio=2.0")
    np.testing.assert_allclose(found.quality["audio"], -2.0)
    np.testing.assert_allclose(found.quality["visual"], 0.0)


def test_reliance_tells_the_used_modality_from_the_unused():
    probe = make_probe(count=200)
    clean = probes.predict(probe)
    used = probes.reliance(probe, "audio", clean)
    assert used["swapped"]["accuracy"] == 0.0
    assert used["swapped"]["follows"] == 1.0
    assert used["shuffled"]["accuracy"] == pytest.approx(1 / CLASSES, abs=0.1)
    assert used["shuffled"]["unchanged"] == used["shuffled"]["accuracy"]
    assert used["replaced"]["accuracy"] == pytest.approx(1 / CLASSES, abs=0.1)
    unused = probes.reliance(probe, "visual", clean)
    assert unused["swapped"]["follows"] == 0.0
    for found in unused.values():
        assert found["accuracy"] == found["unchanged"] == 1.0


def test_probes_of_the_training_split_corrupt_it_too():
    probe = make_probe()._replace(split="train")
    assert probes.predict(probe).accuracy == 1.0
    assert probes.predict(probe, "audio=misalign").accuracy == 0.0
    assert probes.predict(probe, "audio=40").accuracy < 0.6


def test_probes_are_seeded():
    probe = make_probe()
    first, again = (probes.predict(probe, "audio=1.0").probabilities for _ in range(2))
    other = probes.predict(probe._replace(seed=1), "audio=1.0").probabilities
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_partners_are_of_another_class():
    labels = np.array([0, 0, 0, 1, 2, 2])
    partners = probes.other_class_partners(labels, np.random.default_rng(0))
    assert (labels[partners] != labels).all()
    assert probes.other_class_partners(np.zeros(3, int), np.random.default_rng(0)) is None


def test_an_unknown_modality_is_one_clear_line():
    with pytest.raises(ConfigError, match="no modality 'smell'; there are audio, visual"):
        probes.predict(make_probe(), "smell=1.0")


def test_scores_by_hand():
    quality = {"audio": np.array([0.0, -1.0, -2.0, 0.0]), "visual": np.array([0.0, 0.0, 0.0, -1.0])}
    share = {"audio": np.array([0.5, 0.4, 0.3, 0.6])}
    share["visual"] = 1 - share["audio"]
    probabilities = np.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    found = metrics.scores(
        Predictions(probabilities, np.array([0, 0, 1, 1]), share, quality), 2, ("cat", "dog")
    )
    assert found["accuracy"] == 0.75
    assert found["per_class"]["cat"] == {"accuracy": 1.0, "f1": pytest.approx(0.8), "examples": 2}
    assert found["per_class"]["dog"] == {
        "accuracy": 0.5,
        "f1": pytest.approx(2 / 3),
        "examples": 2,
    }
    assert found["macro_f1"] == pytest.approx((0.8 + 2 / 3) / 2)
    assert found["quality_correlation"] == pytest.approx(1.0)
    assert found["attention_share"] == {"audio": pytest.approx(0.45), "visual": pytest.approx(0.55)}
    assert found["pearson"]["audio"] == pytest.approx(
        np.corrcoef(share["audio"], quality["audio"])[0, 1]
    )


def test_scores_without_attention_or_quality_leave_them_out():
    bare = Predictions(np.eye(2), np.array([0, 1]), {}, {})
    found = metrics.scores(bare, 2)
    assert found["accuracy"] == 1.0 and list(found["per_class"]) == ["0", "1"]
    assert not found.keys() & {"attention_share", "quality_correlation", "pearson"}


def test_predictor_gives_what_the_model_gives():
    model, params, dataset, columns = analysis_examples.small_model()
    rotation = np.stack([np.eye(4, dtype=np.float32)[::-1]] * 2)
    probe = probes.Probe(
        metrics.predict_fn(model, {"params": params}, rotation), dataset, batch_size=4
    )
    found = probes.predict(probe)
    logits, out = jax.jit(model.apply)(
        {"params": params}, metrics.model_input(columns), rotation=rotation
    )
    np.testing.assert_allclose(found.probabilities, jax.nn.softmax(logits), atol=1e-6)
    for name, share in out["attention_share"].items():
        np.testing.assert_allclose(found.attention_share[name], share.mean(-1), atol=1e-6)


def test_predictor_of_a_static_fusion_has_no_shares():
    model, params, dataset, _ = analysis_examples.small_model("concat")
    found = probes.predict(probes.Probe(metrics.predict_fn(model, {"params": params}), dataset))
    assert found.attention_share == {} and found.probabilities.shape == (9, CLASSES)


def test_examples_carry_the_models_attention():
    model, params, dataset, columns = analysis_examples.small_model()
    chosen = [4, 1]
    shown = report.attention_examples(model, {"params": params}, None, dataset, "test", chosen)
    _, out = jax.jit(model.apply)({"params": params}, metrics.model_input(columns))
    for example, index in zip(shown, chosen, strict=True):
        assert example.caption.startswith(f"true {index % CLASSES}\npredicted ")
        assert f"audio noise {index}.0" in example.caption
        total = sum(view.weights.sum() for view in example.views)
        for view in example.views:
            np.testing.assert_array_equal(view.values, columns[view.name][index])
            share = np.asarray(out["attention_share"][view.name]).mean(-1)[index]
            assert view.weights.sum() / total == pytest.approx(share, abs=1e-6)
        assert total == pytest.approx(1.0)
        assert [len(view.weights) for view in example.views] == [1 + 4 * 2, 1 + 2 * 2]


def test_chosen_examples_span_the_quality_contrast():
    rng = np.random.default_rng(0)
    quality = {"audio": -rng.uniform(size=20), "visual": -rng.uniform(size=20)}
    found = Predictions(np.ones((20, 2)), np.zeros(20, int), {}, quality)
    chosen = report.choose_examples(found, 3)
    contrast = quality["audio"] - quality["visual"]
    assert chosen[0] == contrast.argmin() and chosen[-1] == contrast.argmax()
    np.testing.assert_array_equal(
        report.choose_examples(found._replace(quality={}), 4), [0, 6, 13, 19]
    )
    assert len(report.choose_examples(found._replace(label=np.zeros(2), quality={}), 4)) == 2


def test_shares_and_correlations_are_over_the_examples_that_have_the_modality():
    share = {"audio": np.array([0.2, 0.4, 0.9, 1.0]), "visual": np.array([0.8, 0.6, 0.1, 0.0])}
    quality = {"audio": np.array([-2.0, -1.0, 0.0, -9.0]), "visual": np.zeros(4)}
    present = {"audio": np.ones(4, bool), "visual": np.array([True, True, True, False])}
    quality["visual"] = metrics.where_present(quality["visual"], present["visual"])
    found = metrics.scores(
        Predictions(np.eye(2)[[0, 0, 1, 1]], np.array([0, 0, 1, 1]), share, quality, present), 2
    )
    assert found["attention_share"]["visual"] == pytest.approx(0.5)
    assert found["modality_examples"] == {"audio": 4, "visual": 3}
    assert found["contrast_examples"] == {"audio": 3, "visual": 3}
    expected = np.corrcoef([0.2, 0.4, 0.9], [-2, -1, 0])[0, 1]
    assert found["quality_correlation"] == pytest.approx(expected)


def test_answers_that_are_not_finite_are_told(caplog):
    def broken(batch):
        found = looks_at_audio(batch)
        found["probabilities"] = np.where(batch["audio"][:, :1] > 0, np.nan, found["probabilities"])
        return found

    probe = make_probe()._replace(predict=broken)
    clean = probes.predict(probe)
    count = int((clean.label == 0).sum())
    assert clean.nonfinite == count and (clean.predicted[clean.label == 0] == -1).all()
    assert f"split 'test': the logits of {count} of 50 examples" in caplog.text
    assert clean.accuracy == clean.unchanged(clean) == 1 - count / 50
    nothing = probe._replace(
        predict=lambda b: {"probabilities": np.full([len(b["label"]), 4], np.nan)}
    )
    with pytest.raises(NonFiniteError, match="all 50 examples"):
        probes.predict(nothing)
    assert probes.predict(nothing, "audio=0.5").accuracy == 0.0  # of the corruption, not the model


def test_pictures_of_what_lacks_modalities_warn_of_nothing():
    lacking = {m: np.full(5, np.nan) for m in ("audio", "visual")}
    views = tuple(
        ModalityView(m, "vector", np.full(4, np.nan), np.zeros(2)) for m in ("audio", "visual")
    )
    nothing = np.zeros((0, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        for figure in (
            plots.share_quality_figure({"": (lacking, lacking)}),
            plots.attention_figure([plots.AttentionExample("nothing", views)]),
            plots.polar_panels([plots.PolarPanel("", {"a": nothing, "b": nothing}, np.eye(4)[0])]),
        ):
            plots.png_bytes(figure)


def test_token_ids_without_a_word_are_missing_for_a_drop():
    example = {"text": np.zeros(3, np.int32), "audio": np.ones(2, np.float32)}
    drop = ModalityDropout(ModalityInfo("audio", "vector", (2,)), ("text",))
    found = drop.random_map(example, np.random.default_rng(0))
    assert found["audio_mask"] and found["kept/audio"]
    found = drop.random_map(
        example | {"text": np.array([0, 4, 0], np.int32)}, np.random.default_rng(0)
    )
    assert not found["audio_mask"] and not found["kept/audio"]
