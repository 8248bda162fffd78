"""A pass over one split: means over its examples, and each example's own outputs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from rollingq_jax.train.metrics import add_sums, finish
from rollingq_jax.train.parallel import Parallel
from rollingq_jax.train.state import TrainState

Columns = dict[str, np.ndarray]


def evaluate(
    parallel: Parallel,
    state: TrainState,
    batches: Iterable[dict[str, np.ndarray]],
    check: Callable[[], None] = lambda: None,
) -> tuple[dict[str, float], Columns]:
    """Evaluates a state on every example of a split.

    Args:
      parallel: the evaluation step over all devices.
      state: parameters and rotation.
      batches: from `eval_batches`; padding rows are left out of both results.
      check: called before each batch; may end the pass by raising.

    Returns:
      The row for `metrics.jsonl`, and columns `[N, ...]`: `probabilities`, `label`, `quality_*`
      and, with a class query, `attention_share` and `mean_keys/<m>`.
    """
    sums: dict[str, Any] = {}
    columns: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        check()
        placed = parallel.put_batch(batch)
        batch_sums, examples = parallel.eval_step(state, placed)
        sums = add_sums(sums, batch_sums_on_host(parallel, batch_sums))
        given = {
            name: placed[name]
            for name in batch
            if name in ("label", "example_mask") or name.startswith("quality_")
        }
        rows = parallel.get_rows(examples | given)
        real = rows.pop("example_mask").astype(bool)
        for name, value in rows.items():
            columns.setdefault(name, []).append(np.asarray(value)[real])
    return finish(sums), {name: np.concatenate(parts) for name, parts in columns.items()}


def batch_sums_on_host(parallel: Parallel, sums: Any) -> dict[str, np.ndarray]:
    """One copy of replicated sums, in host memory."""
    return {name: np.asarray(value) for name, value in parallel.get(sums).items()}


def by_modality(modalities: Sequence[str], columns: Columns, name: str) -> dict[str, np.ndarray]:
    """Columns of `attention_share` or `quality` as `{modality: [N]}`; empty if absent."""
    if name == "attention_share":
        shares = columns.get(name)
        return {} if shares is None else {m: shares[:, i] for i, m in enumerate(modalities)}
    found = {m: columns[f"quality_{m}"] for m in modalities if f"quality_{m}" in columns}
    return found if len(found) == len(modalities) else {}
