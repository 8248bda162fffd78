"""Own data as media files, with a manifest that says which files make up each example.

A manifest is a CSV, TSV or JSONL file, one row an example, with the columns

- `split`: train, test, or valid (val and validation mean the same); without it, or with rows of
  train only, validation and test examples are set aside;
- `label`: a class number from 0 in every row, or a name in every row; or any number of names with |
  between (a list in JSONL; | alone: none); or a number that is to be predicted (`data.task`);
- one column for each modality: a path relative to the manifest's folder. The name may be followed
  by a colon and the type, `sound:audio`; else the suffix tells the type. Types: audio (.wav,
  .flac; of a video file, its sound), image, video, text (.txt, bytes), string (the cell itself
  is the text), frames, flow and stored. An empty cell (null in JSONL) means that the example lacks
  the modality;
- optional `quality_<modality>`: a number, minus the noise in standard deviations;
- optional `group`: a speaker, a video, a patient, never on both sides of an automatic split;
- optional `id`: what predictions call the example.

Columns may have other names (`data.columns`: "label=emotion, sound=wav_path"), and where
`data.modalities` says which are used, the others are left alone. In a CSV file, cells stand
between commas, semicolons (whose numbers may have decimal commas), tabs or `|`. A manifest is data
that someone else may have written: no path in it may lead out of its folder, by `..`, from the
root, or through a link.

Files are read when an example is read, and become arrays of one size:

======== =========== ==============================================================================
type     kind        an example
======== =========== ==============================================================================
audio    spectrogram float32 [audio_bins, audio_frames, 1]: resampled to `audio_rate`, padded with
                     silence or cut to `audio_seconds`; decibels under the loudest, standardized.
                     `audio_features` "mel" (log-mel) or "stft" (linear frequency)
image    image       uint8 [image_size, image_size, 3]
video    video       uint8 [video_frames, image_size, image_size, 3], frames evenly spaced
text     tokens      int32 [text_length]: 1 + the value of each byte, 0 pads; 257 ids. With
                     `tokenizer`, a Hugging Face tokenizer.json: 1 + each token's id
frames   video       as video, from a folder of JPEGs in the order of their numbers (or the list
                     `video` of an .hdf5 file). Training draws one frame of each part of the clip,
                     and crops and flips them (`crop_per`)
flow     video       uint8 [video_frames, image_size, image_size, 2], from a folder u/NAME of gray
                     frames and the folder v/NAME next to u
stored   spectrogram float32 [rows, columns, 1]: a 2-D array in an .npy, .pkl or .pt file
======== =========== ==============================================================================

Of the last three the column says the type.

`audio_seconds` 0 stands for the longest clip, at most 10 s; `text_length` 0 for the longest text,
at most 512 bytes or tokens. These lengths, means and standard deviations come from at most
`stats_examples` training examples, evenly spaced.
"""

import codecs
import csv
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rollingq_jax.convert.files import load_tensor
from rollingq_jax.data.audio import (
    decibel_stft,
    log_mel,
    read_audio,
    resample,
    samples_in,
    sound_seconds,
)
from rollingq_jax.data.dataset import (
    MULTI_LABEL,
    REGRESSION,
    SEPARATORS,
    SINGLE_LABEL,
    SPLITS,
    TASKS,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    check_name,
    complete_splits,
    is_class_number,
    read_labels,
    split_names,
)
from rollingq_jax.data.options import choice, given_path, mapping_option, option
from rollingq_jax.data.preprocessing import Preprocessing, evenly_spaced, standardize
from rollingq_jax.data.restricted_pickle import load_pickle
from rollingq_jax.data.video import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalFrames,
    TrainFrames,
    decode_frames,
    encode_jpeg,
    frame_paths,
    read_image,
    read_video_audio,
    read_video_frames,
    resize_image,
    segment_frames,
    video_seconds,
)
from rollingq_jax.errors import ConfigError, DataError, missing_package, said
from rollingq_jax.files import HEAD, check_lfs_pointer, reading

MAX_SECONDS = 10.0
MAX_TEXT = 512
KIND_OF_TYPE = {
    "audio": "spectrogram",
    "image": "image",
    "video": "video",
    "text": "tokens",
    "string": "tokens",
    "frames": "video",
    "flow": "video",
    "stored": "spectrogram",
}
BYTE_VOCABULARY = 257
MOST_BYTES = 2**20  # of a text that is tokenized
CHECKSUM = "#sha256="  # behind a tokenizer's path, once it is known
MANIFEST_SUFFIXES = (".csv", ".tsv", ".jsonl")
SUFFIXES = {
    "audio": (".wav", ".flac"),
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    "video": (".mp4", ".flv", ".avi", ".mkv", ".mov", ".webm", ".m4v"),
    "text": (".txt",),
}
_TYPE_OF_SUFFIX = {suffix: type_ for type_, suffixes in SUFFIXES.items() for suffix in suffixes}
TYPES = tuple(KIND_OF_TYPE)
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("valid", "val", "validation"), "valid"
)
SPECIAL = ("split", "label", "group", "id")
NEEDED = "label and one column for each modality, and optionally split, group and id"
DECLARE = (
    "data.columns says which column is label, split, group or id, and data.modalities which others "
    "to use"
)
DELIMITERS = ",;\t|"
_BYTE_ORDERS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_DECIMAL = re.compile(r"[-+]?(\d+([.,]\d*)?|[.,]\d+)([eE][-+]?\d+)?", re.ASCII)
_NEW_LINE = re.compile(r"\r\n|\n|\r")
_DECIMAL_COMMA = re.compile(r"[-+]?\d*,\d+", re.ASCII)


