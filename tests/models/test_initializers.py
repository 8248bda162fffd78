"""Initial parameters have upstream's distributions; tolerances follow from the sample sizes."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rollingq_jax.models import build_model
from tests.models.model_cases import batch, config

SEEDS = 12
# A correct parameter fails one Kolmogorov-Smirnov test in a million.
MIN_P_VALUE = 1e-6
D, C = 16, 5


def normal(std):
    return stats.norm(scale=std)


def xavier(fan_in, fan_out):
    return normal(math.sqrt(2 / (fan_in + fan_out)))


def uniform(fan_in):
    bound = 1 / math.sqrt(fan_in)
    return stats.uniform(-bound, 2 * bound)


def tree(fusion, kinds=None, **fields):
    """{path: values of SEEDS initializations}."""
    model = build_model(config(fusion, kinds, **fields))
    init = jax.jit(jax.vmap(model.init, in_axes=(0, None)))
    params = init(jax.random.split(jax.random.key(0), SEEDS), batch(kinds))["params"]
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return {"/".join(k.key for k in path): np.asarray(x) for path, x in leaves}


# The whole tree of an audio-visual bottleneck model with an attention head, width 16.
EXPECTED = {
    "embed/kernel of audio": normal(math.sqrt(2 / (D * 4 * 4))),
    "embed/kernel of visual": uniform(4 * 4 * 3),
    "embed/bias of audio": uniform(4 * 4),
    "embed/bias of visual": uniform(4 * 4 * 3),
    "cls": normal(1e-6),
    "position": normal(0.02),
    "qkv/kernel": xavier(D, 3 * D),
    "out/kernel": xavier(D, D),
    "fc1/kernel": xavier(D, 2 * D),
    "fc2/kernel": xavier(2 * D, D),
    "probe": xavier(D, C),
    "bottleneck/tokens": normal(0.02),
    "fusion/cls": normal(0.3),
    "fusion/projection": xavier(D, D),
    "fusion/head": xavier(D, C),
}


def distribution(path):
    """The name in EXPECTED for a path, or the constant it starts from."""
    parts = path.split("/")
    if parts[0] == "fusion":
        if parts[1] in ("query", "key", "value", "out") and parts[-1] == "kernel":
            return "fusion/projection"
        if parts[1:] == ["head", "kernel"]:
            return "fusion/head"
        return "fusion/cls" if parts[1] == "cls" else 0.0
    if "embed" in parts:
        return f"embed/{parts[-1]} of {parts[0].removeprefix('encoder_')}"
    if parts[-1] in ("cls", "position"):
        return parts[-1]
    if path == "bottleneck/tokens":
        return path
    if parts[0].startswith("probe_") and parts[-1] == "kernel":
        return "probe"
    if parts[-1] == "kernel":
        return "/".join(parts[-2:])
    return {"scale": 1.0, "bias": 0.0}[parts[-1]]


def test_every_parameter_has_upstreams_distribution():
    pooled = {}
    for path, values in tree("mbt", mbt_layers=1, fusion_token_scale=0.3).items():
        expected = distribution(path)
        if isinstance(expected, float):
            assert np.all(values == expected), path
        else:
            pooled.setdefault(expected, []).append(values.ravel())
    assert set(pooled) == set(EXPECTED)
    for name, parts in pooled.items():
        values = np.concatenate(parts).astype(np.float64)
        p_value = stats.kstest(values, EXPECTED[name].cdf).pvalue
        assert p_value > MIN_P_VALUE, f"{name}: p = {p_value}"
        # Five standard errors of the standard deviation, whose own is at most std * sqrt(1/(2n)).
        std = EXPECTED[name].std()
        assert abs(values.std() - std) < 5 * std / math.sqrt(2 * values.size), name


def test_normals_are_not_truncated():
    # 4.55 % of a normal distribution lie beyond two standard deviations; JAX's own initializers
    # cut there.
    values = tree("attention", depth=4)
    kernel = np.concatenate([v.ravel() for k, v in values.items() if k.endswith("qkv/kernel")])
    share = np.mean(np.abs(kernel) > 2 * math.sqrt(2 / (4 * D)))
    standard_error = math.sqrt(0.0455 * 0.9545 / kernel.size)
    assert abs(share - 0.0455) < 5 * standard_error


@pytest.mark.parametrize(
    ("kind", "name", "expected"),
    [
        ("video", "embed/kernel", uniform(4 * 4 * 3)),
        ("video", "embed/bias", uniform(4 * 4 * 3)),
        ("sequence", "embed/kernel", xavier(6, D)),
        ("vector", "embed/kernel", xavier(9, D)),
        ("tokens", "embed/embedding", normal(0.02)),
    ],
)
def test_other_kinds(kind, name, expected):
    values = tree("unimodal", {"m": kind}, modality="m")[f"encoder_m/{name}"]
    assert stats.kstest(values.ravel().astype(np.float64), expected.cdf).pvalue > MIN_P_VALUE


@pytest.mark.parametrize("fusion", ["concat", "sum", "film", "gated"])
def test_static_heads_are_xavier_with_zero_bias(fusion):
    for path, values in tree(fusion).items():
        if not path.startswith("fusion/"):
            continue
        if path.endswith("bias"):
            assert not values.any()
        else:
            expected = xavier(*values.shape[1:])
            p_value = stats.kstest(values.ravel().astype(np.float64), expected.cdf).pvalue
            assert p_value > MIN_P_VALUE, path


def test_default_scale_of_the_fusion_class_token_is_upstreams():
    values = tree("attention")["fusion/cls"]
    assert stats.kstest(values.ravel().astype(np.float64), normal(0.02).cdf).pvalue > MIN_P_VALUE


def test_parameters_are_float32_under_bfloat16():
    model = build_model(config("mbt", dtype="bfloat16"))
    params = jax.eval_shape(model.init, jax.random.key(0), batch())["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
