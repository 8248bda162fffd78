"""Where a run's numbers go: `metrics.jsonl`, TensorBoard and the terminal."""

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from etils import epath

from rollingq_jax.errors import CheckpointError

Row = dict[str, Any]


def read_rows(path: epath.PathLike) -> list[Row]:
    """Rows of a `metrics.jsonl`; a last line cut short by a crash is left out.

    Raises:
      CheckpointError: an earlier line is not JSON.
    """
    path = epath.Path(path)
    lines = path.read_text().splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise CheckpointError(f"{path} line {number} is not JSON: {line[:60]!r}") from None
    return rows


def write_whole(path: epath.PathLike, text: str) -> None:
    """Writes a file so that a reader sees the old text or the new, never a part."""
    path = epath.Path(path)
    temporary = path.parent / f".{path.name}.tmp"
    temporary.write_text(text)
    temporary.replace(path)


def as_json(row: Mapping[str, Any]) -> str:
    """One line of JSON; a NaN or an infinity becomes null, which every reader knows."""
    clean = {
        name: None if isinstance(value, float) and not abs(value) < float("inf") else value
        for name, value in row.items()
    }
    return json.dumps(clean)


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and TensorBoard.

    Opened at the step from which a run goes on: later rows, of a run that was cut off, are removed.
    An object store such as gs:// does not append; there the file is written anew each time.
    """

    def __init__(self, workdir: epath.PathLike, step: int) -> None:
        self.path = epath.Path(workdir) / "metrics.jsonl"
        self._local = "://" not in os.fspath(workdir)
        self.rows = [row for row in read_rows(self.path) if row["step"] <= step]
        self._rewrite()
        self._events = None
        if self._local:
            from tensorboardX import SummaryWriter

            self._events = SummaryWriter(
                os.path.join(os.fspath(workdir), "tensorboard"), purge_step=step + 1
            )

    def _rewrite(self) -> None:
        write_whole(self.path, "".join(as_json(row) + "\n" for row in self.rows))

    def write(self, rows: Iterable[Row]) -> None:
        """Adds rows; they are on disk when this returns."""
        rows = list(rows)
        self.rows += rows
        if not self._local:
            self._rewrite()
            return
        with open(self.path, "a", encoding="utf-8") as file:
            file.writelines(as_json(row) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        for row in rows:
            for name, value in row.items():
                if isinstance(value, float):
                    self._events.add_scalar(f"{row['split']}/{name}", value, row["step"])

    def remove(self, split: str) -> None:
        """Removes the rows of a split, which an earlier, unfinished end of the run has left."""
        self.rows = [row for row in self.rows if row["split"] != split]
        self._rewrite()

    def close(self) -> None:
        """Closes the event file."""
        if self._events is not None:
            self._events.close()


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns, the second to the right."""
    rows = list(rows)
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)
