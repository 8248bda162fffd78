"""The boundary between data and devices: what comes is checked before it goes into a step."""

from collections.abc import Iterator, Mapping

import numpy as np

from rollingq_jax.data.dataset import Dataset, ModalityInfo
from rollingq_jax.errors import DataError

Batch = dict[str, np.ndarray]
POSITIONS = ("sequence", "tokens")  # kinds whose mask may be [B, L]


class Feed:
    """Iterates over batches and checks them.

    The first batch is checked whole, the others against the first; labels and token ids are checked
    in each, since a wrong one would pass as NaN or as another class.

    Args:
      batches: from the pipeline.
      dataset: what a batch should be.
      modalities: those that the model uses.
      rows: B, examples in each batch.

    Raises:
      DataError: a file cannot be read any more, or a batch is not as the data set says; names the
        field, what came and what was expected.
    """

    def __init__(
        self, batches: Iterator[Batch], dataset: Dataset, modalities: tuple[str, ...], rows: int
    ) -> None:
        self._batches, self._dataset = batches, dataset
        self._modalities, self._rows = modalities, rows
        sizes = {m: dataset.modalities[m].vocab_size for m in modalities}
        self._vocabularies = {m: size for m, size in sizes.items() if size is not None}
        self._first: dict[str, tuple[tuple[int, ...], np.dtype]] | None = None

    def __iter__(self) -> "Feed":
        return self

    def __next__(self) -> Batch:
        try:
            batch = next(self._batches)
        except OSError as error:
            name = "" if error.filename is None else f"{error.filename}: "
            raise DataError(f"data: {name}{error.strerror or error}") from error
        forms = {name: (value.shape, value.dtype) for name, value in batch.items()}
        if self._first is None:
            check_batch(batch, self._dataset, self._modalities, self._rows)
            self._first = forms
        elif forms != self._first:
            odd = next(n for n in {**forms, **self._first} if forms.get(n) != self._first.get(n))
            raise DataError(
                f"batch: {odd!r} is {_form(forms, odd)}; "
                f"expected {_form(self._first, odd)}, as in the batches before"
            )
        check_labels(batch["label"], self._dataset.num_classes)
        check_ids(batch, self._vocabularies)
        return batch

    def close(self) -> None:
        """Stops the pipeline's threads."""
        self._batches.close()  # type: ignore[attr-defined]


def check_batch(
    batch: Mapping[str, np.ndarray], dataset: Dataset, modalities: tuple[str, ...], rows: int
) -> None:
    """Keys, shapes and dtypes of a batch, against what the data set says of itself.

    Raises:
      DataError: names the field, what came and what was expected.
    """
    for name in (*modalities, "label", "example_mask"):
        if name not in batch:
            raise DataError(
                f"batch: {name!r} is missing; expected {', '.join(modalities)}, label and "
                f"example_mask, found {', '.join(sorted(batch))}"
            )
    expect(batch, "label", [(rows,)], "i")
    expect(batch, "example_mask", [(rows,)], "b")
    for name in modalities:
        info = dataset.modalities[name]
        expect(batch, name, [(rows, *info.shape)], np.dtype(info.dtype).kind)
        expect(batch, f"{name}_mask", mask_shapes(info, rows), "b")
        expect(batch, f"quality_{name}", [(rows,)], "f")
        if batch[name].dtype.kind == "f" and not np.isfinite(batch[name]).all():
            raise DataError(f"batch: {name!r} holds NaN or infinity; expected finite numbers")


def mask_shapes(info: ModalityInfo, rows: int) -> list[tuple[int, ...]]:
    """`[B]`, whether an example has the modality, or `[B, L]`, its real positions."""
    return [(rows,)] + ([(rows, info.shape[0])] if info.kind in POSITIONS else [])


def expect(
    batch: Mapping[str, np.ndarray], name: str, shapes: list[tuple[int, ...]], kind: str
) -> None:
    """A field, where it is present, has one of the shapes and a dtype of that kind.

    Raises:
      DataError: it does not.
    """
    if name not in batch:
        return
    value = batch[name]
    words = {"i": "int32", "b": "bool", "f": "float32", "u": "uint8"}[kind]
    if value.shape not in shapes or value.dtype != np.dtype(words):
        wanted = " or ".join(f"{words}{list(shape)}" for shape in shapes)
        raise DataError(f"batch: {name!r} is {value.dtype}{list(value.shape)}; expected {wanted}")


def check_labels(label: np.ndarray, num_classes: int) -> None:
    """Labels lie in 0 .. num_classes - 1.

    Raises:
      DataError: one does not.
    """
    low, high = label.min(), label.max()
    if low < 0 or high >= num_classes:
        wrong = low if low < 0 else high
        raise DataError(
            f"batch: 'label' holds {wrong}; expected 0 to {num_classes - 1} ({num_classes} classes)"
        )


def check_ids(batch: Mapping[str, np.ndarray], vocabularies: Mapping[str, int]) -> None:
    """Token ids lie in 0 .. vocab_size - 1.

    Raises:
      DataError: one does not.
    """
    for name, size in vocabularies.items():
        low, high = batch[name].min(), batch[name].max()
        if low < 0 or high >= size:
            wrong = low if low < 0 else high
            raise DataError(
                f"batch: {name!r} holds {wrong}; expected 0 to {size - 1} (vocab_size {size})"
            )


def _form(forms: Mapping[str, tuple[tuple[int, ...], np.dtype]], name: str) -> str:
    if name not in forms:
        return "absent"
    shape, dtype = forms[name]
    return f"{dtype}{list(shape)}"
