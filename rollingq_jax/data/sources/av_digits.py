"""Spoken and handwritten digits whose quality varies: the demo's data, as a TFDS builder.

scikit-learn's 1,797 handwritten digits (8 x 8) are paired by class with digits spoken by espeak-ng.
Images and voices are disjoint between train, valid and test; valid and test have the same
distribution, so settings can be chosen on valid.

An example: `audio` float32 [32, 32, 1], a spoken digit's log-mel spectrogram [mel, time, 1];
`visual` float32 [8, 8, 1], a handwritten digit; `label`; `quality_audio`, `quality_visual`.

Each modality is standardized with the mean and the standard deviation (scalars) of its training
split before noise, so 1 is a training-set standard deviation. Then white Gaussian noise is added
once, so that an example has the same in every epoch. Where an example gets noise of standard
deviation `always` and further noise of `extra`, the two are independent, so their sum has
`sqrt(always^2 + extra^2)`. A modality's quality is minus that.

The speech comes from espeak-ng (GPL-3) through the shared library in the package espeakng_loader.
It is called to build data only; nothing of it is part of a model or of this package.
"""

import contextlib
import ctypes
import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from rollingq_jax.data.audio import log_mel, trim_silence
from rollingq_jax.data.cache import build_once, cache_root
from rollingq_jax.data.dataset import SPLITS, ArraySource, Dataset, ModalityInfo, stratified_split
from rollingq_jax.data.options import choice, option
from rollingq_jax.data.records import open_prepared
from rollingq_jax.errors import DataError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_FRACTIONS = (0.6, 0.15, 0.25)


@dataclasses.dataclass(frozen=True)
class Noise:
    """Noise of one modality in one split, in training-set standard deviations.

    Attributes:
      always: standard deviation of the noise that every example gets.
      share: of the examples that get further noise (which ones is independent between modalities).
      extra: its standard deviation is uniform in (0, extra].
    """

    always: float = 0.0
    share: float = 0.0
    extra: float = 0.0

    def __str__(self) -> str:
        parts = [f"{self.always:g} always"] if self.always else []
        parts += [f"{self.share:.0%} up to {self.extra:g} more"] if self.share else []
        return " and ".join(parts) or "none"


@dataclasses.dataclass(frozen=True)
class Regime:
    """Noise of each modality, in training and in valid and test alike."""

    train_audio: Noise = Noise()
    train_visual: Noise = Noise()
    heldout_audio: Noise = Noise()
    heldout_visual: Noise = Noise()


_LOUD, _BLURRED = Noise(share=0.5, extra=4.0), Noise(always=0.8, share=1 / 3, extra=1.0)
_HARD_AUDIO, _HARD_VISUAL = Noise(share=0.7, extra=8.0), Noise(always=0.5, share=0.5, extra=3.0)
REGIMES = {
    # Quality varies only where the model is used, as with natural training data.
    "varied_test": Regime(
        train_visual=Noise(always=0.6),
        heldout_audio=_LOUD,
        heldout_visual=Noise(always=0.6, share=0.5, extra=2.0),
    ),
    # The same, with speech that training does not find perfect either: in natural data no modality
    # is, and one that is leaves nothing for the other to learn. At 3 a probe of either modality
    # reads about as many digits as one of the other, so what attention prefers is not what is
    # better but what was learned first.
    "noisy_audio": Regime(
        train_audio=Noise(always=3.0),
        train_visual=Noise(always=0.6),
        heldout_audio=Noise(always=3.0, share=0.5, extra=4.0),
        heldout_visual=Noise(always=0.6, share=0.5, extra=2.0),
    ),
    # Quality varies in training too.
    "varied_train": Regime(_LOUD, _BLURRED, _LOUD, _BLURRED),
    # The demo's: it varies widely and alike everywhere. Each modality by itself reads about seven
    # digits in ten, and which of them is to be believed differs from sample to sample.
    "hard_train": Regime(_HARD_AUDIO, _HARD_VISUAL, _HARD_AUDIO, _HARD_VISUAL),
    # For noise that is fresh in every epoch: a random transformation in the pipeline.
    "clean": Regime(),
}


@dataclasses.dataclass(eq=False)
class AvDigitsConfig(tfds.core.BuilderConfig):
    """All that determines the data; `av_digits_config` names it after that."""

    name: str = ""
    noise: Regime = REGIMES["varied_test"]
    seed: int = 0
    test_pairings: int = 3


