"""A data set: modalities, labels, splits, a fingerprint, and the model that its shapes suggest.

An example is a dict of NumPy arrays without a batch axis: `"<m>"` for each modality m, `"label"`
(see `TASKS`), and where they apply `"<m>_mask"` (bool, True = real position, or a bool scalar,
False = the modality is missing) and `"quality_<m>"` (float32 scalar, minus the standard deviation
of the noise in the modality, in training-set standard deviations). Layouts are channels last.
"""

import dataclasses
import hashlib
import itertools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.models import infer_kind as kind_of_batch
from rollingq_jax.models.spec import KINDS, RESNET, token_grid

_logger = logging.getLogger(__name__)

Example = dict[str, np.ndarray]
SPLITS = ("train", "valid", "test")
# What is learned, and an example's label: one of C classes, an int32 scalar; any of C labels, int32
# [C] of 0 and 1; K numbers, float32 [K].
TASKS = SINGLE_LABEL, MULTI_LABEL, REGRESSION = ("single_label", "multi_label", "regression")
# Before a modality's name: whether an example keeps it under "drop" because it is its last.
KEPT = "kept/"


@runtime_checkable
class Source(Protocol):
    """Random access to the examples of one split.

    The pipeline may read from several threads at once, so `__getitem__` must be thread-safe, and
    the same number must give the same example each time.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


@dataclasses.dataclass(frozen=True)
class ModalityInfo:
    """One modality of an example.

    Attributes:
      name: its key in an example.
      kind: one of `rollingq_jax.models.spec.KINDS`.
      shape: of one example: image [H, W, C]; spectrogram [F, T, 1]; video [T, H, W, C]; sequence
        [L, D]; tokens [L]; vector [D].
      dtype: of the stored array: "float32", "uint8" (images and video) or "int32" (tokens).
      vocab_size: for tokens, the number of ids, padding (0) included.
      mean, std: for uint8, the channels' mean and standard deviation on the scale [0, 1]; the model
        normalizes on the device.
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
                f"modality {self.name!r}: kind {self.kind!r} is not one of "
                f"{', '.join(sorted(KINDS))}"
            )
        if len(self.shape) != len(KINDS[self.kind]):
            raise DataError(
                f"modality {self.name!r}: an example of kind {self.kind!r} has "
                f"{len(KINDS[self.kind])} axes, got shape {tuple(self.shape)}"
            )


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Splits of examples and what is in them.

    Attributes:
      splits: name -> source; "train" and "test" always, "valid" wherever settings or checkpoints
        are to be chosen.
      modalities: name -> `ModalityInfo`, in alphabetical order.
      num_classes: labels are 0 .. num_classes - 1; of other tasks the length of a label.
      class_names: one for each class, or number of a label; empty where the data set has none.
      description: what the data are and how they were made, for logs and reports.
      train_transforms, eval_transforms: what turns a source's example into the one that
        `modalities` describes, where that is not done by the source itself (frames kept as JPEG
        bytes are decoded and cropped here): Grain Map and RandomMap, for the pipeline's
        `transforms`, before any others.
      preprocessing: name -> `rollingq_jax.data.preprocessing.Preprocessing`, how a raw array of
        the modality became what the source gives; one that is not in it is given as it is stored.
      task: one of `TASKS`.
    """

    splits: Mapping[str, Source]
    modalities: dict[str, ModalityInfo]
    num_classes: int
    class_names: tuple[str, ...] = ()
    description: str = ""
    train_transforms: tuple[Any, ...] = ()
    eval_transforms: tuple[Any, ...] = ()
    preprocessing: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    task: str = SINGLE_LABEL

    @property
    def learned(self) -> str:
        """What is learned, in words."""
        count = self.num_classes
        if self.task == SINGLE_LABEL:
            return f"{count} classes"
        if self.task == MULTI_LABEL:
            return f"{count} labels, any number an example"
        return f"regression of {count} value{'s' if count > 1 else ''}"

    def __post_init__(self) -> None:
        if self.class_names and len(self.class_names) != self.num_classes:
            raise DataError(
                f"class_names: {len(self.class_names)} names for {self.num_classes} classes"
            )
        object.__setattr__(self, "modalities", dict(sorted(self.modalities.items())))


class ArraySource:
    """Examples held in memory as columns: `{"audio": [N, ...], "label": [N], ...}`.

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

    @property
    def labels(self) -> np.ndarray | None:
        """The labels of all examples, where they have any."""
        return self.columns.get("label")


class Subset:
    """The examples of another source whose numbers are given, in the order given."""

    def __init__(self, source: Source, indices: Sequence[int] | np.ndarray) -> None:
        self.source = source
        self.indices = np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Example:
        return self.source[int(self.indices[index])]


class Joined:
    """The examples of several sources, one source after the other."""

    def __init__(self, *sources: Source) -> None:
        self.sources = sources
        self._ends = np.cumsum([len(source) for source in sources])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Example:
        part = int(np.searchsorted(self._ends, index, side="right"))
        return self.sources[part][index - int(self._ends[part - 1] if part else 0)]


