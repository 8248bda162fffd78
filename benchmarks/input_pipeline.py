"""Speed of the input pipeline on one core: CREMA-D examples from prepared records.

python -m benchmarks.input_pipeline [--out FILE]

Makes clips of CREMA-D's form (sound of 2.5 s at 16 kHz, frames of 480 x 360), prepares them as
``python -m rollingq_jax.prepare crema_d`` does, and reads batches of 64 for training: three JPEG
frames of short side 256 decoded, one random crop to 224 x 224 and one flip for all three. The
pixels stay uint8; the model normalizes on the device. The process is held to one core.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from PIL import Image

from benchmarks.timing import processor
from rollingq_jax.data.dataset import Dataset
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import train_batches
from rollingq_jax.data.sources import crema_d
from rollingq_jax.data.sources.crema_d import EMOTIONS

BATCH_SIZE = 64
SOURCE_SIZE = (360, 480)


def natural_image(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """uint8 [H, W, 3] with the spectrum of photographs, amplitude falling as 1 / frequency."""
    height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    noise = np.fft.rfft2(rng.standard_normal((3, height, width))) / frequency**1.2
    channels = np.fft.irfft2(noise, (height, width))
    channels[1:] = 0.9 * channels[:1] + 0.3 * channels[1:]  # colors of one object go together
    channels -= channels.mean(axis=(1, 2), keepdims=True)
    scaled = 128 + 45 * channels / channels.std(axis=(1, 2), keepdims=True)
    return np.moveaxis(np.clip(scaled, 0, 255), 0, -1).astype(np.uint8)


def make_clips(folder: Path, num_clips: int, frames_per_clip: int) -> Path:
    """A CREMA-D tree of WAV files and extracted frames."""
    import soundfile

    rng = np.random.default_rng(0)
    (folder / "AudioWAV").mkdir(parents=True)
    for number in range(num_clips):
        clip = f"{1001 + number // 6:04d}_DFA_{EMOTIONS[number % 6]}_XX"
        soundfile.write(
            folder / "AudioWAV" / f"{clip}.wav", 0.1 * rng.standard_normal(40_000), 16_000
        )
        frames = folder / "Image-01-FPS" / clip
        frames.mkdir(parents=True)
        for i in range(frames_per_clip):
            image = natural_image(rng, SOURCE_SIZE)
            Image.fromarray(image).save(frames / f"{i:05d}.jpg", quality=95)
    return folder


def prepared_clips(folder: Path, num_clips: int, frames_per_clip: int = 3) -> Dataset:
    """The clips as `crema_d.load` gives them."""
    source = make_clips(folder / "CREMA-D", num_clips, frames_per_clip)
    with contextlib.redirect_stderr(io.StringIO()):
        crema_d.prepare(source, folder / "data", strict=True)
    return load_dataset(ConfigDict({"name": "crema_d", "path": str(folder / "data")}), seed=0)


def measure(dataset: Dataset, seconds: float) -> tuple[int, float, float]:
    """Reads training batches for some seconds.

    Returns:
      (examples, seconds by the clock, seconds of processor time), after one batch that is not
      counted.
    """
    batches = train_batches(
        dataset.splits["train"],
        batch_size=BATCH_SIZE,
        seed=0,
        num_steps=1_000_000,
        transforms=dataset.train_transforms,
        prefetch=2,
    )
    next(batches)
    examples, start, used = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        examples += int(next(batches)["example_mask"].sum())
    elapsed, used = time.perf_counter() - start, time.process_time() - used
    if hasattr(batches, "close"):
        batches.close()
    return examples, elapsed, used


@contextlib.contextmanager
def one_core() -> Iterator[None]:
    """Holds the process to one core, where the system can."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def run(num_clips: int, seconds: float) -> dict[str, Any]:
    """Makes the clips and measures.

    Returns:
      What the JSON file holds: among others "examples_per_second" by the clock,
      "examples_per_core_second" by the processor time that the process used, which other work on
      the machine does not spoil, and of the stored frames "stored_frame", (height, width), and
      "stored_bytes", their mean size.
    """
    with tempfile.TemporaryDirectory() as folder, one_core():
        dataset = prepared_clips(Path(folder), num_clips)
        frames = dataset.splits["train"][0]["visual"]
        with Image.open(io.BytesIO(frames[0])) as image:
            width, height = image.size
        examples, elapsed, used = measure(dataset, seconds)
    shape = dataset.modalities["visual"].shape
    return {
        "examples_per_second": examples / elapsed,
        "examples_per_core_second": examples / used,
        "examples": examples,
        "frames_per_example": shape[0],
        "stored_frame": (height, width),
        "stored_bytes": round(sum(map(len, frames)) / len(frames)),
        "output_size": shape[1],
        "batch_size": BATCH_SIZE,
        "python": platform.python_version(),
        "pillow": Image.__version__,
        "machine": processor(),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--clips", type=int, default=192, help="clips to make (192)")
    parser.add_argument("--seconds", type=float, default=10.0, help="time to measure (10)")
    arguments = parser.parse_args(argv)
    result = run(arguments.clips, arguments.seconds)
    height, width = result["stored_frame"]
    print(
        f"{result['frames_per_example']} JPEG frames of {width} x {height} "
        f"({result['stored_bytes'] / 1000:.1f} kB each) to "
        f"{result['output_size']} x {result['output_size']}: "
        f"{result['examples_per_core_second']:.0f} examples/s a core "
        f"({result['examples_per_second']:.0f} by the clock), {result['machine']}"
    )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
