"""A decoder over mixed tokens, with RoPE and grouped keys: the last token is the class query.

It does not fold: RoPE, which depends on the position, is between projection and rotation.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, HEADS, GROUPS, WIDTH = 16, 4, 2, 4


def rope(x: Array) -> Array:
    """Rotary position embedding of `[B, L, heads, WIDTH]`."""
    angle = jnp.arange(x.shape[1])[:, None] / 100.0 ** jnp.linspace(0.0, 1.0, WIDTH // 2)
    turn, (a, b) = jnp.exp(1j * angle)[:, None], jnp.split(x, 2, axis=-1)
    return jnp.concatenate([((a + 1j * b) * turn).real, ((a + 1j * b) * turn).imag], axis=-1)


class Model(nn.Module):
    """Tokens of two modalities in mixed order and an answer token; one causal layer; a head."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Data, rotation: Array) -> tuple:
        """Logits, the last token's query `[B, H, d]`, mean keys `[M, B, H, d]` and weights."""
        tokens = [nn.Dense(DIM, name=m)(batch[m]) for m in ("audio", "visual")]
        answer = self.param("answer", nn.initializers.normal(1.0), (1, 1, DIM))
        tokens.append(answer.repeat(len(tokens[0]), axis=0))  # of no modality, and always the last
        ids = np.repeat([0, 1, -1], [t.shape[1] for t in tokens])
        order = np.append(np.random.default_rng(0).permutation(len(ids) - 1), len(ids) - 1)
        x, segments = jnp.concatenate(tokens, axis=1)[:, order], jnp.asarray(ids[order])
        key, value = (nn.DenseGeneral((GROUPS, WIDTH), name=n)(x) for n in ("key", "value"))
        queries, key = rope(nn.DenseGeneral((HEADS, WIDTH), name="query")(x)), rope(key)
        query = rq.rotate(rotation, queries[:, -1])  # only the last token's, behind RoPE
        out = jax.nn.dot_product_attention(queries.at[:, -1].set(query), key, value, is_causal=True)
        x = x + nn.DenseGeneral(DIM, axis=(-2, -1), name="out")(out)
        seen = rq.segment_mean_keys(key, segment_ids=segments, num_modalities=2, num_heads=HEADS)
        return nn.Dense(self.num_classes)(x[:, -1]), (query, *seen)


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=WIDTH, num_heads=HEADS)
    variables = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, variables, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