class Changed:
    """The examples of another source, each as a function makes it of that one and its number.

    Attributes:
      source: the other one.
      labels, ids: of all examples; None where they are those of `source`.
    """

    def __init__(
        self,
        source: Source,
        change: Callable[[Example, int], Example],
        labels: np.ndarray | None = None,
        ids: Sequence[str] | None = None,
    ) -> None:
        self.source, self.labels, self.ids = source, labels, ids
        self._change = change

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        return self._change(self.source[index], index)


def infer_kind(shape: tuple[int, ...], dtype: Any, name: str = "modality") -> str:
    """Infers the kind of a modality whose examples have this shape and stored dtype.

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
        raise DataError(f"{name}: dtype {dtype}; allowed: boolean, integer or float")
    if len(shape) > 4:
        raise DataError(
            f"{name}: shape {list(shape)} of one example; at most 4 axes [T, H, W, C] (video)"
        )
    if len(shape) == 2:
        return "image" if dtype == np.uint8 else "sequence"
    if dtype == np.bool_:
        dtype = np.dtype(np.float32)
    return kind_of_batch((1, *(shape or (1,))), dtype)


def fit_shape(name: str, shape: tuple[int, ...], kind: str) -> tuple[tuple[int, ...], bool]:
    """The example shape that the kind needs, and whether a last axis of size 1 is added for it.

    Raises:
      DataError: the kind is unknown, or does not fit with one more axis either.
    """
    if len(shape) + 1 == len(KINDS.get(kind, ())):
        return (*shape, 1), True
    return ModalityInfo(name, kind, shape).shape, False


LONG_VECTOR = 2000


def warn_suspicious_shape(info: ModalityInfo) -> None:
    """Logs a line where a shape allows the kind that was inferred, but suggests another meaning."""
    if info.kind == "vector" and info.dtype == "float32" and info.shape[0] >= LONG_VECTOR:
        _logger.warning(
            f"{info.name}: {info.shape[0]} numbers become one token; if it is a waveform or a "
            "series, store a spectrogram [N, F, T, 1] or a sequence [N, L, D]"
        )
    channels = info.shape[-1]
    first = info.shape[:2] if info.kind == "video" else info.shape[:1]
    if info.kind in ("image", "video") and channels > 4 and {1, 3} & set(first):
        _logger.warning(
            f"{info.name}: examples of shape {list(info.shape)} are read with {channels} channels "
            "last; if the channels come first, move them to the last axis"
        )


def labels_of(source: Source) -> np.ndarray:
    """All labels of a source, int32 [N] or as `TASKS` says [N, ...]; examples are read only where
    nothing else knows them."""
    known = _known(source, "labels")
    return _as_labels(
        known if known is not None else [source[index]["label"] for index in range(len(source))]
    )


def _as_labels(values: Any) -> np.ndarray:
    values = np.asarray(values)
    return values.astype(np.float32 if values.dtype.kind == "f" else np.int32, copy=False)


def groups_of(source: Source) -> np.ndarray | None:
    """The group of each example of a source, int64 or strings [N]; None where it has none."""
    return _known(source, "groups")


def ids_of(source: Source) -> np.ndarray | None:
    """The id of each example of a source, int64 or strings [N]; None where it has none."""
    return _known(source, "ids")


def _known(source: Any, name: str) -> np.ndarray | None:
    """What a source, or the one that it stands around, states of all its examples; else None."""
    own = getattr(source, name, None)
    if own is not None:
        return np.asarray(own)
    if isinstance(source, Joined):
        parts = [_known(one, name) for one in source.sources]
        stated = [part for part in parts if part is not None]
        return np.concatenate(stated) if len(stated) == len(parts) else None
    inner = getattr(source, "source", None)
    known = None if inner is None else _known(inner, name)
    if known is None:
        return None
    if isinstance(source, Subset):
        return known[source.indices]
    return known if len(known) == len(source) else None  # else they are not its own, one by one


MAX_CLASSES = 100_000
SEPARATORS = "|;,"  # between the names of an example's labels


class Labels(NamedTuple):
    """What is learned, and the labels of each split.

    Attributes:
      task: one of `TASKS`.
      values: {split: [N, ...]}, as `TASKS` says.
      num_classes: C, or K of a regression.
      class_names: one for each; empty where the data have none.
    """

    task: str
    values: dict[str, np.ndarray]
    num_classes: int
    class_names: tuple[str, ...] = ()


def read_labels(
    labels: Mapping[str, np.ndarray], class_names: Sequence[str] = (), task: str = "auto"
) -> Labels:
    """Labels as the task has them.

    Args:
      labels: {split: [N, ...]}: for one class of several as `encode_labels` takes them; for any
        number of labels [N, C] of 0 and 1, or [N] strings of names with one of `SEPARATORS`
        between; for a regression [N] or [N, K] numbers.
      class_names: in the order of the numbers.
      task: one of `TASKS`, or "auto": what the labels can only be, see `infer_task`.

    Raises:
      DataError: as `encode_labels` and `count_classes`; or the labels are not of the task.
    """
    labels = {split: np.asarray(values) for split, values in labels.items()}
    task = infer_task(labels) if task == "auto" else task
    if task == SINGLE_LABEL:
        values, class_names = encode_labels(labels, class_names)
        return Labels(task, values, count_classes(values, class_names), class_names)
    class_names = _check_class_names(class_names)
    # Of train only: a name that stands in another split alone could not be learned, and is refused.
    if task == MULTI_LABEL and not class_names and _are_texts(labels["train"]):
        texts = labels["train"].tolist()
        class_names = tuple(sorted({name for text in texts for name in split_names(text)}))
    values = {s: label_array(v, task, class_names, f"{s}/label") for s, v in labels.items()}
    train = values["train"]
    width = train.shape[1]
    for split, array in values.items():
        if array.shape[1] != width:
            raise DataError(
                f"{split}/label: {array.shape[1]} numbers an example; allowed: {width}, as in train"
            )
    if class_names and len(class_names) != width:
        raise DataError(f"class_names: {len(class_names)} names for labels of {width} numbers")
    # A value that never changes has no deviation by which a regression could standardize it; of a
    # set of labels one may well be rare, so the others are learned without it.
    alike = np.flatnonzero((train == train[:1]).all(axis=0))
    if len(alike) == width or (len(alike) and task == REGRESSION):
        raise DataError(
            f"train/label: column {alike[0]} is {train[0, alike[0]]:g} throughout, so nothing can "
            "be learned of it; leave it out"
        )
    if len(alike):
        _logger.warning(
            f"train/label: {len(alike)} of {width} labels are the same in every example, the first "
            f"of them {alike[0]}; they cannot be learned"
        )
    return Labels(task, values, width, class_names)


def infer_task(labels: Mapping[str, np.ndarray]) -> str:
    """What labels can only be; else the choice of one class, whose reader refuses what is none.

    [N] or [N, 1] floats with a fraction in one of them: a regression. [N, C] of 0 and 1 with a row
    that has not one 1: any number of labels.
    """
    arrays = list(labels.values())
    if all(a.dtype.kind in "biuf" for a in arrays):
        flat = all(a.ndim == 1 or (a.ndim == 2 and a.shape[1] == 1) for a in arrays)
        if flat and any((a[np.isfinite(a)] % 1 != 0).any() for a in arrays):
            return REGRESSION
        sets = all(a.ndim == 2 and a.shape[1] > 1 and np.isin(a, (0, 1)).all() for a in arrays)
        if sets and any((a.sum(axis=1) != 1).any() for a in arrays):
            return MULTI_LABEL
    return SINGLE_LABEL


def split_names(text: str | bytes) -> list[str]:
    """The names of an example's labels, without spaces around them."""
    parts = re.split(f"[{SEPARATORS}]", as_text(text))
    return [name for part in parts if (name := part.strip())]


