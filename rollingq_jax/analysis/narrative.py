"""Figures in words: what a curve did, for the report's text and for readers who cannot see it."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rollingq_jax.analysis import curves
from rollingq_jax.analysis.curves import Row
from rollingq_jax.analysis.plots.geometry import PlaneView

HOW_TO_READ = {
    "dynamics": (
        "Above, the part of the class token's attention that goes to the tokens of each modality; "
        "below, the largest minus the smallest cosine score. The score of a modality is the mean "
        "cosine between the class query and its mean keys, so a large imbalance says that the "
        "query leans to one modality whatever the sample shows. A rotation turns the query to the "
        "rebalance anchor; if the cycle is at work, the share drifts away again afterwards."
    ),
    "accuracy": (
        "The probes are linear classifiers on each modality's own class token, trained beside the "
        "model without a gradient to it: what each encoder knows by itself. The checkpoint is "
        "chosen on validation data; the test set is read once, at the end."
    ),
    "polar": (
        "Each point is the mean key of a sample, as a unit vector, projected on the plane of the "
        "class query and the difference between the modalities' mean keys. The query points up, "
        "so a point's height is its cosine to the query. The anchor is where the query goes: "
        "between the mean keys, nearer to the modality that was neglected the larger rho is."
    ),
    "share_quality": (
        "Quality is minus the standard deviation of the noise that a sample's modality got, in "
        "standard deviations of the training set. Where attention follows the sample, the share "
        "of a modality rises with its quality; a flat cloud says that attention looks at the "
        "modality and not at the sample. The line is the mean of each tenth of the samples."
    ),
    "noise": (
        "Gaussian noise is added to one modality of every sample while the other stays as it is. "
        "A fusion that cooperates looks away from the noised modality and loses little; one in "
        "the cycle keeps attending to it."
    ),
    "attention_scale": (
        "The trained class query times a factor, everything else as it is: at 0 every token has "
        "the same weight, 1 is the model as it was trained. Where 0 is above 1, what the query "
        "prefers whatever the sample shows does harm; where it is below, the look at the sample "
        "helps."
    ),
    "attention": (
        "The weight that the class token gives each token, drawn over the place it was cut from "
        "(1 is the weight of even attention over all tokens of all modalities). The modality's "
        "own class token has no place and counts in the share alone."
    ),
    "arms": (
        "Each line is the mean over seeds on validation data, each band one standard deviation. "
        "Arms without attention have neither imbalance nor share."
    ),
}


LISTED = 12  # rotations whose epochs are told one by one


def describe_dynamics(rows: Sequence[Row], plain: Sequence[Row] = ()) -> str:
    """Beginning and end of each share and of the imbalance, and when the query was rotated.

    Args:
      rows: of metrics.jsonl.
      plain: those of the same run without rotations, where there is one.
    """
    parts = [_describe_curves(plain, "Without rotations, the")] if plain else []
    parts += [_describe_curves(rows, "With them, the" if plain else "The")]
    return " ".join(filter(None, [*parts, describe_rolls(rows)]))


def _describe_curves(rows: Sequence[Row], first: str) -> str:
    """A sentence a curve; the first begins with `first`."""
    parts: list[str] = []
    for name in curves.modalities(rows, "attention_share"):
        curve = curves.curve(rows, "valid", f"attention_share/{name}")
        if len(curve.y):
            ends = f"from {curve.y[0]:.2f} to {curve.y[-1]:.2f}"
            parts.append(f"attention share of {name} goes {ends}")
    imbalance = curves.curve(rows, "valid", "imbalance")
    if len(imbalance.y):
        top = int(np.argmax(imbalance.y))
        parts.append(
            f"imbalance goes from {imbalance.y[0]:.2f} to {imbalance.y[-1]:.2f}, "
            f"with a peak of {imbalance.y[top]:.2f} at epoch {imbalance.x[top]:.0f}"
        )
    words = (first, *["The"] * len(parts))
    return " ".join(f"{word} {part}." for word, part in zip(words, parts, strict=False))


def describe_rolls(rows: Sequence[Row]) -> str:
    """How often, when and how far the query was rotated."""
    rolls = curves.rolls(rows)
    if not rolls:
        return "The query was not rotated."
    first = rolls[0]
    times = [f"{roll.epoch:.3g}" for roll in rolls]
    if len(times) > LISTED:
        text = f"The query was rotated {len(times)} times, from epoch {times[0]} to {times[-1]}."
    elif len(times) == 1:
        text = f"The query was rotated once, after epoch {times[0]}."
    else:
        count = {2: "twice"}.get(len(times), f"{len(times)} times")
        text = (
            f"The query was rotated {count}, after epochs {', '.join(times[:-1])} and {times[-1]}."
        )
    if np.isfinite(first.angle_degrees):
        angle, ends = first.angle_degrees, (first.imbalance_before, first.imbalance_after)
        if np.isfinite(ends).all():
            text += (
                f" The first rotation, by {angle:.0f}°, took the imbalance from {ends[0]:.2f} to "
                f"{ends[1]:.2f}."
            )
        else:
            text += f" The first rotation was by {angle:.0f}°."
    used_up = curves.used_up(rows)
    if used_up is not None:
        text += (
            f" By the end of epoch {used_up['epoch']} no rotations were left, and the imbalance, "
            f"{used_up['imbalance']:.2f}, stood above beta."
        )
    return text


def describe_accuracy(rows: Sequence[Row]) -> str:
    """Best validation accuracy, test accuracy, and the probes' last validation values."""
    parts = []
    valid = curves.curve(rows, "valid", "accuracy")
    if len(valid.y):
        best = int(np.argmax(valid.y))
        parts.append(
            f"The best validation accuracy is {100 * valid.y[best]:.1f}\N{NO-BREAK SPACE}%, "
            f"at epoch {valid.x[best]:.0f}."
        )
    test = curves.curve(rows, "test", "accuracy")
    if len(test.y):
        parts.append(f"The test accuracy is {100 * test.y[-1]:.1f}\N{NO-BREAK SPACE}%.")
    for name in curves.modalities(rows, "probe_accuracy"):
        probe = curves.curve(rows, "valid", f"probe_accuracy/{name}")
        if len(probe.y):
            parts.append(
                f"The probe on {name} alone ends at {100 * probe.y[-1]:.1f}\N{NO-BREAK SPACE}%."
            )
    return " ".join(parts) or "No epoch has been evaluated."


