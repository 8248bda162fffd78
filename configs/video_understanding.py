"""Classes of video clips from their sound and their frames.

python train.py --config configs/video_understanding.py --config.data.path=FILE --workdir runs/video

FILE is a manifest (.csv or .jsonl) with the columns split, label, audio:audio and visual:video,
both paths of videos with sound (the same file twice), or audio a .wav or .flac file:

    split,label,audio:audio,visual:video
    train,dog,clips/1.mp4,clips/1.mp4
    test,cat,clips/2.mp4,clips/2.mp4

Paths are relative to the manifest. See what was found first:
python -m rollingq_jax.check --config configs/video_understanding.py --path FILE
"""

import dataclasses

from ml_collections import ConfigDict

from rollingq_jax.data.sources.media_folder import MediaSizes
from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 30
    config.batch_size = 32
    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip_norm = 1.0
    sizes = MediaSizes(audio_bins=64, audio_frames=96, image_size=64, video_frames=4)
    config.data = ConfigDict(
        {
            **config.data,
            **dataclasses.asdict(sizes),
            "name": "folder",
            "modalities": ("audio", "visual"),
            "standardize": True,
            "corruptions": "",
        }
    )
    return config
