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
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data import media
from rollingq_jax.data.labels import (
    count_classes,
    encode_labels,
    groups_of,
    is_class_number,
    labels_of,
    warn_of_shared_groups,
    with_test,
    with_valid,
)
from rollingq_jax.data.manifest import SPLIT_NAMES, Manifest, Row, check_task, read_manifest
from rollingq_jax.data.measure import evenly, standardize
from rollingq_jax.data.media_arrays import (
    BYTE_VOCABULARY,
    MediaSizes,
    example_form,
    is_video,
    read_value,
)
from rollingq_jax.data.options import choice, local_path, mapping_option, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.types import Dataset, Example, ModalityInfo, Source
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
      config_data: ``path``; optional ``columns`` ("label=emotion, sound=wav_path"), ``modalities``,
        ``standardize`` and the fields of :class:`MediaSizes`.
      seed: of the validation split, where the manifest has none.

    Raises:
      DataError: the manifest is malformed or files are missing; a file that cannot be read raises
        when its example is read, or here if it is among those that statistics are taken from.
      ConfigError: a field has the wrong type or value.
    """
    path = option(config_data, "path", "")
    if not path:
        raise DataError("data.path: not given; a manifest (.csv, .tsv or .jsonl) or its folder")
    manifest = read_manifest(
        local_path(path, "data.path"),
        columns=mapping_option(config_data, "columns"),
        modalities=option(config_data, "modalities", ()),
    )
    if manifest.missing:
        raise DataError(describe_missing(manifest))
    rows = _rows_of_splits(manifest)
    check_task([row.label for row in manifest.rows], manifest.path.name)
    labels, class_names = encode_labels(
        {split: np.array([row.label for row in found], str) for split, found in rows.items()}
    )
    num_classes = count_classes(labels, class_names)
    sizes = _read_sizes(config_data, manifest.types, rows["train"])
    files = {name: FileForm(type_, sizes) for name, type_ in manifest.types.items()}
    optional = {name for name in files if any(row.values[name] is None for row in manifest.rows)}
    sources = {
        split: FolderSource(
            found,
            files,
            optional,
            labels[split],
            groups=_tags(found, "group") if "group" in manifest.special else None,
            ids=_tags(found, "id") if "id" in manifest.special else None,
        )
        for split, found in rows.items()
    }
    splits = _complete(sources, seed)
    floats = option(config_data, "standardize", True)
    splits, modalities = standardize(
        splits, _modalities(files), most=sizes.stats_examples, floats=floats
    )
    return Dataset(
        splits,
        {name: one.info for name, one in modalities.items()},
        num_classes,
        class_names,
        f"files of {manifest.path.name}",
        preprocessing=modalities,
    )


def _rows_of_splits(manifest: Manifest) -> dict[str, list[Row]]:
    """The rows of train, valid and test that there are."""
    rows: dict[str, list[Row]] = {}
    for split in ("train", "valid", "test"):
        if found := [row for row in manifest.rows if (row.split or "train") == split]:
            rows[split] = found
    for split, needed in (("train", True), ("test", "valid" in rows)):
        if needed and split not in rows:
            raise DataError(f"{manifest.path.name}: no rows of split {split!r}")
    return rows


def _tags(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], str)


def _complete(splits: Mapping[str, "FolderSource"], seed: int) -> dict[str, Source]:
    """With automatic splits for those that are not there; groups are never parted."""
    groups = {split: s.groups for split, s in splits.items() if s.groups is not None}
    warn_of_shared_groups(groups)
    train = splits["train"]
    complete = with_test(splits, train.labels, groups=train.groups)
    rest = complete["train"]
    return with_valid(complete, labels_of(rest), seed=seed, groups=groups_of(rest))


def open_manifest(
    path: Path,
    modalities: Mapping[str, Preprocessing],
    *,
    split: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> tuple[Source, list[str], list[str]]:
    """New examples for a trained model, from files that a manifest names.

    Args:
      path: the manifest, or its folder. It needs a column for one of the modalities only; one that
        has none is missing in every example.
      modalities: those that the model reads, with the sizes to which it has its files brought.
      split: which rows, where there is a column for it; None for all where they are of one split,
        else those of "test".
      columns: as ``data.columns``; names that are not there are left out.

    Returns:
      A source of raw arrays `{m: array}` and `{m}_mask`, a bool scalar, without labels; for each
      example its id (the number of its row from 0, where there is no column for it) and its label,
      "" where it has none.

    Raises:
      DataError: as :func:`load`; there are no such rows; the model was trained on arrays.
    """
    saved = {name: _saved_form(one) for name, one in modalities.items()}
    types = {name: form.type for name, form in saved.items()}
    manifest = read_manifest(path, columns=columns, types=types)
    files = {name: FileForm(type_, saved[name].sizes) for name, type_ in manifest.types.items()}
    rows: Sequence[Row] = manifest.rows
    if "split" in manifest.special:
        there = {row.split for row in rows}
        if split is None and len(there) > 1:
            split = "test"
        if split is not None:
            rows = [row for row in rows if row.split == SPLIT_NAMES.get(split, split)]
        if not rows:
            names = ", ".join(sorted(there - {""})) or "none"
            raise DataError(f"{manifest.path.name}: no rows of split {split!r}; there are {names}")
    if missing := describe_missing(manifest, rows):
        raise DataError(missing)
    has_id = "id" in manifest.special
    ids = [row.id if has_id else str(row.number) for row in rows]
    labels = [str(int(r.label)) if is_class_number(r.label) else r.label for r in rows]
    return FolderSource(rows, files, set(files)), ids, labels


class FileForm(NamedTuple):
    """What a modality's cells are, and to what sizes they are brought."""

    type: str
    sizes: MediaSizes


