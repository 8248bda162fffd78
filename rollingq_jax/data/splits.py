"""Splits that keep the proportions of the classes, and groups whole where there are any."""

import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

_ORDERS = 5  # in which groups are gone through
_MANY = 2000  # groups, of which one order is enough
_PASSES = 10
_SINGLES = 100  # groups that are tried alone where the choices of several will not do
_SIZE_MATTERS = 4.0  # how much more the number of examples weighs than the classes' shares


def stratified_split(
    labels: np.ndarray, fractions: Sequence[float], *, seed: int
) -> list[np.ndarray]:
    """Divides examples into parts, each with its share of every class.

    Args:
      labels: [N] integers.
      fractions: of each part; they sum to 1.
      seed: of the choice.

    Returns:
      For each part its examples' numbers, in ascending order, int64; together they are 0 .. N - 1
      without repetition. In a class of n examples each part has its fraction of n to within 1.
    """
    rng = np.random.default_rng(seed)
    bounds = np.cumsum(fractions)[:-1]
    parts: list[list[np.ndarray]] = [[] for _ in fractions]
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        for part, chosen in zip(
            parts, np.split(members, np.rint(bounds * len(members)).astype(int)), strict=True
        ):
            part.append(chosen)
    return [np.sort(np.concatenate(chosen)).astype(np.int64) for chosen in parts]


def hold_out_groups(
    labels: np.ndarray, groups: np.ndarray, fraction: float, *, seed: int, further: bool = False
) -> np.ndarray:
    """Chooses whole groups whose examples come near a fraction of all, and of every class.

    Groups are taken up, or put back, one by one wherever that brings the share of all examples and
    the shares of the classes nearer to the fraction; of several orders in which they are gone
    through, the one that ends nearest counts. No class is taken whole, so every label that is held
    out occurs in the rest, too.

    Args:
      labels: [N] integers.
      groups: [N] integers or strings.
      fraction: of the examples, between 0 and 1.
      seed: of the orders.
      further: whether the rest must be such that groups can be held out of it once more.

    Returns:
      The examples' numbers in ascending order, int64; at least one group's, or none where each
      group has a class to itself (or, with `further`, where the rest would be like that).
    """
    rng = np.random.default_rng(seed)
    choice = _GroupChoice(labels, groups, fraction)
    orders = [rng.permutation(choice.num_groups) for _ in range(_ORDERS)]
    orders[0] = orders[0][np.argsort(-choice.sizes[orders[0]], kind="stable")]
    if choice.num_groups > _MANY:  # any order ends near enough
        del orders[1:]
    best = sorted(map(choice.improve, orders), key=choice.distance)

    def alone() -> Iterator[list[int]]:
        single = [[group] for group in orders[0].tolist() if choice.can_spare(group)]
        yield from sorted(single, key=choice.distance)[:_SINGLES]

    for chosen in itertools.chain(filter(None, best), alone()):
        held_out = np.isin(choice.group_of, chosen)
        if not further or _can_hold_out(labels[~held_out], groups[~held_out]):
            return np.flatnonzero(held_out).astype(np.int64)
    return np.zeros(0, np.int64)


class _GroupChoice:
    """How far a choice of groups to hold out is from what is wanted, and how to get nearer."""

    def __init__(self, labels: np.ndarray, groups: np.ndarray, fraction: float) -> None:
        _, class_of = np.unique(labels, return_inverse=True)
        names, self.group_of = np.unique(groups, return_inverse=True)
        self.num_groups, self.sizes = len(names), np.bincount(self.group_of)
        totals = np.bincount(class_of)
        # Only the pairs that occur: there may be as many groups and as many classes as examples.
        pairs, counts = np.unique(self.group_of * len(totals) + class_of, return_counts=True)
        self.parts: list[list[tuple[int, int]]] = [[] for _ in names]
        for pair, count in zip(pairs.tolist(), counts.tolist(), strict=True):
            self.parts[pair // len(totals)].append((pair % len(totals), count))
        self.totals = totals.tolist()
        self.wanted = (fraction * totals).tolist()
        self.wanted_size = fraction * len(labels)
        # Squared relative errors; each class weighs as much as it has examples.
        self.weights = (1 / (fraction**2 * totals * len(labels))).tolist()
        self.size_weight = _SIZE_MATTERS / self.wanted_size**2

    def can_spare(self, group: int, held: Sequence[int] | None = None) -> bool:
        """Whether the rest keeps every class of the group, with `held` of each class taken out."""
        return all(
            self.totals[c] - (held[c] if held is not None else 0) > count
            for c, count in self.parts[group]
        )

    def distance(self, chosen: Iterable[int]) -> float:
        """From the fraction of all examples and of each class; 0 where both are met exactly."""
        held = [0] * len(self.totals)
        for group in chosen:
            for c, count in self.parts[group]:
                held[c] += count
        errors = zip(held, self.wanted, self.weights, strict=True)
        classes = sum((has - wanted) ** 2 * weight for has, wanted, weight in errors)
        return classes + self.size_weight * (sum(held) - self.wanted_size) ** 2

    def improve(self, order: np.ndarray) -> list[int]:
        """From none, takes groups up or puts them back while that lessens the distance."""
        chosen, held, size = set[int](), [0] * len(self.totals), 0
        for _ in range(_PASSES):
            changed = False
            for group in order.tolist():
                sign = -1 if group in chosen else 1
                change, gain = sign * int(self.sizes[group]), 0.0
                for c, count in self.parts[group]:
                    step = sign * count
                    gain += step * (2 * (held[c] - self.wanted[c]) + step) * self.weights[c]
                gain += self.size_weight * change * (2 * (size - self.wanted_size) + change)
                if gain < -1e-12 and (sign < 0 or self.can_spare(group, held)):
                    chosen ^= {group}
                    for c, count in self.parts[group]:
                        held[c] += sign * count
                    size, changed = size + change, True
            if not changed:
                break
        return sorted(chosen)


def _can_hold_out(labels: np.ndarray, groups: np.ndarray) -> bool:
    """Whether some group can be spared without losing a class."""
    choice = _GroupChoice(labels, groups, 0.5)
    return any(map(choice.can_spare, range(choice.num_groups)))
