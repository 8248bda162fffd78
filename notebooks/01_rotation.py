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
# # The rotation, by hand
#
# A class token attends over the tokens of several modalities. Its query has a direction, and so has
# each modality's mean key. Where the query lies nearer to one of them, that modality gets the
# attention, whatever the sample shows. Rolling Query (Ni et al., ICML 2025,
# [arXiv 2506.11465](https://arxiv.org/abs/2506.11465)) turns the query to a direction between them.
# In two dimensions one can see all of it.

# %%
# Where the package is not installed yet, in the folder notebooks/ of a clone:
# %pip install .. matplotlib

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import rollingq_jax as rq

# %% [markdown]
# ## Keys and a query
#
# Forty samples, two modalities. Each point is one sample's mean key. The query lies close to the
# audio, as it does after some epochs of training.

# %%
names = ("audio", "visual")
colors = {"audio": "#0072B2", "visual": "#D55E00"}


def make_keys(rng, degrees, count=40):
    """Keys `[count, 2]` around a direction."""
    angle = jnp.deg2rad(degrees) + 0.3 * jax.random.normal(rng, (count,))
    return jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)


keys = jnp.stack([make_keys(jax.random.key(0), 30.0), make_keys(jax.random.key(1), 140.0)])
query = jnp.array([0.9, 0.8])


def arrow(axes, end, label, color, width=1.5):
    """An arrow from the origin, with its name in the legend."""
    axes.annotate("", np.asarray(end), (0, 0), arrowprops={"color": color, "width": width})
    axes.plot([], [], color=color, linewidth=2 * width, label=label)


def draw(axes, query, title, anchor=None):
    """Keys as points, their means and the query as arrows."""
    for name, points in zip(names, np.asarray(keys), strict=True):
        axes.scatter(*points.T, s=12, alpha=0.5, color=colors[name])
        arrow(axes, points.mean(axis=0), f"mean key of the {name}", colors[name])
    arrow(axes, query, "class query", "black", width=2.5)
    if anchor is not None:
        axes.plot(*np.asarray(anchor), "*", color="#CC79A7", markersize=15, label="anchor")
    axes.set(xlim=(-1.3, 1.3), ylim=(-0.2, 1.4), aspect="equal", title=title)
    axes.set(xlabel="first dimension", ylabel="second dimension")


figure, axes = plt.subplots(figsize=(6.5, 3.6), layout="constrained")
draw(axes, query, "The query leans to the audio")
figure.legend(loc="outside right upper", frameon=False)
plt.show()

# %% [markdown]
# ## How uneven is it?
#
# $c^m$ is the mean cosine of query and mean key. Their difference is the attention imbalance rate
# (AIR); with more than two modalities, the largest minus the smallest.

# %%
scores = rq.cosine_scores(jnp.broadcast_to(query, keys.shape[1:]), keys)
print("cosine scores:", ", ".join(f"{m} {s:.2f}" for m, s in zip(names, scores, strict=True)))
print(f"imbalance: {rq.imbalance(scores):.2f}")

# %% [markdown]
# ## Where should it look?
#
# At the rebalance anchor: the unit mean keys, weighted by $\alpha = \mathrm{softmax}(-2 \rho c)$, in
# the query's length. With $\rho = 0$ it lies half-way; a larger $\rho$ leans to the modality that
# is overlooked.

# %%
for rho in (0.0, 1.0, 4.0):
    weights = rq.rebalance_weights(scores, rho)
    anchor = rq.rebalance_anchor(query, keys.mean(axis=1), weights)
    angle = float(jnp.rad2deg(jnp.arctan2(anchor[1], anchor[0])))
    audio, visual = (f"{name} {w:.2f}" for name, w in zip(names, weights, strict=True))
    print(f"rho {rho:.0f}: weights {audio}, {visual}; anchor at {angle:.0f} degrees")

# %% [markdown]
# ## The rotation
#
# $R$ turns the query onto the anchor and leaves everything outside their plane alone.
# $R^T R = I$, so no length changes. In two dimensions it is the matrix one knows from school:

# %%
anchor = rq.rebalance_anchor(query, keys.mean(axis=1), rq.rebalance_weights(scores, 0.0))
rotation = rq.rotation_between(query, anchor)
angle = jnp.arctan2(anchor[1], anchor[0]) - jnp.arctan2(query[1], query[0])
school = jnp.array([[jnp.cos(angle), -jnp.sin(angle)], [jnp.sin(angle), jnp.cos(angle)]])
for row in rotation:
    print("  ".join(f"{entry:6.3f}" for entry in row))
assert jnp.allclose(rotation, school, atol=1e-5)

balanced = rq.rotate(rotation, query)
assert jnp.allclose(balanced, anchor, atol=1e-5)
after = rq.cosine_scores(jnp.broadcast_to(balanced, keys.shape[1:]), keys)
assert rq.imbalance(after) < rq.imbalance(scores)

# %%
figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True, layout="constrained")
draw(axes[0], query, f"Before: imbalance {rq.imbalance(scores):.2f}")
draw(axes[1], balanced, f"After: imbalance {abs(rq.imbalance(after)):.2f}", anchor)
figure.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=4)
plt.show()

# %% [markdown]
# ## The same, as training does it
#
# `rq.rolling_query` keeps running sums while training, decides, and turns the query. `[H, d]` is a
# query for each head, `[M, B, H, d]` a mean key for each modality, sample and head.

# %%
roller = rq.rolling_query(beta=0.1, rho=0.0, max_rotations=1)
state = roller.init(num_modalities=2, dim=2, num_heads=1)
state = roller.observe(state, query[None], keys[:, :, None])
state, info = jax.jit(roller.update)(state, query[None])
assert info.rolled[0]
print(f"the head rolled by {float(jnp.rad2deg(info.angle[0])):.0f} degrees")
assert jnp.allclose(state.rotation[0], rotation, atol=1e-5)

# %% [markdown]
# That is the whole method. `02_av_digits` watches it in a training run, `03_your_model` puts it into
# a model that you already have.