class Row(NamedTuple):
    """One example: what the manifest says of it, with paths resolved.

    Attributes:
      number: in the file, from 0.
      split: train, valid or test; "" where there is no such column.
      label: "" where new data have none.
      values: {modality: path, the text itself, or None where it is missing}.
      qualities: {modality: quality}, of those that have one.
      group, id: "" where there is no such column.
    """

    number: int
    split: str
    label: str
    values: dict[str, Path | str | None]
    qualities: dict[str, float]
    group: str
    id: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Attributes:
      path: of the manifest.
      types: {modality: one of TYPES}, in alphabetical order.
      rows: in the order of the file.
      special: those of split, label, group and id that it has.
    """

    path: Path
    types: dict[str, str]
    rows: tuple[Row, ...]
    special: tuple[str, ...]

    @functools.cached_property
    def missing(self) -> tuple[str, ...]:
        """Paths that are named and not there, as the manifest writes them."""
        cells = [(n, cell) for row in self.rows for n, cell in row.values.items()]
        files = [
            cell
            for name, cell in cells
            if isinstance(cell, Path) and not is_there(cell, self.types[name])
        ]
        return tuple(str(file.relative_to(self.path.parent)) for file in files)


@dataclasses.dataclass(frozen=True)
class MediaSizes:
    """The sizes to which files are brought; the fields are those of `config.data`."""

    audio_features: str = "mel"
    audio_rate: int = 16000
    audio_seconds: float = 0.0
    audio_bins: int = 64
    audio_frames: int = 96
    image_size: int = 64
    video_frames: int = 4
    text_length: int = 0
    tokenizer: str = ""  # behind the path the checksum, where it was trained with
    stats_examples: int = 256


class FileForm(NamedTuple):
    """The type of a modality's cells, and the sizes to which they are brought.

    Attributes:
      type: one of TYPES.
      sizes: to which files are brought.
      stored: of type "stored", the shape of its arrays.
    """

    type: str
    sizes: MediaSizes
    stored: tuple[int, ...] = ()

    @property
    def example(self) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of an example."""
        sizes, side = self.sizes, self.sizes.image_size
        return {
            "audio": ((sizes.audio_bins, sizes.audio_frames, 1), "float32"),
            "image": ((side, side, 3), "uint8"),
            "video": ((sizes.video_frames, side, side, 3), "uint8"),
            "text": ((sizes.text_length,), "int32"),
            "string": ((sizes.text_length,), "int32"),
            "frames": ((sizes.video_frames, side, side, 3), "uint8"),
            "flow": ((sizes.video_frames, side, side, 2), "uint8"),
            "stored": (self.stored, "float32"),
        }[self.type]


def load(config_data: Any, *, seed: int) -> Dataset:
    """The data set of the manifest at `config_data.path`.

    Args:
      config_data: `path`; optional `columns` ("label=emotion, sound=wav_path"), `modalities`,
        `standardize` and the fields of `MediaSizes`.
      seed: of the validation split, where the manifest has none.

    Raises:
      DataError: the manifest is malformed or files are missing; a file that cannot be read raises
        when its example is read, or here if it is among those that statistics are taken from.
      ConfigError: a field has the wrong type or value.
    """
    manifest = read_manifest(
        given_path(config_data, "a manifest (.csv, .tsv or .jsonl) or its folder"),
        columns=mapping_option(config_data, "columns"),
        modalities=option(config_data, "modalities", ()),
    )
    task = choice(config_data, "task", ("auto", *TASKS))
    return from_manifest(manifest, config_data, seed=seed, task=task)


def from_manifest(
    manifest: Manifest, config_data: Any, *, seed: int, task: str = SINGLE_LABEL
) -> Dataset:
    """The data set that a manifest describes; see `load` for the fields and the errors."""
    _check_files(manifest)
    rows = _rows_of_splits(manifest)
    if task == "auto":
        task = _infer_task([row.label for row in manifest.rows], manifest.path.name)
    labels = read_labels(
        {split: np.array([row.label for row in found], str) for split, found in rows.items()},
        task=task,
    )
    longest = functools.partial(_longest, rows["train"], manifest.types)
    texts = "tokens" in {KIND_OF_TYPE[type_] for type_ in manifest.types.values()}
    sizes = read_sizes(config_data, longest, texts=texts)
    files = {
        name: FileForm(type_, sizes, _stored_shape(name, type_, rows["train"]))
        for name, type_ in manifest.types.items()
    }
    optional = {name for name in files if any(row.values[name] is None for row in manifest.rows)}

    def tags(found: Sequence[Row], name: str) -> np.ndarray | None:
        in_order = np.array([getattr(row, name) for row in found], str)
        return in_order if name in manifest.special else None

    sources = {
        split: FolderSource(
            found,
            files,
            optional,
            labels.values[split],
            groups=tags(found, "group"),
            ids=tags(found, "id"),
            encoded=True,
        )
        for split, found in rows.items()
    }
    modalities = _modalities(files)
    clips = [name for name, form in files.items() if form.type == "frames"]
    splits, measured = standardize(
        complete_splits(sources, seed=seed),
        {name: one for name, one in modalities.items() if name not in clips},
        most=sizes.stats_examples,
        floats=option(config_data, "standardize", True),
    )
    modalities |= measured
    crop_per = choice(config_data, "crop_per", ("clip", "frame"))
    shown = (sizes.video_frames, sizes.image_size, segment_frames)
    return Dataset(
        splits,
        {name: one.info for name, one in modalities.items()},
        labels.num_classes,
        labels.class_names,
        f"files of {manifest.path.name}",
        train_transforms=tuple(TrainFrames(name, *shown, crop_per) for name in clips),
        eval_transforms=tuple(EvalFrames(name, *shown) for name in clips),
        preprocessing=modalities,
        task=labels.task,
    )


