"""The configurations of the paper's data sets: settings, and a model that fits the data."""

import importlib.util
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from rollingq_jax.comparison.runs import settings_of
from rollingq_jax.data.corruption import corrupt
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.sources import cmu_mosei, crema_d, kinetics_sounds
from rollingq_jax.train.config import check_config
from rollingq_jax.train.experiment import Experiment, example_batch, resolve_config
from tests.data import crema_d_tree
from tests.data.sources import test_cmu_mosei, test_kinetics_sounds

ROOT = Path(__file__).resolve().parents[3]
ROTATIONS = {"crema_d": 1, "kinetics_sounds": 3, "cmu_mosei": 1}
CLASSES = {"crema_d": 6, "kinetics_sounds": 31, "cmu_mosei": 2}


def get_config(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """All three sets, prepared from small trees."""
    folder = tmp_path_factory.mktemp("paper")
    crema_d.prepare(crema_d_tree.make_tree(folder / "CREMA-D", frames=2), folder)
    kinetics_sounds.prepare(test_kinetics_sounds.make_preprocessed(folder / "KS"), folder)
    pickled = test_cmu_mosei.write(folder / "mosei_senti_data.pkl", test_cmu_mosei.make_data())
    cmu_mosei.prepare(pickled, folder)
    return folder


@pytest.mark.parametrize("name", ROTATIONS)
def test_settings_are_the_papers(name):
    config = get_config(name)
    check_config(config)
    assert config.data.name == name and config.rolling.max_rotations == ROTATIONS[name]
    assert (config.batch_size, config.epochs) == (64, 30)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.learning_rate) == ("sgd", 1e-3)
    assert (optimizer.momentum, optimizer.weight_decay) == (0.9, 1e-4)
    assert (config.model.dim, config.model.depth, config.model.num_heads) == (768, 4, 12)
    assert config.vit_weights == ""


@pytest.mark.parametrize("name", ROTATIONS)
def test_compare_tries_learning_rates_around_the_papers(name):
    config = get_config(name)
    rates = [setting["optimizer.learning_rate"] for setting in settings_of(config.compare.grid)]
    assert rates == [5e-4, 1e-3, 2e-3] and config.optimizer.learning_rate in rates


@pytest.mark.parametrize("name", ROTATIONS)
def test_each_config_opens_with_its_command_and_what_to_expect(name):
    text = (ROOT / "configs" / f"{name}.py").read_text()
    opening = text.split('"""')[1]
    assert f"python -m rollingq_jax.prepare {name}" in opening
    assert f"python train.py --config configs/{name}.py" in opening
    assert "Hardware:" in opening and "second-hand" in opening


def shapes(config, data_dir):
    """The resolved configuration, and the parameters' shapes without making them."""
    config.data.path = str(data_dir)
    dataset = load_dataset(config.data, seed=0)
    resolved = resolve_config(config, dataset)
    model = build_model(resolved, dataset)
    batch = example_batch(dataset)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), batch))["params"]
    return resolved, params


def build_model(config, dataset):
    config.batch_size = 4  # the small trees hold fewer than 64 examples
    return Experiment(config, dataset).model


def positions(params, modality):
    return params[f"encoder_{modality}"]["position"].shape


@pytest.mark.parametrize("name", ROTATIONS)
def test_the_model_of_full_size_fits_the_data(name, data_dir):
    resolved, params = shapes(get_config(name), data_dir)
    assert resolved.model.num_classes == CLASSES[name]
    expected = {
        "crema_d": {"audio": 11 * 16, "visual": 3 * 14 * 14},
        "kinetics_sounds": {"audio": 8 * 64, "visual": 3 * 14 * 14},
        "cmu_mosei": {"text": 50, "vision": 50},
    }[name]
    for modality, tokens in expected.items():
        assert positions(params, modality) == (1 + tokens, 768)


def test_the_number_of_parameters_is_the_papers(data_dir):
    """59.87 M for attention on CREMA-D.

    It counts what layers hold: neither class tokens nor positions. And it is for one frame.
    """
    config = get_config("crema_d")
    config.data.num_frames = 1
    _, params = shapes(config, data_dir)
    total = sum(
        math.prod(leaf.shape)
        for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        if path[-1].key not in ("cls", "position")
    )
    assert total / 1e6 == pytest.approx(59.87, abs=0.005)


@pytest.mark.parametrize("name", ROTATIONS)
def test_a_small_model_computes(name, data_dir):
    config = get_config(name)
    config.model.dim, config.model.depth, config.model.num_heads = 8, 1, 2
    config.data.path = str(data_dir)
    if "frame_size" in config.data:
        config.data.frame_size = 32
    dataset = load_dataset(config.data, seed=0)
    model = build_model(resolve_config(config, dataset), dataset)
    batch = next(
        eval_batches(dataset.splits["test"], batch_size=3, transforms=dataset.eval_transforms)
    )
    rng = np.random.default_rng(0)  # to compile jax's own initial values takes longer than the rest
    params = jax.tree.map(
        lambda leaf: rng.normal(0, 0.02, leaf.shape).astype(leaf.dtype),
        jax.eval_shape(lambda: model.init(jax.random.key(0), batch)),
    )
    logits, out = jax.jit(model.apply)(params, batch)
    assert logits.shape == (3, CLASSES[name]) and bool(jax.numpy.isfinite(logits).all())
    assert sorted(out["tokens"]) == sorted(dataset.modalities)


def test_noise_can_be_put_onto_decoded_frames(data_dir):
    config = get_config("crema_d")
    config.data.path, config.data.frame_size = str(data_dir), 16
    dataset = corrupt(
        load_dataset(config.data, seed=0), "audio=0.5,visual=1.0", train=False, seed=0
    )
    batch = next(
        eval_batches(dataset.splits["test"], batch_size=2, transforms=dataset.eval_transforms)
    )
    assert batch["visual"].shape == (2, 3, 16, 16, 3) and batch["visual"].dtype == "float32"
    assert (batch["quality_visual"] < 0).all()
