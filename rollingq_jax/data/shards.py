"""The shards of a record set: each counts once its report lies next to it."""

import concurrent.futures
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rollingq_jax.data.records import (
    Recipe,
    read_json,
)
from rollingq_jax.errors import DataError


def write_shards(
    partial: Path,
    recipe: Recipe,
    names: list[str],
    strict: bool,
    workers: int,
    shard_size: int,
) -> list[dict[str, Any]]:
    """Every shard that is not there yet; the reports of all, in order."""
    import tensorflow_datasets as tfds
    from tqdm import tqdm

    features = tfds.features.FeaturesDict(dict(recipe.features))
    reports = []
    with (
        tqdm(total=len(recipe.items), desc=recipe.name, unit="clip", mininterval=1.0) as progress,
        concurrent.futures.ThreadPoolExecutor(max_workers=workers) as pool,
    ):
        for number, name in enumerate(names):
            items = recipe.items[number * shard_size : (number + 1) * shard_size]
            report = _finished_shard(partial / name)
            if report is None or (strict and report["unreadable"]):
                results = _make_all(pool, recipe, items, strict, progress)
                report = _write_shard(partial / name, results, features.serialize_example)
            else:
                progress.update(len(items))
            reports.append(report)
    return reports


def _finished_shard(path: Path) -> dict[str, Any] | None:
    """The report of a shard that an earlier run finished."""
    report = read_json(path.with_name(f"{path.name}.json"))
    whole = report is not None and path.exists() and path.stat().st_size == report["bytes"]
    return report if whole else None


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
    finally:
        for future in futures:
            future.cancel()
    return results


def _write_shard(
    path: Path, results: list[tuple[str, Any]], serialize: Callable[[Any], bytes]
) -> dict[str, Any]:
    """One shard and its report, each under its name only when it is whole."""
    from array_record.python.array_record_module import ArrayRecordWriter

    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    rows = [result[1] for _, result in results if not isinstance(result, str)]
    records = [serialize(result[0]) for _, result in results if not isinstance(result, str)]
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
    _put(temporary, path)
    report = {
        "bytes": size,
        "payload": sum(map(len, records)),
        "rows": rows,
        "unreadable": {item: why for item, why in results if isinstance(why, str)},
    }
    write_json(path.with_name(f"{path.name}.json"), report)
    return report


def write_json(path: Path, value: Any) -> None:
    """Writes a file that is either absent or whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    _put(temporary, path)


def _put(temporary: Path, path: Path) -> None:
    """Renames a file once its content is on the disk."""
    with open(temporary, "rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)
