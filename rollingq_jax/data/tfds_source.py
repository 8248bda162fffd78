"""Any TFDS data set that is there, with a mapping of its features to modalities.

``data.name`` is a TFDS name ("my_set", "cifar10:3.0.2", "my_set/config"), ``data.path`` its data
directory, ``data.features`` which feature is which: "visual=image, sound=audio/mel, label=label",
or the same as a mapping. Without TensorFlow, TFDS reads records in random access from array_record
files, and that is what is used here; how to make them is said where they are missing.
:mod:`rollingq_jax.data.tfds_forms` lists what the kinds of feature become.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rollingq_jax.data.labels import check_name
from rollingq_jax.data.load import LOADERS
from rollingq_jax.data.measure import standardize
from rollingq_jax.data.options import local_path, mapping_option, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.reading import reading
from rollingq_jax.data.tfds_forms import Form, make_form
from rollingq_jax.data.types import Dataset, Example, Source
from rollingq_jax.errors import ConfigError, DataError

VALID_NAMES = ("valid", "validation", "val", "dev")
HELD_OUT = "train[90%:]"


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The prepared TFDS data set ``config_data.name``.

    Args:
      config_data: ``name``, ``path`` (data directory; else ``cache_dir``, else TFDS's default),
        ``features``; optional ``tfds_splits`` ("train=train[:80%], valid=..., test=..."; without it
        train, test, and validation or the last 10 % of train), ``kinds`` ("m=kind, m=kind"),
        ``image_size`` (64), ``text_length`` (128), ``sequence_length`` (128), ``vocab_size``
        (needed for integers), ``standardize`` (True), ``stats_examples`` (256).
      seed: not used; TFDS's own order decides what the last 10 % are.
      kinds: {modality: kind}, before ``config_data.kinds`` and the shape.

    Raises:
      DataError: TFDS does not know the name, the data are not prepared, or need TensorFlow; a
        feature is missing or of a form that cannot be used.
      ConfigError: ``features`` is missing or malformed.
    """
    del seed
    builder = _open_builder(config_data)
    chosen = mapping_option(config_data, "features")
    available = _flatten(builder.info.features)
    if "label" not in chosen or len(chosen) < 2:
        raise ConfigError(
            f"data.features: {chosen!r}; must give the label and at least one modality, such as "
            f"'visual=image, label=label'; {config_data.name} has {', '.join(available)}"
        )
    for name, feature in chosen.items():
        if feature not in available:
            raise DataError(
                f"data.features: {name}={feature}; {config_data.name} has {', '.join(available)}"
            )
    label_feature = chosen.pop("label")
    num_classes = getattr(available[label_feature], "num_classes", None)
    if not num_classes:
        raise DataError(
            f"data.features: label={label_feature}; must be a ClassLabel with a known number of "
            "classes"
        )
    kind_of = mapping_option(config_data, "kinds") | dict(kinds or {})
    forms = {
        check_name(name, "data.features"): make_form(
            name, available[feature], kind_of.get(name), config_data
        )
        for name, feature in sorted(chosen.items())
    }
    splits: dict[str, Source] = {
        split: TfdsSource(
            _open_split(builder, instruction), chosen, forms, label_feature, num_classes
        )
        for split, instruction in _splits(config_data, builder).items()
    }
    splits, modalities = standardize(
        splits,
        {n: Preprocessing(f.info, f.info.shape, f.info.dtype) for n, f in forms.items()},
        most=option(config_data, "stats_examples", 256, minimum=1),
        floats=option(config_data, "standardize", True),
    )
    class_names = tuple(available[label_feature].names)
    return Dataset(
        splits,
        {name: one.info for name, one in modalities.items()},
        num_classes,
        class_names,
        f"TFDS {builder.info.full_name}",
        preprocessing=modalities,
    )


