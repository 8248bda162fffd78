"""The demo's data: what is in them, that they are learnable, disjoint and the same every time."""

import collections
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import tensorflow_datasets as tfds

from rollingq_jax.data.audio import log_mel, trim_silence
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import train_batches
from rollingq_jax.data.sources import av_digits
from rollingq_jax.errors import ConfigError, DataError

SIZES = {"train": 1078, "valid": 269 * 3, "test": 450 * 3}


@pytest.fixture(scope="module")
def dataset(av_digits_cache):
    return load_dataset(SimpleNamespace(name="av_digits", cache_dir=av_digits_cache), seed=0)


@pytest.fixture(scope="module")
def spoken():
    """Speech by what determines it, so that the same is spoken once; a test holds that it is so."""
    known, speak = {}, av_digits._speak

    def remembered(labels, voices, seed):
        key = (seed, *(column.tobytes() for column in labels.values()))
        if key not in known:
            known[key] = speak(labels, voices, seed)
        return known[key]

    return remembered


@pytest.fixture(scope="module")
def clean(spoken):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(av_digits, "_speak", spoken)
        return av_digits.generate(av_digits.REGIMES["clean"], seed=0, test_pairings=1)


@pytest.fixture
def few_images(monkeypatch):
    """200 images of 1,797, so that less is spoken."""
    digits = sklearn.datasets.load_digits()
    few = SimpleNamespace(images=digits.images[:200], target=digits.target[:200])
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: few)


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


def test_quality_is_minus_the_deviation_of_the_noise_in_the_example(clean, spoken, monkeypatch):
    monkeypatch.setattr(av_digits, "_speak", spoken)
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


def test_every_heldout_image_meets_several_utterances(few_images):
    several = av_digits.generate(av_digits.REGIMES["clean"], seed=0, test_pairings=3)["test"]
    pairs = collections.defaultdict(set)
    for image, sound in zip(several["visual"], several["audio"], strict=True):
        pairs[image.tobytes()].add(sound.tobytes())
    assert len(pairs) == 50 and {len(heard) for heard in pairs.values()} == {3}


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


def test_the_same_seed_gives_the_same_bytes(tmp_path, few_images):
    one, again = (
        load_dataset(SimpleNamespace(name="av_digits", cache_dir=str(tmp_path / name)), seed=0)
        for name in ("one", "again")
    )
    for split, source in one.splits.items():
        for name, column in source.columns.items():
            np.testing.assert_array_equal(
                column, again.splits[split].columns[name], err_msg=f"{split} {name}", strict=True
            )


def test_the_cache_gives_the_same_again(av_digits_cache, dataset):
    cached = load_dataset(SimpleNamespace(name="av_digits", cache_dir=av_digits_cache), seed=0)
    np.testing.assert_array_equal(
        cached.splits["test"].columns["audio"], dataset.splits["test"].columns["audio"]
    )


def test_another_seed_gives_other_splits_and_noise(few_images):
    regime = av_digits.REGIMES["varied_test"]
    one, other = (av_digits.generate(regime, seed=seed, test_pairings=1)["test"] for seed in (1, 2))
    assert not np.array_equal(one["quality_audio"], other["quality_audio"])
    assert not np.array_equal(one["audio"], other["audio"])
    assert av_digits.split_voices(1) != av_digits.split_voices(2)


def test_tfds_knows_the_builder(tmp_path, capfd):
    builder = tfds.builder("av_digits/clean", data_dir=tmp_path)
    assert isinstance(builder, av_digits.AvDigits)
    assert builder.info.features["label"].names == list(av_digits.WORDS)


def test_building_shows_a_bar_on_a_terminal_alone_and_no_notices(
    tmp_path, capfd, monkeypatch, few_images
):
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
        ConfigError, match=r"data.regime: 'loud'; allowed: one of varied_test, noisy_audio, v"
    ):
        load(regime="loud", cache_dir=av_digits_cache)
    with pytest.raises(ConfigError, match=r"data.test_pairings: 0; allowed: at least 1"):
        load(test_pairings=0, cache_dir=av_digits_cache)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cache_dir: .* cannot be written"):
        load(cache_dir=str(tmp_path / "file"))


