"""A data set and a model that train in a moment, and what a finished run left."""

import json

import numpy as np

from rollingq_jax.train.config import default_config

SIZES = {"train": 44, "valid": 18, "test": 20}
TIME_FIELDS = ("seconds", "examples_per_second", "input_wait")


def make_arrays(*, sizes=SIZES, seed=0, classes=3):
    """Two modalities of vectors, the second easier to tell apart, under the keys of an .npz."""
    rng = np.random.default_rng(seed)
    means = {"a": rng.normal(size=(classes, 6)), "b": 2 * rng.normal(size=(classes, 5))}
    arrays = {}
    for split, count in sizes.items():
        label = np.arange(count, dtype=np.int32) % classes
        arrays[f"{split}/label"] = label
        for name, mean in means.items():
            noise = rng.normal(size=(count, mean.shape[1]))
            arrays[f"{split}/{name}"] = (mean[label] + noise).astype(np.float32)
    return arrays


def write_arrays(path, **options):
    """`make_arrays` as a file."""
    np.savez(path, **make_arrays(**options))


def tiny_config(path, **overrides):
    """A run of 3 epochs of 6 steps that rolls at each epoch's end; overrides are dotted fields."""
    config = default_config()
    fields = {
        "epochs": 3,
        "batch_size": 8,
        "log_every": 4,
        "optimizer.learning_rate": 0.05,
        "optimizer.warmup_epochs": 1.0,
        "rolling.rho": 4.0,
        "rolling.max_rotations": 5,
        "data.name": "arrays",
        "data.path": str(path),
        "model.dim": 8,
        "model.depth": 1,
        "model.num_heads": 2,
        "model.mlp_ratio": 1.0,
    }
    config.update_from_flattened_dict(fields | overrides)
    return config


def read_metrics(workdir, *, times=False):
    """Rows of `metrics.jsonl`, without the fields that time."""
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    keep = () if times else TIME_FIELDS
    return [{n: v for n, v in row.items() if n not in keep} for row in rows]


def files(folder):
    """`{relative path: (bytes, time of change)}` of everything in a folder."""
    return {
        path.relative_to(folder).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
