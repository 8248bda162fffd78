"""CREMA-D: six emotions acted by 91 actors; audio is the voice, visual the face.

Cao et al. 2014, github.com/CheyneyComputerScience/CREMA-D, 7,442 clips. `python -m
rollingq_jax.prepare crema_d` makes records from the original tree (AudioWAV/, VideoFlash/) or from
frames that were extracted before (Image-01-FPS/<clip>/00000.jpg); `load` reads them.

Audio is upstream's spectrogram. Of the frames, training draws some at random and crops and flips
them all alike; evaluation takes evenly spaced ones, so that a test accuracy is reproducible
(upstream draws there too).
"""

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rollingq_jax.data.audio import log_stft, read_audio, resample, tile
from rollingq_jax.data.dataset import SPLITS, Dataset, Source, Subset, with_valid
from rollingq_jax.data.options import choice, given_path, local_path, option
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
)
from rollingq_jax.errors import DataError

NAME = "crema_d"
# In upstream's order, which OGM-GE and PMR share: the label is the position.
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")
LABELS = {code: label for label, code in enumerate(EMOTIONS)}
# Share of the actors in each part of the split by speaker.
ACTOR_SHARES = {"train": 0.7, "valid": 0.1, "test": 0.2}
CREMA_D_RATE = 22_050
CREMA_D_SAMPLES = 3 * CREMA_D_RATE
N_FFT, HOP = 512, 353
SPECTROGRAM_SHAPE = (N_FFT // 2 + 1, 1 + CREMA_D_SAMPLES // HOP, 1)
DOWNLOAD = (
    "get it with `git lfs install` and `git clone https://github.com/CheyneyComputerScience/CREMA-D`"
    " (7.6 GB) and pass that folder, which holds AudioWAV/ and VideoFlash/ (or, in its place,"
    " Image-01-FPS/ with extracted frames), as --source"
)


class ClipName(NamedTuple):
    """The parts of a clip's name: ActorID_Sentence_Emotion_Level."""

    actor: str
    sentence: str
    emotion: str
    level: str


def prepare(
    source: str | Path,
    data_dir: str | Path,
    *,
    strict: bool = False,
    workers: int = 1,
    fps: int = 1,
) -> RecordSet:
    """Makes the records in `data_dir/crema_d`, resuming an earlier call.

    Args:
      source: the original tree. If it holds published split lists, these are kept with the
        records; processedResults/summaryTable.csv gives the human ratings.
      data_dir: where prepared data sets are kept.
      strict: raise at the first unreadable clip instead of leaving it out.
      workers: clips read at once.
      fps: frames stored for each second; also which Image-XX-FPS folder is read where there is one.

    Raises:
      DataError: the tree is missing or not CREMA-D, or as in `write_records`.
    """
    recipe = make_recipe(Path(source), fps)
    return write_records(Path(data_dir) / NAME, recipe, strict=strict, workers=workers)


def make_recipe(source: Path, fps: int) -> Recipe:
    """The recipe of the records that are made from the tree `source`."""
    sounds = _sound_files(source)
    frames = _frame_files(source, fps)
    items = tuple(sorted(sounds.keys() | frames.keys()))
    tables = (source / "processedResults" / "summaryTable.csv", source / "summaryTable.csv")
    ratings = next((read_ratings(path) for path in tables if path.is_file()), None)
    lists = list_files(source)
    if lists:  # better now than after hours
        select(published_splits(source)[0], dict.fromkeys(items, 0), {}, str(source))

    def make(clip: str) -> tuple[dict[str, Any], dict[str, Any]]:
        label = LABELS[parse_clip(clip).emotion]
        if clip not in sounds:
            raise DataError(f"clip {clip!r}: no sound {source / 'AudioWAV' / clip}.wav")
        if clip not in frames:
            raise DataError(f"clip {clip!r}: no frames, only sound")
        waveform, rate = read_audio(sounds[clip])
        spectrogram = crema_d_spectrogram(resample(waveform, rate, CREMA_D_RATE))
        stored = (
            clip_from_folder(frames[clip])
            if frames[clip].is_dir()
            else clip_from_video(frames[clip], fps)
        )
        record = {
            "clip": clip,
            "audio": spectrogram[..., None],
            "frames": stored,
            "label": label,
        }
        row: dict[str, Any] = {"clip": clip, "label": label}
        if ratings is not None:
            row["quality"] = ratings.get(clip, (None, None))
        return record, row

    return Recipe(
        name=NAME,
        items=items,
        features=clip_features(SPECTROGRAM_SHAPE),
        make=make,
        settings={
            "fps": fps,
            "short_side": SHORT_SIDE,
            "extracted_frames": any(path.is_dir() for path in frames.values()),
            "ratings": ratings is not None,
        },
        description="CREMA-D: log spectrograms of 3 s and JPEG frames",
        attachments={
            name: (source / name).read_text(encoding="utf-8-sig") for name in lists.values()
        },
    )


def crema_d_spectrogram(waveform: np.ndarray) -> np.ndarray:
    """Upstream's audio for CREMA-D: three seconds by repetition, clipped to [-1, 1], log STFT.

    Upstream repeats three times at most; clips shorter than a second (CREMA-D has none) are
    repeated as often as needed here.

    Args:
      waveform: float [samples] at 22,050 Hz.

    Returns:
      float32 [257, 188], frequency by time; not normalized.
    """
    return log_stft(np.clip(tile(waveform, CREMA_D_SAMPLES), -1.0, 1.0), N_FFT, HOP)


def _sound_files(source: Path) -> dict[str, Path]:
    """{clip: WAV file}."""
    if not source.is_dir():
        raise DataError(f"CREMA-D, --source {source}: no such folder; {DOWNLOAD}")
    folder = source / "AudioWAV"
    if not folder.is_dir():
        there = ", ".join(sorted(path.name for path in source.iterdir())[:6]) or "nothing"
        raise DataError(f"CREMA-D, --source {source}: holds no AudioWAV/ but {there}; {DOWNLOAD}")
    return _by_clip(path for path in folder.iterdir() if path.suffix.lower() == ".wav")


def _frame_files(source: Path, fps: int) -> dict[str, Path]:
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


def load(config_data: Any, *, seed: int) -> Dataset:
    """The prepared records under `config_data.path`.

    Args:
      config_data: `path`, the --data_dir of the preparation; optional `splits`, a folder with
        published lists (default: those kept by the preparation, else a split by speaker),
        `split_seed` (0) of what is drawn, `num_frames` (3), `frame_size` (224),
        `crop_per` ("clip").
      seed: not used: the splits are the same for every run, so that runs can be compared.

    Raises:
      DataError: the records are missing or damaged, or the lists do not fit them.
      ConfigError: a field has the wrong type or value.
    """
    del seed
    path = given_path(config_data, "the --data_dir that CREMA-D was prepared into")
    records = open_records(
        path / NAME,
        f"prepare it: python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir {path}",
    )
    rows = records.rows
    labels = np.array([row["label"] for row in rows], np.int32)
    split_seed = option(config_data, "split_seed", 0, minimum=0)
    given = option(config_data, "splits", "")
    folder = local_path(given, "data.splits") if given else records.folder
    if given or list_files(folder):
        lists, rule = published_splits(folder)
    else:
        lists, rule = speaker_splits([row["clip"] for row in rows], split_seed)
    positions = {row["clip"]: number for number, row in enumerate(rows)}
    chosen, left_out = select(lists, positions, records.unreadable, str(folder))

    qualities, note = _qualities(rows)
    source = ClipSource(records.source(), labels, qualities)
    splits: dict[str, Source] = {split: Subset(source, chosen[split]) for split in chosen}
    if "valid" not in splits:
        splits = with_valid(splits, seed=split_seed)
        rule += f", valid a tenth of train, seed {split_seed}"
    num_frames = option(config_data, "num_frames", 3, minimum=1)
    size = option(config_data, "frame_size", 224, minimum=1)
    crop_per = choice(config_data, "crop_per", ("clip", "frame"))
    counts = ", ".join(f"{len(splits[split])} {split}" for split in SPLITS)
    return Dataset(
        splits=splits,
        modalities=clip_modalities(SPECTROGRAM_SHAPE, num_frames, size),
        num_classes=len(EMOTIONS),
        class_names=EMOTIONS,
        description=(
            f"CREMA-D, {counts}; split: {rule}; {left_out} listed clips unreadable; {num_frames} "
            f"frames of those at {records.settings['fps']} a second{note}"
        ),
        train_transforms=(TrainFrames("visual", num_frames, size, crop_per=crop_per),),
        eval_transforms=(EvalFrames("visual", num_frames, size),),
    )


def _qualities(rows: list[dict[str, Any]]) -> tuple[dict[str, np.ndarray], str]:
    """{modality: human rating} of all records, and a note for the description."""
    if "quality" not in rows[0]:
        return {}, ""
    audio, missing_audio = fill_ratings([row["quality"][0] for row in rows])
    visual, missing_visual = fill_ratings([row["quality"][1] for row in rows])
    note = f"; human ratings as quality, {missing_audio + missing_visual} missing"
    return {"audio": audio, "visual": visual}, note


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
    clip = ClipName(*found.groups())
    if clip.emotion not in LABELS:
        raise DataError(f"clip {name!r}: {_unknown(clip.emotion)}")
    return clip


def _unknown(code: str) -> str:
    return f"emotion code {code!r}; allowed: one of {', '.join(EMOTIONS)}"


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
    """The split lists in a folder; see `list_files`.

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


def read_split_list(path: Path) -> list[str]:
    """The clips of a published list: lines `clip,EMO`, with or without a header.

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
            raise DataError(f"{where}: {len(cells)} cells; allowed: clip,EMO")
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


def read_ratings(path: Path) -> dict[str, tuple[float | None, float | None]]:
    """Reads how clearly the voice or the face by itself conveys the intended emotion, from raters.

    `processedResults/summaryTable.csv` has, for raters who only heard a clip (Voice) and for
    those who only saw it (Face), the emotion with the most votes and the intensity from 0 to 100
    that those raters gave it; ties are joined by colons. The quality of a modality is that
    intensity / 100 if the vote is the emotion that was acted, divided by the number of emotions
    that tie, and 0 if it is another.

    Returns:
      {clip: (quality of audio, quality of visual)}, each from 0 to 1; None where no intensity is
      given.

    Raises:
      DataError: columns are missing, or a clip occurs twice.
    """
    rows = read_rows(path)
    header = next(rows, (0, []))[1]
    columns = ("FileName", "VoiceVote", "VoiceLevel", "FaceVote", "FaceLevel")
    if missing := [name for name in columns if name not in header]:
        raise DataError(f"{path}: no column {', '.join(missing)}; is it summaryTable.csv?")
    ratings: dict[str, tuple[float | None, float | None]] = {}
    for line, cells in rows:
        if len(cells) != len(header):
            raise DataError(f"{path}, line {line}: {len(cells)} cells, {len(header)} in the header")
        row = dict(zip(header, cells, strict=True))
        clip = row["FileName"]
        if clip in ratings:
            raise DataError(f"{path}, line {line}: duplicate clip {clip!r}")
        acted = clip.split("_")[2][:1] if clip.count("_") >= 2 else ""
        ratings[clip] = (
            _quality(acted, row["VoiceVote"], row["VoiceLevel"]),
            _quality(acted, row["FaceVote"], row["FaceLevel"]),
        )
    return ratings


def _quality(acted: str, votes: str, levels: str) -> float | None:
    """One modality's quality; `acted` is the emotion's first letter."""
    winners = votes.split(":")
    if acted not in winners:
        return 0.0 if votes else None
    try:
        intensity = dict(zip(winners, map(float, levels.split(":")), strict=True))[acted]
    except ValueError:
        return None
    return min(max(intensity / 100, 0.0), 1.0) / len(winners)


def fill_ratings(ratings: Sequence[float | None]) -> tuple[np.ndarray, int]:
    """Ratings as float32 [N]; unrated clips get the mean, which does not change correlations.

    Returns:
      (ratings, how many were missing).
    """
    values = np.array([np.nan if rating is None else rating for rating in ratings], np.float32)
    missing = np.isnan(values)
    mean = values[~missing].mean() if not missing.all() else np.float32(0)
    return np.where(missing, mean, values).astype(np.float32), int(missing.sum())


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
