"""Watch before you roll: the method's measurements of any model, over any data, without a rotation.

The same `observe` and `update` as in training, with no rotation allowed, so that a model can be
looked at before anything is changed in it.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from rollingq_jax.errors import UserError
from rollingq_jax.rolling import rolling_query

See = Callable[[Mapping[str, Any]], Mapping[str, Any]]
Columns = dict[str, np.ndarray]  # {m: [B]}


@dataclasses.dataclass(frozen=True)
class Report:
    """Measurements of a pass over the data, and a verdict in words.

    Values by modality are means over examples and heads; a dict is empty where nothing was given
    that it could be computed from.

    Attributes:
      modalities: names, in alphabetical order.
      num_examples: examples of weight above 0.
      scores: c^m, the mean cosine of class query and mean key.
      imbalance: `[H]`, max_m c^m - min_m c^m of each head.
      shares: attention shares.
      uniform_shares: shares under uniform attention.
      noise_shares: a modality's share where the modality itself is replaced by noise.
      quality_correlation: Pearson's r of an example's share and the quality given for it; NaN where
        one of them is constant.
      beta: the threshold that the verdict uses.
      verdict: one line.
    """

    modalities: tuple[str, ...]
    num_examples: int
    scores: dict[str, float]
    imbalance: np.ndarray
    shares: dict[str, float]
    uniform_shares: dict[str, float]
    noise_shares: dict[str, float]
    quality_correlation: dict[str, float]
    beta: float
    verdict: str = ""

    def __str__(self) -> str:
        columns = {
            "cosine": self.scores,
            "share": self.shares,
            "uniform": self.uniform_shares,
            "share of noise": self.noise_shares,
            "r with quality": self.quality_correlation,
        }
        columns = {name: values for name, values in columns.items() if values}
        width = max(map(len, self.modalities))
        lines = [f"{'':{width}}  " + "  ".join(f"{name:>8}" for name in columns)]
        for m in self.modalities:
            cells = (f"{values[m]:.2f}" if m in values else "" for values in columns.values())
            lines.append(
                f"{m:{width}}  "
                + "  ".join(f"{c:>{max(8, len(n))}}" for n, c in zip(columns, cells, strict=True))
            )
        heads = ", ".join(f"{value:.2f}" for value in self.imbalance)
        lines.append(f"imbalance of {len(self.imbalance)} heads: {heads}")
        return "\n".join([*lines, self.verdict])


def report(
    see: See,
    batches: Iterable[Mapping[str, Any]],
    *,
    beta: float = 0.1,
    uniform_shares: Mapping[str, float] | None = None,
    noise: bool = True,
    seed: int = 0,
    quiet: bool = False,
) -> Report:
    """Measures how a model looks at its modalities, prints that and returns it.

    Args:
      see: the model, `batch -> ` a mapping with `query` `[B, H, d]` or `[H, d]` and `mean_keys`
        `{m: [B, H, d]}`; optionally `attention_share` `{m: [B, H]}`, `uniform_share` and `present`
        `{m: [B]}`. The second output of `build_model`'s models is one:
        `lambda batch: apply(variables, batch)[1]`.
      batches: one pass over the data: mappings of arrays. `quality_<m>` `[B]` are correlated with
        the shares; rows whose `example_mask` is False (padding) count nowhere.
      beta: imbalance above which a modality is called favored, and a head would roll.
      uniform_shares: shares under uniform attention, such as `uniform_share` gives; by default the
        means of the `uniform_share` that `see` gives, else equal shares.
      noise: whether to pass each batch once more for every modality that it holds under its name,
        with that modality's values drawn anew from the batch's own.
      seed: of that noise.
      quiet: whether not to print.

    Raises:
      UserError: there is no batch, `see` gives no query or mean keys, or their shapes do not fit.

    Examples:
      >>> along, across = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])  # [H, d]
      >>> def see(batch):
      ...     keys = {m: np.repeat(k[None], 2, axis=0) for m, k in (("a", along), ("b", across))}
      ...     return {"query": along, "mean_keys": keys}
      >>> found = report(see, [{"a": np.ones((2, 3))}], noise=False)
              cosine
      a         1.00
      b         0.00
      imbalance of 1 heads: 1.00
      a is favored: cosine 1.00 against 0.00 of b; 1 of 1 heads would roll at beta = 0.1
    """
    # Without rotations `update` measures as ever and changes nothing.
    roller, state, rng = rolling_query(max_rotations=0), None, np.random.default_rng(seed)
    observe = jax.jit(roller.observe)
    parts: list[dict[str, Columns]] = []
    for batch in batches:
        out = see(batch)
        missing = [name for name in ("query", "mean_keys") if name not in out]
        if missing or not isinstance(out["mean_keys"], Mapping):
            came = ", ".join(sorted(out)) or "nothing"
            raise UserError(
                f"see gives {came}; allowed: a mapping with query and mean_keys, the latter a "
                "mapping with one array a modality"
            )
        keys = {m: np.asarray(k) for m, k in sorted(out["mean_keys"].items())}
        query = np.asarray(out["query"])
        if state is None:
            state = roller.init(len(keys), query.shape[-1], query.shape[-2])
        weight, share = _weights(batch, out, keys), _shares(out)
        state = observe(state, query, keys, weight)
        replaced = [m for m in keys if noise and m in batch and share]
        part = {
            "weight": weight,
            "share": share,
            "even": _shares(out, "uniform_share"),
            "noise": {m: _shares(see({**batch, m: _noise(rng, batch[m])}))[m] for m in replaced},
            "quality": {
                m: np.asarray(batch[f"quality_{m}"]) for m in keys if f"quality_{m}" in batch
            },
        }
        parts.append(part)
    if state is None:
        raise UserError("batches is empty; allowed: at least one batch")
    _, info = roller.update(state)
    # What the first batch has, all have.
    seen = {
        kind: {m: np.concatenate([part[kind][m] for part in parts]) for m in columns}
        for kind, columns in parts[0].items()
    }
    weights = seen["weight"]
    modalities = tuple(weights)
    equal = dict.fromkeys(modalities, 1 / len(modalities))
    uniform_shares = uniform_shares or _means(seen["even"], weights) or equal
    found = Report(
        modalities=modalities,
        num_examples=int(np.any([weight > 0 for weight in weights.values()], axis=0).sum()),
        scores=dict(zip(modalities, np.mean(info.scores, axis=0).tolist(), strict=True)),
        imbalance=np.asarray(info.imbalance),
        shares=_means(seen["share"], weights),
        uniform_shares={m: float(uniform_shares[m]) for m in seen["share"]},
        noise_shares=_means(seen["noise"], weights),
        quality_correlation=_correlations(seen["share"], seen["quality"], weights),
        beta=beta,
    )
    found = dataclasses.replace(found, verdict=_verdict(found))
    if not quiet:
        print(found)
    return found


def _weights(
    batch: Mapping[str, Any], out: Mapping[str, Any], keys: Mapping[str, np.ndarray]
) -> Columns:
    """`{m: [B]}` float32, 0 for padding and for an example without the modality."""
    present, weights = out.get("present", {}), {}
    for m, key in keys.items():
        weight = np.asarray(present.get(m, np.ones(len(key))), np.float32)
        weights[m] = weight * np.asarray(batch.get("example_mask", 1.0), np.float32)
    return weights


def _shares(out: Mapping[str, Any], name: str = "attention_share") -> Columns:
    """`{m: [B]}`, means over the heads; empty where the model gives no shares."""
    shares = out.get(name, {})
    return {m: np.asarray(x).reshape(len(x), -1).mean(axis=1) for m, x in sorted(shares.items())}


def _noise(rng: np.random.Generator, values: Any) -> np.ndarray:
    """Values drawn from the array's own; zeros of an integer array, its padding, stay."""
    values = np.asarray(values)
    if not np.issubdtype(values.dtype, np.integer):
        return rng.choice(values.ravel(), size=values.shape)
    drawn = values.copy()
    drawn[values != 0] = rng.choice(values[values != 0], size=np.count_nonzero(values))
    return drawn


