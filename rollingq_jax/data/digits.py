"""The examples of the demo: spoken and handwritten digits whose quality varies.

scikit-learn's 1,797 handwritten digits (8 x 8) are paired by class with digits spoken by espeak-ng.
Images and voices are disjoint between train, valid and test; valid and test have the same
distribution, so settings can be chosen on valid.

Each modality is standardised with the mean and the standard deviation (scalars) of its training
split before noise, so 1 is a training-set standard deviation. Then white Gaussian noise is added
once, so that an example has the same in every epoch. Where an example gets noise of standard
deviation ``always`` and further noise of ``extra``, the two are independent, so their sum has
``sqrt(always^2 + extra^2)``. A modality's quality is minus that.
"""

import dataclasses

import numpy as np

from rollingq_jax.data.speech import VARIANTS, VOICES, Synthesizer, log_mel, trim_silence
from rollingq_jax.data.splits import stratified_split

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPLITS = ("train", "valid", "test")
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
    # The demo's: it varies widely and alike everywhere. Each modality alone reads about 7 digits in
    # 10, and which of them is to be believed differs from sample to sample.
    "hard_train": Regime(_HARD_AUDIO, _HARD_VISUAL, _HARD_AUDIO, _HARD_VISUAL),
    # For noise that is fresh in every epoch: a random transformation in the pipeline.
    "clean": Regime(),
}


def generate(regime: Regime, *, seed: int, test_pairings: int) -> dict[str, dict[str, np.ndarray]]:
    """The examples; the same bytes for the same arguments and the same espeak-ng.

    Args:
      regime: the noise.
      seed: of the splits, the utterances and the noise.
      test_pairings: examples per image in valid and test, each with an utterance and noise of its
        own. (In train there is one.)

    Returns:
      For each split its columns: ``audio`` float32 [N, 32, 32, 1] (log-mel, [mel, time]),
      ``visual`` float32 [N, 8, 8, 1], ``label`` int64 [N], ``quality_audio`` and
      ``quality_visual`` float32 [N].

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
