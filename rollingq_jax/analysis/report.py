"""One HTML file that shows a run: no script, no network, light and dark, fit for print.

Everything that comes from outside (class names, paths, configuration, metrics) is escaped, and a
content security policy in the file itself forbids scripts and any request besides.
"""

import base64
import html
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from matplotlib.figure import Figure

from rollingq_jax.analysis.plots.style import png_bytes
from rollingq_jax.analysis.report_style import CSS


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

    def drawn(self) -> "ReportFigure":
        """The same with the PNG in place of the figure, so that it is drawn once."""
        return self._replace(figure=self.png())


class Table(NamedTuple):
    """A table with a heading; cells are numbers or text, None and NaN show as a dash."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    text: str = ""


def write_report(
    path: str | Path | epath.Path,
    *,
    title: str,
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
      lead: what happened, in a few sentences.
      key_numbers: name -> value, shown large at the top.
      figures: in the order they are shown.
      tables: after the figures.
      data: what the data are, after the tables.
      config: nested configuration (a mapping or ConfigDict), shown flat.
      versions: package -> version, device and the like.
    """
    path = epath.Path(path)
    page = "\n".join(_page(title, lead, key_numbers or {}, figures, tables, data, config, versions))
    path.parent.mkdir(parents=True, exist_ok=True)
    # A reader never sees half a page: the old report stays until the new one is complete.
    part = path.with_name(path.name + ".part")
    part.write_text(page)
    part.replace(path)
    return path


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted names; an empty mapping stays, as {}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        if _is_mapping(value) and len(value):
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
    if _is_mapping(value) and not len(value):
        return "–"
    return str(value) or "–"


def escape(value: Any) -> str:
    """Text for HTML content or a quoted attribute; control characters become a replacement."""
    text = "".join(
        c if c.isprintable() or c in "\n\N{NO-BREAK SPACE}" else "\N{REPLACEMENT CHARACTER}"
        for c in str(value)
    )
    return html.escape(text, quote=True)


def _page(
    title: str,
    lead: str,
    key_numbers: Mapping[str, Any],
    figures: Sequence[ReportFigure],
    tables: Sequence[Table],
    data: str,
    config: Mapping[str, Any] | None,
    versions: Mapping[str, Any] | None,
) -> Iterator[str]:
    yield "<!DOCTYPE html>"
    yield '<html lang="en"><head><meta charset="utf-8">'
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    yield f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield '<meta name="color-scheme" content="light dark">'
    yield f"<title>{escape(title)}</title><style>{CSS}</style></head><body><main>"
    yield f"<h1>{escape(title)}</h1>"
    if lead:
        yield f'<p class="lead">{escape(lead)}</p>'
    if key_numbers:
        yield '<dl class="numbers">'
        for name, value in key_numbers.items():
            yield f"<div><dt>{escape(name)}</dt><dd>{escape(shown(value))}</dd></div>"
        yield "</dl>"
    for figure in figures:
        yield from _figure(figure)
    for table in tables:
        yield from _table(table)
    if data:
        yield f'<section><h2>Data</h2><p class="small">{escape(data)}</p></section>'
    for heading, pairs in (
        ("Configuration", flatten(config or {})),
        ("Produced by", versions or {}),
    ):
        if pairs:
            yield f'<section><h2>{heading}</h2><dl class="pairs">'
            for name, value in pairs.items():
                yield f"<div><dt>{escape(name)}</dt><dd>{escape(exact(value))}</dd></div>"
            yield "</dl></section>"
    yield "</main></body></html>"


def _figure(figure: ReportFigure) -> Iterator[str]:
    data = base64.b64encode(figure.png()).decode("ascii")
    yield f"<section><h2>{escape(figure.title)}</h2><figure>"
    yield f'<img src="data:image/png;base64,{data}" alt="{escape(figure.alt)}">'
    if figure.text:
        yield f"<figcaption>{escape(figure.text)}</figcaption>"
    yield "</figure></section>"


def _table(table: Table) -> Iterator[str]:
    yield f"<section><h2>{escape(table.title)}</h2>"
    if table.text:
        yield f"<p>{escape(table.text)}</p>"
    sides = [
        ' class="number"' if all(_like_number(row[i]) for row in table.rows) else ""
        for i in range(len(table.columns))
    ]
    yield '<div class="wide"><table><thead><tr>'
    for name, side in zip(table.columns, sides, strict=True):
        yield f'<th scope="col"{side}>{escape(name)}</th>'
    yield "</tr></thead><tbody>"
    for row in table.rows:
        cells = zip(row, sides, strict=True)
        yield "<tr>"
        yield "".join(f"<td{side}>{escape(shown(cell))}</td>" for cell, side in cells)
        yield "</tr>"
    yield "</tbody></table></div></section>"


def _like_number(cell: Any) -> bool:
    """Whether a cell belongs into a column that is set flush right."""
    text = shown(cell)
    return text == "–" or text.lstrip("+−")[:1].isdigit()


def _is_mapping(value: Any) -> bool:
    return hasattr(value, "items") and hasattr(value, "keys")
