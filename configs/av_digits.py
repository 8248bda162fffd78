"""Spoken and handwritten digits, the demo: needs no download and no accelerator.

python train.py --config configs/av_digits.py --workdir runs/demo

About a minute on two cores. Noise and rolling were chosen on validation data (mean of five
seeds, best epoch): accuracy .535 for concat, .560 for plain attention with an audio share of .61
and a correlation of share and quality of -.17, .568 for this configuration with .50 and +.04.
"""

from ml_collections import ConfigDict

from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    """In training, noise is the same for all; quality varies in validation and test."""
    config = default_config()
    config.epochs = 24
    config.optimizer.learning_rate = 0.08
    config.rolling.beta = 0.2
    config.rolling.rho = 1.0
    config.rolling.max_rotations = 10
    config.data.name = "av_digits"
    config.data.regime = "noisy_audio"
    config.data.test_pairings = 3
    config.model.num_classes = 10
    config.model.encoders = ConfigDict(
        {
            "audio": {"kind": "spectrogram", "patch": (8, 8)},
            "visual": {"kind": "image", "patch": (2, 2)},
        }
    )
    # What `compare` tries for every arm alike, on validation data.
    config.compare.grid = ConfigDict({"optimizer": {"learning_rate": (0.02, 0.04, 0.08, 0.16)}})
    return config
