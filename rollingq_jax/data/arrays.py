"""Own data as arrays: an ``.npz`` file, or a folder of ``.npy`` files (memory-mapped).

Keys (in a folder, ``train/audio`` is the file ``train/audio.npy``), for any number of modalities:

============================ =====================================================================
``train/<m>``, ``test/<m>``  [N, ...] numbers
``train/label`` ...          [N] integers from 0, or names
``valid/*``                  optional; else 10 % of train, class by class, drawn from the seed
``*/group``                  optional [N] integers or strings: examples of one speaker, video or
                             patient, which an automatic split keeps together
``*/id``                     optional [N] integers or strings: what each example is called
``*/mask_<m>``               optional, bool: [N, L] real positions of a sequence or of tokens, or
                             [N] whether the example has the modality at all
``*/quality_<m>``            optional [N] float: minus the noise, in standard deviations
``kind/<m>``                 optional string; see :mod:`rollingq_jax.data.infer` for the default
``class_names``              optional [num_classes] strings
============================ =====================================================================

A single table is enough: without ``test/*``, or with keys that name no split (``audio``, ``label``,
``group``), 20 % of it become the test split, the same for every seed.

A kind that needs one more axis than the array has gets it with size 1 (grey images [N, H, W], a
single-valued series as a sequence). One number an example, [N], is a modality only where it is said
to be. Numbers become float32, or stay uint8 for images and videos, or int32 for tokens. Float
modalities are standardized with the training split's mean and standard deviation
(``data.standardize``); uint8 pixels are, on the device, in the model. An ``.npz`` is read into
memory whole: for data near its size, use a folder. Both may lie on gs://, whence a folder is read
into memory, too. What was measured on a folder or a large file is kept in the cache.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data.cache import cache_root, file_states, remembered
from rollingq_jax.data.columns import ColumnSource, make_column, warn_of_doubts
from rollingq_jax.data.labels import (
    as_text,
    check_name,
    check_tags,
    count_classes,
    encode_labels,
    groups_of,
    labels_of,
    warn_of_shared_groups,
    with_test,
    with_valid,
)
from rollingq_jax.data.manifest import is_manifest
from rollingq_jax.data.npz import FORM, StoredArray, check_memory, open_arrays, unpacked
from rollingq_jax.data.options import array_path, mapping_option, option
from rollingq_jax.data.preprocessing import InputSpec, Preprocessing
from rollingq_jax.data.types import Dataset, Source
from rollingq_jax.errors import DataError

SPLITS = ("train", "valid", "test")
LARGE = 64 * 2**20  # bytes of a file, from which on what was measured is kept
MEASURE = 1  # raised whenever the checks or the statistics change

Stored = np.ndarray | StoredArray
Measure = Callable[[], dict[str, Preprocessing]]
_NO_MODALITY = (
    "{key}: {form}, one number an example; to keep the examples of a speaker, video or patient "
    "together, name it {split}/group; to name the examples, {split}/id; to leave it out, list the "
    "modalities in data.modalities; and if it is a modality, say so: a key kind/{name} or "
    "data.kinds '{name}=vector' (token ids: tokens), or model.encoders.{name}.kind, or "
    "data.modalities"
)


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The data set at ``config_data.path``.

    Args:
      config_data: ``path``; optional ``kinds`` ("audio=spectrogram, visual=image", or a mapping),
        ``modalities`` (those to use; empty for all), ``standardize`` (True), ``cache_dir`` (see
        :func:`~rollingq_jax.data.cache.cache_root`). A path of a manifest (.csv, .tsv, .jsonl), or
        of a folder with one, is read as by :mod:`rollingq_jax.data.folder`.
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
    if is_manifest(path):
        from rollingq_jax.data import folder

        return folder.load(config_data, seed=seed)
    root = cache_root(option(config_data, "cache_dir", ""))
    return _build(
        open_arrays(path),
        seed=seed,
        kinds=mapping_option(config_data, "kinds") | dict(kinds or {}),
        modalities=option(config_data, "modalities", ()),
        standardize=option(config_data, "standardize", True),
        description=f"arrays from {path.name}",
        keep=lambda asked, measure: _kept(root, path, asked, measure),
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
      standardize: whether float modalities are standardized.
      description: of the data set.

    Raises:
      DataError: as :func:`load`.
    """
    return _build(
        arrays,
        seed=seed,
        kinds=kinds or {},
        modalities=modalities,
        standardize=standardize,
        description=description,
        keep=lambda asked, measure: measure(),
    )


