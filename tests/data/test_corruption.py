"""Corruptions: how much noise there is, what is touched and what is not, and clear refusals."""

import dataclasses
import types

import numpy as np
import pytest

from rollingq_jax.data.corruption import (
    Corruption,
    GaussianNoise,
    corrupt,
    misalign,
    parse_corruptions,
    training_deviation,
)
from rollingq_jax.data.dataset import ArraySource, Dataset, ModalityInfo
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.sources.arrays import from_arrays
from rollingq_jax.errors import ConfigError, DataError


def make_arrays(num_train=40, num_test=24):
    rng = np.random.default_rng(0)
    arrays = {}
    for split, count in (("train", num_train), ("test", num_test)):
        arrays |= {
            f"{split}/label": np.arange(count) % 3,
            f"{split}/photo": rng.integers(0, 255, (count, 9, 8, 3)).astype("u1"),
            f"{split}/clip": rng.integers(0, 255, (count, 5, 6, 6, 3)).astype("u1"),
            f"{split}/sound": rng.normal(5, 3, size=(count, 12, 20, 1)),
            f"{split}/steps": rng.normal(2, 7, size=(count, 16, 5)),
            f"{split}/mask_steps": np.arange(16) < rng.integers(4, 17, (count, 1)),
            f"{split}/words": rng.integers(1, 20, (count, 7)),
        }
    return arrays


@pytest.fixture(scope="module")
def dataset():
    return from_arrays(make_arrays())


def read(dataset, split="test", **kwargs):
    """All examples of a split, stacked."""
    return next(
        iter(
            eval_batches(
                dataset.splits[split],
                batch_size=len(dataset.splits[split]),
                transforms=dataset.eval_transforms,
                **kwargs,
            )
        )
    )


def normalized(pixels, info):
    return (pixels / 255 - np.array(info.mean)) / np.array(info.std)


@pytest.mark.parametrize("scale", [0.25, 1.0, 2.0])
def test_noise_in_training_standard_deviations(dataset, scale):
    clean, noisy = read(dataset), read(corrupt(dataset, f"sound={scale}, steps={scale}"))
    difference = noisy["sound"] - clean["sound"]
    assert difference.std() == pytest.approx(scale, rel=0.05)
    assert abs(difference.mean()) < 0.1 * scale
    mask = clean["steps_mask"]
    assert (noisy["steps"] - clean["steps"])[mask].std() == pytest.approx(scale, rel=0.06)
    assert not noisy["steps"][~mask].any()
    np.testing.assert_allclose(noisy["quality_sound"], -scale)
    for name in ("photo", "clip", "words", "label"):
        np.testing.assert_array_equal(noisy[name], clean[name])
    assert "quality_photo" not in noisy


def test_noise_on_pixels_is_added_after_normalization(dataset):
    info = dataset.modalities["photo"]
    clean, noisy = read(dataset)["photo"], read(corrupt(dataset, "photo=0.5"))["photo"]
    difference = noisy - normalized(clean, info)
    assert noisy.dtype == np.float32 and difference.std() == pytest.approx(0.5, rel=0.05)
    np.testing.assert_allclose(
        read(corrupt(dataset, "photo=0"))["photo"], normalized(clean, info), atol=1e-6
    )
    # A model that normalizes otherwise sees the same pixels and noise of as many deviations.
    encoders = {"photo": {"kind": "image", "mean": (0.5,), "std": (0.5,)}}
    other = read(corrupt(dataset, "photo=0.5", encoders=encoders))["photo"]
    expected_std = 0.5 * (clean / 255 / 0.5).std()
    assert (other - (clean / 255 - 0.5) / 0.5).std() == pytest.approx(expected_std, rel=0.05)