def load(config_data: Any, *, seed: int) -> Dataset:
    """The digits, built on first use (some seconds) and kept in the cache.

    Args:
      config_data: `regime` (a key of `REGIMES`, "varied_test"), `test_pairings` (3),
        `cache_dir` ("": see `rollingq_jax.data.cache.cache_root`).
      seed: of the split, the voices and the noise.

    Raises:
      ConfigError: a field has a value that is not allowed.
      DataError: espeak-ng cannot be used, the cache cannot be written or is damaged.
    """
    regime = choice(config_data, "regime", tuple(REGIMES))
    pairings = option(config_data, "test_pairings", 3, minimum=1)
    config = av_digits_config(regime, seed=seed, test_pairings=pairings)
    root = cache_root(option(config_data, "cache_dir", ""))
    target = root / AvDigits.name / config.name / str(AvDigits.VERSION)

    def build(scratch: Any) -> Any:
        with _quiet_tfds():
            AvDigits(config=config, data_dir=scratch).download_and_prepare()
        return scratch / AvDigits.name / config.name / str(AvDigits.VERSION)

    build_once(target, build)
    builder = open_prepared(target)
    splits = {name: _in_memory(builder.as_data_source(name)) for name in SPLITS}
    return Dataset(
        splits=splits,
        modalities={
            "audio": ModalityInfo("audio", "spectrogram", (32, 32, 1), unit=1.0),
            "visual": ModalityInfo("visual", "image", (8, 8, 1), unit=1.0),
        },
        num_classes=len(WORDS),
        class_names=WORDS,
        description=_describe(config, splits),
    )


def _in_memory(examples: Any) -> ArraySource:
    """Reads everything once; TFDS gives scalars as Python's int and float."""
    dtypes = {"label": np.int32}
    return ArraySource(
        {
            name: np.asarray([example[name] for example in examples], dtypes.get(name, np.float32))
            for name in examples[0]
        }
    )


def _describe(config: AvDigitsConfig, splits: dict[str, ArraySource]) -> str:
    """Describes what was generated, in some lines."""
    voices = split_voices(config.seed)
    parts = [field.name for field in dataclasses.fields(config.noise)]
    lines = [
        "Handwritten digits (scikit-learn, 8 x 8) paired by class with digits spoken by espeak-ng; "
        f"seed {config.seed}.",
        "Noise, in training-set standard deviations: "
        + "; ".join(f"{name.replace('_', ' ')} {getattr(config.noise, name)}" for name in parts)
        + " (held out is valid and test).",
    ]
    for name, source in splits.items():
        counts = np.bincount(source.columns["label"], minlength=len(WORDS))
        lines.append(
            f"{name}: {len(source)} examples, per class {', '.join(map(str, counts))}; "
            f"{len(voices[name])} voices: {' '.join(voices[name])}."
        )
    return "\n".join(lines)


def av_digits_config(
    regime: str = "varied_test", *, seed: int = 0, test_pairings: int = 3
) -> AvDigitsConfig:
    """A configuration of the builder.

    Args:
      regime: a key of `REGIMES`.
      seed: of the split, the voices and the noise.
      test_pairings: examples per image in valid and test, each with an utterance and noise of its
        own. (In train there is one.)
    """
    noise = REGIMES[regime]
    # So that a change in a regime's numbers never meets data made with the old ones.
    digest = hashlib.sha256(repr((noise, test_pairings)).encode()).hexdigest()[:8]
    return AvDigitsConfig(
        name=f"{regime}-seed{seed}-{digest}",
        description=f"{regime}: {noise}",
        noise=noise,
        seed=seed,
        test_pairings=test_pairings,
    )


class AvDigits(tfds.core.GeneratorBasedBuilder):
    """Spoken and handwritten digits.

    `tfds.builder("av_digits/varied_test")` and the other regimes, once this module is imported;
    other seeds and regimes with `AvDigits(config=av_digits_config(...))`.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    BUILDER_CONFIGS = [
        dataclasses.replace(av_digits_config(regime), name=regime) for regime in REGIMES
    ]

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        def array(*shape: int) -> tfds.features.Tensor:
            return tfds.features.Tensor(shape=shape, dtype=np.float32, encoding="bytes")

        return self.dataset_info_from_configs(
            description=__doc__,
            features=tfds.features.FeaturesDict(
                {
                    "audio": array(32, 32, 1),
                    "visual": array(8, 8, 1),
                    "label": tfds.features.ClassLabel(names=WORDS),
                    "quality_audio": tfds.features.Scalar(np.float32),
                    "quality_visual": tfds.features.Scalar(np.float32),
                }
            ),
            supervised_keys=None,
            homepage="https://github.com/espeak-ng/espeak-ng",
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        splits = generate(
            self.builder_config.noise,
            seed=self.builder_config.seed,
            test_pairings=self.builder_config.test_pairings,
        )
        return {name: self._generate_examples(columns) for name, columns in splits.items()}

    def _generate_examples(self, columns: dict[str, np.ndarray]) -> Iterator[tuple[int, dict]]:
        for row in range(len(columns["label"])):
            yield row, {name: column[row] for name, column in columns.items()}


@contextlib.contextmanager
def _quiet_tfds() -> Iterator[None]:
    """Leaves the progress to our bar: TFDS's flash by, and its notices speak of 0 bytes."""
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    tfds.display_progress_bar(enable=False)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.display_progress_bar(enable=True)
        logging.set_verbosity(verbosity)


