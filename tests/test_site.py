"""The site is built without a warning, fits screens of any width and can be read in the dark."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.test_report import BROWSER

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "index", "concepts", "results", "config", "api", "howto/compare", "howto/own_model",
    "notebooks/02_av_digits", "notebooks/04_paper",
)  # fmt: skip
WIDTHS, SCHEMES = (390, 1280), ("default", "slate")  # Material's names of light and dark
pytestmark = pytest.mark.slow

# Each page in a frame as wide as a screen: what is wider than it and in no box that scrolls, and
# text whose contrast is below 3 (WCAG 2.2, 1.4.3: the least, of large text).
MEASURE = """<!doctype html><body><pre id=found></pre><script>
const found = {}, pages = PAGES, widths = WIDTHS, schemes = SCHEMES;
const scrolls = (box) => /auto|scroll|hidden/.test(getComputedStyle(box).overflowX);
function tooWide(inside, width) {
  return [...inside.querySelectorAll("article *")].filter((one) => {
    if (one.getBoundingClientRect().right <= width + 1) return false;
    let box = one.parentElement;
    while (box && !scrolls(box)) box = box.parentElement;
    return !box || box.tagName === "BODY";
  });
}
const over = (ground, [r, g, b, a = 1]) =>
  [r, g, b].map((value, i) => a * value + (1 - a) * ground[i]);
const rgba = (color) => color.match(/[\\d.]+/g).map(Number);
const light = (color) => color.map((value) => value / 255)
  .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0.05);
const ground = (box) => box
  ? over(ground(box.parentElement), rgba(getComputedStyle(box).backgroundColor))
  : [255, 255, 255];
function tooFaint(inside) {
  return [...inside.querySelectorAll("article *:not(.headerlink)")].filter((one) => {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
    if (!own || !one.getClientRects().length) return false;
    const below = ground(one);
    const pair = [light(below), light(over(below, rgba(getComputedStyle(one).color)))];
    return Math.max(...pair) / Math.min(...pair) < 3;
  });
}
function measure(inside, page, width) {
  inside.head.insertAdjacentHTML("beforeend", "<style>* { transition: none !important }</style>");
  const named = (list) => list.slice(0, 3).map((one) => one.outerHTML.slice(0, 90));
  for (const scheme of schemes) {
    inside.body.setAttribute("data-md-color-scheme", scheme);
    found[`${page} at ${width}, ${scheme}`] = {
      width: inside.documentElement.scrollWidth,
      ground: ground(inside.body).map(Math.round),
      wide: named(tooWide(inside, width)),
      faint: named(tooFaint(inside)),
    };
  }
  document.getElementById("found").textContent = JSON.stringify(found);
}
for (const width of widths) for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0; display: block`;
  frame.onload = () => setTimeout(() => measure(frame.contentDocument, page, width), 1500);
  frame.src = page === "index" ? "index.html" : page + "/index.html";
  document.body.append(frame);
}
</script>"""


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site; `--strict` makes a warning an error."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return folder


def test_examples_and_signatures_of_the_api_are_code(site):
    page = (site / "api" / "index.html").read_text(encoding="utf-8")
    assert 'class="admonition example"' not in page
    prose = re.sub(r"<pre.*?</pre>", "", page, flags=re.DOTALL)
    assert "&gt;&gt;&gt;" not in prose
    signatures = re.findall(r'<div class="doc-signature[^>]*>(.*?)</div>', page, flags=re.DOTALL)
    lines = [
        line
        for one in signatures
        for line in html.unescape(re.sub(r"<[^>]+>", "", one)).splitlines()
    ]
    assert len(signatures) > 50 and max(map(len, lines)) <= 88


def test_notebooks_are_pages_with_their_pictures(site):
    folder = site / "notebooks"
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        page = (folder / path.stem / "index.html").read_text(encoding="utf-8")
        pictures = re.findall(r'<img alt="([^"]+)" src="\.\./([^"]+)"', page)
        assert all((folder / name).read_bytes().startswith(b"\x89PNG") for _, name in pictures)
        outputs = [o for c in json.loads(path.read_text())["cells"] for o in c.get("outputs", ())]
        drawn = [one for one in outputs if "image/png" in one.get("data", {})]
        assert len(pictures) == len(drawn) and (folder / path.name).exists()
        printed = [line for o in outputs for line in "".join(o.get("text", "")).splitlines()]
        assert all(html.escape(line.strip(), quote=False) in page for line in printed)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
def test_pages_fit_the_screen_and_can_be_read(site, tmp_path):
    script = MEASURE
    for name, value in (("PAGES", PAGES), ("WIDTHS", WIDTHS), ("SCHEMES", SCHEMES)):
        script = script.replace(f"= {name}", f"= {json.dumps(value)}")
    (site / "measure.html").write_text(script)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--window-size=1400,1000",
        "--virtual-time-budget=30000", "--dump-dom", (site / "measure.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    found = json.loads(html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", done.stdout)[1]))
    assert len(found) == len(PAGES) * len(WIDTHS) * len(SCHEMES)
    for name, one in found.items():
        assert one["width"] <= int(re.search(r"at (\d+)", name)[1]), name
        assert not one["wide"] and not one["faint"], (name, one)
        assert (max(one["ground"]) < 64) == name.endswith("slate"), name
