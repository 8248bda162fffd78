"""Spoken and handwritten digits, the demo: needs no download and no accelerator.

python train.py --config configs/av_digits.py --workdir runs/demo
"""

from ml_collections import ConfigDict

from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    """Training data are clean but for the images' noise; quality varies in validation and test."""
    config = default_config()
    config.epochs = 24
    config.optimizer.learning_rate = 0.02
    config.rolling.beta = 0.2
    config.rolling.rho = 4.0
    config.rolling.max_rotations = 10
    config.data.name = "av_digits"
    config.data.regime = "varied_test"
    config.data.test_pairings = 3
    config.model.num_classes = 10
    config.model.encoders = ConfigDict(
        {
            "audio": {"kind": "spectrogram", "patch": (8, 8)},
            "visual": {"kind": "image", "patch": (2, 2)},
        }
    )
    return config
