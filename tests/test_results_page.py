"""The results page is made from `results.json`, and from nothing else."""

import json

import pytest

from docs import results


def line(mean, **difference):
    interval = {"mean_low": mean - 0.005, "mean_high": mean + 0.005}
    return {"mean": mean, "sd": 0.01, "runs": 5} | interval | difference


@pytest.fixture
def result():
    gain = dict(difference=0.02, low=0.01, high=0.03, pairs=5, wins=4, losses=1)
    tried = [
        {"setting": {"optimizer.learning_rate": rate}, "validation_accuracy": [a, a + 0.01]}
        for rate, a in ((0.1, 0.5), (0.2, 0.6))
    ]
    table = {"test_accuracy": {"attention": line(0.61), "rollingq": line(0.63, **gain)}}
    return {
        "conclusion": "What was found.",
        "search": "4 settings were tried.",
        "reference": "attention",
        "second_reference": None,
        "second_table": None,
        "table": table,
        "selection": {"attention": {"chosen": 1, "tried": tried}},
        "runs": [
            {"arm": a, "seed": s, "test_accuracy": t, "attention_share/audio": 0.5}
            for a, t in (("attention", 0.61), ("rollingq", 0.63))
            for s in range(5)
        ],
        "seeds": [0, 1, 2, 3, 4],
        "device": "1 x cpu",
        "versions": {"platform": "somewhere", "jax": "9.9"},
    }


def test_numbers_stand_as_they_were_measured(result):
    text = results.measured(result)
    difference = "+2.0 points [+1.0, +3.0], 4 won and 1 lost: a gain"
    assert f"| rollingq | 63.0 % [62.5 %, 63.5 %] | 1.0 % | {difference} |" in text
    assert "somewhere" not in text
    assert "4 settings were tried." in text
    assert "| attention | **optimizer.learning_rate 0.2** | 60.0 %, 61.0 % |" in text
    assert "| attention | optimizer.learning_rate 0.1 | 50.0 %, 51.0 % |" in text
    assert "Seeds 0 to 4; 1 x cpu; jax 9.9." in text


def test_only_what_stands_between_the_marks_changes():
    page = f"before\n{results.BEGIN}\nold\n{results.END}\nafter"
    new = results.replace_measured(page, "new")
    assert new == f"before\n{results.BEGIN}\n\nnew\n\n{results.END}\nafter"
    assert results.replace_measured(new, "new") == new
    with pytest.raises(ValueError, match="lacks"):
        results.replace_measured("no marks", "new")


def test_the_page_has_the_marks_and_the_pictures():
    page = results.PAGE.read_text()
    assert results.replace_measured(page, "") != page
    for name in results.FIGURES:
        assert f"images/results_{name}.png" in page
        assert (results.IMAGES / f"results_{name}.png").stat().st_size <= results.LARGEST


def test_a_picture_that_is_too_large_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "IMAGES", tmp_path / "images")
    monkeypatch.setattr(results, "LARGEST", 3)
    for name in results.FIGURES:
        (tmp_path / f"{name}.png").write_bytes(json.dumps(name).encode())
    with pytest.raises(ValueError, match="allowed: 3"):
        results.copy_figures(tmp_path)


def probed(accuracies, shares):
    """A run's probes: accuracy at tau 0 and 1; audio's share, clean, at both levels, replaced."""
    clean, noisy, noisier, audio, visual = shares
    levels = zip((0.0, *results.LEVELS), (clean, noisy, noisier), strict=True)
    return {
        "attention_scale": [
            {"scale": scale, "accuracy": a} for scale, a in zip((0.0, 1.0), accuracies, strict=True)
        ],
        "noise": [
            {"modality": "audio", "level": level, "attention_share": {"audio": share}}
            for level, share in levels
        ],
        "reliance": {
            m: {"replaced": {"attention_share": {"audio": share}}}
            for m, share in (("audio", audio), ("visual", visual))
        },
    }


def test_probes_are_means_over_runs_and_pairs_of_the_same_run():
    runs = [
        probed((0.5, 0.4), (0.6, 0.5, 0.4, 0.3, 0.7)),
        probed((0.7, 0.75), (0.8, 0.7, 0.6, 0.5, 0.9)),
    ]
    table = results.query_table({"attention": runs})
    assert "| attention | 60.0 % | 57.5 % | +2.5 points [" in table
    assert "1 won and 1 lost" in table
    shares = results.share_table({"attention": runs})
    assert "| attention | 0.700 | 0.600 | 0.500 | 0.400 | 0.800 |" in shares
