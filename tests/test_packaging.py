"""requirements*.txt, pyproject.toml, constraints.txt and the version say the same thing."""

import re
import tomllib
from pathlib import Path

import pytest

from rollingq_jax import __version__

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


def read_requirements(name: str) -> set[str]:
    """Requirement lines of a file, without comments and ``-r`` lines."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.split("#")[0].strip() for line in lines if line and line[0] not in "#-"}


def expand(extra: str) -> set[str]:
    """Requirements of an extra, with the project's own extras in it replaced by theirs."""
    found = set()
    for requirement in EXTRAS[extra]:
        own = re.fullmatch(r"rollingq-jax\[([\w,]+)\]", requirement)
        if own:
            found |= set().union(*(expand(name) for name in own.group(1).split(",")))
        else:
            found.add(requirement)
    return found


def distribution(requirement: str) -> str:
    """Normalised name of a distribution."""
    return re.split(r"[\[<>=!~; ]", requirement)[0].lower().replace("_", "-")


def test_requirements_are_the_extras():
    main = read_requirements("requirements.txt")
    assert main == set(PROJECT["dependencies"]) | expand("demo")
    dev = read_requirements("requirements-dev.txt")
    assert main | dev == set(PROJECT["dependencies"]) | expand("dev")
    assert "-r requirements.txt" in (ROOT / "requirements-dev.txt").read_text().splitlines()


def test_core_needs_four_packages():
    names = {distribution(requirement) for requirement in PROJECT["dependencies"]}
    assert names == {"jax", "flax", "optax", "chex"}


@pytest.mark.parametrize("extra", sorted(EXTRAS))
def test_no_requirement_replaces_an_accelerators_jaxlib(extra):
    for requirement in expand(extra) | set(PROJECT["dependencies"]):
        assert distribution(requirement) != "jaxlib"
        assert not re.search(r"==|<", requirement), f"{requirement} caps a version"
        assert distribution(requirement) not in ("tensorflow", "torch")


def test_one_lower_bound_for_each_package():
    bounds: dict[str, set[str]] = {}
    for requirement in set().union(*(expand(extra) for extra in EXTRAS), PROJECT["dependencies"]):
        if ">=" in requirement:
            bounds.setdefault(distribution(requirement), set()).add(requirement.split(">=")[1])
    assert {name: found for name, found in bounds.items() if len(found) > 1} == {}


def test_constraints_hold_every_requirement():
    pinned = {distribution(line) for line in read_requirements("constraints.txt")}
    needed = {distribution(line) for line in expand("dev") | set(PROJECT["dependencies"])}
    assert needed <= pinned


def test_version_is_in_changelog_and_citation():
    assert re.fullmatch(r"\d+\.\d+\.\d+", __version__)
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {__version__}\n" in citation
