"""Own data as arrays: an `.npz` file, or a folder of `.npy` files (memory-mapped).

Keys (in a folder, `train/audio` is the file `train/audio.npy`), for any number of modalities:

======================== =======================================================================
`train/<m>`, `test/<m>`  [N, ...] numbers
`train/label` ...        [N] integers from 0, or names; [N, C] of 0 and 1; [N] or [N, K] numbers
`valid/*`                optional; else 10 % of train, class by class, drawn from the seed
`*/group`                optional [N] integers or strings: examples of one speaker, video or
                         patient, which an automatic split keeps together
`*/id`                   optional [N] integers or strings: what each example is called
`*/mask_<m>`             optional, bool: [N, L] real positions of a sequence or of tokens, or
                         [N] whether the example has the modality at all
`*/quality_<m>`          optional [N] float: minus the noise, in standard deviations
`kind/<m>`               optional string; see `rollingq_jax.data.dataset.infer_kind`
`class_names`            optional [num_classes] strings, also of labels or of values
======================== =======================================================================

What is learned follows from the labels or from `data.task` (docs/howto/tasks.md).

A single table is enough: without `test/*`, or with keys that name no split (`audio`, `label`,
`group`), 20 % of it become the test split, the same for every seed.

A kind that needs one more axis than the array has gets it with size 1 (gray images [N, H, W], a
single-valued series as a sequence). One number an example, [N], is a modality only where it is said
to be. Numbers become float32, or stay uint8 for images and videos, or int32 for tokens. Float
modalities are standardized with the training split's mean and standard deviation
(`data.standardize`); uint8 pixels are, on the device, in the model. An `.npz` is read into
memory whole: for data near its size, use a folder. Both may lie on gs://, whence a folder is read
into memory, too. What was measured on a folder or a large file is kept in the cache.
"""

import dataclasses
import functools
import io
import math
import os
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from rollingq_jax.data.cache import cache_root, file_states, remembered
from rollingq_jax.data.dataset import (
    SPLITS,
    TASKS,
    Dataset,
    Example,
    ModalityInfo,
    Source,
    as_text,
    check_name,
    check_tags,
    complete_splits,
    fit_shape,
    infer_kind,
    read_labels,
    warn_suspicious_shape,
)
from rollingq_jax.data.options import array_path, choice, mapping_option, option
from rollingq_jax.data.preprocessing import POSITIONS, InputSpec, Preprocessing, RunningStats
from rollingq_jax.data.sources.media_folder import is_manifest
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.files import check_lfs_pointer

FORM = "train/<modality>, test/<modality>, train/label, test/label"
LARGE = 64 * 2**20  # bytes of a file, from which on what was measured is kept
MEASURE = 1  # raised whenever the checks or the statistics change
BLOCK_BYTES = 32 * 2**20
MAX_VOCABULARY = 1_000_000
MOST_DEFLATED = 1100  # bytes that a deflated byte can stand for: 1032, and some at the ends
_NO_MODALITY = (
    "{key}: {form}, one number an example; to keep the examples of a speaker, video or patient "
    "together, name it {split}/group; to name the examples, {split}/id; to leave it out, list the "
    "modalities in data.modalities; and if it is a modality, say so: a key kind/{name} or "
    "data.kinds '{name}=vector' (token ids: tokens), or model.encoders.{name}.kind, or "
    "data.modalities"
)
_NO_NUMBERS = {
    "c": "; store real and imaginary part, or magnitude and phase, as two channels",
    "M": "; store numbers, as seconds since a moment",
    "m": "; store numbers, as seconds",
    **dict.fromkeys("SUT", "; store token ids [N, L], or use a manifest with text files"),
}


