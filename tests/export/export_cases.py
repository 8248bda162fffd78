"""Runs to export and to predict with: random parameters, ours and of upstream's architecture."""

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

import rollingq_jax as rq
from rollingq_jax.convert import upstream_model, upstream_shapes
from rollingq_jax.data.dataset import ModalityInfo
from rollingq_jax.data.preprocessing import InputSpec, Preprocessing
from rollingq_jax.models import build_model
from rollingq_jax.train.loop import LoadedRun

CLASSES, HEADS, DIM = 4, 2, 8
MODALITIES = {
    "audio": ModalityInfo("audio", "sequence", (5, 3)),
    "text": ModalityInfo("text", "tokens", (6,), "int32", vocab_size=11),
    "visual": ModalityInfo("visual", "image", (4, 4, 3), "uint8", mean=(0.5,), std=(0.3,)),
}


def unchanged(modalities):
    """Raw arrays that are the model's input already."""
    return {m: Preprocessing(info, info.shape, info.dtype) for m, info in modalities.items()}


INPUTS = InputSpec(unchanged(MODALITIES), CLASSES, ("a", "b", "c", "d"), "made up")


def make_batch(size, seed=0):
    """A batch of the run made by hand."""
    rng = np.random.default_rng(seed)
    return {
        "audio": rng.normal(size=(size, 5, 3)).astype(np.float32),
        "text": rng.integers(1, 11, size=(size, 6)).astype(np.int32),
        "visual": rng.integers(256, size=(size, 4, 4, 3)).astype(np.uint8),
    }


def filled(params, seed=1):
    """Parameters in which no leaf is zero or one throughout."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def made_run(fusion="attention", heads=HEADS):
    """A model with random parameters and, with attention, a rotation that matters."""
    fields = {"num_classes": CLASSES, "dim": DIM, "depth": 1, "num_heads": 2, "fusion": fusion}
    encoders = {
        "audio": {"kind": "sequence"},
        "text": {"kind": "tokens", "vocab_size": 11},
        "visual": {"kind": "image", "patch": (2, 2), "mean": (0.5,), "std": (0.3,)},
    }
    fields |= {"encoders": encoders, "fusion_heads": heads if fusion == "attention" else 1}
    model, batch = build_model(fields), make_batch(3)
    params = filled(jax.jit(model.init)(jax.random.key(0), batch)["params"])
    rotation = None
    if fusion == "attention":
        pair = jax.random.normal(jax.random.key(1), (2, heads, DIM // heads))
        rotation = rq.rotation_between(pair[0], pair[1])
    config = ConfigDict({"seed": 0, "model": fields})
    return LoadedRun(model, params, rotation, config, INPUTS, 7)


def upstream_run(fusion="attention"):
    """Upstream's architecture for CREMA-D at width 12, without data."""
    model = upstream_model("CREMAD", fusion, edim=12, depth=1, use_video_frames=1)
    shapes = upstream_shapes("CREMAD", use_video_frames=1)
    batch = {m: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for m, shape in shapes.items()}
    abstract = jax.eval_shape(model.init, jax.random.key(0), batch)["params"]
    params = filled(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), abstract))
    rotation = None
    if fusion == "attention":
        pair = jax.random.normal(jax.random.key(1), (2, 1, 12))
        rotation = rq.rotation_between(pair[0], pair[1])
    kinds = {"audio": "spectrogram", "visual": "video"}
    modalities = {m: ModalityInfo(m, kinds[m], shape) for m, shape in shapes.items()}
    inputs = InputSpec(unchanged(modalities), 6)
    return LoadedRun(model, params, rotation, ConfigDict({"model": {}}), inputs, 1)
