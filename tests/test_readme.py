"""The README's examples run, its links exist and its commands name real files."""

import re
import shlex
from pathlib import Path

import jax
import pytest

import rollingq_jax as rq
from rollingq_jax.analysis import plots

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(path: Path) -> str:
    """Path within the repository, for messages."""
    return path.relative_to(ROOT).as_posix()


def blocks(path: Path, language: str) -> list[str]:
    """Fenced code blocks of a page in one language."""
    fence = rf"^```{language}\n(.*?)^```"
    return re.findall(fence, path.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def commands(path: Path) -> list[list[str]]:
    """Every ``python ...`` command of a page's shell blocks, continuation lines joined."""
    text = "\n".join(blocks(path, "bash")).replace("\\\n", " ")
    words = [shlex.split(part, comments=True) for part in re.split(r"&&|\n", text)]
    return [line for line in words if line and line[0] == "python"]


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_python_examples_run(path, tmp_path, monkeypatch):
    """The blocks of one page share their names, and run under jax's defaults, as a reader's do."""
    monkeypatch.chdir(tmp_path)
    scope = {"__name__": "example"}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, block in enumerate(blocks(path, "python")):
            exec(compile(block, f"{path.name} block {number}", "exec"), scope)


@pytest.mark.parametrize("path", PAGES, ids=name_of)
def test_commands_name_files_and_modules_that_exist(path):
    for words in commands(path):
        if words[1] == "-m":
            module = words[2]
            if module.split(".")[0] in ("rollingq_jax", "benchmarks"):
                assert (ROOT / f"{module.replace('.', '/')}.py").exists(), " ".join(words)
        else:
            assert (ROOT / words[1]).exists(), " ".join(words)
        for flag, value in zip(words, words[1:], strict=False):
            if flag in ("--config", "-r") and value.startswith(("configs/", "requirements")):
                assert (ROOT / value).exists(), " ".join(words)


def anchors(path: Path) -> set[str]:
    """What a link to a heading of the page may end in, as GitHub and MkDocs make it."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "path", [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))], ids=name_of
)
def test_links_and_pictures_exist(path):
    """Links within the repository; MkDocs checks those to the API, when the site is built."""
    text = path.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        page = path.parent / name if name else path
        if page.parent == ROOT / "docs" / "notebooks":  # docs/notebooks.py makes them
            page = ROOT / "notebooks" / f"{page.stem}.ipynb"
        assert page.exists(), target
        assert not anchor or anchor in anchors(page), target


def test_each_page_is_in_the_navigation_once():
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = re.findall(r"^ +- .*: (\S+\.md)$", text, flags=re.MULTILINE)
    docs = ROOT / "docs"
    pages = [p.relative_to(docs).as_posix() for p in docs.rglob("*.md")]
    notebooks = [f"notebooks/{p.stem}.md" for p in (ROOT / "notebooks").glob("*.ipynb")]
    assert sorted(listed) == sorted(pages + notebooks)


def test_api_page_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    entries = {line.removeprefix("::: ").split(".")[-1] for line in page.splitlines()}
    subpackages = {"convert", "models", "train"}  # documented by what they hold
    former = {"textbook_attention"}  # an alias
    assert set(rq.__all__) - subpackages - former - entries == set()
    for package in (rq.convert, rq.models, rq.train, plots):
        assert set(package.__all__) - entries == set(), package.__name__
    assert all(f"`rq.{name}`" in page for name in subpackages)
