"""CREMA-D's files: which clip's sound and frames lie where in the original tree."""

from collections.abc import Iterable
from pathlib import Path

from rollingq_jax.errors import DataError

DOWNLOAD = (
    "get it with `git lfs install` and `git clone https://github.com/CheyneyComputerScience/CREMA-D`"
    " (7.6 GB) and pass that folder, which holds AudioWAV/ and VideoFlash/ (or, in its place,"
    " Image-01-FPS/ with extracted frames), as --source"
)


def sound_files(source: Path) -> dict[str, Path]:
    """{clip: WAV file}."""
    if not source.is_dir():
        raise DataError(f"CREMA-D, --source {source}: no such folder; {DOWNLOAD}")
    folder = source / "AudioWAV"
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in source.iterdir())[:6]) or "nothing"
        raise DataError(f"CREMA-D, --source {source}: holds no AudioWAV/ but {there}; {DOWNLOAD}")
    return _by_clip(path for path in folder.iterdir() if path.suffix.lower() == ".wav")


def frame_files(source: Path, fps: int) -> dict[str, Path]:
    """{clip: folder of extracted frames, or video}."""
    extracted = source / f"Image-{fps:02d}-FPS"
    if extracted.is_dir():
        return _by_clip(path for path in extracted.iterdir() if path.is_dir())
    videos = source / "VideoFlash"
    if videos.is_dir():
        return _by_clip(path for path in videos.iterdir() if path.suffix.lower() == ".flv")
    others = sorted(path.name for path in source.glob("Image-*-FPS"))
    hint = f"there is {', '.join(others)}: pass its number as --fps" if others else DOWNLOAD
    raise DataError(
        f"CREMA-D, --source {source}: holds neither VideoFlash/ nor {extracted.name}/; {hint}"
    )


def _by_clip(paths: Iterable[Path]) -> dict[str, Path]:
    """{clip: path}; hidden files are left out."""
    found: dict[str, Path] = {}
    for path in sorted(paths):
        clip = path.stem if path.suffix else path.name
        if clip.startswith("."):
            continue
        if clip.endswith("_X"):  # some copies have 1040_ITH_SAD_X.wav for _XX
            clip += "X"
        if clip in found:
            raise DataError(f"duplicate clip {clip!r}: {found[clip]} and {path}")
        found[clip] = path
    return found


def not_a_pointer(path: Path) -> Path:
    """The path, unless Git LFS has yet to put the content there."""
    with open(path, "rb") as file:
        if file.read(24) == b"version https://git-lfs.":
            raise DataError(f"{path}: a Git LFS pointer without content; run `git lfs pull` there")
    return path
