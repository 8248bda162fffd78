"""Runs the comparison of the results page and writes its numbers into it.

Usage: `python -m docs.results [--workdir FOLDER] [--seeds N]`. Interrupted, the same command
resumes; with a finished comparison in the folder it only writes the page again. What stands between
the page's two marks is made here; the rest is written by hand.

`--data FILE` compares the same arms with the same settings on other data, as `data.path` of
`data.name = "arrays"` takes them, and prints the tables; the page stays as it is.
"""

import argparse
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from configs.av_digits import get_config
from rollingq_jax.comparison.results import (
    difference,
    make_table,
    markdown,
    metrics_of,
    verdicts,
    written,
    written_difference,
    written_mean,
)
from rollingq_jax.comparison.runs import run_folder
from rollingq_jax.train.config import default_config

PAGE = Path(__file__).parent / "results.md"
IMAGES = Path(__file__).parent / "images"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
FIGURES = {
    "differences": "Differences to plain attention, seed by seed, with their intervals",
    "dynamics": "Imbalance and attention share over training, a band over seeds for each arm",
    "share_quality": "Attention share against quality, a point a test example, an arm a panel",
    "noise": "Accuracy and attention share while one modality turns to noise",
}
LARGEST = 300_000  # bytes of a picture

ARMS = ("concat", "attention", "uniform", "rollingq")
LEVELS = (4.0, 8.0)  # of the noise in the probes, in standard deviations of the training data
TUNED_FROM, TESTED_FROM = 60, 62  # seeds; the demo's regime was looked for on 11 to 59


def metric_table(metric: str, lines: Mapping[str, Mapping[str, Any]], against: str) -> str:
    """An arm a row: mean, standard deviation, difference to one arm and what it shows."""
    rows = []
    for arm, line in lines.items():
        spread = "" if line["sd"] is None else written(metric, line["sd"])
        difference = written_difference(metric, line) if "difference" in line else ""
        rows.append([arm, written_mean(metric, line), spread, difference])
    return markdown(
        ["arm", "mean [95 % interval]", "standard deviation", f"difference to {against}"], rows
    )


def settings_table(selection: Mapping[str, Any]) -> str:
    """What was tried for each arm on validation data, the chosen setting in bold."""
    rows = []
    for arm, entry in selection.items():
        for number, tried in enumerate(entry["tried"]):
            setting = ", ".join(f"{name} {value}" for name, value in tried["setting"].items())
            accuracies = ", ".join(
                written("test_accuracy", a) for a in tried["validation_accuracy"]
            )
            mark = "**" if number == entry["chosen"] else ""
            rows.append([arm, f"{mark}{setting}{mark}", accuracies])
    return markdown(["arm", "setting", "validation accuracy, a seed each"], rows)


