"""The public names are few, and each has an example, which `pytest --doctest-modules` runs."""

import pytest

import rollingq_jax as rq
from rollingq_jax import train


def test_there_are_few():
    assert len(set(rq.__all__)) == len(rq.__all__) <= 40


@pytest.mark.parametrize("module", [rq, rq.convert, train], ids=["root", "convert", "train"])
def test_each_has_an_example(module):
    assert [n for n in module.__all__ if ">>>" not in (getattr(module, n).__doc__ or "")] == []


def test_what_is_imported_on_first_use_is_listed_too():
    assert {"convert", "load", "rolling_query", "train"} <= set(dir(rq))
    assert set(dir(rq)) == {*rq.__all__, "__version__"}
    assert all(getattr(rq, name) is not None for name in dir(rq))
