"""Keys and queries around a rotation, kept for the polar plots."""

import io
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rollingq_jax.train.steps import Roll

MAX_EXAMPLES = 300
Turn = dict[str, list[float]]


class Snapshot(NamedTuple):
    """The first head around one rotation.

    Attributes:
      step, epoch: when.
      keys: modality -> mean keys of the validation examples that have it, `[N_m, d_h]`, at the
        epoch's end.
      query: `[d_h]`, just before the rotation.
      anchor: `[d_h]`, where it went.
    """

    step: int
    epoch: int
    keys: dict[str, np.ndarray]
    query: np.ndarray
    anchor: np.ndarray


def turn_of(roll: Roll) -> Turn | None:
    """Query and anchor of the first head, as JSON has them; None if that head did not roll."""
    if not roll.info.rolled[0]:
        return None
    return {
        "query": np.asarray(roll.query[0]).tolist(),
        "anchor": np.asarray(roll.info.anchor[0]).tolist(),
    }


def save_snapshot(
    workdir: epath.Path, step: int, epoch: int, turn: Turn, columns: Mapping[str, np.ndarray]
) -> None:
    """Writes `rotations/<step>.npz`: the last rotation of the epoch that ends with the step."""
    arrays: dict[str, Any] = {
        "step": step,
        "epoch": epoch,
        "query": np.asarray(turn["query"], np.float32),
        "anchor": np.asarray(turn["anchor"], np.float32),
    }
    names = sorted(name for name in columns if name.startswith("mean_keys/"))
    for name, has in zip(names, columns["present"][:MAX_EXAMPLES].T, strict=True):
        keys = columns[name][:MAX_EXAMPLES]
        arrays[name] = keys[has.astype(bool) & np.isfinite(keys).all(axis=-1)]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    folder = workdir / "rotations"
    folder.mkdir(exist_ok=True)
    (folder / f"{step}.npz").write_bytes(buffer.getvalue())


def load_snapshots(workdir: epath.Path, last_step: int) -> list[Snapshot]:
    """Snapshots up to a step, in order."""
    folder = workdir / "rotations"
    paths = folder.iterdir() if folder.exists() else ()
    steps = sorted(int(p.stem) for p in paths if re.fullmatch(r"\d+\.npz", p.name))
    return [_load(folder / f"{step}.npz") for step in steps if step <= last_step]


def _load(path: Any) -> Snapshot:
    with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
        prefix = "mean_keys/"
        keys = {n.removeprefix(prefix): file[n] for n in file.files if n.startswith(prefix)}
        return Snapshot(int(file["step"]), int(file["epoch"]), keys, file["query"], file["anchor"])