class TfdsSource:
    """One split; records become examples when they are read."""

    def __init__(
        self,
        records: Any,
        features: Mapping[str, str],
        forms: Mapping[str, Form],
        label_feature: str,
        num_classes: int,
    ) -> None:
        self.records, self.features, self.forms = records, dict(features), dict(forms)
        self.label_feature, self.num_classes = label_feature, num_classes

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Example:
        with reading(str(index), "TFDS record"):
            record = self.records[index]
        label = int(_pick(record, self.label_feature))
        if not 0 <= label < self.num_classes:
            raise DataError(
                f"TFDS record {index}: {self.label_feature} is {label}; must be from 0 to "
                f"{self.num_classes - 1}"
            )
        example: Example = {"label": np.asarray(label, np.int32)}
        for name, feature in self.features.items():
            example |= self.forms[name].convert(_pick(record, feature))
        return example


def _open_builder(config_data: Any) -> Any:
    """The TFDS builder that ``name`` means."""
    name = option(config_data, "name", "")
    path, cache_dir = option(config_data, "path", ""), option(config_data, "cache_dir", "")
    folder = path or cache_dir
    if folder:  # TFDS takes gs://, too, but array_record files are read from local paths alone
        folder = str(local_path(folder, "data.path" if path else "data.cache_dir"))
    try:
        import tensorflow_datasets as tfds

        return tfds.builder(name, **({"data_dir": folder} if folder else {}))
    except ImportError as error:
        raise DataError(
            f"data.name: {name!r}: TFDS needs the package {error.name} for it"
        ) from None
    except Exception as error:  # an unknown name, a malformed one, metadata that cannot be read
        reason = " ".join(str(error).split()).split(" Available datasets:")[0]
        where = f" under {folder}" if folder else ""
        raise DataError(
            f"data.name: {name!r}: neither one of {', '.join(sorted(LOADERS))} nor a TFDS data set"
            f"{where} ({reason[:200]})"
        ) from None


def _open_split(builder: Any, instruction: str) -> Any:
    """Random access to a split."""
    if not builder.data_path.exists():
        folder = builder.data_path.parent.parent
        raise DataError(
            f"data.name: {builder.name!r} is not prepared under {folder}; run once: python -c "
            f'"import tensorflow_datasets as tfds; tfds.builder({builder.name!r}, '
            f"data_dir={str(folder)!r}, file_format='array_record').download_and_prepare()\" "
            "(some data sets need TensorFlow for that)"
        )
    try:
        return builder.as_data_source(split=instruction)
    except NotImplementedError:
        raise DataError(
            f"data.name: {builder.data_path} holds no array_record files; prepare it with "
            "file_format='array_record' (reading TFRecord needs TensorFlow)"
        ) from None
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"data.tfds_splits: {instruction!r}: cannot be read ({reason})") from None


def _splits(config_data: Any, builder: Any) -> dict[str, str]:
    """{split of ours: TFDS's name or slice}."""
    if given := mapping_option(config_data, "tfds_splits"):
        if not {"train", "test"} <= given.keys() <= {"train", "valid", "test"}:
            raise ConfigError(f"data.tfds_splits: {given!r}; train, test and optionally valid")
        return given
    names = list(builder.info.splits)
    if builder.data_path.exists() and not {"train", "test"} <= set(names):
        raise DataError(
            f"data.tfds_splits: {builder.name!r} has the splits {', '.join(names)}; say which to "
            "use, such as 'train=train[:80%], test=train[80%:]'"
        )
    valid = next((name for name in VALID_NAMES if name in names), None)
    if valid:
        return {"train": "train", "valid": valid, "test": "test"}
    return {"train": "train[:90%]", "valid": HELD_OUT, "test": "test"}


def _flatten(features: Any, prefix: str = "") -> dict[str, Any]:
    """{"outer/inner": feature} of nested features."""
    flat: dict[str, Any] = {}
    for name, feature in features.items():
        if hasattr(feature, "items"):
            flat |= _flatten(feature, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = feature
    return flat


def _pick(record: Any, feature: str) -> Any:
    for key in feature.split("/"):
        record = record[key]
    return record
