"""RollingQ in Flax Linen's `MultiHeadDotProductAttention`, through its `attention_fn`."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, HEADS = 16, 2


class Model(nn.Module):
    """Self-attention over [class token, audio, visual]; the class token's row is classified."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Any, rotation: Array) -> tuple[Array, tuple[Array, Array]]:
        """Logits `[B, C]`, class query `[B, H, d_h]` and mean keys `[M, B, H, d_h]`."""
        tokens = [nn.Dense(DIM, name=m)(batch[m]) for m in ("audio", "visual")]
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, DIM))
        cls = jnp.broadcast_to(cls, (len(tokens[0]), 1, DIM))
        seen = {}

        def attention_fn(query: Array, key: Array, value: Array, **kwargs: Any) -> Array:
            """Turns the class token's query, the first row, and leaves the others alone."""
            seen["query"] = rq.rotate(rotation, query[:, 0])
            query = query.at[:, 0].set(seen["query"])
            audio, visual = jnp.split(key[:, 1:], [tokens[0].shape[1]], axis=1)
            seen["keys"] = jnp.stack([audio.mean(axis=1), visual.mean(axis=1)])
            return nn.dot_product_attention(query, key, value, **kwargs)

        attention = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn)
        output = attention(jnp.concatenate([cls, *tokens], axis=1))
        return nn.Dense(self.num_classes)(output[:, 0]), (seen["query"], seen["keys"])


def fold(variables: Any, rotation: Array) -> Any:
    """Exact here, although all tokens share the projection: only the class token's row is read."""
    path = ("params", "MultiHeadDotProductAttention_0", "query")
    return rq.fold_rotation(variables, rotation, query_path=path)


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple[Any, Any, list[float]]:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=DIM // HEADS, num_heads=HEADS)
    variables = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, variables, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