def label_text(label: Any, task: str, classes: Sequence[str], form: str = ".8g") -> str:
    """An example's label as a table of predictions has it; of a set of no labels a separator."""
    if task == SINGLE_LABEL:
        return classes[label]
    if task == REGRESSION:
        return SEPARATORS[0].join(format(value, form) for value in label)
    names = (name for name, given in zip(classes, label, strict=True) if given)
    return SEPARATORS[0].join(names) or SEPARATORS[0]


def label_array(
    labels: np.ndarray, task: str, class_names: Sequence[str], where: str
) -> np.ndarray:
    """Sets of labels as int32 [N, C], or the values of a regression as float32 [N, K].

    Args:
      labels: [N, C], [N] or [N, K] numbers; or [N] strings, of names or of numbers.
      task: `MULTI_LABEL` or `REGRESSION`.
      class_names: those that a set of names is made of.
      where: the labels are, for messages.

    Raises:
      DataError: they are not of the task, a name is not known, or a number is NaN or infinite.
    """
    texts = list(map(as_text, labels.tolist())) if _are_texts(labels) else None
    if task == MULTI_LABEL:
        if texts is not None:
            labels = _encode_sets(texts, class_names, where)
        numbers = labels.dtype.kind in "biuf" and labels.ndim == 2 and labels.size
        if not numbers or not np.isin(labels, (0, 1)).all():
            raise DataError(
                f"{where}: {labels.dtype}{list(labels.shape)}; allowed with data.task multi_label: "
                f"[N, C] of 0 and 1, or [N] names with one of {' '.join(SEPARATORS)} between"
            )
        return labels.astype(np.int32)
    if texts is not None:
        labels = _read_numbers(texts, where)
    if labels.dtype.kind not in "biuf" or labels.ndim not in (1, 2) or not labels.size:
        raise DataError(
            f"{where}: {labels.dtype}{list(labels.shape)}; allowed with data.task regression: [N] "
            "or [N, K] numbers"
        )
    with np.errstate(over="ignore"):
        values = labels.astype(np.float32).reshape(len(labels), -1)
    if not np.isfinite(values).all():
        raise DataError(f"{where}: NaN or infinite values; allowed: finite numbers")
    return values


def _are_texts(labels: np.ndarray) -> bool:
    return labels.dtype.kind in "SUT" and labels.ndim == 1


def _encode_sets(labels: Sequence[str], class_names: Sequence[str], where: str) -> np.ndarray:
    place = {name: number for number, name in enumerate(class_names)}
    encoded = np.zeros((len(labels), len(class_names)), np.int32)
    for row, label in enumerate(labels):
        names = split_names(label)
        if unknown := [name for name in names if name not in place]:
            raise DataError(
                f"{where}: {unknown[0][:60]!r} is none of the labels {', '.join(class_names[:20])} "
                "(those of train, or class_names)"
            )
        encoded[row, [place[name] for name in names]] = 1
    return encoded


