"""CREMA-D's human ratings as the quality of each modality."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rollingq_jax.data.crema_d_tables import read_rows
from rollingq_jax.errors import DataError


def read_ratings(path: Path) -> dict[str, tuple[float | None, float | None]]:
    """How clearly the voice alone and the face alone convey the intended emotion, from raters.

    ``processedResults/summaryTable.csv`` has, for raters who only heard a clip (Voice) and for
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
    """One modality's quality; ``acted`` is the emotion's first letter."""
    winners = votes.split(":")
    if acted not in winners:
        return 0.0 if votes else None
    try:
        intensity = dict(zip(winners, map(float, levels.split(":")), strict=True))[acted]
    except ValueError:
        return None
    return min(max(intensity / 100, 0.0), 1.0) / len(winners)


def fill_ratings(ratings: Sequence[float | None]) -> tuple[np.ndarray, int]:
    """Ratings as float32 [N]; unrated clips get the mean, which leaves correlations alone.

    Returns:
      (ratings, how many were missing).
    """
    values = np.array([np.nan if rating is None else rating for rating in ratings], np.float32)
    missing = np.isnan(values)
    mean = values[~missing].mean() if not missing.all() else np.float32(0)
    return np.where(missing, mean, values).astype(np.float32), int(missing.sum())
