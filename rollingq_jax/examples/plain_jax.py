"""RollingQ in plain JAX functions with an optax loop; two heads, each with its own rotation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import Data, batches, make_data, report

DIM, HEADS, MODALITIES = 16, 2, ("audio", "visual")  # in alphabetical order, as everywhere
roller, tx = rq.rolling_query(beta=0.01, rho=1.0, max_rotations=3), optax.adam(5e-3)


def init(rng: jax.Array, data: Data) -> dict[str, jax.Array]:
    """An embedding for each modality, one class token, the projections of one attention."""
    shapes: dict[str, Any] = {m: (data[m].shape[-1], DIM) for m in MODALITIES} | {"cls": (DIM,)}
    shapes |= {name: (DIM, HEADS, DIM // HEADS) for name in ("query", "key", "value")}
    shapes["head"] = (DIM, int(data["label"].max()) + 1)
    keys = dict(zip(shapes, jax.random.split(rng, len(shapes)), strict=True))
    return {n: jax.random.normal(keys[n], s) * s[0] ** -0.5 for n, s in shapes.items()}


def loss_fn(params: Any, batch: Data, rotation: jax.Array) -> tuple[jax.Array, Any]:
    """Cross-entropy, and the two things that RollingQ asks for: class query and mean keys."""
    tokens = {m: jnp.tanh(batch[m] @ params[m]) for m in MODALITIES}  # [B, L_m, D]
    query = rq.rotate(rotation, jnp.einsum("d,dhk->hk", params["cls"], params["query"]))
    joined, bias = jnp.concatenate(list(tokens.values()), axis=1), jnp.zeros_like(query)
    output, _ = rq.class_token_attention(joined, query, params["key"], params["value"], bias, bias)
    mean_keys = jnp.stack([rq.mean_key(tokens[m], params["key"], bias) for m in MODALITIES])
    logits = output.reshape(-1, DIM) @ params["head"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return loss.mean(), (query, mean_keys)


@jax.jit
def train_step(params: Any, opt_state: Any, rolling: Any, batch: Any) -> tuple[Any, ...]:
    """A gradient step; what the attention has seen is added to the running sums."""
    gradient = jax.value_and_grad(loss_fn, has_aux=True)  # the rotation is a constant in it
    (loss, seen), grads = gradient(params, batch, rolling.rotation)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, roller.observe(rolling, *seen), loss


def train(data: Data, num_epochs: int = 5, batch_size: int = 32) -> tuple[Any, Any, list[float]]:
    """Parameters, rolling state and each epoch's last loss."""
    params, losses = init(jax.random.key(0), data), []
    opt_state, rolling = tx.init(params), roller.init(len(MODALITIES), DIM // HEADS, HEADS)
    for epoch in range(num_epochs):
        for batch in batches(data, batch_size, epoch):
            params, opt_state, rolling, loss = train_step(params, opt_state, rolling, batch)
        rolling, info = jax.jit(roller.update)(rolling)  # rolls the heads where the trigger holds
        losses.append(report(epoch, loss, info))
    return params, rolling, losses


if __name__ == "__main__":
    train(make_data())
