"""The public names: few, each with its shapes or its source, and an example that runs."""

import inspect

import pytest

import rollingq_jax as rq
from rollingq_jax import train

MOST = 40


def documentation(name):
    return inspect.getdoc(getattr(rq, name)) or ""


def test_there_are_few():
    assert len(rq.__all__) <= MOST
    assert sorted(rq.__all__) == list(rq.__all__) and len(set(rq.__all__)) == len(rq.__all__)


@pytest.mark.parametrize("name", rq.__all__)
def test_each_has_an_example(name):
    """`pytest --doctest-modules rollingq_jax` runs them."""
    assert ">>>" in documentation(name)


@pytest.mark.parametrize("module", [rq.convert, train], ids=["convert", "train"])
def test_what_is_imported_on_first_use_has_examples_too(module):
    assert [n for n in module.__all__ if ">>>" not in getattr(module, n).__doc__] == []


@pytest.mark.parametrize(
    "name", [name for name in rq.__all__ if inspect.isfunction(getattr(rq, name))]
)
def test_each_function_says_what_it_raises(name):
    assert "Raises:" in documentation(name)


@pytest.mark.parametrize(
    "name",
    ["attention_imbalance_rate", "attention_share", "class_token_attention", "cosine_scores",
     "fold_rotation", "imbalance", "mean_key", "rebalance_anchor", "rebalance_weights", "rotate",
     "rotation_between"],
)  # fmt: skip
def test_each_pure_function_gives_its_shapes(name):
    assert "`[" in documentation(name)
