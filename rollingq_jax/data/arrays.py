"""Own data as arrays: an ``.npz`` file, or a folder of ``.npy`` files (memory-mapped).

Keys (in a folder, ``train/audio`` is the file ``train/audio.npy``), for any number of modalities:

============================ =====================================================================
``train/<m>``, ``test/<m>``  [N, ...] numbers
``train/label`` ...          [N] integers from 0
``valid/*``                  optional; else 10 % of train, class by class, drawn from the seed
``*/mask_<m>``               optional, bool: [N, L] real positions of a sequence or of tokens, or
                             [N] whether the example has the modality at all
``*/quality_<m>``            optional [N] float: minus the noise, in standard deviations
``kind/<m>``                 optional string; see :mod:`rollingq_jax.data.infer` for the default
``class_names``              optional [num_classes] strings
============================ =====================================================================

A kind that needs one more axis than the array has gets it with size 1 (grey images [N, H, W], a
single-valued series as a sequence). Numbers become float32, or stay uint8 for images and videos, or
int32 for tokens. Float modalities are standardised with the training split's mean and standard
deviation (``data.standardize``); uint8 pixels are, on the device, in the model. An ``.npz`` is read
into memory whole: for data near its size, use a folder. Both may lie on gs://, whence a folder is
read into memory, too.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rollingq_jax.data.columns import ColumnSource, make_column
from rollingq_jax.data.labels import check_labels, check_name, count_classes, with_valid
from rollingq_jax.data.npz import FORM, read_arrays
from rollingq_jax.data.options import array_path, mapping_option, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.types import Dataset
from rollingq_jax.errors import DataError

SPLITS = ("train", "valid", "test")


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The data set at ``config_data.path``.

    Args:
      config_data: ``path``; optional ``kinds`` ("audio=spectrogram, visual=image", or a mapping),
        ``modalities`` (those to use; empty for all), ``standardize`` (True). A path of a manifest
        (.csv, .jsonl) is read as by :mod:`rollingq_jax.data.folder`.
      seed: of the validation split, where the file has none.
      kinds: {modality: kind}, before ``config_data.kinds``, ``kind/<m>`` and the shape.

    Raises:
      DataError: the file is missing, damaged or not of this form; the message names the key.
      ConfigError: a field has the wrong type.
    """
    given = option(config_data, "path", "")
    if not given:
        raise DataError("data.path: not given; an .npz file, a folder of .npy files or a manifest")
    path = array_path(given, "data.path")
    if path.suffix.lower() in (".csv", ".jsonl"):
        from rollingq_jax.data import folder

        return folder.load(config_data, seed=seed)
    return from_arrays(
        read_arrays(path),
        seed=seed,
        kinds=mapping_option(config_data, "kinds") | dict(kinds or {}),
        modalities=option(config_data, "modalities", ()),
        standardize=option(config_data, "standardize", True),
        description=f"arrays from {path.name}",
    )


def from_arrays(
    arrays: Mapping[str, np.ndarray],
    *,
    seed: int = 0,
    kinds: Mapping[str, str] | None = None,
    modalities: tuple[str, ...] = (),
    standardize: bool = True,
    description: str = "arrays",
) -> Dataset:
    """A data set from arrays under the keys that this module's docstring lists.

    Args:
      arrays: {key: array}.
      seed: of the validation split, where there is no ``valid/*``.
      kinds: {modality: kind}, before ``kind/<m>`` and the shape.
      modalities: those to use; empty for all.
      standardize: whether float modalities are standardised.
      description: of the data set.

    Raises:
      DataError: as :func:`load`.
    """
    splits, kind_of, class_names = _sort_keys(arrays)
    kind_of |= kinds or {}
    present = sorted({key for values in splits.values() for key in values if _is_modality(key)})
    names = sorted(modalities or present)
    for name in (*names, *kind_of):
        if name not in present:
            raise DataError(f"modality {name!r}: not in the data; there are {', '.join(present)}")
    labels, masks, qualities = {}, {}, {}
    for split, values in splits.items():
        labels[split] = check_labels(values["label"], f"{split}/label")
        _check_lengths(split, values, names)
        masks[split] = {n: _mask(values, split, n) for n in names if f"mask_{n}" in values}
        qualities[split] = {
            n: _quality(values, split, n) for n in names if f"quality_{n}" in values
        }
    num_classes = count_classes(labels, class_names)
    columns = {
        name: make_column(
            name,
            {split: values[name] for split, values in splits.items()},
            {split: of_split[name] for split, of_split in masks.items() if name in of_split},
            kind_of.get(name),
            standardize,
        )
        for name in names
    }
    _check_mask_use(masks, columns)
    sources = {
        split: ColumnSource(
            columns,
            {name: values[name] for name in names},
            labels[split],
            masks[split],
            qualities[split],
        )
        for split, values in splits.items()
    }
    return Dataset(
        splits=with_valid(sources, labels["train"], seed=seed),
        modalities={name: column.info for name, column in columns.items()},
        num_classes=num_classes,
        class_names=class_names,
        description=description,
        preprocessing=columns,
    )


