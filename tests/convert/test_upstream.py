"""Conversion of upstream's state dicts: every name accounted for, every shape checked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rollingq_jax import convert
from rollingq_jax.errors import ConfigError, DataError, UserError
from tests.golden_inputs import Golden, golden_files, wave

DEAD = {
    "attention": {f"fusion_module.attn.layer_norm.{kind}" for kind in ("weight", "bias")},
    "concat": set(),
    "sum": set(),
}
FORWARD = {path.stem.split("_")[1]: path for path in golden_files("forward_*_cremad.npz")}
FIRST = (None, "audio", "visual")


def golden_state(arm):
    golden = Golden(FORWARD[arm])
    return golden, golden.under("param")


def unimodal_state(modality=None):
    """A unimodal model's tensors: upstream's class stores both streams and both heads."""
    _, state = golden_state("concat")
    stream, head = {"audio": ("video", "v_head"), "visual": ("audio", "a_head")}.get(
        modality, ("nothing", "nothing")
    )
    return {
        name: value
        for name, value in state.items()
        if not name.startswith(("fusion_module.", head)) and stream not in name
    }


def paths(params):
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


@pytest.mark.parametrize("arm", FORWARD)
def test_every_live_tensor_is_needed(arm):
    _, state = golden_state(arm)
    dead = set(convert.dropped_tensors(state))
    for name in state:
        rest = {other: value for other, value in state.items() if other != name}
        if name in dead:
            convert.from_upstream(rest)
        else:
            with pytest.raises(DataError, match=rf"missing tensors: {name}$"):
                convert.from_upstream(rest)


@pytest.mark.parametrize("arm", FORWARD)
def test_every_shape_is_checked(arm):
    _, state = golden_state(arm)
    dead = set(convert.dropped_tensors(state))
    for name in set(state) - dead:
        wrong = np.concatenate([state[name], state[name][..., :1]], axis=-1)
        with pytest.raises(DataError) as error:
            convert.from_upstream({**state, name: wrong})
        message, (before, after) = str(error.value), (state[name].shape, wrong.shape)
        assert message.startswith(f"{name} has shape {after}; allowed: (")
        if "pos_embed" not in name:  # their length is one of several
            assert str(before) in message


@pytest.mark.parametrize("name", ["encoder.pos_embed_audio", "encoder.pos_embed_video"])
def test_position_tables_have_a_length_of_upstreams(name):
    _, state = golden_state("concat")
    with pytest.raises(DataError, match=rf"{name} has shape \(1, 100, 24\); allowed: \(1, 1"):
        convert.from_upstream({**state, name: np.zeros((1, 100, 24), np.float32)})


def test_other_spectrograms_are_accepted_when_said():
    _, state = golden_state("concat")
    state["encoder.pos_embed_audio"] = wave((1, 1 + 3 * 4, 24), 0.0)
    params, _ = convert.from_upstream(state, audio_shape=(70, 50))
    assert params["encoder_audio"]["position"].shape == (13, 24)
    with pytest.raises(DataError, match="pos_embed_audio"):
        convert.from_upstream(state)


@pytest.mark.parametrize("arm", FORWARD)
@pytest.mark.parametrize(
    "unknown",
    ["fusion_module.extra.weight", "encoder.audio_blocks.0.norm3.weight", "c_head.bias", "rotate"],
)
def test_unknown_tensors_are_named(arm, unknown):
    _, state = golden_state(arm)
    with pytest.raises(DataError, match=f"unknown tensors: {unknown}"):
        convert.from_upstream({**state, unknown: np.zeros(3, np.float32)})


def test_a_renamed_tensor_is_both_missing_and_unknown():
    _, state = golden_state("attention")
    state["fusion_module.attn.w_q.bias"] = state.pop("fusion_module.attn.w_qs.bias")
    with pytest.raises(DataError, match=r"missing .*w_qs\.bias; unknown .*w_q\.bias"):
        convert.from_upstream(state)


@pytest.mark.parametrize("arm", [*FORWARD, "unimodal"])
def test_encoders_without_layers_go_there_and_back(arm):
    state = unimodal_state() if arm == "unimodal" else golden_state(arm)[1]
    blocks = ("encoder.audio_blocks.", "encoder.video_blocks.")
    state = {name: value for name, value in state.items() if not name.startswith(blocks)}
    params, rotation = convert.from_upstream(state)
    again = convert.to_upstream(params, rotation)
    assert set(again) == set(state) - set(convert.dropped_tensors(state))
    for name, value in again.items():
        np.testing.assert_array_equal(value, state[name])


def test_a_layer_in_one_stream_alone_is_an_error():
    _, state = golden_state("concat")
    for name in list(state):
        if "audio_blocks.0" in name:
            state[name.replace("audio_blocks.0", "audio_blocks.1")] = state[name]
    with pytest.raises(DataError, match=r"encoder\.video_blocks\.1\.norm1\.weight"):
        convert.from_upstream(state)


@pytest.mark.parametrize("arm", FORWARD)
def test_dead_tensors_are_dropped_and_listed(arm, caplog):
    golden, state = golden_state(arm)
    expected = set(DEAD[golden.config["fusion_method"]])
    if golden.config["backbone"] == "vit":
        expected.add("encoder.bot_token")
    assert set(convert.dropped_tensors(state)) == expected
    with caplog.at_level("INFO", logger="rollingq_jax"):
        convert.from_upstream(state)
    assert all(name in caplog.text for name in expected)


@pytest.mark.parametrize("arm", FORWARD)
def test_round_trip(arm):
    _, state = golden_state(arm)
    params, rotation = convert.from_upstream(state)
    back = convert.to_upstream(params, rotation)
    assert set(back) == set(state) - set(convert.dropped_tensors(state))
    for name, value in back.items():
        np.testing.assert_array_equal(value, state[name], err_msg=name)


def test_wrapper_and_prefix():
    _, state = golden_state("attention")
    wrapped = {
        "model": {f"module.{name}": value for name, value in state.items()},
        "optimizer": {"state": {}},
        "saved_epoch": 3,
    }
    plain, again = convert.from_upstream(state), convert.from_upstream(wrapped)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), plain, again))
    assert convert.dropped_tensors(wrapped) == convert.dropped_tensors(state)


def test_a_name_with_and_without_prefix_is_an_error():
    _, state = golden_state("sum")
    with pytest.raises(DataError, match="a_head.bias is there twice"):
        convert.from_upstream({**state, "module.a_head.bias": state["a_head.bias"]})


class Tensor:
    """What a PyTorch tensor on an accelerator allows: no conversion before `detach().cpu()`."""

    def __init__(self, array, steps=()):
        self.array, self.steps = array, steps

    def detach(self):
        return Tensor(self.array, (*self.steps, "detach"))

    def cpu(self):
        return Tensor(self.array, (*self.steps, "cpu"))

    def float(self):
        return Tensor(self.array, (*self.steps, "float"))

    def __array__(self, dtype=None, copy=None):
        assert self.steps == ("detach", "cpu", "float")
        return self.array


def test_other_tensor_types_and_dtypes():
    _, state = golden_state("sum")
    plain, _ = convert.from_upstream(state)
    for make in (Tensor, jnp.asarray, np.float64, np.ndarray.tolist):
        params, _ = convert.from_upstream({name: make(value) for name, value in state.items()})
        assert jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), plain, params))
        assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}


@pytest.mark.parametrize(
    "value", ["text", None, np.array(["a"]), np.array([1 + 2j]), [[1], [2, 3]]]
)
def test_what_is_no_array_is_an_error(value):
    _, state = golden_state("sum")
    with pytest.raises(DataError, match=r"^a_head\.bias (is a|has dtype)"):
        convert.from_upstream({**state, "a_head.bias": value})


@pytest.mark.parametrize("state", [{}, {"weight": np.zeros(3)}, {"model": {}}, [], None])
def test_what_is_no_state_dict_is_an_error(state):
    with pytest.raises(DataError):
        convert.from_upstream(state)


def test_parameters_do_not_share_memory_with_the_state_dict():
    _, state = golden_state("concat")
    params, _ = convert.from_upstream(state)
    state["a_head.bias"][:] = 7.0
    assert not (params["probe_audio"]["bias"] == 7.0).any()


@pytest.mark.parametrize("modality", ["audio", "visual"])
@pytest.mark.parametrize("stored", ["both", "one"])
def test_unimodal_outputs_are_those_of_the_probe_head(modality, stored):
    """Upstream trains the stream's probe head itself, so the golden probe values are expected."""
    golden, _ = golden_state("concat")
    state = unimodal_state(modality if stored == "one" else None)
    params, rotation = convert.from_upstream(state)
    assert rotation is None
    arguments = golden.model_arguments() | {"fusion_method": modality}
    model = convert.upstream_model(**arguments)
    audio, video, _ = golden.inputs(golden["meta/input_seed"])
    batch = convert.upstream_batch(
        **{"audio": {"audio": audio}, "visual": {"video": video}}[modality]
    )
    logits, out = jax.jit(model.apply)({"params": params}, batch)
    letter = {"audio": "a", "visual": "v"}[modality]
    np.testing.assert_allclose(logits, golden[f"out/probe_{letter}"], atol=1e-5, rtol=0)
    np.testing.assert_array_equal(out["probe_logits"][modality], logits)
    chosen, _ = convert.from_upstream(state, modality=modality)
    fresh = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    shapes = {path: leaf.shape for path, leaf in paths(fresh).items()}
    assert {path: leaf.shape for path, leaf in paths(chosen).items()} == shapes


