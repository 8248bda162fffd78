"""Fields of `config.data`: what each loader has, and how it reads them."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from etils import epath

from rollingq_jax.data.dataset import TASKS
from rollingq_jax.errors import ConfigError, DataError, did_you_mean
from rollingq_jax.models.spec import as_mapping

T = TypeVar("T")


class Field(NamedTuple):
    """A field of `config.data`.

    Attributes:
      default: its type is the field's; a tuple holds names, a mapping strings.
      meaning: in a few words.
      minimum, maximum: the least and the largest value allowed.
      choices: the values allowed, where they are few.
    """

    default: Any
    meaning: str
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()

    @property
    def allowed(self) -> str:
        """The values that the field may hold, in words."""
        if self.choices:
            return ", ".join(self.choices)
        if isinstance(self.default, Mapping):
            return "'name=value, name=value' or a mapping"
        if isinstance(self.default, tuple):
            return "names, as 'a,b' or a tuple"
        words = {bool: "True or False", int: "an integer", float: "a number", str: "a string"}
        least = f" >= {self.minimum:,}" if self.minimum is not None else ""
        most = f" and at most {self.maximum:,}" if self.maximum is not None else ""
        return words[type(self.default)] + least + most


COMMON_FIELDS = {
    "name": Field("av_digits", "a data set of this package, or any TFDS name"),
    "path": Field("", "where the data are"),
    "cache_dir": Field("", "where what is made of data is kept"),
    "prefetch": Field(2, "batches made ahead", minimum=0, maximum=1_024),
    "validation": Field(
        True, "a part of the data chooses the checkpoint; False: it is trained on, as upstream does"
    ),
    "corruptions": Field("", "of the training split: 'audio=0..2, visual=drop:0.2'"),
}
_TASK = Field(
    "auto",
    "what is learned: one class, any number of labels, or values; auto: as the labels say",
    choices=("auto", *TASKS),
)
_MODALITIES = Field((), "those to use; empty: all")
_STANDARDIZE = Field(True, "float modalities get mean 0 and deviation 1")
_KINDS = Field({}, "kinds of modalities, where the shape does not tell")
_STATS_EXAMPLES = Field(
    256, "training examples that statistics are taken from", minimum=1, maximum=1_000_000_000
)
_FEATURES = Field({}, "which feature is the label and which is a modality")
_SEQUENCE_LENGTH = Field(
    128, "positions of a sequence of varying length", minimum=1, maximum=1_000_000
)
_VOCAB_SIZE = Field(0, "of token ids", minimum=0, maximum=10_000_000)
_CROP_PER = Field("clip", "what training draws a crop and a flip for", choices=("clip", "frame"))
_FRAMES = {
    "split_seed": Field(0, "of the split where it is drawn", minimum=0, maximum=4_294_967_295),
    "num_frames": Field(3, "frames of a clip", minimum=1, maximum=1_000),
    "frame_size": Field(224, "pixels of a frame's sides", minimum=1, maximum=4_096),
    "crop_per": _CROP_PER,
}
_LAYOUT = {  # of sets of media files
    "modalities": _MODALITIES,
    "standardize": _STANDARDIZE,
    "audio_features": Field("mel", "the kind of spectrogram", choices=("mel", "stft")),
    "audio_rate": Field(16000, "samples a second", minimum=1000, maximum=1_000_000),
    "audio_seconds": Field(0.0, "of a clip; 0: the longest", minimum=0, maximum=100_000),
    "audio_bins": Field(64, "frequencies of a spectrogram", minimum=2, maximum=10_000),
    "audio_frames": Field(96, "times of a spectrogram", minimum=1, maximum=100_000),
    "image_size": Field(64, "pixels of an image's sides", minimum=1, maximum=4_096),
    "video_frames": Field(4, "frames of a video", minimum=1, maximum=1_000),
    "text_length": Field(
        0, "bytes or tokens of a text; 0: the longest", minimum=0, maximum=1_000_000
    ),
    "tokenizer": Field("", "a Hugging Face tokenizer.json for texts; empty: bytes"),
    "stats_examples": _STATS_EXAMPLES,
    "crop_per": _CROP_PER,
}
_MEDIA = _LAYOUT | {"columns": Field({}, "which column of a manifest is what"), "task": _TASK}
# The fields of each loader besides the common ones, by `data.name`; ANY_TFDS stands for all others.
# Loaders are imported when they are needed; a test holds that they read these fields and no others.
ANY_TFDS = "any TFDS name"
FIELDS: dict[str, dict[str, Field]] = {
    "arrays": {"kinds": _KINDS, **_MEDIA},  # its path may be of a manifest
    "av_mnist": {"modalities": _MODALITIES, "standardize": _STANDARDIZE},
    "ave": _LAYOUT,
    "balance_benchmark": _LAYOUT,
    "food_101": _LAYOUT,
    "ucf_101": _LAYOUT,
    "av_digits": {
        "regime": Field(
            "varied_test",
            "how noisy the modalities are",
            choices=("varied_test", "noisy_audio", "varied_train", "hard_train", "clean"),
        ),
        "test_pairings": Field(
            3, "images that each spoken test digit is paired with", minimum=1, maximum=1_000
        ),
    },
    "cmu_mosei": {
        "modalities": _MODALITIES,
        "label_rule": Field(
            "positive",
            "from a sentiment to a class, or its value",
            choices=("positive", "non_negative", "three", "seven", "regression"),
        ),
        "standardize": Field(False, "each feature gets mean 0 and deviation 1"),
    },
    "crema_d": {"splits": Field("", "the folder of the published lists"), **_FRAMES},
    "folder": _MEDIA,
    "huggingface": {
        "features": _FEATURES,
        "kinds": _KINDS,
        **{n: f for n, f in _LAYOUT.items() if n not in ("modalities", "video_frames", "crop_per")},
        "sequence_length": _SEQUENCE_LENGTH,
        "vocab_size": _VOCAB_SIZE,
    },
    "kinetics_sounds": _FRAMES,
    ANY_TFDS: {
        "features": _FEATURES,
        "tfds_splits": Field({}, "which TFDS splits are train, valid and test"),
        "kinds": _KINDS,
        "standardize": _STANDARDIZE,
        "image_size": Field(64, "pixels of an image's sides", minimum=1, maximum=4_096),
        "text_length": Field(128, "bytes of a text", minimum=1, maximum=1_000_000),
        "sequence_length": _SEQUENCE_LENGTH,
        "vocab_size": _VOCAB_SIZE,
        "stats_examples": _STATS_EXAMPLES,
    },
}


def fields_of(name: str) -> dict[str, Field]:
    """The fields that `config.data` may have where its `name` is this one."""
    return COMMON_FIELDS | FIELDS.get(name, FIELDS[ANY_TFDS])


def check_fields(config_data: Any) -> None:
    """Checks the names, types and ranges of the fields; files are not looked for.

    A field of another data set may stand there as long as it says nothing: a configuration serves
    data of several forms.

    Raises:
      ConfigError: a field is not known for the data set, or has a value that it cannot have.
    """
    name = option(config_data, "name", COMMON_FIELDS["name"].default)
    fields = fields_of(name)
    for given, value in as_mapping(config_data, "config.data").items():
        if given in fields:
            _check_value(config_data, given, fields[given])
            continue
        owners = [owner for owner, theirs in FIELDS.items() if given in theirs]
        if owners and (value in (None, "") or value in [FIELDS[o][given].default for o in owners]):
            continue
        if owners:
            problem = f"is a field of {' and '.join(owners)}, not of data.name {name!r}"
        else:
            problem = f"is not a field{did_you_mean(given, fields)}"
        allowed = ", ".join(sorted(fields))
        raise ConfigError(f"config.data.{given} {problem}; allowed for {name!r}: {allowed}")


def _check_value(config_data: Any, name: str, field: Field) -> None:
    if field.choices:
        choice(config_data, name, field.choices)
    elif isinstance(field.default, Mapping):
        mapping_option(config_data, name)
    else:
        value = option(config_data, name, field.default, minimum=field.minimum)
        if field.maximum is not None and value > field.maximum:
            raise ConfigError(f"data.{name}: {value!r}; allowed: {field.allowed}")


def _field(config_data: Any, name: str) -> Any:
    if isinstance(config_data, Mapping):
        return config_data.get(name)
    return getattr(config_data, name, None)


def option(config_data: Any, name: str, default: T, *, minimum: float | None = None) -> T:
    """The field `name`, or the default where the field is absent or None.

    Args:
      config_data: a ConfigDict, a mapping or an object with attributes.
      name: of the field.
      default: its type is the type that the field must have (an int counts as a float; for a tuple,
        a list or a string of names with commas between them counts, too).
      minimum: the least value allowed.

    Raises:
      ConfigError: the value has another type or is below the minimum.
    """
    value: Any = _field(config_data, name)
    if value is None:
        return default
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(default, Mapping) and hasattr(value, "items"):
        value = dict(value.items())
    if isinstance(default, tuple) and isinstance(value, str | list | tuple):
        value = _split_names(name, (value,) if isinstance(value, str) else value)
    wanted: type[Any] = dict if isinstance(default, Mapping) else type(default)
    if not isinstance(value, wanted) or isinstance(value, bool) != isinstance(default, bool):
        raise ConfigError(f"data.{name}: {value!r}; allowed: of type {wanted.__name__}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"data.{name}: {value!r}; allowed: finite")
    if minimum is not None and value < minimum:
        raise ConfigError(f"data.{name}: {value!r}; allowed: at least {minimum:g}")
    return value


def _split_names(name: str, values: Iterable[Any]) -> tuple[str, ...]:
    """Names from strings, of which each may hold several with commas between them."""
    names = []
    for value in values:
        if not isinstance(value, str):
            raise ConfigError(f"data.{name}: {value!r}; allowed: names, as 'a,b' or a tuple")
        names += [part.strip() for part in value.split(",") if part.strip()]
    return tuple(dict.fromkeys(names))


def choice(config_data: Any, name: str, allowed: tuple[str, ...]) -> str:
    """The field `name`, one of `allowed`; the first of them where it is absent.

    Raises:
      ConfigError: the value is not allowed.
    """
    value = option(config_data, name, allowed[0])
    if value not in allowed:
        raise ConfigError(f"data.{name}: {value!r}; allowed: one of {', '.join(allowed)}")
    return value


def mapping_option(config_data: Any, name: str) -> dict[str, str]:
    """The field `name`, a mapping of strings or a string "a=b, c=d"; empty where it is absent.

    Raises:
      ConfigError: the value is neither.
    """
    value = _field(config_data, name)
    if not isinstance(value, str):
        given: dict[Any, Any] = option(config_data, name, {})
        return {str(key): str(item) for key, item in given.items()}
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if not all(left.strip() and right.strip() for left, _, right in pairs):
        raise ConfigError(f"data.{name}: {value!r}; allowed: of the form 'name=value, name=value'")
    return {left.strip(): right.strip() for left, _, right in pairs}


def local_path(text: str, field: str) -> Path:
    """The path that a field holds, where it has to be a local one.

    Raises:
      ConfigError: it is the address of something else, which `Path` would take for a folder.
    """
    if "://" in text:
        raise ConfigError(
            f"{field}: {text!r}; allowed: a local path (gs:// is for the workdir, --config_json "
            "and, as data.path, .npz files and folders of .npy files)"
        )
    return Path(text).expanduser()


def given_path(config_data: Any, wanted: str) -> Path:
    """The local path in the field `path`, which has to be given.

    Raises:
      DataError: it is not; the message says what is `wanted`.
      ConfigError: as `local_path`.
    """
    path = option(config_data, "path", "")
    if not path:
        raise DataError(f"data.path: not given; {wanted}")
    return local_path(path, "data.path")


def array_path(text: str, field: str) -> Path | epath.Path:
    """As `local_path`, but an address on gs:// is allowed."""
    return epath.Path(text) if text.startswith("gs://") else local_path(text, field)
