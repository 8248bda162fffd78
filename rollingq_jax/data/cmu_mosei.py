"""CMU-MOSEI: sentiment of spoken sentences, as feature sequences of vision, audio and text.

Zadeh et al. 2018, in the form that MulT and MultiBench distribute: a pickle with "train", "valid"
and "test", each with vision [N, 50, 35], audio [N, 50, 74], text [N, 50, 300] (GloVe), labels
[N, 1, 1] from -3 to 3 and id. ``python -m rollingq_jax.prepare cmu_mosei`` turns it into .npy
files, through an unpickler that runs nothing; :func:`load` memory-maps them.

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
from typing import Any

import numpy as np

from rollingq_jax.data.measure import preprocessed
from rollingq_jax.data.mosei_arrays import MODALITIES, SPLITS, check_distribution, tidy
from rollingq_jax.data.mosei_source import LABEL_RULES, SentenceSource, classify, open_array
from rollingq_jax.data.options import choice, local_path, option
from rollingq_jax.data.preprocessing import Preprocessing
from rollingq_jax.data.restricted_pickle import load_pickle
from rollingq_jax.data.types import Dataset, ModalityInfo, Source
from rollingq_jax.errors import ConfigError, DataError

NAME = "cmu_mosei"
FORMAT_VERSION = 1
FILES = ("mosei_senti_data.pkl", "mosei_senti_data_noalign.pkl")
DOWNLOAD = (
    f"get {FILES[0]} (aligned) from the Google Drive folder that the README of "
    "github.com/pliang279/MultiBench names under CMU-MOSEI, and pass the file as --source"
)


@dataclasses.dataclass(frozen=True)
class Prepared:
    """What a preparation made.

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


def prepare(source: str | Path, data_dir: str | Path, *, strict: bool = False) -> Prepared:
    """Makes the arrays in ``data_dir/cmu_mosei``.

    The folder gets its name when all arrays are in it; after an interruption the next call begins
    anew, which takes minutes.

    Args:
      source: the pickle file, or a folder that holds one of them under its usual name.
      data_dir: where prepared data sets are kept.
      strict: raise at the first sentence whose features or label cannot be used (NaN, infinite, out
        of range) instead of leaving it out.

    Raises:
      DataError: the file is missing, is not such a pickle or asks for anything to be executed, its
        arrays do not fit together, or ``strict`` and a sentence cannot be used.
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
    data = check_distribution(load_pickle(path), str(path))
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
            tidied = tidy(data[split], split, strict)
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
    """The prepared arrays under ``config_data.path``.

    Args:
      config_data: ``path``, the --data_dir of the preparation; optional ``modalities`` (those to
        use, default all three), ``label_rule`` (a key of :data:`LABEL_RULES`), ``standardize``
        (False as in MultiBench; True: each feature to mean 0 and deviation 1 over training).
      seed: not used: the split is the published one.

    Raises:
      DataError: the arrays are missing or damaged.
      ConfigError: a field has the wrong type or value.
    """
    del seed
    path = option(config_data, "path", "")
    if not path:
        raise DataError("data.path: not given; the --data_dir that CMU-MOSEI was prepared into")
    folder = local_path(path, "data.path") / NAME
    info = _read_info(folder)
    modalities = tuple(sorted(set(option(config_data, "modalities", ()) or MODALITIES)))
    if unknown := [name for name in modalities if name not in MODALITIES]:
        raise ConfigError(f"data.modalities: {unknown[0]!r}; must be of {', '.join(MODALITIES)}")
    rule = choice(config_data, "label_rule", tuple(LABEL_RULES))
    splits: dict[str, Source] = {}
    for split in SPLITS:
        sentiment = np.array(open_array(folder / f"{split}_labels.npy", info["counts"][split]))
        labels = classify(sentiment, rule)
        splits[split] = SentenceSource(folder, split, modalities, labels)
    example = splits["train"][0]
    infos = {name: ModalityInfo(name, "sequence", example[name].shape) for name in modalities}
    scale: dict[str, dict[str, Any]] = {name: {} for name in modalities}
    if option(config_data, "standardize", False):
        scale = {n: {k: tuple(info["moments"][n][k]) for k in ("mean", "std")} for n in modalities}
    preprocessing = {
        name: Preprocessing(one, one.shape, one.dtype, clip=None, **scale[name])
        for name, one in infos.items()
    }
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    return Dataset(
        splits=preprocessed(splits, preprocessing),
        modalities=infos,
        preprocessing=preprocessing,
        num_classes=len(LABEL_RULES[rule]),
        class_names=LABEL_RULES[rule],
        description=(
            f"CMU-MOSEI from {info['file']}, {counts}; label rule: {rule}; "
            f"left out: {info['without_text']} sentences without text, "
            f"{len(info['unreadable'])} unreadable"
        ),
    )
