"""Spoken and handwritten digits, the demo: needs no download and no accelerator.

python train.py --config configs/av_digits.py --workdir runs/demo

Quality varies from sample to sample, alike in training, validation and test. Data, encoders and
rolling were chosen on validation data of other seeds (11 to 30) as one regime in which plain
attention is biased and rolling helps; docs/results.md says what it does and does not show.
"""

from ml_collections import ConfigDict

from rollingq_jax.train.config import default_config


def get_config() -> ConfigDict:
    """The same noise for an example in every epoch, and a loss for each modality."""
    config = default_config()
    config.epochs = 24
    config.plain_twin = True  # so that the figures show the cycle as well as its end
    config.optimizer.learning_rate = 0.08
    # The keys of the modalities part early, and a query that is turned late is turned back by the
    # gradient: so early, often, and without a limit.
    config.rolling.beta = 0.05
    config.rolling.check_every = 8
    config.rolling.window = 1.0
    config.rolling.max_rotations = None
    # Without it the encoder of one modality learns next to nothing in any fusion, once the other
    # explains the labels, and no attention reaches an encoder that has learned nothing.
    config.baseline.name = "joint"
    config.data.name = "av_digits"
    config.data.regime = "hard_train"
    config.data.test_pairings = 3
    config.model.num_classes = 10
    config.model.depth = 1
    config.model.fusion_token_scale = 0.1
    config.model.encoders = ConfigDict(
        {
            "audio": {"kind": "spectrogram", "patch": (16, 16)},
            "visual": {"kind": "image", "patch": (4, 4)},
        }
    )
    # What `compare` tries for every arm alike, on validation data.
    config.compare.grid = ConfigDict({"optimizer": {"learning_rate": (0.04, 0.08, 0.16)}})
    config.compare.tune_seeds = 2
    return config
