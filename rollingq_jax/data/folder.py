"""Own data as media files with a manifest (:mod:`rollingq_jax.data.manifest`).

Files are read when an example is read, and become arrays of one size:

======== =========== ==============================================================================
type     kind        an example
======== =========== ==============================================================================
audio    spectrogram float32 [audio_bins, audio_frames, 1]: resampled to ``audio_rate``, padded with
                     silence or cut to ``audio_seconds``; decibels under the loudest, standardised.
                     ``audio_features`` "mel" (log-mel) or "stft" (linear frequency)
image    image       uint8 [image_size, image_size, 3]
video    video       uint8 [video_frames, image_size, image_size, 3], frames evenly spaced
text     tokens      int32 [text_length]: 1 + the value of each byte, 0 pads; 257 ids
======== =========== ==============================================================================

``audio_seconds`` 0 stands for the longest clip, at most 10 s; ``text_length`` 0 for the longest
text, at most 512 bytes. These lengths, means and standard deviations come from at most
``stats_examples`` training examples, evenly spaced.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data import media
from rollingq_jax.data.labels import check_labels, count_classes, with_valid
from rollingq_jax.data.manifest import Manifest, Row, is_class_number, read_manifest
from rollingq_jax.data.measure import evenly, standardize
from rollingq_jax.data.media_arrays import (
    BYTE_VOCABULARY,
    MediaSizes,
    example_form,
    is_video,
    read_value,
)
from rollingq_jax.data.options import choice, local_path, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.types import Dataset, Example, ModalityInfo
from rollingq_jax.errors import DataError

MAX_SECONDS = 10.0
MAX_TEXT = 512
KINDS = {
    "audio": "spectrogram",
    "image": "image",
    "video": "video",
    "text": "tokens",
    "string": "tokens",
}


def load(config_data: Any, *, seed: int) -> Dataset:
    """The data set of the manifest at ``config_data.path``.

    Args:
      config_data: ``path``; optional ``modalities``, ``standardize`` and the fields of
        :class:`MediaSizes`.
      seed: of the validation split, where the manifest has none.

    Raises:
      DataError: the manifest is malformed or files are missing; a file that cannot be read raises
        when its example is read, or here if it is among those that statistics are taken from.
      ConfigError: a field has the wrong type or value.
    """
    path = option(config_data, "path", "")
    if not path:
        raise DataError("data.path: not given; a manifest (.csv or .jsonl) or its folder")
    manifest = read_manifest(local_path(path, "data.path"))
    if manifest.missing:
        raise DataError(describe_missing(manifest))
    names = sorted(option(config_data, "modalities", ()) or manifest.types)
    for name in names:
        if name not in manifest.types:
            raise DataError(
                f"modality {name!r}: not in {manifest.path.name}; "
                f"there are {', '.join(manifest.types)}"
            )
    types = {name: manifest.types[name] for name in names}
    rows = {
        split: [row for row in manifest.rows if row.split == split]
        for split in ("train", "valid", "test")
    }
    rows = {split: found for split, found in rows.items() if found or split != "valid"}
    for split in ("train", "test"):
        if not rows[split]:
            raise DataError(f"{manifest.path.name}: no rows of split {split!r}")
    labels, class_names = _encode_labels(rows)
    num_classes = count_classes(labels, class_names)
    sizes = _read_sizes(config_data, types, rows["train"])
    optional = {name for name in names if any(r.values[name] is None for r in manifest.rows)}
    sources = {
        split: FolderSource(found, labels[split], types, sizes, optional)
        for split, found in rows.items()
    }
    splits = with_valid(sources, labels["train"], seed=seed)
    floats = option(config_data, "standardize", True)
    splits, modalities = standardize(
        splits, _modalities(types, sizes), most=sizes.stats_examples, floats=floats
    )
    return Dataset(
        splits,
        {name: one.info for name, one in modalities.items()},
        num_classes,
        class_names,
        f"files of {manifest.path.name}",
        preprocessing=modalities,
    )


def _modalities(types: Mapping[str, str], sizes: MediaSizes) -> dict[str, Preprocessing]:
    """How files become arrays, before anything is measured."""
    modalities = {}
    for name, type_ in types.items():
        vocab_size = BYTE_VOCABULARY if KINDS[type_] == "tokens" else None
        shape, dtype = example_form(type_, sizes)
        info = ModalityInfo(name, KINDS[type_], shape, dtype, vocab_size)
        media = {"type": type_, **dataclasses.asdict(sizes)}
        modalities[name] = Preprocessing(info, shape, dtype, media=media)
    return modalities


class FolderSource:
    """The examples of one split, not standardised; the module's docstring says what is in them."""

    def __init__(
        self,
        rows: Sequence[Row],
        labels: np.ndarray,
        types: Mapping[str, str],
        sizes: MediaSizes,
        optional: set[str],
    ) -> None:
        self.rows, self.labels, self.types = tuple(rows), labels, dict(types)
        self.sizes, self.optional = sizes, optional
        rated = [set(row.qualities) for row in rows]
        self.rated = set.intersection(*rated) & set(types)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        example: Example = {"label": self.labels[index]}
        for name in self.types:
            cell = row.values[name]
            if cell is None:
                example[name] = np.zeros(*example_form(self.types[name], self.sizes))
            else:
                example[name] = read_value(cell, self.types[name], self.sizes)
            if name in self.optional:
                example[f"{name}_mask"] = np.asarray(cell is not None)
        for name in self.rated:
            example[f"quality_{name}"] = np.asarray(row.qualities[name], np.float32)
        return example


