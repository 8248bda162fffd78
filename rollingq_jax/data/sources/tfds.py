"""Any TFDS data set that is there, with a mapping of its features to modalities.

`data.name` is a TFDS name ("my_set", "cifar10:3.0.2", "my_set/config"), `data.path` its data
directory, `data.features` which feature is which: "visual=image, sound=audio/mel, label=label",
or the same as a mapping. `group` (a speaker, a video, a patient: never on both sides of an
automatic split) and `id` may be features, too. Without TensorFlow, TFDS reads records in random
access from array_record files, and that is what is used here; how to make them is said where they
are missing.

============================== ====================================================================
feature                        becomes
============================== ====================================================================
Image                          uint8 [H, W, C]; resized to `image_size` squared if it has no fixed
                               size
Text                           tokens: 1 + the value of each byte, `text_length` of them
Tensor, fixed shape            by shape, as own arrays
Tensor [None, D], floats       a sequence cut or padded to `sequence_length`, with a mask
Tensor [None], integers        tokens, cut or padded to `sequence_length`
============================== ====================================================================

The one folder that will be opened is looked for here, since TFDS would import code that a name or a
folder leads it to; see `rollingq_jax.data.records.open_prepared`. Names are of one form, without
the namespaces (`huggingface:`) and arguments that TFDS allows in them.
"""

import functools
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data.dataset import (
    MAX_CLASSES,
    SPLITS,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    as_text,
    check_name,
    check_tags,
    complete_splits,
    fit_shape,
    infer_kind,
)
from rollingq_jax.data.load import LOADERS
from rollingq_jax.data.options import local_path, mapping_option, option
from rollingq_jax.data.preprocessing import Preprocessing, standardize
from rollingq_jax.data.records import open_prepared, read_object
from rollingq_jax.data.sources.media_folder import BYTE_VOCABULARY, byte_tokens
from rollingq_jax.data.video import resize_image
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.files import reading

VALID_NAMES = ("valid", "validation", "val", "dev")
HELD_OUT = "train[90%:]"
SPECIAL = ("label", "group", "id")
_CONFIG = r"[A-Za-z0-9_][\w+.-]*"
_NAME = re.compile(
    rf"(?P<name>[A-Za-z]\w*)(/(?P<config>{_CONFIG}))?"
    r"(:(?P<version>(\d{1,9}|\*)(\.(\d{1,9}|\*)){2}))?",
    re.ASCII,
)


class FeatureAdapter(NamedTuple):
    """A modality, what makes its fields of an example from a record's value, and of what files."""

    info: ModalityInfo
    convert: Callable[[Any], Example]
    media: Mapping[str, Any] | None = None  # as `Preprocessing.media`


class TfdsName(NamedTuple):
    """The parts of "name/config:version", as TFDS writes them in folders."""

    name: str
    config: str | None
    version: str | None


