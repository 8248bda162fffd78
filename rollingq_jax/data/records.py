"""Record sets: clips prepared once from media files, then read at random.

A record set is a folder that TFDS reads (`tfds.builder_from_directory`): ArrayRecord shards with
TFDS's metadata, one split "clips", and `index.json` with a row for each record, so that splits can
be chosen without reading the records.

A set is written beside its final place, shard by shard; a shard counts once its report lies next to
it. The folder gets its name when everything is there, so a folder of that name is always whole, and
an interruption costs a few clips.

TFDS's own writers do not hold to that. A `GeneratorBasedBuilder` needs TensorFlow to shuffle more
than 1 GB, and starts from nothing after an interruption. `tfds.core.SequentialWriter` writes a
shard under its final name and rewrites the metadata in place, neither synced to the disk, so that a
killed process leaves half of either; and it compresses the records, which costs more time in
reading than all else.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data.dataset import Example, ModalityInfo
from rollingq_jax.data.video import IMAGENET_MEAN, IMAGENET_STD
from rollingq_jax.errors import DataError, said
from rollingq_jax.files import check_lfs_pointer, commit, read_json, write_whole

FORMAT_VERSION = 1
SPLIT = "clips"
SHARD_SIZE = 64
_CLASS_KEYS = ("type", "pythonClassName", "python_class_name")
_MOST_BYTES = 16 << 20


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The recipe of a record set.

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
      DataError: from `[]`, if a record is damaged.
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


def clip_features(spectrogram_shape: tuple[int, ...]) -> dict[str, Any]:
    """TFDS's features of a record of sound and frames, as `ClipSource` reads it."""
    import tensorflow_datasets as tfds

    return {
        "clip": tfds.features.Text(),
        "audio": tfds.features.Tensor(shape=spectrogram_shape, dtype=np.float32, encoding="bytes"),
        "frames": tfds.features.Sequence(tfds.features.Text()),
        "label": tfds.features.Scalar(np.int64),
    }


def clip_modalities(
    spectrogram_shape: tuple[int, ...], num_frames: int, frame_size: int
) -> dict[str, ModalityInfo]:
    """The modalities of a clip once its frames are decoded; pixels are normalized as upstream's."""
    frames = (num_frames, frame_size, frame_size, 3)
    return {
        "audio": ModalityInfo("audio", "spectrogram", spectrogram_shape),
        "visual": ModalityInfo(
            "visual", "video", frames, "uint8", mean=IMAGENET_MEAN, std=IMAGENET_STD
        ),
    }


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
        unfinished = _partial_folder(folder).exists()
        state = "its preparation was not finished" if unfinished else "no records"
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


def _partial_folder(folder: Path) -> Path:
    """The folder in which a record set is built before it gets its name."""
    return folder.with_name(folder.name + ".partial")


def open_prepared(place: Path) -> Any:
    """TFDS's builder of a folder, once it is known to run no code of others.

    `features.json` names a Python class for each feature, and TFDS imports the modules that it
    names: a folder from a stranger would run code. So every class named in it has to be one of
    TFDS's own that are imported already, and TFDS gets the folder, never a name to resolve.

    Raises:
      DataError: `features.json` cannot be read, or names another class or file; or TFDS cannot read
        the folder.
    """
    import tensorflow_datasets as tfds

    file = place / "features.json"
    allowed = _own_classes()
    for name in _class_names(read_object(file), file):
        if name not in allowed:
            raise DataError(
                f"{file}: the feature class {name[:100]!r} is refused: only those in tfds.features "
                "are read, because reading another one would run its code"
            )
    for shard in sorted(place.glob("*.array_record*"))[:1]:
        check_lfs_pointer(shard)
    try:
        return tfds.builder_from_directory(place)
    except Exception as error:  # metadata that say something else than what is there
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"{place}: TFDS cannot open it ({reason})") from None


def _own_classes() -> frozenset[str]:
    """The names under which TFDS finds its own feature classes without importing anything."""
    import tensorflow_datasets as tfds

    pending, names = [tfds.features.FeatureConnector], set()
    while pending:
        feature = pending.pop()
        pending += feature.__subclasses__()
        if feature.__module__.startswith("tensorflow_datasets.core.features."):
            names.add(f"{feature.__module__}.{feature.__name__}")
            names.update(feature.__dict__.get("ALIASES", ()))
    return frozenset(names)