def test_the_unit_is_measured_where_it_is_not_stated():
    raw = from_arrays(make_arrays(), standardize=False)
    info = raw.modalities["sound"]
    assert info.unit is None and training_deviation(raw, info) == pytest.approx(3, rel=0.05)
    difference = read(corrupt(raw, "sound=1"))["sound"] - read(raw)["sound"]
    assert difference.std() == pytest.approx(3, rel=0.06)
    assert training_deviation(raw, raw.modalities["steps"]) == pytest.approx(7, rel=0.1)


def test_a_range_is_drawn_for_each_example(dataset):
    quality = read(corrupt(dataset, "sound=0.5..2"))["quality_sound"]
    assert (quality >= -2).all() and (quality <= -0.5).all() and len(set(quality.tolist())) > 20


def test_noises_add_in_variance(dataset):
    twice = read(corrupt(dataset, "sound=3, sound=4"))
    np.testing.assert_allclose(twice["quality_sound"], -5)
    assert (twice["sound"] - read(dataset)["sound"]).std() == pytest.approx(5, rel=0.05)


@pytest.mark.parametrize("decibels", [-10, 0, 20])
def test_noise_at_a_ratio_to_the_signal(dataset, decibels):
    clean, noisy = read(dataset), read(corrupt(dataset, f"sound=snr:{decibels}, steps=snr:0"))
    axes = (1, 2, 3)
    signal = np.square(clean["sound"]).mean(axis=axes)
    noise = np.square(noisy["sound"] - clean["sound"]).mean(axis=axes)
    np.testing.assert_allclose(10 * np.log10(signal / noise), decibels, atol=1.5)
    expected = -np.sqrt(signal) * 10 ** (-decibels / 20)
    np.testing.assert_allclose(noisy["quality_sound"], expected, rtol=1e-4)
    assert not noisy["steps"][~clean["steps_mask"]].any()


def test_drop(dataset):
    every = read(corrupt(dataset, "steps=drop, photo=drop"))
    assert not every["steps_mask"].any() and not every["photo_mask"].any()
    assert every["steps_mask"].shape == (24, 16) and every["photo_mask"].shape == (24,)
    some = read(corrupt(dataset, "photo=drop:0.5"))["photo_mask"]
    assert 4 < some.sum() < 20


def test_the_last_modality_stays(dataset):
    names = ("clip", "photo", "sound", "steps", "words")
    batch = read(corrupt(dataset, ", ".join(f"{name}=drop" for name in names)))
    left = np.stack([batch[f"{n}_mask"].reshape(24, -1).any(axis=1) for n in names])
    np.testing.assert_array_equal(left.sum(axis=0), 1)


def test_blank_frames(dataset):
    clean = read(dataset)
    blank = read(corrupt(dataset, "clip=blank:0.5, steps=blank:1, words=blank:0.5"))
    mean = np.rint(255 * np.array(dataset.modalities["clip"].mean))
    is_blank = (blank["clip"] == mean).all(axis=(2, 3, 4))
    assert 0.3 < is_blank.mean() < 0.7
    np.testing.assert_array_equal(blank["clip"][~is_blank], clean["clip"][~is_blank])
    assert not blank["steps"].any() and blank["clip"].dtype == np.uint8
    assert 0.3 < (blank["words"] == 0).mean() < 0.7 and blank["words"].dtype == np.int32


def test_time_masking_blanks_one_stretch(dataset):
    batch = read(corrupt(dataset, "sound=timemask:0.5"))
    blank = (batch["sound"] == 0).all(axis=(1, 3))
    assert blank.shape == (24, 20) and blank.sum(axis=1).max() <= 10 and blank.any()
    assert (np.abs(np.diff(blank.astype(int), axis=1)).sum(axis=1) <= 2).all()


