"""Kinetics-Sounds without its media: published lists, class names, and finding a clip's video."""

import dataclasses
import re
from pathlib import Path

from rollingq_jax.errors import DataError

NUM_CLASSES = 31
VIDEO_SUFFIXES = (".avi", ".flv", ".mkv", ".mov", ".mp4", ".webm")


def read_list(path: Path) -> dict[str, int]:
    """The clips of a published list: lines ``name label`` or ``name,10,label``.

    A name is ``<ytid>_<ssssss>_<eeeeee>``, ``<ytid>_<sec>`` or ``<ytid>``, with a media suffix or
    without.

    Returns:
      {name without suffix: label}.

    Raises:
      DataError: the file cannot be read, a line has another form, a label is not one of 0 .. 30, or
        a clip occurs twice; the message names the line.
    """
    clips: dict[str, int] = {}
    for number, line in enumerate(_lines(path), 1):
        cells = [cell.strip() for cell in (line.split(",") if "," in line else line.split())]
        if cells in ([], [""]):
            continue
        where = f"{path}, line {number}"
        if len(cells) not in (2, 3) or not re.fullmatch(r"-?\d+", cells[-1]):
            raise DataError(f"{where}: {line[:60]!r}; must be `name label` or `name,10,label`")
        name = re.sub(r"\.(wav|avi|flv|mkv|mov|mp4|webm)$", "", cells[0])
        label = int(cells[-1])
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{where}: {name[:60]!r} is not a clip's name")
        if not 0 <= label < NUM_CLASSES:
            raise DataError(f"{where}: label {label}; must be from 0 to {NUM_CLASSES - 1}")
        if name in clips:
            raise DataError(f"{where}: duplicate clip {name!r}")
        clips[name] = label
    if not clips:
        raise DataError(f"{path}: lists no clips")
    return clips


def read_class_names(path: Path) -> tuple[str, ...]:
    """One name a line, in the order of the labels; the published lists come without.

    Raises:
      DataError: the file cannot be read, or does not hold 31 different names.
    """
    names = tuple(line.strip() for line in _lines(path) if line.strip())
    if len(names) != NUM_CLASSES or len(set(names)) != NUM_CLASSES:
        raise DataError(f"{path}: {len(set(names))} different names; must be {NUM_CLASSES}")
    return names


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """Videos by YouTube id (the first eleven characters of a name) and start second.

    Attributes:
      by_id: {id: [(start second or None, path)]}.
    """

    by_id: dict[str, list[tuple[int | None, Path]]]

    @classmethod
    def of_folder(cls, folder: Path, hint: str) -> "VideoIndex":
        """All videos under a folder.

        Raises:
          DataError: there are none; ``hint`` says where to get them.
        """
        by_id: dict[str, list[tuple[int | None, Path]]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
                youtube_id, start = split_name(path.stem)
                by_id.setdefault(youtube_id, []).append((start, path))
        if not by_id:
            there = ", ".join(sorted(path.name for path in folder.iterdir())[:6])
            raise DataError(
                f"Kinetics-Sounds, --source {folder}: holds neither videos nor train_spec/ but "
                f"{there}; {hint}"
            )
        return cls(by_id)

    def find(self, name: str) -> Path:
        """The video of a listed clip; where either has no start second, the id decides.

        Raises:
          DataError: there is none, or more than one.
        """
        youtube_id, start = split_name(name)
        paths = [
            path
            for other, path in self.by_id.get(youtube_id, [])
            if start is None or other is None or start == other
        ]
        if not paths:
            raise DataError(f"clip {name!r}: no video of that name")
        if len(paths) > 1:
            raise DataError(f"duplicate clip {name!r}: {paths[0]} and {paths[1]}")
        return paths[0]


def split_name(name: str) -> tuple[str, int | None]:
    """``<ytid>_000012_000022``, ``<ytid>_12`` or ``<ytid>`` -> (ytid, 12 or None)."""
    found = re.fullmatch(r"(.{11})(?:_(\d+)(?:_\d+)?)?", name)
    if not found:
        return name, None
    return found[1], None if found[2] is None else int(found[2])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
