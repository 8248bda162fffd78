"""CMU-MOSEI: sentiment of spoken sentences, as feature sequences of vision, audio and text.

Zadeh et al. 2018, in the form that MulT and MultiBench distribute: a pickle with "train", "valid"
and "test", each with vision [N, 50, 35], audio [N, 50, 74], text [N, 50, 300] (GloVe), labels
[N, 1, 1] from -3 to 3 and id. `python -m rollingq_jax.prepare cmu_mosei` turns it into .npy
files, through an unpickler that runs nothing; `load` memory-maps them.

As in MultiBench: -inf in audio becomes 0, sentences whose text is all zero are dropped, and the
zeros before a sentence's first word go to its end. Here a mask says which positions are real. Where
the modalities have different lengths (the file that is not aligned), each begins at its own first
row that is not zero.
"""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data.dataset import (
    REGRESSION,
    SINGLE_LABEL,
    SPLITS,
    Dataset,
    ModalityInfo,
    Source,
)
from rollingq_jax.data.options import choice, given_path, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.restricted_pickle import load_pickle
from rollingq_jax.data.sources.arrays import RawArraySource
from rollingq_jax.errors import ConfigError, DataError

NAME = "cmu_mosei"
FORMAT_VERSION = 1
FILES = ("mosei_senti_data.pkl", "mosei_senti_data_noalign.pkl")
MODALITIES = ("audio", "text", "vision")
# Rule of a label -> class names. "positive" is MultiBench's and counts 0 as not positive;
# "non_negative" is BalanceBenchmark's; accuracies under different rules cannot be compared.
# "regression" keeps the sentiment, which MulT and MultiBench predict with an L1 loss.
LABEL_RULES = {
    "positive": ("not positive", "positive"),
    "non_negative": ("negative", "not negative"),
    "three": ("negative", "neutral", "positive"),
    "seven": ("-3", "-2", "-1", "0", "+1", "+2", "+3"),
    "regression": ("sentiment",),
}
DOWNLOAD = (
    f"get {FILES[0]} (aligned) from the Google Drive folder that the README of "
    "github.com/pliang279/MultiBench names under CMU-MOSEI, and pass the file as --source"
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """The result of a preparation.

    Attributes:
      folder: of the arrays.
      counts: {split: sentences}.
      unreadable: {sentence: why it was left out}.
    """

    folder: Path
    counts: dict[str, int]
    unreadable: dict[str, str]

    def summary(self) -> str:
        """One line."""
        counts = ", ".join(f"{count} {split}" for split, count in self.counts.items())
        return f"{counts} sentences in {self.folder}, {len(self.unreadable)} unreadable"


class CleanSplit(NamedTuple):
    """The sentences of one split that can be used."""

    sequences: dict[str, np.ndarray]  # float32 [N, L, D]: real positions first, then zeros
    masks: dict[str, np.ndarray]  # bool [N, L], True where a position is real
    labels: np.ndarray  # float32 [N], from -3 to 3
    unreadable: dict[str, str]  # {sentence: what is wrong with it}
    without_text: int  # how many were left out because their text is all zero


def prepare(source: str | Path, data_dir: str | Path, *, strict: bool = False) -> Prepared:
    """Makes the arrays in `data_dir/cmu_mosei`.

    The folder gets its name when all arrays are in it; after an interruption the next call begins
    anew, which takes minutes.

    Args:
      source: the pickle file, or a folder that holds one of them under its usual name.
      data_dir: where prepared data sets are kept.
      strict: raise at the first sentence whose features or label cannot be used (NaN, infinite, out
        of range) instead of leaving it out.

    Raises:
      DataError: the file is missing, is not such a pickle or asks for anything to be executed, its
        arrays do not fit together, or `strict` and a sentence cannot be used.
    """
    folder = Path(data_dir) / NAME
    if folder.exists():
        info = _read_info(folder)
        if strict and info["unreadable"]:
            reason = next(iter(info["unreadable"].values()))
            raise DataError(f"{folder}: prepared without unreadable sentences; the first: {reason}")
        print(f"{folder}: already prepared; remove it to prepare it again")
        return Prepared(folder, info["counts"], info["unreadable"])
    path = _find(Path(source))
    print(f"reading {path}")
    data = _check_distribution(load_pickle(path), str(path))
    partial = folder.with_name(f"{NAME}.partial")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        if any(file.suffix not in (".npy", ".json") for file in partial.iterdir()):
            raise DataError(f"{partial}: not an unfinished preparation; move it away")
        shutil.rmtree(partial)
        partial.mkdir()
        info = _write(partial, data, path.name, strict)
        partial.rename(folder)
    except OSError as error:
        raise DataError(f"{folder}: cannot be written ({error.strerror or error})") from None
    return Prepared(folder, info["counts"], info["unreadable"])


def _find(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise DataError(f"CMU-MOSEI, --source {source}: no such file or folder; {DOWNLOAD}")
    found = [source / name for name in FILES if (source / name).is_file()]
    if not found:
        there = ", ".join(sorted(path.name for path in source.iterdir())[:6]) or "nothing"
        raise DataError(f"CMU-MOSEI, --source {source}: holds {there}; {DOWNLOAD}")
    if len(found) > 1:
        raise DataError(
            f"CMU-MOSEI, --source {source}: holds {found[0].name} and {found[1].name}; pass one of "
            "the files"
        )
    return found[0]


def _write(
    folder: Path, data: dict[str, dict[str, np.ndarray]], name: str, strict: bool
) -> dict[str, Any]:
    """All arrays, and info.json last."""
    from tqdm import tqdm

    counts, moments, without_text = {}, {}, 0
    unreadable: dict[str, str] = {}
    with tqdm(total=len(SPLITS), desc=NAME, unit="split") as progress:
        for split in SPLITS:
            tidied = _clean_split(data[split], split, strict)
            for problem in tidied.unreadable.values():
                progress.write(f"unreadable: {problem}", file=sys.stderr)
            if len(tidied.labels) == 0:
                raise DataError(f"CMU-MOSEI, {name}: no sentence of {split} can be used")
            for modality in MODALITIES:
                sequences, mask = tidied.sequences[modality], tidied.masks[modality]
                np.save(folder / f"{split}_{modality}.npy", sequences)
                np.save(folder / f"{split}_{modality}_mask.npy", mask)
                if split == "train":
                    real = sequences[mask].astype(np.float64)
                    std = real.std(axis=0)
                    moments[modality] = {
                        "mean": real.mean(axis=0).tolist(),
                        "std": np.where(std > 0, std, 1.0).tolist(),
                    }
            np.save(folder / f"{split}_labels.npy", tidied.labels)
            counts[split] = len(tidied.labels)
            without_text += tidied.without_text
            unreadable |= tidied.unreadable
            progress.update()
    info = {
        "format_version": FORMAT_VERSION,
        "file": name,
        "counts": counts,
        "unreadable": unreadable,
        "without_text": without_text,
        "moments": moments,
    }
    (folder / "info.json").write_text(json.dumps(info), encoding="utf-8")
    return info


def _check_distribution(data: Any, where: str) -> dict[str, dict[str, np.ndarray]]:
    """The arrays of a distribution's file, after their names, shapes and dtypes have been checked.

    Args:
      data: what the pickle held.
      where: it came from, for the messages.

    Returns:
      {split: {"audio", "text", "vision": [N, L, D]; "labels": [N]; "id": [N] of str}}.

    Raises:
      DataError: a split or an array is missing, is not numeric, or does not fit the others.
    """
    checked = {}
    for split in SPLITS:
        part = data.get(split) if isinstance(data, dict) else None
        if not isinstance(part, dict):
            keys = ", ".join(map(str, data)) if isinstance(data, dict) else type(data).__name__
            raise DataError(
                f"{where}: no {split!r} (holds {keys[:100]}); must hold train, valid and test"
            )
        arrays = {}
        for name in (*MODALITIES, "labels"):
            array = part.get(name)
            if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu":
                found = (
                    "nothing" if array is None else getattr(array, "dtype", type(array).__name__)
                )
                raise DataError(f"{where}: {split}/{name} is {found}; allowed: an array of numbers")
            arrays[name] = array
        _check_shapes(arrays, f"{where}: {split}")
        arrays["labels"] = arrays["labels"].reshape(-1)
        arrays["id"] = np.array(_names(part.get("id"), len(arrays["labels"])))
        checked[split] = arrays
    for name in MODALITIES:
        shapes = {split: checked[split][name].shape[1:] for split in SPLITS}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{split} {list(shape)}" for split, shape in shapes.items())
            raise DataError(f"{where}: {name} differs between splits: {found}")
    return checked


def _check_shapes(arrays: dict[str, np.ndarray], where: str) -> None:
    for name in MODALITIES:
        if arrays[name].ndim != 3 or 0 in arrays[name].shape[1:]:
            raise DataError(
                f"{where}/{name}: shape {list(arrays[name].shape)}; allowed: [sentences, "
                "positions, features]"
            )
    counts = {name: len(array) for name, array in arrays.items()}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name} {count}" for name, count in counts.items())
        raise DataError(f"{where}: different numbers of sentences: {found}")
    if arrays["labels"].size != counts["labels"]:
        raise DataError(
            f"{where}/labels: shape {list(arrays['labels'].shape)}; allowed: one number a sentence"
        )


def _names(ids: Any, count: int) -> list[str]:
    """A name for each sentence: the first column of its id, and its number."""
    names = []
    for number in range(count):
        try:
            first = np.ravel(np.asarray(ids[number], dtype=object))[0]
        except (TypeError, IndexError, KeyError):
            first = ""
        first = first.decode("utf-8", "replace") if isinstance(first, bytes) else str(first)
        names.append(f"{number} {first}".strip())
    return names


def _clean_split(arrays: dict[str, np.ndarray], split: str, strict: bool) -> CleanSplit:
    """Leaves out what cannot be used, and moves each sentence to the front of its sequence.

    Args:
      arrays: of one split, from `_check_distribution`.
      split: its name, for the messages.
      strict: raise for a sentence that cannot be used.

    Raises:
      DataError: `strict`, and a sentence holds NaN or infinite features, or a label outside of
        -3 .. 3.
    """
    count = len(arrays["labels"])
    problems = _problems(arrays, split)
    if strict and problems:
        raise DataError(problems[min(problems)])
    usable = np.array([number not in problems for number in range(count)], bool)
    has_text = np.array([bool(np.any(row)) for row in arrays["text"]], bool)
    sequences = {name: arrays[name][usable & has_text].astype(np.float32) for name in MODALITIES}
    sequences["audio"][np.isneginf(sequences["audio"])] = 0
    aligned = len({arrays[name].shape[1] for name in MODALITIES}) == 1
    starts = {name: _starts(sequences["text" if aligned else name]) for name in MODALITIES}
    masks = {}
    for name, rows in sequences.items():
        length = rows.shape[1]
        for row, start in zip(rows, starts[name], strict=True):
            row[: length - start] = row[start:].copy()
            row[length - start :] = 0
        masks[name] = np.arange(length)[None] < (length - starts[name])[:, None]
    return CleanSplit(
        sequences,
        masks,
        arrays["labels"][usable & has_text].astype(np.float32),
        {f"{split}/{arrays['id'][number]}": why for number, why in problems.items()},
        int(np.sum(usable & ~has_text)),
    )


def _starts(sequences: np.ndarray) -> np.ndarray:
    """[N, L, D] -> int64 [N]: the first position that is not all zero; L where every one is."""
    real = np.array([np.any(sequence != 0, axis=1) for sequence in sequences], bool)
    real = real.reshape(sequences.shape[:2])
    return np.where(real.any(axis=1), real.argmax(axis=1), sequences.shape[1])


def _problems(arrays: dict[str, np.ndarray], split: str) -> dict[int, str]:
    """{number of the sentence: why it cannot be used}."""
    problems = {}
    for number, label in enumerate(arrays["labels"]):
        where = f"{split}, sentence {arrays['id'][number]}"
        if not -3 <= label <= 3:  # false for NaN too
            problems[number] = f"{where}: label {label}; allowed: from -3 to 3"
            continue
        for name in MODALITIES:
            values = arrays[name][number]
            with np.errstate(over="ignore"):
                bad = ~np.isfinite(values.astype(np.float32))
            if name == "audio":
                bad &= ~np.isneginf(values)  # the distribution has them: they become 0
            if bad.any():
                first = values[bad][0]
                problems[number] = f"{where}: {int(bad.sum())} values of {name} are {first}"
                break
    return problems


def _read_info(folder: Path) -> dict[str, Any]:
    try:
        info = json.loads((folder / "info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise DataError(
            f"{folder}: no prepared CMU-MOSEI; prepare it: python -m rollingq_jax.prepare "
            f"cmu_mosei --source {FILES[0]} --data_dir {folder.parent}"
        ) from None
    if info.get("format_version") != FORMAT_VERSION:
        raise DataError(
            f"{folder}: arrays of format {info.get('format_version')}, this version reads "
            f"{FORMAT_VERSION}; remove the folder and prepare it again"
        )
    return info


def load(config_data: Any, *, seed: int) -> Dataset:
    """The prepared arrays under `config_data.path`.

    Args:
      config_data: `path`, the --data_dir of the preparation; optional `modalities` (those to
        use, default all three), `label_rule` (a key of `LABEL_RULES`), `standardize`
        (False as in MultiBench; True: each feature to mean 0 and deviation 1 over training).
      seed: not used: the split is the published one.

    Raises:
      DataError: the arrays are missing or damaged.
      ConfigError: a field has the wrong type or value.
    """
    del seed
    folder = given_path(config_data, "the --data_dir that CMU-MOSEI was prepared into") / NAME
    info = _read_info(folder)
    modalities = tuple(sorted(set(option(config_data, "modalities", ()) or MODALITIES)))
    if unknown := [name for name in modalities if name not in MODALITIES]:
        raise ConfigError(f"data.modalities: {unknown[0]!r}; allowed: of {', '.join(MODALITIES)}")
    rule = choice(config_data, "label_rule", tuple(LABEL_RULES))

    def open_all(split: str, suffix: str = "") -> dict[str, np.ndarray]:
        count = info["counts"][split]
        return {m: _open_array(folder / f"{split}_{m}{suffix}.npy", count) for m in modalities}

    train = open_all("train")
    infos = {m: ModalityInfo(m, "sequence", train[m].shape[1:]) for m in modalities}
    scale: dict[str, dict[str, Any]] = {name: {} for name in modalities}
    if option(config_data, "standardize", False):
        scale = {n: {k: tuple(info["moments"][n][k]) for k in ("mean", "std")} for n in modalities}
    preprocessing = {
        name: Preprocessing(one, one.shape, one.dtype, clip=None, **scale[name])
        for name, one in infos.items()
    }
    splits: dict[str, Source] = {}
    for split in SPLITS:
        sentiment = np.array(_open_array(folder / f"{split}_labels.npy", info["counts"][split]))
        labels = sentiment[:, None] if rule == REGRESSION else classify(sentiment, rule)
        masks = open_all(split, "_mask")
        splits[split] = RawArraySource(preprocessing, open_all(split), labels, masks, {})
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    return Dataset(
        splits=splits,
        modalities=infos,
        preprocessing=preprocessing,
        num_classes=len(LABEL_RULES[rule]),
        class_names=LABEL_RULES[rule],
        description=(
            f"CMU-MOSEI from {info['file']}, {counts}; label rule: {rule}; "
            f"left out: {info['without_text']} sentences without text, "
            f"{len(info['unreadable'])} unreadable"
        ),
        task=REGRESSION if rule == REGRESSION else SINGLE_LABEL,
    )


def _open_array(path: Path, count: int) -> np.ndarray:
    """A memory-mapped array of `count` rows."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: missing or damaged ({str(error)[:100]})") from None
    if len(array) != count:
        raise DataError(f"{path}: {len(array)} rows instead of {count}; prepare it again")
    return array


def classify(sentiment: np.ndarray, rule: str) -> np.ndarray:
    """Sentiment from -3 to 3, float [N] -> class numbers int32 [N].

    "positive": y > 0; "non_negative": y >= 0; "three": the sign, plus 1; "seven":
    rounded to the nearest of -3 .. 3 (halves to the even number), plus 3.
    """
    if rule == "positive":
        return (sentiment > 0).astype(np.int32)
    if rule == "non_negative":
        return (sentiment >= 0).astype(np.int32)
    if rule == "three":
        return (np.sign(sentiment) + 1).astype(np.int32)
    return (np.clip(np.rint(sentiment), -3, 3) + 3).astype(np.int32)