def test_replace(dataset):
    clean, noise = (
        read(dataset),
        read(corrupt(dataset, "sound=replace, words=replace, photo=replace")),
    )
    correlation = np.corrcoef(clean["sound"].ravel(), noise["sound"].ravel())[0, 1]
    assert abs(correlation) < 0.05 and noise["sound"].std() == pytest.approx(1, rel=0.05)
    assert noise["photo"].std() == pytest.approx(1, rel=0.05)
    assert noise["words"].min() >= 1 and noise["words"].max() < 20
    assert (noise["words"] == clean["words"]).mean() < 0.2
    some = read(corrupt(dataset, "sound=replace:0.5"))["sound"]
    kept = (some == clean["sound"]).all(axis=(1, 2, 3))
    assert 4 < kept.sum() < 20


def test_misalignment_takes_from_another_class(dataset):
    clean, mixed = read(dataset), read(corrupt(dataset, "steps=misalign", seed=3))
    for index in range(24):
        same = (clean["steps"] == mixed["steps"][index]).all(axis=(1, 2))
        partner = int(np.flatnonzero(same)[0])
        assert clean["label"][partner] != mixed["label"][index]
        np.testing.assert_array_equal(mixed["steps_mask"][index], clean["steps_mask"][partner])
    np.testing.assert_array_equal(mixed["label"], clean["label"])
    np.testing.assert_array_equal(mixed["sound"], clean["sound"])
    again, other = (read(corrupt(dataset, "steps=misalign", seed=s))["steps"] for s in (3, 4))
    np.testing.assert_array_equal(mixed["steps"], again)
    assert not np.array_equal(mixed["steps"], other)
    half = read(corrupt(dataset, "steps=misalign:0.5"))["steps"]
    assert 4 < (half == clean["steps"]).all(axis=(1, 2)).sum() < 20
    # The training split stays as it is.
    assert corrupt(dataset, "steps=misalign").splits["train"] is dataset.splits["train"]


def test_misalignment_needs_two_classes():
    source = ArraySource({"m": np.zeros((3, 2), np.float32), "label": np.zeros(3, np.int32)})
    with pytest.raises(DataError, match="one class"):
        misalign(source, "m")
    with pytest.raises(ConfigError, match="between 0 and 1"):
        misalign(source, "m", prob=2.0)


def test_training_corruptions_vary_by_epoch_and_repeat_by_seed(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **make_arrays())
    config = types.SimpleNamespace(
        name="arrays", path=str(path), corruptions="sound=1, photo=drop:0.5"
    )
    dataset = load_dataset(config, seed=0, encoders={"sound": {"kind": "spectrogram"}, "words": {}})
    assert dataset.eval_transforms == () and len(dataset.train_transforms) == 2

    def batches(seed):
        return list(
            train_batches(
                dataset.splits["train"],
                batch_size=12,
                num_steps=6,
                seed=seed,
                transforms=dataset.train_transforms,
            )
        )

    first, again, other = batches(0), batches(0), batches(1)
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a["sound"], b["sound"])
        np.testing.assert_array_equal(a["photo_mask"], b["photo_mask"])
    assert not np.array_equal(first[0]["sound"], other[0]["sound"])


def test_kinds_of_the_encoders_reach_the_arrays(tmp_path):
    path = tmp_path / "d.npz"
    np.savez(path, **make_arrays())
    config = types.SimpleNamespace(name="arrays", path=str(path))
    dataset = load_dataset(config, seed=0, encoders={"sound": {"kind": "image"}})
    assert dataset.modalities["sound"].kind == "image"


def test_transforms_of_the_data_set_come_first():
    import grain

    class Double(grain.transforms.Map):
        def map(self, element):
            return element | {"m": element["m"] * np.float32(2)}

    values = np.random.default_rng(0).normal(0, 3, (200, 4)).astype(np.float32)
    source = ArraySource({"m": values, "label": (np.arange(200) % 2).astype(np.int32)})
    info = ModalityInfo("m", "vector", (4,))
    base = Dataset({"train": source, "test": source}, {"m": info}, 2, eval_transforms=(Double(),))
    assert training_deviation(base, info) == pytest.approx(6, rel=0.1)
    noisy = corrupt(base, "m=1")
    assert noisy.eval_transforms[0] is base.eval_transforms[0]
    assert isinstance(noisy.eval_transforms[1], GaussianNoise)