def _read_numbers(labels: Sequence[str], where: str) -> np.ndarray:
    """Numbers with | or ; between, each with a decimal point or comma."""
    rows = []
    for label in labels:
        try:
            rows.append([float(part.replace(",", ".")) for part in re.split("[|;]", label)])
        except ValueError:
            raise DataError(
                f"{where}: {label[:60]!r}; allowed with data.task regression: numbers"
            ) from None
    if len({len(row) for row in rows}) > 1:
        raise DataError(f"{where}: examples have different numbers of values; allowed: one number")
    return np.array(rows, np.float64)


def check_labels(labels: np.ndarray, where: str) -> np.ndarray:
    """Labels as int32 [N]; floats that are whole numbers are read as such.

    Raises:
      DataError: they are not the choice of one class each, have not one axis, are not numbers,
        negative, none, or too large to be class numbers.
    """
    labels = np.asarray(labels)
    if labels.dtype.kind == "f":
        if not np.isfinite(labels).all():
            raise DataError(f"{where}: NaN or infinite labels; allowed: class numbers")
        if (labels != np.floor(labels)).any():
            raise DataError(
                f"{where}: values such as {labels[labels != np.floor(labels)][0]:g}; allowed: "
                "class numbers or names, or with data.task regression any numbers"
            )
    # Before the axes are: what has several may be of another task, which the message names.
    if labels.ndim == 2 and labels.shape[1] > 1 and labels.dtype.kind in "biuf":
        ones = (labels == 1).sum(axis=1)
        if not np.isin(labels, (0, 1)).all() or (ones != 1).any():
            raise DataError(
                f"{where}: shape {list(labels.shape)}, and not one 1 in every row; allowed: [N] "
                "class numbers, with data.task multi_label [N, C] of 0 and 1, with data.task "
                "regression [N, K] numbers"
            )
    if labels.ndim != 1:
        hint = ""
        if labels.ndim == 2:
            hint = "; ravel it" if labels.shape[1] == 1 else "; take the argmax of one-hot rows"
        raise DataError(f"{where}: shape {list(labels.shape)}; allowed: [N] class numbers{hint}")
    if labels.dtype.kind not in "biuf":
        raise DataError(
            f"{where}: dtype {labels.dtype}; allowed: integers from 0, or in every split names"
        )
    if len(labels) == 0:
        raise DataError(f"{where}: no examples; at least 1")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= MAX_CLASSES:
        raise DataError(
            f"{where}: labels from {low} to {high}; class numbers go from 0 to at most "
            f"{MAX_CLASSES - 1}; if they are values to be predicted, set data.task to regression"
        )
    return labels.astype(np.int32)


