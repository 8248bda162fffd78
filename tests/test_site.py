"""The documentation's site is built without a warning and fits a narrow screen in a browser."""

import html
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.analysis.test_report import BROWSER

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("index", "concepts", "results", "config", "api", "howto/compare", "howto/own_model")
pytestmark = pytest.mark.slow

# Each page in a frame as wide as a screen; what is wider than it, and in no box that scrolls.
MEASURE = """<!doctype html><body><pre id=found></pre><script>
const found = {}, pages = PAGES, width = WIDTH;
function measure(frame, page) {
  const inside = frame.contentDocument, wide = [];
  for (const one of inside.querySelectorAll("article *")) {
    let box = one.parentElement;
    const scrolls = (box) => /auto|scroll|hidden/.test(getComputedStyle(box).overflowX);
    while (box && !scrolls(box)) box = box.parentElement;
    const right = one.getBoundingClientRect().right;
    if (right > width + 1 && (!box || box.tagName === "BODY")) {
      wide.push(one.tagName + " " + Math.round(right) + " " + one.textContent.slice(0, 40));
    }
  }
  found[page] = {page: inside.documentElement.scrollWidth, wide: wide.slice(0, 3)};
  document.getElementById("found").textContent = JSON.stringify(found);
}
for (const page of pages) {
  const frame = document.createElement("iframe");
  frame.style = `width: ${width}px; height: 900px; border: 0; display: block`;
  frame.onload = () => setTimeout(() => measure(frame, page), 1500);
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


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (apt-get install chromium)")
@pytest.mark.parametrize("width", [390, 1280])
def test_no_page_is_wider_than_the_screen(site, tmp_path, width):
    script = MEASURE.replace("PAGES", json.dumps(PAGES)).replace("WIDTH", str(width))
    (site / "measure.html").write_text(script)
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--allow-file-access-from-files", f"--user-data-dir={tmp_path}", "--window-size=1400,1000",
        "--virtual-time-budget=30000", "--dump-dom", (site / "measure.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, check=True, timeout=300, capture_output=True, text=True)
    found = json.loads(html.unescape(re.search(r"<pre[^>]*>(.*?)</pre>", done.stdout)[1]))
    assert sorted(found) == sorted(PAGES)
    assert {page: one for page, one in found.items() if one["page"] > width} == {}
    assert {page: one["wide"] for page, one in found.items() if one["wide"]} == {}
