"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from rollingq_jax.errors import CheckpointError, printable

Row = dict[str, Any]


def read_rows(path: epath.PathLike) -> list[Row]:
    """Rows of a `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
      CheckpointError: an earlier line is not a row.
    """
    path = epath.Path(path)
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    while lines and not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            row["step"] + 0, row["split"] + ""
        except (ValueError, TypeError, KeyError, RecursionError):
            if number < len(lines):
                text = line[:60].decode(errors="replace")
                raise CheckpointError(
                    f"{path} line {number} is {text!r}; allowed: a JSON object with step and split"
                ) from None
        else:
            rows.append(row)
    return rows


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def json_ready(value: Any) -> Any:
    """The same with Python's own numbers; NaN and infinity become null, as JSON has neither."""
    if isinstance(value, Mapping):
        return {str(name): json_ready(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(row: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(json_ready(row))


def write_json(path: epath.PathLike, content: Any) -> None:
    """Writes a JSON file whole."""
    write_whole(path, json.dumps(json_ready(content), indent=2) + "\n")


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and TensorBoard; of several processes, the first does.

    Opened at the step from which a run goes on: later rows, of a run that was cut off, are removed,
    and with `validate` the validation row of that step, since it comes anew. An object store such
    as gs:// does not append; there the file is written anew each time.
    """

    def __init__(self, workdir: epath.PathLike, step: int, *, validate: bool = False) -> None:
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._first = jax.process_index() == 0
        self._local = "://" not in os.fspath(workdir)
        again = ("valid", step) if validate else None
        self.rows = [
            row
            for row in read_rows(self.path)
            if row["step"] <= step and (row["split"], row["step"]) != again
        ]
        self._rewrite()
        self._events = None
        if self._local and self._first:
            from rollingq_jax.train.events import EventLog

            self._events = EventLog(os.path.join(os.fspath(workdir), "tensorboard"), step)

    def _rewrite(self) -> None:
        if not self._first:
            return
        write_whole(self.path, "".join(as_json(row) + "\n" for row in self.rows))

    def write(self, rows: Iterable[Row]) -> None:
        """Adds rows; they are on disk when this returns."""
        rows = list(rows)
        self.rows += rows
        if self._events is None:
            self._rewrite()
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(as_json(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        self._events.write(rows)

    def remove(self, split: str) -> None:
        """Removes the rows of a split, which an earlier, unfinished end of the run has left."""
        self.rows = [row for row in self.rows if row["split"] != split]
        self._rewrite()


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns, the second to the right."""
    rows = [(printable(name, keep=""), printable(value, keep="")) for name, value in rows]
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)