@dataclasses.dataclass(frozen=True)
class StoredArray:
    """An array in an archive, not unpacked yet.

    Attributes:
      shape, dtype: as its header says; the archive has room for that.
      read: returns the array.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes when unpacked."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]


Stored = np.ndarray | StoredArray
Measure = Callable[[], dict[str, Preprocessing]]


def load(config_data: Any, *, seed: int, kinds: Mapping[str, str] | None = None) -> Dataset:
    """The data set at `config_data.path`.

    Args:
      config_data: `path`; optional `kinds` ("audio=spectrogram, visual=image", or a mapping),
        `modalities` (those to use; empty for all), `standardize` (True), `cache_dir` (see
        `rollingq_jax.data.cache.cache_root`). A path of a manifest (.csv, .tsv, .jsonl), or
        of a folder with one, is read as by `media_folder`.
      seed: of the validation split, where the file has none.
      kinds: {modality: kind}, before `config_data.kinds`, `kind/<m>` and the shape.

    Raises:
      DataError: the file is missing, damaged or not of this form; the message names the key.
      ConfigError: a field has the wrong type.
    """
    given = option(config_data, "path", "")
    if not given:
        raise DataError("data.path: not given; an .npz file, a folder of .npy files or a manifest")
    path = array_path(given, "data.path")
    if is_manifest(path):
        from rollingq_jax.data.sources import media_folder

        return media_folder.load(config_data, seed=seed)
    if tokenizer := option(config_data, "tokenizer", ""):
        raise ConfigError(
            f"data.tokenizer is {tokenizer!r}; allowed with arrays, whose tokens are numbers "
            "already: none"
        )
    root = cache_root(option(config_data, "cache_dir", ""))
    return from_arrays(
        open_arrays(path),
        seed=seed,
        kinds=mapping_option(config_data, "kinds") | dict(kinds or {}),
        modalities=option(config_data, "modalities", ()),
        standardize=option(config_data, "standardize", True),
        task=choice(config_data, "task", ("auto", *TASKS)),
        description=f"arrays from {path.name}",
        keep=lambda asked, measure: _kept(root, path, asked, measure),
    )


def from_arrays(
    arrays: Mapping[str, Stored],
    *,
    seed: int = 0,
    kinds: Mapping[str, str] | None = None,
    modalities: Sequence[str] = (),
    standardize: bool = True,
    task: str = "auto",
    description: str = "arrays",
    keep: Callable[[Any, Measure], dict[str, Preprocessing]] = lambda asked, measure: measure(),
) -> Dataset:
    """A data set from arrays under the keys that this module's docstring lists.

    Args:
      arrays: {key: array}.
      seed: of the validation split, where there is no `valid/*`.
      kinds: {modality: kind}, before `kind/<m>` and the shape.
      modalities: those to use; empty for all.
      standardize: whether float modalities are standardized.
      task: one of `TASKS`, or "auto": what the labels can only be.
      description: of the data set.
      keep: (what is asked, function that measures it) -> the preprocessing, from an earlier run
        where it is known.

    Raises:
      DataError: as `load`.
    """
    stored, kind_of, class_names = _sort_keys(arrays)
    kind_of |= kinds or {}
    present = sorted({key for of_split in stored.values() for key in of_split if _is_modality(key)})
    names = sorted(modalities or present)
    for name in (*names, *kind_of):
        if name not in present:
            raise DataError(f"modality {name!r}: not in the data; there are {', '.join(present)}")
    _check_presence(stored, names, declared={*modalities, *kind_of})
    encoded = {split: unpacked(of_split["label"]) for split, of_split in stored.items()}
    labels = read_labels(encoded, class_names, task)
    tags = {
        tag: {
            split: check_tags(unpacked(of_split[tag]), f"{split}/{tag}")
            for split, of_split in stored.items()
            if tag in of_split
        }
        for tag in ("group", "id")
    }
    # Labels and tags are small; all else is unpacked once it is known to be used and to fit.
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
            name: _make_modality(
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
    measured = keep([standardize, asked], measure)
    for name in names:
        if name not in kind_of:  # who has said what it is needs no advice
            warn_suspicious_shape(measured[name].info)
    _check_mask_use(masks, measured)
    sources: dict[str, Source] = {
        split: RawArraySource(
            measured,
            {name: values[name] for name in names},
            labels.values[split],
            masks[split],
            qualities[split],
            tags["group"].get(split),
            tags["id"].get(split),
        )
        for split, values in splits.items()
    }
    if "test" not in sources:
        description += "; a fifth of train is the test split"
    return Dataset(
        splits=complete_splits(sources, seed=seed),
        modalities={name: one.info for name, one in measured.items()},
        num_classes=labels.num_classes,
        class_names=labels.class_names,
        description=description,
        preprocessing=measured,
        task=labels.task,
    )


def _kept(root: Path, path: Any, asked: Any, measure: Measure) -> dict[str, Preprocessing]:
    """Returns what `measure` returns, or returned for the same question about the same files."""
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
        write=lambda measured: InputSpec(measured, num_classes=0).to_json(),
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
                    f"class_names: {array.dtype}{list(array.shape)}; allowed: [num_classes] strings"
                )
            class_names = tuple(as_text(item) for item in unpacked(array).tolist())
        elif head == "kind" and rest and array.size == 1 and array.dtype.kind in "SUT":
            kinds[rest] = as_text(unpacked(array).reshape(()).item())
        elif head in SPLITS and rest:
            if _is_modality(rest):
                check_name(rest, key if key.isprintable() else repr(key))
            if array.ndim == 0:
                raise DataError(f"{key}: a single number; allowed: an array [N, ...]")
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
    """Checks that each split has what is used, in equal numbers; takes out what is not used.

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
    """`mask_<m>` as bool [N, L] or [N]."""
    key, mask, array = f"{split}/mask_{name}", values[f"mask_{name}"], values[name]
    if mask.shape not in (array.shape[:1], array.shape[:2]):
        raise DataError(
            f"{key}: shape {list(mask.shape)}; allowed: [N] or [N, L] of {split}/{name}, "
            f"{list(array.shape[:2])}"
        )
    if mask.dtype.kind not in "biu" or (mask.dtype.kind != "b" and not np.isin(mask, (0, 1)).all()):
        raise DataError(f"{key}: dtype {mask.dtype}; allowed: boolean, or integers 0 and 1")
    return np.asarray(mask, bool)


