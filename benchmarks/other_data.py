"""Data sets that are not the demo's, to see whether what was chosen on the demo holds elsewhere.

    python -m benchmarks.other_data three three.npz --seed 1
    python -m rollingq_jax.compare --config configs/own_data.py --config.data.path=three.npz ...

`voices`: written and spoken digits as in the demo, but the speech is fast and high or deep, the
sound is masked by hum and by gaps, and the images are blurred, hidden by blocks or faded, so that
there is hardly any white noise. `three`: those and the digit's name with typing errors. `halves`:
the left and the right half of the image under white noise, and the name, for which no speech is
needed. In all of them each example has its own amount of disturbance, independent between
modalities, the same in every epoch, and alike in training, validation and test.
"""

import argparse
from collections.abc import Callable

import numpy as np
from scipy import ndimage

from rollingq_jax.data.audio import log_mel, trim_silence
from rollingq_jax.data.dataset import stratified_split
from rollingq_jax.data.sources.av_digits import VARIANTS, VOICES, Synthesizer

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
FRACTIONS = {"train": 0.6, "valid": 0.15, "test": 0.25}
LETTERS = 26
NAME_LENGTH = 6

Disturbed = tuple[np.ndarray, np.ndarray]  # examples [N, ...], how much each is disturbed [N]


def amounts(rng: np.random.Generator, count: int, share: float) -> np.ndarray:
    """How much each example is disturbed, in [0, 1]: 0, but for a `share` of them."""
    return np.where(rng.random(count) < share, rng.random(count), 0.0)


def blurred_hidden_or_faded(images: np.ndarray, rng: np.random.Generator) -> Disturbed:
    """One of three happens to each image `[N, 8, 8]`: blur, a grey block, little contrast."""
    amount = amounts(rng, len(images), 0.8)
    kinds = rng.integers(3, size=len(images))
    middle = images.mean()
    disturbed = []
    for image, kind, a in zip(images, kinds, amount, strict=True):
        if kind == 0:
            image = ndimage.gaussian_filter(image, 3.0 * a)
        elif kind == 1:
            side = round(7 * a)
            row, column = rng.integers(9 - side, size=2)
            image = image.copy()
            image[row : row + side, column : column + side] = middle
        else:
            image = middle + (1 - 0.95 * a) * (image - middle)
        disturbed.append(image + images.std() * 0.4 * rng.standard_normal(image.shape))
    return np.array(disturbed), amount


def hum_and_gaps(spectrograms: np.ndarray, rng: np.random.Generator) -> Disturbed:
    """Bands of hum, the same over time, and frames that are lost, in `[N, mel, time]`."""
    amount = amounts(rng, len(spectrograms), 0.8)
    count, bands, frames = spectrograms.shape
    spread = spectrograms.std()
    hum = rng.standard_normal((count, bands, 1)) * 2.5 * amount[:, None, None]
    lost = rng.random((count, 1, frames)) < 0.9 * amount[:, None, None]
    noise = 1.0 * rng.standard_normal(spectrograms.shape)
    disturbed = np.where(lost, spectrograms.min(), spectrograms + spread * hum)
    return disturbed + spread * noise, amount


def white_noise(images: np.ndarray, rng: np.random.Generator) -> Disturbed:
    """Half a standard deviation always, and up to 3 more in most examples."""
    amount = amounts(rng, len(images), 0.7)
    scale = np.sqrt(0.5**2 + (3 * amount) ** 2) * images.std()
    return images + scale[:, None, None] * rng.standard_normal(images.shape), amount


def misspelled(labels: np.ndarray, rng: np.random.Generator) -> Disturbed:
    """The digit's name as ids of letters `[N, 6]`, 0 behind it; some letters are wrong."""
    amount = amounts(rng, len(labels), 0.9)
    ids = np.zeros((len(labels), NAME_LENGTH), np.int32)
    for row, (label, a) in enumerate(zip(labels, amount, strict=True)):
        name = np.array([ord(letter) - ord("a") + 1 for letter in WORDS[label]])
        wrong = rng.random(len(name)) < 0.5 + 0.5 * a
        ids[row, : len(name)] = np.where(wrong, rng.integers(1, LETTERS + 1, len(name)), name)
        # The length alone would tell three groups of digits.
        ids[row, len(name) :] = rng.integers(1, LETTERS + 1, NAME_LENGTH - len(name))
    return ids, amount