def _rows_of_splits(manifest: Manifest) -> dict[str, list[Row]]:
    """The rows of train, valid and test that there are."""
    rows: dict[str, list[Row]] = {}
    for split in SPLITS:
        if found := [row for row in manifest.rows if (row.split or "train") == split]:
            rows[split] = found
    for split, needed in (("train", True), ("test", "valid" in rows)):
        if needed and split not in rows:
            raise DataError(f"{manifest.path.name}: no rows of split {split!r}")
    return rows


def read_sizes(
    config_data: Any, longest: Callable[[str, MediaSizes], float], *, texts: bool
) -> MediaSizes:
    """The configuration's sizes, with the lengths that it leaves open measured.

    Args:
      config_data: with the fields of `MediaSizes`.
      longest: ("audio" or "text", the sizes so far) -> seconds, bytes or tokens of the longest of
        `stats_examples` training examples; 0 where there is none.
      texts: whether there are texts, which a tokenizer could be for.

    Raises:
      ConfigError: a field has the wrong type or value.
    """
    least = {"audio_rate": 1000, "audio_seconds": 0, "audio_bins": 2, "text_length": 0}
    fields: dict[str, Any] = {
        field.name: option(config_data, field.name, field.default, minimum=least.get(field.name, 1))
        for field in dataclasses.fields(MediaSizes)
        if field.name not in ("audio_features", "tokenizer")
    }
    sizes = MediaSizes(
        choice(config_data, "audio_features", ("mel", "stft")),
        tokenizer=_read_tokenizer(config_data, texts),
        **fields,
    )
    if not sizes.audio_seconds:
        seconds = min(longest("audio", sizes), MAX_SECONDS)
        sizes = dataclasses.replace(sizes, audio_seconds=max(seconds, 0.05))
    if not sizes.text_length:
        length = min(longest("text", sizes), MAX_TEXT)
        sizes = dataclasses.replace(sizes, text_length=max(int(length), 1))
    return sizes


def _longest(train: Sequence[Row], types: Mapping[str, str], what: str, sizes: MediaSizes) -> float:
    """Of the files and texts of some rows, for `read_sizes`."""

    def length(cell: Path | str) -> float:
        if what == "audio":
            seconds = video_seconds if _is_video(cell) else sound_seconds
            return seconds(cell, MAX_SECONDS)
        if isinstance(cell, Path) and not sizes.tokenizer:
            return cell.stat().st_size
        return text_length(_text_bytes(cell, MOST_BYTES), sizes)

    kinds = ("audio",) if what == "audio" else ("text", "string")
    names = [name for name, type_ in types.items() if type_ in kinds]
    numbers = evenly_spaced(len(train), sizes.stats_examples)
    cells = [train[i].values[name] for i in numbers for name in names]
    return max((length(cell) for cell in cells if cell is not None), default=0)


def _read_tokenizer(config_data: Any, texts: bool) -> str:
    """The configuration's tokenizer as `MediaSizes` keeps it: path and checksum; empty for bytes.

    Raises:
      ConfigError: there is no text that it could be for.
    """
    given = option(config_data, "tokenizer", "")
    if not given:
        return ""
    if not texts:
        raise ConfigError(f"data.tokenizer is {given!r}; allowed without a modality of text: none")
    path, known, _ = given.partition(CHECKSUM)
    if known:  # a trained model's, which `open_tokenizer` compares
        return given
    with reading(path, "data.tokenizer"):
        content = epath.Path(path).expanduser().read_bytes()
    return f"{path}{CHECKSUM}{hashlib.sha256(content).hexdigest()}"


@functools.lru_cache(maxsize=8)
def open_tokenizer(tokenizer: str, length: int = 0) -> Any:
    """The tokenizer in a Hugging Face `tokenizer.json`, from the package tokenizers.

    Args:
      tokenizer: path and checksum, as `MediaSizes.tokenizer`.
      length: the most tokens of a text, special ones included; 0: no limit.

    Raises:
      DataError: the package or the file is missing, the file is another or no tokenizer, or draws.
      ConfigError: the length has no room for a token beside the special ones.
    """
    path, _, expected = tokenizer.partition(CHECKSUM)
    with reading(path, "data.tokenizer"):
        content = epath.Path(path).expanduser().read_bytes()
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise DataError(
            f"data.tokenizer {path}: its sha256 is {found}; allowed: {expected}, as in training"
        )
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise DataError(f"data.tokenizer: {missing_package(error) or said(error)}") from None
    with reading(path, "data.tokenizer"):
        made = Tokenizer.from_str(content.decode("utf-8"))
    dropout = getattr(made.model, "dropout", None)
    if dropout:
        raise DataError(f"data.tokenizer {path}: its dropout is {dropout}; allowed: none")
    special = made.num_special_tokens_to_add(False)
    if 0 < length <= special:
        raise ConfigError(
            f"data.text_length is {length}; allowed with this tokenizer: at least {special + 1}"
        )
    # A tokenizer.json brings its own padding and truncation; the length is the data's to choose.
    made.no_padding()
    made.enable_truncation(length) if length else made.no_truncation()
    return made


