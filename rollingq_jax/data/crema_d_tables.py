"""CREMA-D without its media: clip names, published lists, human ratings, a split by speaker."""

import csv
import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from rollingq_jax.errors import DataError

# In upstream's order, which OGM-GE and PMR share: the label is the position.
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
LABELS = {code: label for label, code in enumerate(EMOTIONS)}
SPLITS = ("train", "valid", "test")
# Share of the actors in each part of the split by speaker.
ACTOR_SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}


@dataclasses.dataclass(frozen=True)
class ClipName:
    """What a clip's name says: ActorID_Sentence_Emotion_Level."""

    clip: str
    actor: str
    sentence: str
    emotion: str
    level: str

    @property
    def label(self) -> int:
        """Position of the emotion in :data:`EMOTIONS`."""
        return LABELS[self.emotion]


def parse_clip(name: str) -> ClipName:
    """The parts of a clip's name, such as 1001_DFA_ANG_XX.

    Raises:
      DataError: the name has another form, or its emotion code is unknown.
    """
    found = re.fullmatch(r"(\d{4})_([A-Z]{3})_([A-Z]{3})_(XX|LO|MD|HI)", name)
    if not found:
        raise DataError(
            f"clip {name!r}: not a name of CREMA-D, ActorID_Sentence_Emotion_Level, such as "
            "1001_DFA_ANG_XX"
        )
    clip = ClipName(name, *found.groups())
    if clip.emotion not in LABELS:
        raise DataError(f"clip {name!r}: {_unknown(clip.emotion)}")
    return clip


def _unknown(code: str) -> str:
    return f"emotion code {code!r}; must be one of {', '.join(EMOTIONS)}"


def read_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """(line number, cells without blanks around them) of a CSV file, empty lines left out.

    A byte order mark and any line ends are accepted.

    Raises:
      DataError: the file is missing or not text.
    """
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            for cells in reader:
                cells = [cell.strip() for cell in cells]
                if any(cells):
                    yield reader.line_num, cells
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def read_split_list(path: Path) -> list[str]:
    """The clips of a published list: lines ``clip,EMO``, with or without a header.

    Raises:
      DataError: a line has another form, an unknown or contradictory emotion code, or a clip twice;
        the message names the line.
    """
    clips: dict[str, int] = {}
    for line, cells in read_rows(path):
        where = f"{path}, line {line}"
        if not clips and [cell.lower() for cell in cells[:2]] == ["name", "label"]:
            continue
        if len(cells) != 2:
            raise DataError(f"{where}: {len(cells)} cells; must be clip,EMO")
        name, code = cells
        if code not in LABELS:
            raise DataError(f"{where}: {_unknown(code)}")
        try:
            clip = parse_clip(name)
        except DataError as error:
            raise DataError(f"{where}: {error}") from None
        if clip.emotion != code:
            raise DataError(f"{where}: clip {name!r} is listed as {code!r}")
        if name in clips:
            raise DataError(f"{where}: duplicate clip {name!r}, already in line {clips[name]}")
        clips[name] = line
    if not clips:
        raise DataError(f"{path}: lists no clips")
    return list(clips)


def list_files(folder: Path) -> dict[str, str]:
    """{split: file name} of the published lists in a folder; empty where they are not all there.

    test.csv goes with train.csv, or with my_train.csv and val.csv, the same training clips divided
    into training and validation (from GeWu-Lab/Diagnosing_Relearning_ECCV2024), which are
    preferred. In all of them the same 91 actors speak in training and in test.
    """
    for files in (
        {"train": "my_train.csv", "valid": "val.csv", "test": "test.csv"},
        {"train": "train.csv", "test": "test.csv"},
    ):
        if all((folder / name).is_file() for name in files.values()):
            return files
    return {}


def published_splits(folder: Path) -> tuple[dict[str, list[str]], str]:
    """The split lists in a folder; see :func:`list_files`.

    Returns:
      ({split: clips}, what was used); without "valid" where there is no list of it.

    Raises:
      DataError: a list is missing or damaged, or a clip occurs in two of them.
    """
    files = list_files(folder)
    if not files:
        raise DataError(
            f"{folder}: no split lists; must hold test.csv and train.csv, or test.csv, "
            "my_train.csv and val.csv"
        )
    lists = {split: read_split_list(folder / name) for split, name in files.items()}
    seen: dict[str, str] = {}
    for split, clips in lists.items():
        for clip in clips:
            if clip in seen:
                raise DataError(
                    f"{folder}: duplicate clip {clip!r}, in {files[seen[clip]]} and {files[split]}"
                )
            seen[clip] = split
    return lists, f"published lists {', '.join(files.values())} (speaker-dependent)"


def speaker_splits(clips: Sequence[str], seed: int) -> tuple[dict[str, list[str]], str]:
    """A split in which no actor occurs twice: 70 % of them for train, 10 % valid, 20 % test.

    Raises:
      DataError: there are fewer than three actors.
    """
    actors = sorted({parse_clip(clip).actor for clip in clips})
    if len(actors) < 3:
        raise DataError(
            f"CREMA-D: {len(actors)} actors; a split by speaker needs at least 3 (or give lists in "
            "data.splits)"
        )
    order = np.random.default_rng(seed).permutation(len(actors))
    num_test = max(1, round(ACTOR_SHARES["test"] * len(actors)))
    num_valid = max(1, round(ACTOR_SHARES["valid"] * len(actors)))
    bounds = {"test": order[:num_test], "valid": order[num_test : num_test + num_valid]}
    part = {actors[i]: split for split, chosen in bounds.items() for i in chosen}
    lists: dict[str, list[str]] = {split: [] for split in SPLITS}
    for clip in clips:
        lists[part.get(parse_clip(clip).actor, "train")].append(clip)
    counts = f"{len(actors) - num_test - num_valid}/{num_valid}/{num_test}"
    return lists, f"speaker-disjoint by ActorID, seed {seed}, {counts} actors"


def select(
    lists: Mapping[str, Sequence[str]],
    positions: Mapping[str, int],
    unreadable: Mapping[str, str],
    where: str,
) -> tuple[dict[str, np.ndarray], int]:
    """Record numbers of the clips in each list.

    Args:
      lists: {split: clips}.
      positions: {clip: number of its record}.
      unreadable: clips that the preparation could not read; they are left out.
      where: the lists came from, for the message.

    Returns:
      ({split: int64 numbers}, how many listed clips were unreadable).

    Raises:
      DataError: a list names clips that are absent, or none of its clips is there.
    """
    absent = [
        clip
        for clips in lists.values()
        for clip in clips
        if clip not in positions and clip not in unreadable
    ]
    if absent:
        raise DataError(
            f"{where}: {len(absent)} of {sum(map(len, lists.values()))} listed clips are not among "
            f"the prepared ones, the first {absent[0]!r}"
        )
    numbers = {
        split: np.array([positions[clip] for clip in clips if clip in positions], np.int64)
        for split, clips in lists.items()
    }
    for split, chosen in numbers.items():
        if len(chosen) == 0:
            raise DataError(f"{where}: no clip of {split} is readable")
    left_out = sum(map(len, lists.values())) - sum(map(len, numbers.values()))
    return numbers, left_out