def _is_modality(key: str) -> bool:
    return key != "label" and not key.startswith(("mask_", "quality_"))


def _sort_keys(
    arrays: Mapping[str, np.ndarray],
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, str], tuple[str, ...]]:
    """Keys -> {split: {key: array}}, {modality: stated kind}, class names."""
    splits: dict[str, dict[str, np.ndarray]] = {}
    kinds: dict[str, str] = {}
    class_names: tuple[str, ...] = ()
    for key, array in arrays.items():
        head, _, rest = key.partition("/")
        if key == "class_names" and array.dtype.kind in "SU" and array.ndim == 1:
            class_names = tuple(_text(item) for item in array)
        elif head == "kind" and rest and array.size == 1 and array.dtype.kind in "SU":
            kinds[rest] = _text(array.reshape(())[()])
        elif head in SPLITS and rest:
            if _is_modality(rest):
                check_name(rest, key)
            if array.ndim == 0:
                raise DataError(f"{key}: a single number; must be an array [N, ...]")
            splits.setdefault(head, {})[rest] = array
        else:
            raise DataError(
                f"key {key!r}: not known; allowed are {FORM}, valid/*, */mask_<modality>, "
                "*/quality_<modality>, kind/<modality> (one string) and class_names (strings)"
            )
    for split in ("train", "test"):
        if split not in splits:
            found = ", ".join(sorted(arrays)[:8]) or "nothing"
            raise DataError(f"no {split}/* keys; wanted {FORM}; found {found}")
    modalities = {key for values in splits.values() for key in values if _is_modality(key)}
    if not modalities:
        raise DataError(f"no modality, only labels; wanted {FORM}")
    for split, values in splits.items():
        missing = sorted({"label", *modalities} - values.keys())
        if missing:
            raise DataError(f"{split}/{missing[0]}: missing, but other splits or fields have it")
        for key in values:
            if not _is_modality(key) and key != "label" and key.partition("_")[2] not in modalities:
                raise DataError(f"{split}/{key}: there is no modality {key.partition('_')[2]!r}")
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[0]))), kinds, class_names


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _check_lengths(split: str, values: Mapping[str, np.ndarray], names: list[str]) -> None:
    """All modalities of a split have as many examples as it has labels."""
    count = len(values["label"])
    for name in names:
        if len(values[name]) != count:
            raise DataError(
                f"{split}/{name}: {len(values[name])} examples, but {split}/label has {count}"
            )


def _mask(values: Mapping[str, np.ndarray], split: str, name: str) -> np.ndarray:
    """``mask_<m>`` as bool [N, L] or [N]."""
    key, mask, array = f"{split}/mask_{name}", values[f"mask_{name}"], values[name]
    if mask.shape not in (array.shape[:1], array.shape[:2]):
        raise DataError(
            f"{key}: shape {list(mask.shape)}; must be [N] or [N, L] of {split}/{name}, "
            f"{list(array.shape[:2])}"
        )
    if mask.dtype.kind not in "biu" or (mask.dtype.kind != "b" and not np.isin(mask, (0, 1)).all()):
        raise DataError(f"{key}: dtype {mask.dtype}; must be boolean, or integers 0 and 1")
    return np.asarray(mask, bool)


def _check_mask_use(
    masks: Mapping[str, Mapping[str, np.ndarray]], columns: Mapping[str, Preprocessing]
) -> None:
    """A modality has masks in all splits or in none, with positions only where it has some."""
    for name, column in columns.items():
        ranks = {of_split[name].ndim if name in of_split else 0 for of_split in masks.values()}
        if len(ranks) > 1:
            raise DataError(f"mask_{name}: must be in all splits, with the same axes, or in none")
        if 2 in ranks and column.info.kind not in ("sequence", "tokens"):
            raise DataError(
                f"mask_{name}: [N, L] marks positions of a sequence or of tokens, but {name!r} is "
                f"of kind {column.info.kind!r}; use [N], whether an example has the modality"
            )


def _quality(values: Mapping[str, np.ndarray], split: str, name: str) -> np.ndarray:
    """``quality_<m>`` as float32 [N]."""
    key, quality = f"{split}/quality_{name}", values[f"quality_{name}"]
    if quality.shape != values["label"].shape or quality.dtype.kind not in "iuf":
        raise DataError(
            f"{key}: {quality.dtype}{list(quality.shape)}; must be one number an example, "
            f"{list(values['label'].shape)}"
        )
    quality = np.asarray(quality, np.float32)
    if not np.isfinite(quality).all():
        raise DataError(f"{key}: NaN or infinite values")
    return quality
