"""Frames kept as JPEG bytes: which of them to use; decoding, cropping and flipping on the host.

Everything here gives uint8; the model normalises on the device. The transformations are Grain's,
for the ``transforms`` of :mod:`rollingq_jax.data.pipeline`.
"""

import dataclasses
import io
import math
from collections.abc import Callable, Sequence
from typing import Any

import grain
import numpy as np

from rollingq_jax.data.media import (
    evenly_spaced,
)
from rollingq_jax.data.stored_frames import check_count
from rollingq_jax.data.types import Example

# Channel mean and deviation of ImageNet on the scale [0, 1], which upstream normalises with.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# (frames in the clip, frames wanted, generator) -> indices in ascending order.
Pick = Callable[[int, int, np.random.Generator], np.ndarray]
# (left, top, right, bottom) in pixels.
Box = tuple[int, int, int, int]


def random_frames(count: int, num: int, rng: np.random.Generator) -> np.ndarray:
    """``num`` of ``range(count)`` drawn uniformly with replacement, ascending, as upstream draws.

    Raises:
      DataError: ``count`` is 0.
    """
    check_count(count)
    return np.sort(rng.integers(count, size=num))


def segment_frames(count: int, num: int, rng: np.random.Generator | None = None) -> np.ndarray:
    """One frame from each of ``num`` equal segments: upstream's rule for Kinetics-Sounds, mended.

    With s = floor(count / num), segment i holds the frames i s .. i s + s - 1 (the remainder at
    the clip's end is not used). A generator draws one of them; without one it is the frame
    i s + max(floor(s / 2), 1) - 1. Frames count from 0 here, from 1 in upstream's files.

    Upstream writes the number behind ``frame_0000``, so that frame 10 and later have names that do
    not exist: in training 10 becomes 9, in evaluation the file is missing. Here there is no such
    limit. It also takes the first frame three times from clips of up to six frames; here the rule
    holds for every clip of ``num`` frames or more, and shorter ones repeat frames, evenly spaced.

    Raises:
      DataError: ``count`` is 0.
    """
    check_count(count)
    if count < num:
        return evenly_spaced(count, num)
    segment = count // num
    starts = segment * np.arange(num)
    if rng is None:
        return starts + max(segment // 2, 1) - 1
    return starts + rng.integers(segment, size=num)


def random_crop_box(
    width: int,
    height: int,
    rng: np.random.Generator,
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Box:
    """A random part of an image, as torchvision's RandomResizedCrop chooses it.

    Its share of the area is uniform in ``scale`` and the logarithm of its aspect ratio uniform in
    the range of ``ratio``. If ten draws do not fit into the image, the largest centred part whose
    aspect ratio lies in the range is taken.

    Returns:
      (left, top, right, bottom) in pixels, for Pillow.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * ratio[1])), min(height, round(width / ratio[0]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def decode_frames(
    frames: Sequence[bytes],
    indices: np.ndarray,
    size: int,
    choose_box: Callable[[int, int], Box] | None = None,
    flip: bool = False,
) -> np.ndarray:
    """Some frames of a clip, all with the same crop and flip.

    Args:
      frames: JPEG bytes of every frame, all of one size.
      indices: [T] those wanted; one that is wanted twice is decoded once.
      size: height and width of the result.
      choose_box: (width, height) of the frames -> the part to take; None takes all.
      flip: whether left and right change places.

    Returns:
      uint8 [T, size, size, 3]: the part scaled bilinearly, with antialiasing.
    """
    from PIL import Image

    video = np.empty((len(indices), size, size, 3), np.uint8)
    box: Box | None = None
    done: dict[int, int] = {}
    for place, index in enumerate(indices.tolist()):
        if index in done:
            video[place] = video[done[index]]
            continue
        done[index] = place
        with Image.open(io.BytesIO(frames[index]), formats=("JPEG",)) as file:
            if choose_box is not None and box is None:
                box = choose_box(*file.size)
            # Grey frames are scaled first and become RGB after: the same for a third of the work.
            image = file if file.mode in ("RGB", "L") else file.convert("RGB")
            image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = np.asarray(image)
        video[place] = pixels if pixels.ndim == 3 else pixels[:, :, None]
    return video


@dataclasses.dataclass(frozen=True)
class TrainFrames(grain.transforms.RandomMap):
    """Replaces a clip's JPEG frames by ``num`` drawn ones with one random crop and flip for all.

    Attributes:
      name: the modality, a sequence of JPEG bytes in the example; all of one size.
      num: frames wanted.
      size: height and width of the result, uint8 [num, size, size, 3].
      pick: which frames.
    """

    name: str
    num: int
    size: int
    pick: Pick = random_frames

    def random_map(self, element: Example, rng: np.random.Generator) -> Example:
        """One example."""
        frames: Any = element[self.name]
        indices = self.pick(len(frames), self.num, rng)
        flip = bool(rng.random() < 0.5)

        def choose_box(width: int, height: int) -> Box:
            return random_crop_box(width, height, rng)

        video = decode_frames(frames, indices, self.size, choose_box, flip)
        return {**element, self.name: video}


@dataclasses.dataclass(frozen=True)
class EvalFrames(grain.transforms.Map):
    """Replaces a clip's JPEG frames by fixed ones, whole and scaled without keeping the aspect.

    Attributes:
      name, num, size: as in :class:`TrainFrames`.
      pick: (frames in the clip, frames wanted) -> indices.
    """

    name: str
    num: int
    size: int
    pick: Callable[[int, int], np.ndarray] = evenly_spaced

    def map(self, element: Example) -> Example:
        """One example."""
        frames: Any = element[self.name]
        indices = self.pick(len(frames), self.num)
        return {**element, self.name: decode_frames(frames, indices, self.size)}