def generate(regime: Regime, *, seed: int, test_pairings: int) -> dict[str, dict[str, np.ndarray]]:
    """The examples; the same bytes for the same arguments and the same espeak-ng.

    Args:
      regime: the noise.
      seed: of the splits, the utterances and the noise.
      test_pairings: examples per image in valid and test, each with an utterance and noise of its
        own. (In train there is one.)

    Returns:
      For each split its columns: `audio` float32 [N, 32, 32, 1] (log-mel, [mel, time]),
      `visual` float32 [N, 8, 8, 1], `label` int64 [N], `quality_audio` and
      `quality_visual` float32 [N].

    Raises:
      DataError: espeak-ng cannot be used.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = stratified_split(digits.target, _FRACTIONS, seed=seed)
    pairings = (1, test_pairings, test_pairings)
    rows = {
        name: np.repeat(part, times)
        for name, part, times in zip(SPLITS, parts, pairings, strict=True)
    }
    labels = {name: digits.target[row].astype(np.int64) for name, row in rows.items()}
    visual = {name: digits.images[row][..., None] for name, row in rows.items()}
    audio = _speak(labels, split_voices(seed), seed)
    splits = {name: {"label": labels[name]} for name in SPLITS}
    for place, (modality, clean) in enumerate((("audio", audio), ("visual", visual))):
        mean, std = clean["train"].mean(), clean["train"].std()
        for number, name in enumerate(SPLITS):
            kind = "train" if name == "train" else "heldout"
            noise: Noise = getattr(regime, f"{kind}_{modality}")
            rng = np.random.default_rng((seed, place, number))
            noised, quality = _add_noise((clean[name] - mean) / std, noise, rng)
            splits[name][modality] = noised
            splits[name][f"quality_{modality}"] = quality
    return splits


def split_voices(seed: int) -> dict[str, list[str]]:
    """The voices of each split: an accent and a variant, such as "en-gb+f2"; 70 in all.

    Every accent's male and female variants, and the croaking and whispering ones together, are
    divided in the same proportion.
    """
    voices = [f"{voice}+{variant}" for voice in VOICES for variant in VARIANTS]
    groups = [name[:-1] if name[-1].isdigit() else "unvoiced" for name in voices]
    _, numbers = np.unique(groups, return_inverse=True)
    parts = stratified_split(numbers, _FRACTIONS, seed=seed)
    return {
        name: [voices[number] for number in part] for name, part in zip(SPLITS, parts, strict=True)
    }


def _speak(
    labels: dict[str, np.ndarray], voices: dict[str, list[str]], seed: int
) -> dict[str, np.ndarray]:
    """A spectrogram for each label, decibels [N, 32, 32, 1], with voice, rate and pitch drawn."""
    from tqdm import tqdm

    synthesizer = Synthesizer()
    rng = np.random.default_rng((seed, len(SPLITS)))
    spectrograms: dict[str, list[np.ndarray]] = {name: [] for name in labels}
    total = sum(len(column) for column in labels.values())
    with tqdm(total=total, desc="speaking digits", unit="word", disable=None) as bar:
        for name, column in labels.items():
            for label in column:
                waveform = synthesizer.say(
                    WORDS[label],
                    voice=voices[name][rng.integers(len(voices[name]))],
                    rate=int(rng.integers(120, 241)),
                    pitch=int(rng.integers(20, 81)),
                )
                mel = log_mel(trim_silence(waveform), synthesizer.sample_rate)
                spectrograms[name].append(mel[..., None])
                bar.update()
    return {name: np.asarray(column, np.float64) for name, column in spectrograms.items()}


def _add_noise(
    clean: np.ndarray, noise: Noise, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Noised examples and their quality, float32 [N, ...] and [N]."""
    count = len(clean)
    chosen = rng.permutation(count) < round(noise.share * count)
    extra = np.where(chosen, noise.extra * (1 - rng.random(count)), 0.0)  # 1 - [0, 1) = (0, 1]
    deviation = np.sqrt(noise.always**2 + extra**2)
    scale = deviation.reshape((count,) + (1,) * (clean.ndim - 1))
    noised = clean + scale * rng.standard_normal(clean.shape)
    return noised.astype(np.float32), (0.0 - deviation).astype(np.float32)  # 0.0, not -0.0


