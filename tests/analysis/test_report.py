"""The report is one safe file, and a real browser shows it."""

import base64
import html.parser
import io
import shutil
import subprocess

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict
from PIL import Image

from rollingq_jax.analysis import metrics, plots, report
from tests.analysis import analysis_examples as examples

HOSTILE = '<script>alert("x")</script><img src=x onerror=alert(1)>\'"&'
SPACE = "\N{NO-BREAK SPACE}"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


class Page(html.parser.HTMLParser):
    """Tags with their attributes, and the text, as a browser would read them."""

    def __init__(self, source):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def make_report(path, name="audio", **kwargs):
    rows = examples.run_rows()
    options = {
        "title": f"A run on {name}",
        "verdicts": [f"Is {name} told? Yes.", name],
        "lead": f"{name}: {report.describe_accuracy(rows)}",
        "key_numbers": {"test accuracy": 0.611, "rotations": 2, name: None},
        "figures": [
            report.ReportFigure("Dynamics", plots.dynamics_figure(rows), f"alt {name}", "how"),
            report.ReportFigure(name, plots.png_bytes(plots.accuracy_figure(rows)), "alt", name),
        ],
        "tables": [
            report.Table(name, ("class", name), [(name, 0.5), ("b", float("nan"))], name),
            report.Table("Rotations", ("epoch", "angle"), [(6, 55.04), (12, -3)]),
        ],
        "data": f"{name}\nsecond line",
        "config": {"data": {"name": name, "options": {}}, "seed": 0},
        "versions": {"jax": "0.10", name: name},
    }
    return report.write_report(path, **{**options, **kwargs})


def test_the_file_stands_alone(tmp_path):
    path = make_report(tmp_path / "new" / "report.html")
    page = Page(path.read_text())
    assert not page.open, "every tag is closed"
    for part in ("A run on audio", "test accuracy0.611", "how", "second line", "data.name", "0.10"):
        assert part in page.text
    images = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(images) == 2
    for attributes in images:
        assert attributes["alt"].startswith("alt")
        prefix, data = attributes["src"].split(",", 1)
        assert prefix == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            image.verify()
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "a", "object", "base")
        assert not attributes.keys() & {"href", "srcset", "action", "style"}
    assert "url(" not in path.read_text() and "@import" not in path.read_text()
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_what_it_shows_is_escaped_everywhere(tmp_path):
    page = Page(make_report(tmp_path / "report.html", HOSTILE).read_text())
    plain = Page(make_report(tmp_path / "plain.html", "audio").read_text())
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in plain.tags]
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
    # Once for each place where the name stands, title and headings included.
    assert page.text.count(HOSTILE) == plain.text.count("audio") - page.text.count("audio")
    assert page.text.count(HOSTILE) >= 12
    assert f"alt {HOSTILE}" in {a.get("alt") for _, a in page.tags}


def test_a_policy_forbids_scripts_and_requests(tmp_path):
    page = Page(make_report(tmp_path / "report.html").read_text())
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_escaping_survives_any_text(text):
    escaped = report.escape(text)
    escaped.encode("utf-8")
    page = Page(f'<p title="{escaped}">{escaped}</p>')
    assert [tag for tag, _ in page.tags] == ["p"]
    kept = "".join(c for c in text if c.isprintable() or c in "\n\xa0")
    assert page.text.replace("\N{REPLACEMENT CHARACTER}", "") == kept.replace("\ufffd", "")
    assert page.tags[0][1]["title"] == page.text


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "–"), (float("nan"), "–"), ("", "–"), ([], "–"), ({}, "–"), (True, "yes"),
        (0.61123, "0.611"), (0.5, "0.500"), (-0.25, "−0.250"), (134.08, "134.1"), (1e-5, "1e−05"),
        (0.0, "0"), (123456, "123,456"), (-2024, "−2024"), (np.float32(0.25), "0.250"),
        ((8, 8), "8, 8"), ("text", "text"), (2.5e7, "2.5e+07"),
    ],
)  # fmt: skip
def test_measured_values_as_text(value, text):
    assert report.shown(value) == text


@pytest.mark.parametrize(
    "value, text", [(0.0125, "0.0125"), (1e-4, "0.0001"), (65536, "65536"), (False, "no")]
)
def test_settings_are_shown_exactly(value, text):
    assert report.exact(value) == text