def test_unimodal_streams_that_are_not_chosen_are_dropped_and_listed():
    state = unimodal_state()
    dropped = convert.dropped_tensors(state, modality="uni_V")
    live = convert.to_upstream(convert.from_upstream(state, modality="visual")[0])
    assert set(dropped) | set(live) == set(state) and not set(dropped) & set(live)
    assert "a_head.weight" in dropped and "encoder.audio_blocks.0.mlp.fc1.bias" in dropped
    with pytest.raises(DataError, match=r"missing tensors: encoder\.cls_token_audio"):
        convert.from_upstream(unimodal_state("visual"), modality="audio")


@pytest.mark.parametrize("first", FIRST)
def test_every_unimodal_tensor_of_the_stream_is_needed(first):
    state = unimodal_state(first)
    live = convert.to_upstream(convert.from_upstream(state)[0])
    for name in live:
        rest = {other: value for other, value in state.items() if other != name}
        with pytest.raises(DataError, match=f"missing tensors: {name}$"):
            convert.from_upstream(rest)


def test_modality_is_for_unimodal_models():
    _, state = golden_state("sum")
    with pytest.raises(UserError, match="modality is 'audio'; allowed: None.*sum"):
        convert.from_upstream(state, modality="audio")
    with pytest.raises(UserError, match="modality is 'text'; allowed: audio, visual"):
        convert.from_upstream(unimodal_state(), modality="text")


