"""Figures show the numbers, every label can be read, and pyplot stays out of it."""

import functools
import io
import re
import subprocess
import sys

import matplotlib.text
import numpy as np
import pytest
from PIL import Image

from rollingq_jax.analysis import plots
from rollingq_jax.analysis.plots import style
from rollingq_jax.analysis.report import describe_key_gap
from rollingq_jax.data.sources.media_folder import byte_tokens, text_pieces
from tests.analysis import analysis_examples as examples

HOSTILE = "<b>$\\frac{$ & _x\x07"


def arms(count=3, seeds=3):
    names = ["attention", "rollingq", "rollingq, once", "concat", "mbt + rollingq"]
    names += [f"arm {i}" for i in range(count)]
    return {
        name: [examples.run_rows(s, rolls=(i + 2,), epochs=10) for s in range(seeds)]
        for i, name in enumerate(names[:count])
    }


def polar(**kwargs):
    query, keys = examples.cloud()
    after = sum(k.mean(0) / np.linalg.norm(k.mean(0)) for k in keys.values())
    return plots.polar_figure(keys, query, keys, after, **kwargs)


def without_attention(rows):
    return [
        {k: v for k, v in row.items() if not k.startswith(("attention", "imbalance"))}
        for row in rows
        if row["split"] != "roll"
    ]


def text_examples(names=("audio", "text")):
    """Texts of bytes beside spectrograms: every second modality is a text."""
    rng = np.random.default_rng(0)
    said = "Naïve, she said: the soup was cold and the bread (rye) was not. " * 6
    views = []
    for i, name in enumerate(names):
        if i % 2:
            ids = byte_tokens(said.encode(), 300)
            weights = rng.gamma(0.5, size=301)
            views.append(plots.ModalityView(name, "tokens", ids, weights, None, text_pieces(ids)))
        else:
            sound, weights = rng.normal(size=(32, 32, 1)), rng.gamma(2.0, size=17)
            views.append(plots.ModalityView(name, "spectrogram", sound, weights, (8, 8)))
    return [plots.AttentionExample("true dog\npredicted cat", tuple(views))] * 2


def wide_examples():
    rng = np.random.default_rng(0)
    views = (
        plots.ModalityView("audio", "sequence", rng.normal(size=(30, 12)), rng.uniform(size=31)),
        plots.ModalityView("text", "tokens", rng.integers(0, 99, 20), rng.uniform(size=21)),
        plots.ModalityView("v", "vector", rng.normal(size=20), rng.uniform(size=2)),
        plots.ModalityView(
            "video", "video", rng.uniform(size=(2, 32, 32, 3)), rng.uniform(size=9), (1, 16, 16)
        ),
    )
    return [plots.AttentionExample("true dog\npredicted cat", views)] * 2


def network_examples():
    """A spectrogram and a video that ResNets have read."""
    rng = np.random.default_rng(0)
    shapes = {"audio": (64, 96, 1), "video": (2, 64, 96, 3)}
    views = [
        plots.ModalityView(name, "resnet18", rng.uniform(size=shape), rng.uniform(size=count))
        for (name, shape), count in zip(shapes.items(), (7, 13), strict=True)
    ]
    return [plots.AttentionExample("true dog\npredicted cat", tuple(views))] * 2


three = ("audio", "text", "visual")
six = ("audio", "depth", "imu", "text", "thermal", "visual")
long = ("audio_of_the_front_microphone", "text_transcribed_by_a_machine", "visual_of_the_rear")


def run_of(names):
    rows = examples.run_rows(modalities=names)
    probes = {f"probe_accuracy/{m}": 0.3 + 0.02 * i for i, m in enumerate(names)}
    plain = [{k: v for k, v in row.items() if not k.startswith("probe")} for row in rows]
    return [row | probes if row["split"] != "roll" else row for row in plain]


def keys_of(names):
    query, keys = examples.cloud()
    clouds = {m: keys["audio" if i % 2 else "visual"] for i, m in enumerate(names)}
    return plots.polar_figure(clouds, query, clouds, keys["audio"].mean(0))


def noise_of(names):
    even = {m: 1 / len(names) for m in names}
    points = [
        {"modality": m, "level": level, "accuracy": 0.6, "attention_share": even}
        for m in names
        for level in (0.0, 1.0, 4.0)
    ]
    return plots.noise_figure({"attention": [points], "rollingq": [points]})


OF_NAMES = {
    "dynamics": lambda names: plots.dynamics_figure(run_of(names), plain=run_of(names)),
    "accuracy": lambda names: plots.accuracy_figure(run_of(names), chance=0.1, majority=0.2),
    "polar": keys_of,
    "noise": noise_of,
    "attention": lambda names: plots.attention_figure(text_examples(names)),
}


