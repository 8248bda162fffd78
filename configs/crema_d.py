"""CREMA-D: six acted emotions from voice and face, with the paper's settings.

python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir DATA
python train.py --config configs/crema_d.py --config.data.path=DATA --workdir runs/crema_d

The published split lists are used if they lie in --source or --config.data.splits names their
folder; else no actor is in two splits, which is harder.

Hardware: one accelerator of 40 GB (estimated from the activations: about 20 GB in float32; half
with --config.model.dtype=bfloat16).

Published test accuracy (second-hand, from notes on the paper, whose tables were not seen): 48.8 %
without RollingQ (--config.rolling.enabled=False), 51.9 % with it; speaker-dependent split, encoders
from an ImageNet-21k ViT-B/16 (--config.vit_weights=FILE), one rotation.
"""

from ml_collections import ConfigDict

from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    config = default_config()
    config.epochs = 30
    config.batch_size = 64
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.momentum = 0.9
    config.optimizer.weight_decay = 1e-4
    config.rolling.max_rotations = 1
    config.vit_weights = ""  # B_16-i21k-*.npz (AugReg) or a timm .safetensors; none: from scratch
    config.data = ConfigDict(
        {
            **config.data,
            "name": "crema_d",
            "splits": "",  # folder of published lists; "": those kept with the records, if any
            "split_seed": 0,
            "num_frames": 3,
            "frame_size": 224,
            "crop_per": "clip",  # what is cropped and flipped alike; upstream: each frame by itself
            "corruptions": "",
        }
    )
    config.model.num_classes = 6
    config.model.dim = 768
    config.model.depth = 4
    config.model.num_heads = 12
    # Upstream normalizes with ImageNet's mean and deviation. The AugReg weights were trained with
    # 0.5 for both: set "mean" and "std" of visual to (0.5, 0.5, 0.5) to follow them instead.
    config.model.encoders = ConfigDict(
        {
            "audio": {"kind": "spectrogram", "patch": (16, 16)},
            "visual": {
                "kind": "video",
                "patch": (1, 16, 16),
                "mean": (0.485, 0.456, 0.406),
                "std": (0.229, 0.224, 0.225),
            },
        }
    )
    # What `compare` tries for every arm alike, on validation data: the paper's rate and around it.
    config.compare.grid = ConfigDict({"optimizer": {"learning_rate": (5e-4, 1e-3, 2e-3)}})
    return config
