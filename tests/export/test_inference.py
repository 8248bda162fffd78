"""Predictions: equal to the model's, for any batch size, with whatever modalities there are."""

import dataclasses
import json
import logging

import jax
import numpy as np
import pytest

import rollingq_jax as rq
from rollingq_jax.data.dataset import ModalityInfo
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.sources.media_folder import MediaSizes
from rollingq_jax.errors import DataError, UserError
from rollingq_jax.inference import Predictor, chunks, read_files
from rollingq_jax.train import load_run
from tests.export.export_cases import CLASSES, HEADS, INPUTS, made_run, make_batch


@pytest.fixture(scope="module")
def predictor(run):
    return Predictor(run.model, run.params, run.rotation, INPUTS, max_batch_size=4)


@pytest.fixture(scope="module")
def direct(run):
    """The model itself, at the batch's own size."""

    @jax.jit
    def apply(batch):
        return run.model.apply({"params": run.params}, batch, rotation=run.rotation)

    def answer(batch):
        logits, out = apply(batch)
        return jax.nn.softmax(logits, axis=-1), out["attention_share"]

    return answer


def check_equal(found, expected):
    np.testing.assert_allclose(found.probabilities, expected[0], atol=1e-6)
    assert sorted(found.attention_share) == sorted(expected[1])
    for m, share in expected[1].items():
        np.testing.assert_allclose(found.attention_share[m], share, atol=1e-6)


def test_equals_the_model_with_its_rotation(predictor, direct):
    batch = make_batch(7)
    found = predictor(batch)
    check_equal(found, direct(batch))
    assert found.probabilities.shape == (7, CLASSES)
    assert found.attention_share["text"].shape == (7, HEADS)
    np.testing.assert_allclose(sum(found.attention_share.values()), 1.0, atol=1e-6)
    plain = Predictor(predictor.model, predictor.params, None, INPUTS)(batch)
    assert np.abs(plain.probabilities - found.probabilities).max() > 1e-3


def test_any_batch_size_needs_few_compilations(run, caplog):
    predictor = Predictor(run.model, run.params, run.rotation, INPUTS, max_batch_size=4)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        for size in (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 17):
            assert len(predictor(make_batch(size)).probabilities) == size
    compiled = [r for r in caplog.records if "Finished XLA compilation" in r.getMessage()]
    assert len(compiled) == 3  # sizes 1, 2, 4


@pytest.mark.parametrize(
    ("total", "sizes"), [(1, [1]), (3, [4]), (4, [4]), (5, [4, 1]), (11, [4, 4, 4]), (6, [4, 2])]
)
def test_parts_are_powers_of_two(total, sizes):
    batch = {"x": np.arange(total)}
    parts = list(chunks(batch, 4))
    assert [len(part["x"]) for part, _ in parts] == sizes
    np.testing.assert_array_equal(
        np.concatenate([part["x"][:rows] for part, rows in parts]), batch["x"]
    )


def test_a_missing_modality_is_masked_out(predictor, direct):
    batch = make_batch(3)
    absent = {**batch, "audio_mask": np.zeros(3, bool)}
    expected = direct(absent)
    check_equal(predictor(absent), expected)
    without = {name: x for name, x in batch.items() if name != "audio"}
    found = predictor(without)
    check_equal(found, expected)
    np.testing.assert_array_equal(found.attention_share["audio"], 0.0)
    other = {**absent, "audio": np.full_like(batch["audio"], np.nan)}
    check_equal(predictor(other), expected)


def test_single_examples_may_lack_a_modality(predictor, direct):
    batch = make_batch(3) | {"visual_mask": np.array([True, False, True])}
    found = predictor(batch)
    check_equal(found, direct(batch))
    assert (found.attention_share["visual"][1] == 0).all()
    assert (found.attention_share["visual"][[0, 2]] > 0).all()


def test_positions_can_be_masked(predictor, direct):
    batch = make_batch(2) | {"audio_mask": np.arange(5)[None] < np.array([[2], [5]])}
    check_equal(predictor(batch), direct(batch))


