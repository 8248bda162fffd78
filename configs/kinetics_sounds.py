"""Kinetics-Sounds: 31 actions that are seen and heard, with the paper's settings.

python -m rollingq_jax.prepare kinetics_sounds --source KINETICS --data_dir DATA
python train.py --config configs/kinetics_sounds.py --config.data.path=DATA --workdir runs/ks

Hardware: one accelerator of 40 GB (estimated from the activations: about 25 GB in float32; half
with --config.model.dtype=bfloat16).

Published test accuracy (second-hand, from notes on the paper, whose tables were not seen): 67.0 %
without RollingQ (--config.rolling.enabled=False), 69.3 % with it; encoders from an ImageNet-21k
ViT-B/16 (--config.vit_weights=FILE), up to three rotations. Videos vanish from YouTube, so the
clips at hand differ from one laboratory to the next.
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
    config.rolling.max_rotations = 3
    config.vit_weights = ""  # B_16-i21k-*.npz (AugReg) or a timm .safetensors; none: from scratch
    config.data = ConfigDict(
        {
            **config.data,
            "name": "kinetics_sounds",
            "split_seed": 0,
            "num_frames": 3,
            "frame_size": 224,
            "crop_per": "clip",  # what is cropped and flipped alike; upstream: each frame by itself
            "corruptions": "",
        }
    )
    config.model.num_classes = 31
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