def encode_labels(
    labels: Mapping[str, np.ndarray], class_names: Sequence[str] = ()
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Class numbers as they are; names as their numbers.

    Args:
      labels: {split: [N]}, integers, or in every split strings (bytes count as such). Strings that
        all are numbers are read as class numbers, unless they are among the class names.
      class_names: in the order of the numbers; without them, names are numbered in alphabetical
        order of those in train.

    Returns:
      {split: int32 [N]}, and the class names, () where the data have none.

    Raises:
      DataError: as `check_labels` and `_check_class_names`; names among numbers, an
        empty name, or one that is not known.
    """
    class_names = _check_class_names(class_names)
    labels = {split: np.asarray(values) for split, values in labels.items()}
    names = {}  # in every split strings that are no class numbers; a file of text has only strings
    if all(map(_are_texts, labels.values())):
        names = {s: [as_text(value).strip() for value in v.tolist()] for s, v in labels.items()}
        every = set().union(*names.values())
        if every and all(map(is_class_number, every)) and not every <= set(class_names):
            labels = {
                split: np.array(list(map(int, of_split))) for split, of_split in names.items()
            }
            names = {}
    if not names:
        return {s: check_labels(v, f"{s}/label") for s, v in labels.items()}, class_names
    known = class_names or _check_class_names(sorted(set(names["train"])), "train/label")
    number_of = {name: number for number, name in enumerate(known)}
    for split, of_split in names.items():
        if unknown := [name for name in of_split if name not in number_of]:
            why = (
                "is not in class_names"
                if class_names
                else "never occurs in train, so it cannot be learned; put examples of it into "
                "train or leave it out"
            )
            raise DataError(f"{split}/label: {unknown[0][:60]!r} {why}")
    numbers = {s: np.array([number_of[n] for n in of_s], np.int32) for s, of_s in names.items()}
    return {s: check_labels(v, f"{s}/label") for s, v in numbers.items()}, tuple(known)


def is_class_number(label: str) -> bool:
    """Tells a label that is written as a number."""
    return re.fullmatch(r"-?[0-9]{1,9}", label) is not None


def _check_class_names(names: Sequence[str], where: str = "class_names") -> tuple[str, ...]:
    """The names, without spaces around them, if they tell the classes apart.

    Raises:
      DataError: one is empty, or two are the same.
    """
    stripped = tuple(name.strip() for name in names)
    seen: dict[str, int] = {}
    for number, name in enumerate(stripped):
        if not name:
            raise DataError(f"{where}: the name of class {number} is empty")
        if (first := seen.setdefault(name, number)) < number:
            raise DataError(
                f"{where}: {name[:60]!r} names class {first} and class {number}; each needs a name "
                "of its own"
            )
    return stripped


def count_classes(labels: Mapping[str, np.ndarray], class_names: Sequence[str] = ()) -> int:
    """One more than the largest label, or the number of class names where there are any.

    A number that no training example has is an output without use: it gets a warning.

    Args:
      labels: {split: int32 [N]}.
      class_names: what the data say the classes are called.

    Raises:
      DataError: a label in another split never occurs in train (the model could not learn it; move
        some of its examples), fewer than two classes, or fewer names than classes.
    """
    known = set(np.unique(labels["train"]).tolist())
    for split, values in labels.items():
        if unknown := sorted(set(np.unique(values).tolist()) - known):
            shown = ", ".join(map(str, unknown[:5])) + (", ..." if len(unknown) > 5 else "")
            raise DataError(
                f"{split}/label: {shown} never occurs in train/label, so it cannot be learned; put "
                "examples of it into train or leave it out"
            )
    if len(known) < 2:
        raise DataError(f"train/label: only the label {known.pop()}; at least 2 classes are needed")
    # By the largest number, not by how many occur: numbers stay what the data call the classes.
    num_classes = max(known) + 1
    if class_names and len(class_names) < num_classes:
        raise DataError(
            f"class_names: {len(class_names)} names, but labels go up to {num_classes - 1}"
        )
    num_classes = len(class_names) or num_classes
    if unused := num_classes - len(known):
        first = next(number for number in range(num_classes) if number not in known)
        low, high = min(known), max(known)
        found = f"{low} and {high:,}" if len(known) == 2 else f"{low} to {high:,}"
        named = f" ({class_names[first]!r})" if class_names else ""
        never = f"class {first}{named} never occurs"
        if unused > 1:
            never = f"{unused:,} classes never occur, the first of them {first}{named}"
        if class_names:
            hint = "give examples of every class, or leave its name out"
        elif low == 1 and unused == 1:
            hint = "subtract 1 if the labels are meant to begin at 1"
        else:
            hint = f"number the classes from 0 to {len(known) - 1}, or give names as labels"
        _logger.warning(
            f"train/label: labels {found}: {never}; the model gets {num_classes:,} outputs for "
            f"{len(known):,} classes; {hint}"
        )
    return num_classes


def check_tags(values: np.ndarray, where: str) -> np.ndarray:
    """Groups or ids: int64 [N], or strings [N] (bytes are decoded).

    Raises:
      DataError: not one axis, neither integers nor strings, or an empty string.
    """
    values = np.asarray(values)
    if values.ndim != 1 or values.dtype.kind not in "iuSUT":
        raise DataError(
            f"{where}: {values.dtype}{list(values.shape)}; allowed: [N] integers or strings"
        )
    if values.dtype.kind in "iu":
        if len(values) and values.max() > np.iinfo(np.int64).max:
            raise DataError(f"{where}: {values.max()} is too large for a 64-bit signed integer")
        return values.astype(np.int64)
    values = np.array([as_text(value) for value in values.tolist()], str)
    if len(empty := np.flatnonzero(values == "")):
        raise DataError(f"{where}: example {empty[0]} has an empty one; give every example its own")
    return values


def as_text(value: Any) -> str:
    """A string, or bytes in UTF-8; other bytes are written as escapes."""
    return value.decode("utf-8", "backslashreplace") if isinstance(value, bytes) else str(value)


def warn_of_shared_groups(groups: Mapping[str, np.ndarray]) -> None:
    """Logs, for each two splits, how many groups have examples in both of them."""
    for first, second in itertools.combinations(groups, 2):
        shared = np.intersect1d(groups[first], groups[second])
        if len(shared):
            stand = "groups stand" if len(shared) > 1 else "group stands"
            _logger.warning(
                f"{len(shared)} {stand} in both {first} and {second} (such as "
                f"{shared[0].item()!r}): what is learned of a group by heart counts as success "
                "there"
            )


RESERVED_NAMES = ("example", "group", "id", "label", "split")


def check_name(name: str, where: str) -> str:
    """The modality's name, if it can be a key of a batch and of a configuration.

    Raises:
      DataError: it is not an identifier, or means something else in a batch.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name):
        raise DataError(
            f"{where}: modality name {name!r}; allowed: letters, digits and _, a letter first"
        )
    if name in RESERVED_NAMES or name.endswith("_mask") or name.startswith(("quality_", "mask_")):
        raise DataError(f"{where}: modality name {name!r} has a meaning of its own; rename it")
    return name


VALID_FRACTION = 0.1
TEST_FRACTION = 0.2


def complete_splits(splits: Mapping[str, Source], *, seed: int) -> dict[str, Source]:
    """The splits, with "test" and "valid" taken out of "train" where they are missing.

    Warns of groups that stand in two of the given splits.

    Raises:
      DataError: as `with_test` and `with_valid`.
    """
    groups = {split: groups_of(source) for split, source in splits.items()}
    warn_of_shared_groups({split: found for split, found in groups.items() if found is not None})
    return with_valid(with_test(splits), seed=seed)


