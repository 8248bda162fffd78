"""CMU-MOSEI: sentiment of spoken sentences from feature sequences, with the paper's settings.

python -m rollingq_jax.prepare cmu_mosei --source mosei_senti_data.pkl --data_dir DATA
python train.py --config configs/cmu_mosei.py --config.data.path=DATA --workdir runs/cmu_mosei

The paper uses vision and text. All three modalities:
--config.data.modalities="('audio','text','vision')"

Hardware: one accelerator of 8 GB (estimated); a day or more on a CPU.

Published test accuracy (second-hand, from notes on the paper, whose tables were not seen): 62.7 %
without RollingQ (--config.rolling.enabled=False), 63.2 % with it, one rotation. The number of
classes behind them is not known: binary accuracies on this set are usually near 80 %, so compare
runs of this program with one another, under one label rule.
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
    config.data = ConfigDict(
        {
            **config.data,
            "name": "cmu_mosei",
            "modalities": ("text", "vision"),
            "label_rule": "positive",  # y > 0; "non_negative": y >= 0; "seven": rounded
            "standardize": False,  # as in MultiBench; True: each feature to mean 0, deviation 1
            "corruptions": "",
        }
    )
    config.model.dim = 768
    config.model.depth = 4
    config.model.num_heads = 12
    # What `compare` tries for every arm alike, on validation data: the paper's rate and around it.
    config.compare.grid = ConfigDict({"optimizer": {"learning_rate": (5e-4, 1e-3, 2e-3)}})
    return config