def gap_rows():
    """A run whose keys part by half a spread an epoch."""
    rows = examples.run_rows()
    return [row | {"key_gap": row["epoch"] / 2} if row["split"] == "valid" else row for row in rows]


FIGURES = {
    "dynamics": lambda: plots.dynamics_figure(examples.run_rows(), beta=0.3),
    "dynamics beside a twin": lambda: plots.dynamics_figure(
        examples.run_rows(), plain=examples.run_rows()
    ),
    "dynamics of three": lambda: plots.dynamics_figure(examples.run_rows(modalities=three)),
    "dynamics, ten rolls": lambda: plots.dynamics_figure(
        examples.run_rows(rolls=range(2, 22, 2), heads=4)
    ),
    "dynamics of concat": lambda: plots.dynamics_figure(without_attention(examples.run_rows())),
    "gap of the keys": lambda: plots.key_gap_figure(gap_rows(), plain=gap_rows()),
    "gap of nothing": lambda: plots.key_gap_figure([]),
    "dynamics of nothing": lambda: plots.dynamics_figure([]),
    "accuracy": lambda: plots.accuracy_figure(examples.run_rows(), chance=0.1),
    "accuracy, two guesses": lambda: plots.accuracy_figure(
        examples.run_rows(), chance=0.1, majority=0.3
    ),
    "accuracy of nothing": lambda: plots.accuracy_figure([]),
    "accuracy, one epoch": lambda: plots.accuracy_figure(examples.run_rows(epochs=1, rolls=())),
    "polar": polar,
    "share against quality": lambda: plots.share_quality_figure(
        {"": examples.shares_and_qualities()}
    ),
    "share against quality, arms": lambda: plots.share_quality_figure(
        {f"arm {i}": examples.shares_and_qualities(i) for i in range(4)}, modality="visual"
    ),
    "noise": lambda: plots.noise_figure({"": [examples.noise_points()]}),
    "noise, arms": lambda: plots.noise_figure(
        {n: [examples.noise_points(s) for s in range(3)] for n in ("attention", "rollingq")}
    ),
    "scales of the query": lambda: plots.attention_scale_figure(examples.scale_points()),
    "arms": lambda: plots.arms_figure(arms()),
    "many arms": lambda: plots.arms_figure(arms(11, 1)),
    "attention": lambda: plots.attention_figure(examples.looking_examples()),
    "attention, other kinds": lambda: plots.attention_figure(wide_examples()),
    "attention, text": lambda: plots.attention_figure(text_examples()),
    "attention of networks": lambda: plots.attention_figure(network_examples()),
} | {
    f"{kind} of {count}": functools.partial(draw, names)
    for kind, draw in OF_NAMES.items()
    for count, names in (("six", six), ("long names", long))
}


def drawn_texts(figure, monkeypatch):
    """Text and extent of every label that drawing the figure puts on the canvas."""
    drawn = []
    original = matplotlib.text.Text.draw

    def record(self, renderer, *args, **kwargs):
        if self.get_visible() and self.get_text().strip():
            drawn.append(self)
        return original(self, renderer, *args, **kwargs)

    monkeypatch.setattr(matplotlib.text.Text, "draw", record)
    figure.canvas.draw()
    return {id(text): (text.get_text(), text.get_window_extent()) for text in drawn}.values()


@pytest.mark.parametrize("name", FIGURES)
def test_labels_can_be_read_and_files_are_small(name, monkeypatch):
    figure = FIGURES[name]()
    width, height = figure.canvas.get_width_height()
    texts = list(drawn_texts(figure, monkeypatch))
    assert texts
    for text, box in texts:
        inside = box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
        assert inside, f"{text!r} is cut: {box} of {width} x {height}"
    for i, (first, box) in enumerate(texts):
        for second, other in texts[i + 1 :]:
            overlap = box.intersection(box, other)
            shared = 0 if overlap is None else overlap.width * overlap.height
            smaller = min(b.width * b.height for b in (box, other))
            assert shared < 0.04 * smaller, f"{first!r} and {second!r} overlap"
    png = plots.png_bytes(figure)
    assert len(png) < 150_000
    with Image.open(io.BytesIO(png)) as image:
        assert 700 < image.width < 1700 and image.height > 250


def test_the_same_content_gives_the_same_file():
    make = FIGURES["attention, other kinds"]
    assert plots.png_bytes(make()) == plots.png_bytes(make())


