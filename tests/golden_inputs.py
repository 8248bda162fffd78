"""The golden files (`golden/README.md`) and the inputs that they were made from."""

import ast
import math
from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).parent / "golden"
SPECTROGRAMS = {"CREMAD": (257, 188), "KineticSound": (1024, 128)}


def wave(shape, seed):
    """x = sin(0.7390851 i + seed) + 0.5 sin(0.0131 i (1 + 0.1 seed) + 2 seed), in C order."""
    i = np.arange(np.prod(shape), dtype=np.float64)
    x = np.sin(0.7390851 * i + seed) + 0.5 * np.sin(0.0131 * i * (1 + 0.1 * seed) + 2 * seed)
    return x.astype(np.float32).reshape(shape)


def inputs(config, seed, batch, num_classes):
    """Audio `[B, F, T]`, video `[B, 3, frames, 224, 224]` and labels `[B]` of one golden batch."""
    audio = wave((batch, *SPECTROGRAMS[config["dataset"]]), seed)
    video = wave((batch, 3, config["use_video_frames"], 224, 224), seed + 0.5)
    label = (7 * np.arange(batch) + int(3 * seed)) % num_classes
    return audio, video, label.astype(np.int32)


class Golden:
    """One golden file, its arrays by name and its configuration."""

    def __init__(self, path):
        with np.load(path) as archive:
            self.arrays = dict(archive)
        self.name = Path(path).stem
        self.config = ast.literal_eval(str(self["meta/config"]))

    def __getitem__(self, name):
        return self.arrays[name]

    def __contains__(self, name):
        return name in self.arrays

    def under(self, prefix):
        """The arrays below a prefix, without it."""
        return {
            name.removeprefix(f"{prefix}/"): value
            for name, value in self.arrays.items()
            if name.startswith(f"{prefix}/")
        }

    def model_arguments(self):
        """The arguments of `upstream_model`."""
        names = ("dataset", "fusion_method", "backbone", "edim", "depth", "multi_depth")
        arguments = {name: self.config[name] for name in (*names, "use_video_frames")}
        return arguments | {"n_classes": int(self["meta/n_classes"])}

    def inputs(self, seed):
        """Audio, video and labels for a seed."""
        sizes = int(self["meta/batch"]), int(self["meta/n_classes"])
        return inputs(self.config, float(seed), *sizes)


def golden_files(pattern):
    """Paths of the golden files that match, in order."""
    return sorted(GOLDEN.glob(pattern))


def resnet18_state_dict():
    """Random tensors with the names and shapes of torchvision's `resnet18().state_dict()`."""
    rng = np.random.default_rng(0)
    tensors = {}

    def convolution(name, out, into, side):
        std = math.sqrt(2 / (out * side * side))
        drawn = rng.standard_normal((out, into, side, side), np.float32)
        tensors[f"{name}.weight"] = np.float32(std) * drawn

    def norm(name, size):
        for leaf, low, high in (
            ("weight", 0.5, 1.5),
            ("bias", -0.2, 0.2),
            ("running_mean", -0.2, 0.2),
            ("running_var", 0.5, 1.5),
        ):
            tensors[f"{name}.{leaf}"] = rng.uniform(low, high, size).astype(np.float32)
        tensors[f"{name}.num_batches_tracked"] = np.array(7)

    convolution("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for stage, width in enumerate((64, 128, 256, 512), 1):
        for block in range(2):
            base = f"layer{stage}.{block}"
            convolution(f"{base}.conv1", width, into, 3)
            norm(f"{base}.bn1", width)
            convolution(f"{base}.conv2", width, width, 3)
            norm(f"{base}.bn2", width)
            if into != width:
                convolution(f"{base}.downsample.0", width, into, 1)
                norm(f"{base}.downsample.1", width)
            into = width
    tensors["fc.weight"] = rng.standard_normal((1000, 512), np.float32)
    tensors["fc.bias"] = rng.standard_normal(1000, np.float32)
    return tensors
