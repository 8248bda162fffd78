"""The report of a run in one HTML file, its figures in words, and an evaluation shown.

`report.html` beside this file is the page: no script, no network, light and dark, fit for print.
Everything that comes from outside (class names, paths, configuration, metrics) is escaped, and a
content security policy in the page itself forbids scripts and any request besides.
"""

import base64
import html
import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from rollingq_jax.analysis import metrics, plots
from rollingq_jax.analysis.metrics import Predictions, counted, mean_over_examples, written
from rollingq_jax.analysis.plots import AttentionExample, ModalityView
from rollingq_jax.analysis.plots import training as curves
from rollingq_jax.analysis.plots.attention import num_tokens, split_attention
from rollingq_jax.analysis.plots.style import is_number, png_bytes, printable, signed
from rollingq_jax.analysis.plots.training import Row
from rollingq_jax.analysis.probes import Probe
from rollingq_jax.analysis.tasks import HEADLINES, MAIN, METRICS, SINGLE, Metric, Task, task_name
from rollingq_jax.data.corruption import has_modality
from rollingq_jax.data.dataset import REGRESSION, Dataset, Subset, label_text
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.sources.media_folder import BYTE_VOCABULARY, text_pieces
from rollingq_jax.files import write_whole

Array = np.ndarray
SMALL = 0.01  # of the attention: that much more than even is no bias, however sure
MOST_CLASSES = 12  # of a confusion matrix that a page can hold


# The page.


class ReportFigure(NamedTuple):
    """A picture with what it shows, what it says in words, and how to read it.

    Attributes:
      title: heading above it.
      figure: a matplotlib figure, or a PNG's bytes.
      alt: what a reader who cannot see it should know.
      text: a sentence or two below it.
    """

    title: str
    figure: Figure | bytes
    alt: str
    text: str = ""

    def png(self) -> bytes:
        """The picture as a PNG."""
        return self.figure if isinstance(self.figure, bytes) else png_bytes(self.figure)


