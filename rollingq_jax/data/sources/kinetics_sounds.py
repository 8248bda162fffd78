"""Kinetics-Sounds: 31 kinds of action that can be seen and heard, ten-second clips from YouTube.

The media cannot be passed on. `python -m rollingq_jax.prepare kinetics_sounds` makes records from
a folder of videos and the published lists, or from the preprocessed tree that upstream reads
(train_spec/<name>.npy and train-frames-1fps/train/<name>/frame_00001.jpg ...); `load` reads
them. Audio is a Kaldi filter bank of 1,024 frames; see `kinetics_fbank`. Of the frames, one second
apart, each third of the clip gives one; see `rollingq_jax.data.video.segment_frames`.

Upstream leaves out clips with three frames or fewer; here every clip with a frame is kept. Sound
from a video is averaged over its channels and resampled to 16 kHz; upstream takes the first channel
at whatever rate its WAV files had.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data.audio import kaldi_fbank, resample
from rollingq_jax.data.dataset import SPLITS, Dataset, Source, Subset, with_valid
from rollingq_jax.data.options import choice, given_path, option
from rollingq_jax.data.records import (
    ClipSource,
    Recipe,
    RecordSet,
    clip_features,
    clip_modalities,
    open_records,
    write_records,
)
from rollingq_jax.data.video import (
    SHORT_SIDE,
    EvalFrames,
    TrainFrames,
    clip_from_folder,
    clip_from_video,
    read_video_audio,
    segment_frames,
)
from rollingq_jax.errors import DataError

NAME = "kinetics_sounds"
NUM_CLASSES = 31
FBANK_RATE = 16_000
FBANK_FRAMES, FBANK_BINS = 1024, 128
# Mean and half the divisor that upstream's preparation of Kinetics-Sounds uses.
FBANK_MEAN, FBANK_STD = -4.503877, 5.141276
FBANK_SHAPE = (FBANK_FRAMES, FBANK_BINS, 1)
# (train, test) of the two published formats, the one preferred first.
LISTS = (("ks_train_overlap.txt", "ks_test_overlap.txt"), ("my_train.txt", "my_test.txt"))
SPECTROGRAMS = {"train": "train_spec", "test": "test_spec"}
FRAMES = {"train": "train-frames-1fps/train", "test": "val-frames-1fps/test"}
CLASS_FILE = "classes.txt"
VIDEO_SUFFIXES = (".avi", ".flv", ".mkv", ".mov", ".mp4", ".webm")
DOWNLOAD = (
    "get the lists ks_train_overlap.txt and ks_test_overlap.txt from data/ of "
    "github.com/GeWu-Lab/Certifiable-Robust-Multi-modal-Training (or my_train.txt and my_test.txt "
    "from data/KineticSound/ of github.com/GeWu-Lab/OGM-GE_CVPR2022) and the videos with "
    "github.com/cvdfoundation/kinetics-dataset; put the lists into the folder that holds the "
    "videos, or train_spec/ and train-frames-1fps/, and pass it as --source"
)
Reader = Callable[[str, str], tuple[np.ndarray, list[bytes]]]


def prepare(
    source: str | Path,
    data_dir: str | Path,
    *,
    strict: bool = False,
    workers: int = 1,
    fps: int = 1,
) -> RecordSet:
    """Makes the records in `data_dir/kinetics_sounds`, resuming an earlier call.

    Args:
      source: the folder with the lists, and videos at any depth or upstream's preprocessed tree.
        If it holds classes.txt, 31 lines, these are the classes' names (which the lists lack).
      data_dir: where prepared data sets are kept.
      strict: raise at the first clip that is missing or unreadable instead of leaving it out.
      workers: clips read at once.
      fps: frames stored for each second of a video.

    Raises:
      DataError: the folder is missing or holds something else, or as in `write_records`.
    """
    recipe = make_recipe(Path(source), fps)
    return write_records(Path(data_dir) / NAME, recipe, strict=strict, workers=workers)


def make_recipe(source: Path, fps: int) -> Recipe:
    """The recipe of the records that are made from the folder `source`."""
    if not source.is_dir():
        raise DataError(f"Kinetics-Sounds, --source {source}: no such folder; {DOWNLOAD}")
    files = next((pair for pair in LISTS if all((source / n).is_file() for n in pair)), None)
    if files is None:
        raise DataError(f"Kinetics-Sounds, --source {source}: holds no lists; {DOWNLOAD}")
    lists = dict(zip(("train", "test"), (read_list(source / name) for name in files), strict=True))
    if both := sorted(lists["train"].keys() & lists["test"].keys()):
        raise DataError(f"{source}: duplicate clip {both[0]!r}, in {files[0]} and {files[1]}")
    named = (source / CLASS_FILE).is_file()
    class_names = read_class_names(source / CLASS_FILE) if named else ()
    preprocessed = (source / SPECTROGRAMS["train"]).is_dir()
    read = _tree_reader(source) if preprocessed else _video_reader(source, fps)
    clips = {f"{split}/{name}": (split, name) for split in lists for name in sorted(lists[split])}

    def make(item: str) -> tuple[dict[str, Any], dict[str, Any]]:
        split, name = clips[item]
        label = lists[split][name]
        fbank, frames = read(split, name)
        record = {"clip": name, "audio": fbank[..., None], "frames": frames, "label": label}
        return record, {"clip": name, "split": split, "label": label}

    return Recipe(
        name=NAME,
        items=tuple(clips),
        features=clip_features(FBANK_SHAPE),
        make=make,
        settings={
            "fps": 1 if preprocessed else fps,
            "short_side": SHORT_SIDE,
            "preprocessed": preprocessed,
            "lists": list(files),
        },
        description="Kinetics-Sounds: Kaldi filter banks and JPEG frames",
        attachments={CLASS_FILE: "\n".join(class_names)} if class_names else {},
    )


def _tree_reader(source: Path) -> Reader:
    """(split, name) -> filter bank and frames, from upstream's preprocessed tree."""

    def read(split: str, name: str) -> tuple[np.ndarray, list[bytes]]:
        frames = clip_from_folder(source / FRAMES[split] / name)
        return _read_fbank(source / SPECTROGRAMS[split] / f"{name}.npy"), frames

    return read