def hidden_in_stream(images: np.ndarray, rng: np.random.Generator) -> Disturbed:
    """The rows of each image `[N, 8, 8]` somewhere in 24 rows `[N, 24, 8]`; the others are rows of
    any image. Some of its own rows are replaced likewise."""
    amount = amounts(rng, len(images), 0.7)
    count, height, _ = images.shape
    stream = images[rng.integers(count, size=(count, 24)), rng.integers(height, size=(count, 24))]
    for row, (image, a) in enumerate(zip(images, amount, strict=True)):
        start = rng.integers(24 - height + 1)
        kept = rng.random(height) >= 0.6 * a
        stream[row, start : start + height][kept] = image[kept]
    return stream + 0.3 * images.std() * rng.standard_normal(stream.shape), amount


def spoken(labels: np.ndarray, voices: list[str], rng: np.random.Generator) -> np.ndarray:
    """Log-mel spectrograms `[N, 32, 32]` of fast speech that is high or deep."""
    synthesizer = Synthesizer()
    found = []
    for label in labels:
        waveform = synthesizer.say(
            WORDS[label],
            voice=str(rng.choice(voices)),
            rate=int(rng.integers(280, 430)),
            pitch=int(rng.choice([rng.integers(0, 15), rng.integers(85, 100)])),
        )
        found.append(log_mel(trim_silence(waveform), synthesizer.sample_rate))
    return np.asarray(found, np.float64)


def make(name: str, seed: int) -> dict[str, np.ndarray]:
    """The arrays of a data set by their keys; the same for the same arguments."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    parts = stratified_split(digits.target, tuple(FRACTIONS.values()), seed=seed)
    everyone = [f"{voice}+{variant}" for voice in VOICES for variant in VARIANTS]
    np.random.default_rng((seed, 7)).shuffle(everyone)
    arrays = {}
    for number, (split, rows) in enumerate(zip(FRACTIONS, parts, strict=True)):
        rng = np.random.default_rng((seed, number))
        label, images = digits.target[rows], digits.images[rows].astype(np.float64)
        columns: dict[str, Callable[[], Disturbed]] = {}
        if name == "streams":
            columns["rows"] = lambda images=images, rng=rng: hidden_in_stream(images, rng)
            turned = images.swapaxes(1, 2)
            columns["columns"] = lambda images=turned, rng=rng: hidden_in_stream(images, rng)
        elif name == "halves":
            columns["left"] = lambda images=images, rng=rng: white_noise(images[:, :, :4], rng)
            columns["right"] = lambda images=images, rng=rng: white_noise(images[:, :, 4:], rng)
        else:
            voices = everyone[number :: len(FRACTIONS)]
            sound = spoken(label, voices, rng)
            columns["audio"] = lambda sound=sound, rng=rng: hum_and_gaps(sound, rng)
            columns["visual"] = lambda images=images, rng=rng: blurred_hidden_or_faded(images, rng)
        if name != "voices":
            columns["text"] = lambda label=label, rng=rng: misspelled(label, rng)
        arrays[f"{split}/label"] = label.astype(np.int32)
        for modality, disturb in columns.items():
            examples, amount = disturb()
            if examples.dtype.kind == "f":
                examples = examples.astype(np.float32)
            if modality in ("audio", "visual", "left", "right"):
                examples = examples[..., None]
            arrays[f"{split}/{modality}"] = examples
            arrays[f"{split}/quality_{modality}"] = (-amount).astype(np.float32)
    kinds = {"audio": "spectrogram", "visual": "image", "left": "image", "right": "image"}
    kinds |= {"rows": "sequence", "columns": "sequence", "text": "tokens"}
    present = {key.partition("/")[2] for key in arrays}
    return arrays | {f"kind/{m}": np.array(kind) for m, kind in kinds.items() if m in present}


def main() -> None:
    """Writes one data set."""
    parser = argparse.ArgumentParser(description="Writes a data set for data.name = arrays.")
    parser.add_argument("name", choices=("voices", "three", "halves", "streams"))
    parser.add_argument("path")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    np.savez(arguments.path, **make(arguments.name, arguments.seed))


if __name__ == "__main__":
    main()
