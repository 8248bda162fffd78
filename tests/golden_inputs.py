"""The golden files (`golden/README.md`) and the inputs that they were made from."""

import ast
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
