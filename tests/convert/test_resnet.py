"""ResNet-18 against torchvision's, whose outputs are golden values, and its weights read."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax.convert import is_resnet, load_resnet, load_vit
from rollingq_jax.errors import DataError
from rollingq_jax.models import build_model
from tests.golden_inputs import resnet18_state_dict, wave

GOLDEN = Path(__file__).parents[1] / "golden" / "resnet18.npz"


def model(channels=3, dim=512):
    encoders = {"other": {"kind": "vector", "depth": 0}, "visual": {"kind": "resnet18"}}
    net = build_model({"num_classes": 2, "dim": dim, "fusion": "concat", "encoders": encoders})
    batch = {"other": jnp.ones((4, 3)), "visual": jnp.ones((4, 40, 70, channels))}
    return net, batch


def variables_of(net, batch):
    shapes = jax.eval_shape(net.init, jax.random.key(0), batch)
    filled = jax.tree.map(lambda x: jnp.full(x.shape, 0.5, x.dtype), shapes)
    return filled["params"], filled["batch_stats"]


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "resnet18.npz"
    np.savez(path, **resnet18_state_dict())
    return path


@pytest.mark.slow
def test_torchvisions_features_come_out(file):
    """Of evaluation and of training, and the running averages that it leaves."""
    golden = np.load(GOLDEN)
    net, batch = model()
    params, batch_stats, report = load_resnet(file, *variables_of(net, batch))
    assert not report.reshaped and report.unused == ("fc.weight", "fc.bias")
    assert {n for n in report.left if "visual" in n} == {  # no projection, where the width is 512
        f"params/{part}_visual/{leaf}"
        for part, leaves in (("norm", ("scale", "bias")), ("probe", ("kernel", "bias")))
        for leaf in leaves
    }
    batch["visual"] = jnp.asarray(wave((4, 40, 70, 3), 1.0))
    encoder = net.bind({"params": params, "batch_stats": batch_stats}).encoder["visual"]
    encoder, variables = encoder.unbind()
    tokens = jax.jit(encoder.apply)(variables, batch["visual"])
    np.testing.assert_allclose(tokens[:, 1:], golden["evaluated"], atol=1e-4, rtol=1e-4)
    np.testing.assert_allclose(tokens[:, 0], golden["evaluated"].mean(1), atol=1e-4, rtol=1e-4)

    def train(variables, images):
        return encoder.apply(variables, images, train=True, mutable=["batch_stats"])

    tokens, changed = jax.jit(train)(variables, batch["visual"])
    np.testing.assert_allclose(tokens[:, 1:], golden["trained"], atol=1e-4, rtol=1e-4)
    stats = changed["batch_stats"]
    for ours, theirs in (
        (stats["embed"]["norm"], "bn1"),
        (stats["block_2"]["shortcut_norm"], "layer2.0.downsample.1"),
        (stats["block_7"]["norm2"], "layer4.1.bn2"),
    ):
        for one, other in (("mean", "running_mean"), ("var", "running_var")):
            expected = golden[f"{theirs}.{other}"]
            np.testing.assert_allclose(ours[one], expected, atol=1e-4, rtol=1e-4)


def test_a_gray_image_is_as_good_as_one_in_color(file):
    """One channel: the sum over colors. A projection, where the width is another, stays."""
    net, batch = model(channels=1, dim=16)
    params, batch_stats = variables_of(net, batch)
    new, _, report = load_resnet(file, params, batch_stats)
    name = "params/encoder_visual/embed/conv/kernel"
    assert report.reshaped == {name: "sum over the file's three colors"}
    expected = resnet18_state_dict()["conv1.weight"].sum(1).transpose(1, 2, 0)
    kernel = new["encoder_visual"]["embed"]["conv"]["kernel"]
    np.testing.assert_allclose(kernel[:, :, 0], expected, atol=1e-6)
    left = new["encoder_visual"]["project"]["kernel"]
    np.testing.assert_array_equal(left, params["encoder_visual"]["project"]["kernel"])


def test_files_that_do_not_fit(file, tmp_path):
    net, batch = model()
    params, batch_stats = variables_of(net, batch)
    tensors = resnet18_state_dict()

    def saved(**change):
        path = tmp_path / "changed.npz"
        np.savez(path, **{n: x for n, x in (tensors | change).items() if x is not None})
        return path

    for change, says in (
        ({"bn1.running_mean": None}, "nothing for batch_stats/encoder_visual/embed/norm/mean; all"),
        ({"layer1.0.conv3.weight": np.zeros((64, 64, 1, 1))}, "conv3/kernel has shape no such arr"),
        ({"mixer.weight": np.zeros(3)}, "holds mixer.weight; allowed: the tensors of torchvision"),
        ({"bn1.weight": np.zeros(65)}, r"has shape \(64,\); the file has \(65,\)"),
    ):
        with pytest.raises(DataError, match=says):
            load_resnet(saved(**change), params, batch_stats)
    assert is_resnet(file)
    with pytest.raises(
        DataError, match="is a ResNet-18; no encoder of the model is of kind resnet"
    ):
        load_resnet(file, params, {})
    with pytest.raises(DataError, match="is no ViT file"):
        load_vit(file, params)
