"""The rotation against the SVD, and the fused class-token attention against textbook forms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from benchmarks.timing import Row, cost, interleaved, rows
from rollingq_jax import class_token_attention, reference_attention, rotation_between


def rotation(dim: int = 768, rounds: int = 9) -> list[Row]:
    """The geodesic rotation and the SVD's, float32, d = 768."""
    source, target = jax.random.normal(jax.random.key(0), (2, dim))
    functions = {
        method: jax.jit(lambda x, y, method=method: rotation_between(x, y, method))
        for method in ("geodesic", "svd")
    }
    calls = {name: lambda f=f: f(source, target) for name, f in functions.items()}
    return rows(f"rotation, d = {dim}", interleaved(calls, rounds, calls=3), "svd")


def full_attention(
    tokens: Array,
    query: Array,
    w_key: Array,
    w_value: Array,
    b_key: Array,
    b_value: Array,
    w_query: Array,
) -> tuple[Array, None]:
    """Every token's query attends and the class row alone is used: upstream's form, L x L weights.

    `w_query` `[D, H, d_h]` makes the other tokens' queries; the rest as `class_token_attention`.
    """
    keys = jnp.einsum("bld,dhk->bhlk", tokens, w_key) + b_key[None, :, None]
    values = jnp.einsum("bld,dhk->bhlk", tokens, w_value) + b_value[None, :, None]
    queries = jnp.einsum("bld,dhk->bhlk", tokens, w_query)
    queries = queries.at[:, :, 0].set(jnp.broadcast_to(query[None], queries[:, :, 0].shape))
    logits = jnp.einsum("bhik,bhjk->bhij", queries, keys) * query.shape[-1] ** -0.5
    output = jnp.einsum("bhij,bhjk->bhik", jax.nn.softmax(logits, axis=-1), values)
    return output[:, :, 0], None


def fusion(
    batch_size: int = 8, length: int = 767, dim: int = 768, heads: int = 1, rounds: int = 7
) -> list[Row]:
    """Class-token attention at CREMA-D's size, forward and with the gradient of everything."""
    rngs = jax.random.split(jax.random.key(0), 7)
    head = (heads, dim // heads)
    tokens = jax.random.normal(rngs[0], (batch_size, length, dim))
    query = jax.random.normal(rngs[1], head)
    kernels = [jax.random.normal(r, (dim, *head)) * dim**-0.5 for r in rngs[2:4]]
    biases = [jax.random.normal(r, head) for r in rngs[4:6]]
    arguments: tuple[Any, ...] = (tokens, query, *kernels, *biases)
    w_query = jax.random.normal(rngs[6], (dim, *head)) * dim**-0.5
    forms: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
        "fused": (class_token_attention, arguments),
        "textbook, class row": (reference_attention, arguments),
        "textbook, L x L": (full_attention, (*arguments, w_query)),
    }
    table = []
    for what in ("forward", "with gradient"):
        calls, costs = {}, {}
        for name, (form, given) in forms.items():
            function = _forward(form) if what == "forward" else _gradient(form, len(given))
            compiled = jax.jit(function).lower(*given).compile()
            costs[name] = cost(compiled)
            calls[name] = lambda compiled=compiled, given=given: compiled(*given)
        title = f"fusion, {what}, B {batch_size}, L {length}, d {dim}, {heads} head(s)"
        for row in rows(title, interleaved(calls, rounds), "textbook, L x L"):
            row["flops_ratio"] = costs[row["case"]]["flops"] / costs["textbook, L x L"]["flops"]
            table.append(row | costs[row["case"]])
    return table


def _forward(form: Callable[..., Any]) -> Callable[..., Array]:
    return lambda *given: form(*given)[0]


def _gradient(form: Callable[..., Any], count: int) -> Callable[..., Any]:
    return jax.grad(
        lambda *given: jnp.sum(jnp.square(form(*given)[0])), argnums=tuple(range(count))
    )
