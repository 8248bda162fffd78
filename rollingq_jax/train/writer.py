"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import math
import os
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from rollingq_jax.errors import CheckpointError, printable, said

Row = dict[str, Any]
MAX_DEPTH = 50
NUMBERS = {  # what a row of a split has to hold for those that read it
    "roll": ("epoch", "head", "angle_degrees"),  # the imbalances may be null
    "valid": ("epoch",),
}


def read_object(path: epath.Path) -> dict[str, Any]:
    """What a JSON file of a run holds.

    Raises:
      CheckpointError: it is no file, not JSON, or not an object of at most 50 levels.
    """
    try:
        content = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({said(error)})") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({said(error)})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds {type(content).__name__}; allowed: a JSON object")
    level: list[Any] = [content]
    for _ in range(MAX_DEPTH):
        inner = [v.values() if isinstance(v, dict) else v for v in level]
        level = [v for values in inner for v in values if isinstance(v, dict | list)]
    if level:
        raise CheckpointError(f"{path} is nested too deep; allowed: at most {MAX_DEPTH} levels")
    return content


def is_number(value: Any) -> bool:
    """Whether a value from JSON is a number that float64 holds; true and false are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return isinstance(value, float) or abs(value) < 2**1023


def read_rows(path: epath.PathLike) -> list[Row]:
    """Rows of a `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
      CheckpointError: an earlier line is not a row, or the file cannot be read.
    """
    path = epath.Path(path)
    try:
        lines = path.read_bytes().split(b"\n") if path.exists() else []
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({said(error)})") from None
    while lines and not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if _is_row(row):
            rows.append(row)
        elif number < len(lines):
            text = line[:60].decode(errors="replace")
            raise CheckpointError(
                f"{path} line {number} is {text!r}; allowed: a JSON object with step and split, "
                "and the numbers of such a row"
            )
    return rows


def _is_row(row: Any) -> bool:
    """Whether a run may have written the row, so that what reads it finds what it needs."""
    if not (isinstance(row, dict) and isinstance(row.get("split"), str)):
        return False
    step = row.get("step")
    if not (isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**31):
        return False
    scalars = (v is None or isinstance(v, str | bool) or is_number(v) for v in row.values())
    return all(scalars) and all(is_number(row.get(n)) for n in NUMBERS.get(row["split"], ()))


def write_bytes(path: epath.PathLike, content: bytes) -> None:
    """Writes a file so that a reader sees the old content or the new, never a part."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def write_whole(path: epath.PathLike, text: str) -> None:
    """As `write_bytes`, in UTF-8."""
    write_bytes(path, text.encode())


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