def test_a_long_text_ends_in_how_many_words_are_left_out(monkeypatch):
    texts = [text for text, _ in drawn_texts(FIGURES["attention, text"](), monkeypatch)]
    counts = [int(found[1]) for text in texts if (found := re.fullmatch(r"and (\d+) more", text))]
    (example, _) = text_examples()
    total = len("".join(example.views[1].pieces).split())
    numbers = [text for text in texts if re.fullmatch(r"\d+\.\d", text)]
    words = [text for text in texts if text in "".join(example.views[1].pieces).split()]
    assert len(counts) == 2 and len(words) + sum(counts) == 2 * total
    assert len(numbers) >= len(words)  # a number for each word, as well as those of the bar


def test_dynamics_shows_the_rows():
    rows = examples.run_rows(rolls=(6, 12))
    top, bottom = plots.dynamics_figure(rows).axes
    lines = {line.get_label(): line for line in top.lines}
    valid = [row for row in rows if row["split"] == "valid"]
    np.testing.assert_allclose(
        lines["audio"].get_ydata(), [row["attention_share/audio"] for row in valid]
    )
    np.testing.assert_allclose(lines["audio"].get_xdata(), np.arange(1, 25))
    imbalance = {line.get_label(): line for line in bottom.lines}["imbalance"]
    np.testing.assert_allclose(imbalance.get_ydata(), [row["imbalance"] for row in valid])
    for axes in (top, bottom):
        vertical = [v.get_xdata()[0] for v in axes.lines if v.get_color() == style.TURN]
        assert vertical == [6.0, 12.0]


def test_the_gap_of_the_keys_shows_the_rows():
    (axes,) = plots.key_gap_figure(gap_rows()).axes
    lines = {line.get_label(): line for line in axes.lines}
    np.testing.assert_allclose(lines["gap of the keys"].get_ydata(), np.arange(1, 25) / 2)
    assert [v.get_xdata()[0] for v in axes.lines if v.get_color() == style.TURN] == [6.0, 12.0]
    assert describe_key_gap(gap_rows()) == "The gap of the keys goes from 0.50 to 12.00."


def reference_lines(axes):
    """Heights of the lines that cross the whole panel."""
    return sorted(float(x.get_ydata()[0]) for x in axes.lines if list(x.get_xdata()) == [0, 1])


def test_the_even_share_is_that_of_uniform_attention():
    three, even = ("image", "spectrum", "text"), (64 / 142, 72 / 142, 6 / 142)
    rows = examples.run_rows(modalities=three, epochs=2)
    np.testing.assert_allclose(reference_lines(plots.dynamics_figure(rows).axes[0]), [1 / 3])
    uniform = {f"uniform_share/{m}": e for m, e in zip(three, even, strict=True)}
    rows = [row | uniform if row["split"] == "valid" else row for row in rows]
    top = plots.dynamics_figure(rows).axes[0]
    np.testing.assert_allclose(reference_lines(top), sorted(even), atol=1e-3)
    assert {f"even, {m}" for m in three} <= {text.get_text() for text in top.texts}
    share, quality = examples.shares_and_qualities()
    lean = {"audio": 0.7, "visual": 0.3}
    (panel,) = plots.share_quality_figure({"": (share, quality)}, even=lean).axes
    np.testing.assert_allclose(reference_lines(panel), [0.7])
    noise = plots.noise_figure({"": [examples.noise_points()]}, even=lean)
    np.testing.assert_allclose([reference_lines(axes) for axes in noise.axes[2:]], [[0.7], [0.3]])


def test_guesses_are_lines_and_share_a_name_where_they_are_near():
    rows = examples.run_rows()
    (apart,) = plots.accuracy_figure(rows, chance=0.1, majority=0.4).axes
    np.testing.assert_allclose(reference_lines(apart), [10, 10, 40, 40])
    assert apart.get_ylim()[0] < 10 < apart.get_ylim()[1]
    assert {"chance", "majority\nclass"} <= {text.get_text() for text in apart.texts}
    (near,) = plots.accuracy_figure(rows, chance=0.1, majority=0.11).axes
    assert sorted(set(reference_lines(near))) == [10, 11]
    assert "chance,\nmajority\nclass" in {text.get_text() for text in near.texts}


def test_arms_leave_no_empty_panel():
    figure = plots.arms_figure({"a": [examples.run_rows(modalities=six)]})
    assert sum(axes.get_visible() for axes in figure.axes) == 1 + len(six)


