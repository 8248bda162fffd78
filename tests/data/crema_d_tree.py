"""A small tree in CREMA-D's layout, of real WAV, FLV and JPEG files."""

import numpy as np

from rollingq_jax.data.sources.crema_d import EMOTIONS
from tests.data import media_files

ACTORS = (1001, 1002, 1003, 1004, 1005)


def clip_names(actors=ACTORS, emotions=EMOTIONS):
    """One clip for each actor and emotion."""
    return [f"{actor}_DFA_{emotion}_XX" for actor in actors for emotion in emotions]


def make_tree(root, clips=None, frames="flv", seconds=1.3, num_frames=33, size=(48, 64)):
    """AudioWAV/ with tones and VideoFlash/ or Image-01-FPS/ with gray frames; returns the root."""
    clips = clip_names() if clips is None else clips
    (root / "AudioWAV").mkdir(parents=True)
    for number, clip in enumerate(clips):
        media_files.write_wav(
            root / "AudioWAV" / f"{clip}.wav", seconds=seconds, frequency=200 + 20 * number
        )
        if frames == "flv":
            (root / "VideoFlash").mkdir(exist_ok=True)
            media_files.write_video(
                root / "VideoFlash" / f"{clip}.flv", num_frames=num_frames, size=size
            )
        else:
            folder = root / "Image-01-FPS" / clip
            folder.mkdir(parents=True)
            for i in range(frames):
                media_files.write_jpeg(folder / f"{25 * i:05d}.jpg", size=size, value=10 * i)
    return root


def write_ratings(path, clips):
    """summaryTable.csv: voices rated 60 for the right emotion, faces tied with another at 80."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ['"","FileName","VoiceVote","VoiceLevel","FaceVote","FaceLevel","MultiModalVote"']
    for number, clip in enumerate(clips):
        letter = clip.split("_")[2][0]
        other = "A" if letter != "A" else "S"
        lines.append(f'"{number}","{clip}","{letter}",60,"{other}:{letter}","20:80","{letter}"')
    path.write_text("\n".join(lines) + "\n")


def write_list(path, clips, header=False, bom=False, line_end="\n"):
    """A published split list."""
    lines = (["name,label"] if header else []) + [f"{c},{c.split('_')[2]}" for c in clips]
    text = line_end.join(lines) + line_end
    path.write_bytes((b"\xef\xbb\xbf" if bom else b"") + text.encode())


def flat(value, num=3, size=224):
    """A video of one gray level."""
    return np.full((num, size, size, 3), value, np.uint8)
