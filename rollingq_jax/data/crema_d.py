"""CREMA-D: six emotions acted by 91 actors; audio is the voice, visual the face.

Cao et al. 2014, github.com/CheyneyComputerScience/CREMA-D, 7,442 clips. ``python -m
rollingq_jax.prepare crema_d`` makes records from the original tree (AudioWAV/, VideoFlash/) or from
frames that were extracted before (Image-01-FPS/<clip>/00000.jpg); :func:`load` reads them.

Audio is upstream's spectrogram. Of the frames, training draws some at random and crops and flips
them all alike; evaluation takes evenly spaced ones, so that a test accuracy is reproducible
(upstream draws there too).
"""

from pathlib import Path
from typing import Any

import numpy as np

from rollingq_jax.data import crema_d_tables as tables
from rollingq_jax.data.crema_d_files import frame_files, not_a_pointer, sound_files
from rollingq_jax.data.crema_d_ratings import fill_ratings, read_ratings
from rollingq_jax.data.features import CREMA_D_RATE, CREMA_D_SAMPLES, HOP, N_FFT
from rollingq_jax.data.features import crema_d_spectrogram as make_spectrogram
from rollingq_jax.data.frames import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    EvalFrames,
    TrainFrames,
)
from rollingq_jax.data.labels import with_valid
from rollingq_jax.data.media import read_audio, resample
from rollingq_jax.data.options import local_path, option
from rollingq_jax.data.record_writer import write_records
from rollingq_jax.data.records import ClipSource, Recipe, RecordSet, open_records
from rollingq_jax.data.stored_frames import SHORT_SIDE, clip_from_folder, clip_from_video
from rollingq_jax.data.types import Dataset, ModalityInfo, Source, Subset
from rollingq_jax.errors import DataError

NAME = "crema_d"
SPECTROGRAM_SHAPE = (N_FFT // 2 + 1, 1 + CREMA_D_SAMPLES // HOP, 1)


def prepare(
    source: str | Path,
    data_dir: str | Path,
    *,
    strict: bool = False,
    workers: int = 1,
    fps: int = 1,
) -> RecordSet:
    """Makes the records in ``data_dir/crema_d``, going on from where an earlier call stopped.

    Args:
      source: the original tree. If it holds published split lists, these are kept with the
        records; processedResults/summaryTable.csv gives the human ratings.
      data_dir: where prepared data sets are kept.
      strict: raise at the first unreadable clip instead of leaving it out.
      workers: clips read at a time.
      fps: frames stored for each second; also which Image-XX-FPS folder is read where there is one.

    Raises:
      DataError: the tree is missing or not CREMA-D, or as in
        :func:`~rollingq_jax.data.record_writer.write_records`.
    """
    recipe = make_recipe(Path(source), fps)
    return write_records(Path(data_dir) / NAME, recipe, strict=strict, workers=workers)


def make_recipe(source: Path, fps: int) -> Recipe:
    """How the records are made from the tree ``source``."""
    import tensorflow_datasets as tfds

    sounds = sound_files(source)
    frames = frame_files(source, fps)
    items = tuple(sorted(sounds.keys() | frames.keys()))
    ratings = _ratings(source)
    lists = tables.list_files(source)
    if lists:  # better now than after hours
        tables.select(tables.published_splits(source)[0], dict.fromkeys(items, 0), {}, str(source))

    def make(clip: str) -> tuple[dict[str, Any], dict[str, Any]]:
        name = tables.parse_clip(clip)
        if clip not in sounds:
            raise DataError(f"clip {clip!r}: no sound {source / 'AudioWAV' / clip}.wav")
        if clip not in frames:
            raise DataError(f"clip {clip!r}: no frames, only sound")
        waveform, rate = read_audio(not_a_pointer(sounds[clip]))
        spectrogram = make_spectrogram(resample(waveform, rate, CREMA_D_RATE))
        stored = (
            clip_from_folder(frames[clip])
            if frames[clip].is_dir()
            else clip_from_video(not_a_pointer(frames[clip]), fps)
        )
        record = {
            "clip": clip,
            "audio": spectrogram[..., None],
            "frames": stored,
            "label": name.label,
        }
        row: dict[str, Any] = {"clip": clip, "label": name.label}
        if ratings is not None:
            row["quality"] = ratings.get(clip, (None, None))
        return record, row

    return Recipe(
        name=NAME,
        items=items,
        features={
            "clip": tfds.features.Text(),
            "audio": tfds.features.Tensor(
                shape=SPECTROGRAM_SHAPE, dtype=np.float32, encoding="bytes"
            ),
            "frames": tfds.features.Sequence(tfds.features.Text()),
            "label": tfds.features.Scalar(np.int64),
        },
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


def _ratings(source: Path) -> dict[str, tuple[float | None, float | None]] | None:
    for path in (source / "processedResults" / "summaryTable.csv", source / "summaryTable.csv"):
        if path.is_file():
            return read_ratings(path)
    return None


def load(config_data: Any, *, seed: int) -> Dataset:
    """The prepared records under ``config_data.path``.

    Args:
      config_data: ``path``, the --data_dir of the preparation; optional ``splits``, a folder with
        published lists (default: those kept by the preparation, else a split by speaker),
        ``split_seed`` (0) of what is drawn, ``num_frames`` (3), ``frame_size`` (224).
      seed: not used: the splits are the same for every run, so that runs can be compared.

    Raises:
      DataError: the records are missing or damaged, or the lists do not fit them.
      ConfigError: a field has the wrong type or value.
    """
    del seed
    path = option(config_data, "path", "")
    if not path:
        raise DataError("data.path: not given; the --data_dir that CREMA-D was prepared into")
    records = open_records(
        local_path(path, "data.path") / NAME,
        f"prepare it: python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir {path}",
    )
    rows = records.rows
    labels = np.array([row["label"] for row in rows], np.int32)
    split_seed = option(config_data, "split_seed", 0, minimum=0)
    given = option(config_data, "splits", "")
    folder = local_path(given, "data.splits") if given else records.folder
    if given or tables.list_files(folder):
        lists, rule = tables.published_splits(folder)
    else:
        lists, rule = tables.speaker_splits([row["clip"] for row in rows], split_seed)
    positions = {row["clip"]: number for number, row in enumerate(rows)}
    chosen, left_out = tables.select(lists, positions, records.unreadable, str(folder))

    qualities, note = _qualities(rows)
    source = ClipSource(records.source(), labels, qualities)
    splits: dict[str, Source] = {split: Subset(source, chosen[split]) for split in chosen}
    if "valid" not in splits:
        splits = with_valid(splits, labels[chosen["train"]], seed=split_seed)
        rule += f", valid a tenth of train, seed {split_seed}"
    num_frames = option(config_data, "num_frames", 3, minimum=1)
    size = option(config_data, "frame_size", 224, minimum=1)
    counts = ", ".join(f"{len(splits[split])} {split}" for split in tables.SPLITS)
    return Dataset(
        splits=splits,
        modalities={
            "audio": ModalityInfo("audio", "spectrogram", SPECTROGRAM_SHAPE),
            "visual": ModalityInfo(
                "visual",
                "video",
                (num_frames, size, size, 3),
                "uint8",
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
            ),
        },
        num_classes=len(tables.EMOTIONS),
        class_names=tables.EMOTIONS,
        description=(
            f"CREMA-D, {counts}; split: {rule}; {left_out} listed clips unreadable; {num_frames} "
            f"frames of those at {records.settings['fps']} a second{note}"
        ),
        train_transforms=(TrainFrames("visual", num_frames, size),),
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