def describe_missing(manifest: Manifest) -> str:
    """One line on the files that are named and not there; empty if there are none."""
    if not manifest.missing:
        return ""
    shown = ", ".join(repr(name) for name in manifest.missing[:3])
    more = ", ..." if len(manifest.missing) > 3 else ""
    files = "file" if len(manifest.missing) == 1 else "files"
    return f"{manifest.path.name}: {len(manifest.missing)} missing {files}: {shown}{more}"


def _encode_labels(
    rows: Mapping[str, Sequence[Row]],
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Class numbers as they are, or names numbered in alphabetical order of those in train."""
    if all(is_class_number(row.label) for of_split in rows.values() for row in of_split):
        return {
            split: check_labels(np.array([int(row.label) for row in of_split]), f"{split}/label")
            for split, of_split in rows.items()
        }, ()
    names = sorted({row.label for row in rows["train"]})
    numbers = {name: number for number, name in enumerate(names)}
    for split, of_split in rows.items():
        for row in of_split:
            if row.label not in numbers:
                raise DataError(
                    f"{split}/label: {row.label[:60]!r} never occurs in train, so it cannot be "
                    "learnt; put examples of it into train or leave it out"
                )
    labels = {
        split: np.array([numbers[row.label] for row in of_split], np.int32)
        for split, of_split in rows.items()
    }
    return labels, tuple(names)


def _read_sizes(config_data: Any, types: Mapping[str, str], train: Sequence[Row]) -> MediaSizes:
    """The configuration's sizes, with the lengths that it leaves open measured."""
    least = {"audio_rate": 1000, "audio_seconds": 0, "audio_bins": 2, "text_length": 0}
    fields: dict[str, Any] = {
        field.name: option(config_data, field.name, field.default, minimum=least.get(field.name, 1))
        for field in dataclasses.fields(MediaSizes)
        if field.name != "audio_features"
    }
    sizes = MediaSizes(choice(config_data, "audio_features", ("mel", "stft")), **fields)
    sample = [train[i] for i in evenly(len(train), sizes.stats_examples)]

    def longest(kinds: tuple[str, ...], length: Any) -> float:
        cells = [row.values[n] for row in sample for n, type_ in types.items() if type_ in kinds]
        return max((length(cell) for cell in cells if cell is not None), default=0)

    if not sizes.audio_seconds:
        seconds = min(longest(("audio",), _sound_seconds), MAX_SECONDS)
        sizes = dataclasses.replace(sizes, audio_seconds=max(seconds, 0.05))
    if not sizes.text_length:
        length = min(longest(("text", "string"), _text_bytes), MAX_TEXT)
        sizes = dataclasses.replace(sizes, text_length=max(int(length), 1))
    return sizes


def _sound_seconds(file: Path) -> float:
    seconds = media.video_seconds if is_video(file) else media.sound_seconds
    return seconds(file, MAX_SECONDS)


def _text_bytes(cell: Path | str) -> int:
    return cell.stat().st_size if isinstance(cell, Path) else len(cell.encode("utf-8", "replace"))
