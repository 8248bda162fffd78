"""Draws the picture of the method that the README and the concepts page show.

Usage: ``python -m docs.figures``; writes ``docs/images/rotation.png``. Needs matplotlib beside the
core. Everything in the picture is computed by the package from keys drawn at random.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import rollingq_jax as rq

COLOURS = {"audio": "#0072B2", "visual": "#D55E00", "query": "#000000"}  # Okabe and Ito
CENTRES = {"audio": 20.0, "visual": 130.0}  # degrees
SAMPLES = 60


def draw_keys() -> dict[str, jax.Array]:
    """Keys `[SAMPLES, 2]` of each modality, spread around its own direction."""
    keys = {}
    for index, (name, centre) in enumerate(sorted(CENTRES.items())):
        spread, length = jax.random.normal(jax.random.key(index), (2, SAMPLES))
        angle = jnp.deg2rad(centre) + 0.25 * spread
        radius = 1.0 + 0.12 * length
        keys[name] = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], axis=-1)
    return keys


def roll(query: jax.Array, keys: dict[str, jax.Array]) -> jax.Array:
    """The query `[2]` after one roll to the equally weighted anchor."""
    roller = rq.rolling_query(beta=0.0, rho=0.0, max_rotations=1)
    state = roller.init(num_modalities=2, dim=2)
    mean_keys = jnp.stack([keys[name] for name in sorted(keys)])[:, :, None]
    state, info = roller.update(roller.observe(state, query[None], mean_keys), query[None])
    assert bool(info.rolled[0])
    return rq.rotate(state.rotation, query[None])[0]


def panel(axis: plt.Axes, title: str, query: jax.Array, keys: dict[str, jax.Array]) -> None:
    """One polar plot: a point a key, an arrow for each mean key, the query in black."""
    logits = jnp.concatenate([3.0 * keys[name] @ query for name in sorted(keys)])
    shares = jax.nn.softmax(logits).reshape(len(keys), SAMPLES).sum(axis=1)
    means = jnp.stack([keys[name].mean(axis=0) for name in sorted(keys)])
    scores = [float(jnp.dot(m, query) / jnp.linalg.norm(m) / jnp.linalg.norm(query)) for m in means]
    for name, mean, share, score in zip(sorted(keys), means, shares, scores, strict=True):
        points = np.asarray(keys[name])
        angle, radius = np.arctan2(points[:, 1], points[:, 0]), np.hypot(points[:, 0], points[:, 1])
        label = f"{name}: cosine {score:+.2f}, attention {100 * float(share):.0f} %"
        axis.scatter(angle, radius, s=10, color=COLOURS[name], alpha=0.45, label=label)
        arrow(axis, mean, COLOURS[name])
    arrow(axis, query, COLOURS["query"], width=3)
    axis.plot([], [], color=COLOURS["query"], linewidth=3, label="class query")
    axis.set(title=title, thetamin=-30, thetamax=210, ylim=(0, 1.5), yticks=[])
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, -0.16), frameon=False, fontsize=9)


def arrow(axis: plt.Axes, vector: jax.Array, color: str, width: float = 2) -> None:
    """An arrow from the origin to a vector `[2]`."""
    x, y = (float(value) for value in vector)
    style = {"arrowstyle": "-|>", "color": color, "linewidth": width, "shrinkA": 0, "shrinkB": 0}
    axis.annotate("", xy=(np.arctan2(y, x), np.hypot(x, y)), xytext=(0, 0), arrowprops=style)


def main() -> None:
    """Draw before and after side by side."""
    keys = draw_keys()
    query = jnp.array([jnp.cos(jnp.deg2rad(12.0)), jnp.sin(jnp.deg2rad(12.0))]) * 1.2
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.6), subplot_kw={"projection": "polar"})
    panel(axes[0], "Before: the query lies with one modality's keys", query, keys)
    panel(axes[1], "After one roll: the query lies between them", roll(query, keys), keys)
    figure.tight_layout()
    figure.savefig(Path(__file__).parent / "images" / "rotation.png", dpi=110)


if __name__ == "__main__":
    main()