def test_accuracy_shows_validation_and_test_values():
    rows = examples.run_rows()
    (axes,) = plots.accuracy_figure(rows).axes
    lines = {line.get_label(): line for line in axes.lines}
    valid = [100 * row["accuracy"] for row in rows if row["split"] == "valid"]
    np.testing.assert_allclose(lines["whole model"].get_ydata(), valid)
    texts = {text.get_text() for text in axes.texts}
    assert f"{100 * rows[-1]['accuracy']:.1f} %" in texts
    assert f"{100 * rows[-1]['probe_accuracy/visual']:.1f} %" in texts


def test_arms_show_mean_and_spread_over_seeds():
    runs = [examples.run_rows(s, epochs=6) for s in range(4)]
    axes = plots.arms_figure({"rollingq": runs}).axes[0]
    values = np.array(
        [[row["imbalance"] for row in rows if row["split"] == "valid"] for rows in runs]
    )
    np.testing.assert_allclose(axes.lines[0].get_ydata(), values.mean(0))
    band = axes.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx((values.mean(0) + values.std(0, ddof=1)).max())


def test_arms_without_attention_are_left_out():
    runs = {"attention": [examples.run_rows()], "concat": [without_attention(examples.run_rows())]}
    figure = plots.arms_figure(runs)
    assert [len(axes.lines) for axes in figure.axes] == [1, 1]
    assert [text.get_text() for text in figure.legends[0].texts] == ["attention"]


def test_scatter_gives_the_correlations():
    share, quality = examples.shares_and_qualities()
    figure = plots.share_quality_figure({"run": (share, quality)})
    r = np.corrcoef(share["audio"], quality["audio"] - quality["visual"])[0, 1]
    assert f"Pearson r = {r:+.2f}" in figure.axes[0].get_title(loc="left")


def test_noise_lines_are_means_of_runs():
    runs = [examples.noise_points(s) for s in range(3)]
    figure = plots.noise_figure({"rollingq": runs})
    accuracy = np.mean(
        [[p["accuracy"] for p in run if p["modality"] == "audio"] for run in runs], axis=0
    )
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), 100 * accuracy)
    share = np.mean(
        [[p["attention_share"]["visual"] for p in r if p["modality"] == "visual"] for r in runs],
        axis=0,
    )
    np.testing.assert_allclose(figure.axes[3].lines[0].get_ydata(), share)


def test_noise_without_attention_has_no_share():
    points = [p | {"attention_share": {}} for p in examples.noise_points()]
    assert len(plots.noise_figure({"concat": [points]}).axes) == 2


def test_noise_of_arms_with_and_without_attention():
    concat = [
        {k: v for k, v in p.items() if k != "attention_share"} for p in examples.noise_points()
    ]
    figure = plots.noise_figure({"attention": [examples.noise_points()], "concat": [concat]})
    assert [text.get_text() for text in figure.legends[0].texts] == ["attention", "concat"]
    assert plots.png_bytes(figure)


def test_arms_whose_names_begin_alike_are_all_in_the_legend():
    names = [f"a very long name of an arm, number {i}" for i in range(3)]
    figure = plots.arms_figure({name: [examples.run_rows(epochs=3)] for name in names})
    assert len(figure.legends[0].texts) == 3


def test_hostile_names_are_shown_as_they_are():
    rows = [{k.replace("audio", HOSTILE): v for k, v in row.items()} for row in examples.run_rows()]
    figure = plots.dynamics_figure(rows)
    assert plots.png_bytes(figure)
    assert any("<b>" in text.get_text() for text in figure.legends[0].texts)
    assert plots.png_bytes(plots.arms_figure({HOSTILE: [rows], "数字": [rows]}))


def test_plain_text_keeps_dollars_and_shows_leading_underscores():
    assert style.plain("a$b$") == r"a\$b\$"
    assert style.plain("_hidden") == " _hidden"
    assert style.plain("two\nlines\x00") == "two\nlines\N{REPLACEMENT CHARACTER}"


def test_curves_differ_in_more_than_color():
    styles = [style.line_style(i) for i in range(12)]
    assert len({(s["color"], str(s["linestyle"]), s["marker"]) for s in styles}) == 12
    # For print in grey: neighbours differ in dashes and marker too.
    for first, second in zip(styles[:5], styles[1:6], strict=True):
        assert first["linestyle"] != second["linestyle"] and first["marker"] != second["marker"]


def test_saving_makes_the_folder(tmp_path):
    plots.save_png(polar(), tmp_path / "figures" / "polar.png")
    with Image.open(tmp_path / "figures" / "polar.png") as image:
        image.verify()


def test_pyplot_is_never_imported():
    code = (
        "import sys; from rollingq_jax.analysis import plots;"
        "plots.png_bytes(plots.accuracy_figure([]));"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
