"""A Hugging Face data set on disk, with a mapping of its features to modalities.

`data.path` is a folder that `save_to_disk` of the package `datasets` wrote, and `data.features`
says which feature is which, as for TFDS: "visual=image, sound=audio, label=label", and optionally
`group` and `id`. Nothing is fetched, and no code of the data set is run.

======================== ==========================================================================
feature                  becomes
======================== ==========================================================================
Image                    uint8 [image_size, image_size, 3]
Audio                    a spectrogram, as media files do (`audio_rate`, `audio_seconds` ...)
Value("string")          tokens: 1 + the value of each byte, `text_length` of them
numbers, Array2D ...     by shape, as own arrays
list, floats [L][D]      a sequence cut or padded to `sequence_length`, with a mask
list, integers [L]       tokens, cut or padded to `sequence_length` (`vocab_size` is needed)
======================== ==========================================================================

Where a feature is None the example lacks the modality. The splits are train, test and validation
(valid, val, dev); what is missing is set aside from train.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollingq_jax.data.audio import read_audio, sound_seconds
from rollingq_jax.data.dataset import (
    Dataset,
    Example,
    ModalityInfo,
    Source,
    check_name,
    check_tags,
    count_classes,
    encode_labels,
)
from rollingq_jax.data.options import given_path, mapping_option
from rollingq_jax.data.preprocessing import evenly_spaced
from rollingq_jax.data.sources.media_folder import (
    MAX_SECONDS,
    FileForm,
    MediaSizes,
    read_sizes,
    sound_features,
    text_length,
    text_tokens,
    vocabulary,
)
from rollingq_jax.data.sources.tfds import (
    VALID_NAMES,
    FeatureAdapter,
    adapted_dataset,
    read_features,
    tensor_adapter,
)
from rollingq_jax.data.video import decode_image, resize_image
from rollingq_jax.errors import DataError
from rollingq_jax.files import reading


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The data set in the folder `config_data.path`.

    Args:
      config_data: `path`, `features`; optional `kinds`, `sequence_length` (128), `vocab_size`,
        `standardize` (True) and the fields of `media_folder.MediaSizes`.
      seed: of the validation split, where there is none.
      kinds: {modality: kind}, before `config_data.kinds` and the shape.

    Raises:
      DataError: the package `datasets`, the folder or a feature is missing, or cannot be used.
      ConfigError: `features` is missing or malformed.
    """
    path = given_path(config_data, "a folder that `save_to_disk` of datasets wrote")
    tables = _open(str(path))
    available = tables["train"].features
    features, modalities = read_features(config_data, available)
    tables = {split: _undecoded(table, modalities.values()) for split, table in tables.items()}
    longest = functools.partial(_longest, tables["train"], modalities)
    texts = any(_is_text(available[feature]) for feature in modalities.values())
    sizes = read_sizes(config_data, longest, texts=texts)
    kind_of = mapping_option(config_data, "kinds") | dict(kinds or {})
    adapters = {
        check_name(name, "data.features"): _make_adapter(
            name, feature, tables["train"], kind_of.get(name), sizes, config_data
        )._replace(media=_media(available[feature], sizes))
        for name, feature in modalities.items()
    }
    # Over all splits: a mask is in every split or in none, since the batches' fields must agree.
    optional = {
        name
        for name, feature in modalities.items()
        if any(table.data.column(feature).null_count for table in tables.values())
    }
    columns = {s: np.asarray(t.with_format(None)[features["label"]][:]) for s, t in tables.items()}
    names = tuple(getattr(available[features["label"]], "names", None) or ())
    labels, class_names = encode_labels(columns, names)
    sources: dict[str, Source] = {
        split: HuggingFaceSource(table, features, adapters, optional, labels[split])
        for split, table in tables.items()
    }
    return adapted_dataset(
        sources,
        adapters,
        config_data,
        seed=seed,
        num_classes=count_classes(labels, class_names),
        class_names=class_names,
        description=f"Hugging Face data set {path.name}",
    )


def _open(path: str) -> dict[str, Any]:
    """{split of ours: table}."""
    with reading(path, "data.path: Hugging Face data set"):
        import datasets

        found = datasets.load_from_disk(path)
    if not isinstance(found, datasets.DatasetDict):
        return {"train": found}
    valid = next((name for name in VALID_NAMES if name in found), "valid")
    tables = {
        s: found[n]
        for s, n in (("train", "train"), ("valid", valid), ("test", "test"))
        if n in found
    }
    if "train" not in tables:
        raise DataError(f"data.path: {path}: splits {', '.join(found)}; allowed: train among them")
    return tables


def _undecoded(table: Any, features: Any) -> Any:
    """The table, with images and sounds as the bytes of their files: they are decoded here."""
    import datasets

    for feature in features:
        if isinstance(table.features[feature], datasets.Image | datasets.Audio):
            table = table.cast_column(feature, type(table.features[feature])(decode=False))
    return table


def _media(feature: Any, sizes: MediaSizes) -> dict[str, Any] | None:
    """What a model trained on the feature says of files for it, as `Preprocessing.media`."""
    import datasets

    types = {datasets.Image: "image", datasets.Audio: "audio"}
    type_ = "string" if _is_text(feature) else types.get(type(feature))
    return None if type_ is None else {"type": type_, **dataclasses.asdict(sizes)}


