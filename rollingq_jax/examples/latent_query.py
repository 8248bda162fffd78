"""A Perceiver's latent query of several tokens: each pair of latent and head has its rotation.

The latents share one projection, so these rotations do not fold into it; they stay beside the
parameters.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, LATENTS, HEADS = 16, 3, 2
WIDTH = DIM // HEADS


class Model(nn.Module):
    """Learned latents attend over all tokens; what they hold is averaged and classified."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Any, rotation: Array) -> tuple[Array, tuple[Array, Array]]:
        """Logits `[B, C]`, queries `[N H, d_h]` and mean keys `[M, B, N H, d_h]`."""
        tokens = [nn.Dense(DIM, name=m)(batch[m]) for m in ("audio", "visual")]
        latents = self.param("latents", nn.initializers.normal(1.0), (LATENTS, DIM))
        project = {n: nn.DenseGeneral((HEADS, WIDTH), name=n) for n in ("query", "key", "value")}
        query = project["query"](latents).reshape(LATENTS * HEADS, WIDTH)
        query = rq.rotate(rotation, query)  # [N H, d_h, d_h] rotations
        keys = [project["key"](t) for t in tokens]  # [B, L_m, H, d_h]
        key, value = jnp.concatenate(keys, axis=1), project["value"](jnp.concatenate(tokens, 1))
        rows = query.reshape(LATENTS, HEADS, WIDTH)
        rows = jnp.broadcast_to(rows[None], (len(key), *rows.shape))
        filled = latents[None] + nn.dot_product_attention(rows, key, value).reshape(
            -1, LATENTS, DIM
        )
        filled = filled + nn.Dense(DIM)(nn.gelu(nn.Dense(2 * DIM)(nn.LayerNorm()(filled))))
        # A latent's heads see the keys of those heads: the same for every latent.
        mean_keys = jnp.stack([jnp.tile(k.mean(axis=1), (1, LATENTS, 1)) for k in keys])
        return nn.Dense(self.num_classes)(filled.mean(axis=1)), (query, mean_keys)


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple[Any, Any, list[float]]:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=WIDTH, num_heads=LATENTS * HEADS)
    variables = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, variables, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