def test_parsing():
    assert parse_corruptions("", ["a"]) == ()
    assert parse_corruptions(" a = 1.0 ,b=drop", ["a", "b"]) == (
        Corruption("a", "noise", 1.0),
        Corruption("b", "drop", None),
    )
    assert parse_corruptions("a=0.5..2,a=noise:1,a=snr:-5", ["a"]) == (
        Corruption("a", "noise", (0.5, 2.0)),
        Corruption("a", "noise", 1.0),
        Corruption("a", "snr", -5.0),
    )
    assert parse_corruptions("a=0.5, a=0..3@0.3, a=noise:2@1", ["a"]) == (
        Corruption("a", "noise", 0.5),
        Corruption("a", "noise", (0.0, 3.0), 0.3),
        Corruption("a", "noise", 2.0, 1.0),
    )


def test_noise_in_a_share_of_the_examples():
    """On zeros the value is the noise: of 2 in 30 % on top of .5 in all, and quality says so."""
    count = 600
    source = ArraySource({"m": np.zeros((count, 400), np.float32), "label": np.arange(count) % 2})
    info = ModalityInfo("m", "vector", (400,), unit=1.0)
    dataset = Dataset({"train": source}, {"m": info}, 2, ("0", "1"))
    noised = corrupt(dataset, "m=0.5, m=2@0.3", train=True)
    rng = np.random.default_rng(0)
    found = []
    for index in range(count):
        example = source[index]
        for transform in noised.train_transforms:
            example = transform.random_map(example, rng)
        found.append((example["m"].std(), -example["quality_m"]))
    measured, claimed = np.array(found).T
    np.testing.assert_allclose(measured, claimed, rtol=0.2)
    assert 0.25 < (claimed > 1).mean() < 0.35
    assert {round(float(q), 4) for q in claimed} == {0.5, round(float(np.hypot(0.5, 2)), 4)}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("sound", "allowed: modality=NUMBER"),
        ("sound=", "allowed: modality=NUMBER"),
        ("sound=loud", "allowed: modality=NUMBER"),
        ("sound=loud:3", "allowed: modality=NUMBER"),
        ("sound=snr", "allowed: modality=NUMBER"),
        ("sound=snr:1..2", "allowed: modality=NUMBER"),
        ("sound=1..", "allowed: modality=NUMBER"),
        ("smell=1", "no modality 'smell'; there are clip, photo, sound, steps, words"),
        ("sound=-1", "noise of 'sound': -1.0; allowed: 0 or more"),
        ("sound=1@", "allowed: modality=NUMBER"),
        ("sound=1@2", "noise of 'sound': 2.0; allowed: between 0 and 1"),
        ("sound=snr:1@0.5", "allowed: modality=NUMBER"),
        ("sound=nan", "allowed: 0 or more"),
        ("sound=2..1", "allowed: 0 or more"),
        ("sound=snr:inf", "allowed: finite"),
        ("words=1", "noise of 'words': token ids cannot take noise"),
        ("words=snr:1", "token ids cannot take noise"),
        ("sound=drop:2", "drop of 'sound': 2.0; allowed: between 0 and 1"),
        ("sound=replace:-1", "between 0 and 1"),
        ("sound=misalign:1.5", "between 0 and 1"),
        ("photo=blank:0.5", "kind 'image'; allowed: video, sequence or tokens"),
        ("clip=blank:7", "between 0 and 1"),
        ("photo=timemask:0.5", "no time axis"),
    ],
)
def test_mistakes_are_named(dataset, text, words):
    with pytest.raises(ConfigError) as caught:
        corrupt(dataset, text)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_single_modality_cannot_be_dropped(dataset):
    alone = dataclasses.replace(dataset, modalities={"sound": dataset.modalities["sound"]})
    with pytest.raises(ConfigError, match="only modality"):
        corrupt(alone, "sound=drop")