def _saved_form(one: Preprocessing) -> FileForm:
    """How a trained model's files become raw arrays."""
    name = one.info.name
    if one.media is None:
        raise DataError(
            f"modality {name!r}: the run was trained on arrays of it, so files cannot be read for "
            "it; give arrays (.npz)"
        )
    try:
        sizes = dict(one.media)
        form = FileForm(str(sizes.pop("type")), MediaSizes(**sizes))
        fits = example_form(*form) == (tuple(one.raw_shape), one.raw_dtype)
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits:
        raise DataError(
            f"modality {name!r}: how its files are read cannot be told from the run's record "
            f"({str(dict(one.media))[:200]})"
        )
    return form


def _modalities(files: Mapping[str, FileForm]) -> dict[str, Preprocessing]:
    """How files become arrays, before anything is measured."""
    modalities = {}
    for name, (type_, sizes) in files.items():
        vocab_size = BYTE_VOCABULARY if KINDS[type_] == "tokens" else None
        shape, dtype = example_form(type_, sizes)
        info = ModalityInfo(name, KINDS[type_], shape, dtype, vocab_size)
        media = {"type": type_, **dataclasses.asdict(sizes)}
        modalities[name] = Preprocessing(info, shape, dtype, media=media)
    return modalities


class FolderSource:
    """The examples of one split, not standardised; the module's docstring says what is in them.

    Args:
      rows: of the manifest.
      files: {modality: what its cells are}.
      optional: modalities that have a mask, as some example lacks them.
      labels: int32 [N], or None for examples without them.
      groups, ids: strings [N], held beside the examples; None where there are none.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        files: Mapping[str, FileForm],
        optional: set[str],
        labels: np.ndarray | None = None,
        *,
        groups: np.ndarray | None = None,
        ids: np.ndarray | None = None,
    ) -> None:
        self.rows, self.files, self.optional = tuple(rows), dict(files), optional
        self.groups, self.ids = groups, ids
        if labels is not None:
            self.labels = labels
        rated = [set(row.qualities) for row in rows]
        self.rated = set.intersection(*rated) & set(files)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Example:
        row = self.rows[index]
        example: Example = {"label": self.labels[index]} if hasattr(self, "labels") else {}
        for name, (type_, sizes) in self.files.items():
            cell = row.values[name]
            if cell is None:
                example[name] = np.zeros(*example_form(type_, sizes))
            else:
                example[name] = read_value(cell, type_, sizes)
            if name in self.optional:
                example[f"{name}_mask"] = np.asarray(cell is not None)
        for name in self.rated:
            example[f"quality_{name}"] = np.asarray(row.qualities[name], np.float32)
        return example


def describe_missing(manifest: Manifest, rows: Sequence[Row] | None = None) -> str:
    """One line on files that are named (by some of the rows) and not there; empty if none are."""
    missing = manifest.missing if rows is None else manifest.missing_of(rows)
    if not missing:
        return ""
    shown = ", ".join(repr(name) for name in missing[:3])
    more = ", ..." if len(missing) > 3 else ""
    files = "file" if len(missing) == 1 else "files"
    return f"{manifest.path.name}: {len(missing)} missing {files}: {shown}{more}"


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
