"""Manifests: a CSV or JSONL file that says which files make up each example.

One row an example, with the columns

- ``split``: train, test, or valid (val and validation mean the same);
- ``label``: a class number from 0 in every row, or a name in every row;
- one column for each modality: a path relative to the manifest's folder. The name may be followed
  by a colon and the type, ``sound:audio``; else the suffix tells the type. Types: audio (.wav,
  .flac; of a video file, its sound), image, video, text (.txt, bytes), and string (the cell itself
  is the text). An empty cell (null in JSONL) means that the example lacks the modality;
- optional ``quality_<modality>``: a number, minus the noise in standard deviations.

A manifest is data that someone else may have written: no path in it may lead out of its folder, by
``..``, from the root, or through a link.
"""

import csv
import dataclasses
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from rollingq_jax.data.labels import check_name
from rollingq_jax.data.manifest_paths import is_file, resolve_inside
from rollingq_jax.errors import DataError

SUFFIXES = {
    "audio": (".wav", ".flac"),
    "image": (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp"),
    "video": (".mp4", ".flv", ".avi", ".mkv", ".mov", ".webm", ".m4v"),
    "text": (".txt",),
}
TYPES = (*SUFFIXES, "string")
SPLIT_NAMES = {"train": "train", "test": "test"} | dict.fromkeys(
    ("valid", "val", "validation"), "valid"
)
NEEDED = "split, label and one column for each modality"


class Row(NamedTuple):
    """One example: what the manifest says of it, with paths resolved."""

    split: str
    label: str
    values: dict[str, Path | str | None]
    qualities: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a manifest says.

    Attributes:
      path: of the manifest.
      types: {modality: one of TYPES}, in alphabetical order.
      rows: in the order of the file.
      missing: paths that are named and not there, as the manifest writes them.
    """

    path: Path
    types: dict[str, str]
    rows: tuple[Row, ...]
    missing: tuple[str, ...]


def read_manifest(path: Path) -> Manifest:
    """Reads and checks a manifest; files are looked for, not opened.

    Args:
      path: the manifest, or a folder that holds ``manifest.csv`` or ``manifest.jsonl``.

    Raises:
      DataError: it is missing or malformed, or a path in it leads out of its folder.
    """
    if path.is_dir():
        found = [path / name for name in ("manifest.csv", "manifest.jsonl")]
        path = next((candidate for candidate in found if candidate.is_file()), found[0])
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"data.path: {path}: no such manifest") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise DataError(f"data.path: {path}: cannot be read ({reason})") from None
    records = list(_records(path, text))
    if not records:
        raise DataError(f"{path.name}: no rows; wanted {NEEDED}")
    headers = list(dict.fromkeys(key for _, record in records for key in record))
    columns = _columns(path, headers)
    types = {
        name: stated or _infer_type(path, name, header, records)
        for name, (header, stated) in sorted(columns.items())
    }
    headers_of = {name: header for name, (header, _) in columns.items()}
    root, missing = Path(os.path.realpath(path.parent)), []
    rows = []
    for where, record in records:
        values: dict[str, Path | str | None] = {}
        for name, type_ in types.items():
            cell = _cell(record, headers_of[name], where)
            if cell == "" or type_ == "string":
                values[name] = cell or None
                continue
            values[name] = file = resolve_inside(path.parent, root, cell, f"{where}: {name}")
            if not is_file(file):
                missing.append(cell)
        rows.append(Row(_split(record, where), _label(record, where), values,
                        _qualities(record, types, where)))  # fmt: skip
    return Manifest(path, types, tuple(rows), tuple(missing))


def _records(path: Path, text: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place for messages, {column: cell}) of every row."""
    if path.suffix.lower() == ".jsonl":
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            where = f"{path.name} line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: not JSON ({str(error)[:100]!r})") from None
            if not isinstance(record, dict):
                raise DataError(f"{where}: must be an object with {NEEDED}")
            yield where, record
        return
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = [name.strip() for name in next(reader, [])]
        if len(set(header)) != len(header):
            raise DataError(f"{path.name}: two columns have the same name in {header!r}")
        for cells in reader:
            where = f"{path.name} line {reader.line_num}"
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(f"{where}: {len(cells)} cells, but the header has {len(header)}")
            yield where, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"{path.name} line {reader.line_num}: not CSV ({error})") from None


def _columns(path: Path, headers: list[str]) -> dict[str, tuple[str, str | None]]:
    """{modality: (column, stated type)}."""
    columns: dict[str, tuple[str, str | None]] = {}
    for header in headers:
        name, _, type_ = header.partition(":")
        if header in ("split", "label") or header.startswith("quality_"):
            continue
        check_name(name, path.name)
        if name in columns:
            raise DataError(f"{path.name}: two columns for modality {name!r}")
        if type_ and type_ not in TYPES:
            raise DataError(f"{path.name}: type {type_!r} of {name!r}; one of {', '.join(TYPES)}")
        columns[name] = (header, type_ or None)
    absent = [name for name in ("split", "label") if name not in headers]
    if absent or not columns:
        raise DataError(f"{path.name}: columns {headers!r}; wanted {NEEDED}")
    for header in headers:
        if header.startswith("quality_") and header.removeprefix("quality_") not in columns:
            raise DataError(f"{path.name}: column {header!r}: there is no such modality")
    return columns


def _infer_type(path: Path, name: str, header: str, records: list) -> str:
    """The type that all suffixes of a column belong to."""
    for where, record in records:
        if cell := _cell(record, header, where):
            suffix = PurePosixPath(cell).suffix.lower()
            for type_, suffixes in SUFFIXES.items():
                if suffix in suffixes:
                    return type_
            raise DataError(
                f"{where}: {name}: {cell[:80]!r} has no known suffix "
                f"({' '.join(s for group in SUFFIXES.values() for s in group)}); "
                f"for text in the cell itself, name the column '{name}:string'"
            )
    raise DataError(f"{path.name}: column {header!r} is empty in every row")


def _cell(record: Mapping[str, Any], header: str, where: str) -> str:
    value = record.get(header)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise DataError(f"{where}: {header}: {str(value)[:60]!r}; must be a string")
    return value.strip()


def _split(record: Mapping[str, Any], where: str) -> str:
    name = str(record.get("split", "")).strip().lower()
    if name not in SPLIT_NAMES:
        raise DataError(f"{where}: split {name[:60]!r}; one of {', '.join(SPLIT_NAMES)}")
    return SPLIT_NAMES[name]


def _label(record: Mapping[str, Any], where: str) -> str:
    value = record.get("label")
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise DataError(f"{where}: label {str(value)[:60]!r}; a class number or a name")
    return str(value).strip()


def _qualities(record: Mapping[str, Any], types: Mapping[str, str], where: str) -> dict[str, float]:
    qualities = {}
    for name in types:
        value = record.get(f"quality_{name}")
        if value is None or value == "":
            continue
        try:
            qualities[name] = float(value)
        except (TypeError, ValueError, OverflowError):
            qualities[name] = math.nan
        if not math.isfinite(qualities[name]) or isinstance(value, bool):
            raise DataError(f"{where}: quality_{name} {str(value)[:60]!r}; must be a number")
    return qualities


def is_class_number(label: str) -> bool:
    """Whether a label is written as a number."""
    return re.fullmatch(r"-?[0-9]{1,9}", label) is not None
