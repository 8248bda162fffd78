# ---
# jupyter:
#   jupytext:
#     comment_magics: false
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # RollingQ in your own model
#
# A Flax model with `MultiHeadDotProductAttention` that exists already, and what has to change in it.
# This notebook needs the installed package and nothing else: no file of the repository, no data.

# %%
# Where the package is not installed yet, in a clone of the repository:
# %pip install . matplotlib

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import linen as nn

import rollingq_jax as rq
from rollingq_jax.examples.toy_data import batches, make_data

# %% [markdown]
# ## The model as it is
#
# Two modalities become tokens, a learned class token attends over them, a linear layer classifies.
# The audio shows the class three times as plainly as the image.

# %%
data = make_data(num_examples=512, num_classes=4)
print({name: column.shape for name, column in data.items()})

DIM, HEADS, CLASSES = 16, 2, 4
modalities = ("audio", "visual")


class Existing(nn.Module):
    @nn.compact
    def __call__(self, batch):
        tokens = jnp.concatenate([nn.Dense(DIM, name=m)(batch[m]) for m in modalities], axis=1)
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, DIM))
        cls = jnp.broadcast_to(cls, (len(tokens), 1, DIM))
        output = nn.MultiHeadDotProductAttention(HEADS, name="fusion")(cls, tokens)
        return nn.Dense(CLASSES, name="head")(output[:, 0])


# %% [markdown]
# ## The model with RollingQ
#
# The parameters stay the same. Three things change: the model takes a `rotation`; an `attention_fn`
# turns the class query and notes what it saw; and the model returns that beside its output.


# %%
class Rolling(nn.Module):
    @nn.compact
    def __call__(self, batch, rotation):
        parts = [nn.Dense(DIM, name=m)(batch[m]) for m in modalities]
        tokens = jnp.concatenate(parts, axis=1)
        cls = self.param("cls", nn.initializers.normal(1.0), (1, 1, DIM))
        cls = jnp.broadcast_to(cls, (len(tokens), 1, DIM))
        seen = {}

        def attention_fn(query, key, value, **kwargs):  # [B, 1 or L, H, d_h]
            query = rq.rotate(rotation, query)
            spans = jnp.split(key, [parts[0].shape[1]], axis=1)
            seen["mean_keys"] = jnp.stack([span.mean(axis=1) for span in spans])
            seen["query"] = query[:, 0]
            return nn.dot_product_attention(query, key, value, **kwargs)

        fusion = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, name="fusion")
        output = fusion(cls, tokens)
        return nn.Dense(CLASSES, name="head")(output[:, 0]), seen


# %% [markdown]
# ## The training step
#
# `RollingState` is state beside the parameters, like the optimizer's. `observe` adds a batch to its
# sums and lets no gradient through. `update` decides and turns, here at each epoch's end.

# %%
model, tx = Rolling(), optax.adam(5e-3)


def train(roller, num_epochs=8):
    """Parameters, rolling state, and imbalance `[H]` and rolls `[H]` of each epoch's end."""
    rolling = roller.init(num_modalities=2, dim=DIM // HEADS, num_heads=HEADS)
    first = {name: column[:2] for name, column in data.items()}
    params = jax.jit(model.init)(jax.random.key(0), first, rolling.rotation)["params"]
    opt_state, history = tx.init(params), []

    @jax.jit
    def train_step(params, opt_state, rolling, batch):
        def loss_fn(params):
            logits, seen = model.apply({"params": params}, batch, rolling.rotation)
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
            return loss, seen

        grads, seen = jax.grad(loss_fn, has_aux=True)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        rolling = roller.observe(rolling, seen["query"], seen["mean_keys"])
        return optax.apply_updates(params, updates), opt_state, rolling

    for epoch in range(num_epochs):
        for batch in batches(data, 32, epoch):
            params, opt_state, rolling = train_step(params, opt_state, rolling, batch)
        rolling, info = jax.jit(roller.update)(rolling)
        history.append((np.asarray(info.imbalance), np.asarray(info.rolled)))
        print(f"epoch {epoch}: imbalance {history[-1][0].round(2)}, rolled {history[-1][1]}")
    return params, rolling, history


# %% [markdown]
# First without a rotation, to see where the imbalance settles; then with, and a `beta` below that.

# %%
before, still, plain = train(rq.rolling_query(max_rotations=0))


# %% [markdown]
# `report` measures a model over any data, before anything rolls, and says in words what it saw.


# %%
def see(batch):
    _, seen = model.apply({"params": before}, batch, still.rotation)  # which is the identity
    return seen | {"mean_keys": dict(zip(modalities, seen["mean_keys"], strict=True))}


found = rq.report(see, batches(data, 128, epoch=0), beta=0.1)

# %%
params, rolling, rolled = train(rq.rolling_query(beta=0.1, max_rotations=None))
print("rotations:", rolling.count)
assert rolling.count.sum() >= 1

# %%
figure, axes = plt.subplots(figsize=(6, 3.5))
for name, history, color in (("as it was", plain, "grey"), ("with RollingQ", rolled, "#0072B2")):
    axes.plot([imbalance.mean() for imbalance, _ in history], color=color, label=name)
for epoch, (_, heads) in enumerate(rolled):
    if heads.any():
        axes.axvline(epoch, color="#AA3377", alpha=0.3)
axes.axhline(0.1, linestyle=":", color="grey")
axes.annotate("beta", (0, 0.1), xytext=(0, 3), textcoords="offset points", color="grey")
axes.set(
    xlabel="epoch",
    ylabel="imbalance, mean over heads",
    title="At each epoch's end; a vertical line is a rotation",
)
axes.legend(frameon=False)
plt.show()

# %% [markdown]
# Without rotations the imbalance only grows. With them, each is followed by a smaller one, as long as
# the gradient leans back to the audio; then nothing is due any more.

# %% [markdown]
# ## Fold it away
#
# The query projection serves the class token alone here, so the rotation folds into it. What is left
# are parameters of the model as it was, which knows nothing of rotations, with the same outputs.

# %%
folded = rq.fold_rotation(params, rolling.rotation, query_path=("fusion", "query"))
before, _ = jax.jit(model.apply)({"params": params}, data, rolling.rotation)
after = jax.jit(Existing().apply)({"params": folded}, data)
print(f"largest difference of the outputs: {np.abs(np.asarray(before - after)).max():.1e}")
np.testing.assert_allclose(before, after, atol=1e-4)

# %% [markdown]
# `rollingq_jax.examples` has the same for plain JAX, Flax NNX, one query a modality, and latent
# queries; `python -m rollingq_jax.examples.plain_jax` runs one.
