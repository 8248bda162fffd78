"""Keys and queries around a rotation, kept for the polar plots."""

import io
import logging
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from rollingq_jax.errors import said
from rollingq_jax.train.steps import Roll
from rollingq_jax.train.writer import write_bytes

log = logging.getLogger(__name__)

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
    arrays["modalities"] = [name.removeprefix("mean_keys/") for name in names]
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    folder = workdir / "rotations"
    folder.mkdir(exist_ok=True)
    write_bytes(folder / f"{step}.npz", buffer.getvalue())


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