def describe_views(before: PlaneView, after: PlaneView) -> str:
    """The cosine scores before and after a rotation."""
    changes = ", ".join(
        f"{name} from {before.cosines[name]:.2f} to {after.cosines[name]:.2f}"
        for name in sorted(before.cosines)
    )
    return f"Cosine scores before and after the rotation: {changes}."


def describe_noise(points: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy and share of the noised modality at the lowest and the highest level of noise."""
    parts = []
    for name in sorted({point["modality"] for point in points}):
        ordered = sorted((p for p in points if p["modality"] == name), key=lambda p: p["level"])
        low, high = ordered[0], ordered[-1]
        text = (
            f"With noise from {low['level']:g} to {high['level']:g} in {name}, accuracy goes from "
            f"{100 * low['accuracy']:.1f} to {100 * high['accuracy']:.1f}\N{NO-BREAK SPACE}%"
        )
        shares = [point.get("attention_share", {}).get(name) for point in (low, high)]
        if all(curves.is_number(share) for share in shares):
            text += f" and the attention share of {name} from {shares[0]:.2f} to {shares[1]:.2f}"
        parts.append(text + ".")
    return " ".join(parts)


def describe_attention_scale(points: Sequence[Mapping[str, Any]]) -> str:
    """Accuracy at each factor of the query."""
    values = [f"{100 * p['accuracy']:.1f} at {p['scale']:g}" for p in points]
    return f"Accuracy in % with the trained query times a factor: {', '.join(values)}."