def _build(
    arrays: Mapping[str, Stored],
    *,
    seed: int,
    kinds: Mapping[str, str],
    modalities: Sequence[str],
    standardize: bool,
    description: str,
    keep: Callable[[Any, Measure], dict[str, Preprocessing]],
) -> Dataset:
    """As :func:`from_arrays`; `keep` may know already what is asked to be measured."""
    stored, kind_of, class_names = _sort_keys(arrays)
    kind_of |= kinds
    present = sorted({key for of_split in stored.values() for key in of_split if _is_modality(key)})
    names = sorted(modalities or present)
    for name in (*names, *kind_of):
        if name not in present:
            raise DataError(f"modality {name!r}: not in the data; there are {', '.join(present)}")
    _check_presence(stored, names, declared={*modalities, *kind_of})
    encoded = {split: unpacked(of_split["label"]) for split, of_split in stored.items()}
    labels, class_names = encode_labels(encoded, class_names)
    num_classes = count_classes(labels, class_names)
    tags = {
        tag: {
            split: check_tags(unpacked(of_split[tag]), f"{split}/{tag}")
            for split, of_split in stored.items()
            if tag in of_split
        }
        for tag in ("group", "id")
    }
    warn_of_shared_groups(tags["group"])
    check_memory(array for of_split in stored.values() for array in of_split.values())
    splits = {
        split: {key: unpacked(array) for key, array in of_split.items()}
        for split, of_split in stored.items()
    }
    masks, qualities = {}, {}
    for split, values in splits.items():
        masks[split] = {n: _mask(values, split, n) for n in names if f"mask_{n}" in values}
        qualities[split] = {
            n: _quality(values, split, n) for n in names if f"quality_{n}" in values
        }

    def measure() -> dict[str, Preprocessing]:
        return {
            name: make_column(
                name,
                {split: values[name] for split, values in splits.items()},
                {split: of_split[name] for split, of_split in masks.items() if name in of_split},
                kind_of.get(name),
                standardize,
            )
            for name in names
        }

    shapes = {name: splits["train"][name].shape[1:] for name in names}
    asked = [[name, kind_of.get(name), list(shapes[name])] for name in names]
    columns = keep([standardize, asked], measure)
    warn_of_doubts(columns[name].info for name in names if name not in kind_of)
    _check_mask_use(masks, columns)
    sources: dict[str, Source] = {
        split: ColumnSource(
            columns,
            {name: values[name] for name in names},
            labels[split],
            masks[split],
            qualities[split],
            tags["group"].get(split),
            tags["id"].get(split),
        )
        for split, values in splits.items()
    }
    if "test" not in sources:
        description += "; a fifth of train is the test split"
    sources = with_test(sources, labels["train"], groups=tags["group"].get("train"))
    train = sources["train"]
    return Dataset(
        splits=with_valid(sources, labels_of(train), seed=seed, groups=groups_of(train)),
        modalities={name: column.info for name, column in columns.items()},
        num_classes=num_classes,
        class_names=class_names,
        description=description,
        preprocessing=columns,
    )


