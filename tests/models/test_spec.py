"""Every mistake in a model's configuration is refused by a line that names it."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict, FrozenConfigDict

from rollingq_jax.errors import ConfigError
from rollingq_jax.models import ModelSpec, build_model
from tests.models.model_cases import config


def changed(path, value, **base):
    """A configuration with one field set, or taken out where `value` is ..."""
    made = config(**base)
    *parents, name = path.split(".")
    place = made
    for parent in parents:
        place = place[parent]
    if value is ...:
        del place[name]
    else:
        place[name] = value
    return made


BAD = [
    ("fusion", "bogus", "model.fusion is 'bogus'; allowed: unimodal, sum, concat, film, gated"),
    ("fusion", None, "model.fusion is None; allowed: unimodal"),
    (
        "fusionn",
        "concat",
        r"model.fusionn is not a field \(did you mean fusion\?\); allowed: .*fusion,",
    ),
    ("num_classes", ..., "model.num_classes is missing; allowed: an integer >= 1"),
    ("num_classes", 0, "model.num_classes is 0; allowed: .* >= 1 .*0 when it has loaded the data"),
    ("num_classes", "six", "model.num_classes is 'six'"),
    ("dim", 0, "model.dim is 0; allowed: an integer >= 1"),
    ("dim", 16.0, "model.dim is 16.0; allowed: an integer"),
    ("dim", True, "model.dim is True; allowed: an integer"),
    ("depth", -1, "model.depth is -1; allowed: an integer >= 0"),
    ("num_heads", 3, "num_heads is 3; allowed: a divisor of model.encoders.audio.width, .* 16"),
    ("fusion_heads", 5, "model.fusion_heads is 5; allowed: a divisor of model.dim, which is 16"),
    ("fusion_layers", 0, "model.fusion_layers is 0; allowed: an integer from 1 to 8"),
    ("fusion_layers", 9, "model.fusion_layers is 9; allowed: an integer from 1 to 8"),
    ("fusion_layers", 2.0, "model.fusion_layers is 2.0; allowed: an integer"),
    ("mlp_ratio", 0, "model.mlp_ratio is 0; allowed: a number > 0"),
    ("dropout", 1.0, r"model.dropout is 1.0; allowed: a number in \[0, 1\)"),
    ("dropout", float("nan"), "model.dropout is nan"),
    ("encoder_dropout", "0.1", "model.encoder_dropout is '0.1'"),
    ("gelu", "relu", "model.gelu is 'relu'; allowed: exact, tanh"),
    ("dtype", "float16", "model.dtype is 'float16'; allowed: float32, bfloat16"),
    ("attention_scale", -1, "model.attention_scale is -1; allowed: a number >= 0"),
    ("fusion_pooling", "max", "model.fusion_pooling is 'max'; allowed: tokens, class_tokens"),
    ("fusion_residual", 1, "model.fusion_residual is 1; allowed: True or False"),
    ("fusion_norm", None, "model.fusion_norm is None; allowed: True or False"),
    ("fusion_token_scale", -0.1, "model.fusion_token_scale is -0.1; allowed: a number >= 0"),
    ("mbt_layers", 0, "model.mbt_layers is 0; allowed: an integer >= 1"),
    ("mbt_tokens", 0, "model.mbt_tokens is 0"),
    ("mbt_head", "film", "model.mbt_head is 'film'; allowed: attention, concat, sum"),
    ("scan_layers", 1, "model.scan_layers is 1; allowed: True or False"),
    ("remat", "yes", "model.remat is 'yes'; allowed: True or False"),
    ("modality", "audio", "model.modality is 'audio'; allowed for fusion 'attention': None"),
    ("encoders", ..., "model.encoders is empty"),
    ("encoders", {}, "model.encoders is empty; allowed: one field a modality"),
    ("encoders", 3, "model.encoders is 3; allowed: a mapping"),
    ("encoders.audio", "spectrogram", "model.encoders.audio is 'spectrogram'; allowed: a mapping"),
    ("encoders.audio.kind", ..., "model.encoders.audio.kind is missing; allowed: spectrogram, "),
    ("encoders.audio.kind", "sound", "model.encoders.audio.kind is 'sound'; allowed: spectrogram"),
    ("encoders.audio.patch", ..., "encoders.audio.patch is None; .*'spectrogram': 2 integers >= 1"),
    ("encoders.audio.patch", (4, 4, 4), r"audio.patch is \(4, 4, 4\); .*: 2 integers"),
    ("encoders.audio.patch", (4, 0), r"audio.patch is \(4, 0\); allowed: integers >= 1"),
    ("encoders.audio.patch", 4, "audio.patch is 4; allowed: integers"),
    ("encoders.audio.depth", 1.5, "model.encoders.audio.depth is 1.5"),
    ("encoders.audio.width", 9, "audio.num_heads is 2; allowed: a divisor of .*width, which is 9"),
    ("encoders.audio.vocab_size", 9, "audio.vocab_size is 9; .* 'spectrogram': None"),
    ("encoders.audio.std", (0.5, 0.0), r"audio.std is \(0.5, 0.0\); allowed: numbers > 0"),
    ("encoders.audio.mean", ("a",), "audio.mean is .*; allowed: numbers"),
    ("encoders.audio.color", 1, "model.encoders.audio.color is not a field; allowed: .*patch"),
    ("encoders.label", {"kind": "vector"}, "has a modality 'label'"),
    ("encoders.a_mask", {"kind": "vector"}, "has a modality 'a_mask'"),
    ("encoders.quality_a", {"kind": "vector"}, "has a modality 'quality_a'"),
    ("encoders.a-b", {"kind": "vector"}, "has a modality 'a-b'"),
    ("encoders.t", {"kind": "tokens"}, "t.vocab_size is None; .* 'tokens': an integer >= 2"),
    ("encoders.v", {"kind": "vector", "patch": (2, 2)}, "v.patch is .*no patches"),
    (
        "encoders.t",
        {"kind": "tokens", "vocab_size": 9, "mean": (0.5,)},
        "allowed for kind 'tokens'",
    ),
]


@pytest.mark.parametrize(("path", "value", "message"), BAD)
def test_a_mistake_is_named_in_one_line(path, value, message):
    with pytest.raises(ConfigError, match=message) as error:
        build_model(changed(path, value))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("value", [None, "", "smell"])
def test_a_unimodal_model_needs_one_of_the_encoders(value):
    with pytest.raises(ConfigError, match="model.modality is .*; allowed: audio, visual"):
        build_model(changed("modality", value, fusion="unimodal"))


@pytest.mark.parametrize("fusion", ["film", "gated"])
@pytest.mark.parametrize("kinds", [{"a": "vector"}, {m: "vector" for m in "abc"}])
def test_film_and_gated_take_two_modalities(fusion, kinds):
    with pytest.raises(
        ConfigError, match=f"model.fusion is '{fusion}', which takes two modalities"
    ):
        build_model(config(fusion, kinds))


def test_something_that_has_no_fields_is_refused():
    with pytest.raises(ConfigError, match="model is 3; allowed: a mapping of fields"):
        build_model(3)


def test_every_way_to_write_a_configuration_gives_the_same_model():
    plain = config("mbt", dropout=0.1)
    encoders = {m: types.SimpleNamespace(**e) for m, e in plain["encoders"].items()}
    namespace = types.SimpleNamespace(**{**plain, "encoders": types.SimpleNamespace(**encoders)})
    lists = {**plain, "encoders": {m: {**e, "patch": [4, 4]} for m, e in plain["encoders"].items()}}
    numpy = {**plain, "dim": np.int64(16), "dropout": np.float64(0.1)}
    model = build_model(plain)
    for config_form in (ConfigDict(plain), FrozenConfigDict(plain), namespace, lists, numpy):
        assert build_model(config_form) == model
    assert build_model(model.spec) == model
    assert hash(build_model(ConfigDict(plain))) == hash(model)


def test_defaults():
    fields = {"num_classes": 3, "encoders": {"a": {"kind": "vector"}}}
    spec = ModelSpec.from_config(fields)
    assert (spec.fusion, spec.dim, spec.depth, spec.num_heads) == ("attention", 64, 2, 4)
    assert (spec.fusion_heads, spec.mlp_ratio, spec.dropout) == (1, 4, 0.2)
    assert (spec.encoder_dropout, spec.gelu, spec.dtype) == (0.0, "exact", "float32")
    assert (spec.mbt_layers, spec.mbt_tokens, spec.mbt_head) == (2, 4, "attention")
    encoder = spec.encoders[0]
    assert (encoder.width, encoder.depth, encoder.num_heads) == (64, 2, 4)


def test_modalities_are_alphabetical_and_unimodal_keeps_one():
    kinds = {"visual": "image", "audio": "spectrogram", "text": "tokens"}
    assert build_model(config(kinds=kinds)).spec.modalities == ("audio", "text", "visual")
    unimodal = build_model(config("unimodal", kinds, modality="visual"))
    assert unimodal.spec.modalities == ("visual",)


def test_heads_of_the_fusion_are_not_checked_where_there_are_none():
    build_model(config("concat", fusion_heads=5))
    build_model(config("mbt", mbt_head="sum", fusion_heads=5))
