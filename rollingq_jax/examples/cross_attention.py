"""A class query for each modality: two queries over all tokens, two rotations.

Each query is one "head" of the roller. It has its own imbalance, so it rolls when it is due.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, make_data
from rollingq_jax.examples.training import fit

DIM, MODALITIES = 16, ("audio", "visual")


class Model(nn.Module):
    """The mean token of each modality asks over both; both answers are classified."""

    num_classes: int

    @nn.compact
    def __call__(self, batch: Any, rotation: Array) -> tuple[Array, tuple[Array, Array]]:
        """Logits `[B, C]`, queries `[B, 2, d]` and mean keys `[M, B, 2, d]`."""
        tokens = {m: nn.Dense(DIM, name=m)(batch[m]) for m in MODALITIES}
        # A query of its own for every sample: what the modality shows on average.
        queries = [nn.Dense(DIM, name=f"query_{m}")(tokens[m].mean(axis=1)) for m in MODALITIES]
        query = rq.rotate(rotation, jnp.stack(queries, axis=1))  # [B, 2, d], [2, d, d] rotations
        keys = [nn.DenseGeneral((2, DIM), name=f"key_{m}")(tokens[m]) for m in MODALITIES]
        joined = jnp.concatenate([tokens[m] for m in MODALITIES], axis=1)
        values = nn.Dense(DIM, name="value")(joined)
        scores = jnp.einsum("bqd,blqd->bql", query, jnp.concatenate(keys, axis=1)) * DIM**-0.5
        answers = jnp.einsum("bql,bld->bqd", jax.nn.softmax(scores), values)
        mean_keys = jnp.stack([key.mean(axis=1) for key in keys])
        logits = nn.Dense(self.num_classes)(answers.reshape(len(answers), -1))
        return logits, (query, mean_keys)


def fold(variables: Any, rotation: Array) -> Any:
    """Each query has a projection of its own, which takes the rotation."""
    for i, m in enumerate(MODALITIES):
        variables = rq.fold_rotation(variables, rotation[i : i + 1], ("params", f"query_{m}"))
    return variables


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple[Any, Any, list[float]]:
    """Parameters, rolling state and each epoch's last loss."""
    model = Model(int(data["label"].max()) + 1)
    roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)
    rolling = roller.init(num_modalities=2, dim=DIM, num_heads=len(MODALITIES))
    variables = jax.jit(model.init)(jax.random.key(0), data, rolling.rotation)
    return fit(model.apply, variables, roller, rolling, data, num_epochs, batch_size)


if __name__ == "__main__":
    train(make_data())
