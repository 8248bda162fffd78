"""RollingQ in Equinox: `eqx.nn.MultiheadAttention` as it is, through its `process_heads`."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, HEADS, WIDTH, NAMES = 16, 2, 8, ("audio", "visual")


class Model(eqx.Module):
    """A class token attends over the tokens of audio and visual; no other token asks."""

    embed: dict[str, eqx.nn.Linear]
    cls: Array
    attend: eqx.nn.MultiheadAttention

    def __init__(self, data: Data, rng: Array) -> None:
        *rngs, cls_rng, last = jax.random.split(rng, 4)
        sizes = [data[m].shape[-1] for m in NAMES]
        self.embed = {m: eqx.nn.Linear(sizes[i], DIM, key=rngs[i]) for i, m in enumerate(NAMES)}
        self.cls, classes = jax.random.normal(cls_rng, (1, DIM)), int(data["label"].max()) + 1
        self.attend = eqx.nn.MultiheadAttention(HEADS, DIM, output_size=classes, key=last)

    def __call__(self, batch: dict[str, Array], rotation: Array) -> tuple:
        """Logits `[B, C]`, class query `[H, d_h]` and mean keys `[M, B, H, d_h]`."""
        tokens = [jax.vmap(jax.vmap(self.embed[m]))(batch[m]) for m in NAMES]  # [B, L_m, D]
        query = rq.rotate(rotation, self.attend.query_proj(self.cls[0]).reshape(HEADS, WIDTH))
        logits = jax.vmap(
            lambda x: self.attend(self.cls, x, x, process_heads=lambda _, *kv: (query[None], *kv))
        )(jnp.concatenate(tokens, axis=1))
        # The projection is linear: the mean key is the key of the mean token.
        keys = [jax.vmap(self.attend.key_proj)(token.mean(axis=1)) for token in tokens]
        return logits[:, 0], (query, jnp.stack(keys).reshape(len(NAMES), -1, HEADS, WIDTH))


def fold(model: Model, rotation: Array) -> Model:
    """A model that gives without a rotation what `model` gives under `rotation`."""
    query = {"query": {"kernel": model.attend.query_proj.weight.T}}  # Equinox has [H d_h, D]
    kernel = rq.fold_rotation(query, rotation, ("query",))["query"]["kernel"]
    return eqx.tree_at(lambda m: m.attend.query_proj.weight, model, kernel.T)


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple:
    """Model, rolling state and each epoch's last loss."""
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=WIDTH, num_heads=HEADS)
    params, static = eqx.partition(Model(data, jax.random.key(0)), eqx.is_inexact_array)
    forward = lambda params, *rest: eqx.combine(params, static)(*rest)  # noqa: E731
    params, rolling, losses = fit(forward, params, roller, rolling, data, num_epochs, batch_size)
    return eqx.combine(params, static), rolling, losses


if __name__ == "__main__":
    train(make_data())
