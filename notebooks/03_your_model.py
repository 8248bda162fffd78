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
# Where the package is not installed yet, in the folder notebooks/ of a clone:
# %pip install .. matplotlib

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
for name, column in data.items():
    print(f"{name:6} {column.shape}")

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
            weights = nn.dot_product_attention_weights(query, key)  # for the pictures below
            seen["share"] = rq.attention_share(weights[:, :, 0], [s.shape[1] for s in spans])
            return nn.dot_product_attention(query, key, value, **kwargs)

        fusion = nn.MultiHeadDotProductAttention(HEADS, attention_fn=attention_fn, name="fusion")
        output = fusion(cls, tokens)
        return nn.Dense(CLASSES, name="head")(output[:, 0]), seen


# %% [markdown]
# ## The training step
#
# `RollingState` is state beside the parameters, like the optimizer's. `observe` adds a batch to its
# sums and lets no gradient through, here in the last quarter of each epoch. `update` decides and
# turns, at the epoch's end.

# %%
model, tx = Rolling(), optax.adam(5e-3)


@jax.jit
def look(params, rotation):
    """Imbalance and the audio's share of the attention over all data, heads averaged; the query."""
    _, seen = model.apply({"params": params}, data, rotation)
    scores = jax.vmap(rq.cosine_scores, in_axes=(1, 2))(seen["query"], seen["mean_keys"])  # [H, M]
    shown = jax.vmap(rq.imbalance)(scores).mean(), seen["share"][..., 0].mean()
    return jnp.array(shown), seen["query"][0]


@jax.jit
def train_step(params, opt_state, rotation, batch):
    def loss_fn(params):
        logits, seen = model.apply({"params": params}, batch, rotation)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()
        return loss, seen

    grads, seen = jax.grad(loss_fn, has_aux=True)(params)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state, seen


def train(roller, num_epochs=8):
    """Parameters, rolling state, and what `look` saw before and after each epoch's update."""
    observe, update = jax.jit(roller.observe), jax.jit(roller.update)
    rolling = roller.init(num_modalities=2, dim=DIM // HEADS, num_heads=HEADS)
    first = {name: column[:2] for name, column in data.items()}
    params = jax.jit(model.init)(jax.random.key(0), first, rolling.rotation)["params"]
    opt_state, history = tx.init(params), []
    for epoch in range(1, num_epochs + 1):
        for number, batch in enumerate(batches(data, 32, epoch)):  # 16 of them
            params, opt_state, seen = train_step(params, opt_state, rolling.rotation, batch)
            if number >= 12:
                rolling = observe(rolling, seen["query"], seen["mean_keys"])
        before, query = look(params, rolling.rotation)
        rolling, info = update(rolling, query)
        after, _ = look(params, rolling.rotation)
        history.append(np.array([before, after]))
        heads = int(info.rolled.sum())
        rolled = f", after a rotation of {heads} of {HEADS} heads {after[0]:.2f}" if heads else ""
        print(f"epoch {epoch}: imbalance {before[0]:.2f}{rolled}")
    return params, rolling, np.array(history)  # [epochs, 2 (before, after), 2]


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
print("rotations:", ", ".join(f"{n} of head {head}" for head, n in enumerate(rolling.count)))
assert rolling.count.sum() >= 1

# %%
epochs = np.arange(1, len(rolled) + 1)
figure, axes = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained")
for ax, values, still_values in zip(axes, rolled.T, plain.T, strict=True):  # [2, epochs] each
    ax.plot(epochs, still_values[0], "--", color="#D55E00", label="as it was")
    ax.plot(np.repeat(epochs, 2), values.T.ravel(), color="#0072B2", label="with RollingQ")
    turned = np.flatnonzero(values[0] != values[1])
    ax.vlines(epochs[turned], *values[:, turned], color="#CC79A7", linewidth=4, label="a rotation")
axes[0].axhline(0.1, linestyle=":", color="grey")
axes[0].annotate("beta", (1, 0.1), xycoords=("axes fraction", "data"), color="grey", va="center")
axes[1].axhline(6 / 15, linestyle=":", color="grey")  # 6 tokens of audio, 9 of the image
axes[1].annotate("even", (1, 0.4), xycoords=("axes fraction", "data"), color="grey", va="center")
axes[0].set(ylabel="imbalance, mean over heads")
axes[1].set(ylabel="attention share of the audio", xlabel="epoch")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3)
plt.show()

# %% [markdown]
# Without rotations the imbalance only grows. Each rotation takes it back at once, and with it the
# audio's share; both grow again as long as the gradient leans to the audio. An even query is not an
# even share: what it leaves to the sample goes, here, to the modality that shows the class plainly.

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