RATE = 22050


@pytest.fixture(scope="module")
def synthesizer():
    return av_digits.Synthesizer()


@pytest.mark.parametrize("voice", av_digits.VOICES)
@pytest.mark.parametrize("variant", ["", "+m1", "+f5", "+croak", "+whisper"])
def test_every_accent_speaks(synthesizer, voice, variant):
    waveform = synthesizer.say("seven", voice=voice + variant)
    assert waveform.dtype == np.float32
    assert 0.2 < len(waveform) / synthesizer.sample_rate < 1.5
    assert 0.05 < np.abs(waveform).max() <= 1


def test_every_variant_is_in_the_library_and_differs_from_the_plain_voice(synthesizer):
    # espeak-ng falls back on the plain voice, without an error, for a variant that it lacks.
    def timbre(voice):
        mels = [log_mel(trim_silence(synthesizer.say("five", voice=voice)), RATE) for _ in range(3)]
        return np.mean(mels, axis=0)

    plain = timbre("en-us")
    drift = np.abs(timbre("en-us") - plain).mean()
    for variant in av_digits.VARIANTS:
        assert np.abs(timbre(f"en-us+{variant}") - plain).mean() > 2 * drift, variant


def test_a_higher_rate_is_shorter_and_a_higher_pitch_is_higher(synthesizer):
    def pitch_of(waveform):
        middle = waveform[len(waveform) // 3 : 2 * len(waveform) // 3].astype(np.float64)
        correlation = np.correlate(middle, middle, "full")[len(middle) :]
        lags = slice(RATE // 400, RATE // 60)
        return RATE / (lags.start + np.argmax(correlation[lags]))

    slow, fast = (len(synthesizer.say("three", voice="en-us", rate=r)) for r in (120, 240))
    assert fast < 0.8 * slow
    low, high = (pitch_of(synthesizer.say("nine", voice="en-us", pitch=p)) for p in (20, 80))
    assert high > 1.3 * low


def test_the_same_calls_give_the_same_samples():
    def speak():
        synthesizer = av_digits.Synthesizer()
        return [
            synthesizer.say(word, voice=f"en-gb+{variant}")
            for variant in ("m2", "whisper", "croak", "f4")
            for word in ("one", "one", "six")
        ]

    first = speak()
    av_digits.Synthesizer().say("whatever else was said", voice="en-us+whisper")
    second = speak()
    assert not np.array_equal(first[0], first[1])  # which is why each needs its own library
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one, other)


def test_mistakes_in_what_to_say_are_named(synthesizer):
    with pytest.raises(DataError, match="'xx' is not one of en-029, en-gb"):
        synthesizer.say("one", voice="xx")
    with pytest.raises(DataError, match="'m9' is not one of m1"):
        synthesizer.say("one", voice="en-us+m9")
    with pytest.raises(DataError, match="rate: 10; from 80 to 450"):
        synthesizer.say("one", voice="en-us", rate=10)
    with pytest.raises(DataError, match="pitch: 101; from 0 to 100"):
        synthesizer.say("one", voice="en-us", pitch=101)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "espeakng_loader", None)
    with pytest.raises(DataError, match="pip install espeakng-loader") as caught:
        av_digits.Synthesizer()
    assert "\n" not in str(caught.value)


def test_a_library_or_data_that_cannot_be_used_are_named(monkeypatch, tmp_path):
    import espeakng_loader

    monkeypatch.setattr(espeakng_loader, "get_data_path", lambda: str(tmp_path))
    with pytest.raises(DataError, match="no usable data"):
        av_digits.Synthesizer()
    broken = tmp_path / "libespeak-ng.so"
    broken.write_bytes(b"not a library")
    monkeypatch.setattr(espeakng_loader, "get_library_path", lambda: str(broken))
    with pytest.raises(DataError, match="cannot be loaded"):
        av_digits.Synthesizer()
