"""The demo's data set as a TFDS builder, and from the cache into memory.

An example: ``audio`` float32 [32, 32, 1], a spoken digit's log-mel spectrogram [mel, time, 1];
``visual`` float32 [8, 8, 1], a handwritten digit; ``label``; ``quality_audio``, ``quality_visual``.
How they are made is said in :mod:`rollingq_jax.data.digits`.
"""

import contextlib
import dataclasses
import hashlib
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from absl import logging

from rollingq_jax.data import digits
from rollingq_jax.data.cache import build_once, cache_root
from rollingq_jax.data.digits import REGIMES, SPLITS, WORDS, Regime, generate, split_voices
from rollingq_jax.data.options import choice, option
from rollingq_jax.data.tfds_files import open_prepared
from rollingq_jax.data.types import ArraySource, Dataset, ModalityInfo


@dataclasses.dataclass(eq=False)
class AvDigitsConfig(tfds.core.BuilderConfig):
    """What determines the data; :func:`av_digits_config` names it after all of that."""

    name: str = ""
    noise: Regime = REGIMES["varied_test"]
    seed: int = 0
    test_pairings: int = 3


def av_digits_config(
    regime: str = "varied_test", *, seed: int = 0, test_pairings: int = 3
) -> AvDigitsConfig:
    """A configuration of the builder.

    Args:
      regime: a key of :data:`REGIMES`.
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

    ``tfds.builder("av_digits/varied_test")`` and the other regimes, once this module is imported;
    other seeds and regimes with ``AvDigits(config=av_digits_config(...))``.
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
            description=digits.__doc__,
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


def load(config_data: Any, *, seed: int) -> Dataset:
    """The digits, built on first use (some seconds) and kept in the cache.

    Args:
      config_data: ``regime`` (a key of :data:`REGIMES`, "varied_test"), ``test_pairings`` (3),
        ``cache_dir`` ("": see :func:`~rollingq_jax.data.cache.cache_root`).
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
    """What was generated, in some lines."""
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