def test_to_upstream_rejects_other_architectures():
    _, state = golden_state("attention")
    params, rotation = convert.from_upstream(state)
    with pytest.raises(UserError, match=r"rotation has shape \(24, 24\); allowed: \(1, 24, 24\)"):
        convert.to_upstream(params, rotation[0])
    heads = {
        **params["fusion"],
        "query": {"kernel": np.zeros((24, 2, 12)), "bias": np.zeros((2, 12))},
    }
    with pytest.raises(DataError, match=r"fusion/query/kernel has shape \(24, 2, 12\)"):
        convert.to_upstream({**params, "fusion": heads})
    with pytest.raises(DataError, match="encoders for text"):
        convert.to_upstream({"encoder_text": {}, "fusion": {}})
    with pytest.raises(DataError, match="missing parameters: probe_audio/kernel"):
        convert.to_upstream({k: v for k, v in params.items() if k != "probe_audio"})
    with pytest.raises(UserError, match="rotation is given; allowed: None"):
        convert.to_upstream(convert.from_upstream(golden_state("sum")[1])[0], rotation)
    np.testing.assert_array_equal(convert.to_upstream(params)["fusion_module.rotate"], np.eye(24))


@pytest.mark.parametrize(
    ("fusion", "tensors"),
    [
        ("film", {"fc": (48, 24), "fc_out": (6, 24)}),
        ("gated", {"fc_x": (24, 24), "fc_y": (24, 24), "fc_out": (6, 24)}),
    ],
)
def test_film_and_gated_fusion(fusion, tensors):
    """z from the class tokens by hand: (g * y + h) W + b, and (sigmoid(u) * w) W + b."""
    golden, concat = golden_state("concat")
    state = {name: v for name, v in concat.items() if not name.startswith("fusion_module")}
    arrays = {}
    for i, (name, shape) in enumerate(tensors.items()):
        arrays[name] = wave(shape, float(i)), wave(shape[:1], i + 0.5)
        for kind, value in zip(("weight", "bias"), arrays[name], strict=True):
            state[f"fusion_module.{name}.{kind}"] = value
    params, rotation = convert.from_upstream(state)
    assert rotation is None
    model = convert.upstream_model(**golden.model_arguments() | {"fusion_method": fusion})
    batch = convert.upstream_batch(*golden.inputs(golden["meta/input_seed"])[:2])
    logits, _ = jax.jit(model.apply)({"params": params}, batch)
    x, y = (np.float64(golden[f"out/token_{m}_first4"][:, 0]) for m in "av")
    linear = {name: lambda z, wb=wb: z @ np.float64(wb[0]).T + wb[1] for name, wb in arrays.items()}
    if fusion == "film":
        scale, shift = np.split(linear["fc"](x), 2, axis=1)
        expected = linear["fc_out"](scale * y + shift)
    else:
        expected = linear["fc_out"](linear["fc_y"](y) / (1 + np.exp(-linear["fc_x"](x))))
    np.testing.assert_allclose(logits, expected, atol=2e-5)
    for name, value in convert.to_upstream(params).items():
        np.testing.assert_array_equal(value, state[name])


