"""A model without a class token: the mean of all tokens asks, and its answer is classified.

The query projection serves the pooled query only, so that the rotation folds into it.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, HEADS = 16, 2
WIDTH = DIM // HEADS


class Model(nn.Module):
    """Attention pooling over the tokens of audio and visual, by a query made of their mean."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Any, rotation: Array) -> tuple[Array, tuple[Array, Array, Array]]:
        """Logits `[B, C]`, query `[B, H, d_h]`, mean keys `[M, B, H, d_h]` and weights `[M, B]`."""
        tokens = [nn.tanh(nn.Dense(DIM, name=m)(batch[m])) for m in ("audio", "visual")]
        lengths = tuple(token.shape[1] for token in tokens)
        # The mean of each modality's mean: the longer one does not ask more loudly.
        pooled = jnp.stack([token.mean(axis=1) for token in tokens]).mean(axis=0)
        joined = jnp.concatenate(tokens, axis=1)
        query = rq.rotate(rotation, nn.DenseGeneral((HEADS, WIDTH), name="query")(pooled))
        key, value = (nn.DenseGeneral((HEADS, WIDTH), name=n)(joined) for n in ("key", "value"))
        answer = nn.dot_product_attention(query[:, None], key, value).reshape(-1, DIM)
        logits = nn.Dense(self.num_classes)(answer + pooled)
        return logits, (query, *rq.segment_mean_keys(key, lengths))


def fold(variables: Any, rotation: Array) -> Any:
    """Variables that give without a rotation what `variables` give under `rotation`."""
    return rq.fold_rotation(variables, rotation, query_path=("params", "query"))


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple[Any, Any, list[float]]:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=WIDTH, num_heads=HEADS)
    variables = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, variables, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