def vocabulary(sizes: MediaSizes) -> int:
    """The number of token ids of texts, 0 for padding included."""
    if not sizes.tokenizer:
        return BYTE_VOCABULARY
    return 2 + max(open_tokenizer(sizes.tokenizer).get_vocab().values())


def _modalities(files: Mapping[str, FileForm]) -> dict[str, Preprocessing]:
    """The way from files to arrays, before anything is measured."""
    modalities = {}
    for name, form in files.items():
        kind = KIND_OF_TYPE[form.type]
        vocab_size = vocabulary(form.sizes) if kind == "tokens" else None
        shape, dtype = form.example
        info = ModalityInfo(name, kind, shape, dtype, vocab_size)
        if form.type == "frames":  # drawn and cropped anew each time, so nothing is measured
            info = dataclasses.replace(info, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        media = {"type": form.type, **dataclasses.asdict(form.sizes)}
        modalities[name] = Preprocessing(info, shape, dtype, media=media)
    return modalities


class FolderSource:
    """The examples of one split, not standardized; the module's docstring says what is in them.

    Args:
      rows: of the manifest.
      files: {modality: what its cells are}.
      optional: modalities that have a mask, as some example lacks them.
      labels: as `dataset.TASKS` has them, or None for examples without them.
      groups, ids: strings [N], held apart from the examples; None where there are none.
      encoded: whether clips of type frames come as their JPEGs, for `TrainFrames` and `EvalFrames`.
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
        encoded: bool = False,
    ) -> None:
        self.rows, self.files, self.optional = tuple(rows), dict(files), optional
        self.encoded = encoded
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
        for name, form in self.files.items():
            cell = row.values[name]
            if form.type == "frames" and self.encoded:
                black = np.zeros((form.sizes.image_size, form.sizes.image_size, 3), np.uint8)
                frames: Any = [encode_jpeg(black)] if cell is None else clip_frames(Path(cell))
                example[name] = frames
            elif cell is None:
                example[name] = np.zeros(*form.example)
            else:
                example[name] = read_value(cell, form.type, form.sizes)
                if example[name].shape != form.example[0]:
                    raise DataError(
                        f"{name}: {cell}: {list(example[name].shape[:2])}; allowed: "
                        f"{list(form.stored[:2])}, as in the first training example"
                    )
            if name in self.optional:
                example[f"{name}_mask"] = np.asarray(cell is not None)
        for name in self.rated:
            example[f"quality_{name}"] = np.asarray(row.qualities[name], np.float32)
        return example


def _check_files(manifest: Manifest) -> None:
    """Refuses a manifest that names files which are not there."""
    missing = manifest.missing
    if not missing:
        return
    shown = ", ".join(repr(name) for name in missing[:3])
    more = ", ..." if len(missing) > 3 else ""
    files = "file" if len(missing) == 1 else "files"
    raise DataError(f"{manifest.path.name}: {len(missing)} missing {files}: {shown}{more}")


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
      columns: as `data.columns`; names that are not there are left out.

    Returns:
      A source of raw arrays `{m: array}` and `{m}_mask`, a bool scalar, without labels; for each
      example its id (the number of its row from 0, where there is no column for it) and its label,
      "" where it has none.

    Raises:
      DataError: as `load`; there are no such rows; the model was trained on arrays.
    """
    saved = {name: _saved_form(one) for name, one in modalities.items()}
    types = {name: form.type for name, form in saved.items()}
    manifest = read_manifest(path, columns=columns, types=types)
    files = {name: saved[name]._replace(type=type_) for name, type_ in manifest.types.items()}
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
    _check_files(dataclasses.replace(manifest, rows=tuple(rows)))
    has_id = "id" in manifest.special
    ids = [row.id if has_id else str(row.number) for row in rows]
    labels = [str(int(r.label)) if is_class_number(r.label) else r.label for r in rows]
    return FolderSource(rows, files, set(files)), ids, labels


def _saved_form(one: Preprocessing) -> FileForm:
    """The way from a trained model's files to raw arrays."""
    name = one.info.name
    if one.media is None:
        raise DataError(
            f"modality {name!r}: the run was trained on arrays of it, so files cannot be read for "
            "it; give arrays (.npz)"
        )
    try:
        sizes = dict(one.media)
        form = FileForm(str(sizes.pop("type")), MediaSizes(**sizes), tuple(one.raw_shape))
        if form.example == (tuple(one.raw_shape), one.raw_dtype):
            return form
    except (KeyError, TypeError, ValueError):
        pass  # fields of another version, or a damaged record
    raise DataError(
        f"modality {name!r}: how its files are read cannot be told from the run's record "
        f"({str(dict(one.media))[:200]})"
    )


def _is_video(path: Path | str) -> bool:
    """Tells a video file by its name."""
    return Path(path).suffix.lower() in SUFFIXES["video"]


def read_value(value: Path | str, type_: str, sizes: MediaSizes) -> np.ndarray:
    """A manifest's cell as the array that `FileForm.example` describes.

    Raises:
      DataError: the file is missing or damaged; the message names it.
    """
    size = (sizes.image_size, sizes.image_size)
    if type_ == "audio":
        reader = read_video_audio if _is_video(value) else read_audio
        return sound_features(*reader(value, sizes.audio_seconds), sizes)
    if type_ == "image":
        return resize_image(read_image(value), size)
    if type_ == "video":
        frames = read_video_frames(value, sizes.video_frames)
        return np.stack([resize_image(frame, size) for frame in frames])
    if type_ == "frames":
        clip = clip_frames(Path(value))
        return decode_frames(clip, segment_frames(len(clip), sizes.video_frames), sizes.image_size)
    if type_ == "flow":
        return _read_flow(Path(value), sizes)
    if type_ == "stored":
        return read_stored(Path(value))
    most = MOST_BYTES if sizes.tokenizer else sizes.text_length
    return text_tokens(_text_bytes(value, most), sizes)


def _text_bytes(value: Path | str, most: int) -> bytes:
    """A text, or the first bytes of a longer file."""
    if not isinstance(value, Path):
        return value.encode("utf-8", "replace")
    try:
        with value.open("rb") as file:
            data = file.read(max(most, HEAD))
    except OSError as error:
        raise DataError(f"text {value}: cannot be read ({error.strerror})") from None
    check_lfs_pointer(data, f"text {value}")
    return data


def text_tokens(data: bytes, sizes: MediaSizes) -> np.ndarray:
    """A text as int32 [text_length]: 1 + each byte, or each token's id; 0 behind the last."""
    if not sizes.tokenizer:
        return byte_tokens(data, sizes.text_length)
    tokenizer = open_tokenizer(sizes.tokenizer, sizes.text_length)
    return _shifted(tokenizer.encode(_decoded(data)).ids, sizes.text_length)


def text_length(data: bytes, sizes: MediaSizes) -> int:
    """Bytes of a text, or its tokens where there is a tokenizer."""
    if not sizes.tokenizer:
        return len(data)
    return len(open_tokenizer(sizes.tokenizer).encode(_decoded(data)).ids)


def _decoded(data: bytes) -> str:
    return data.decode("utf-8-sig", "replace")


class FrameFiles(Sequence[bytes]):
    """The frames of a clip as JPEG bytes, each read when it is asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = tuple(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        with reading(self.paths[index], "frame"):
            return self.paths[index].read_bytes()


def clip_frames(place: Path) -> Sequence[bytes]:
    """The JPEGs of a clip, from a folder of them or from `video` in an .hdf5 file.

    Raises:
      DataError: there are none, or the file cannot be read.
    """
    if place.is_dir():
        return FrameFiles(frame_paths(place))
    with reading(place, "frames"):
        import h5py

        with h5py.File(place) as file:
            return [bytes(frame) for frame in file["video"]]


def _read_flow(horizontal: Path, sizes: MediaSizes) -> np.ndarray:
    """uint8 [video_frames, image_size, image_size, 2] from u/NAME, and v/NAME next to u."""
    vertical = horizontal.parent.with_name("v") / horizontal.name
    parts = []
    for place in (horizontal, vertical):
        clip = clip_frames(place)
        picked = segment_frames(len(clip), sizes.video_frames)
        parts.append(decode_frames(clip, picked, sizes.image_size)[..., :1])  # gray: all alike
    return np.concatenate(parts, axis=-1)


def read_stored(path: Path) -> np.ndarray:
    """A two-dimensional array in an .npy, .pkl or .pt file as float32 [rows, columns, 1].

    A pickle is read without running what it brings along, a .pt file through PyTorch's own safe
    reader.

    Raises:
      DataError: the file is missing or damaged, or holds something else.
    """
    with reading(path, "array"):
        if path.suffix == ".npy":
            array = np.load(path, allow_pickle=False)
        elif path.suffix == ".pkl":
            array = load_pickle(path)
        else:
            array = load_tensor(path)
    array = np.asarray(array)
    if array.ndim == 3 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 2 or array.dtype.kind not in "fiu" or not np.isfinite(array).all():
        form = f"{array.dtype}{list(array.shape)}"
        raise DataError(f"array {path}: {form}; allowed: finite numbers [rows, columns]")
    return array.astype(np.float32)[:, :, None]


def _stored_shape(name: str, type_: str, rows: Sequence[Row]) -> tuple[int, ...]:
    """Of the first training example that has the modality; () where it is no stored array."""
    if type_ != "stored":
        return ()
    first = next((row.values[name] for row in rows if row.values[name] is not None), None)
    if first is None:
        raise DataError(f"modality {name!r}: no training example has it")
    return read_stored(Path(first)).shape


def byte_tokens(data: bytes, length: int) -> np.ndarray:
    """Bytes as token ids, int32 [length]: 1 + the value of each; cut off or padded with 0."""
    return _shifted(np.frombuffer(data[:length], np.uint8), length)


def _shifted(values: Any, length: int) -> np.ndarray:
    """int32 [length]: 1 + each value, 0 behind the last."""
    ids = np.zeros(length, np.int32)
    ids[: len(values)] = np.asarray(values, np.int32) + 1
    return ids


def text_pieces(ids: np.ndarray, tokenizer: str = "") -> tuple[str, ...]:
    """The text that each id of `text_tokens` adds; a character comes with the last of its tokens.

    Args:
      ids: int32 [text_length].
      tokenizer: as `MediaSizes.tokenizer`; bytes without one.

    Examples:
      >>> text_pieces(byte_tokens("Öl".encode(), 4))
      ('', 'Ö', 'l', '')
    """
    if not tokenizer:
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        return tuple(decoder.decode(bytes([i - 1])) if i else "" for i in ids.tolist())
    decode = functools.partial(open_tokenizer(tokenizer).decode, skip_special_tokens=False)
    real = (ids[ids > 0] - 1).tolist()
    texts = [decode(real[:end]) for end in range(len(real) + 1)]
    pieces = [after[len(before) :] for before, after in itertools.pairwise(texts)]
    return (*pieces, *[""] * (len(ids) - len(pieces)))


def sound_features(waveform: np.ndarray, rate: int, sizes: MediaSizes) -> np.ndarray:
    """float32 [samples] -> [audio_bins, audio_frames, 1], decibels under the loudest."""
    length = round(sizes.audio_seconds * sizes.audio_rate)
    # Cut before resampling: of a long recording only the beginning is used.
    waveform = waveform[: samples_in(sizes.audio_seconds, rate)]
    samples = resample(waveform, rate, sizes.audio_rate)[:length]
    samples = np.pad(samples, (0, length - len(samples)))
    hop = sizes.audio_seconds / sizes.audio_frames
    if sizes.audio_features == "mel":
        window = max(0.025, 1.5 * hop)  # so that no sound falls between two windows
        features = log_mel(
            samples, sizes.audio_rate, sizes.audio_bins, sizes.audio_frames, window=window
        )
    else:
        features = decibel_stft(samples, sizes.audio_bins, sizes.audio_frames)
    return features[:, :, None]


def is_manifest(path: Any) -> bool:
    """Tells the path of a manifest, or of a local folder with one under its usual name."""
    if path.suffix.lower() in MANIFEST_SUFFIXES:
        return True
    return isinstance(path, Path) and any(
        os.path.isfile(path / f"manifest{suffix}") for suffix in MANIFEST_SUFFIXES
    )


def read_manifest(
    path: Path,
    *,
    columns: Mapping[str, str] | None = None,
    modalities: Sequence[str] = (),
    types: Mapping[str, str] | None = None,
) -> Manifest:
    """Reads and checks a manifest; files are looked for, not opened.

    Args:
      path: the manifest, or a folder that holds `manifest.csv`, `.tsv` or `.jsonl`.
      columns: {our name: the column's name}: of a modality, perhaps with its type, or of split,
        label, group, id or `quality_<modality>`.
      modalities: those to use; other columns are not looked at. Empty for all columns.
      types: for new data, {modality: type} of a trained model: only these are looked for, each may
        be absent, labels too.

    Raises:
      DataError: it is missing or malformed, or a path in it leads out of its folder.
    """
    if path.is_dir():
        found = [path / f"manifest{suffix}" for suffix in MANIFEST_SUFFIXES]
        path = next((candidate for candidate in found if candidate.is_file()), found[0])
    # Which character stands between cells is told by the names that the header then has.
    known = {*SPECIAL, *(columns or {}).values()}
    records, decimal_comma = _read_records(path, _read_text(path), known)
    if not records:
        raise DataError(f"{path.name}: no rows; wanted {NEEDED}")
    headers = list(dict.fromkeys(key for _, record in records for key in record))
    given = dict(columns or {})
    if types is not None:  # the training file's names; the new one may have some of them
        given = {ours: header for ours, header in given.items() if header in headers}
    wanted = tuple(modalities or types or ())
    special, found_columns = _sort_columns(path, headers, given, wanted)
    if types is None:
        _check_needed(path, headers, special, found_columns, modalities)
    elif not found_columns:
        raise DataError(
            f"{path.name}: columns {headers!r}; wanted at least one of {', '.join(types)} (names "
            "can be given by data.columns)"
        )
    header_of = {name: header for name, (header, _) in found_columns.items()}
    type_of = {
        name: _type(path, name, header, stated, (types or {}).get(name), records)
        for name, (header, stated) in sorted(found_columns.items())
    }
    qualities = _rated_modalities(path, special, type_of, wanted)
    root, rows = Path(os.path.realpath(path.parent)), []
    needed = types is None
    for number, (where, record) in enumerate(records):
        aside = {name: record.get(header) for name, header in special.items()}
        rated = {name: aside[f"quality_{name}"] for name in qualities}
        values: dict[str, Path | str | None] = {}
        for name, type_ in type_of.items():
            cell = _cell(record, header_of[name], where)
            is_path = cell != "" and type_ != "string"
            values[name] = (
                _resolve_inside(path.parent, root, cell, f"{where}: {name}")
                if is_path
                else cell or None
            )
        rows.append(
            Row(
                number,
                _split(aside["split"], where, needed=needed) if "split" in aside else "",
                _label(aside.get("label"), where, needed=needed),
                values,
                _qualities(rated, where, decimal_comma),
                _tag(aside["group"], "group", where, needed=needed) if "group" in aside else "",
                _tag(aside["id"], "id", where, needed=True) if "id" in aside else "",
            )
        )
    return Manifest(path, type_of, tuple(rows), tuple(name for name in SPECIAL if name in special))


def _read_text(path: Path) -> str:
    """The file's text: UTF-8, or UTF-16 with a mark of its byte order, as Excel writes it."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"data.path: {path}: no such manifest") from None
    except (OSError, ValueError) as error:
        raise DataError(f"data.path: {path}: cannot be read ({said(error)})") from None
    check_lfs_pointer(content, f"data.path: {path}")
    encoding = next((name for mark, name in _BYTE_ORDERS if content.startswith(mark)), "utf-8")
    try:
        text = content.decode(encoding)
    except ValueError as error:
        line = content[: getattr(error, "start", 0)].count(b"\n") + 1
        raise DataError(
            f"data.path: {path}: line {line} is not {encoding.removesuffix('-sig').upper()} text, "
            "perhaps Latin-1 or Windows-1252; save it as UTF-8"
        ) from None
    if "\0" in text:
        raise DataError(
            f"data.path: {path}: zero bytes, as in UTF-16 without a mark or in a file that is no "
            "text; save it as UTF-8 text"
        )
    return text


Records = list[tuple[str, Mapping[str, Any]]]


def _read_records(path: Path, text: str, known: set[str]) -> tuple[Records, bool]:
    """[(place for messages, {column: cell})], and whether numbers may have decimal commas."""
    if path.suffix.lower() == ".jsonl":
        return list(_json_records(path, text)), False
    text, delimiter, skipped = _delimited(path, text, known)
    return list(_csv_records(path, text, delimiter, skipped)), delimiter != ","


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_NEW_LINE.split(text), 1):
        if not line.strip():
            continue
        where = f"{path.name} line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON ({str(error)[:100]!r})") from None
        if not isinstance(record, dict):
            raise DataError(f"{where} is no object; allowed: one with {NEEDED}")
        yield where, record