def test_nested_configuration_is_shown_flat():
    config = ConfigDict({"a": {"b": 1, "c": {"d": (1, 2)}}, "e": {}, "f": None})
    flat = report.flatten(config)
    assert flat.pop("e") == ConfigDict()
    assert flat == {"a.b": 1, "a.c.d": (1, 2), "f": None}


def test_columns_of_numbers_are_flush_right(tmp_path):
    path = make_report(tmp_path / "report.html")
    heads = [a for tag, a in Page(path.read_text()).tags if tag == "th"]
    assert [a.get("class") for a in heads] == [None, "number", "number", "number"]


def test_a_report_without_anything_but_a_title(tmp_path):
    path = report.write_report(tmp_path / "report.html", title="Nothing yet")
    assert Page(path.read_text()).text.count("Nothing yet") == 2


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_report(tmp_path, dark):
    path = make_report(tmp_path / "report.html", HOSTILE)
    profile, shot = tmp_path / "profile", tmp_path / "shot.png"
    profile.mkdir()
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={profile}", "--window-size=1000,3000", "--hide-scrollbars",
        f"--blink-settings=preferredColorScheme={0 if dark else 1}", f"--screenshot={shot}",
        path.as_uri(),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=120, capture_output=True)
    with Image.open(shot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    assert pixels.shape == (3000, 1000, 3)
    ground = pixels[5, 5].mean()
    assert ground < 40 if dark else ground > 250
    # Both pictures are there: their lines in the palette's blue and vermilion.
    for color in (style_color(0), style_color(1)):
        where = np.flatnonzero((np.abs(pixels - color).max(axis=-1) < 12).any(axis=1))
        assert np.ptp(where) > 600


def style_color(index):
    text = plots.style.color(index).lstrip("#")
    return np.array([int(text[i : i + 2], 16) for i in (0, 2, 4)])


def row(step, split="valid", **fields):
    return {"step": step, "split": split, **fields}


def test_accuracy_in_words():
    rows = [
        row(10, accuracy=0.2, **{"probe_accuracy/audio": 0.1}),
        row(20, accuracy=0.5, **{"probe_accuracy/audio": 0.3}),
        row(30, accuracy=0.4, **{"probe_accuracy/audio": 0.25}),
        row(30, "test", accuracy=0.45),
    ]
    assert report.describe_accuracy(rows) == (
        f"The best validation accuracy is 50.0{SPACE}%, at epoch 2. The test accuracy is "
        f"45.0{SPACE}%. The probe on audio alone ends at 25.0{SPACE}%."
    )
    assert report.describe_accuracy([]) == "No epoch has been evaluated."


def test_dynamics_in_words():
    rows = [
        row(10, imbalance=0.1, **{"attention_share/audio": 0.5}),
        row(20, imbalance=0.6, **{"attention_share/audio": 0.7}),
        row(20, "roll", imbalance_before=0.6, imbalance_after=0.05, angle_degrees=57.3),
        row(30, imbalance=0.2, **{"attention_share/audio": 0.55}),
        row(30, "roll", imbalance_before=0.3, imbalance_after=0.05, angle_degrees=20.0),
    ]
    text = report.describe_dynamics(rows)
    assert "The attention share of audio goes from 0.50 to 0.55." in text
    assert "from 0.10 to 0.20, with a peak of 0.60 at epoch 2" in text
    assert "rotated twice, after epochs 2 and 3. The first rotation, by 57°" in text
    assert report.describe_dynamics([]) == "The query was not rotated."
    assert "once, after epoch 2." in report.describe_rolls(rows[:3])


def test_noise_in_words():
    points = [
        {"modality": "audio", "level": 0.0, "accuracy": 0.6, "attention_share": {"audio": 0.7}},
        {"modality": "audio", "level": 2.0, "accuracy": 0.3, "attention_share": {"audio": 0.68}},
    ]
    assert report.describe_noise(points[::-1]) == (
        f"With noise from 0 to 2 in audio, accuracy goes from 60.0 to 30.0{SPACE}% and the "
        "attention share of audio from 0.70 to 0.68."
    )


def test_rotations_used_up_and_many_rotations_in_words():
    rows = [row(10, imbalance=0.1, epoch=1)]
    rows += [row(10 + i, "roll", angle_degrees=20.0) for i in range(20)]
    rows += [row(10 * i, imbalance=0.3 + i / 10, epoch=i, rotations_used_up=True) for i in (2, 3)]
    text = report.describe_rolls(rows)
    assert "rotated 20 times, from epoch 1 to 2.9." in text
    assert "By the end of epoch 2 no rotations were left, and the imbalance, 0.50, stood" in text
    assert "no rotations" not in report.describe_rolls(rows[:-2])


def test_a_confusion_matrix_counts_true_by_predicted():
    probabilities = np.eye(3)[[0, 0, 2, 1]].astype(float)
    probabilities[3] = np.nan
    found = metrics.Predictions(probabilities, np.array([0, 1, 2, 1]), {}, {})
    table = report.confusion_table(found, ["a", "b", "c"])
    assert table.columns == ("true class", "a", "b", "c", "no answer")
    assert table.rows == [("a", 1, 0, 0, 0), ("b", 1, 0, 0, 1), ("c", 0, 0, 1, 0)]
    assert report.confusion_table(found, list("abcdefghijklm")) is None


def answers(share, correct):
    """Predictions of two classes with the audio's share and who is right given, an example each."""
    share, correct = np.asarray(share), np.asarray(correct)
    probabilities = np.eye(2)[np.where(correct, 0, 1)]
    shares = {"audio": share, "visual": 1 - share}
    return metrics.Predictions(probabilities, np.zeros(len(share), int), shares, {})


def run_of(last, rolls=2, used_up=False):
    """Rows of a run whose imbalance was 0.4 before the first roll and ends at `last`."""
    rows = [row(8, "roll", imbalance_before=0.4, imbalance_after=0.1, angle_degrees=9.0)] * rolls
    rows += [row(10, imbalance=0.3), row(20, imbalance=last, rotations_used_up=used_up)]
    return [*rows, row(20, "test")]


ROLLING = ConfigDict({"enabled": True, "beta": 0.05, "max_rotations": 2})


@pytest.mark.parametrize(
    "last, used_up, answer", [(0.05, False, "Yes"), (0.2, False, "In part"), (0.4, True, "No")]
)
def test_a_run_opens_with_its_verdicts(last, used_up, answer):
    """Intervals of Student's t over four examples: 3.182 sd / 2 on either side."""
    plain = answers([0.6, 0.7, 0.6, 0.7], [1, 0, 0, 1])
    found = answers([0.5, 0.6, 0.5, 0.4], [1, 1, 1, 1])
    rows = run_of(last, used_up=used_up)
    lines = report.run_verdicts(found, rows, ROLLING, rotations=2, plain=plain)
    assert lines[0] == (
        "Is attention biased? Yes: without rotations audio gets 0.650 [0.558, 0.742] of the "
        "attention in the best checkpoint; even is 0.500."
    )
    assert lines[1] == (
        f"Did the rolls last? {answer}: the imbalance was 0.400 before the first of 2 rolls and "
        f"ends at {last:.3f}, with beta 0.05; after 2 audio gets 0.500 [0.370, 0.630] of the "
        "attention."
    )
    assert lines[-1] == (
        "Did accuracy follow? Not shown: +50.0 [-41.9, +141.9] points, from 50.0 % without "
        "rotations to 100.0 [100.0, 100.0] %, with this seed."
    )
    told = [line for line in lines if "config.rolling.max_rotations is 2; None" in line]
    assert len(told) == used_up


def test_a_run_says_why_there_is_nothing_to_judge():
    found = answers([0.5, 0.6, 0.5, 0.4], [1, 0, 1, 1])
    none = run_of(0.03, rolls=0)
    for changed, why in (
        ({}, "imbalance stayed within config.rolling.beta, 0.05"),
        ({"enabled": False}, "config.rolling.enabled is False"),
        ({"max_rotations": 0}, "config.rolling.max_rotations is 0"),
    ):
        rolling = ConfigDict({**ROLLING, **changed})
        lines = report.run_verdicts(found, none, rolling)
        assert lines[0].startswith("Is attention biased? Not shown: audio gets 0.500 [")
        assert lines[1] == f"Did the rolls last? There were none: {why}."
        assert lines[2].startswith(
            "Did accuracy follow? One run does not tell: on the test data it is 75.0 ["
        )
    static = found._replace(attention_share={})
    (line,) = report.run_verdicts(static, none[1:], ROLLING)
    assert line.startswith("Is attention biased? There is none between modalities: the test")
