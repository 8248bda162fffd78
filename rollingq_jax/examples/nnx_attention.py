"""RollingQ in Flax NNX: the rotation is an `nnx.Variable`, which no optimizer touches."""

import jax
import jax.numpy as jnp
from flax import nnx
from optax import adam
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, batches, make_data, report

DIM, HEADS, WIDTH, NAMES = 16, 2, 8, ("audio", "visual")
roller = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3)


class Model(nnx.Module):
    """A class token attends over all tokens; `nnx_fusion.fold_rotation` folds what has rolled."""

    def __init__(self, data: Data, rngs: nnx.Rngs) -> None:
        self.audio, self.visual = (nnx.Linear(data[m].shape[-1], DIM, rngs=rngs) for m in NAMES)
        self.cls = nnx.Param(jax.random.normal(rngs.params(), (DIM,)))
        self.query, self.key = (nnx.LinearGeneral(DIM, (HEADS, WIDTH), rngs=rngs) for _ in range(2))
        self.head = nnx.Linear(DIM, int(data["label"].max()) + 1, rngs=rngs)
        self.rotation = nnx.Variable(roller.init(2, WIDTH, HEADS).rotation)

    def loss(self, batch: dict[str, jax.Array]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Cross-entropy, class query `[H, d_h]` and mean keys `[M, B, H, d_h]`."""
        tokens = jnp.concatenate([self.audio(batch["audio"]), self.visual(batch["visual"])], axis=1)
        query, key = rq.rotate(self.rotation[...], self.query(self.cls[...])), self.key(tokens)
        weights = jax.nn.softmax(jnp.einsum("hk,blhk->bhl", query, key) * WIDTH**-0.5)
        logits = self.head(jnp.einsum("bhl,bld->bd", weights, tokens))
        mean_keys = jnp.stack([k.mean(1) for k in jnp.split(key, [batch["audio"].shape[1]], 1)])
        return cross_entropy(logits, batch["label"]).mean(), (query, mean_keys)


@nnx.jit
def train_step(model: Model, tx: nnx.Optimizer, rolling: rq.RollingState, batch: Data) -> tuple:
    """A gradient step in place; returns the running sums and the loss."""
    (loss, seen), grads = nnx.value_and_grad(type(model).loss, has_aux=True)(model, batch)
    tx.update(model, grads)
    return roller.observe(rolling, *seen), loss


def train(data: Data, num_epochs: int = 5, batch_size: int = 32, make: type = Model) -> tuple:
    """Model, rolling state and each epoch's last loss."""
    model = make(data, nnx.Rngs(0))
    tx = nnx.Optimizer(model, adam(5e-3), wrt=nnx.Param)
    rolling, losses = roller.init(num_modalities=2, dim=WIDTH, num_heads=HEADS), []
    for epoch in range(num_epochs):
        for batch in batches(data, batch_size, epoch):
            rolling, loss = train_step(model, tx, rolling, batch)
        rolling, info = jax.jit(roller.update)(rolling)
        model.rotation[...] = rolling.rotation
        losses.append(report(epoch, loss, info))
    return model, rolling, losses


if __name__ == "__main__":
    train(make_data())