def _check_mask_use(
    masks: Mapping[str, Mapping[str, np.ndarray]], modalities: Mapping[str, Preprocessing]
) -> None:
    """A modality has masks in all splits or in none, with positions only where it has some."""
    for name, one in modalities.items():
        ranks = {of_split[name].ndim if name in of_split else 0 for of_split in masks.values()}
        if len(ranks) > 1:
            raise DataError(
                f"mask_{name} is in some splits only, or has other axes there; allowed: in all "
                "splits, with the same axes, or in none"
            )
        if 2 in ranks and one.info.kind not in POSITIONS:
            raise DataError(
                f"mask_{name}: [N, L] marks positions of a sequence or of tokens, but {name!r} is "
                f"of kind {one.info.kind!r}; use [N], whether an example has the modality"
            )


def _quality(values: Mapping[str, np.ndarray], split: str, name: str) -> np.ndarray:
    """`quality_<m>` as float32 [N]."""
    key, quality = f"{split}/quality_{name}", values[f"quality_{name}"]
    if quality.shape != values["label"].shape[:1] or quality.dtype.kind not in "iuf":
        raise DataError(
            f"{key}: {quality.dtype}{list(quality.shape)}; allowed: one number an example, "
            f"{list(values['label'].shape[:1])}"
        )
    quality = np.asarray(quality, np.float32)
    if not np.isfinite(quality).all():
        raise DataError(f"{key}: NaN or infinite values")
    return quality


@dataclasses.dataclass(frozen=True, eq=False)
class RawArraySource:
    """The examples of one split: a `Preprocessing` and a stored array for each modality.

    Groups and ids are held apart from the examples, since a batch holds no strings.
    """

    modalities: Mapping[str, Preprocessing]
    arrays: Mapping[str, np.ndarray]
    labels: np.ndarray
    masks: Mapping[str, np.ndarray]
    qualities: Mapping[str, np.ndarray]
    groups: np.ndarray | None = None
    ids: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Example:
        example: Example = {"label": self.labels[index]}
        for name, one in self.modalities.items():
            mask = self.masks[name][index] if name in self.masks else None
            example[name] = one.apply(_plain(self.arrays[name][index]), mask)
            if mask is not None:
                example[f"{name}_mask"] = np.asarray(mask)
        for name, quality in self.qualities.items():
            example[f"quality_{name}"] = quality[index]
        return example


