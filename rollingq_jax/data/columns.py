"""Arrays of a user's own, checked and standardised, as a source of examples.

Each modality is one stored array per split, in memory or memory-mapped. Nothing is copied when a
split is opened: an example is converted when it is read. The checks read every value once, in
blocks, and the same pass over the training split gives the mean and standard deviation.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping

import jax.numpy as jnp
import numpy as np

from rollingq_jax.data.infer import doubt, infer_kind
from rollingq_jax.data.measure import Moments
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.types import Example, ModalityInfo
from rollingq_jax.errors import DataError

BLOCK_BYTES = 32 * 2**20
MAX_VOCABULARY = 1_000_000
_NO_NUMBERS = {
    "c": "; store real and imaginary part, or magnitude and phase, as two channels",
    "M": "; store numbers, as seconds since a moment",
    "m": "; store numbers, as seconds",
    **dict.fromkeys("SUT", "; store token ids [N, L], or use a manifest with text files"),
}


class ColumnSource:
    """The examples of one split: a `Preprocessing` and a stored array for each modality."""

    def __init__(
        self,
        columns: Mapping[str, Preprocessing],
        arrays: Mapping[str, np.ndarray],
        labels: np.ndarray,
        masks: Mapping[str, np.ndarray],
        qualities: Mapping[str, np.ndarray],
        groups: np.ndarray | None = None,
        ids: np.ndarray | None = None,
    ) -> None:
        self.columns, self.arrays, self.labels = dict(columns), dict(arrays), labels
        self.masks, self.qualities = dict(masks), dict(qualities)
        self.groups, self.ids = groups, ids  # beside the examples: a batch holds no strings

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"label": self.labels[index]}
        for name, column in self.columns.items():
            mask = self.masks[name][index] if name in self.masks else None
            example[name] = column.apply(_plain(self.arrays[name][index]), mask)
            if mask is not None:
                example[f"{name}_mask"] = np.asarray(mask)
        for name, quality in self.qualities.items():
            example[f"quality_{name}"] = quality[index]
        return example


def make_column(
    name: str,
    arrays: Mapping[str, np.ndarray],
    masks: Mapping[str, np.ndarray],
    kind: str | None,
    standardize: bool,
) -> Preprocessing:
    """The preprocessing of one modality, after every value in every split has been checked.

    Args:
      name: of the modality.
      arrays: {split: [N, ...]}.
      masks: {split: bool [N, L] or [N]}, or empty; False positions are not looked at.
      kind: what the user says it is, or None to go by shape and dtype.
      standardize: whether float modalities get mean 0 and standard deviation 1 over the training
        split: each feature of a sequence or vector, each channel of the other kinds.

    Raises:
      DataError: shapes differ between splits or do not fit the kind, a dtype is not numeric, a
        value is NaN or infinite, or a token id is out of range.
    """
    train = arrays["train"]
    _check_array(f"train/{name}", train, train.shape[1:], f"train/{name}")
    kind = kind or infer_kind(train.shape[1:], _plain(train[:0]).dtype, f"train/{name}")
    for split, array in arrays.items():
        _check_array(f"{split}/{name}", array, train.shape[1:], f"train/{name}")
    raw_shape = train.shape[1:]
    shape, _ = fit_shape(name, raw_shape, kind)
    dtypes = {_plain(array[:0]).dtype for array in arrays.values()}
    raw_dtype = str(dtypes.pop()) if len(dtypes) == 1 else "float32"
    if kind == "tokens":
        largest = max(_largest_token(f"{split}/{name}", array) for split, array in arrays.items())
        size = max(1 + largest, 2)  # the least that a table of embeddings may have
        return Preprocessing(
            ModalityInfo(name, kind, shape, "int32", vocab_size=size), raw_shape, raw_dtype
        )

    moments = Moments(shape[-1])
    for split, array in arrays.items():
        for values in _checked_blocks(f"{split}/{name}", array, masks.get(split)):
            if split == "train":
                moments.add(values.reshape(-1, shape[-1]))
    if kind in ("image", "video") and all(a.dtype == np.uint8 for a in arrays.values()):
        mean, std = (tuple(values.tolist()) for values in moments.mean_and_std(scale=255.0))
        pixels = ModalityInfo(name, kind, shape, "uint8", mean=mean, std=std)
        return Preprocessing(pixels, raw_shape, raw_dtype)
    if not standardize:
        return Preprocessing(ModalityInfo(name, kind, shape, "float32"), raw_shape, raw_dtype)
    standard = ModalityInfo(name, kind, shape, "float32", unit=1.0)
    center, scale = (tuple(values.tolist()) for values in moments.mean_and_std())
    return Preprocessing(standard, raw_shape, raw_dtype, center, scale)


def warn_of_doubts(infos: Iterable[ModalityInfo]) -> None:
    """Logs a line for each modality whose shape suggests another kind than the one inferred."""
    for line in filter(None, map(doubt, infos)):
        logging.getLogger(__name__).warning(line)


def _check_array(key: str, array: np.ndarray, shape: tuple[int, ...], reference: str) -> None:
    """Shape as in the training split, no empty axis, a numeric dtype."""
    dtype = _plain(array[:0]).dtype
    if dtype.kind not in "biuf":
        hint = _NO_NUMBERS.get(dtype.kind, "")
        raise DataError(f"{key}: dtype {dtype}; must be integer, float or boolean{hint}")
    if array.shape[1:] != shape:
        raise DataError(
            f"{key}: examples of shape {list(array.shape[1:])}, but {list(shape)} in {reference}; "
            "all splits need the same shape (pad or crop them)"
        )
    if 0 in array.shape:
        raise DataError(f"{key}: shape {list(array.shape)} has an axis of length 0")


def fit_shape(name: str, shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], bool]:
    """The example shape that the kind needs, and whether a last axis of size 1 is added for it.

    Raises:
      DataError: the kind is unknown, or does not fit with one more axis either.
    """
    try:
        return ModalityInfo(name, kind, shape).shape, False
    except DataError as error:
        try:
            return ModalityInfo(name, kind, (*shape, 1)).shape, True
        except DataError:
            raise error from None


def _blocks(array: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """(number of the first example, examples) in pieces of about BLOCK_BYTES."""
    step = max(1, BLOCK_BYTES // max(1, array.nbytes // len(array)))
    for start in range(0, len(array), step):
        yield start, _plain(np.asarray(array[start : start + step]))


def _plain(values: np.ndarray) -> np.ndarray:
    """The values; bfloat16, which stays so in a mapped file, as float32."""
    return values.astype(np.float32) if values.dtype == jnp.bfloat16 else values


def _checked_blocks(key: str, array: np.ndarray, mask: np.ndarray | None) -> Iterator[np.ndarray]:
    """The real values of each block, which must be finite as float32."""
    for start, block in _blocks(array):
        real = None if mask is None else mask[start : start + len(block)]
        if block.dtype.kind == "f":
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(block.astype(np.float32))
            if real is not None:
                bad &= real.reshape(real.shape + (1,) * (bad.ndim - real.ndim))
            if bad.any():
                first = start + int(np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))[0])
                split, name = key.split("/")
                raise DataError(
                    f"{key}: NaN or infinite values, first in example {first}; replace them, or "
                    f"mark positions that are not real in {split}/mask_{name}"
                )
        yield block if real is None else block[real]


def _largest_token(key: str, array: np.ndarray) -> int:
    """The largest token id, after the range has been checked."""
    if array.dtype.kind not in "iu":
        raise DataError(f"{key}: dtype {array.dtype}; token ids must be integers")
    low = min(int(block.min()) for _, block in _blocks(array))
    high = max(int(block.max()) for _, block in _blocks(array))
    if low < 0 or high >= MAX_VOCABULARY:
        raise DataError(
            f"{key}: integers from {low} to {high} cannot be token ids (0 to {MAX_VOCABULARY - 1}, "
            "0 pads); store measurements as float32"
        )
    return high
