"""From a configuration to a data set."""

import importlib
from typing import Any

from rollingq_jax.data.options import option
from rollingq_jax.data.types import Dataset

# Each module has load(config_data, *, seed) -> Dataset, and is imported when its name is asked for:
# most need packages that the others do without.
LOADERS = {
    "arrays": "rollingq_jax.data.arrays",
    "av_digits": "rollingq_jax.data.av_digits",
    "cmu_mosei": "rollingq_jax.data.cmu_mosei",
    "crema_d": "rollingq_jax.data.crema_d",
    "folder": "rollingq_jax.data.folder",
    "kinetics_sounds": "rollingq_jax.data.kinetics_sounds",
}
ANY_TFDS_NAME = "rollingq_jax.data.tfds_source"


def load_dataset(config_data: Any, *, seed: int) -> Dataset:
    """The data set that ``config_data.name`` names.

    Args:
      config_data: ``config.data``: ``name`` ("av_digits") is a key of :data:`LOADERS` or any TFDS
        name; ``path``, ``cache_dir`` and the data set's own fields are its loader's to read.
      seed: of whatever the loader draws (generated data, a validation split).

    Raises:
      DataError: the data are missing, damaged or not of the expected form.
      ConfigError: a field of ``config_data`` has a value that the loader does not allow.
    """
    name = option(config_data, "name", "av_digits")
    module = importlib.import_module(LOADERS.get(name, ANY_TFDS_NAME))
    return module.load(config_data, seed=seed)
