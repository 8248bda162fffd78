"""What follows from the shapes of the data: a modality's kind, and a sensible small model.

Nothing here looks at values: the rules are fixed, so the same file always gives the same model.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from rollingq_jax.data.types import Dataset, ModalityInfo
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import embeddings

# What the class token attends to in one modality. More of it costs time without need in a first
# model; the user can set a finer patch.
MAX_TOKENS = {"image": 100, "spectrogram": 100, "video": 200}
LONG_VECTOR = 2000
PATCH_SIDES = (
    2,
    3,
    4,
    5,
    6,
    7,
    8,
    10,
    12,
    14,
    16,
    20,
    24,
    28,
    32,
    40,
    48,
    56,
    64,
    96,
    128,
    192,
    256,
)


def infer_kind(shape: tuple[int, ...], dtype: Any, name: str = "modality") -> str:
    """The kind of a modality whose examples have this shape and stored dtype.

    ======================== =======================================================
    one example              kind
    ======================== =======================================================
    [T, H, W, C]             video
    [H, W, C]                image; spectrogram where C = 1 and the dtype is not uint8
    [H, W] uint8             image (a channel axis is added)
    [L, D] of other dtypes   sequence
    [L] integer              tokens
    [D] float or bool        vector
    [] (one number)          as [1]; own arrays have to be said to be a modality
    ======================== =======================================================

    Raises:
      DataError: there are more axes than any kind has, or the dtype is not numeric.
    """
    dtype = np.dtype(dtype)
    if dtype.kind not in "biuf":
        raise DataError(f"{name}: dtype {dtype}; must be boolean, integer or float")
    if len(shape) > 4:
        raise DataError(
            f"{name}: shape {list(shape)} of one example; at most 4 axes [T, H, W, C] (video)"
        )
    if len(shape) == 2:
        return "image" if dtype == np.uint8 else "sequence"
    if dtype == np.bool_:
        dtype = np.dtype(np.float32)
    return embeddings.infer_kind((1, *(shape or (1,))), dtype)


def doubt(info: ModalityInfo) -> str | None:
    """A line where a shape allows the kind that was inferred, but suggests another meaning."""
    if info.kind == "vector" and info.dtype == "float32" and info.shape[0] >= LONG_VECTOR:
        return (
            f"{info.name}: {info.shape[0]} numbers become one token; if it is a waveform or a "
            "series, store a spectrogram [N, F, T, 1] or a sequence [N, L, D]"
        )
    channels = info.shape[-1]
    first = info.shape[:2] if info.kind == "video" else info.shape[:1]
    if info.kind in ("image", "video") and channels > 4 and {1, 3} & set(first):
        return (
            f"{info.name}: examples of shape {list(info.shape)} are read with {channels} channels "
            "last; if the channels come first, move them to the last axis"
        )
    return None


def infer_patch(info: ModalityInfo) -> tuple[int, ...] | None:
    """A patch for spectrograms and images (h, w) and videos (1, h, w); None for other kinds.

    The patch is square, of the smallest side that keeps to :data:`MAX_TOKENS`, or of one up to
    twice as large if less of the array is cut off at the edges. A side of the array shorter than
    the patch is one patch. Spectrograms are cut after their axes are swapped, so a spectrogram's
    patch is (time, frequency).
    """
    if info.kind not in MAX_TOKENS:
        return None
    frames = info.shape[0] if info.kind == "video" else 1
    height, width = info.shape[-3:-1]
    if info.kind == "spectrogram":
        height, width = width, height

    def patch(side: int) -> tuple[int, int]:
        return min(side, height), min(side, width)

    def count(side: int) -> int:
        h, w = patch(side)
        return frames * (height // h) * (width // w)

    def cut_off(side: int) -> int:
        h, w = patch(side)
        return height * width - (height // h * h) * (width // w * w)

    largest = max(height, width)
    candidates = [*(side for side in PATCH_SIDES if side < largest), largest]
    few = [side for side in candidates if count(side) <= MAX_TOKENS[info.kind]] or [largest]
    chosen = patch(min((side for side in few if side <= 2 * few[0]), key=cut_off))
    return (1, *chosen) if info.kind == "video" else chosen


def infer_encoders(
    modalities: Mapping[str, ModalityInfo], overrides: Mapping[str, Any] | None = None
) -> dict[str, dict[str, Any]]:
    """A spec for ``config.model.encoders`` for every modality.

    Args:
      modalities: what the data set holds.
      overrides: {modality: {field: value}}; a field that is given and not None wins.

    Returns:
      {modality: {"kind": ..., and where they apply "patch", "vocab_size", "mean", "std"}}.

    Raises:
      ConfigError: an override names a modality that is not there, or a kind that the arrays as
        loaded do not fit.
    """
    overrides = {} if overrides is None else overrides
    for name in overrides:
        if name not in modalities:
            raise ConfigError(
                f"model.encoders.{name}: the data have no such modality; "
                f"there are {', '.join(sorted(modalities))}"
            )
    encoders = {}
    for name, info in sorted(modalities.items()):
        given = {
            field: value
            for field, value in dict(overrides.get(name) or {}).items()
            if value is not None
        }
        kind = given.get("kind", info.kind)
        if kind != info.kind:
            try:
                info = ModalityInfo(
                    name, kind, info.shape, info.dtype, mean=info.mean, std=info.std
                )
            except DataError as error:
                raise ConfigError(f"model.encoders.{name}.kind: {error}") from None
        spec = {
            "kind": kind,
            "patch": infer_patch(info),
            "vocab_size": info.vocab_size,
            "mean": info.mean,
            "std": info.std,
        }
        encoders[name] = {field: v for field, v in spec.items() if v is not None} | given
    return encoders


def infer_model(dataset: Dataset, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of ``config.model`` for a data set: a small model that trains on a CPU.

    Args:
      dataset: its modalities and number of classes are used.
      overrides: {field: value}; a field that is given and not None wins (``num_classes`` if not 0),
        and ``encoders`` is completed as in :func:`infer_encoders`.

    Returns:
      The overrides with ``num_classes``, ``dim``, ``depth``, ``num_heads`` and ``encoders`` set.

    Raises:
      ConfigError: as in :func:`infer_encoders`, or ``num_classes`` is less than the data need.
    """
    given = {} if overrides is None else dict(overrides.items())
    given = {name: value for name, value in given.items() if value is not None}
    model = {"dim": 64, "depth": 2, "num_heads": 4} | given
    model["num_classes"] = given.get("num_classes") or dataset.num_classes
    if model["num_classes"] < dataset.num_classes:
        raise ConfigError(
            f"model.num_classes: {model['num_classes']}; the data have {dataset.num_classes}"
        )
    model["encoders"] = infer_encoders(dataset.modalities, given.get("encoders"))
    return model


def num_tokens(info: ModalityInfo, patch: tuple[int, ...] | None) -> int:
    """Tokens of one example after patching, without the class token."""
    if info.kind == "vector":
        return 1
    if info.kind in ("sequence", "tokens"):
        return info.shape[0]
    grid = info.shape[:-1]
    if info.kind == "spectrogram":
        grid = grid[::-1]
    return math.prod(side // size for side, size in zip(grid, patch or (), strict=True))