def test_batches_are_channels_last():
    audio, video = wave((2, 5, 7), 0.0), wave((2, 3, 4, 6, 8), 1.0)
    batch = convert.upstream_batch(audio, video)
    np.testing.assert_array_equal(batch["audio"][1, 4, 3, 0], audio[1, 4, 3])
    np.testing.assert_array_equal(batch["visual"][1, 2, 5, 7], video[1, :, 2, 5, 7])
    assert batch["visual"].shape == (2, 4, 6, 8, 3) and batch["audio"].shape == (2, 5, 7, 1)
    assert set(convert.upstream_batch(video=video)) == {"visual"}
    with pytest.raises(DataError, match=r"audio has shape \(2, 1, 5, 7\); allowed: \[B, F, T\]"):
        convert.upstream_batch(audio[:, None], video)
    with pytest.raises(DataError, match=r"video has shape .*; allowed: \[B, 3, T, H, W\]"):
        convert.upstream_batch(audio, np.moveaxis(video, 1, -1))


@pytest.mark.parametrize(
    ("dataset", "tokens"),
    [
        ("CREMAD", 177),
        ("CREMA-D", 177),
        ("KineticSound", 513),
        ("KS", 513),
        ("Kinetics-Sounds", 513),
    ],
)
def test_shapes_of_the_paper(dataset, tokens):
    """Token counts of the full-size models, without computing anything."""
    model = convert.upstream_model(dataset=dataset)
    shapes = convert.upstream_shapes(dataset, 3)
    batch = {m: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for m, shape in shapes.items()}
    variables = jax.eval_shape(model.init, jax.random.key(0), batch)
    logits, out = jax.eval_shape(model.apply, variables, batch)
    assert out["tokens"]["audio"].shape == (1, tokens, 768)
    assert out["tokens"]["visual"].shape == (1, 589, 768)
    assert logits.shape == (1, 6 if tokens == 177 else 31)
    assert model.spec.encoders[0].num_heads == 12 and model.spec.encoders[0].depth == 4


def test_architecture_of_the_arguments():
    mbt = convert.upstream_model(backbone="mbt", multi_depth=2, fusion_method="sum").spec
    assert (mbt.fusion, mbt.mbt_layers, mbt.mbt_tokens, mbt.mbt_head) == ("mbt", 2, 4, "sum")
    assert convert.upstream_model(backbone="vit", multi_depth=2).spec.fusion == "attention"
    assert convert.upstream_model(backbone="mbt").spec.fusion == "attention"
    uni = convert.upstream_model(fusion_method="uni_V", n_classes=9).spec
    assert (uni.fusion, uni.modalities, uni.num_classes) == ("unimodal", ("visual",), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "UCF"}, "dataset is 'UCF'; allowed: CREMAD, KineticSound"),
        ({"backbone": "resnet18"}, "backbone is 'resnet18'; allowed: vit, mbt"),
        ({"fusion_method": "mult"}, "fusion_method is 'mult'; allowed: attention"),
        ({"fusion_method": "film", "backbone": "mbt", "multi_depth": 1}, "bottleneck layers"),
        ({"use_video_frames": 0}, "use_video_frames is 0; allowed: 1 or more"),
        ({"edim": 20}, "num_heads"),
    ],
)
def test_arguments_without_meaning(arguments, message):
    with pytest.raises(ConfigError, match=message):
        convert.upstream_model(**arguments)
