"""Making record sets, so that an interruption costs a few clips and never leaves half a set.

A set is written beside its final place, shard by shard; a shard counts once its report lies next to
it. The folder gets its name when everything is there, so a folder of that name is always whole.

The shards are not written by a ``GeneratorBasedBuilder``, because TFDS needs TensorFlow to shuffle
more than 1 GB, and because its preparation starts from nothing after an interruption.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollingq_jax.data.records import (
    FORMAT_VERSION,
    SPLIT,
    Recipe,
    RecordSet,
    open_records,
    partial_folder,
    read_json,
)
from rollingq_jax.data.shards import write_json, write_shards
from rollingq_jax.errors import DataError

SHARD_SIZE = 64


def write_records(
    folder: str | os.PathLike,
    recipe: Recipe,
    *,
    strict: bool = False,
    workers: int = 1,
    shard_size: int = SHARD_SIZE,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> RecordSet:
    """Makes a record set, going on from where an earlier call was interrupted.

    Args:
      folder: the set's own folder; made here. Another folder beside it, ``<folder>.partial``, holds
        what is there until everything is.
      recipe: what to make. Clips that turn out unreadable are left out and listed.
      strict: raise at the first unreadable clip instead.
      workers: clips made at a time.
      shard_size: records in a shard, and the most that an interruption costs.
      log: called with each line for the user.

    Returns:
      The set; if it was there already, with the same settings, nothing is done.

    Raises:
      DataError: a set with other settings is there, no clip is readable, ``strict`` and one is not,
        or the files cannot be written.
    """
    folder = Path(folder)
    settings = recipe.all_settings()
    if folder.exists():
        return _existing(folder, settings, strict, log)
    if not recipe.items:
        raise DataError(f"{recipe.name}: there are no clips to prepare")
    partial = partial_folder(folder)
    names = shard_names(recipe.name, len(recipe.items), shard_size)
    try:
        _begin(partial, settings, log)
        reports = write_shards(partial, recipe, names, strict, workers, shard_size)
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


def shard_names(name: str, count: int, shard_size: int) -> list[str]:
    """File names of the shards, as TFDS expects them."""
    total = -(-count // shard_size)
    return [f"{name}-{SPLIT}.array_record-{i:05d}-of-{total:05d}" for i in range(total)]


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
    write_json(partial / "settings.json", settings)


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
    for name, text in recipe.attachments.items():
        (partial / name).write_text(text, encoding="utf-8")
    write_json(partial / "index.json", index)