def _class_names(content: Any, file: Path) -> Iterator[str]:
    """All names of classes in a feature's description, old and new forms, at any depth.

    A description may hold another one as a string of JSON, so strings are looked into, too.
    """
    pending = [content]
    while pending:
        node = pending.pop()
        if isinstance(node, dict):
            if "names_file" in node:
                raise DataError(f"{file}: 'names_file' is refused: it leads to another file")
            for key, value in node.items():
                if key in _CLASS_KEYS and isinstance(value, str):
                    yield value
                else:
                    pending.append(value)
        elif isinstance(node, list):
            pending += node
        elif isinstance(node, str) and node.lstrip()[:1] in ("{", "["):
            try:
                pending.append(json.loads(node))
            except ValueError:  # ordinary text; TFDS could not read it as JSON either
                continue
            except RecursionError:
                raise DataError(f"{file}: nested too deeply") from None


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object in a file of a reasonable size.

    Raises:
      DataError: it is another file, or cannot be read.
    """
    try:
        if not file.is_file() or file.stat().st_size > _MOST_BYTES:
            raise DataError(
                f"{file} is no such file; allowed: one of at most {_MOST_BYTES >> 20} MiB"
            )
        check_lfs_pointer(file)
        content = json.loads(file.read_text(encoding="utf-8"))  # as TFDS does
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({said(error)})") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: not JSON ({str(error)[:100]!r})") from None
    if not isinstance(content, dict):
        raise DataError(f"{file}: must hold a JSON object")
    return content


def write_records(
    folder: str | os.PathLike,
    recipe: Recipe,
    *,
    strict: bool = False,
    workers: int = 1,
    shard_size: int = SHARD_SIZE,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> RecordSet:
    """Makes a record set; resumes where an earlier call was interrupted.

    Args:
      folder: the set's own folder; made here. Another one next to it, `<folder>.partial`, holds
        what is there until everything is.
      recipe: what to make. Clips that turn out unreadable are left out and listed.
      strict: raise at the first unreadable clip instead.
      workers: clips made at once.
      shard_size: records in a shard, and the most that an interruption costs.
      log: called with each line for the user.

    Returns:
      The set; if it was there already, with the same settings, nothing is done.

    Raises:
      DataError: a set with other settings is there, no clip is readable, `strict` and one is not,
        or the files cannot be written.
    """
    folder = Path(folder)
    settings = recipe.all_settings()
    if folder.exists():
        return _existing(folder, settings, strict, log)
    if not recipe.items:
        raise DataError(f"{recipe.name}: there are no clips to prepare")
    partial = _partial_folder(folder)
    total = -(-len(recipe.items) // shard_size)
    stem = f"{recipe.name}-{SPLIT}.array_record"  # as TFDS expects it
    names = [f"{stem}-{number:05d}-of-{total:05d}" for number in range(total)]
    try:
        _begin(partial, settings, log)
        reports = _write_shards(partial, recipe, names, strict, workers, shard_size)
        _finish(partial, recipe, names, reports, settings)
        partial.rename(folder)
        for leftover in [folder / "settings.json", *folder.glob("*.array_record-*.json")]:
            leftover.unlink()
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return open_records(folder, "prepare it again")


def _existing(
    folder: Path, settings: dict[str, Any], strict: bool, log: Callable[[str], None]
) -> RecordSet:
    """The set that is there already, if it is the one asked for."""
    records = open_records(folder, "it is not a record set; give another folder")
    if records.settings != settings:
        changed = ", ".join(
            "another list of clips" if key == "items" else f"another {key}"
            for key in sorted(records.settings.keys() | settings.keys())
            if records.settings.get(key) != settings.get(key)
        )
        raise DataError(
            f"{folder}: holds records made with {changed}; remove it to prepare it again, or give "
            "another folder"
        )
    if strict and records.unreadable:
        reason = next(iter(records.unreadable.values()))
        raise DataError(f"{folder}: prepared without unreadable clips; the first: {reason}")
    log(f"{folder}: already prepared; remove it to prepare it again")
    return records


def _begin(partial: Path, settings: dict[str, Any], log: Callable[[str], None]) -> None:
    """An unfinished folder for these settings: the one that is there, or an empty one."""
    partial.mkdir(parents=True, exist_ok=True)
    for leftover in partial.glob("*.tmp"):
        leftover.unlink()
    begun = read_json(partial / "settings.json")
    if begun is None and any(partial.iterdir()):
        raise DataError(f"{partial}: not an unfinished record set; move it away")
    if begun not in (None, settings):
        log(f"{partial}: begun with other settings or other clips; starting anew")
        shutil.rmtree(partial)
        partial.mkdir()
    write_whole(partial / "settings.json", json.dumps(settings))


def _write_shards(
    partial: Path,
    recipe: Recipe,
    names: list[str],
    strict: bool,
    workers: int,
    shard_size: int,
) -> list[dict[str, Any]]:
    """Writes every shard that is not there yet; returns the reports of all, in order."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    features = tfds.features.FeaturesDict(dict(recipe.features))
    reports = []
    with (
        tqdm(total=len(recipe.items), desc=recipe.name, unit="clip", mininterval=1.0) as progress,
        concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool,
    ):
        # One shard at a time, so that an interruption costs the clips of one and memory holds one.
        for number, name in enumerate(names):
            items = recipe.items[number * shard_size : (number + 1) * shard_size]
            shard = partial / name
            report = read_json(shard.with_name(f"{name}.json"))
            whole = report and shard.exists() and shard.stat().st_size == report["bytes"]
            if not whole or (strict and report["unreadable"]):
                results = _make_all(pool, recipe, items, strict, progress)
                report = _write_shard(shard, results, features.serialize_example)
            else:
                progress.update(len(items))
            reports.append(report)
    return reports