def _read_fbank(path: Path) -> np.ndarray:
    """float32 [1024, 128] from a file of upstream's preparation."""
    try:
        fbank = np.load(path, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged or not an array ({str(error)[:100]})") from None
    if fbank.shape != FBANK_SHAPE[:2] or fbank.dtype.kind != "f":
        raise DataError(f"{path}: {fbank.dtype}{list(fbank.shape)}; allowed: float32[1024, 128]")
    if not np.isfinite(fbank).all():
        raise DataError(f"{path}: holds NaN or infinite values")
    return fbank.astype(np.float32)


def _video_reader(source: Path, fps: int) -> Reader:
    """(split, name) -> filter bank and frames, from the video of the same YouTube id and start.

    Raises:
      DataError: there are no videos; from the reader, if there is none of that name or more than
        one.
    """
    by_id: dict[str, list[tuple[int | None, Path]]] = {}
    for path in sorted(source.rglob("*")):
        if path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith("."):
            youtube_id, start = split_name(path.stem)
            by_id.setdefault(youtube_id, []).append((start, path))
    if not by_id:
        there = ", ".join(sorted(path.name for path in source.iterdir())[:6])
        raise DataError(
            f"Kinetics-Sounds, --source {source}: holds neither videos nor train_spec/ but "
            f"{there}; {DOWNLOAD}"
        )

    def read(split: str, name: str) -> tuple[np.ndarray, list[bytes]]:
        youtube_id, start = split_name(name)
        # Test lists and some downloads name no start second; then the id decides.
        paths = [
            path
            for other, path in by_id.get(youtube_id, [])
            if start is None or other is None or start == other
        ]
        if not paths:
            raise DataError(f"clip {name!r}: no video of that name")
        if len(paths) > 1:
            raise DataError(f"duplicate clip {name!r}: {paths[0]} and {paths[1]}")
        waveform, rate = read_video_audio(paths[0])
        fbank = kinetics_fbank(resample(waveform, rate, FBANK_RATE))
        return fbank, clip_from_video(paths[0], fps)

    return read


def kinetics_fbank(waveform: np.ndarray, rate: int = FBANK_RATE) -> np.ndarray:
    """Upstream's audio for Kinetics-Sounds: mean removed, 128 filters, 1,024 frames, normalized.

    Padding comes before (x + 4.503877) / (2 * 5.141276), as upstream has it, so a frame after the
    sound's end holds 0.438 throughout. Ten seconds give 998 frames.

    Args:
      waveform: float [samples].
      rate: sample rate in Hz.

    Returns:
      float32 [1024, 128], time by frequency.

    Raises:
      DataError: the sound is shorter than one frame, 25 ms.
    """
    samples = np.asarray(waveform, np.float64)
    features = kaldi_fbank(samples - samples.mean(), rate)[:FBANK_FRAMES]
    if len(features) == 0:
        raise DataError(f"sound of {len(samples)} samples at {rate} Hz; at least 25 ms are needed")
    padded = np.pad(features, ((0, FBANK_FRAMES - len(features)), (0, 0)))
    return (padded - FBANK_MEAN) / (2 * FBANK_STD)


def load(config_data: Any, *, seed: int) -> Dataset:
    """The prepared records under `config_data.path`.

    Args:
      config_data: `path`, the --data_dir of the preparation; optional `split_seed` (0) of the
        tenth of train that becomes "valid", `num_frames` (3), `frame_size` (224),
        `crop_per` ("clip").
      seed: not used: the splits are the same for every run, so that runs can be compared.

    Raises:
      DataError: the records are missing or damaged, or a list has no readable clip.
      ConfigError: a field has the wrong type or value.
    """
    del seed
    path = given_path(config_data, "the --data_dir that the data were prepared into")
    records = open_records(
        path / NAME,
        "prepare it: python -m rollingq_jax.prepare kinetics_sounds --source KINETICS --data_dir "
        f"{path}",
    )
    labels = np.array([row["label"] for row in records.rows], np.int32)
    parts = np.array([row["split"] for row in records.rows])
    source = ClipSource(records.source(), labels, {})
    splits: dict[str, Source] = {}
    for split in ("train", "test"):
        numbers = np.flatnonzero(parts == split)
        if len(numbers) == 0:
            raise DataError(f"{records.folder}: no clip of {split} is readable")
        splits[split] = Subset(source, numbers)
    split_seed = option(config_data, "split_seed", 0, minimum=0)
    splits = with_valid(splits, seed=split_seed)
    num_frames = option(config_data, "num_frames", 3, minimum=1)
    size = option(config_data, "frame_size", 224, minimum=1)
    crop_per = choice(config_data, "crop_per", ("clip", "frame"))
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    names = records.folder / CLASS_FILE
    return Dataset(
        splits=splits,
        modalities=clip_modalities(FBANK_SHAPE, num_frames, size),
        num_classes=NUM_CLASSES,
        class_names=read_class_names(names) if names.exists() else (),
        description=(
            f"Kinetics-Sounds, {counts}; split: published lists "
            f"{', '.join(records.settings['lists'])}, valid a tenth of train, seed {split_seed}; "
            f"{len(records.unreadable)} listed clips missing or unreadable"
        ),
        train_transforms=(
            TrainFrames("visual", num_frames, size, segment_frames, crop_per=crop_per),
        ),
        eval_transforms=(EvalFrames("visual", num_frames, size, segment_frames),),
    )


def read_list(path: Path) -> dict[str, int]:
    """The clips of a published list: lines `name label` or `name,10,label`.

    A name is `<ytid>_<ssssss>_<eeeeee>`, `<ytid>_<sec>` or `<ytid>`, with a media suffix or
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
            raise DataError(f"{where}: {line[:60]!r}; allowed: `name label` or `name,10,label`")
        name = re.sub(r"\.(wav|avi|flv|mkv|mov|mp4|webm)$", "", cells[0])
        label = int(cells[-1])
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"{where}: {name[:60]!r} is not a clip's name")
        if not 0 <= label < NUM_CLASSES:
            raise DataError(f"{where}: label {label}; allowed: from 0 to {NUM_CLASSES - 1}")
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
        raise DataError(f"{path}: {len(set(names))} different names; allowed: {NUM_CLASSES}")
    return names


def split_name(name: str) -> tuple[str, int | None]:
    """`<ytid>_000012_000022`, `<ytid>_12` or `<ytid>` -> (ytid, 12 or None)."""
    found = re.fullmatch(r"(.{11})(?:_(\d+)(?:_\d+)?)?", name)
    if not found:
        return name, None
    return found[1], None if found[2] is None else int(found[2])


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None