def _means(columns: Columns, weights: Columns) -> dict[str, float]:
    """Weighted means."""
    means = {}
    for m, values in columns.items():
        # A value that does not count may be NaN, which 0 times it is too.
        real = np.where(weights[m] > 0, values, 0.0)
        means[m] = float(np.sum(real * weights[m]) / max(np.sum(weights[m]), 1e-12))
    return means


def _correlations(shares: Columns, quality: Columns, weights: Columns) -> dict[str, float]:
    """Pearson's r of share and quality over the examples that have the modality."""
    found = {}
    for m in sorted(shares.keys() & quality.keys()):
        real = weights[m] > 0
        share, given = shares[m][real], quality[m][real]
        constant = len(share) < 2 or np.std(share) == 0 or np.std(given) == 0
        found[m] = float("nan") if constant else float(np.corrcoef(share, given)[0, 1])
    return found


def _verdict(found: Report) -> str:
    """The measurements in one line, with their numbers."""
    first = max(found.scores, key=found.scores.__getitem__)
    last = min(found.scores, key=found.scores.__getitem__)
    gap = float(np.mean(found.imbalance))
    cosines = f"cosine {found.scores[first]:.2f} against {found.scores[last]:.2f} of {last}"
    if gap > found.beta and found.scores[first] - found.scores[last] > found.beta:
        parts = [f"{first} is favored: {cosines}"]
    elif gap > found.beta:
        parts = [
            f"the heads favor different modalities: imbalance {gap:.2f}, but {first} {cosines}"
        ]
    else:
        parts = [
            f"no modality is favored: imbalance {gap:.2f} does not exceed beta = {found.beta:g}"
        ]
    if first in found.shares:
        ratio = found.shares[first] / max(found.uniform_shares[first], 1e-12)
        parts.append(
            f"{first} gets {found.shares[first]:.2f} of the attention, {ratio:.1f} times what "
            "uniform attention would give"
        )
    if first in found.noise_shares:
        parts.append(
            f"replacing {first} by noise leaves its share at {found.noise_shares[first]:.2f}"
        )
    if first in found.quality_correlation:
        parts.append(
            f"its share follows its quality with r = {found.quality_correlation[first]:.2f}"
        )
    due, heads = int(np.sum(found.imbalance > found.beta)), len(found.imbalance)
    parts.append(f"{due} of {heads} heads would roll at beta = {found.beta:g}")
    return "; ".join(parts)
