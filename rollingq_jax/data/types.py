"""What a data set is: examples by number, and what each modality of an example looks like.

An example is a dict of NumPy arrays without a batch axis: ``"<m>"`` for each modality m,
``"label"`` (an int32 scalar), and where they apply ``"<m>_mask"`` (bool, True = real position, or a
bool scalar, False = the modality is missing) and ``"quality_<m>"`` (float32 scalar, minus the
standard deviation of the noise in the modality, in training-set standard deviations). Layouts are
channels last.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from rollingq_jax.errors import DataError

Example = dict[str, np.ndarray]

# Before a modality's name: whether an example keeps it under "drop" because it is its last.
KEPT = "kept/"

KINDS = ("image", "sequence", "spectrogram", "tokens", "vector", "video")
_RANKS = {"image": 3, "sequence": 2, "spectrogram": 3, "tokens": 1, "vector": 1, "video": 4}


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    The pipeline may read from several threads at once, so ``__getitem__`` must be thread-safe, and
    the same number must give the same example each time.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ModalityInfo:
    """One modality of an example.

    Attributes:
      name: its key in an example.
      kind: one of :data:`KINDS`.
      shape: of one example: image [H, W, C]; spectrogram [F, T, 1]; video [T, H, W, C]; sequence
        [L, D]; tokens [L]; vector [D].
      dtype: of the stored array: "float32", "uint8" (images and video) or "int32" (tokens).
      vocab_size: for tokens, the number of ids, padding (0) included.
      mean, std: for uint8, the channels' mean and standard deviation on the scale [0, 1]; the model
        normalises on the device.
      unit: for float32, one standard deviation of the training split (before any noise that the
        data set adds), in the array's units; None where that is not known.

    Raises:
      DataError: the kind is unknown, or the shape does not fit it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    vocab_size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    unit: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise DataError(
                f"modality {self.name!r}: kind {self.kind!r} is not one of {', '.join(KINDS)}"
            )
        if len(self.shape) != _RANKS[self.kind]:
            raise DataError(
                f"modality {self.name!r}: an example of kind {self.kind!r} has "
                f"{_RANKS[self.kind]} axes, got shape {tuple(self.shape)}"
            )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of examples and what is in them.

    Attributes:
      splits: name -> source; "train" and "test" always, "valid" wherever settings or checkpoints
        are to be chosen.
      modalities: name -> :class:`ModalityInfo`, in alphabetical order.
      num_classes: labels are 0 .. num_classes - 1.
      class_names: one for each class; empty where the data set has none.
      description: what the data are and how they were made, for logs and reports.
      train_transforms, eval_transforms: what turns a source's example into the one that
        ``modalities`` describes, where that is not done by the source itself (frames kept as JPEG
        bytes are decoded and cropped here): Grain Map and RandomMap, for the pipeline's
        ``transforms``, before any others.
      preprocessing: name -> `rollingq_jax.data.preprocessing.Preprocessing`, how a raw array of
        the modality became what the source gives; one that is not in it is given as it is stored.
    """

    splits: Mapping[str, Source]
    modalities: dict[str, ModalityInfo]
    num_classes: int
    class_names: tuple[str, ...] = ()
    description: str = ""
    train_transforms: tuple[Any, ...] = ()
    eval_transforms: tuple[Any, ...] = ()
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise DataError(
                f"class_names: {len(self.class_names)} names for {self.num_classes} classes"
            )
        object.__setattr__(self, "modalities", dict(sorted(self.modalities.items())))


class ArraySource:
    """Examples held in memory as columns: ``{"audio": [N, ...], "label": [N], ...}``.

    An example's arrays are views of the columns, so a transformation must not write into them.

    Raises:
      DataError: the columns differ in length, or there are none.
    """

    def __init__(self, columns: Mapping[str, np.ndarray]) -> None:
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if len(set(lengths.values())) != 1:
            counts = ", ".join(f"{name} {count}" for name, count in lengths.items())
            raise DataError(
                f"columns must have the same number of examples, got {counts or 'none'}"
            )
        self._length = next(iter(lengths.values()))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Example:
        return {name: column[index] for name, column in self.columns.items()}


class Subset:
    """The examples of another source whose numbers are given, in the order given."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]