# Our name of a voice -> the name espeak-ng finds it by ("en-gb" is a language there, not a name).
_VOICE_FILES = {
    "en-029": "gmw/en-029",
    "en-gb": "gmw/en",
    "en-gb-scotland": "gmw/en-GB-scotland",
    "en-gb-x-rp": "gmw/en-GB-x-rp",
    "en-us": "gmw/en-US",
}
VOICES = tuple(_VOICE_FILES)
VARIANTS = (*(f"m{i}" for i in range(1, 8)), *(f"f{i}" for i in range(1, 6)), "croak", "whisper")
# From espeak-ng's speak_lib.h.
_SYNCHRONOUS = (
    2  # AUDIO_OUTPUT_SYNCHRONOUS: espeak_Synth returns when the last sample was handed over
)
_DONT_EXIT = 0x8000  # espeakINITIALIZE_DONT_EXIT: report missing data instead of ending the process
_RATE, _PITCH = 1, 3  # espeak_PARAMETER
_POS_CHARACTER, _CHARS_UTF8 = 1, 1
_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p
)
_RANGES = {"rate": (80, 450), "pitch": (0, 100)}


class Synthesizer:
    """Turns text into samples with espeak-ng.

    The library keeps state from one utterance to the next (where its flutter stands) that no call
    resets. So each Synthesizer works on a copy of the library of its own: the same calls in the
    same order give the same samples, whatever was said before in the process. Not thread-safe.

    Attributes:
      sample_rate: samples per second.
      version: of espeak-ng.

    Raises:
      DataError: espeakng_loader is not installed, or its library or data cannot be used.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise DataError(
                "espeakng_loader: not installed, and spoken digits need it; "
                "pip install espeakng-loader"
            ) from error
        self._library = _load_copy(pathlib.Path(espeakng_loader.get_library_path()))
        data = os.fsencode(espeakng_loader.get_data_path())
        self.sample_rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _DONT_EXIT)
        if self.sample_rate <= 0:
            raise DataError(
                f"espeakng_loader: espeak-ng finds no usable data in {os.fsdecode(data)}; "
                "reinstall espeakng-loader"
            )
        self._spoken = 0
        self._chunks: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept here, since the library only points to it
        self._library.espeak_SetSynthCallback(self._callback)
        self._library.espeak_Info.restype = ctypes.c_char_p
        self.version = self._library.espeak_Info(None).decode()

    def say(self, text: str, *, voice: str, rate: int = 160, pitch: int = 50) -> np.ndarray:
        """Speaks a text.

        Args:
          text: what to say.
          voice: one of `VOICES`, or with a variant (one of `VARIANTS`) "en-us+f3".
          rate: words per minute, 80 to 450.
          pitch: 0 to 100.

        Returns:
          Samples in [-1, 1], float32 [n].

        Raises:
          DataError: the voice, its variant, the rate or the pitch is not allowed, or espeak-ng
            fails.
        """
        language, plus, variant = voice.partition("+")
        if language not in _VOICE_FILES:
            raise DataError(f"voice {voice!r}: {language!r} is not one of {', '.join(VOICES)}")
        if plus and variant not in VARIANTS:  # espeak-ng would fall back on its plain voice
            raise DataError(f"voice {voice!r}: {variant!r} is not one of {', '.join(VARIANTS)}")
        for name, value in (("rate", rate), ("pitch", pitch)):
            low, high = _RANGES[name]
            if not low <= value <= high:
                raise DataError(f"{name}: {value}; from {low} to {high}")
        file = (_VOICE_FILES[language] + plus + variant).encode()
        if self._library.espeak_SetVoiceByName(file) != 0:
            raise DataError(f"voice {voice!r}: this espeak-ng ({self.version}) does not have it")
        self._library.espeak_SetParameter(_RATE, int(rate), 0)
        self._library.espeak_SetParameter(_PITCH, int(pitch), 0)
        # Breath is drawn from the C library's generator, which the whole process shares.
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(self._spoken))
        self._spoken += 1
        data = text.encode() + b"\0"
        self._chunks.clear()
        failed = self._library.espeak_Synth(
            data, ctypes.c_size_t(len(data)), 0, _POS_CHARACTER, 0, _CHARS_UTF8, None, None
        )
        if failed or not self._chunks:
            raise DataError(f"text {text!r}: espeak-ng fails to speak it")
        return np.concatenate(self._chunks).astype(np.float32) / np.float32(2**15)

    def _receive(self, samples: "ctypes._Pointer[ctypes.c_short]", count: int, _: int) -> int:
        if count > 0:
            self._chunks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0  # go on


def _load_copy(path: pathlib.Path) -> ctypes.CDLL:
    """Loads a copy of a shared library, which has variables of its own.

    The loader recognizes a file that it has open already, so the copy is needed; it may go once
    loaded (where the system allows that).
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        try:
            return ctypes.CDLL(shutil.copy(path, folder))
        except OSError as error:
            raise DataError(f"espeakng_loader: {path} cannot be loaded ({error})") from error