def _csv_records(
    path: Path, text: str, delimiter: str, skipped: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Rows under a header; empty ones, and empty columns without a name, are left out."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=delimiter)
    try:
        header = [name.strip() for name in next(reader, [])]
        named = [name for name in header if name]
        if len(set(named)) != len(named):
            raise DataError(f"{path.name}: two columns have the same name in {header!r}")
        for cells in reader:
            where = f"{path.name} line {reader.line_num + skipped}"
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            row = list(zip(header, cells, strict=True))
            if any(cell.strip() for name, cell in row if not name):
                raise DataError(f"{where}: a cell in a column without a name")
            yield where, {name: cell for name, cell in row if name}
    except csv.Error as error:
        line = reader.line_num + skipped
        raise DataError(f"{path.name} line {line}: not CSV ({error})") from None


def _delimited(path: Path, text: str, known: set[str]) -> tuple[str, str, int]:
    """The text from its header on, what stands between cells, and how many lines were left out.

    Excel writes `sep=;` above the header. Else the header tells: of several candidates in it, the
    one that gives more of the names that are known.
    """
    lines = _NEW_LINE.split(text, 1)
    if found := re.fullmatch(r'"?sep=(.)"?', lines[0], re.IGNORECASE):
        if found[1] not in DELIMITERS:
            raise DataError(f"{path.name} line 1: sep={found[1]!r}; one of {DELIMITERS!r}")
        return lines[1] if len(lines) > 1 else "", found[1], 1
    header = lines[0]
    present = [mark for mark in DELIMITERS if mark in re.sub('"[^"]*"', "", header)]
    if len(present) < 2:
        return text, present[0] if present else ",", 0
    counts = {mark: len(known.intersection(_cells(header, mark))) for mark in present}
    best = [mark for mark in present if counts[mark] == max(counts.values())]
    if len(best) > 1:
        shown = " or ".join(map(repr, best))
        raise DataError(
            f"{path.name} line 1: {header[:80]!r}: cells may stand between {shown}; write a line "
            "such as sep=; above it"
        )
    return text, best[0], 0


def _cells(line: str, delimiter: str) -> list[str]:
    """The cells of one line; none if it cannot be read so."""
    try:
        return [cell.strip() for cell in next(csv.reader([line], delimiter=delimiter), [])]
    except csv.Error:
        return []


def _sort_columns(
    path: Path, headers: Sequence[str], given: Mapping[str, str], wanted: Sequence[str]
) -> tuple[dict[str, str], dict[str, tuple[str, str | None]]]:
    """{split, label, group, id, quality_...: column}, {modality: (column, stated type)}."""
    for ours, header in given.items():
        if header not in headers:
            raise DataError(
                f"data.columns: {ours}={header}: no such column in {path.name}; there are "
                f"{', '.join(map(repr, headers))}"
            )
    # A column that means something else by data.columns does not keep the meaning of its own name.
    pairs = list(given.items())
    names = {ours.partition(":")[0] for ours in given}
    pairs += [
        (header, header)
        for header in headers
        if header not in given.values() and header.partition(":")[0] not in names
    ]
    special: dict[str, str] = {}
    columns: dict[str, tuple[str, str | None]] = {}
    for ours, header in pairs:
        name, _, type_ = ours.partition(":")
        if ours in SPECIAL or ours.startswith("quality_"):
            special[ours] = header
            continue
        if wanted and name not in wanted:
            continue
        if ours == name and ours != header:  # the type may stand in the file's own name for it
            type_ = header.partition(":")[2] if header.partition(":")[2] in TYPES else ""
        if name in columns:
            raise DataError(f"{path.name}: two columns for modality {name!r}")
        if type_ and type_ not in TYPES:
            raise DataError(f"{path.name}: type {type_!r} of {name!r}; one of {', '.join(TYPES)}")
        columns[name] = (header, type_ or None)
    return special, columns


def _check_needed(
    path: Path,
    headers: Sequence[str],
    special: Mapping[str, str],
    columns: Mapping[str, Any],
    modalities: Sequence[str],
) -> None:
    """Everything that training needs is there."""
    for name in modalities:
        if name not in columns:
            raise DataError(
                f"modality {name!r}: not in {path.name}; there are "
                f"{', '.join(h for h in headers if h not in special.values())}"
            )
    if "label" not in special or not columns:
        raise DataError(
            f"{path.name}: columns {list(headers)!r}; wanted {NEEDED} (data.columns can say which "
            "is which: 'label=emotion, sound=wav_path')"
        )


def _rated_modalities(
    path: Path, special: Mapping[str, str], types: Mapping[str, str], wanted: Sequence[str]
) -> list[str]:
    """The modalities that have a column of their quality."""
    found = [name.removeprefix("quality_") for name in special if name.startswith("quality_")]
    for name in found:
        if name not in types and not wanted:
            header = special[f"quality_{name}"]
            raise DataError(f"{path.name}: column {header!r}: there is no such modality")
    return [name for name in found if name in types]


def _type(
    path: Path, name: str, header: str, stated: str | None, saved: str | None, records: list
) -> str:
    """The type of a column's cells: as stated, as the model has it, or by their suffixes."""
    tokens = ("text", "string")
    if saved is None:
        type_ = stated or _infer_type(path, name, header, records)
        check_name(name, path.name)
        return type_
    if stated and stated != saved and not (stated in tokens and saved in tokens):
        raise DataError(f"{path.name}: type {stated!r} of {name!r}; the model reads {saved!r}")
    return stated or saved


def _infer_type(path: Path, name: str, header: str, records: list) -> str:
    """The type that all suffixes of a column belong to."""
    for where, record in records:
        if cell := _cell(record, header, where):
            type_ = _TYPE_OF_SUFFIX.get(PurePosixPath(cell).suffix.lower())
            if type_ is not None:
                return type_
            raise DataError(
                f"{where}: {name}: {cell[:80]!r} has no known suffix "
                f"({' '.join(_TYPE_OF_SUFFIX)}); for text in the "
                f"cell itself, name the column '{name[:80]}:string'; {DECLARE}"
            )
    raise DataError(f"{path.name}: column {header!r} is empty in every row")


def _cell(record: Mapping[str, Any], header: str, where: str) -> str:
    value = record.get(header)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {header}: {str(value)[:60]!r}; allowed: a string, the path of a file or a "
            f"text; {DECLARE}"
        )
    return value.strip()


