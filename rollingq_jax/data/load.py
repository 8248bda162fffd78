"""From a configuration to a data set."""

import importlib
from collections.abc import Mapping
from typing import Any

from rollingq_jax.data.corruption import corrupt
from rollingq_jax.data.dataset import Dataset, without_valid
from rollingq_jax.data.options import check_fields, option
from rollingq_jax.models.spec import RESNET

# Each module has load(config_data, *, seed) -> Dataset, and is imported when its name is asked for:
# most need packages that the others do without.
LOADERS = {
    "arrays": "rollingq_jax.data.sources.arrays",
    "av_digits": "rollingq_jax.data.sources.av_digits",
    "av_mnist": "rollingq_jax.data.sources.av_mnist",
    **dict.fromkeys(
        ("ave", "balance_benchmark", "food_101", "ucf_101"), "rollingq_jax.data.sources.layouts"
    ),
    "cmu_mosei": "rollingq_jax.data.sources.cmu_mosei",
    "crema_d": "rollingq_jax.data.sources.crema_d",
    "huggingface": "rollingq_jax.data.sources.huggingface",
    "folder": "rollingq_jax.data.sources.media_folder",
    "kinetics_sounds": "rollingq_jax.data.sources.kinetics_sounds",
}
ANY_TFDS_NAME = "rollingq_jax.data.sources.tfds"
# Loaders of data whose kinds of modality the user may state.
OPEN_KINDS = (LOADERS["arrays"], LOADERS["huggingface"], ANY_TFDS_NAME)


def load_dataset(
    config_data: Any, *, seed: int, encoders: Mapping[str, Any] | None = None
) -> Dataset:
    """The data set that `config_data.name` names.

    Args:
      config_data: `config.data`: `name` ("av_digits") is a key of `LOADERS` or any TFDS name;
        `path`, `cache_dir` and the data set's own fields are its loader's to read. Without
        `validation` there is no such split. `corruptions` (see `rollingq_jax.data.corruption`) are
        put onto the training split.
      seed: of whatever the loader draws (generated data, a validation split).
      encoders: `config.model.encoders`, whose `kind`, `mean` and `std` say how own data are meant.

    Raises:
      DataError: the data are missing, damaged or not of the expected form.
      ConfigError: a field of `config_data` is not one of `.options.FIELDS`, or has a value
        that the loader does not allow.
    """
    check_fields(config_data)
    name = option(config_data, "name", "av_digits")
    place = LOADERS.get(name, ANY_TFDS_NAME)
    fields: dict[str, Any] = {"seed": seed}
    if place in OPEN_KINDS and encoders:
        specs = dict(encoders.items())
        stated = {m: spec.get("kind") for m, spec in specs.items()}
        # A network says nothing of the data: their kind is as their shape says.
        fields["kinds"] = {m: kind for m, kind in stated.items() if kind and kind != RESNET}
    dataset = importlib.import_module(place).load(config_data, **fields)
    if not option(config_data, "validation", True):
        dataset = without_valid(dataset)
    corruptions = option(config_data, "corruptions", "")
    return corrupt(dataset, corruptions, train=True, seed=seed, encoders=encoders)