class Table(NamedTuple):
    """A table with a heading; cells are numbers or text, None and NaN show as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""


OOD_SCORES = ("max_softmax", "energy", "mahalanobis")  # of `analysis.ood`


def save_figures(
    folder: epath.Path, figures: Iterable[tuple[str, ReportFigure]]
) -> list[ReportFigure]:
    """Writes `<name>.png` of each; returns them with their PNGs, so that each is drawn once."""
    drawn = []
    for name, figure in figures:
        drawn.append(figure._replace(figure=figure.png()))
        plots.save_png(drawn[-1].figure, folder / f"{name}.png")
    return drawn


def write_report(
    path: str | Path | epath.Path,
    *,
    title: str,
    verdicts: Sequence[str] = (),
    lead: str = "",
    key_numbers: Mapping[str, Any] | None = None,
    figures: Sequence[ReportFigure] = (),
    tables: Sequence[Table] = (),
    data: str = "",
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, Any] | None = None,
) -> epath.Path:
    """Writes the report and returns its path; an existing one is replaced whole.

    Args:
      path: of the HTML file, local or gs://; its folder is made if there is none.
      title: of the page.
      verdicts: what was found, a sentence each; the page opens with them.
      lead: what happened, in a few sentences.
      key_numbers: name -> value, shown large at the top.
      figures: in the order they are shown.
      tables: after the figures.
      data: what the data are, after the tables.
      config: nested configuration (a mapping or ConfigDict), shown flat.
      versions: package -> version, device and the like.
    """
    path = epath.Path(path)
    parts = {
        "title": escape(title),
        "verdicts": _verdicts(verdicts),
        "lead": f'<p class="lead">{escape(lead)}</p>' if lead else "",
        "numbers": _pairs("numbers", key_numbers or {}, shown),
        "figures": "\n".join(map(_figure, figures)),
        "tables": "\n".join(map(_table, tables)),
        "data": _section("Data", f'<p class="small">{escape(data)}</p>' if data else ""),
        "config": _section("Configuration", _pairs("pairs", flatten(config or {}), exact), True),
        "versions": _section("Produced by", _pairs("pairs", versions or {}, exact), True),
    }
    template = resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    page = string.Template(template).substitute(parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, page)
    return path


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; an empty mapping stays, as {}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if hasattr(value, "items") and len(value):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def shown(value: Any) -> str:
    """A measured value as text: three decimals (one from 100 on), a dash for None, NaN and ""."""
    if isinstance(value, (float, np.floating)) and not math.isnan(value):
        value = float(value)
        size = abs(value)
        if size < 1e-3 or size >= 1e6:
            text = f"{value:.3g}"
        else:
            text = f"{value:.3f}" if size < 100 else f"{value:.1f}"
        return text.replace("-", "−")
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        value = int(value)
        return (f"{value:,}" if abs(value) >= 10_000 else str(value)).replace("-", "−")
    return exact(value)


def exact(value: Any) -> str:
    """A setting as text, digits as they are; a dash for None, NaN and what is empty."""
    if value is None or (isinstance(value, (float, np.floating)) and math.isnan(value)):
        return "–"
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (list, tuple)):
        return ", ".join(exact(item) for item in value) or "–"
    if hasattr(value, "items") and not len(value):
        return "–"
    return str(value) or "–"


def escape(value: Any) -> str:
    """Text for HTML content or a quoted attribute; control characters become a replacement."""
    return html.escape(printable(value, "\n\N{NO-BREAK SPACE}"), quote=True)


def _verdicts(verdicts: Sequence[str]) -> str:
    """A list in which a question, or a sentence without one, stands out before the answer."""
    lines = [
        f"<li><strong>{escape(asked + mark)}</strong>{escape(answer)}</li>"
        for asked, mark, answer in (verdict.partition("? ") for verdict in verdicts)
    ]
    return f'<ul class="lead">{"".join(lines)}</ul>' if lines else ""


def _section(heading: str, content: str, collapsed: bool = False) -> str:
    if not content:
        return ""
    title = f"<h2>{escape(heading)}</h2>"
    if collapsed:
        return f"<section><details><summary>{title}</summary>{content}</details></section>"
    return f"<section>{title}{content}</section>"


def _pairs(style: str, pairs: Mapping[str, Any], form: Callable[[Any], str]) -> str:
    rows = (f"<div><dt>{escape(n)}</dt><dd>{escape(form(v))}</dd></div>" for n, v in pairs.items())
    return f'<dl class="{style}">' + "\n".join(rows) + "</dl>" if pairs else ""


def _figure(figure: ReportFigure) -> str:
    data = base64.b64encode(figure.png()).decode("ascii")
    image = f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt)}">'
    text = f"<figcaption>{escape(figure.text)}</figcaption>" if figure.text else ""
    return _section(figure.title, f"<figure>{image}{text}</figure>")


def _table(table: Table) -> str:
    sides = [
        ' class="number"' if all(_like_number(row[i]) for row in table.rows) else ""
        for i in range(len(table.columns))
    ]
    names = zip(table.columns, sides, strict=True)
    head = "".join(f'<th scope="col"{side}>{escape(name)}</th>' for name, side in names)
    lines = [
        "".join(f"<td{s}>{escape(shown(cell))}</td>" for cell, s in zip(row, sides, strict=True))
        for row in table.rows
    ]
    text = f"<p>{escape(table.text)}</p>" if table.text else ""
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return _section(
        table.title,
        f'{text}<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>",
    )


def _like_number(cell: Any) -> bool:
    """Whether a cell belongs into a column that is set flush right."""
    text = shown(cell)
    return text == "–" or text.lstrip("+−")[:1].isdigit()


# Figures in words: for the report's text, and for readers who cannot see them.

HOW_TO_READ = {
    "dynamics": (
        "Above, the part of the class token's attention that goes to the tokens of each modality; "
        "below, the largest minus the smallest cosine score. The score of a modality is the mean "
        "cosine between the class query and its mean keys, so a large imbalance says that the "
        "query leans to one modality whatever the sample shows. A rotation turns the query to the "
        "rebalance anchor; if the cycle is at work, the share drifts away again afterwards. The "
        "even share is a modality's part of the tokens, which uniform attention would give it."
    ),
    "keys": (
        "The distance between the modalities' mean keys, in standard deviations of a sample's mean "
        "key from its modality's. The wider the gap, the more the query's direction decides by "
        "modality how attention falls, and the less by sample."
    ),
    "accuracy": (
        "The probes are linear classifiers on each modality's own class token, trained beside the "
        "model without a gradient to it: what each encoder knows by itself. The checkpoint is "
        "chosen on validation data; the test set is read once, at the end."
    ),
    "values": (
        "Each point is an example: its own value below, the predicted one at the side. On the line "
        "both are equal; points above it are predicted too high. A flat cloud says that the model "
        "predicts about the same for all."
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
        "The weight that the class token gives each token, drawn over the place it was cut from, "
        "or as the color of a word, with the mean over its tokens below (1 is the weight of even "
        "attention over all tokens of all modalities). The modality's "
        "own class token has no place and counts in the share alone."
    ),
    "arms": (
        "Each line is the mean over seeds on validation data, each band one standard deviation. "
        "Arms without attention have neither imbalance nor share."
    ),
}
LISTED = 12  # rotations whose epochs are told one by one


def describe_dynamics(rows: Sequence[Row], plain: Sequence[Row] = ()) -> str:
    """Beginning and end of each share and of the imbalance, and when a query was rotated.

    Args:
      rows: of metrics.jsonl.
      plain: those of the same run without rotations, where there is one.
    """
    parts = [_describe_curves(plain, "Without rotations, the")] if plain else []
    parts += [_describe_curves(rows, "With them, the" if plain else "The")]
    shares = curves.modalities(rows, "attention_share")
    if not shares or any("imbalance" in row for row in rows):  # else they are of votes
        parts.append(describe_rolls(rows))
    return " ".join(filter(None, parts))


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


def describe_key_gap(rows: Sequence[Row], plain: Sequence[Row] = ()) -> str:
    """Beginning and end of the gap of the keys, of `plain` too, the run without rotations."""
    parts = []
    for words, some in (("", rows), (" without rotations", plain)):
        gap = curves.curve(some, "valid", "key_gap").y
        if len(gap):
            parts.append(f"The gap of the keys{words} goes from {gap[0]:.2f} to {gap[-1]:.2f}.")
    return " ".join(parts)


def describe_rolls(rows: Sequence[Row]) -> str:
    """How often, when and how far the query was rotated."""
    rolls = curves.rolls(rows)
    if not rolls:
        return "The query was not rotated."
    first = rolls[0]
    times = [f"{roll.epoch:.3g}" for roll in rolls]
    count = {1: "once", 2: "twice"}.get(len(times), f"{len(times)} times")
    if len(times) > LISTED:
        when = f"from epoch {times[0]} to {times[-1]}"
    elif len(times) == 1:
        when = f"after epoch {times[0]}"
    else:
        when = f"after epochs {', '.join(times[:-1])} and {times[-1]}"
    text = f"The query was rotated {count}, {when}."
    angle, ends = first.angle_degrees, (first.imbalance_before, first.imbalance_after)
    if np.isfinite((angle, *ends)).all():
        took = f"took the imbalance from {ends[0]:.2f} to {ends[1]:.2f}"
        text += f" The first rotation, by {angle:.0f}°, {took}."
    elif np.isfinite(angle):
        text += f" The first rotation was by {angle:.0f}°."
    used_up = curves.used_up(rows)
    if used_up is not None:
        text += (
            f" By the end of epoch {used_up['epoch']} no rotations were left, and the imbalance, "
            f"{used_up['imbalance']:.2f}, stood above beta."
        )
    return text


def run_verdicts(
    found: Predictions,
    rows: Sequence[Row],
    rolling: Any,
    *,
    rotations: int = 0,
    plain: Predictions | None = None,
    task: Task = SINGLE,
) -> list[str]:
    """Is attention biased, did the rolls last, did accuracy follow? A sentence each, of one run.

    Attention is biased where a modality's share lies above that of uniform attention with its
    whole 95 % interval, over the test examples, and by `SMALL` or more. The rolls lasted where the
    imbalance ends at beta or below, and in part where it ends below that before the first roll.

    Args:
      found: the answers on the test split.
      rows: of metrics.jsonl.
      rolling: `config.rolling`.
      rotations: of the parameters that gave the answers.
      plain: the answers of the same run without rotations, where there is one.
      task: whose score of single examples stands in place of the accuracy.
    """
    # Of single examples, not the main metric of the split: an interval needs a value of each.
    metric = METRICS[task.step_metric]
    form, unit = (".1f", " %") if metric.percent else (".3f", "")
    accuracy = mean_over_examples(task.by_example(found)).written(form, metric.scale) + unit
    favored = _favored(plain or found)  # what rotations leave of a bias says nothing of it
    if favored is None:
        return [
            "Is attention biased? There is none between modalities: the test "
            f"{metric.words} is {accuracy}."
        ]
    modality, excess, even = favored
    share = mean_over_examples((plain or found).shares()[modality]).written()
    done = f"after {counted(rotations, 'rotation')} "
    when = "without rotations " if plain else done if rotations else ""
    biased = "Yes" if excess.mean >= SMALL else "Hardly"
    verdicts = [
        f"Is attention biased? {biased if excess.low > 0 else 'Not shown'}: {when}{modality} gets "
        f"{share} of the attention in the best checkpoint; even is {even:.3f}."
    ]
    imbalance, rolls = curves.curve(rows, "valid", "imbalance").y, curves.rolls(rows)
    if not rolls:
        why = f"imbalance stayed within config.rolling.beta, {rolling.beta:g}"
        if not rolling.enabled:
            why = "config.rolling.enabled is False"
        elif rolling.max_rotations == 0:
            why = "config.rolling.max_rotations is 0"
        verdicts.append(f"Did the rolls last? There were none: {why}.")
    else:
        # By the imbalance and not by the share: it is what a roll is decided by, and the share
        # has the look at the sample in it.
        first, last = rolls[0].imbalance_before, imbalance[-1] if len(imbalance) else math.nan
        answer = "Yes" if last <= rolling.beta else "In part" if last < first else "No"
        answer = answer if math.isfinite(first + last) else "Not known"
        count = sum(roll.heads for roll in rolls)
        which = f"the first of {count} rolls" if count > 1 else "the only roll"
        share = mean_over_examples(found.shares()[modality]).written()
        verdicts.append(
            f"Did the rolls last? {answer}: the imbalance was {written(first)} before {which} and "
            f"ends at {written(last)}, with beta {rolling.beta:g}; after {rotations} {modality} "
            f"gets {share} of the attention."
        )
        if any(row.get("rotations_used_up") for row in rows if row["step"] == rows[-1]["step"]):
            verdicts.append(
                f"No rotations are left, and the imbalance stands above beta: "
                f"config.rolling.max_rotations is {rolling.max_rotations}; None sets no limit."
            )
    if plain:
        before = task.by_example(plain)  # of the same examples: the interval is of pairs
        gain = mean_over_examples(task.by_example(found) - before)
        low, high = (gain.low, gain.high) if metric.higher_is_better else (-gain.high, -gain.low)
        answer = "Yes" if low > 0 else "No" if high < 0 else "Not shown"
        points = gain.written("+" + form, metric.scale) + (" points" if metric.percent else "")
        verdicts.append(
            f"Did {metric.words} follow? {answer}: {points}, from "
            f"{metric.scale * metrics.mean_finite(before):{form}}{unit} without rotations to "
            f"{accuracy}, with this seed."
        )
    else:
        verdicts.append(
            f"Did {metric.words} follow? One run does not tell: on the test data it is {accuracy}; "
            "compare sets it beside plain attention."
        )
    return verdicts


def _favored(found: Predictions) -> tuple[str, metrics.Interval, float] | None:
    """The modality furthest above its share under uniform attention: its name, by how much, that
    share. None where there is no attention between modalities."""
    shares, uniform = found.shares(), found.uniform_shares()
    even = {m: uniform.get(m, np.full(len(s), 1 / len(shares))) for m, s in shares.items()}
    excess = {m: mean_over_examples(shares[m] - even[m]) for m in shares}
    known = [m for m, found in excess.items() if found.size]
    if len(known) < 2:
        return None
    modality = max(known, key=lambda m: excess[m].mean)
    return modality, excess[modality], metrics.mean_finite(even[modality])


def describe_accuracy(rows: Sequence[Row], score: str = "accuracy") -> str:
    """Best validation accuracy, test accuracy, and the probes' last validation values; or another
    score, a key of `tasks.METRICS`."""
    parts, metric = [], METRICS[score]
    valid = curves.curve(rows, "valid", score)
    if len(valid.y):
        best = int(np.argmax(valid.y) if metric.higher_is_better else np.argmin(valid.y))
        parts.append(
            f"The best validation {metric.words} is {metric.written(valid.y[best])}, at epoch "
            f"{valid.x[best]:.0f}."
        )
    test = curves.curve(rows, "test", score)
    if len(test.y):
        parts.append(f"The test {metric.words} is {metric.written(test.y[-1])}.")
    for name in curves.modalities(rows, f"probe_{score}"):
        probe = curves.curve(rows, "valid", f"probe_{score}/{name}")
        if len(probe.y):
            parts.append(f"The probe on {name} alone ends at {metric.written(probe.y[-1])}.")
    return " ".join(parts) or "No epoch has been evaluated."


def describe_noise(points: Sequence[Mapping[str, Any]], score: str = "accuracy") -> str:
    """Accuracy and share of the noised modality at the lowest and the highest level of noise."""
    parts, metric = [], METRICS[score]
    for name in sorted({point["modality"] for point in points}):
        ordered = sorted((p for p in points if p["modality"] == name), key=lambda p: p["level"])
        low, high = ordered[0], ordered[-1]
        text = (
            f"With noise from {low['level']:g} to {high['level']:g} in {name}, {metric.words} goes "
            f"from {_without_unit(metric, low[score])} to {metric.written(high[score])}"
        )
        shares = [point.get("attention_share", {}).get(name) for point in (low, high)]
        if all(is_number(share) for share in shares):
            text += f" and the attention share of {name} from {shares[0]:.2f} to {shares[1]:.2f}"
        parts.append(text + ".")
    return " ".join(parts)


def describe_attention_scale(points: Sequence[Mapping[str, Any]], score: str = "accuracy") -> str:
    """Accuracy at each factor of the query."""
    metric = METRICS[score]
    values = [f"{_without_unit(metric, p[score])} at {p['scale']:g}" for p in points]
    unit = " in %" if metric.percent else ""
    return f"{metric.title}{unit} with the trained query times a factor: {', '.join(values)}."


def _without_unit(metric: Metric, value: float) -> str:
    return metric.written(value).removesuffix("\N{NO-BREAK SPACE}%")


# Chosen examples with the attention over them, for `plots.attention_figure`.


def choose_examples(predictions: Predictions, count: int = 4) -> Array:
    """Numbers of examples that differ as much as possible in which modality is the better one.

    From the lowest to the highest quality contrast of the first modality, in even steps, of the
    examples that have it and another; where the quality is not known, in even steps through the
    data. No example twice.
    """
    order = np.arange(len(predictions.label))
    if len(predictions.quality) > 1:
        contrasts = metrics.quality_contrast(predictions.quality)
        contrast = contrasts[sorted(contrasts)[0]]
        known = int(np.isfinite(contrast).sum())
        order = np.argsort(contrast, kind="stable")[: known or None]  # NaN comes last
    return order[np.linspace(0, len(order) - 1, min(count, len(order))).round().astype(int)]


def attention_examples(
    model: Any,
    variables: Any,
    rotation: Any,
    dataset: Dataset,
    split: str,
    indices: Sequence[int] | Array,
    *,
    seed: int = 0,
    task: Task = SINGLE,
) -> list[AttentionExample]:
    """The chosen examples as the model sees them, with its attention, mean over heads.

    Args:
      model: from `build_model`, with attention fusion; its `spec` says how inputs are patched.
      variables, rotation: as in training.
      dataset, split, indices: which examples; captions have the class names and the noise.
      seed: of the data set's random transformations.
      task: what the model has learned.
    """
    chosen, transforms = Subset(dataset.splits[split], indices), dataset.eval_transforms
    batch = next(eval_batches(chosen, batch_size=len(indices), seed=seed, transforms=transforms))
    probabilities, out = jax.jit(
        lambda batch: metrics.forward(
            model, variables, rotation, batch, answer=task.answer, return_attention=True
        )
    )(metrics.model_input(batch))
    attention = np.array(out["attention"], np.float64)
    attention[..., 0] = 0.0  # of the fusion's class token to itself, which is in no share
    # Each head's weights over the modalities' tokens sum to 1, as in the attention share; to 0 in
    # an example without any modality, or without finite weights.
    attention = np.where(np.isfinite(attention), attention, 0.0)
    total = attention.sum(axis=-1, keepdims=True)
    attention = (attention / np.where(total > 0, total, 1.0)).mean(axis=1)
    names = dataset.class_names or tuple(map(str, range(dataset.num_classes)))
    names += tuple(map(str, range(len(names), probabilities.shape[1])))
    found = [task.answer_text(names, answer) for answer in np.asarray(probabilities)]
    encoders = sorted(model.spec.encoders, key=lambda encoder: encoder.name)
    lengths = {e.name: num_tokens(e.kind, batch[e.name].shape[1:], e.patch) for e in encoders}
    weights = split_attention(attention, lengths)
    examples = []
    for row in range(len(indices)):
        example = {name: value[row] for name, value in batch.items()}
        true = label_text(example["label"], task.name, names, ".3g")
        lines = [f"true {true}", f"predicted {found[row] or 'none'}", *_noise_lines(example)]
        views = []
        for e in encoders:
            pieces = _pieces(dataset, e.name, example[e.name])
            seen = example[e.name], weights[e.name][row]
            views.append(ModalityView(e.name, e.kind, *seen, e.patch, pieces))
        examples.append(AttentionExample("\n".join(lines), tuple(views)))
    return examples


def _pieces(dataset: Dataset, name: str, ids: Array) -> tuple[str, ...]:
    """The text that each token adds; empty where the modality is none, or no more than its ids."""
    info, known = dataset.modalities[name], dataset.preprocessing.get(name)
    tokenizer = ((known and known.media) or {}).get("tokenizer", "")
    text = info.kind == "tokens" and (tokenizer or info.vocab_size == BYTE_VOCABULARY)
    return text_pieces(ids, tokenizer) if text else ()


def _noise_lines(example: dict[str, Array]) -> Iterator[str]:
    for name in sorted(example):
        if name.startswith("quality_"):
            modality, noise = name.removeprefix("quality_"), -float(example[name])
            if np.isfinite(noise) and has_modality(example, modality):
                yield f"{modality} noise {max(0.0, noise):.1f}"


# An evaluation shown: pictures, a report and a table for the terminal.


def confusion_table(predictions: Predictions, names: Sequence[str]) -> Table | None:
    """Counts of true and predicted classes; None for more than `MOST_CLASSES` of them."""
    if len(names) > MOST_CLASSES:
        return None
    counts = metrics.confusion_matrix(predictions.predicted, predictions.label, len(names))
    columns = [*names, *(["no answer"] if counts.shape[1] > len(names) else [])]
    rows = [(name, *map(int, line)) for name, line in zip(names, counts, strict=True)]
    text = "A row is a true class, a column a predicted one."
    return Table("Confusion matrix", ("true class", *columns), rows, text)


def write_evaluation(
    folder: epath.Path, run: Any, probe: Probe, clean: Predictions, result: Mapping[str, Any]
) -> None:
    """Writes `figures/evaluation_*.png` and `evaluation.html`.

    Args:
      folder: the run's folder.
      run: as `rollingq_jax.train.loop.load_run` returns it.
      probe: how the split was read.
      clean: predictions without corruption.
      result: what `evaluation.json` holds.
    """
    figures = (
        (f"evaluation_{name}", ReportFigure(title, figure, alt, HOW_TO_READ[name]))
        for name, title, figure, alt in _figures(run, probe, clean, result)
    )
    task = probe.task
    confusion = confusion_table(clean, list(result["per_class"])) if task is SINGLE else None
    write_report(
        folder / "evaluation.html",
        title=f"Evaluation on {probe.split}: {run.config.data.name}, {run.config.model.fusion}",
        lead=f"{result['num_examples']} examples of split {probe.split}, with the parameters of "
        f"step {run.step}, the best by validation.",
        key_numbers=_headlines(result),
        figures=save_figures(folder / "figures", figures),
        tables=[*_tables(result), *([] if confusion is None else [confusion])],
        data=probe.dataset.description,
        config=run.config,
        versions=result["versions"] | {"device": result["device"]},
    )


def _figures(
    run: Any, probe: Probe, clean: Predictions, result: Mapping[str, Any]
) -> Iterator[tuple[str, str, Figure, str]]:
    """Name, title, figure and what it shows, of each that the evaluation has something for."""
    share, quality, score = clean.attention_share, clean.quality, probe.task.main
    even = result.get("uniform_share")
    if probe.task.name == REGRESSION:
        yield (
            "values",
            "Predicted and true values",
            plots.values_figure(clean, probe.dataset.class_names),
            "Scatter plot of predicted against true values.",
        )
    if len(share) > 1 and quality:
        yield (
            "share_quality",
            "Does attention follow quality?",
            plots.share_quality_figure(
                {"": (clean.shares(), {m: quality[m] for m in share})}, even=even
            ),
            "Scatter plot of each example's attention share against its quality contrast; "
            f"their correlation is {signed(result['quality_correlation'])}.",
        )
    if points := result.get("noise"):
        figure = plots.noise_figure({"": [points]}, metric=score, even=even)
        yield "noise", "What noise in one modality does", figure, describe_noise(points, score)
    if points := result.get("attention_scale"):
        yield (
            "attention_scale",
            "Does attention do good or harm?",
            plots.attention_scale_figure(points, metric=score),
            describe_attention_scale(points, score),
        )
    if run.model.spec.uses_class_query:
        examples = attention_examples(
            run.model,
            run.variables,
            run.rotation,
            probe.dataset,
            probe.split,
            choose_examples(clean),
            seed=probe.seed,
            task=probe.task,
        )
        yield (
            "attention",
            "Where the class token looks",
            plots.attention_figure(examples),
            "Heat maps of the class token's attention over the inputs of chosen examples.",
        )


def _main(result: Mapping[str, Any]) -> str:
    """The main metric of an evaluation."""
    return MAIN[task_name(result)]


def _headlines(result: Mapping[str, Any]) -> dict[str, Any]:
    """The scores that an evaluation begins with, by their words."""
    names = (*HEADLINES[task_name(result)], "calibration_error", "quality_correlation")
    return {
        METRICS[name].words if name in METRICS else name.replace("_", " "): result[name]
        for name in names
        if name in result
    }


OUTPUTS = {  # of an entry in scores: the table's title, its first column, the others' words
    "per_class": ("Classes", "class", {"examples": "examples", "accuracy": "accuracy", "f1": "F1"}),
    "per_label": (
        "Labels",
        "label",
        {"examples": "examples", "average_precision": "average precision", "f1": "F1"},
    ),
    "per_target": ("Targets", "target", {"mae": "MAE", "correlation": "correlation", "ccc": "CCC"}),
}


def tables_by_output(scores: Mapping[str, Any], suffix: str = "") -> list[Table]:
    """What each class, label or target has of the scores."""
    return [
        Table(
            f"{title}{suffix}",
            (first, *columns.values()),
            [(name, *(row[field] for field in columns)) for name, row in scores[entry].items()],
        )
        for entry, (title, first, columns) in OUTPUTS.items()
        if entry in scores
    ]


NONFINITE = "NaN or infinite logits"
AGREEMENT = {"unchanged": "predictions unchanged", "mean_change": "mean change of predictions"}


def _tables(result: Mapping[str, Any]) -> Iterator[Table]:
    main = _main(result)
    agreement = "mean_change" if task_name(result) == REGRESSION else "unchanged"
    if result["corrupted"]:
        fields = ["corrupt", main, agreement]
        columns = ["corruption", METRICS[main].words, AGREEMENT[agreement]]
        more = {"kept": "examples that keep their last modality", "nonfinite": NONFINITE}
        for field, words in more.items():
            if any(field in found for found in result["corrupted"]):
                fields.append(field)
                columns.append(words)
        corrupted = [[found.get(field) for field in fields] for found in result["corrupted"]]
        yield Table("Corrupted", columns, corrupted)
    if "reliance" in result:
        rows = [
            (m, way, *map(found.get, (main, agreement, "follows")), found["attention_share"].get(m))
            for m, ways in result["reliance"].items()
            for way, found in ways.items()
        ]
        measured = METRICS[main].words, AGREEMENT[agreement]
        yield Table(
            "Reliance on each modality",
            ("modality", "is", *measured, "follows it", "its share"),
            rows,
            "Shuffled: taken from another example. Swapped: from an example of another class; "
            "then 'follows it' is the share of predictions of that class. Replaced: by noise.",
        )
    if "ood" in result:
        rows = [
            (found["path"], found["num_examples"], score.replace("_", " "), *found[score].values())
            for found in result["ood"]
            for score in OOD_SCORES
        ]
        yield Table(
            "Other data",
            ("data", "examples", "score", "AUROC", "FPR at 95 %"),
            rows,
            "How well a score tells this split from other data. AUROC: the probability that an "
            "example of this split has the higher one; FPR: the share of the others that passes "
            "where 95 % of this split pass.",
        )
    if "modality_examples" in result:
        counts = result["modality_examples"]
        share = result.get("attention_share", {})
        present = [(m, count, share.get(m)) for m, count in counts.items()]
        text = "Shares and correlations are over the examples that have the modality."
        yield Table("Modalities", ("modality", "examples that have it", "its share"), present, text)
    yield from tables_by_output(result)


def _share_rows(
    scores: Mapping[str, Any], words: str = "attention share, {}"
) -> list[tuple[str, str]]:
    """The share of each modality, with the examples behind it where some lack one."""
    counts = scores.get("modality_examples", {})
    return [
        (words.format(m), written(share, count=counts.get(m)))
        for m, share in scores.get("attention_share", {}).items()
    ]


def summary_rows(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The table that the command prints."""
    rows = [(f"{result['split']} examples", str(result["num_examples"]))]
    if "nonfinite" in result:
        rows.append((f"examples with {NONFINITE}", str(result["nonfinite"])))
    paired = min(result.get("contrast_examples", {}).values(), default=None)
    main, words = _main(result), METRICS[_main(result)].words
    rows += [
        (name, written(value, count=paired if name == "quality correlation" else None))
        for name, value in _headlines(result).items()
    ]
    rows += _share_rows(result)
    changed = [(found["corrupt"], found) for found in result["corrupted"]]
    if "quality_shuffled" in result:
        changed.append(("quality bias of another example", result["quality_shuffled"]))
    for name, found in changed:
        text = f"{words} {written(found[main])}"
        text += "".join(f", {words} {value}" for words, value in _share_rows(found, "share {}"))
        if "nonfinite" in found:
            text += f", {found['nonfinite']} with {NONFINITE}"
        if "kept" in found:
            text += f", {found['kept']} examples keep their last modality"
        rows.append((name, text))
    for found in result.get("ood", []):
        for score in OOD_SCORES:
            text = f"{written(found[score]['auroc'])}, FPR95 {written(found[score]['fpr95'])}"
            rows.append((f"AUROC against {found['path']}, {score.replace('_', ' ')}", text))
    for point in result.get("attention_scale", []):
        name = f"{words} with the query times {point['scale']:g}"
        rows.append((name, written(point[main])))
    for m, ways in result.get("reliance", {}).items():
        text = ", ".join(f"{way} {written(found[main])}" for way, found in ways.items())
        rows.append((f"{words} with {m}", text))
    return rows