def _is_text(feature: Any) -> bool:
    return getattr(feature, "dtype", "") in ("string", "large_string")


def _longest(table: Any, modalities: Mapping[str, str], what: str, sizes: MediaSizes) -> float:
    """Of the sounds or texts of some examples, for `media_folder.read_sizes`."""
    import datasets

    wanted = [
        feature
        for feature in modalities.values()
        if isinstance(table.features[feature], datasets.Audio) == (what == "audio")
        and (what == "audio" or _is_text(table.features[feature]))
    ]
    lengths = [0.0]
    for index in evenly_spaced(len(table), sizes.stats_examples) if wanted else ():
        for value in (table[index][feature] for feature in wanted):
            if value is not None and what == "audio":
                data = _bytes(value, index)
                lengths.append(sound_seconds(f"of example {index}", MAX_SECONDS, data=data))
            elif value is not None:
                lengths.append(text_length(value.encode("utf-8", "replace"), sizes))
    return max(lengths)


def _bytes(value: Mapping[str, Any], index: int) -> bytes:
    """The bytes of an image or a sound; a path in the data is not followed."""
    if value.get("bytes") is None:
        raise DataError(
            f"example {index}: a file is named ({str(value.get('path'))[:80]!r}) and not held; "
            "save_to_disk of a recent version of datasets holds the files' bytes"
        )
    return value["bytes"]


def _make_adapter(
    name: str, feature: str, table: Any, kind: str | None, sizes: MediaSizes, config_data: Any
) -> FeatureAdapter:
    """Makes a modality of a feature; `convert` takes (index, value).

    Raises:
      DataError: the feature cannot be used, or every example lacks it.
      ConfigError: it holds token ids, and `vocab_size` is not set.
    """
    import datasets

    description, side = table.features[feature], sizes.image_size
    if isinstance(description, datasets.Image):
        info = ModalityInfo(name, "image", (side, side, 3), "uint8")

        def image(pair: Any) -> Example:
            pixels = decode_image(_bytes(pair[1], pair[0]), f"of example {pair[0]}")
            return {name: resize_image(pixels, (side, side))}

        return FeatureAdapter(info, image)
    if isinstance(description, datasets.Audio):
        info = ModalityInfo(name, "spectrogram", *FileForm("audio", sizes).example)

        def sound(pair: Any) -> Example:
            data = _bytes(pair[1], pair[0])
            read = read_audio(f"of example {pair[0]}", sizes.audio_seconds, data=data)
            return {name: sound_features(*read, sizes)}

        return FeatureAdapter(info, sound)
    if _is_text(description):
        info = ModalityInfo(name, "tokens", (sizes.text_length,), "int32", vocabulary(sizes))
        return FeatureAdapter(
            info, lambda pair: {name: text_tokens(pair[1].encode("utf-8", "replace"), sizes)}
        )
    first = next((row[feature] for row in table if row[feature] is not None), None)
    array = None if first is None else np.asarray(first)
    if array is None or array.dtype.kind not in "biuf":
        raise DataError(f"data.features: {name}: {description!r} cannot be used as a modality")
    varies = hasattr(description, "feature") and getattr(description, "length", -1) < 0
    shape = (None, *array.shape[1:]) if varies else array.shape
    dtype = np.float32 if array.dtype.kind == "f" else array.dtype
    adapter = tensor_adapter(name, shape, dtype, kind, config_data)
    return FeatureAdapter(adapter.info, lambda pair: adapter.convert(pair[1]))


class HuggingFaceSource:
    """One split; records become examples when they are read.

    Args:
      table: the split, images and sounds as bytes.
      features: {modality, "label", "group" or "id": feature}.
      adapters: {modality: what the feature becomes}.
      optional: modalities that some example lacks.
      labels: int32 [N].
    """

    def __init__(
        self,
        table: Any,
        features: Mapping[str, str],
        adapters: Mapping[str, FeatureAdapter],
        optional: set[str],
        labels: np.ndarray,
    ) -> None:
        self.features, self.adapters, self.optional = dict(features), dict(adapters), optional
        self.table, self.labels = table, labels
        self._records = table.select_columns([features[name] for name in adapters])
        self.groups, self.ids = (self._tags(name) for name in ("group", "id"))

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> Example:
        with reading(str(index), "record"):
            record = self._records[int(index)]
        example: Example = {"label": self.labels[index]}
        for name, adapter in self.adapters.items():
            value = record[self.features[name]]
            if value is None:
                example[name] = np.zeros(adapter.info.shape, adapter.info.dtype)
            else:
                example |= adapter.convert((index, value))
            if name in self.optional:
                mask = example.get(f"{name}_mask", np.True_)
                example[f"{name}_mask"] = np.asarray(mask & (value is not None))
        return example

    def _tags(self, name: str) -> np.ndarray | None:
        if name not in self.features:
            return None
        values = np.asarray(self.table[self.features[name]][:])
        return check_tags(values, f"data.features: {name}={self.features[name]}")