def probe_runs(workdir: Path, result: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Probes of every tested run that has a class query, by arm; made where they are missing."""
    from rollingq_jax.evaluate import evaluate

    found: dict[str, list[dict[str, Any]]] = {}
    for arm in set(ARMS) & {"attention", "rollingq"}:
        entry = result["selection"][arm]
        for seed in result["seeds"]:
            run = run_folder(workdir, arm, entry["chosen"], entry["setting"], seed)
            if not (run / "evaluation.json").exists():
                evaluate(run, full_probes=True, levels=LEVELS)
            found.setdefault(arm, []).append(json.loads((run / "evaluation.json").read_text()))
    return found


def query_table(probes: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Accuracy with the trained query times tau, an arm a row."""
    scales = [point["scale"] for point in next(iter(probes.values()))[0]["attention_scale"]]
    rows = []
    for arm, runs in sorted(probes.items()):
        accuracy = np.array([[p["accuracy"] for p in run["attention_scale"]] for run in runs])
        even = difference(accuracy[:, scales.index(0.0)], accuracy[:, scales.index(1.0)])
        means = [written("test_accuracy", mean) for mean in accuracy.mean(axis=0)]
        rows.append([arm, *means, written_difference("test_accuracy", even)])
    return markdown(["arm", *(f"tau {scale:g}" for scale in scales), "tau 0 against 1"], rows)


def share_table(probes: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The audio's mean share of attention while one modality gets worse, an arm a row."""
    rows = []
    for arm, runs in sorted(probes.items()):
        noise = [
            np.mean([_share_at(run, "audio", level) for run in runs]) for level in (0.0, *LEVELS)
        ]
        replaced = [
            np.mean([run["reliance"][m]["replaced"]["attention_share"]["audio"] for run in runs])
            for m in ("audio", "visual")
        ]
        rows.append([arm, *(f"{share:.3f}" for share in (*noise, *replaced))])
    head = ["clean", *(f"audio + {level:g} sd" for level in LEVELS), "noise for audio"]
    return markdown(["arm", *head, "noise for image"], rows)


def _share_at(run: Mapping[str, Any], modality: str, level: float) -> float:
    points = (p for p in run["noise"] if (p["modality"], p["level"]) == (modality, level))
    return float(next(points)["attention_share"]["audio"])


def measured(
    result: Mapping[str, Any], probes: Mapping[str, Sequence[Mapping[str, Any]]] | None = None
) -> str:
    """The page's part that is made from `results.json` and, where given, the runs' probes."""
    words = metrics_of(result["runs"])
    main, against, second = "test_accuracy", result["reference"], result["second_reference"]
    found = verdicts(result["table"], result["runs"], against)
    parts = ["\n".join(f"- {line}" for line in found)] if found else []
    parts += [result["conclusion"], result["search"]]
    for metric, lines in result["table"].items():
        parts += [f"### {words[metric].capitalize()}", metric_table(metric, lines, against)]
    if second:
        lines = result["second_table"][main]
        parts += [f"### Test accuracy against {second}", metric_table(main, lines, second)]
    if "uniform" in result["selection"]:
        lines = make_table(result["runs"], list(result["selection"]), "uniform")[main]
        heading = "### Test accuracy against attention held even"
        parts += [heading, metric_table(main, lines, "uniform")]
    if probes:
        parts += [
            "### Test accuracy with the trained query times tau",
            query_table(probes),
            "### Attention share of audio while a modality gets worse",
            share_table(probes),
        ]
    parts += ["### Settings", settings_table(result["selection"])]
    parts += [f"![{alt}](images/results_{name}.png)" for name, alt in FIGURES.items()]
    packages = {name: v for name, v in result["versions"].items() if name != "platform"}
    versions = ", ".join(f"{name} {version}" for name, version in packages.items())
    seeds = f"Seeds {result['seeds'][0]} to {result['seeds'][-1]}"
    parts.append(f"{seeds}; {result['device']}; {versions}.")
    return "\n\n".join(parts)


def replace_measured(page: str, text: str) -> str:
    """The page with `text` between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{PAGE} lacks {BEGIN} or {END}; allowed: each once, in this order")
    return f"{before}{BEGIN}\n\n{text}\n\n{END}{after}"


def copy_figures(folder: Path) -> None:
    """The comparison's figures into the documentation's images."""
    for name in FIGURES:
        source = folder / f"{name}.png"
        size = source.stat().st_size
        if size > LARGEST:
            raise ValueError(f"{source} has {size} bytes; allowed: {LARGEST}")
        shutil.copyfile(source, IMAGES / f"results_{name}.png")


def main() -> None:
    """Parses the command line, compares, writes."""
    from rollingq_jax.compare import compare

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=Path, default=Path("runs/results"))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--data", default="", help="an .npz file in place of the demo's data")
    arguments = parser.parse_args()
    config = get_config()
    config.seed = TUNED_FROM
    if arguments.data:
        general = default_config().data
        config.data = ConfigDict({**general, "name": "arrays", "path": arguments.data})
    result = compare(
        config,
        arguments.workdir,
        arms=",".join(ARMS),
        num_seeds=arguments.seeds,
        first_seed=TESTED_FROM,
        noise=True,
    )
    if arguments.data:
        print(measured(result))
        return
    probes = probe_runs(arguments.workdir, result)
    copy_figures(arguments.workdir / "figures")
    PAGE.write_text(replace_measured(PAGE.read_text(), measured(result, probes)))
    print(result["conclusion"])


if __name__ == "__main__":
    main()
