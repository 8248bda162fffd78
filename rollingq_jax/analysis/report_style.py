"""The report's style sheet: plain text first, light and dark by the reader's setting, print."""

CSS = """
:root {
  --text: #1d1d1f; --muted: #5f6368; --ground: #ffffff; --raised: #f5f6f8; --line: #dfe1e5;
}
@media (prefers-color-scheme: dark) {
  :root {
    --text: #e8e8ea; --muted: #a2a6ad; --ground: #17181b; --raised: #212327; --line: #383b41;
  }
}
* { box-sizing: border-box; }
html { background: var(--ground); color: var(--text); -webkit-text-size-adjust: 100%; }
body {
  margin: 0;
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 56rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.25; margin: 0 0 .75rem; overflow-wrap: anywhere; }
h2 {
  font-size: 1.15rem; margin: 2.75rem 0 .75rem; padding-top: .75rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere;
}
p { margin: 0 0 .75rem; max-width: 44rem; }
.lead { font-size: 1.06rem; white-space: pre-line; }
.small { font-size: .88rem; color: var(--muted); white-space: pre-line; max-width: none; }
.numbers { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.5rem 0 0; }
.numbers div {
  flex: 1 1 8.5rem; background: var(--raised); border: 1px solid var(--line); border-radius: 8px;
  padding: .7rem .9rem;
}
.numbers dt { color: var(--muted); font-size: .82rem; }
.numbers dd {
  margin: .1rem 0 0; font-size: 1.45rem; font-weight: 600; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere;
}
figure { margin: 0; }
/* Pictures are drawn on white: in the dark they stand on a card of their own. */
img {
  display: block; max-width: 100%; height: auto; background: #fff; border: 1px solid var(--line);
  border-radius: 8px; padding: .6rem;
}
figcaption { color: var(--muted); font-size: .92rem; margin-top: .6rem; max-width: 46rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .92rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .38rem 1.5rem .38rem 0; border-bottom: 1px solid var(--line); }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; }
.number { text-align: right; }
.pairs { margin: 0; columns: 2 20rem; column-gap: 2.5rem; font-size: .86rem; }
.pairs div {
  display: flex; justify-content: space-between; gap: 1rem; break-inside: avoid;
  border-bottom: 1px solid var(--line); padding: .2rem 0;
}
.pairs dt { color: var(--muted); overflow-wrap: anywhere; }
.pairs dd {
  margin: 0; text-align: right; overflow-wrap: anywhere; min-width: 30%;
  font-family: ui-monospace, "DejaVu Sans Mono", monospace;
}
@media print {
  :root {
    --text: #000; --muted: #444; --ground: #fff; --raised: #fff; --line: #bbb;
  }
  body { font-size: 10.5pt; }
  main { max-width: none; padding: 0; }
  section, figure, .numbers div { break-inside: avoid; }
  h2 { break-after: avoid; }
  .wide { overflow: visible; }
}
"""
