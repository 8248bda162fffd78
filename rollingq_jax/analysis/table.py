"""`predictions.csv`: what a model answered on each example, and which modality it looked at."""

import contextlib
import csv
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

Rows = Callable[..., None]


def header(classes: Sequence[str], modalities: Sequence[str], labeled: bool) -> list[str]:
    """The names of the columns."""
    return [
        "id",
        "predicted",
        *(f"probability/{name}" for name in classes),
        *(f"share/{m}" for m in modalities),
        *(["label"] if labeled else []),
    ]


def rows(
    classes: Sequence[str],
    ids: Sequence[Any],
    probabilities: np.ndarray,
    shares: Mapping[str, np.ndarray],
    labels: Sequence[str] | None = None,
) -> Iterator[list[str]]:
    """A line for each of N examples.

    Args:
      classes: C names.
      ids: N.
      probabilities: `[N, C]`; where they are not finite nothing is predicted.
      shares: `{m: [N]}` or `{m: [N, H]}`, averaged over heads; empty without a class query.
      labels: N names of classes, "" where one is not known; None leaves the column out.
    """
    predicted = probabilities.argmax(axis=-1)
    known = np.isfinite(probabilities).all(axis=-1)
    means = [np.asarray(share).reshape(len(ids), -1).mean(axis=-1) for share in shares.values()]
    for place, name in enumerate(ids):
        yield [
            str(name),
            classes[predicted[place]] if known[place] else "",
            *(f"{value:.8g}" for value in probabilities[place]),
            *(f"{share[place]:.8g}" for share in means),
            *([] if labels is None else [labels[place]]),
        ]


@contextlib.contextmanager
def written_whole(path: epath.Path) -> Iterator[Any]:
    """A CSV writer into a file that appears when all is written, and not at all if it fails."""
    temporary = path.parent / f".{path.name}.tmp"
    try:
        with temporary.open("wb") as file:

            def write(lines: Iterator[list[str]]) -> None:
                file.write("".join(map(_line, lines)).encode("utf-8", "backslashreplace"))

            yield write
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _line(cells: Sequence[str]) -> str:
    """A line of CSV; of line ends in cells the writer quotes only those that it writes itself."""
    buffer = io.StringIO(newline="")
    csv.writer(buffer, lineterminator="\r\n").writerow(cells)
    return buffer.getvalue().removesuffix("\r\n") + "\n"