def _kept(root: Path, path: Any, asked: Any, measure: Measure) -> dict[str, Preprocessing]:
    """What `measure` returns, or returned when it was asked the same of the same files."""
    if not isinstance(path, Path) or (path.is_file() and path.stat().st_size < LARGE):
        return measure()
    files = sorted(path.rglob("*.npy")) if path.is_dir() else [path]
    asked = [MEASURE, str(path.resolve()), asked, file_states(files)]

    def read(content: Any) -> dict[str, Preprocessing]:
        found = dict(InputSpec.from_json(content).modalities)
        if list(found) != [name for name, *_ in asked[2][1]]:
            raise DataError("other modalities")
        return found

    return remembered(
        root / "arrays",
        asked,
        make=measure,
        read=read,
        write=lambda columns: InputSpec(columns, num_classes=0).to_json(),
    )


def _is_modality(key: str) -> bool:
    return key not in ("label", "group", "id") and not key.startswith(("mask_", "quality_"))


def _sort_keys(
    arrays: Mapping[str, Stored],
) -> tuple[dict[str, dict[str, Stored]], dict[str, str], tuple[str, ...]]:
    """Keys -> {split: {key: array}}, {modality: stated kind}, class names."""
    splits: dict[str, dict[str, Stored]] = {}
    kinds: dict[str, str] = {}
    class_names: tuple[str, ...] = ()
    single = not any(key.partition("/")[0] in SPLITS and "/" in key for key in arrays)
    for key, array in arrays.items():
        head, _, rest = key.partition("/")
        if single and not rest and key != "class_names":
            head, rest = "train", key
        if key == "class_names":
            if array.dtype.kind not in "SUT" or array.ndim != 1:
                raise DataError(
                    f"class_names: {array.dtype}{list(array.shape)}; must be [num_classes] strings"
                )
            class_names = tuple(as_text(item) for item in unpacked(array).tolist())
        elif head == "kind" and rest and array.size == 1 and array.dtype.kind in "SUT":
            kinds[rest] = as_text(unpacked(array).reshape(()).item())
        elif head in SPLITS and rest:
            if _is_modality(rest):
                check_name(rest, key if key.isprintable() else repr(key))
            if array.ndim == 0:
                raise DataError(f"{key}: a single number; must be an array [N, ...]")
            splits.setdefault(head, {})[rest] = array
        else:
            raise DataError(
                f"key {key!r}: not known; allowed are {FORM}, valid/*, */group, */id, "
                "*/mask_<modality>, */quality_<modality>, kind/<modality> (one string) and "
                "class_names (strings); or a single table, with no split in any key"
            )
    if "train" not in splits:
        found = ", ".join(map(repr, sorted(arrays)[:8])) or "nothing"
        raise DataError(f"no train/* keys; wanted {FORM}; found {found}")
    return dict(sorted(splits.items(), key=lambda item: SPLITS.index(item[0]))), kinds, class_names


def _check_presence(
    splits: dict[str, dict[str, Stored]], names: Sequence[str], declared: set[str]
) -> None:
    """Whether each split has what is used, in equal numbers; what is not used is taken out.

    Args:
      splits: {split: {key: array}}; changed.
      names: the modalities that are used.
      declared: those of which the user says that they are modalities.
    """
    if not names:
        raise DataError(f"no modality, only labels; wanted {FORM}")
    for split, values in splits.items():
        for name in names:
            if name in values and values[name].ndim == 1 and name not in declared:
                form = f"{values[name].dtype}{list(values[name].shape)}"
                key = f"{split}/{name}"
                raise DataError(_NO_MODALITY.format(key=key, form=form, split=split, name=name))
    known = {key for values in splits.values() for key in values if _is_modality(key)}
    for split, values in splits.items():
        for key in ("label", *names):
            if key not in values:
                raise DataError(f"{split}/{key}: missing, but other splits or fields have it")
        for key in list(values):
            prefix, _, name = key.partition("_")
            aside = not _is_modality(key) and prefix in ("mask", "quality")
            if aside and name not in known:
                raise DataError(f"{split}/{key}: there is no modality {name!r}")
            if (aside and name not in names) or (_is_modality(key) and key not in names):
                del values[key]
            elif len(values[key]) != len(values["label"]):
                raise DataError(
                    f"{split}/{key}: {len(values[key])} examples, but {split}/label has "
                    f"{len(values['label'])}"
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
