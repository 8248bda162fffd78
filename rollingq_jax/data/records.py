"""Record sets: clips prepared once from media files, then read at random.

A record set is a folder that TFDS reads (``tfds.builder_from_directory``): ArrayRecord shards with
TFDS's metadata, one split "clips", and ``index.json`` with a row for each record, so that splits
can be chosen without reading the records. :mod:`rollingq_jax.data.record_writer` makes them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data.tfds_files import open_prepared
from rollingq_jax.data.types import Example
from rollingq_jax.errors import DataError

FORMAT_VERSION = 1
SPLIT = "clips"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a record set is made.

    Attributes:
      name: of the set, used in file names.
      items: name of each clip, in the order of the records.
      features: {field: TFDS feature} of a record.
      make: item -> (record, row): the fields of the record, and the JSON-able row of the index. A
        DataError or OSError means that the clip is unreadable. Called from several threads.
      settings: what else the records depend on; JSON-able.
      description: of the set.
      attachments: {file name: content} to keep with the records.
    """

    name: str
    items: tuple[str, ...]
    features: Mapping[str, Any]
    make: Callable[[str], tuple[dict[str, Any], dict[str, Any]]]
    settings: Mapping[str, Any]
    description: str
    attachments: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def all_settings(self) -> dict[str, Any]:
        """The settings with digests of items and attachments, as JSON gives them back."""
        digests = {"items": _digest("\n".join(self.items))}
        digests |= {name: _digest(text) for name, text in self.attachments.items()}
        return json.loads(json.dumps({**self.settings, **digests}))


@dataclasses.dataclass(frozen=True)
class RecordSet:
    """A whole record set.

    Attributes:
      folder: where it lies.
      rows: one dict for each record, in their order.
      unreadable: {item: why it has no record}.
      settings: what they were made with.
    """

    folder: Path
    rows: list[dict[str, Any]]
    unreadable: dict[str, str]
    settings: dict[str, Any]

    def summary(self) -> str:
        """One line."""
        return f"{len(self.rows)} clips in {self.folder}, {len(self.unreadable)} unreadable"

    def source(self) -> "RecordSource":
        """Random access to the records."""
        return RecordSource(self.folder)


class RecordSource:
    """The records of a set as TFDS decodes them: dicts of NumPy arrays and lists of bytes.

    Raises:
      DataError: from ``[]``, if a record is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._data = open_prepared(folder).as_data_source(split=SPLIT)

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            return self._data[index]
        except Exception as error:  # the reader raises whatever the damage leads to
            reason = " ".join(str(error).split())[:200]
            raise DataError(f"record {index} of {self._folder}: damaged ({reason})") from None


class ClipSource:
    """Records of sound and frames as examples.

    "visual" is the list of JPEG frames; the data set's transformations decode some of them.
    """

    def __init__(
        self, records: RecordSource, labels: np.ndarray, qualities: dict[str, np.ndarray]
    ) -> None:
        self._records, self._qualities = records, qualities
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        record = self._records[index]
        example = {
            "audio": record["audio"],
            "visual": list(record["frames"]),
            "label": self.labels[index],
        }
        for name, quality in self._qualities.items():
            example[f"quality_{name}"] = quality[index]
        return example


def open_records(folder: str | os.PathLike, hint: str) -> RecordSet:
    """The record set in a folder.

    Args:
      folder: the set's own.
      hint: what to do if it is not there, for the error message.

    Raises:
      DataError: there is none, it was made by another version, or a shard is missing or cut short.
    """
    folder = Path(folder)
    index = read_json(folder / "index.json")
    if index is None:
        state = (
            "its preparation was not finished" if partial_folder(folder).exists() else "no records"
        )
        raise DataError(f"{folder}: {state}; {hint}")
    if index.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}: records of format {index.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; remove the folder and prepare it again"
        )
    for name, size in index["files"].items():
        path = folder / name
        found = path.stat().st_size if path.exists() else -1
        if found != size:
            what = "is missing" if found < 0 else f"has {found} bytes instead of {size}"
            raise DataError(f"{path}: {what}; remove {folder} and prepare it again")
    return RecordSet(folder, index["rows"], index["unreadable"], index["settings"])


def partial_folder(folder: Path) -> Path:
    """Where a record set is built before it gets its name."""
    return folder.with_name(folder.name + ".partial")


def read_json(path: Path) -> Any:
    """The file's content, or None where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
