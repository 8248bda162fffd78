"""Out-of-distribution detection: does a trained model know data that are unlike its own?

Every score is higher where the model takes an example for one of its own kind; `auroc` and
`fpr_at` say how well a score tells the two apart.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from scipy import special, stats

from rollingq_jax.analysis.metrics import model_input
from rollingq_jax.data.dataset import Source
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.errors import DataError

Array = np.ndarray


def max_softmax(logits: Array) -> Array:
    """The largest class probability, `[N, C] -> [N]` (Hendrycks and Gimpel, 2017)."""
    return special.softmax(np.asarray(logits, np.float64), axis=-1).max(axis=-1)


def negative_energy(logits: Array) -> Array:
    """log sum_c exp(z_c), `[N, C] -> [N]`: minus the energy at temperature 1 (Liu et al., 2020)."""
    return special.logsumexp(np.asarray(logits, np.float64), axis=-1)


class Gaussians(NamedTuple):
    """A Gaussian for each class, with one covariance (Lee et al., 2018).

    Attributes:
      means: [C, d], of the classes that have examples.
      precision: [d, d], the pseudo-inverse of the covariance around the classes' means.
    """

    means: Array
    precision: Array


def fit_gaussians(features: Array, labels: Array) -> Gaussians:
    """From training features `[N, d]` and labels `[N]`; the covariance is divided by N."""
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    classes, places = np.unique(labels, return_inverse=True)
    means = np.stack([features[labels == c].mean(axis=0) for c in classes])
    centered = features - means[places]
    return Gaussians(means, np.linalg.pinv(centered.T @ centered / len(features), hermitian=True))


def mahalanobis(features: Array, fitted: Gaussians) -> Array:
    """-min_c (x - mu_c)^T P (x - mu_c), `[N, d] -> [N]`."""
    gaps = np.asarray(features, np.float64)[:, None] - fitted.means  # [N, C, d]
    return -np.einsum("ncd,de,nce->nc", gaps, fitted.precision, gaps).min(axis=1)


def auroc(inside: Array, outside: Array) -> float:
    """The probability that a score of `inside` exceeds one of `outside`; ties count one half."""
    ranks = stats.rankdata(np.concatenate([inside, outside]))[: len(inside)]
    wins = ranks.sum() - len(inside) * (len(inside) + 1) / 2
    return float(wins / (len(inside) * len(outside)))


def fpr_at(inside: Array, outside: Array, rate: float = 0.95) -> float:
    """Share of `outside` that passes the highest threshold that `rate` of `inside` passes."""
    kept = int(np.ceil(rate * len(inside)))
    threshold = np.sort(inside)[len(inside) - kept]
    return float(np.mean(np.asarray(outside) >= threshold))


def outputs(
    model: Any,
    variables: Any,
    rotation: Any,
    source: Source,
    *,
    batch_size: int,
    transforms: Sequence[Any] = (),
) -> tuple[Array, Array, Array]:
    """Logits `[N, C]`, features `[N, d]` and labels `[N]` of a source, without padding.

    The features are what the fusion's linear head reads; of a fusion with a head for each modality,
    what all of them read, one after the other.

    Args:
      model: from `build_model`.
      variables: `{"params": ...}`, and what else it reads.
      rotation: of the class queries, or None.
      source: its examples.
      batch_size: of the pass.
      transforms: of the data set, for evaluation.

    Raises:
      DataError: there is no example.
    """

    @jax.jit
    def apply(batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
        read: dict[tuple[str, ...], jax.Array] = {}  # a head may call itself through its base class

        def note(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
            path = context.module.path
            if len(path) == 2 and path[0] == "fusion" and path[1].startswith("head") and args:
                read.setdefault(path, args[0])
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            logits, _ = model.apply(variables, batch, rotation=rotation)
        return logits, jnp.concatenate(list(read.values()), axis=-1)

    parts: list[tuple[Array, ...]] = []
    for batch in eval_batches(source, batch_size=batch_size, transforms=transforms):
        real = np.asarray(batch["example_mask"], bool)
        logits, features = apply(model_input(batch))
        rows = (logits, features, batch["label"])
        parts.append(tuple(np.asarray(values)[real] for values in rows))
    if not parts:
        raise DataError("the data hold no example; allowed: at least one")
    logits, features, labels = (np.concatenate(values) for values in zip(*parts, strict=True))
    return logits, features, labels


def compare_scores(
    train: tuple[Array, Array, Array],
    inside: tuple[Array, Array, Array],
    outside: tuple[Array, Array, Array],
) -> dict[str, dict[str, float]]:
    """{score: {"auroc", "fpr95"}} of three results of `outputs`.

    An example whose logits are not finite counts as the most foreign of all.
    """
    fitted = fit_gaussians(train[1], train[2])

    def scored(found: tuple[Array, Array, Array]) -> dict[str, Array]:
        logits, features, _ = found
        finite = np.isfinite(logits).all(axis=-1) & np.isfinite(features).all(axis=-1)
        logits, features = (np.where(finite[:, None], x, 0.0) for x in (logits, features))
        scores = {
            "max_softmax": max_softmax(logits),
            "energy": negative_energy(logits),
            "mahalanobis": mahalanobis(features, fitted),
        }
        return {name: np.where(finite, score, -np.inf) for name, score in scores.items()}

    ours, theirs = scored(inside), scored(outside)
    return {
        name: {"auroc": auroc(ours[name], theirs[name]), "fpr95": fpr_at(ours[name], theirs[name])}
        for name in ours
    }
