"""Every test of this folder is marked `faults`: real processes, signals and damaged files."""

from pathlib import Path

import pytest

from tests.faults.fault_cases import Command, result


def pytest_collection_modifyitems(items):
    here = Path(__file__).parent
    for item in items:
        if here in Path(item.fspath).parents:
            item.add_marker(pytest.mark.faults)


@pytest.fixture(scope="session")
def command(tmp_path_factory):
    """`train.py` with data."""
    return Command(tmp_path_factory.mktemp("command"))


@pytest.fixture(scope="session")
def undisturbed(command, tmp_path_factory):
    """The result of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    assert command.run(workdir) == (0, "")
    return result(workdir)