def test_other_keys_and_wider_dtypes_are_taken(predictor):
    batch = make_batch(2)
    wide = {
        "audio": batch["audio"].astype(np.float64).tolist(),
        "text": batch["text"].astype(np.int64),
        "visual": batch["visual"],
        "label": [0, 1],
        "quality_audio": np.zeros(2),
    }
    np.testing.assert_array_equal(predictor(wide)[0], predictor(batch)[0])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"audio": None, "text": None, "visual": None}, "allowed: at least one of audio, text"),
        ({"audio": np.zeros((2, 5, 4), np.float32)}, r"allowed: \[N, 5, 3\], float"),
        ({"audio": [[1.0], [1.0, 2.0]]}, "audio is not an array"),
        ({"audio": np.zeros((2, 5, 3), complex)}, "audio has shape .* and dtype complex128"),
        ({"visual": np.zeros((2, 4, 4, 3), np.float32)}, r"allowed: \[N, 4, 4, 3\], uint8"),
        ({"text": np.zeros((3, 6), np.int32)}, "numbers of examples: audio 2, text 3, visual 2"),
        ({"audio_mask": np.ones(2)}, "audio_mask has shape .* and dtype float64"),
        ({"audio_mask": np.ones(3, bool)}, r"allowed: \(2,\) or \(2, 5\), bool"),
        ({"audio_mask": np.ones((2, 4), bool)}, r"audio_mask has shape \(2, 4\) .* \(2, 5\), bool"),
        ({"audio": np.full((2, 5, 3), np.nan)}, "audio holds NaN or infinity; allowed: finite"),
        ({"text": np.full((2, 6), 10**6)}, "text holds 1000000; allowed: 0 to"),
        ({"text": np.full((2, 6), -1)}, "text holds -1; allowed: 0 to"),
    ],
)
def test_mistakes(predictor, change, says):
    batch = {n: x for n, x in (make_batch(2) | change).items() if x is not None}
    with pytest.raises(DataError, match=says):
        predictor(batch)


def test_an_empty_batch_and_an_odd_size(predictor):
    with pytest.raises(DataError, match="allowed: one number, 1 or more"):
        predictor(make_batch(0))
    with pytest.raises(UserError, match="max_batch_size is 6; allowed: a power of two"):
        Predictor(predictor.model, predictor.params, None, INPUTS, max_batch_size=6)


def test_a_fusion_without_attention_has_no_share():
    run = made_run("concat")
    found = Predictor(run.model, run.params, None, INPUTS)(make_batch(2))
    assert found.attention_share == {} and found.probabilities.shape == (2, CLASSES)


def test_load_answers_as_the_run_was_tested(workdir, caplog):
    predict = rq.load(str(workdir))
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
    run = load_run(workdir)
    test = load_dataset(run.config.data, seed=run.config.seed).splits["test"]
    columns = {
        m: np.stack([example[m] for example in map(test.__getitem__, range(12))])
        for m in ("audio", "visual", "label")
    }
    raw = np.load(workdir.parent / "data.npz")
    arrays = {key: raw[f"test/{key}"] for key in ("audio", "visual", "label")}
    probabilities, share = predict(arrays)
    check_equal(predict(columns, standardized=True), (probabilities, share))
    assert predict.rotation is not None and sorted(share) == ["audio", "visual"]
    summary = json.loads((workdir / "summary.json").read_text())
    accuracy = (probabilities.argmax(axis=-1) == columns["label"]).mean()
    assert accuracy == pytest.approx(summary["test_accuracy"])
    for m, value in summary["attention_share"].items():
        assert share[m].mean() == pytest.approx(value, abs=1e-5)


def test_load_names_a_folder_that_holds_no_run(tmp_path):
    with pytest.raises(rq.CheckpointError, match="allowed: the folder of a run"):
        rq.load(tmp_path)


def test_cells_are_read_as_those_of_a_manifest():
    media = {"type": "string", **dataclasses.asdict(MediaSizes("mel", text_length=4))}
    info = ModalityInfo("words", "tokens", (4,), "int32", 257)
    one = Preprocessing(info, (4,), "int32", media=media)
    found = read_files("words", [" ab ", "  ", None, "ab"], one)
    assert found["words_mask"].tolist() == [True, False, False, True]
    assert (found["words"] == [[98, 99, 0, 0], [0] * 4, [0] * 4, [98, 99, 0, 0]]).all()
    with pytest.raises(DataError, match="words holds 3; allowed: paths or texts"):
        read_files("words", ["a", 3], one)
