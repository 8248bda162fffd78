"""The demo's data: what is in them, that they are learnable, disjoint and the same every time."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow_datasets as tfds

from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import train_batches
from rollingq_jax.data.sources import av_digits
from rollingq_jax.errors import ConfigError, DataError

SIZES = {"train": 1078, "valid": 269 * 3, "test": 450 * 3}


@pytest.fixture(scope="module")
def dataset(av_digits_cache):
    return load_dataset(SimpleNamespace(name="av_digits", cache_dir=av_digits_cache), seed=0)


@pytest.fixture(scope="module")
def clean():
    return av_digits.generate(av_digits.REGIMES["clean"], seed=0, test_pairings=1)


def test_splits_and_examples_are_as_described(dataset):
    assert list(dataset.splits) == ["train", "valid", "test"]
    assert {name: len(source) for name, source in dataset.splits.items()} == SIZES
    assert list(dataset.modalities) == ["audio", "visual"]
    assert dataset.num_classes == 10 and dataset.class_names[7] == "seven"
    for source in dataset.splits.values():
        for example in (source[0], source[len(source) - 1]):
            for name, info in dataset.modalities.items():
                assert example[name].shape == info.shape
                assert example[name].dtype == info.dtype
                assert example[f"quality_{name}"].dtype == np.float32
                assert example[f"quality_{name}"].shape == ()
            assert example["label"].dtype == np.int32 and 0 <= example["label"] < 10


def test_classes_are_balanced(dataset):
    for source in dataset.splits.values():
        counts = np.bincount(source.columns["label"], minlength=10)
        assert counts.min() > 0.9 * counts.max()


def test_images_and_voices_are_disjoint_between_splits(clean):
    images = {
        name: {image.tobytes() for image in columns["visual"]} for name, columns in clean.items()
    }
    # scikit-learn's digits are 1,797 different images, so equal bytes would be the same image.
    assert sum(map(len, images.values())) == len(set.union(*images.values())) == 1797
    voices = av_digits.split_voices(0)
    assert sum(map(len, voices.values())) == len(set().union(*voices.values())) == 70
    for chosen in voices.values():
        accents = collections.Counter(voice.partition("+")[0] for voice in chosen)
        assert len(accents) == 5  # every accent in every split
        assert any(voice.endswith(("croak", "whisper")) for voice in chosen)


def test_training_modalities_are_standardized_before_noise(clean):
    for name in ("audio", "visual"):
        assert abs(clean["train"][name].astype(np.float64).mean()) < 1e-5
        assert abs(clean["train"][name].astype(np.float64).std() - 1) < 1e-5
        assert 0.8 < clean["test"][name].std() < 1.2


def test_the_demos_noise_varies_alike_in_training_and_test():
    """70 % of the utterances up to 8, images .5 always and half of them up to 3 more."""
    regime = av_digits.REGIMES["hard_train"]
    assert regime.train_audio == regime.heldout_audio
    assert regime.train_visual == regime.heldout_visual
    quality = {}
    for name in ("audio", "visual"):
        noise, rng = getattr(regime, f"train_{name}"), np.random.default_rng(0)
        _, quality[name] = av_digits._add_noise(np.zeros((1000, 2)), noise, rng)
    assert (quality["audio"] < 0).mean() == 0.7 and -8 <= quality["audio"].min() < -7.9
    assert quality["visual"].max() == -0.5 and (quality["visual"] < -0.5).mean() == 0.5
    assert -np.hypot(0.5, 3) <= quality["visual"].min() < -2.9


def test_quality_is_minus_the_deviation_of_the_noise_in_the_example(clean):
    regime = av_digits.REGIMES["varied_train"]
    noised = av_digits.generate(regime, seed=0, test_pairings=1)
    for split in ("train", "valid", "test"):
        np.testing.assert_array_equal(noised[split]["label"], clean[split]["label"])
        for name in ("audio", "visual"):
            noise = noised[split][name].astype(np.float64) - clean[split][name]
            measured = noise.reshape(len(noise), -1).std(axis=1)
            claimed = -noised[split][f"quality_{name}"]
            pixels = noise[0].size
            assert (np.abs(measured - claimed) <= 5 * claimed / np.sqrt(2 * pixels) + 1e-6).all()
            assert not clean[split][f"quality_{name}"].any()


@pytest.mark.parametrize("regime", list(av_digits.REGIMES))
def test_the_noise_is_what_the_regime_says(regime, monkeypatch):
    def hum(labels, voices, seed):  # the noise does not depend on what is said
        return {name: np.random.default_rng(0).random((len(x), 2, 2)) for name, x in labels.items()}

    monkeypatch.setattr(av_digits, "_speak", hum)
    noise = av_digits.REGIMES[regime]
    splits = av_digits.generate(noise, seed=0, test_pairings=3)
    for split, columns in splits.items():
        kind = "train" if split == "train" else "heldout"
        more = {}
        for name in ("audio", "visual"):
            part = getattr(noise, f"{kind}_{name}")
            deviation = -columns[f"quality_{name}"].astype(np.float64)
            more[name] = deviation > part.always + 1e-6
            assert abs(more[name].sum() - part.share * len(deviation)) <= 1
            assert np.allclose(deviation[~more[name]], part.always)
            extra = np.sqrt(deviation[more[name]] ** 2 - part.always**2)
            if part.share:
                assert extra.max() <= part.extra + 1e-6
                assert abs(extra.mean() / part.extra - 0.5) < 0.06
                assert extra.min() < 0.1 * part.extra
        if more["audio"].any() and more["visual"].any():
            assert abs(np.corrcoef(more["audio"], more["visual"])[0, 1]) < 0.12


def test_valid_and_test_have_one_distribution(dataset):
    valid, test = (dataset.splits[name].columns for name in ("valid", "test"))
    for name in ("quality_audio", "quality_visual"):
        for level in (0.1, 0.3, 0.5, 0.7, 0.9):
            assert abs(np.quantile(valid[name], level) - np.quantile(test[name], level)) < 0.2


def test_every_heldout_image_meets_several_utterances(clean):
    several = av_digits.generate(av_digits.REGIMES["clean"], seed=0, test_pairings=3)["test"]
    pairs = collections.defaultdict(set)
    for image, audio in zip(several["visual"], several["audio"], strict=True):
        pairs[image.tobytes()].add(audio.tobytes())
    assert len(pairs) == 450 and {len(heard) for heard in pairs.values()} == {3}


def test_each_modality_can_be_learned_and_noise_makes_it_harder(clean, dataset):
    linear_model = pytest.importorskip("sklearn.linear_model")

    def score(train, test, name):
        model = linear_model.RidgeClassifier(alpha=100.0)
        model.fit(train[name].reshape(len(train[name]), -1), train["label"])
        return model.predict(test[name].reshape(len(test[name]), -1)) == test["label"]

    assert score(clean["train"], clean["test"], "audio").mean() > 0.97
    assert score(clean["train"], clean["test"], "visual").mean() > 0.9
    train, test = (dataset.splits[name].columns for name in ("train", "test"))
    for name, most in (("audio", 3.0), ("visual", 1.5)):
        correct = score(train, test, name)
        noised = test[f"quality_{name}"] < -most
        assert correct[~noised].mean() > correct[noised].mean() + 0.02
        assert correct.mean() > 0.75


def test_the_same_seed_gives_the_same_bytes(tmp_path, av_digits_cache, dataset):
    again = load_dataset(SimpleNamespace(name="av_digits", cache_dir=str(tmp_path)), seed=0)
    for split, source in dataset.splits.items():
        for name, column in source.columns.items():
            np.testing.assert_array_equal(
                column, again.splits[split].columns[name], err_msg=f"{split} {name}", strict=True
            )
    cached = load_dataset(SimpleNamespace(name="av_digits", cache_dir=av_digits_cache), seed=0)
    np.testing.assert_array_equal(
        cached.splits["test"].columns["audio"], dataset.splits["test"].columns["audio"]
    )


def test_another_seed_gives_other_splits_and_noise():
    regime = av_digits.REGIMES["varied_test"]
    one, other = (av_digits.generate(regime, seed=seed, test_pairings=1)["test"] for seed in (1, 2))
    assert not np.array_equal(one["quality_audio"], other["quality_audio"])
    assert not np.array_equal(one["audio"], other["audio"])
    assert av_digits.split_voices(1) != av_digits.split_voices(2)


def test_tfds_knows_the_builder(tmp_path, capfd):
    builder = tfds.builder("av_digits/clean", data_dir=tmp_path)
    assert isinstance(builder, av_digits.AvDigits)
    assert builder.info.features["label"].names == list(av_digits.WORDS)


def test_building_shows_a_bar_on_a_terminal_alone_and_no_notices(tmp_path, capfd, monkeypatch):
    config = SimpleNamespace(cache_dir=str(tmp_path), test_pairings=1)
    av_digits.load(config, seed=3)
    assert capfd.readouterr() == ("", "")
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    av_digits.load(config, seed=4)
    out, err = capfd.readouterr()
    assert out == ""
    assert "speaking digits" in err and "data configuration" not in err


def test_the_description_says_what_was_generated(dataset):
    text = dataset.description
    assert "seed 0" in text and "audio 50% up to 4 more" in text and "0.6 always" in text
    for name, size in SIZES.items():
        assert f"{name}: {size} examples, per class " in text
    for voice in av_digits.split_voices(0)["test"]:
        assert voice in text.splitlines()[-1]


def test_the_pipeline_takes_it_as_it_is(dataset):
    batch = next(train_batches(dataset.splits["train"], batch_size=64, seed=0, num_steps=1))
    assert batch["audio"].shape == (64, 32, 32, 1) and batch["visual"].shape == (64, 8, 8, 1)
    assert batch["quality_audio"].shape == batch["label"].shape == (64,)


def test_mistakes_are_named(tmp_path, av_digits_cache):
    def load(**fields):
        return load_dataset(SimpleNamespace(name="av_digits", **fields), seed=0)

    with pytest.raises(
        ConfigError, match=r"data.regime: 'loud'; must be one of varied_test, noisy_audio, v"
    ):
        load(regime="loud", cache_dir=av_digits_cache)
    with pytest.raises(ConfigError, match=r"data.test_pairings: 0; must be at least 1"):
        load(test_pairings=0, cache_dir=av_digits_cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir: .* cannot be written"):
        load(cache_dir=str(tmp_path / "file"))
