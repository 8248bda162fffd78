"""Classes of images with a text each; the text is read as bytes, so it needs no vocabulary.

python train.py --config configs/image_text.py --config.data.path=FILE --workdir runs/image_text

FILE is a manifest (.csv or .jsonl) with the columns split, label, image (a path) and text:string
(the text itself; or text, the path of a .txt file):

    split,label,image,text:string
    train,pizza,images/1.jpg,thin crust with basil
    test,soup,images/2.jpg,served hot

Paths are relative to the manifest. See what was found first:
python -m rollingq_jax.check --config configs/image_text.py --path FILE
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
    config.data = ConfigDict(
        {
            **config.data,
            **dataclasses.asdict(MediaSizes(image_size=64)),
            "name": "folder",
            "modalities": ("image", "text"),
            "standardize": True,
            "corruptions": "",
        }
    )
    return config