def with_valid(splits: Mapping[str, Source], *, seed: int) -> dict[str, Source]:
    """The splits, with 10 % of train as "valid" where there is none.

    Without groups each class gives 10 % of its examples, rounded; where that comes to nothing at
    all (few examples of every class), each class with two or more gives one. Groups are kept whole,
    so that the sizes are as near to that as they allow. No class is left without a training
    example.

    Args:
      splits: with "train", of which `labels_of` and `groups_of` are used.
      seed: of the choice.

    Raises:
      DataError: none can be spared: every class has a single example, or every group a class that
        no other has.
    """
    return _with_part(splits, "valid", VALID_FRACTION, seed, "validation; give valid/*")


def without_valid(dataset: Dataset) -> Dataset:
    """The data set, its validation examples behind those of train."""
    splits = dict(dataset.splits)
    splits["train"] = Joined(splits["train"], splits.pop("valid"))
    description = f"{dataset.description}; the validation part is trained on"
    return dataclasses.replace(dataset, splits=splits, description=description)


def with_test(splits: Mapping[str, Source]) -> dict[str, Source]:
    """The splits, with 20 % of train as "test" where there is none; for data in a single table.

    The choice is as in `with_valid`, but always the same: whatever is chosen by training with
    several seeds, no run has seen another's test examples. What is left in train can serve
    `with_valid`.

    Raises:
      DataError: as `with_valid`.
    """
    further = "valid" not in splits
    return _with_part(splits, "test", TEST_FRACTION, 0, "the test; give test/*", further)


def strata_of(labels: np.ndarray) -> np.ndarray:
    """Of what an automatic split takes equal shares, int [N]: the classes; of sets of labels the
    rarest label of each; of values the tenths of the first.
    """
    if labels.ndim == 1:
        return labels
    if labels.dtype.kind == "f":
        edges = np.quantile(labels[:, 0], np.linspace(0, 1, 11)[1:-1])
        return np.searchsorted(edges, labels[:, 0], side="right")
    counts = np.where(labels > 0, labels.sum(axis=0), len(labels) + 1)
    return np.where(labels.any(axis=1), counts.argmin(axis=1), -1)


def _with_part(
    splits: Mapping[str, Source],
    name: str,
    fraction: float,
    seed: int,
    purpose: str,
    further: bool = False,
) -> dict[str, Source]:
    """The splits, with a fraction of train under this name where there is no such split."""
    if name in splits:
        return dict(splits)
    source = splits["train"]
    labels, groups = strata_of(labels_of(source)), groups_of(source)
    if groups is not None:
        chosen = hold_out_groups(labels, groups, fraction, seed=seed, further=further)
        if len(chosen) == 0:
            count = len(np.unique(groups))
            why = "every group has a label of its own" if count > 1 else "there is a single group"
            raise DataError(
                f"train/group: {why} ({count} group{'s' * (count > 1)}), so none can be set aside "
                f"whole for {purpose}"
            )
    else:
        _, chosen = stratified_split(labels, [1 - fraction, fraction], seed=seed)
        if len(chosen) == 0:  # few examples of every class: one of each that can spare one
            order = np.random.default_rng(seed).permutation(len(labels))
            _, first, counts = np.unique(labels[order], return_index=True, return_counts=True)
            chosen = np.sort(order[first[counts > 1]])
        if len(chosen) == 0:
            raise DataError(
                "train/label: every class has a single example, so none can be set aside for "
                f"{purpose}"
            )
    rest = np.setdiff1d(np.arange(len(source)), chosen)
    parts = {**splits, "train": Subset(source, rest), name: Subset(source, chosen)}
    return {split: parts[split] for split in SPLITS if split in parts}


_ORDERS = 5  # in which groups are gone through
_MANY = 2000  # groups, of which one order is enough
_PASSES = 10
_SINGLES = 100  # groups that are tried singly where the choices of several will not do
_SIZE_MATTERS = 4.0  # how much more the number of examples weighs than the classes' shares


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], *, seed: int
) -> list[np.ndarray]:
    """Divides examples into parts, each with its share of every class.

    Args:
      labels: [N] integers.
      fractions: of each part; they sum to 1.
      seed: of the choice.

    Returns:
      For each part its examples' numbers, in ascending order, int64; together they are 0 .. N - 1
      without repetition. In a class of n examples each part has its fraction of n to within 1.
    """
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(fractions)[:-1]
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, chosen in zip(
            parts, np.split(members, np.rint(bounds * len(members)).astype(int)), strict=True
        ):
            part.append(chosen)
    return [np.sort(np.concatenate(chosen)).astype(np.int64) for chosen in parts]


