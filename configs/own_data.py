"""Data of your own: kinds, sizes, number of classes and a small model follow from the file.

python train.py --config configs/own_data.py --config.data.path=FILE --workdir runs/own

FILE is an .npz (or a folder of .npy files) with the keys train/<modality>, train/label,
test/<modality>, test/label, or a manifest of media files (.csv, .jsonl).
See what was found first: python -m rollingq_jax.check --path FILE
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
    # The keys of two modalities part early, and a query that is turned late is turned back by the
    # gradient: so from a small imbalance on, several times an epoch where there are steps enough.
    config.rolling.beta = 0.05
    config.rolling.check_every = 8
    config.rolling.window = 1.0
    config.rolling.max_rotations = None
    config.data = ConfigDict(
        {
            **config.data,
            "name": "arrays",
            "kinds": "",  # "audio=spectrogram, visual=image": where the shape says otherwise
            "modalities": (),  # "audio,visual"; empty: all
            "columns": "",  # of a manifest: "label=emotion, audio=wav_path"
            "tokenizer": "",  # of its texts: a Hugging Face tokenizer.json; empty: bytes
            "standardize": True,  # float modalities, with the training split's statistics
            "corruptions": "",  # in training: "audio=0..2, visual=drop:0.2"
        }
    )
    return config
