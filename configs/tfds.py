"""Any TFDS data set that is prepared as array_record files; every field can be typed.

python train.py --config configs/tfds.py --workdir runs/tfds --config.data.name=NAME \
  --config.data.path=DIR --config.data.features='visual=image, audio=sound, label=label'

NAME is a TFDS name (my_set, my_set/config, my_set:1.2.3), DIR TFDS's data directory. The features
of a set, and what was made of them:
python -m rollingq_jax.check --config configs/tfds.py --config.data.name=NAME ...

docs/howto/own_data.md says how to write such a set, without TensorFlow.
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
            "name": "my_set",
            "features": "",  # "visual=image, audio=nested/sound, label=label, group=speaker"
            "tfds_splits": "",  # "train=train[:80%], valid=train[80%:], test=test"; "": as they are
            "kinds": "",  # "audio=spectrogram": where the shape says otherwise
            "standardize": True,  # float modalities, with the training split's statistics
            "image_size": 64,  # of images without a fixed size
            "text_length": 128,  # bytes
            "sequence_length": 128,  # positions of sequences of varying length
            "vocab_size": 0,  # of token ids; needed where there are any
            "stats_examples": 256,
            "corruptions": "",
        }
    )
    return config
