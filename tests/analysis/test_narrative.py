import analysis_examples as examples

from rollingq_jax.analysis import narrative
from rollingq_jax.analysis.plots import geometry

SPACE = "\N{NO-BREAK SPACE}"


def row(step, split="valid", **fields):
    return {"step": step, "split": split, **fields}


def test_accuracy_in_words():
    rows = [
        row(10, accuracy=0.2, **{"probe_accuracy/audio": 0.1}),
        row(20, accuracy=0.5, **{"probe_accuracy/audio": 0.3}),
        row(30, accuracy=0.4, **{"probe_accuracy/audio": 0.25}),
        row(30, "test", accuracy=0.45),
    ]
    assert narrative.describe_accuracy(rows) == (
        f"The best validation accuracy is 50.0{SPACE}%, at epoch 2. The test accuracy is "
        f"45.0{SPACE}%. The probe on audio alone ends at 25.0{SPACE}%."
    )
    assert narrative.describe_accuracy([]) == "No epoch has been evaluated."


def test_dynamics_in_words():
    rows = [
        row(10, imbalance=0.1, **{"attention_share/audio": 0.5}),
        row(20, imbalance=0.6, **{"attention_share/audio": 0.7}),
        row(20, "roll", imbalance_before=0.6, imbalance_after=0.05, angle_degrees=57.3),
        row(30, imbalance=0.2, **{"attention_share/audio": 0.55}),
        row(30, "roll", imbalance_before=0.3, imbalance_after=0.05, angle_degrees=20.0),
    ]
    text = narrative.describe_dynamics(rows)
    assert "The attention share of audio goes from 0.50 to 0.55." in text
    assert "from 0.10 to 0.20, with a peak of 0.60 at epoch 2" in text
    assert "rotated twice, after epochs 2 and 3. The first rotation, by 57°" in text
    assert narrative.describe_dynamics([]) == "The query was not rotated."
    assert "once, after epoch 2." in narrative.describe_rolls(rows[:3])


def test_scores_around_a_rotation_in_words():
    query, keys = examples.cloud()
    before = geometry.project(keys, query)
    text = narrative.describe_views(before, before)
    score = f"{before.cosines['audio']:.2f}"
    assert f"audio from {score} to {score}" in text


def test_noise_in_words():
    points = [
        {"modality": "audio", "level": 0.0, "accuracy": 0.6, "attention_share": {"audio": 0.7}},
        {"modality": "audio", "level": 2.0, "accuracy": 0.3, "attention_share": {"audio": 0.68}},
    ]
    assert narrative.describe_noise(points[::-1]) == (
        f"With noise from 0 to 2 in audio, accuracy goes from 60.0 to 30.0{SPACE}% and the "
        "attention share of audio from 0.70 to 0.68."
    )


def test_rotations_used_up_and_many_rotations_in_words():
    rows = [row(10, imbalance=0.1, epoch=1)]
    rows += [row(10 + i, "roll", angle_degrees=20.0) for i in range(20)]
    rows += [row(10 * i, imbalance=0.3 + i / 10, epoch=i, rotations_used_up=True) for i in (2, 3)]
    text = narrative.describe_rolls(rows)
    assert "rotated 20 times, from epoch 1 to 2.9." in text
    assert "By the end of epoch 2 no rotations were left, and the imbalance, 0.50, stood" in text
    assert "no rotations" not in narrative.describe_rolls(rows[:-2])