def hold_out_groups(
    labels: np.ndarray, groups: np.ndarray, fraction: float, *, seed: int, further: bool = False
) -> np.ndarray:
    """Chooses whole groups whose examples come near a fraction of all, and of every class.

    Groups are taken up, or put back, one by one wherever that brings the share of all examples and
    the shares of the classes nearer to the fraction; of several orders in which they are gone
    through, the one that ends nearest counts. No class is taken whole, so every label that is held
    out occurs in the rest, too.

    Args:
      labels: [N] integers.
      groups: [N] integers or strings.
      fraction: of the examples, between 0 and 1.
      seed: of the orders.
      further: whether the rest must be such that groups can be held out of it once more.

    Returns:
      The examples' numbers in ascending order, int64; at least one group's, or none where each
      group has a class to itself (or, with `further`, where the rest would be like that).
    """
    rng = np.random.default_rng(seed)
    choice = _GroupChoice(labels, groups, fraction)
    orders = [rng.permutation(choice.num_groups) for _ in range(_ORDERS)]
    orders[0] = orders[0][np.argsort(-choice.sizes[orders[0]], kind="stable")]
    if choice.num_groups > _MANY:  # any order ends near enough
        del orders[1:]
    best = sorted(map(choice.improve, orders), key=choice.distance)

    def singly() -> Iterator[list[int]]:
        single = [[group] for group in orders[0].tolist() if choice.can_spare(group)]
        yield from sorted(single, key=choice.distance)[:_SINGLES]

    for chosen in itertools.chain(filter(None, best), singly()):
        held_out = np.isin(choice.group_of, chosen)
        if not further or _can_hold_out(labels[~held_out], groups[~held_out]):
            return np.flatnonzero(held_out).astype(np.int64)
    return np.zeros(0, np.int64)


