"""Several layers under `nn.scan`: the roller has the heads of all of them, the lowest's first."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, LAYERS, HEADS, WIDTH = 16, 3, 2, 8


class _Layer(nn.Module):
    @nn.compact
    def __call__(self, cls: Array, tokens: list[Array], rotation: Array) -> tuple:
        """The class token `[B, D]` asks, with a projection that serves no other token's query."""
        query, key, value = (nn.DenseGeneral((HEADS, WIDTH), name=n) for n in ("q", "k", "v"))
        turned, joined = rq.rotate(rotation, query(cls)), jnp.concatenate(tokens, axis=1)
        answer = nn.dot_product_attention(turned[:, None], key(joined), value(joined))
        mean_keys = jnp.stack([key(token.mean(axis=1)) for token in tokens])
        return cls + nn.Dense(DIM)(answer.reshape(-1, DIM)), (turned, mean_keys)


class Model(nn.Module):
    """Encoders, the layers with their stacked parameters, a head."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Data, rotation: Array) -> tuple:
        """Logits `[B, C]`, queries `[B, N H, d_h]` and mean keys `[M, B, N H, d_h]` of N layers."""
        tokens = [nn.Dense(DIM, name=m)(batch[m]) for m in ("audio", "visual")]
        cls = self.param("cls", nn.initializers.normal(1.0), (1, DIM)).repeat(len(tokens[0]), 0)
        axes = {"variable_axes": {"params": 0}, "in_axes": (nn.broadcast, 0), "out_axes": (1, 2)}
        layers = nn.scan(_Layer, split_rngs={"params": True}, **axes)(name="layers")  # type: ignore[arg-type]
        cls, seen = layers(cls, tokens, rotation.reshape(LAYERS, HEADS, WIDTH, WIDTH))
        return nn.Dense(self.num_classes)(cls), [x.reshape(*x.shape[:-3], -1, WIDTH) for x in seen]


def fold(variables: dict, rotation: Array) -> dict:
    """Variables that give without rotations what `variables` give under them."""
    params, stacked = variables["params"], rotation.reshape(LAYERS, HEADS, WIDTH, WIDTH)
    layers = jax.vmap(lambda p, r: rq.fold_rotation(p, r, ("q",)))(params["layers"], stacked)
    return {"params": params | {"layers": layers}}


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3, layers=LAYERS, roll_layers="all")
    rolling = roller.init(num_modalities=2, dim=WIDTH, num_heads=LAYERS * HEADS)
    params = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, params, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
