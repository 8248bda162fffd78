"""Mistakes in calls of the public functions: an error that says what came and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import FlaxError

import rollingq_jax as rq
from rollingq_jax.train import default_config, load_run, train_and_evaluate

ROLLER = rq.rolling_query()
STATE = ROLLER.init(2, 4, 3)  # M = 2, d = 4, H = 3
QUERY, KEYS = jnp.ones((3, 4)), jnp.ones((2, 5, 3, 4))
ENCODERS = {m: {"kind": "vector"} for m in "ab"}
MODEL = {"num_classes": 3, "dim": 8, "depth": 1, "num_heads": 2, "encoders": ENCODERS}


def observe(query=QUERY, keys=KEYS, weight=None):
    return lambda: ROLLER.observe(STATE, query, keys, weight)


def build(**fields):
    return lambda: rq.build_model(MODEL | fields)


ROWS = [
    (lambda: rq.rotation_between(jnp.ones(3), jnp.ones(4)), r"shapes \(3,\) and \(4,\); allowed"),
    (lambda: rq.rotation_between(jnp.ones(1), jnp.ones(1)), r"one d >= 2"),
    (lambda: rq.rotation_between(jnp.ones(3), jnp.ones(3), "qr"), "method is 'qr'; allowed: geod"),
    (lambda: rq.rotate(jnp.eye(3), jnp.ones(4)), r"\(3, 3\) and \(4,\); allowed: \[..., d, d\]"),
    (lambda: rq.cosine_scores(jnp.ones((2, 3)), jnp.ones((2, 2, 4))), r"allowed: \[B, d\] and"),
    (lambda: rq.cosine_scores(jnp.ones(3), jnp.ones((2, 3))), r"allowed: \[B, d\] and \[M, B, d\]"),
    (lambda: rq.rolling_query(beta=-0.1), "beta is -0.1; allowed: 0 or more"),
    (lambda: rq.rolling_query(beta=float("nan")), "beta is nan; allowed: 0 or more"),
    (lambda: rq.rolling_query(rho=-1.0), "rho is -1.0; allowed: 0 or more"),
    (lambda: rq.rolling_query(max_rotations=-1), "max_rotations is -1; allowed: 0 or more"),
    (lambda: rq.rolling_query(method="qr"), "method is 'qr'; allowed: geodesic, svd"),
    (lambda: ROLLER.init(1, 4), "num_modalities is 1; allowed: 2 or more"),
    (lambda: ROLLER.init(2, 1), "dim is 1; allowed: 2 or more"),
    (lambda: ROLLER.init(2, 4, 0), "num_heads is 0; allowed: 1 or more"),
    (observe(query=jnp.ones((1, 4))), r"allowed: .* with \[M, H, d\] = \[2, 3, 4\]"),
    (observe(query=jnp.ones((4, 3, 4))), r"\[\(4, 3, 4\), \(2, 5, 3, 4\), None\]; allowed"),
    (observe(keys=jnp.ones((3, 5, 3, 4))), r"\(3, 5, 3, 4\)"),
    (observe(keys=jnp.ones((2, 3, 4))), r"\(2, 3, 4\)"),
    (observe(weight=jnp.ones(4)), r"\(4,\)\]; allowed"),
    (build(fusion="late"), "model.fusion is 'late'; allowed: unimodal, sum"),
    (build(width=3), "model.width is not a field; allowed: depth, dim"),
    (build(dim="wide"), "model.dim is 'wide'; allowed: an integer >= 1"),
    (build(dropout=1.0), r"model.dropout is 1.0; allowed: a number in \[0, 1\)"),
    (build(encoders={}), "model.encoders is empty; allowed: one field a modality"),
    (build(encoders={"a": {"kind": "smell"}}), "encoders.a.kind is 'smell'; allowed: spectrogram"),
    (build(encoders={"label": {"kind": "vector"}}), "has a modality 'label'; allowed"),
    (build(num_classes=1), "model.num_classes is 1; allowed: an integer >= 2"),
    (lambda: rq.build_model(3), "model is 3; allowed: a mapping of fields"),
    (
        lambda: rq.fold_rotation({"x": {}}, STATE.rotation, query_path=("fusion", "query")),
        "query_path is 'fusion/query'; the parameters have no 'fusion' there",
    ),
    (lambda: rq.convert.from_upstream({}), r"."),
    (lambda: train_and_evaluate(None, "unused"), "config is None; allowed: a mapping of fields"),
    (
        lambda: train_and_evaluate({"seed": 0}, "unused"),
        "config.epochs is missing; allowed: an int",
    ),
    (lambda: train_and_evaluate(default_config(), ""), "workdir is empty; allowed: a folder"),
    (lambda: load_run("nowhere"), "workdir is 'nowhere'; allowed: the folder of a run"),
]


@pytest.mark.parametrize(("call", "line"), ROWS, ids=[str(number) for number in range(len(ROWS))])
def test_what_came_and_what_is_allowed(call, line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=line) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def applied():
    """A model's answer to a batch in which fields are replaced."""
    model = rq.build_model(MODEL)
    batch = {
        "a": np.ones((2, 3), np.float32),
        "b": np.ones((2, 4), np.float32),
        "label": np.zeros(2, np.int32),
    }
    variables = jax.jit(model.init)(jax.random.key(0), batch)

    def apply(rotation=None, **fields):
        changed = {n: v for n, v in (batch | fields).items() if v is not None}
        return model.apply(variables, changed, rotation=rotation)

    apply()
    return apply


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"a": None}, "a"),
        ({"a": np.ones((2, 3, 3), np.float32)}, "a"),
        ({"a": np.ones((2, 5), np.float32)}, "a|kernel"),
        ({"a_mask": np.ones(3, bool)}, "a_mask"),
        ({"rotation": jnp.eye(3)[None]}, "rotation"),
    ],
)
def test_a_model_names_what_does_not_fit(applied, fields, name):
    with pytest.raises((ValueError, FlaxError), match=name):
        applied(**fields)
