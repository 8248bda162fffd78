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
        "runs": [],
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
