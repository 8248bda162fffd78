"""Sentiment from feature sequences of three modalities: audio, text and vision.

python train.py --config configs/sentiment.py --config.data.path=FILE --workdir runs/sentiment

FILE is an .npz (or a folder of .npy files): train/audio, train/text, train/vision float [N, L, D]
(L and D may differ between modalities), train/label [N] class numbers from 0, optionally
train/mask_<modality> bool [N, L] (False: padding); the same for test, optionally for valid.
"""

from ml_collections import ConfigDict

from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 30
    config.batch_size = 32
    config.optimizer.name = "adam"
    config.optimizer.weight_decay = 0.0
    config.optimizer.learning_rate = 2e-3
    config.optimizer.clip_norm = 1.0
    config.data = ConfigDict(
        {
            **config.data,
            "name": "arrays",
            "kinds": "audio=sequence, text=sequence, vision=sequence",
            "modalities": ("audio", "text", "vision"),
            "standardize": True,
            "corruptions": "",
        }
    )
    return config