class _GroupChoice:
    """Measures how far a choice of groups is from what is wanted, and improves it."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray, fraction: float) -> None:
        _, class_of = np.unique(labels, return_inverse=True)
        names, self.group_of = np.unique(groups, return_inverse=True)
        self.num_groups, self.sizes = len(names), np.bincount(self.group_of)
        totals = np.bincount(class_of)
        # Only the pairs that occur: there may be as many groups and as many classes as examples.
        pairs, counts = np.unique(self.group_of * len(totals) + class_of, return_counts=True)
        self.parts: list[list[tuple[int, int]]] = [[] for _ in names]
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.parts[pair // len(totals)].append((pair % len(totals), count))
        self.totals = totals.tolist()
        self.wanted = (fraction * totals).tolist()
        self.wanted_size = fraction * len(labels)
        # Squared relative errors; each class weighs as much as it has examples.
        self.weights = (1 / (fraction**2 * totals * len(labels))).tolist()
        self.size_weight = _SIZE_MATTERS / self.wanted_size**2

    def can_spare(self, group: int, held: Sequence[int] | None = None) -> bool:
        """Tells if the rest keeps every class of the group, with `held` of each class taken out."""
        return all(
            self.totals[c] - (held[c] if held is not None else 0) > count
            for c, count in self.parts[group]
        )

    def distance(self, chosen: Iterable[int]) -> float:
        """From the fraction of all examples and of each class; 0 where both are met exactly."""
        held = [0] * len(self.totals)
        for group in chosen:
            for c, count in self.parts[group]:
                held[c] += count
        errors = zip(held, self.wanted, self.weights, strict=True)
        classes = sum((has - wanted) ** 2 * weight for has, wanted, weight in errors)
        return classes + self.size_weight * (sum(held) - self.wanted_size) ** 2

    def improve(self, order: np.ndarray) -> list[int]:
        """From none, takes groups up or puts them back while that lessens the distance."""
        chosen, held, size = set[int](), [0] * len(self.totals), 0
        for _ in range(_PASSES):
            changed = False
            for group in order.tolist():
                sign = -1 if group in chosen else 1
                change, gain = sign * int(self.sizes[group]), 0.0
                for c, count in self.parts[group]:
                    step = sign * count
                    gain += step * (2 * (held[c] - self.wanted[c]) + step) * self.weights[c]
                gain += self.size_weight * change * (2 * (size - self.wanted_size) + change)
                if gain < -1e-12 and (sign < 0 or self.can_spare(group, held)):
                    chosen ^= {group}
                    for c, count in self.parts[group]:
                        held[c] += sign * count
                    size, changed = size + change, True
            if not changed:
                break
        return sorted(chosen)


def _can_hold_out(labels: np.ndarray, groups: np.ndarray) -> bool:
    """Tells if some group can be spared without losing a class."""
    choice = _GroupChoice(labels, groups, 0.5)
    return any(map(choice.can_spare, range(choice.num_groups)))


SAMPLED = 36  # examples of a split, evenly spaced; every fifth is one of the EARLIER
EARLIER = 8  # as many were taken by versions that did not hash the labels
LABELS = "label/sha256"
Fingerprint = dict[str, dict[str, Any]]


def fingerprint(dataset: Dataset) -> Fingerprint:
    """`{split: {array: numbers}}`: mean absolute values in some examples, as JSON can hold them.

    Means and not hashes, since decoders and resamplers of another machine may differ in last bits.
    Labels have no last bits: "label/sha256" is the hash of all of them as 32 bits, where they are
    known without reading the examples.

    Raises:
      DataError: an example cannot be read.
    """
    found: Fingerprint = {}
    for split, source in dataset.splits.items():
        count = len(source)
        examples = [source[place] for place in _places(count, SAMPLED)]
        names = sorted(examples[0]) if examples else []
        found[split] = {name: [_size(example[name]) for example in examples] for name in names}
        if (known := _known(source, "labels")) is not None:
            labels = _as_labels(known)
            stored = labels.astype("<f4" if labels.dtype.kind == "f" else "<i4")
            found[split][LABELS] = hashlib.sha256(stored.tobytes()).hexdigest()
    return found


def first_difference(ours: Fingerprint, theirs: Mapping[str, Any]) -> str:
    """The first `split/array` in which two fingerprints differ; empty if they do not.

    `theirs` may be of an earlier version, with fewer examples and without the hash of the labels.
    """
    for split, arrays in sorted(ours.items()):
        before = theirs.get(split, {}) if isinstance(theirs, Mapping) else {}
        if not isinstance(before, Mapping):
            return split
        hashes = arrays.get(LABELS), before.get(LABELS)
        if None not in hashes and hashes[0] != hashes[1]:
            return f"{split}/label"
        for name in sorted((arrays.keys() | before.keys()) - {LABELS}):
            first, second = arrays.get(name, []), before.get(name, [])
            earlier = [first[place] for place in _places(len(first), EARLIER)]
            if not (_close(first, second) or (LABELS not in before and _close(earlier, second))):
                return f"{split}/{name}"
    return ""


def _places(count: int, most: int) -> list[int]:
    """Numbers of at most so many examples, evenly spaced, the first and the last among them."""
    return sorted({i * (count - 1) // (most - 1) for i in range(most)}) if count else []


def _close(first: Any, second: Any) -> bool:
    try:
        first, second = np.asarray(first, np.float64), np.asarray(second, np.float64)
    except (TypeError, ValueError, OverflowError):
        return False
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-3, atol=1e-6)


def _size(value: Any) -> float:
    """Mean absolute value; of encoded frames, of their bytes."""
    if isinstance(value, Sequence):
        value = np.frombuffer(b"".join(value), np.uint8)
    size = np.mean(np.abs(np.asarray(value, np.float64))) if np.size(value) else 0.0
    return float(np.nan_to_num(size))


# What the class token attends to in one modality. More of it costs time without need in a first
# model; the user can set a finer patch.
MAX_TOKENS = {"image": 100, "spectrogram": 100, "video": 200}
PATCH_SIDES = (*range(2, 9), *range(10, 17, 2), 20, 24, 28, 32, 40, 48, 56, 64, 96, 128, 192, 256)


def infer_patch(info: ModalityInfo) -> tuple[int, ...] | None:
    """A patch for spectrograms and images (h, w) and videos (1, h, w); None for other kinds.

    The patch is square, of the smallest side that keeps to `MAX_TOKENS`, or of one up to
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
    """A spec for `config.model.encoders` for every modality.

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
        fields = dict(overrides.get(name) or {})
        given = {field: value for field, value in fields.items() if value is not None}
        kind = given.get("kind", info.kind)
        if kind == RESNET and info.kind not in MAX_TOKENS:
            raise ConfigError(
                f"model.encoders.{name}.kind is {RESNET!r}, and {name} is of kind {info.kind!r}; "
                f"allowed for that network: {', '.join(MAX_TOKENS)}"
            )
        if kind not in (info.kind, RESNET):
            # Loaders that know `kinds` have made the array fit already; what others hold cannot be
            # another kind, unless its axes allow it.
            try:
                info = ModalityInfo(
                    name, kind, info.shape, info.dtype, mean=info.mean, std=info.std
                )
            except DataError as error:
                raise ConfigError(f"model.encoders.{name}.kind: {error}") from None
        spec = {
            "kind": kind,
            "patch": None if kind == RESNET else infer_patch(info),
            "vocab_size": info.vocab_size,
            "mean": info.mean,
            "std": info.std,
        }
        encoders[name] = {field: v for field, v in spec.items() if v is not None} | given
    return encoders


def infer_model(dataset: Dataset, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of `config.model` for a data set: a small model that trains on a CPU.

    Args:
      dataset: its modalities and number of classes are used.
      overrides: {field: value}; a field that is given and not None wins (`num_classes` if not 0),
        and `encoders` is completed as in `infer_encoders`.

    Returns:
      The overrides with `num_classes`, `dim`, `depth`, `num_heads` and `encoders` set.

    Raises:
      ConfigError: as in `infer_encoders`, or `num_classes` is less than the data need, or of other
        tasks than the choice of one class more.
    """
    given = {} if overrides is None else dict(overrides.items())
    given = {name: value for name, value in given.items() if value is not None}
    model = {"dim": 64, "depth": 2, "num_heads": 4} | given
    model["num_classes"] = given.get("num_classes") or dataset.num_classes
    if model["num_classes"] < dataset.num_classes:
        raise ConfigError(
            f"model.num_classes: {model['num_classes']}; the data have {dataset.num_classes}"
        )
    if model["num_classes"] > dataset.num_classes and dataset.task != SINGLE_LABEL:
        raise ConfigError(
            f"model.num_classes is {model['num_classes']}; allowed with the task {dataset.task}: "
            f"{dataset.num_classes}, as many as an example has labels"
        )
    model["encoders"] = infer_encoders(dataset.modalities, given.get("encoders"))
    return model


def num_tokens(info: ModalityInfo, patch: tuple[int, ...] | None) -> int:
    """Tokens of one example after patching, without the class token; no patch: of a ResNet-18."""
    kind = RESNET if patch is None and info.kind in MAX_TOKENS else info.kind
    return math.prod(token_grid(kind, info.shape, patch))