def read_features(
    config_data: Any, available: Iterable[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """`data.features`, our name -> theirs, and those that are modalities, by name.

    Raises:
      ConfigError: the label or every modality is missing, or the field is malformed.
      DataError: the data have no such feature.
    """
    features = mapping_option(config_data, "features")
    modalities = {name: f for name, f in sorted(features.items()) if name not in SPECIAL}
    there = f"there are {', '.join(sorted(available))}"
    if "label" not in features or not modalities:
        raise ConfigError(
            f"data.features: {features!r}; must give the label and at least one modality, such as "
            f"'visual=image, label=label'; {there}"
        )
    for name, feature in features.items():
        if feature not in available:
            raise DataError(f"data.features: {name}={feature}; {there}")
    return features, modalities


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The prepared TFDS data set `config_data.name`.

    Args:
      config_data: `name`, `path` (data directory; else `cache_dir`, else TFDS's default),
        `features`; optional `tfds_splits` ("train=train[:80%], valid=..., test=..."; without it
        train, test, and validation or the last 10 % of train; a set of one split is divided),
        `kinds` ("m=kind, m=kind"), `image_size` (64), `text_length` (128),
        `sequence_length` (128), `vocab_size` (needed for integers), `standardize` (True),
        `stats_examples` (256).
      seed: of the validation split where it keeps groups whole; without groups TFDS's own order
        decides what the last 10 % are.
      kinds: {modality: kind}, before `config_data.kinds` and the shape.

    Raises:
      DataError: TFDS does not know the name, the data are not prepared, need TensorFlow, or name
        code of their own; a feature is missing or of a kind that cannot be used.
      ConfigError: `features` is missing or malformed.
    """
    builder = _open_builder(config_data)
    available = _flatten(builder.info.features)
    features, modalities = read_features(config_data, available)
    num_classes = getattr(available[features["label"]], "num_classes", None)
    if not num_classes or num_classes > MAX_CLASSES:
        raise DataError(
            f"data.features: label={features['label']}; allowed: a ClassLabel with a known number "
            f"of classes, at most {MAX_CLASSES}"
        )
    kind_of = mapping_option(config_data, "kinds") | dict(kinds or {})
    adapters = {
        check_name(name, "data.features"): _make_adapter(
            name, available[feature], kind_of.get(name), config_data
        )
        for name, feature in modalities.items()
    }
    splits: dict[str, Source] = {
        split: TfdsSource(builder, instruction, features, adapters, num_classes)
        for split, instruction in _splits(config_data, builder, "group" in features).items()
    }
    return adapted_dataset(
        splits,
        adapters,
        config_data,
        seed=seed,
        num_classes=num_classes,
        class_names=tuple(available[features["label"]].names),
        description=f"TFDS {builder.info.full_name}",
    )


def adapted_dataset(
    sources: Mapping[str, Source],
    adapters: Mapping[str, FeatureAdapter],
    config_data: Any,
    *,
    seed: int,
    **about: Any,
) -> Dataset:
    """The data set, standardized, with the splits that are missing; `about` is its other fields."""
    splits, measured = standardize(
        complete_splits(sources, seed=seed),
        {
            name: Preprocessing(one.info, one.info.shape, one.info.dtype, media=one.media)
            for name, one in adapters.items()
        },
        most=option(config_data, "stats_examples", 256, minimum=1),
        floats=option(config_data, "standardize", True),
    )
    infos = {name: one.info for name, one in measured.items()}
    return Dataset(splits, infos, preprocessing=measured, **about)


def open_tfds(
    config_data: Any,
    modalities: Mapping[str, Preprocessing],
    *,
    path: str,
    split: str | None = None,
) -> tuple[Source, list[str], list[str]]:
    """New examples for a trained model, from a prepared TFDS data set.

    Args:
      config_data: the run's `config.data`: `name`, `features`, and `tfds_splits`, whose
        names may be given as `split`.
      modalities: those that the model reads; one whose feature is absent is missing throughout.
      path: TFDS's data directory.
      split: one of the data set's own, or a slice of it; None for the only one, else "test".

    Returns:
      A source of raw arrays `{m: array}` and masks, without labels; for each example its id (its
      number where there is no feature for it) and the name of its class, or its number where
      classes have no names, "" where it is not known.

    Raises:
      DataError: as `load`, or the data do not fit the model.
    """
    builder = _open_builder(config_data, path)
    available = _flatten(builder.info.features)
    features = {
        name: feature
        for name, feature in mapping_option(config_data, "features").items()
        if feature in available and (name in modalities or name in SPECIAL)
    }
    adapters = {
        name: _saved_form(modalities[name], available[feature])
        for name, feature in features.items()
        if name in modalities
    }
    if not adapters:
        raise DataError(
            f"data.features: none of {', '.join(modalities)} is there; {config_data.name} has "
            f"{', '.join(available)}"
        )
    source = TfdsSource(builder, _own_split(config_data, builder, split), features, adapters, 0)
    ids = [str(number) for number in range(len(source))]
    if source.ids is not None:
        ids = [str(value) for value in source.ids.tolist()]
    labels = [""] * len(source)
    if "label" in features:
        names = tuple(getattr(available[features["label"]], "names", None) or ())
        labels = [_class_text(value, names) for value in source.column("label")]
    return source, ids, labels


def _saved_form(one: Preprocessing, feature: Any) -> FeatureAdapter:
    """The adapter that gave a model's raw arrays, if it can give them of this feature."""
    name, shape = one.info.name, one.raw_shape
    sizes = dict.fromkeys(("image_size", "text_length", "sequence_length"), shape[0])
    kind = one.info.kind
    adapter = _make_adapter(name, feature, kind, sizes | {"vocab_size": one.info.vocab_size or 0})
    if adapter.info.shape != tuple(shape) or adapter.info.kind != kind:
        raise DataError(
            f"data.features: {name}: {adapter.info.kind} {list(adapter.info.shape)}; the model was "
            f"trained on {kind} {list(shape)}"
        )
    return adapter


def _class_text(value: Any, names: tuple[str, ...]) -> str:
    """A record's label as text; -1 is how TFDS writes that there is none."""
    if isinstance(value, bytes | str):
        return as_text(value)
    number = int(value)
    if number < 0:
        return ""
    return names[number] if number < len(names) else str(number)


def _own_split(config_data: Any, builder: Any, split: str | None) -> str:
    """The instruction for TFDS that a split's name means."""
    names = list(builder.info.splits)
    if split is None:
        split = names[0] if len(names) == 1 else "test"
    if instruction := mapping_option(config_data, "tfds_splits").get(split):
        return instruction
    if split == "valid":
        return next((name for name in VALID_NAMES if name in names), split)
    return split


def _splits(config_data: Any, builder: Any, grouped: bool) -> dict[str, str]:
    """{split of ours: TFDS's name or slice}; without those that are to be made of train."""
    if given := mapping_option(config_data, "tfds_splits"):
        if not {"train", "test"} <= given.keys() <= set(SPLITS):
            raise ConfigError(f"data.tfds_splits: {given!r}; train, test and optionally valid")
        return given
    names = list(builder.info.splits)
    if len(names) == 1 and names[0] not in ("test", *VALID_NAMES):
        return {"train": names[0]}
    if builder.data_path.exists() and not {"train", "test"} <= set(names):
        raise DataError(
            f"data.tfds_splits: {builder.name!r} has the splits {', '.join(names)}; say which to "
            "use, such as 'train=train[:80%], test=train[80%:]'"
        )
    valid = next((name for name in VALID_NAMES if name in names), None)
    if valid:
        return {"train": "train", "valid": valid, "test": "test"}
    if grouped:
        return {"train": "train", "test": "test"}
    return {"train": "train[:90%]", "valid": HELD_OUT, "test": "test"}


def _flatten(features: Any, prefix: str = "") -> dict[str, Any]:
    """{"outer/inner": feature} of nested features."""
    flat: dict[str, Any] = {}
    for name, feature in sorted(features.items()):
        if hasattr(feature, "items"):
            flat |= _flatten(feature, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = feature
    return flat


def _pick(record: Any, feature: str) -> Any:
    for key in feature.split("/"):
        record = record[key]
    return record


class TfdsSource:
    """One split; records become examples when they are read.

    Args:
      builder: of the data set.
      instruction: the split or slice.
      features: {modality, "label", "group" or "id": feature}; examples have a label where
        `num_classes` is not 0, and never a group or an id.
      adapters: {modality: what the feature becomes}.
      num_classes: labels are 0 .. num_classes - 1; 0 for examples without them.
    """

    def __init__(
        self,
        builder: Any,
        instruction: str,
        features: Mapping[str, str],
        adapters: Mapping[str, FeatureAdapter],
        num_classes: int,
    ) -> None:
        self.builder, self.instruction = builder, instruction
        self.features, self.adapters, self.num_classes = dict(features), dict(adapters), num_classes
        read = [features[name] for name in (*adapters, *(["label"] if num_classes else []))]
        self.records = _open_split(builder, instruction, read)

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        with reading(str(index), "TFDS record"):
            record = self.records[index]
        example: Example = {}
        if self.num_classes:
            label = self._label(index, _pick(record, self.features["label"]))
            example["label"] = np.asarray(label, np.int32)
        for name, adapter in self.adapters.items():
            example |= adapter.convert(_pick(record, self.features[name]))
        return example

    def column(self, name: str) -> list[Any]:
        """One of `features` of every record; nothing else of them is decoded."""
        feature = self.features[name]
        records = _open_split(self.builder, self.instruction, [feature])
        values = []
        for index in range(len(records)):
            with reading(str(index), "TFDS record"):
                values.append(_pick(records[index], feature))
        return values

    def _label(self, index: int, value: Any) -> int:
        label = int(value)
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"TFDS record {index}: {self.features['label']} is {label}; allowed: from 0 to "
                f"{self.num_classes - 1}"
            )
        return label

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """All labels, int32 [N]."""
        values = [self._label(*item) for item in enumerate(self.column("label"))]
        return np.array(values, np.int32)

    @functools.cached_property
    def groups(self) -> np.ndarray | None:
        """All groups, int64 or strings [N], if there is a feature for them."""
        return self._tags("group")

    @functools.cached_property
    def ids(self) -> np.ndarray | None:
        """All ids, int64 or strings [N], if there is a feature for them."""
        return self._tags("id")

    def _tags(self, name: str) -> np.ndarray | None:
        if name not in self.features:
            return None
        values = [as_text(v) if isinstance(v, bytes) else v for v in self.column(name)]
        try:
            return check_tags(np.asarray(values), f"data.features: {name}={self.features[name]}")
        except ValueError as error:  # of differing lengths
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"data.features: {name}={self.features[name]}; allowed: one integer or string"
            ) from None


class _Undecoded:
    """Stands for the decoder of a feature that is not used, as `tfds.decode.Decoder` does.

    TFDS's own SkipDecoding needs TensorFlow.
    """

    def setup(self, *, feature: Any) -> None:
        """Needs nothing of the feature."""

    def decode_example_np(self, serialized: Any) -> Any:
        """The feature as it is stored."""
        return serialized

    decode_batch_example_np = decode_ragged_example_np = decode_example_np


def _decoders(features: Any, read: list[str], prefix: str = "") -> dict[str, Any]:
    """Decoders that leave out all but the features to be read."""
    decoders: dict[str, Any] = {}
    for name, feature in features.items():
        if hasattr(feature, "items"):
            decoders[name] = _decoders(feature, read, f"{prefix}{name}/")
        elif f"{prefix}{name}" not in read:
            decoders[name] = _Undecoded()
    return decoders


def _open_split(builder: Any, instruction: str, read: list[str]) -> Any:
    """Random access to a split, in which only some of the features are decoded."""
    if not builder.data_path.exists():
        folder = builder.data_path.parent.parent
        raise DataError(
            f"data.name: {builder.name!r} is not prepared under {folder}; run once: python -c "
            f'"import tensorflow_datasets as tfds; tfds.builder({builder.name!r}, '
            f"data_dir={str(folder)!r}, file_format='array_record').download_and_prepare()\" "
            "(some data sets need TensorFlow for that)"
        )
    try:
        decoders = _decoders(builder.info.features, read)
        return builder.as_data_source(split=instruction, decoders=decoders)
    except NotImplementedError:
        raise DataError(
            f"data.name: {builder.data_path} holds no array_record files; prepare it with "
            "file_format='array_record' (reading TFRecord needs TensorFlow)"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.tfds_splits: {instruction!r}: cannot be read ({reason})") from None


def _make_adapter(name: str, feature: Any, kind: str | None, config_data: Any) -> FeatureAdapter:
    """Makes a modality of a TFDS feature.

    Args:
      name: of the modality.
      feature: TFDS's description of the feature.
      kind: what the user says it is, or None to go by shape; images and text are what they are.
      config_data: see `load`.

    Raises:
      DataError: the feature cannot be used.
      ConfigError: it holds token ids, and `vocab_size` is not set.
    """
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image):
        return _image_adapter(name, feature, option(config_data, "image_size", 64, minimum=1))
    if isinstance(feature, tfds.features.Text):
        length = option(config_data, "text_length", 128, minimum=1)
        info = ModalityInfo(name, "tokens", (length,), "int32", BYTE_VOCABULARY)
        return FeatureAdapter(info, lambda value: {name: byte_tokens(value, length)})
    shape, dtype = feature.shape, feature.np_dtype
    if isinstance(shape, dict) or np.dtype(dtype).kind not in "biuf":
        raise DataError(f"data.features: {name}: {feature!r} cannot be used as a modality")
    return tensor_adapter(name, shape, dtype, kind, config_data)


def tensor_adapter(
    name: str, shape: tuple[int | None, ...], dtype: Any, kind: str | None, config_data: Any
) -> FeatureAdapter:
    """Makes a modality of arrays of one shape, of which the first axis may vary (None).

    Args:
      name: of the modality.
      shape, dtype: of an example.
      kind: what the user says it is, or None to go by shape.
      config_data: with `sequence_length` and `vocab_size`.

    Raises:
      DataError: another axis varies.
      ConfigError: it holds token ids, and `vocab_size` is not set.
    """
    length = option(config_data, "sequence_length", 128, minimum=1)
    if None in shape[1:] or (shape[:1] == (None,) and len(shape) > 2):
        raise DataError(
            f"data.features: {name}: shape {list(shape)}; only the first axis of a sequence "
            "[None, D] or of tokens [None] may vary"
        )
    varies = shape[:1] == (None,)
    fixed = tuple(length if size is None else size for size in shape)
    kind = kind or infer_kind(fixed, dtype, name)
    vocab_size = None
    if kind == "tokens":
        vocab_size = option(config_data, "vocab_size", 0)
        if vocab_size < 2:
            raise ConfigError(
                f"data.vocab_size: {vocab_size}; {name!r} holds token ids: at least 2"
            )
    fixed, add_axis = fit_shape(name, fixed, kind)
    pixels = kind in ("image", "video") and dtype == np.uint8
    dtype = "int32" if kind == "tokens" else "uint8" if pixels else "float32"
    info = ModalityInfo(name, kind, fixed, dtype, vocab_size)

    def convert(value: Any) -> Example:
        value = np.asarray(value)
        array = value[..., None] if add_axis else value
        if vocab_size and array.size and not 0 <= array.min() <= array.max() < vocab_size:
            raise DataError(f"{name}: token ids {array.min()} to {array.max()}; below {vocab_size}")
        if not varies:
            return {name: array.astype(dtype)}
        padded = np.zeros(fixed, dtype)
        padded[: len(array)] = array[:length]
        if kind == "tokens":
            return {name: padded}
        return {name: padded, f"{name}_mask": np.arange(length) < len(array)}

    return FeatureAdapter(info, convert)


def _image_adapter(name: str, feature: Any, size: int) -> FeatureAdapter:
    """Images of a fixed size stay; others become RGB of `size` squared."""
    if np.dtype(feature.np_dtype) != np.uint8:
        raise DataError(f"data.features: {name}: images of {feature.np_dtype}; allowed: uint8")
    if None not in feature.shape:
        info = ModalityInfo(name, "image", tuple(feature.shape), "uint8")
        return FeatureAdapter(info, lambda value: {name: np.asarray(value)})

    def convert(value: Any) -> Example:
        image = np.asarray(value)
        image = np.repeat(image, 3, axis=-1) if image.shape[-1] == 1 else image[..., :3]
        return {name: resize_image(np.ascontiguousarray(image), (size, size))}

    return FeatureAdapter(ModalityInfo(name, "image", (size, size, 3), "uint8"), convert)


def _open_builder(config_data: Any, path: str = "") -> Any:
    """The TFDS builder that `name` means; from files where there are any, else TFDS's own."""
    text = option(config_data, "name", "")
    path = path or option(config_data, "path", "")
    cache_dir = option(config_data, "cache_dir", "")
    folder = path or cache_dir
    if folder:  # TFDS takes gs://, too, but array_record files are only read from local paths
        folder = str(local_path(folder, "data.path" if path else "data.cache_dir"))
    where = f" under {folder}" if folder else ""
    unknown = (
        f"data.name: {text[:100]!r}: neither one of {', '.join(sorted(LOADERS))} nor a TFDS data "
        f"set{where}"
    )
    try:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import naming

        found = _NAME.fullmatch(text)
        if not found:
            raise DataError(f"{unknown} (a name, name/config or name/config:1.2.3)")
        snake = naming.camelcase_to_snakecase(found["name"])
        name = TfdsName(snake, found["config"], found["version"])
        if place := _find_prepared(name, folder):
            return open_prepared(place)
        chosen = {"config": name.config, "version": name.version, "data_dir": folder or None}
        return tfds.builder_cls(name.name)(**chosen)
    except ImportError as error:
        raise DataError(
            f"data.name: {text!r}: TFDS needs the package {error.name} for it"
        ) from None
    except DataError:
        raise
    except Exception as error:  # an unknown name, a malformed one, metadata that cannot be read
        reason = " ".join(str(error).split()).split(" Available datasets:")[0]
        raise DataError(f"{unknown} ({reason[:200]})") from None


def _find_prepared(wanted: TfdsName, folder: str) -> Path | None:
    """The folder with the `features.json` of the data set: of several versions, the newest.

    Args:
      wanted: what to look for. Without a config, the data set's own default.
      folder: TFDS's data directory; "" for those that TFDS knows.

    Raises:
      DataError: the default config that the folder names is no name.
    """
    from tensorflow_datasets.core.utils import file_utils
    from tensorflow_datasets.core.utils.version import list_all_versions

    for data_dir in file_utils.list_data_dirs(folder or None):
        root = Path(data_dir) / wanted.name
        if not os.path.isdir(root):  # nor where the folder may not be entered
            continue
        config = wanted.config or ("" if list_all_versions(root) else _default_config(wanted, root))
        for version in reversed(list_all_versions(root / config)):
            place = root / config / str(version)
            fits = wanted.version is None or version.match(wanted.version)
            if fits and (place / "features.json").exists():
                return place
    return None


def _default_config(wanted: TfdsName, root: Path) -> str:
    """The config that is meant where none is named; "" if the data set has none."""
    import tensorflow_datasets as tfds

    try:
        builder_class = tfds.builder_cls(wanted.name)
        if builder_class.BUILDER_CONFIGS:
            return builder_class.default_builder_config.name
    except tfds.core.DatasetNotFoundError:
        pass
    file = root / ".config" / "metadata.json"
    config = read_object(file).get("default_config_name") if file.exists() else None
    if config and not (isinstance(config, str) and re.fullmatch(_CONFIG, config, re.ASCII)):
        raise DataError(f"{file}: default_config_name {str(config)[:100]!r}; allowed: a name")
    return config or ""
