"""ImageNet weights of torchvision's ResNet-18 into the encoders of a multimodal model."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from rollingq_jax.convert.files import load_state_dict
from rollingq_jax.convert.vit import VitReport, replaced
from rollingq_jax.errors import DataError

STEM = "conv1.weight"
HEAD = ("fc.weight", "fc.bias")  # of the 1000 classes
COUNTER = "num_batches_tracked"
# What a normalization's tensors are here: a parameter or a running average, and its name.
NORM = {
    "weight": ("params", "scale"),
    "bias": ("params", "bias"),
    "running_mean": ("batch_stats", "mean"),
    "running_var": ("batch_stats", "var"),
}


def is_resnet(path: str | os.PathLike[str]) -> bool:
    """Tells if a file has the first convolution of torchvision's ResNets, by its name.

    Raises:
      DataError: it cannot be read.

    Examples:
      >>> import os, tempfile
      >>> path = os.path.join(tempfile.mkdtemp(), "weights.npz")
      >>> np.savez(path, **{"conv1.weight": np.zeros((64, 3, 7, 7))})
      >>> is_resnet(path)
      True
    """
    return STEM in load_state_dict(path)


def load_resnet(
    path: str | os.PathLike[str], params: Mapping[str, Any], batch_stats: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], VitReport]:
    """Parameters and running averages whose resnet18 encoders start from a file's.

    The first convolution of an encoder of one channel is the sum of the file's over red, green and
    blue: a gray image through it gives what it gave through the file's. The projection to the
    model's width and all else keep their values.

    Args:
      path: `.npz` or `.safetensors` with the names of torchvision's state dict: `conv1.weight`,
        `bn1.running_mean`, `layer2.0.downsample.0.weight`, ...
      params: of a model; not changed.
      batch_stats: its running averages; not changed.

    Returns:
      New parameters, new running averages, and a report.

    Raises:
      DataError: the file cannot be used, a shape does not fit, or no encoder is a ResNet-18.

    Examples:
      >>> params, batch_stats, report = load_resnet(path, params, batch_stats)  # doctest: +SKIP
    """
    tensors = {n: x for n, x in load_state_dict(path).items() if not n.endswith(COUNTER)}
    ours = {"params": params, "batch_stats": batch_stats}
    leaves = traverse_util.flatten_dict(ours, sep="/")
    if not batch_stats:
        raise DataError(f"{path} is a ResNet-18; no encoder of the model is of kind resnet18")
    new: dict[str, np.ndarray] = {}
    reshaped = {}
    converted = _converted(path, tensors)
    for encoder in sorted(batch_stats):
        for name, value in converted.items():
            collection, _, rest = name.partition("/")
            target = f"{collection}/{encoder}/{rest}"
            if rest == "embed/conv/kernel" and leaves[target].shape[2] == 1:
                value = value.sum(axis=2, keepdims=True)
                reshaped[target] = "sum over the file's three colors"
            if target not in leaves or leaves[target].shape != value.shape:
                has = leaves[target].shape if target in leaves else "no such array"
                raise DataError(f"{target} has shape {has}; the file has {value.shape}")
            new[target] = value
        needed = {n for n in leaves if n.partition("/")[2].startswith(f"{encoder}/")}
        lacking = sorted(n for n in needed - set(new) if "/project/" not in n)
        if lacking:
            raise DataError(f"{path} has nothing for {lacking[0]}; allowed: a whole ResNet-18")
    unused = tuple(name for name in HEAD if name in tensors)
    whole, report = replaced(leaves, new, reshaped, unused)
    return whole["params"], whole["batch_stats"], report


def _converted(path: Any, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """`params/embed/conv/kernel` and so on, kernels `[h, w, in, out]`."""
    found = {}
    for name, value in tensors.items():
        if name in HEAD:
            continue
        *place, kind = name.split(".")
        if place[:1] in (["conv1"], ["bn1"]):
            base, layer = "embed", {"conv1": "conv", "bn1": "norm"}[place[0]]
        elif len(place) in (3, 4) and place[0] in ("layer1", "layer2", "layer3", "layer4"):
            base = f"block_{2 * (int(place[0][-1]) - 1) + int(place[1])}"
            shortcut = {"downsample.0": "shortcut", "downsample.1": "shortcut_norm"}
            layer = ".".join(place[2:])
            layer = shortcut.get(layer, layer.replace("bn", "norm"))
        else:
            raise DataError(f"{path} holds {name}; allowed: the tensors of torchvision's ResNet-18")
        if np.ndim(value) == 4:
            found[f"params/{base}/{layer}/kernel"] = value.transpose(2, 3, 1, 0)
        elif kind in NORM:
            collection, leaf = NORM[kind]
            found[f"{collection}/{base}/{layer}/{leaf}"] = value
        else:
            raise DataError(f"{path} holds {name}; allowed: the tensors of torchvision's ResNet-18")
    return found