def _make_modality(
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
    _check_array("train", name, train, train.shape[1:])
    kind = kind or infer_kind(train.shape[1:], _plain(train[:0]).dtype, f"train/{name}")
    raw_shape = train.shape[1:]
    for split, array in arrays.items():
        _check_array(split, name, array, raw_shape)
    shape, _ = fit_shape(name, raw_shape, kind)
    # One that holds every split's, in this machine's byte order: another one is a matter of files.
    raw_dtype = str(np.result_type(*(_plain(array[:0]).dtype for array in arrays.values())))
    if kind == "tokens":
        largest = max(_largest_token(f"{split}/{name}", array) for split, array in arrays.items())
        size = max(1 + largest, 2)  # the least that a table of embeddings may have
        return Preprocessing(
            ModalityInfo(name, kind, shape, "int32", vocab_size=size), raw_shape, raw_dtype
        )

    # In blocks, since a mapped array may be larger than memory; every split's values are checked,
    # and those of training only are measured.
    stats = RunningStats(shape[-1])
    for split, array in arrays.items():
        for values in _checked_blocks(f"{split}/{name}", array, masks.get(split)):
            if split == "train":
                stats.add(values.reshape(-1, shape[-1]))
    if kind in ("image", "video") and all(a.dtype == np.uint8 for a in arrays.values()):
        mean, std = (tuple(values.tolist()) for values in stats.mean_and_std(scale=255.0))
        pixels = ModalityInfo(name, kind, shape, "uint8", mean=mean, std=std)
        return Preprocessing(pixels, raw_shape, raw_dtype)
    if not standardize:
        return Preprocessing(ModalityInfo(name, kind, shape, "float32"), raw_shape, raw_dtype)
    standard = ModalityInfo(name, kind, shape, "float32", unit=1.0)
    center, scale = (tuple(values.tolist()) for values in stats.mean_and_std())
    return Preprocessing(standard, raw_shape, raw_dtype, center, scale)


def _check_array(split: str, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
    """Shape as in the training split, no empty axis, a numeric dtype."""
    key = f"{split}/{name}"
    dtype = _plain(array[:0]).dtype
    if dtype.kind not in "biuf":
        hint = _NO_NUMBERS.get(dtype.kind, "")
        raise DataError(f"{key}: dtype {dtype}; allowed: integer, float or boolean{hint}")
    if array.shape[1:] != shape:
        raise DataError(
            f"{key}: examples of shape {list(array.shape[1:])}, but {list(shape)} in train/{name}; "
            "all splits need the same shape (pad or crop them)"
        )
    if 0 in array.shape:
        raise DataError(f"{key}: shape {list(array.shape)} has an axis of length 0")


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
        raise DataError(f"{key}: dtype {array.dtype}; allowed for token ids: integers")
    bounds = [(int(block.min()), int(block.max())) for _, block in _blocks(array)]
    low, high = min(least for least, _ in bounds), max(most for _, most in bounds)
    if low < 0 or high >= MAX_VOCABULARY:
        raise DataError(
            f"{key}: integers from {low} to {high} cannot be token ids (0 to {MAX_VOCABULARY - 1}, "
            "0 pads); store measurements as float32"
        )
    return high


def unpacked(array: np.ndarray | StoredArray) -> np.ndarray:
    """The array itself."""
    return array.read() if isinstance(array, StoredArray) else array


def check_memory(arrays: Iterable[np.ndarray | StoredArray]) -> None:
    """Refuses what cannot be unpacked on this machine.

    Raises:
      DataError: the arrays have more bytes than the machine's memory.
    """
    wanted = sum(array.nbytes for array in arrays if isinstance(array, StoredArray))
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # not on every system
        return
    if wanted > memory:
        raise DataError(
            f"data.path: {wanted / 2**30:.1f} GiB when unpacked, but this machine has "
            f"{memory / 2**30:.1f} GiB of memory; use a folder of .npy files, which are mapped"
        )


def open_arrays(path: Path | epath.Path) -> dict[str, np.ndarray | StoredArray]:
    """All arrays of an `.npz` file, or of a folder of `.npy` files, by key.

    What is in an archive is not unpacked yet: its keys, shapes and dtypes are known from the
    archive's directory and the arrays' headers, since a file of a few megabytes may hold gigabytes.
    Nothing is unpickled: an array of Python objects is refused. Local `.npy` files are
    memory-mapped, those on gs:// are read. bfloat16, which NumPy's format writes as `V2`, is read
    as such.

    Raises:
      DataError: the path is missing or damaged, or holds something else.
    """
    files = _files(path)
    if files is not None:
        if not files:
            raise DataError(f"data.path: {path}: the folder holds no .npy files; wanted {FORM}")
        names = {file.relative_to(path).with_suffix("").as_posix(): file for file in files}
        return {
            key: _numbers(_guarded(path, key, functools.partial(_load, file)), path, key)
            for key, file in names.items()
        }
    content = _guarded(path, "", path.read_bytes) if not isinstance(path, Path) else None
    file = path if content is None else io.BytesIO(content)
    start = _guarded(path, "", functools.partial(_start, file))
    check_lfs_pointer(start, f"data.path: {path}")
    if start.startswith(b"\x93NUMPY"):
        raise DataError(f"data.path: {path}: a single array; wanted an .npz with the keys {FORM}")
    if not start.startswith(b"PK"):  # nothing that can be read, and NumPy says what it is
        _guarded(path, "", functools.partial(np.load, file, allow_pickle=False))
        raise DataError(f"data.path: {path}: damaged or not a NumPy file")
    archive = _guarded(path, "", functools.partial(zipfile.ZipFile, file))
    members = archive.infolist()
    keys = [member.filename.removesuffix(".npy") for member in members]
    if len(set(keys)) != len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"data.path: {path}: two arrays have the name {twice!r}")
    return {
        key: _guarded(path, key, functools.partial(_stored, archive, member, path, key))
        for key, member in zip(keys, members, strict=True)
    }


def _start(file: Path | io.BytesIO) -> bytes:
    if isinstance(file, io.BytesIO):
        return file.getvalue()[:64]
    with open(file, "rb") as opened:
        return opened.read(64)


def _stored(
    archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path | epath.Path, key: str
) -> StoredArray:
    """A member by its header, which must fit the directory's sizes."""
    if not member.filename.endswith(".npy"):
        raise DataError(f"data.path: {path}: {key!r}: not an array")
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:  # version 3 is only for names of fields
            raise ValueError(f"a structured array, or a format of version {version}")
        shape, _, dtype = read_header(file)
        head = file.tell()
    if dtype.hasobject:
        raise ValueError("Object arrays")
    if min(shape, default=0) < 0:
        raise ValueError(f"shape {list(shape)}")
    claimed = head + math.prod(shape) * dtype.itemsize
    deflated = member.compress_type == zipfile.ZIP_DEFLATED
    if claimed != member.file_size or (
        deflated and member.file_size > MOST_DEFLATED * (member.compress_size + 1)
    ):
        raise ValueError(
            f"{dtype}{list(shape)} would be {claimed} bytes; the archive holds {member.file_size}, "
            f"packed into {member.compress_size}"
        )

    def read() -> np.ndarray:
        def unpack() -> np.ndarray:
            with archive.open(member) as file:
                return np.lib.format.read_array(file, allow_pickle=False)

        return _numbers(_guarded(path, key, unpack), path, key)

    return StoredArray(shape, _numbers(np.empty(0, dtype), path, key).dtype, read)


def _numbers(array: np.ndarray, path: Path | epath.Path, key: str) -> np.ndarray:
    """The array, where NumPy's format has kept what its values are; bfloat16 by its size."""
    if array.dtype.kind != "V":
        return array
    if array.dtype.names is not None or array.dtype.subdtype is not None:
        why = "a structured array; store an array for each field"
    elif array.dtype.itemsize == 2:
        values = array.view(jnp.bfloat16)
        return values if isinstance(array, np.memmap) else values.astype(np.float32)
    elif array.dtype.itemsize == 1:
        why = "float8 or int4, of which NumPy's format does not keep which; store it as float32"
    else:
        why = "raw bytes; store numbers"
    raise DataError(f"data.path: {path}: {key!r}: dtype {array.dtype.str} is {why}")


def _files(path: Path | epath.Path) -> list[Any] | None:
    """The `.npy` files of a folder, in order; None for a file."""
    try:
        if not path.exists():
            raise DataError(f"data.path: {path}: no such file or folder")
        if not path.is_dir():
            return None
        if isinstance(path, Path):
            return sorted(path.rglob("*.npy"))
        return sorted([*path.glob("*.npy"), *path.glob("*/*.npy")])  # all that keys can name
    except DataError:
        raise
    except Exception as error:  # without rights, without gcsfs, without a network
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(f"data.path: {path}: cannot be reached ({reason})") from None


def _load(file: Path | epath.Path) -> np.ndarray:
    if isinstance(file, Path):
        check_lfs_pointer(file)
        return np.load(file, allow_pickle=False, mmap_mode="r")
    content = file.read_bytes()
    check_lfs_pointer(content, file)
    return np.load(io.BytesIO(content), allow_pickle=False)


def _guarded(path: Path | epath.Path, key: str, read: Callable[[], Any]) -> Any:
    """Returns what `read` returns; turns its errors into one line."""
    where = f"data.path: {path}" + (f": {key!r}" if key else "")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on headers from Python 2, and on damaged ones
            return read()
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{where}: does not fit into memory") from None
    except Exception as error:  # damaged archives raise almost any type
        reason = " ".join(str(error).split()) or type(error).__name__
        if "allow_pickle" in reason or "Object arrays" in reason or "Python objects" in reason:
            raise DataError(
                f"{where}: holds Python objects (a pickle), which are refused because reading them "
                "runs code; store numbers or fixed-width strings"
            ) from None
        raise DataError(f"{where}: damaged or not a NumPy file ({reason[:200]})") from None
