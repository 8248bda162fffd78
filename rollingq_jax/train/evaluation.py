"""A pass over one split: means over its examples, and each example's own outputs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from rollingq_jax.analysis.metrics import check_answers
from rollingq_jax.train.metrics import add_sums, finish
from rollingq_jax.train.parallel import Parallel
from rollingq_jax.train.state import TrainState

Columns = dict[str, np.ndarray]


def evaluate(
    parallel: Parallel,
    state: TrainState,
    batches: Iterable[dict[str, np.ndarray]],
    check: Callable[[], None] = lambda: None,
    where: str = "the split",
) -> tuple[dict[str, Any], Columns]:
    """Evaluates a state on every example of a split; warns of answers that are not finite.

    Args:
      parallel: the evaluation step over all devices.
      state: parameters and rotation.
      batches: from `eval_batches`; padding rows are left out of both results.
      check: called before each batch; may end the pass by raising.
      where: the split in words, for the warning and the error.

    Returns:
      The row for `metrics.jsonl`, and columns `[N, ...]`: `probabilities`, `label`, `present`
      `[N, M]`, `quality_*` and, with a class query, `attention_share` and `mean_keys/<m>`.

    Raises:
      NonFiniteError: the logits of every example are NaN or infinite.
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
    row = finish(sums)
    quiet = jax.process_index() > 0
    check_answers(row.get("nonfinite", 0), int(sums["weight"]), where, quiet=quiet)
    return row, {name: np.concatenate(parts) for name, parts in columns.items()}


def batch_sums_on_host(parallel: Parallel, sums: Any) -> dict[str, np.ndarray]:
    """One copy of replicated sums, in host memory."""
    return {name: np.asarray(value) for name, value in parallel.get(sums).items()}


def by_modality(modalities: Sequence[str], columns: Columns, name: str) -> dict[str, np.ndarray]:
    """Columns of `attention_share`, `present` or `quality` as `{modality: [N]}`, else empty."""
    if name in ("attention_share", "present"):
        values = columns.get(name)
        return {} if values is None else {m: values[:, i] for i, m in enumerate(modalities)}
    found = {m: columns[f"quality_{m}"] for m in modalities if f"quality_{m}" in columns}
    return found if len(found) == len(modalities) else {}
