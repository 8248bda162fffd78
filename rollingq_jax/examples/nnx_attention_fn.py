"""RollingQ in NNX's `MultiHeadAttention`: its `attention_fn` is a module that holds the rotation.

A closure that keeps what it sees leaks tracers; a module keeps it in a variable. All tokens share
the query projection, but only the class token's row is read: `nnx_fusion.fold_rotation` is exact.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import rollingq_jax as rq
from rollingq_jax.examples import nnx_attention
from rollingq_jax.examples.nnx_attention import DIM, HEADS, NAMES, roller
from rollingq_jax.examples.toy_data import Data, make_data


class RollingAttention(nnx.Module):
    """An `attention_fn` that rotates the first token's query, and keeps what it sees."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = lengths  # tokens of each modality, behind the class token
        self.rotation = nnx.Variable(roller.init(2, DIM // HEADS, HEADS).rotation)

    def __call__(self, query: jax.Array, key: jax.Array, value: jax.Array, **kwargs: Any) -> Any:
        """`[B, L, H, d_h]`, as `nnx.dot_product_attention`."""
        turned = rq.rotate(self.rotation[...], query[:, 0])
        self.seen = nnx.Intermediate((turned, *rq.segment_mean_keys(key, self.lengths)))
        return nnx.dot_product_attention(query.at[:, 0].set(turned), key, value, **kwargs)


class Model(nnx.Module):
    """Self-attention over [class token, audio, visual]; the class token's row is classified."""

    def __init__(self, data: Data, rngs: nnx.Rngs) -> None:
        self.audio, self.visual = (nnx.Linear(data[m].shape[-1], DIM, rngs=rngs) for m in NAMES)
        self.cls = nnx.Param(jax.random.normal(rngs.params(), (1, 1, DIM)))
        fn = RollingAttention(*(data[m].shape[1] for m in NAMES))
        self.attention = nnx.MultiHeadAttention(HEADS, DIM, attention_fn=fn, rngs=rngs)
        self.rotation = fn.rotation  # one variable under two names
        self.head = nnx.Linear(DIM, int(data["label"].max()) + 1, rngs=rngs)

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        """Cross-entropy, class query `[B, H, d_h]`, mean keys `[M, B, H, d_h]`, weights."""
        cls = jnp.broadcast_to(self.cls[...], (len(batch["label"]), 1, DIM))
        tokens = [self.audio(batch["audio"]), self.visual(batch["visual"])]
        output = self.attention(jnp.concatenate([cls, *tokens], axis=1), decode=False)
        seen: Any = nnx.pop(self.attention, nnx.Intermediate)["attention_fn"]["seen"]
        return cross_entropy(self.head(output[:, 0]), batch["label"]).mean(), seen.get_value()


train = functools.partial(nnx_attention.train, make=Model)  # the same loop


if __name__ == "__main__":
    train(make_data())
