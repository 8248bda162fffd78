"""AV-MNIST: handwritten digits and spectrograms of spoken ones, as MultiBench distributes them.

`data.path` holds image/{train,test}_data.npy [N, 784], audio/{train,test}_data.npy [N, 112, 112]
and {train,test}_labels.npy, values from 0 to 255. As in MultiBench (Liang et al. 2021,
`datasets/avmnist/get_data.py`) the last 5,000 of the 60,000 training examples are the validation
split; of another number of examples, the last twelfth.
"""

from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data.dataset import Dataset
from rollingq_jax.data.options import given_path, option
from rollingq_jax.data.sources.arrays import from_arrays
from rollingq_jax.errors import DataError
from rollingq_jax.files import reading

SHAPES = {"audio": (112, 112, 1), "image": (28, 28, 1)}
VALID_SHARE = 12


def load(config_data: Any, *, seed: int) -> Dataset:
    """The arrays under `config_data.path`, memory-mapped.

    Args:
      config_data: `path`; optional `modalities`, `standardize`.
      seed: not used: the splits are the same for every run.

    Raises:
      DataError: a file is missing, damaged or of another shape.
    """
    root = given_path(config_data, "the folder avmnist, with image/ and audio/")
    arrays: dict[str, np.ndarray] = {}
    for split in ("train", "test"):
        columns = {"label": _read(root / f"{split}_labels.npy").astype(np.int64)}
        for name, shape in SHAPES.items():
            file = root / name / f"{split}_data.npy"
            stored = _read(file)
            if stored.size != len(columns["label"]) * int(np.prod(shape)):
                raise DataError(
                    f"{file}: {list(stored.shape)}; allowed: {list(shape[:2])} for each of the "
                    f"{len(columns['label'])} labels"
                )
            columns[name] = stored.reshape(-1, *shape)
        arrays |= {f"{split}/{name}": column for name, column in columns.items()}
    last = len(arrays["train/label"]) // VALID_SHARE
    for name in ("label", *SHAPES):
        whole = arrays[f"train/{name}"]
        arrays[f"train/{name}"], arrays[f"valid/{name}"] = whole[:-last], whole[-last:]
    return from_arrays(
        arrays,
        seed=seed,
        kinds={"audio": "spectrogram", "image": "image"},
        modalities=option(config_data, "modalities", ()),
        standardize=option(config_data, "standardize", True),
        description="AV-MNIST",
    )


def _read(file: Path) -> np.ndarray:
    with reading(file, "array"):
        return np.load(file, mmap_mode="r", allow_pickle=False)
