"""Mistakes in calls of the public functions: an error that says what came and what is allowed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


TOKENS, PROJECT, BIAS = jnp.ones((2, 5, 6)), jnp.ones((6, 3, 4)), jnp.ones((3, 4))
ATTENTION = {
    "tokens": TOKENS,
    "query": QUERY,
    "w_key": PROJECT,
    "w_value": PROJECT,
    "b_key": BIAS,
    "b_value": BIAS,
}
ONES = jnp.ones


def attend(function=rq.class_token_attention, **fields):
    return lambda: function(**(ATTENTION | fields))


def fold(rotation=STATE.rotation, path=("fusion", "query"), kernel=(8, 3, 4)):
    params = {"fusion": {"query": {"kernel": ONES(kernel)}}}
    return lambda: rq.fold_rotation(params, rotation, query_path=path)


ROWS = [
    # rotation
    (lambda: rq.rotation_between(ONES(3), ONES(4)), r"shapes \(3,\) and \(4,\); allowed"),
    (lambda: rq.rotation_between(ONES(1), ONES(1)), r"one d >= 2"),
    (lambda: rq.rotation_between(ONES((2, 3)), ONES((4, 3))), r"\(2, 3\) and \(4, 3\); allowed"),
    (lambda: rq.rotation_between(ONES(3), ONES(3), "qr"), "method is 'qr'; allowed: geod"),
    (
        lambda: rq.rotation_between(ONES(3, jnp.complex64), ONES(3)),
        "dtype complex64; allowed: real",
    ),
    (lambda: rq.rotate(jnp.eye(3), ONES(4)), r"\(3, 3\) and \(4,\); allowed: \[..., d, d\]"),
    (lambda: rq.rotate(ONES(3), ONES(3)), r"\(3,\) and \(3,\); allowed"),
    (lambda: rq.rotate(ONES((2, 3, 3)), ONES((4, 3))), r"\(2, 3, 3\) and \(4, 3\); allowed"),
    (lambda: rq.rotate(None, ONES(3)), "are NoneType and ArrayImpl; allowed: arrays"),
    # imbalance
    (
        lambda: rq.cosine_scores(ONES((2, 3)), ONES((2, 2, 4))),
        r"allowed: \[M, B, d\] with B = 2, d = 3",
    ),
    (lambda: rq.cosine_scores(ONES(3), ONES((2, 3))), r"query has shape \(3,\); allowed: \[B, d\]"),
    (lambda: rq.cosine_scores([[1.0]], ONES((2, 1, 1))), r"query is a list; .* array \[B, d\]"),
    (lambda: rq.cosine_scores(ONES((5, 3)), ONES((2, 5, 3)), ONES(2)), r"\(2,\); .*\[B\] or None"),
    (
        lambda: rq.cosine_scores(ONES((5, 3)), ONES((2, 5, 3), jnp.complex64)),
        "mean_keys has dtype complex",
    ),
    (
        lambda: rq.attention_imbalance_rate(ONES((2, 3)), ONES((2, 3)), ONES((1, 3))),
        r"keys_second has shape \(1, 3\); allowed: \[B, d\] with B = 2, d = 3",
    ),
    (lambda: rq.imbalance(jnp.float32(1.0)), r"scores has shape \(\); allowed: an array \[..., M"),
    (lambda: rq.imbalance(ONES((2, 0))), r"scores has shape \(2, 0\); allowed"),
    (lambda: rq.rebalance_weights(ONES((1, 2)), 0.0), r"scores has shape \(1, 2\); allowed: \[M\]"),
    (lambda: rq.rebalance_weights(ONES(2), -1.0), "rho is -1.0; allowed: 0 or more"),
    (lambda: rq.rebalance_weights(ONES(2), float("nan")), "rho is nan; allowed: 0 or more"),
    (lambda: rq.rebalance_weights(ONES(2), float("inf")), "rho is inf; allowed: .* and finite"),
    (
        lambda: rq.rebalance_anchor(ONES(3), ONES((2, 3)), ONES(3)),
        r"weights has shape \(3,\); allowed: \[M\] with M = 2",
    ),
    (lambda: rq.rebalance_anchor(ONES(3), ONES((2, 4)), ONES(2)), r"\(2, 4\)"),
    # attention
    (
        attend(tokens=ONES((5, 6))),
        r"tokens has shape \(5, 6\); allowed: \[B, L, D\]",
    ),
    (
        attend(query=ONES((1, 4))),
        r"query has shape \(1, 4\); allowed: \[B, H, d\] or \[H, d\] with B = 2, H = 3, d = 4",
    ),
    (attend(query=ONES((1, 3, 4))), r"query has shape \(1, 3, 4\); allowed: .* with B = 2"),
    (attend(w_key=ONES((5, 3, 4))), r"\(5, 3, 4\)"),
    (attend(w_value=ONES((6, 12))), r"\(6, 12\)"),
    (attend(b_value=ONES(4)), r"\(4,\); allowed"),
    (attend(b_key=None), r"b_key is None; allowed: an array \[H, d\]"),
    (attend(mask=ONES((2, 5))), "mask has dtype float32; allowed: bool"),
    (attend(mask=ONES((5, 2), bool)), r"mask has shape \(5, 2\); .* or None with B = 2, L = 5"),
    (attend(dropout_rate=1.5, rng=jax.random.key(0)), "dropout_rate is 1.5; allowed: 0 <= rate"),
    (attend(rq.reference_attention, query=ONES((1, 4))), r"query has shape \(1, 4\)"),
    (
        lambda: rq.mean_key(TOKENS, PROJECT, ONES(4)),
        r"b_key has shape \(4,\); allowed: \[H, d\] with H = 3, d = 4",
    ),
    (lambda: rq.mean_key(TOKENS, PROJECT, BIAS, ONES((2, 4), bool)), r"mask has shape \(2, 4\)"),
    (
        lambda: rq.attention_share(ONES((2, 3, 5)), (2, 1)),
        r"lengths are \(2, 1\), .* has, 5",
    ),
    (lambda: rq.attention_share(ONES((2, 4)), (2, 1)), r"weights has shape \(2, 4\); allowed"),
    (lambda: rq.attention_share(ONES((2, 3, 4))), "lengths and segment_ids are both .* None"),
    (
        lambda: rq.attention_share(ONES((2, 3, 4)), segment_ids=jnp.arange(4)),
        "num_modalities is None; allowed with segment_ids: an integer >= 1",
    ),
    (
        lambda: rq.segment_mean_keys(ONES((2, 4, 3, 5)), (2, 2), num_heads=4),
        "num_heads is 4; allowed: a multiple of the keys' 3 heads",
    ),
    (
        lambda: rq.segment_mean_keys(ONES((2, 4, 3, 5)), segment_ids=ONES(4), num_modalities=2),
        "segment_ids has dtype float32; allowed: integers",
    ),
    (
        lambda: rq.segment_mean_keys(ONES((2, 4, 3, 5)), (2, 2), mask=ONES((2, 3)) > 0),
        r"mask has shape \(2, 3\); allowed: \[B, L\] or None with B = 2, L = 4",
    ),
    (lambda: rq.uniform_share(), "lengths and segment_ids are both"),
    # rolling
    (lambda: rq.rolling_query(beta=-0.1), "beta is -0.1; allowed: 0 or more"),
    (lambda: rq.rolling_query(beta=float("nan")), "beta is nan; allowed: 0 or more"),
    (lambda: rq.rolling_query(beta="0.1"), "beta is '0.1'; allowed: 0 or more"),
    (lambda: rq.rolling_query(beta=None), "beta is None; allowed: 0 or more"),
    (lambda: rq.rolling_query(beta=[0.1]), r"beta is \[0.1\]; allowed: 0 or more"),
    (lambda: rq.rolling_query(rho=-1.0), "rho is -1.0; allowed: 0 or more"),
    (lambda: rq.rolling_query(rho=None), "rho is None; allowed: 0 or more"),
    (lambda: rq.rolling_query(rho=float("inf")), "rho is inf; allowed: 0 or more, and finite"),
    (lambda: rq.rolling_query(max_rotations="3"), "max_rotations is '3'; allowed: 0 or more"),
    (lambda: rq.rolling_query(max_rotations=-1), "is -1; allowed: 0 or more, or None for no limit"),
    (lambda: rq.rolling_query(method="qr"), "method is 'qr'; allowed: geodesic, svd"),
    (lambda: ROLLER.init(1, 4), "num_modalities is 1; allowed: an integer >= 2"),
    (lambda: ROLLER.init(2, 1), "dim is 1; allowed: an integer >= 2"),
    (lambda: ROLLER.init(2, 4.5), "dim is 4.5; allowed: an integer >= 2"),
    (lambda: ROLLER.init(2, 4, 0), "num_heads is 0; allowed: an integer >= 1"),
    (lambda: ROLLER.observe(None, QUERY, KEYS), "state is a NoneType; allowed: what `init` made"),
    (observe(query=ONES((1, 4))), r"query has shape .*; allowed: .* with H = 3, d = 4"),
    (
        observe(query=ONES((4, 3, 4))),
        r"mean_keys has shape \(2, 5, 3, 4\); allowed: .* with M = 2, B = 4",
    ),
    (observe(query=None), r"query is None; allowed: an array \[B, H, d\] or \[H, d\]"),
    (observe(keys=ONES((3, 5, 3, 4))), r"\(3, 5, 3, 4\)"),
    (observe(keys=ONES((2, 3, 4))), r"\(2, 3, 4\)"),
    (observe(keys=[KEYS[0], KEYS[1]]), "mean_keys is a list; allowed: an array"),
    (observe(weight=ONES(4)), r"\(4,\); allowed"),
    (observe(weight=0.5), r"weight is a float; allowed: an array \[B\] or \[M, B\]"),
    (lambda: ROLLER.update((), QUERY), "state is a tuple; allowed"),
    (lambda: ROLLER.update(STATE, QUERY[:1]), r"query has shape \(1, 4\); allowed"),
    (
        lambda: ROLLER.update(STATE, QUERY, when=ONES(2) > 0),
        r"when has shape \(2,\); allowed: \[\]",
    ),
    (lambda: ROLLER.update(STATE, QUERY, when=1), "when is a int; allowed"),
    # folding
    (fold(rotation=None), r"rotation is None; allowed: an array \[H, d, d\]"),
    (fold(rotation=ONES((4, 4))), r"rotation has shape \(4, 4\); allowed: \[H, d, d\]"),
    (fold(rotation=ONES((3, 4, 5))), r"rotation has shape \(3, 4, 5\)"),
    (fold(path="fusion/query"), "query_path is 'fusion/query'; allowed: keys"),
    (fold(path=()), r"query_path is \(\); allowed: keys"),
    (fold(path=("fusion", "keys")), "query_path is 'keys'; the parameters have no 'keys' there"),
    (fold(path=("fusion",)), "query_path is 'fusion'; there is no projection"),
    (fold(kernel=(8, 36)), r"the kernel at 'query' has shape \(8, 36\), which does not end in 3"),
    # models
    (build(fusion="late"), "model.fusion is 'late'; allowed: unimodal, sum"),
    (
        build(width=3),
        "model.width is not a field; allowed: attention_scale, cosine_scale, depth, dim",
    ),
    (build(dim="wide"), "model.dim is 'wide'; allowed: an integer >= 1"),
    (build(dropout=1.0), r"model.dropout is 1.0; allowed: a number in \[0, 1\)"),
    (build(encoders={}), "model.encoders is empty; allowed: one field a modality"),
    (build(encoders={"a": {"kind": "smell"}}), "encoders.a.kind is 'smell'; allowed: spectrogram"),
    (build(encoders={"label": {"kind": "vector"}}), "has a modality 'label'; allowed"),
    (build(num_classes=0), "model.num_classes is 0; allowed: an integer >= 1"),
    (lambda: rq.build_model(3), "model is 3; allowed: a mapping of fields"),
    (
        lambda: rq.fold_rotation({"x": {}}, STATE.rotation, query_path=("fusion", "query")),
        "query_path is 'fusion/query'; the parameters have no 'fusion' there",
    ),
    # converters
    (lambda: rq.convert.from_upstream({}), "no tensor has a name of upstream's"),
    (lambda: rq.convert.from_upstream(None), "is a NoneType; allowed: a mapping of names"),
    (lambda: rq.convert.from_upstream({"weight": np.ones(3)}), "no tensor has a name"),
    (lambda: rq.convert.to_upstream({}), "encoders for nothing; upstream has audio, vis"),
    (lambda: rq.convert.upstream_model(dataset="MNIST"), "'MNIST'; allowed: CREMAD, K"),
    (lambda: rq.convert.upstream_model(dataset="CREMAD", fusion_method="late"), "late"),
    (lambda: rq.convert.upstream_batch(ONES((2, 3)), ONES((2, 3, 1, 4, 4))), r"\(2, 3\); allowed"),
    (lambda: rq.convert.load_vit("missing.npz", {}), "missing.npz"),
    # runs
    (lambda: train_and_evaluate(None, "unused"), "config is None; allowed: a mapping of fields"),
    (
        lambda: train_and_evaluate({"seed": 0}, "unused"),
        "config.epochs is missing; allowed: an int",
    ),
    (lambda: train_and_evaluate(default_config(), ""), "workdir is empty; allowed: a folder"),
    (lambda: train_and_evaluate(3, "unused"), "config is 3; allowed: a mapping of fields"),
    (lambda: load_run("nowhere"), "workdir is 'nowhere'; allowed: the folder of a run"),
    (lambda: rq.load("nowhere"), "workdir is 'nowhere'; allowed: the folder of a run"),
    (lambda: rq.load(""), "workdir is ''; allowed: the folder of a run"),
    (lambda: rq.load("nowhere", max_batch_size=3), "max_batch_size is 3; allowed: a power of two"),
    (lambda: rq.load("nowhere", max_batch_size="8"), "max_batch_size is '8'; allowed: a power"),
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
        ({"a": np.ones((2, 3, 3), np.float32)}, r"a has shape \(2, 3, 3\) .*\[batch, feature\]"),
        ({"a": np.ones((2, 5), np.float32)}, "a has 5 numbers a token; allowed: 3"),
        ({"a": np.ones((3, 3), np.float32)}, "numbers of examples: a 3, b 2; allowed: one"),
        ({"a": np.ones((2, 3), bool)}, "a has shape .* and dtype bool; allowed"),
        ({"a": [[1.0, 2.0], [3.0]]}, "a is not an array of numbers"),
        ({"a_mask": np.ones(3, bool)}, "a_mask has shape .*; allowed: bool"),
        ({"a_mask": np.ones(2, np.float32)}, "a_mask has shape .* and dtype float32; allowed"),
        ({"a_mask": np.ones((2, 4), bool)}, r"a_mask has shape \(2, 4\); allowed: \(2, 1\)"),
        ({"a_mask": np.ones((2, 1, 1), bool)}, r"a_mask has shape \(2, 1, 1\)"),
        ({"rotation": jnp.eye(3)[None]}, r"rotation has shape \(1, 3, 3\); allowed"),
        ({"rotation": jnp.eye(8)}, r"rotation has shape \(8, 8\); allowed"),
    ],
)
def test_a_model_names_what_does_not_fit(applied, fields, name):
    with pytest.raises(ValueError, match=name) as caught:
        applied(**fields)
    assert "\n" not in str(caught.value)