def _make_all(
    pool: concurrent.futures.Executor,
    recipe: Recipe,
    items: tuple[str, ...],
    strict: bool,
    progress: Any,
) -> list[tuple[str, Any]]:
    """(item, (record, row) or the reason why there is none) for the items of one shard."""

    def make(item: str) -> Any:
        try:
            return recipe.make(item)
        except DataError as error:
            return str(error)
        except OSError as error:
            return f"{error.filename or item}: cannot be read ({error.strerror or error})"

    # In the order of the items, whichever is ready first: the records must not depend on threads.
    futures = [pool.submit(make, item) for item in items]
    results = []
    try:
        for item, future in zip(items, futures, strict=True):
            result = future.result()
            if isinstance(result, str):
                if strict:
                    raise DataError(result)
                progress.write(f"unreadable: {result}", file=sys.stderr)
            results.append((item, result))
            progress.update()
    finally:  # after an error no further clip is decoded, for which leaving the pool would wait
        for future in futures:
            future.cancel()
    return results


def _write_shard(
    path: Path, results: list[tuple[str, Any]], serialize: Callable[[Any], bytes]
) -> dict[str, Any]:
    """One shard and its report, each under its name only when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    made = [result for _, result in results if not isinstance(result, str)]
    records = [serialize(record) for record, _ in made]
    try:
        # Read one at a time, and not compressed: JPEGs and spectrograms shrink by 4 %, and
        # unpacking them takes longer than all else that reading does.
        writer = ArrayRecordWriter(os.fspath(temporary), "group_size:1,uncompressed")
        for record in records:
            writer.write(record)
        writer.close()
    except Exception as error:  # the writer raises RuntimeError and others, with no errno
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path}: cannot be written ({reason})") from None
    size = temporary.stat().st_size
    commit(temporary, path)
    report = {
        "bytes": size,
        "payload": sum(map(len, records)),
        "rows": [row for _, row in made],
        "unreadable": {item: why for item, why in results if isinstance(why, str)},
    }
    write_whole(path.with_name(f"{path.name}.json"), json.dumps(report))
    return report


def _finish(
    partial: Path,
    recipe: Recipe,
    names: list[str],
    reports: list[dict[str, Any]],
    settings: dict[str, Any],
) -> None:
    """TFDS's metadata and the index; the reports have served."""
    import tensorflow_datasets as tfds

    rows = [row for report in reports for row in report["rows"]]
    unreadable = {item: why for report in reports for item, why in report["unreadable"].items()}
    if not rows:
        raise DataError(
            f"{recipe.name}: none of {len(recipe.items)} clips is readable; the first: "
            f"{next(iter(unreadable.values()))}"
        )
    template = tfds.core.ShardedFileTemplate(
        data_dir=partial, dataset_name=recipe.name, split=SPLIT, filetype_suffix="array_record"
    )
    split = tfds.core.SplitInfo(
        name=SPLIT,
        shard_lengths=[len(report["rows"]) for report in reports],
        num_bytes=sum(report["payload"] for report in reports),
        filename_template=template,
    )
    tfds.folder_dataset.write_metadata(
        data_dir=partial,
        features=tfds.features.FeaturesDict(dict(recipe.features)),
        split_infos=[split],
        description=recipe.description,
        check_data=False,
    )
    index = {
        "format_version": FORMAT_VERSION,
        "settings": settings,
        "files": {name: report["bytes"] for name, report in zip(names, reports, strict=True)},
        "rows": rows,
        "unreadable": unreadable,
    }
    # The index comes last: a folder that has one is whole.
    for name, text in recipe.attachments.items():
        (partial / name).write_text(text, encoding="utf-8")
    write_whole(partial / "index.json", json.dumps(index))


def _digest(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
