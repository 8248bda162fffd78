"""Small models and batches of every kind of modality."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from rollingq_jax.models import build_model

BATCH, DIM, CLASSES, HEADS = 4, 16, 5, 2

# kind: (fields of the encoder, shape of an example, number of tokens)
KINDS = {
    "spectrogram": ({"patch": (4, 4)}, (10, 13, 1), 3 * 2),
    "image": ({"patch": (4, 4)}, (9, 8, 3), 2 * 2),
    "video": ({"patch": (1, 4, 4)}, (2, 8, 8, 3), 2 * 2 * 2),
    "sequence": ({}, (7, 6), 7),
    "tokens": ({"vocab_size": 11}, (6,), 6),
    "vector": ({}, (9,), 1),
}
AUDIO_VISUAL = {"audio": "spectrogram", "visual": "image"}
STATIC = ("concat", "sum", "film", "gated")
CROSS = ("mult", "mmml", "jmt")


def config(fusion="attention", kinds=None, **fields):
    kinds = kinds or AUDIO_VISUAL
    encoders = {m: {"kind": kind, **KINDS[kind][0]} for m, kind in kinds.items()}
    small = {"num_classes": CLASSES, "dim": DIM, "depth": 1, "num_heads": HEADS, "mlp_ratio": 2}
    return {**small, "fusion": fusion, "encoders": encoders, **fields}


def batch(kinds=None, batch_size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    made = {"label": jnp.asarray(rng.integers(CLASSES, size=batch_size), jnp.int32)}
    for m, kind in (kinds or AUDIO_VISUAL).items():
        shape = (batch_size, *KINDS[kind][1])
        if kind == "tokens":
            made[m] = jnp.asarray(rng.integers(1, 11, size=shape), jnp.int32)
        else:
            made[m] = jnp.asarray(rng.normal(size=shape), jnp.float32)
    return made


def filled(module, *args, **kwargs):
    """Parameters of a module, drawn away from their usual zeros and ones so that each matters."""
    rng = np.random.default_rng(3)
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs)["params"])

    def fill(path, leaf):
        offset = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(offset + 0.3 * rng.normal(size=leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, shapes)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _apply(module, flags, params, args, arrays):
    return module.apply({"params": params}, *args, **dict(flags), **arrays)


def run(module, params, *args, **fields):
    """Applies a module, as a program that is compiled once for equal modules and shapes."""
    flags = tuple(sorted((k, v) for k, v in fields.items() if isinstance(v, bool)))
    arrays = {k: v for k, v in fields.items() if not isinstance(v, bool)}
    return _apply(module, flags, params, args, arrays)


def made_model(fusion="attention", kinds=None, attention_fn=None, **fields):
    """Model, spread-out parameters, batch."""
    model = build_model(config(fusion, kinds, **fields), attention_fn)
    inputs = batch(kinds)
    return model, filled(model, inputs), inputs


def close(a, b, tolerance=2e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)
