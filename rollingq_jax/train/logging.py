"""The numbers of a run: gathered from its steps, written to its folder, shown in the terminal.

`MetricAccumulator` takes what the steps return, which stays on the devices until a row is due;
`MetricsWriter` appends rows to `metrics.jsonl` and TensorBoard; `Console` prints. Keys and queries
around a rotation are kept in `rotations/*.npz` for the polar plots.
"""

import collections
import contextlib
import importlib.metadata
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import socket
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from tqdm import tqdm

from rollingq_jax.analysis.metrics import counted, written
from rollingq_jax.analysis.tasks import MAIN, METRICS
from rollingq_jax.data.dataset import KEPT
from rollingq_jax.errors import CheckpointError, NonFiniteError, printable, said
from rollingq_jax.files import write_whole
from rollingq_jax.train.output import progress_bar, wrapped
from rollingq_jax.train.steps import (
    NONFINITE,
    RollRecord,
    add_sums,
    finish,
    flag_names,
    nonfinite_names,
)
from rollingq_jax.train.train_state import TrainState
from rollingq_jax.train.workdir import is_number, json_ready

log = logging.getLogger(__name__)

Row = dict[str, Any]
Callback = Callable[[int, dict[str, float]], None]  # (step, {"<split>/<name>": value})
RotationEvent = dict[str, list[float]]  # query and anchor of the first head, as JSON has them
NUMBERS = {  # that a row of a split has to hold for those that read it
    "roll": ("epoch", "head", "angle_degrees"),  # the imbalances may be null
    "valid": ("epoch",),
}
ROTATIONS_SHOWN = 5  # where the trigger is checked every few steps there may be hundreds
PACKAGES = ("rollingq-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
MAX_EXAMPLES = 300  # in the picture of a rotation


class MetricAccumulator:
    """Sums since the last row, rolls since the last epoch's end, and where the time went.

    Steps run ahead of the host: their sums stay on the devices until a row is due.

    Args:
      params: for the names of parameters.
      record: of the checkpoint from which the run resumes, `pending()` in it.
      get: takes one copy of a replicated tree, see `parallel.Parallel`.
      epoch_steps: steps in an epoch.
      learning_rate: of each step; None leaves it out of the rows.
      skip_nonfinite: count a step whose loss or gradient is not finite, instead of raising.
    """

    def __init__(
        self,
        params: Any,
        record: Mapping[str, Any],
        *,
        get: Callable[[Any], Any],
        epoch_steps: int,
        learning_rate: Callable[[int], Any] | None,
        skip_nonfinite: bool,
    ) -> None:
        self._names = flag_names(params)
        self._get, self._epoch_steps, self._skip = get, epoch_steps, skip_nonfinite
        self._learning_rate = learning_rate
        sums = record.get("sums", {})  # older versions counted otherwise; theirs cannot be added to
        self._sums: dict[str, Any] = dict(sums) if "unscored" in sums else {}
        self._rotation: RotationEvent | None = record.get("turn")
        self._on_device: list[tuple[int, Any]] = []
        self._checks: list[tuple[int, Any]] = []
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._began, self._waited, self._examples = time.perf_counter(), 0.0, 0.0

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts the time inside as waiting for input."""
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def add(self, step: int, sums: Any, roll: Any) -> None:
        """Takes what step number `step` returned; `roll` is None where nothing was checked."""
        self._on_device.append((step, sums))
        if roll is not None:
            self._checks.append((step, roll))

    def _flush(self) -> None:
        """Takes the steps' sums to host memory.

        Raises:
          NonFiniteError: the loss or the gradient of a step was not finite.
        """
        on_device = [self._get(sums) for _, sums in self._on_device]
        for (step, _), sums in zip(self._on_device, jax.device_get(on_device), strict=True):
            names = nonfinite_names(sums.pop(NONFINITE), self._names)
            if names and not self._skip:
                others = f" and {len(names) - 1} others" if len(names) > 1 else ""
                raise NonFiniteError(f"step {step}: {names[0]}{others} is NaN or infinite")
            if self._skip:
                sums["skipped"] = len(names) > 0
            self._sums = add_sums(self._sums, sums)
            self._examples += float(sums["weight"])
        self._on_device = []

    def pending(self) -> tuple[list[Row], dict[str, Any]]:
        """Everything that a checkpoint in the middle of an epoch needs.

        Returns:
          The rows of the rolls since the last row, which are to be written now; and a record of
          the sums since the last row and of the last rotation since the last epoch's end.
        """
        self._flush()
        sums = {name: np.asarray(value).tolist() for name, value in self._sums.items()}
        return self._take_checks(), {"sums": sums, "turn": self._rotation}

    def rows(self, step: int) -> list[Row]:
        """A row for each head that has rolled since the last time, and the training row."""
        self._flush()
        row = self._labels(step, "train") | finish(self._sums)
        if self._learning_rate is not None:
            row["learning_rate"] = float(self._learning_rate(step - 1))
        self._sums = {}
        return [*self._take_checks(), row]

    def _take_checks(self) -> list[Row]:
        rows = []
        for step, on_device in self._checks:
            rows += self.roll_rows(step, jax.device_get(self._get(on_device)))
        self._checks = []
        return rows

    def roll_rows(self, step: int, roll: RollRecord) -> list[Row]:
        """A row for each head that rolled after `step`."""
        if roll.info.rolled[0]:
            query, anchor = np.asarray(roll.query[0]), np.asarray(roll.info.anchor[0])
            self._rotation = {"query": query.tolist(), "anchor": anchor.tolist()}
        rows = []
        for head in np.flatnonzero(roll.info.rolled):
            row = self._labels(step, "roll") | {
                "head": int(head),
                "imbalance_window": float(roll.info.imbalance[head]),
                "imbalance_before": float(roll.imbalance_before[head]),
                "imbalance_after": float(roll.imbalance_after[head]),
                "angle_degrees": math.degrees(roll.info.angle[head]),
            }
            if roll.info.mended[head]:
                row["mended"] = True
            rows.append(row)
        return rows

    def pop_last_rotation(self) -> RotationEvent | None:
        """The first head's last rotation in the epoch; None if there was none."""
        rotation, self._rotation = self._rotation, None
        return rotation

    def timing(self) -> Row:
        """Seconds of the epoch, examples a second, and the part of the time spent on input."""
        seconds = max(time.perf_counter() - self._began, 1e-9)
        timing = {
            "seconds": seconds,
            "examples_per_second": self._examples / seconds,
            "input_wait": self._waited / seconds,
        }
        self._restart_clock()
        return timing

    def _labels(self, step: int, split: str) -> Row:
        return {"step": step, "epoch": -(-step // self._epoch_steps), "split": split}


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
    """Tells if a run may have written the row: its readers then find what they need."""
    if not (isinstance(row, dict) and isinstance(row.get("split"), str)):
        return False
    step = row.get("step")
    if not (isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**31):
        return False
    scalars = (v is None or isinstance(v, str | bool) or is_number(v) for v in row.values())
    return all(scalars) and all(is_number(row.get(n)) for n in NUMBERS.get(row["split"], ()))


def as_json(row: Mapping[str, Any]) -> str:
    """One line of JSON."""
    return json.dumps(json_ready(row))


def scalars_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row, as `<split>/<name>`, without those that say when and where."""
    split, labels = row["split"], ("step", "epoch", "head")
    numbers = {name: x for name, x in row.items() if name not in labels and is_number(x)}
    return {f"{split}/{name}": float(x) for name, x in numbers.items()}


class MetricsWriter:
    """Appends rows to `metrics.jsonl` and TensorBoard; of several processes, the first does.

    Opened at the step from which a run resumes: later rows, of a run that was cut off, are removed,
    and with `validate` the validation row of that step, since it comes anew. An object store such
    as gs:// does not append; there the file is written anew each time.

    Args:
      workdir: the run's folder.
      step: from which the run resumes.
      validate: whether that step's validation row comes anew.
      callbacks: called with the step and the numbers of each row that is added.
    """

    def __init__(
        self,
        workdir: epath.PathLike,
        step: int,
        *,
        validate: bool = False,
        callbacks: Sequence[Callback] = (),
    ) -> None:
        self._callbacks = callbacks
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
        else:
            with open(self.path, "a", encoding="utf-8") as file:
                file.writelines(as_json(row) + "\n" for row in rows)
                file.flush()
                os.fsync(file.fileno())
            self._events.write(rows)
        if self._first:
            for row in rows:
                for callback in self._callbacks:
                    callback(row["step"], scalars_of(row))

    def remove(self, split: str) -> None:
        """Removes the rows of a split, which an earlier, unfinished end of the run has left."""
        self.rows = [row for row in self.rows if row["split"] != split]
        self._rewrite()


class EventLog:
    """One event file for TensorBoard, of one process's part of a run.

    tensorboardX supplies the messages and the checksum of the record format (length, checksum,
    data, checksum). Its own writers keep the file open and buffered, or write in a thread, which a
    full disk ends; this one opens it for each write.

    Args:
      folder: where TensorBoard will look.
      step: the step from which the run resumes; older files' values of later steps are hidden.

    Raises:
      OSError: here and in `write`, the file cannot be written.
    """

    def __init__(self, folder: str, step: int) -> None:
        from tensorboardX.proto import event_pb2

        os.makedirs(folder, exist_ok=True)
        where = f"{socket.gethostname()}.{os.getpid()}.{step}"
        self._path = os.path.join(folder, f"events.out.tfevents.{time.time():.0f}.{where}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._append({"file_version": "brain.Event:2"}, {"step": step + 1, "session_log": start})

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds every number of rows of `metrics.jsonl`, see `scalars_of`."""
        from tensorboardX.proto.summary_pb2 import Summary

        events = []
        for row in rows:
            scalars = scalars_of(row)
            values = [Summary.Value(tag=tag, simple_value=x) for tag, x in scalars.items()]
            events.append({"step": row["step"], "summary": Summary(value=values)})
        self._append(*events)

    def _append(self, *events: dict[str, Any]) -> None:
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.record_writer import masked_crc32c

        content = b""
        for fields in events:
            data = Event(wall_time=time.time(), **fields).SerializeToString()
            length = struct.pack("<Q", len(data))
            for part in (length, data):
                content += part + struct.pack("<I", masked_crc32c(part))
        with open(self._path, "ab") as file:
            file.write(content)


class Snapshot(NamedTuple):
    """The first head around one rotation; the keys are those of the epoch's end."""

    step: int
    epoch: int
    keys: dict[str, np.ndarray]  # of the validation examples that have it, `[N_m, d_h]`
    query: np.ndarray  # `[d_h]`, just before the rotation
    anchor: np.ndarray  # `[d_h]`, where it went


def save_snapshot(
    workdir: epath.Path,
    step: int,
    epoch: int,
    rotation: RotationEvent,
    columns: Mapping[str, np.ndarray],
) -> None:
    """Writes `rotations/<step>.npz`: the last rotation of the epoch that ends with the step."""
    arrays: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "query": np.asarray(rotation["query"], np.float32),
        "anchor": np.asarray(rotation["anchor"], np.float32),
    }
    names = sorted(name for name in columns if name.startswith("mean_keys/"))
    for name, has in zip(names, columns["present"][:MAX_EXAMPLES].T, strict=True):
        keys = columns[name][:MAX_EXAMPLES]
        arrays[name] = keys[has.astype(bool) & np.isfinite(keys).all(axis=-1)]
    arrays["modalities"] = [name.removeprefix("mean_keys/") for name in names]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    folder = workdir / "rotations"
    folder.mkdir(exist_ok=True)
    write_whole(folder / f"{step}.npz", buffer.getvalue())


def load_snapshots(workdir: epath.Path, last_step: int) -> list[Snapshot]:
    """Snapshots up to a step, in order; one that is damaged is left out, with a warning."""
    folder = workdir / "rotations"
    paths = folder.iterdir() if folder.is_dir() else ()
    names = [path.name for path in paths if re.fullmatch(r"\d{1,10}\.npz", path.name)]
    found = []
    for step in sorted(int(name.removesuffix(".npz")) for name in names):
        if step <= last_step:
            try:
                found.append(_load(folder / f"{step}.npz"))
            except Exception as error:  # NumPy and zipfile raise many types on a damaged file
                log.warning(
                    "%s is damaged, and not drawn (%s)", folder / f"{step}.npz", said(error)
                )
    return found


def _load(path: Any) -> Snapshot:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        prefix = "mean_keys/"
        keys = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
        query, anchor = file["query"], file["anchor"]
        vectors = [array.reshape(-1, array.shape[-1]) for array in (query, anchor, *keys.values())]
        widths = {array.shape[-1] for array in vectors}
        if "modalities" in file.files and file["modalities"].tolist() != sorted(keys):
            raise ValueError("an array is missing")
        if not keys or len(widths) != 1 or query.ndim != 1 or anchor.ndim != 1:
            raise ValueError(f"arrays of widths {sorted(widths)}")
        if not all(np.isfinite(array).all() for array in vectors):
            raise ValueError("values that are not finite")
        return Snapshot(int(file["step"]), int(file["epoch"]), keys, query, anchor)


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Two aligned columns, the second to the right."""
    rows = [(printable(name, keep=""), printable(value, keep="")) for name, value in rows]
    left = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "\n".join(f"  {name:<{left}}  {value:>{right}}" for name, value in rows)


def count(tree: Any) -> int:
    """Number of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(tree))


def parameter_table(params: Any) -> str:
    """Parameters of each part of the model, and in all."""
    rows = [(name, f"{count(params[name]):,}") for name in sorted(params)]
    return table([*rows, ("parameters in all", f"{count(params):,}")])


def device_line() -> str:
    """The devices in words: `8 x cpu (cpu), 1 process`."""
    device = jax.devices()[0]
    processes = jax.process_count()
    plural = "" if processes == 1 else "es"
    return (
        f"{jax.device_count()} x {device.device_kind} ({device.platform}), "
        f"{processes} process{plural}, jax {jax.__version__}"
    )


def versions() -> dict[str, str]:
    """Versions of Python and packages; a package that is run from its source has none."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Console:
    """A header, a progress bar, a line for each rotation and one for each epoch; or nothing."""

    def __init__(self, experiment: Any, state: TrainState, *, quiet: bool = False) -> None:
        self._first = jax.process_index() == 0 and not quiet
        self._state, self._dataset = state, experiment.dataset
        self._epoch_steps, self._total_steps = experiment.epoch_steps, experiment.total_steps
        self._bar: Any = None
        self._kept: collections.Counter[str] = collections.Counter()
        self._kept_said = False
        self._rotations_shown = 0
        self._used_up_said = False

    def __enter__(self) -> "Console":
        step = int(self._state.step)
        self.note(f"devices: {device_line()}")
        sizes = ", ".join(f"{len(s):,} {name}" for name, s in self._dataset.splits.items())
        self.note(f"data: {sizes} examples, {self._dataset.learned}")
        self.note(parameter_table(self._state.params))
        if step:
            self.note(f"continuing from step {step} of {self._total_steps}")
        if step < self._total_steps:
            self.note("compiling the first step ...")
        quiet = {} if self._first else {"disable": True}
        self._bar = progress_bar(self._total_steps, "step", initial=step, mininterval=0.5, **quiet)
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def note(self, text: str) -> None:
        """Prints lines of their own, above the bar."""
        if self._first:
            tqdm.write("\n".join(map(wrapped, text.split("\n"))))

    def advance(self) -> None:
        """One step is under way."""
        self._bar.update()

    def _count_kept(self, row: Row) -> None:
        """Adds up, over the first epoch that is seen, what `data.corruptions` could not drop."""
        if self._kept_said:
            return
        for name, count in row.items():
            if name.startswith(KEPT):
                self._kept[name.removeprefix(KEPT)] += count
        if row["step"] % self._epoch_steps:
            return
        self._kept_said = True
        for modality, count in sorted(self._kept.items()):
            self.note(
                f"data.corruptions: in epoch {row['epoch']}, {count} examples keep {modality}, "
                "which was to be dropped, because it is their last modality"
            )

    def show(self, rows: Iterable[Row]) -> None:
        """Puts training rows on the bar; prints validation and rotations on lines of their own."""
        for row in rows:
            if row["split"] == "train":
                shown = (f"{n} {written(row[n])}" for n in METRICS if n in row)
                self._bar.set_postfix_str(", ".join(shown))
                self._count_kept(row)
                if row.get("skipped"):
                    self.note(
                        f"epoch {row['epoch']}, step {row['step']}: skipped {row['skipped']} "
                        "updates whose loss or gradient was NaN or infinite"
                    )
            elif row["split"] == "roll":
                self._rotations_shown += 1
                if self._rotations_shown > ROTATIONS_SHOWN:
                    continue
                mended = "; R had drifted from orthogonal and is mended"
                self.note(
                    f"epoch {row['epoch']}, head {row['head']}: rotated the query by "
                    f"{row['angle_degrees']:.1f} degrees; imbalance "
                    f"{written(row['imbalance_before'])} -> {written(row['imbalance_after'])}"
                    f"{mended if row.get('mended') else ''}"
                )
                if self._rotations_shown == ROTATIONS_SHOWN:
                    self.note("further rotations are counted in the epochs' lines alone")
            else:
                self.note(epoch_line(row))
                if row.get("rotations_used_up") and not self._used_up_said:
                    self._used_up_said = True
                    self.note(
                        f"epoch {row['epoch']}: no rotations are left, and imbalance stands above "
                        f"config.rolling.beta at {written(row['imbalance'])}; "
                        "--config.rolling.max_rotations=None sets no limit"
                    )


def epoch_line(row: Row) -> str:
    """An epoch's validation in one line, of what a terminal has room for: what matters most first.

    A run that waits for its input says so.
    """
    where = "training data, " if "evaluated_on" in row else ""
    main = next(name for name in MAIN.values() if name in row)
    parts = [f"{where}{METRICS[main].words} {written(row[main])}"]
    if row["input_wait"] > 0.5:
        parts.append(f"{row['input_wait']:.0%} of the time waiting for input")
    if "imbalance" in row:
        parts.append(f"imbalance {written(row['imbalance'])}")
    shares = [
        f"{n[16:]} {written(v, '.2f')}" for n, v in row.items() if n.startswith("attention_share/")
    ]
    if shares:
        parts.append(" ".join(shares))
    if row.get("rotations"):
        parts.append(counted(row["rotations"], "rotation"))
    parts.append(f"loss {written(row['loss'])}")
    parts.append(f"{row['seconds']:.1f} s")
    parts.append(f"{row['examples_per_second']:,.0f} examples/s")
    line, room = f"epoch {row['epoch']}: {parts[0]}", shutil.get_terminal_size().columns
    for part in parts[1:]:
        if len(line) + len(part) + 2 <= room:
            line += f", {part}"
    return line
