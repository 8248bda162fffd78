"""Upstream's training trajectories, from a small loop of our own around the model.

The loop is written out here, apart from the library's training, so that it shows whether model,
losses, optimiser and method are upstream's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from rollingq_jax import convert
from rollingq_jax.rolling import init_state
from rollingq_jax.train.train_state import learning_rate_schedule
from rollingq_jax.train.upstream import (
    upstream_roll,
    upstream_scores,
    upstream_statistics,
)
from tests.golden_inputs import Golden, golden_files

FILES = golden_files("train_*.npz")
SEEDS = {"batch": 10, "evaluation": 99}


class Run:
    """One trajectory: every epoch's losses, AIR and rolls, and the model at the end."""

    def __init__(self, golden, rotations):
        """Trains as upstream does; `rotations` gives R_new by roll, None the geodesic one."""
        self.golden, config = golden, golden.config
        self.model = convert.upstream_model(**golden.model_arguments())
        self.params, rotation = convert.from_upstream(golden.under("init"))
        steps, self.epochs = int(golden["meta/steps"]), int(golden["meta/epochs"])
        seed = float(golden["meta/seed"])
        self.batches = [self.batch(seed + SEEDS["batch"] + j) for j in range(steps)]
        self.evaluation = self.batch(seed + SEEDS["evaluation"])
        self.schedule = learning_rate_schedule(
            float(golden["meta/lr"]), steps, self.epochs, extra_step=True, clip=False
        )
        self.tx = optax.chain(
            optax.add_decayed_weights(1e-4), optax.sgd(self.schedule, momentum=0.9)
        )
        self.rolls, self.losses, self.airs = [], [], []
        self.attends = rotation is not None
        rolling = init_state(2, config["edim"])._replace(rotation=rotation)
        opt_state, step = self.tx.init(self.params), jax.jit(self.step)
        enabled = "train/roll0_target" in golden
        for _ in range(self.epochs):
            losses = []
            for batch in self.batches:
                self.params, opt_state, loss, scores = step(
                    self.params, opt_state, rolling.rotation, batch
                )
                losses.append(loss)
            self.losses.append(np.mean(losses, axis=0))
            if self.attends:
                self.airs.append(float(scores[0, 0] - scores[0, 1]))
            if not enabled:
                continue
            query, keys = upstream_statistics(
                self.model, self.params, rolling.rotation, self.batches
            )
            given = rotations(golden, len(self.rolls))
            options = {"beta": config["beta"], "rho": config["sigma"]}
            new, info = upstream_roll(
                rolling,
                query,
                keys,
                scores,
                max_rotations=config["r_time"],
                rotation=given,
                **options,
            )
            if info.rolled[0]:
                self.rolls.append((query[0], info, new.rotation[0] @ rolling.rotation[0].T))
            rolling = new
        self.rolling = rolling
        self.final = jax.jit(self.forward)(self.params, rolling.rotation, self.evaluation)

    def batch(self, seed):
        audio, video, label = self.golden.inputs(seed)
        return {**convert.upstream_batch(audio, video), "label": jnp.asarray(label)}

    def forward(self, params, rotation, batch):
        return self.model.apply({"params": params}, batch, rotation=rotation)

    def step(self, params, opt_state, rotation, batch):
        def loss(params):
            logits, out = self.forward(params, rotation, batch)
            heads = (logits, out["probe_logits"]["audio"], out["probe_logits"]["visual"])
            losses = jnp.stack(
                [
                    optax.softmax_cross_entropy_with_integer_labels(z, batch["label"]).mean()
                    for z in heads
                ]
            )
            return losses.sum(), (losses, upstream_scores(out) if self.attends else None)

        grads, (losses, scores) = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = self.tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, losses, scores


def stored(golden, index):
    """Upstream's SVD rotation of a roll, None beyond the last one."""
    name = f"train/roll{index}_rotation"
    return jnp.asarray(golden[name])[None] if name in golden else None


def geodesic(golden, index):
    return None


@pytest.fixture(scope="module", params=FILES, ids=lambda path: path.stem)
def run(request):
    return Run(Golden(request.param), stored)


def close(name, value, expected, atol):
    error = np.max(np.abs(np.asarray(value, np.float64) - expected))
    print(f"{name}: {error:.1e}")
    assert error <= atol, name


def test_losses_and_outputs(run):
    golden, (logits, out) = run.golden, run.final
    close("epoch_losses", run.losses, golden["train/epoch_losses"], 1e-5)
    close("logits", logits, golden["final/eval_logits"], 1e-5)
    close("probe_a", out["probe_logits"]["audio"], golden["final/eval_probe_a"], 1e-5)
    close("probe_v", out["probe_logits"]["visual"], golden["final/eval_probe_v"], 1e-5)
    if run.attends:
        close("q_cls", out["query"][:, 0], golden["final/q_cls"], 1e-5)


def test_parameters_and_rotation(run):
    golden = run.golden
    if not run.attends:
        assert run.rolling.rotation is None
        return
    final = convert.to_upstream(run.params, run.rolling.rotation)
    close("w_qs", final["fusion_module.attn.w_qs.weight"], golden["final/w_qs"], 1e-5)
    close("cls_token", final["fusion_module.cls_token"], golden["final/cls_token"], 1e-5)
    close("rotate", final["fusion_module.rotate"], golden["final/rotate"], 1e-5)


def test_learning_rate_at_the_end_of_each_epoch(run):
    """The rate that the epoch's last scheduler call but one left: that of the step after it."""
    steps = len(run.batches)
    with_extra_step = [(epoch + 1) * steps + epoch for epoch in range(run.epochs)]
    schedule = learning_rate_schedule(float(run.golden["meta/lr"]), steps, run.epochs, clip=False)
    plain = learning_rate_schedule(1.0, steps, run.epochs, extra_step=True, clip=False)
    close("lr", [schedule(s) for s in with_extra_step], run.golden["final/lr_last"], 1e-8)
    assert float(plain(steps)) == pytest.approx(float(schedule(steps + 1)) / run.golden["meta/lr"])


def test_imbalance_and_rolls(run):
    golden, printed = run.golden, []
    for line in str(golden["train/air_txt"]).splitlines():
        try:
            printed.append(float(line))
        except ValueError:
            assert line.startswith(("weight for A", "Set Rotary Matrix at"))
    np.testing.assert_allclose(run.airs, printed, atol=0.00501)
    assert len(run.rolls) == golden["train/rotations"]
    for index, (query, info, _) in enumerate(run.rolls):
        target = golden[f"train/roll{index}_target"]
        close("target", info.anchor[0], target, 1e-6)
        close("R q_bar", golden[f"train/roll{index}_rotation"] @ np.asarray(query), target, 1e-6)


@pytest.mark.parametrize(
    "path", [p for p in FILES if "noroll" not in p.stem], ids=lambda path: path.stem
)
def test_geodesic_rotation_reaches_the_target(path):
    golden = Golden(path)
    query, info, new = Run(golden, geodesic).rolls[0]
    close("R q_bar", np.asarray(new) @ np.asarray(query), golden["train/roll0_target"], 1e-6)
    assert np.linalg.slogdet(np.float64(new))[0] == 1