def _split(value: Any, where: str, *, needed: bool) -> str:
    if not needed and value in (None, ""):
        return ""
    name = str("" if value is None else value).strip().lower()
    if name not in SPLIT_NAMES:
        raise DataError(f"{where}: split {name[:60]!r}; one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name]


def _label(value: Any, where: str, *, needed: bool) -> str:
    if not needed and value in (None, ""):
        return ""
    if isinstance(value, list):
        if not all(isinstance(name, str) and len(split_names(name)) == 1 for name in value):
            raise DataError(
                f"{where}: label {str(value)[:60]!r}; allowed in a list: names without "
                f"{' '.join(SEPARATORS)}"
            )
        return "|".join(["", *value, ""]) if value else "|"
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: label {str(value)[:60]!r}; a class number or a name")
    return str(value).strip()


def _tag(value: Any, name: str, where: str, *, needed: bool) -> str:
    """The group or id of an example."""
    if isinstance(value, bool | float | list | dict):
        raise DataError(f"{where}: {name} {str(value)[:60]!r}; an integer or a string")
    text = "" if value is None else str(value).strip()
    if needed and not text:
        raise DataError(f"{where}: {name} is empty; give every example its own")
    return text


def _qualities(rated: Mapping[str, Any], where: str, decimal_comma: bool) -> dict[str, float]:
    qualities = {}
    for name, value in rated.items():
        if value in (None, ""):
            continue
        if decimal_comma and isinstance(value, str) and _DECIMAL_COMMA.fullmatch(value.strip()):
            value = value.replace(",", ".")
        try:
            qualities[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            qualities[name] = math.nan
        if not math.isfinite(qualities[name]) or isinstance(value, bool):
            raise DataError(f"{where}: quality_{name} {str(value)[:60]!r}; allowed: a number")
    return qualities


def _infer_task(labels: Sequence[str], name: str) -> str:
    """What labels are, where `data.task` does not say it.

    Numbers with a fraction in one of them are values; lists, and labels of which some are made of
    others, are sets; all else is the name or the number of a class.

    Args:
      labels: as they stand in the manifest.
      name: of the manifest, for the message.

    Raises:
      DataError: all are whole numbers with a decimal point, which may be classes or values.
    """
    different = set(labels)
    if all(map(_DECIMAL.fullmatch, different)):
        written = [label for label in different if not re.fullmatch(r"[-+]?[0-9]+", label)]
        if any(float(label.replace(",", ".")) % 1 for label in written):
            return REGRESSION
        if written:
            raise DataError(
                f"{name}: label {min(written)[:60]!r}, and all are whole numbers; allowed: "
                "integers for classes, or data.task regression"
            )
    for label in different:
        parts = set(split_names(label))
        if label.startswith("|") or (len(parts) > 1 and parts <= different):
            return MULTI_LABEL
    return SINGLE_LABEL


def _resolve_inside(folder: Path, root: Path, text: str, where: str) -> Path:
    """`folder / text`, if that is inside `root` (the folder's real path) after all links.

    Raises:
      DataError: the path is absolute, contains `..`, or a link on it leads out of the folder.
    """
    parts = {*PurePosixPath(text).parts, *PureWindowsPath(text).parts}
    absolute = PurePosixPath(text).is_absolute() or bool(PureWindowsPath(text).anchor)
    if absolute or ".." in parts or "\0" in text:
        raise DataError(
            f"{where}: path {text!r} refused; paths are relative to the manifest and may not "
            "contain '..'"
        )
    try:
        real = Path(os.path.realpath(folder / text))
    except (OSError, ValueError):
        raise DataError(f"{where}: path {text!r} refused; not a valid path") from None
    if not real.is_relative_to(root):
        raise DataError(
            f"{where}: path {text!r} refused; a link leads out of the manifest's folder"
        )
    return folder / text


def is_there(path: Path, type_: str) -> bool:
    """Tells if a cell's file, or folder of frames, is there."""
    if type_ == "flow":
        return path.is_dir() and (path.parent.with_name("v") / path.name).is_dir()
    return os.path.isfile(path) or (type_ == "frames" and path.is_dir())
