"""Whole runs: resuming to the last bit, the best checkpoint, the test set read once."""

import json
import shutil

import jax
import numpy as np
import optax
import pytest
from etils import epath
from sklearn.metrics import f1_score

from rollingq_jax.data.dataset import SAMPLED
from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import CheckpointError, ConfigError, DataError, NonFiniteError, UserError
from rollingq_jax.models import build_model
from rollingq_jax.models.layers import dense_attention
from rollingq_jax.train import checkpoint, loop
from rollingq_jax.train.checkpoint import Checkpoints, to_host
from rollingq_jax.train.config import from_json
from rollingq_jax.train.experiment import Experiment, resolve_config
from rollingq_jax.train.loop import load_run, train_and_evaluate
from rollingq_jax.train.preemption import Interrupted, Interruption
from rollingq_jax.train.workdir import locked
from tests.train.train_cases import files, make_arrays, read_metrics, tiny_config, write_arrays

LAST = 18


def state_at(config, workdir, step):
    """Everything in the checkpoint of a step, by path, and its record."""
    run = Experiment(config, load_dataset(config.data, seed=config.seed))
    with Checkpoints(epath.Path(workdir) / "checkpoints", read_only=True) as checkpoints:
        state, record = checkpoints.restore(step, run.abstract_state())
    leaves = jax.tree_util.tree_leaves_with_path(to_host(state))
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}, record


def assert_same_result(config, first, second, step=LAST):
    """Two folders hold the same final state, rows and rotations, to the last bit."""
    (ours, record), (theirs, other) = (state_at(config, w, step) for w in (first, second))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_array_equal(value, theirs[name], err_msg=name)
    assert record["best"] == other["best"]
    assert read_metrics(first) == read_metrics(second)
    folders = [sorted(w.glob("rotations/*.npz")) for w in (first, second)]
    assert [p.name for p in folders[0]] == [p.name for p in folders[1]]
    for ours, theirs in zip(*folders, strict=True):
        with np.load(ours) as a, np.load(theirs) as b:
            for name in a.files:
                np.testing.assert_array_equal(a[name], b[name])


@pytest.fixture(scope="module")
def finished(arrays, tmp_path_factory):
    """A run that nothing disturbed: config, folder, summary."""
    config, workdir = tiny_config(arrays), tmp_path_factory.mktemp("undisturbed") / "run"
    return config, workdir, train_and_evaluate(config, workdir)


@pytest.fixture(scope="module")
def often(arrays, tmp_path_factory):
    """The same with a trigger that is checked within epochs and between rows."""
    config = tiny_config(arrays, log_every=5, **{"rolling.check_every": 4, "rolling.window": 0.5})
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    train_and_evaluate(config, workdir)
    return config, workdir


def test_n_steps_a_restart_and_n_more_are_2n_steps(finished, tmp_path):
    """The stop is in the middle of an epoch and between two rows."""
    config, undisturbed, summary = finished
    with pytest.raises(Interrupted, match=f"stopped at step {LAST // 2}, which is saved"):
        train_and_evaluate(config, tmp_path, max_steps=LAST // 2)
    assert max(row["step"] for row in read_metrics(tmp_path)) <= LAST // 2
    again = train_and_evaluate(config, tmp_path)
    assert_same_result(config, undisturbed, tmp_path)
    for name in ("test_accuracy", "test_loss", "best", "rotations", "attention_share"):
        assert again[name] == summary[name]


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, None])
def test_rotations_used_up_are_told_once(arrays, tmp_path, capsys, limit):
    """One rotation after epoch 1 of 3, none after; with beta 0 every imbalance stands above it."""
    config = tiny_config(arrays, **{"rolling.max_rotations": limit})
    summary = train_and_evaluate(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "valid"]
    assert [row["rotations"] for row in rows] == {1: [1] * 3, None: [1, 2, 3]}[limit]
    told = capsys.readouterr().out
    if limit == 1:
        assert all(row["rotations_used_up"] for row in rows)
        expected = {"epoch": 1, "imbalance": rows[0]["imbalance"]}
        assert summary["rotations_used_up"] == expected
        assert json.loads((tmp_path / "summary.json").read_text())["rotations_used_up"] == expected
        assert told.count("no rotations are left") == 1
        assert "all rotations used, imbalance above beta" in told
    else:
        assert "rotations_used_up" not in summary and "no rotations" not in told
        assert not any("rotations_used_up" in row for row in rows)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["rolling"]["max_rotations"] == limit
    assert train_and_evaluate(from_json(stored), tmp_path, quiet=True) == summary


@pytest.mark.slow
def test_a_restart_between_a_roll_and_its_row(often, tmp_path):
    config, undisturbed = often
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=9)  # rolled after 8; the next row is at 10
    train_and_evaluate(config, tmp_path)
    assert [row["step"] for row in read_metrics(tmp_path) if row["split"] == "roll"][0] == 4
    assert_same_result(config, undisturbed, tmp_path)


@pytest.mark.slow
def test_saves_by_steps_and_by_minutes_change_nothing(often, tmp_path):
    config, undisturbed = often
    config = config.copy_and_resolve_references()
    saves = {"every_steps": 4, "every_minutes": 1e-9, "keep": 1, "every_epochs": 2}
    config.checkpoint.update(saves)
    saved = []

    class Watched(Checkpoints):
        def save(self, state, record):
            super().save(state, record)
            saved.append(record["best"]["step"])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "Checkpoints", Watched)
        train_and_evaluate(config, tmp_path)
    assert len(saved) == LAST
    assert_same_result(config, undisturbed, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("stop", [9, None])
def test_a_run_does_not_go_on_with_other_data(tmp_path, stop):
    """Whether it was stopped or has ended: the same shapes, moved or changed in place."""
    config = tiny_config(tmp_path / "data.npz")
    write_arrays(tmp_path / "data.npz")
    if stop:
        with pytest.raises(Interrupted):
            train_and_evaluate(config, tmp_path / "run", max_steps=stop)
    else:
        train_and_evaluate(config, tmp_path / "run", quiet=True)
    before = files(tmp_path / "run")
    write_arrays(tmp_path / "data.npz", seed=1)
    with pytest.raises(CheckpointError, match=r"the data's test/a has other values .* allowed"):
        train_and_evaluate(config, tmp_path / "run")
    assert files(tmp_path / "run") | {".lock": before[".lock"]} == before
    write_arrays(tmp_path / "moved.npz")
    config.data.path = str(tmp_path / "moved.npz")
    assert train_and_evaluate(config, tmp_path / "run", quiet=True)["best"]["step"] > 0


def test_what_is_not_defined_is_null_in_the_summary(tmp_path):
    """The accuracy of a class that the test split lacks."""
    arrays = make_arrays()
    np.savez(tmp_path / "data.npz", **arrays | {"test/label": arrays["test/label"] % 2})
    made = train_and_evaluate(tiny_config(tmp_path / "data.npz"), tmp_path / "run", quiet=True)
    read = json.loads((tmp_path / "run" / "summary.json").read_text(), parse_constant=pytest.fail)
    assert read == made and read["per_class"]["2"]["accuracy"] is None


def test_the_extra_pass_is_for_one_process(arrays, tmp_path, monkeypatch):
    config = tiny_config(arrays, **{"upstream_compat.statistics_pass": True})
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match="statistics_pass is True; allowed in 2 processes: False"):
        Experiment(config, load_dataset(config.data, seed=0))


def test_a_wrong_file_of_weights_leaves_the_folder_free(arrays, tmp_path):
    config = tiny_config(arrays, vit_weights=str(tmp_path / "nowhere.npz"))
    with pytest.raises(UserError, match=r"nowhere\.npz"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "metric, row, better",
    [
        ("accuracy", {"accuracy": 0.6, "loss": 9.0}, True),
        ("accuracy", {"accuracy": 0.5, "loss": 0.1}, False),  # of equals the first
        ("loss", {"accuracy": 0.1, "loss": 0.9}, True),
        ("loss", {"accuracy": 0.9, "loss": 1.0}, False),
        ("macro_f1", {"accuracy": 0.9, "macro_f1": 0.3}, False),
    ],
)
def test_a_better_row_is_higher_or_of_lower_loss(metric, row, better):
    best = {"step": 6, "epoch": 1, "accuracy": 0.5, "loss": 1.0, "macro_f1": 0.4}
    assert loop.improves(row, best, metric) == better
    assert loop.improves(row, loop.NO_BEST, metric)


@pytest.mark.slow
def test_patience_ends_training_and_a_continuation_at_the_same_step(arrays, tmp_path, capsys):
    config = tiny_config(arrays, epochs=8, patience=1, best_by="macro_f1")
    whole = train_and_evaluate(config, tmp_path / "whole")
    told = " ".join(capsys.readouterr().out.split())  # lines are folded
    step, epoch = whole["stopped_early"]["step"], whole["stopped_early"]["epoch"]
    rows = read_metrics(tmp_path / "whole")
    scores = [row["macro_f1"] for row in rows if row["split"] == "valid"]
    gains = [b > a for a, b in zip(scores, scores[1:], strict=False)]
    assert gains[:-1] == [True] * (epoch - 2) and not gains[-1] and epoch < 8 and step == 6 * epoch
    assert rows[-1]["split"] == "test" and rows[-1]["step"] == step
    assert whole["best"]["epoch"] == epoch - 1 and whole["best"]["macro_f1"] == scores[-2]
    assert told.count("config.patience is 1: training ends") == 1
    assert "best epoch by validation macro F1" in told and "training ended early" in told
    run = load_run(tmp_path / "whole")
    source = run.dataset.splits["valid"]
    batch = {n: np.stack([source[i][n] for i in range(len(source))]) for n in source[0]}
    predicted = np.asarray(run.model.apply(run.variables, batch, run.rotation)[0]).argmax(-1)
    assert f1_score(batch["label"], predicted, average="macro") == pytest.approx(scores[-2])

    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "cut", max_steps=step - 3)
    found = train_and_evaluate(config, tmp_path / "cut", test=False)
    assert found == {"best": whole["best"]}
    again = train_and_evaluate(config, tmp_path / "cut")  # reads the test data, trains nothing
    assert_same_result(config, tmp_path / "whole", tmp_path / "cut", step)
    assert again["stopped_early"] == whole["stopped_early"]
    assert again["test_loss"] == whole["test_loss"]


@pytest.fixture
def standard_promotion():
    """Optax's AdamW raises a float to an int32 power."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_averaged_parameters_resume_and_are_what_is_evaluated_and_read_back(arrays, tmp_path):
    """With batches in parts, weighted classes and layers, decay on kernels: 3 epochs of 3 steps."""
    optimizer = {
        "name": "adamw",
        "ema_decay": 0.8,
        "layer_decay": 0.9,
        "weight_decay_on": "kernels",
    }
    config = tiny_config(arrays, batch_size=16, micro_batches=2, class_weights=("balanced",))
    config.optimizer.update(optimizer)
    whole = train_and_evaluate(config, tmp_path / "whole")
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "cut", max_steps=5)
    train_and_evaluate(config, tmp_path / "cut")
    assert_same_result(config, tmp_path / "whole", tmp_path / "cut", step=9)
    run = load_run(tmp_path / "whole")
    state, _ = state_at(config, tmp_path / "whole", run.step)
    for path, leaf in jax.tree_util.tree_leaves_with_path(run.params):
        name = jax.tree_util.keystr(path)
        np.testing.assert_array_equal(leaf, state["['ema']" + name])
    assert np.abs(run.params["fusion"]["cls"] - state["['params']['fusion']['cls']"]).max() > 1e-4
    source = run.dataset.splits["test"]
    rows = [source[i] for i in range(len(source))]
    logits, _ = run.model.apply(
        run.variables,
        {name: np.stack([row[name] for row in rows]) for name in rows[0]},
        run.rotation,
    )
    label = np.array([row["label"] for row in rows])
    assert whole["test_accuracy"] == np.mean(np.asarray(logits).argmax(-1) == label)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, label)
    assert whole["test_loss"] == pytest.approx(float(losses.mean()), abs=1e-5)


@pytest.mark.slow
def test_a_stop_in_the_middle_of_a_validation(finished, tmp_path):
    class Impatient(Interruption):
        """Stops in the second batch of the second validation."""

        calls = 0

        def check(self):
            self.calls += 1
            if self.calls == 5:
                raise Interrupted

    config, undisturbed, _ = finished
    with pytest.raises(Interrupted, match="stopped at step 12"):
        train_and_evaluate(config, tmp_path, interruption=Impatient())
    steps = [row["step"] for row in read_metrics(tmp_path) if row["split"] == "valid"]
    assert steps == [6]
    train_and_evaluate(config, tmp_path)
    assert_same_result(config, undisturbed, tmp_path)


def test_best_checkpoint_is_the_first_of_the_best_by_validation(finished):
    config, workdir, summary = finished
    valid = [row for row in read_metrics(workdir) if row["split"] == "valid"]
    best = max(valid, key=lambda row: row["accuracy"])  # the first of equals
    assert [row["step"] for row in valid] == [6, 12, 18]
    assert summary["best"] == {n: best[n] for n in ("step", "epoch", "accuracy")}
    kept = {int(path.name) for path in (workdir / "checkpoints").iterdir()}
    assert kept == {12, 18, best["step"]}  # the newest two, and the best


def test_summary_holds_what_the_best_checkpoint_answers(finished, arrays):
    _, workdir, summary = finished
    run = load_run(workdir)
    assert run.step == summary["best"]["step"]
    source = run.dataset.splits["test"]
    rows = [source[i] for i in range(len(source))]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    logits, _ = run.model.apply({"params": run.params}, batch, rotation=run.rotation)
    predicted = np.asarray(logits).argmax(-1)
    assert summary["test_accuracy"] == np.mean(predicted == batch["label"])
    assert sum(c["examples"] for c in summary["per_class"].values()) == len(rows)


def test_rows_of_metrics(finished):
    config, workdir, summary = finished
    rows = read_metrics(workdir, times=True)
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [4, 6, 8, 12, 16, 18]
    assert [row["split"] for row in rows].count("test") == 1
    assert rows[-1]["split"] == "test" and rows[-1]["accuracy"] == summary["test_accuracy"]
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    names = {"probe_accuracy/a", "imbalance", "air", "cosine/b", "attention_share/a", "loss"}
    for row in rows:
        if row["split"] == "roll":
            assert row["step"] % 6 == 0 and row["imbalance_before"] > 0
        else:
            assert names <= row.keys()
            share = row["attention_share/a"] + row["attention_share/b"]
            np.testing.assert_allclose(share, 1.0, rtol=1e-6)
    valid = [row for row in rows if row["split"] == "valid"]
    rolls = [row["step"] for row in rows if row["split"] == "roll"]
    assert [row["rotations"] for row in valid] == [
        sum(at <= row["step"] for at in rolls) for row in valid
    ]
    assert all(row["seconds"] > 0 for row in valid)


def test_what_a_run_leaves(finished):
    _, workdir, _ = finished
    for name in ("config.json", "metrics.jsonl", "summary.json", "report.html"):
        assert (workdir / name).stat().st_size > 0
    assert list((workdir / "figures").glob("*.png"))
    assert list((workdir / "tensorboard").glob("events.out.tfevents.*"))
    assert not list(workdir.rglob("*.tmp"))
    config = json.loads((workdir / "config.json").read_text())
    assert config["model"]["num_classes"] == 3 and set(config["model"]["encoders"]) == {"a", "b"}


def test_a_second_run_of_a_finished_folder_changes_nothing(finished, capsys):
    config, workdir, summary = finished
    before = files(workdir)
    assert train_and_evaluate(config, workdir) == summary
    assert files(workdir) == before
    assert "test accuracy" in capsys.readouterr().out


def test_another_model_in_the_folder_is_refused(finished):
    config, workdir, _ = finished
    before = files(workdir)
    other = config.copy_and_resolve_references()
    other.model.dim, other.optimizer.name = 16, "lion"
    line = r"config.model.dim is 16 and was 8; config.optimizer.name is 'lion' and was 'sgd'"
    with pytest.raises(CheckpointError, match=line):
        train_and_evaluate(other, workdir)
    assert files(workdir) == before


def test_checkpoints_of_another_model_are_refused(finished, tmp_path):
    """The configuration in the folder agrees, that in the checkpoint does not."""
    config, workdir, _ = finished
    (tmp_path / "checkpoints").symlink_to(workdir / "checkpoints")
    other = config.copy_and_resolve_references()
    other.model.fusion = "concat"
    run = Experiment(other, load_dataset(other.data, seed=0))
    (tmp_path / "config.json").write_text(json.dumps(run.config.to_dict()))
    before = files(workdir)
    with pytest.raises(
        CheckpointError, match="config.model.fusion is 'concat' and was 'attention'"
    ):
        train_and_evaluate(other, tmp_path)
    assert files(workdir) == before


def test_other_data_than_the_checkpoint_saw_are_refused(finished, tmp_path):
    config, _, _ = finished
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path / "run", max_steps=2)
    np.savez(tmp_path / "more.npz", **make_arrays(sizes={"train": 45, "valid": 18, "test": 20}))
    other = config.copy_and_resolve_references()
    other.data.path = str(tmp_path / "more.npz")
    with pytest.raises(CheckpointError, match="'train' has 45 examples and had 44"):
        train_and_evaluate(other, tmp_path / "run")


def test_a_folder_in_use_is_refused(arrays, tmp_path):
    with locked(epath.Path(tmp_path)):
        before = files(tmp_path)
        with pytest.raises(CheckpointError, match=r"in use by another run \(process \d+ on .+\)"):
            train_and_evaluate(tiny_config(arrays), tmp_path)
        assert files(tmp_path) == before


class Failing:
    """A source of which the reads number `first` to `last` are changed."""

    def __init__(self, source, change, *, first, last=10**6):
        self.source, self.change, self.first, self.last = source, change, first, last
        self.reads = 0

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        self.reads += 1
        example = self.source[index]
        return self.change(example) if self.first <= self.reads <= self.last else example

    def load(self, config_data, **options):
        """The data set with this as its training split, in place of `load_dataset`."""
        dataset = load_dataset(config_data, **options)
        self.source = dataset.splits["train"]
        dataset.splits["train"] = self
        return dataset


def gone(example):
    raise FileNotFoundError(2, "No such file or directory", "/data/clip_17.wav")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "line"),
    [
        (gone, "data: /data/clip_17.wav: No such file or directory"),
        (lambda e: e | {"label": np.int32(7)}, r"batch: 'label' holds 7; allowed: 0 to 2"),
        (lambda e: {n: v for n, v in e.items() if n != "a"}, "field a: some examples have it"),
    ],
)
def test_data_that_fail_in_the_middle(arrays, tmp_path, monkeypatch, change, line):
    """In the second epoch: the first reads 48 rows, shapes and signature some 34."""
    config = tiny_config(arrays)
    config.data.prefetch = 0
    monkeypatch.setattr(loop, "load_dataset", Failing(None, change, first=104).load)
    with pytest.raises(DataError, match=f"{line}.*; the last good checkpoint is of step 6"):
        train_and_evaluate(config, tmp_path)
    monkeypatch.undo()
    assert state_at(config, tmp_path, 6)[1]["best"]["step"] == 6


def test_a_loss_that_is_not_finite_stops_the_run(arrays, tmp_path):
    config = tiny_config(arrays, **{"optimizer.learning_rate": 1e30, "checkpoint.every_steps": 2})
    line = r"step 3: loss and \d+ others is NaN or infinite; the last good checkpoint is of step 2"
    with pytest.raises(NonFiniteError, match=line):
        train_and_evaluate(config, tmp_path)
    state, _ = state_at(config, tmp_path, 2)
    assert all(np.isfinite(leaf).all() for leaf in state.values() if leaf.dtype.kind == "f")


@pytest.mark.slow
def test_updates_that_are_not_finite_can_be_skipped(arrays, tmp_path, monkeypatch, capsys):
    """One example of the second epoch is infinite: its batch is skipped, in the middle of it."""
    at = SAMPLED + 70
    source = Failing(None, lambda e: e | {"b": e["b"] * np.float32(np.inf)}, first=at, last=at)
    monkeypatch.setattr(loop, "load_dataset", source.load)
    config = tiny_config(arrays, nonfinite="skip")
    config.data.prefetch = 0
    with pytest.raises(Interrupted):
        train_and_evaluate(config, tmp_path, max_steps=9)
    summary = train_and_evaluate(config, tmp_path)
    rows = [row for row in read_metrics(tmp_path) if row["split"] == "train"]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert all(np.isfinite(row["loss"]) for row in rows) and np.isfinite(summary["test_loss"])
    assert "step 12: skipped 1 updates" in capsys.readouterr().out


@pytest.mark.slow
def test_model_optimizer_data_and_callbacks_may_come_from_outside(arrays, tmp_path):
    config = tiny_config(arrays, epochs=1, **{"optimizer.warmup_epochs": 0.5})
    dataset = load_dataset(config.data, seed=config.seed)
    config.data.path = str(tmp_path / "nowhere.npz")  # not read
    traced, told = [], []

    def attention_fn(*args, **options):
        traced.append(1)
        return dense_attention(*args, **options)

    train_and_evaluate(
        config,
        tmp_path / "run",
        model=build_model(resolve_config(config, dataset).model, attention_fn),
        tx=optax.chain(optax.clip(1.0), optax.sgd(0.05)),  # two states, none of which has a trace
        dataset=dataset,
        callbacks=[lambda step, scalars: told.append((step, scalars))],
        quiet=True,
    )
    rows = read_metrics(tmp_path / "run", times=True)
    assert traced and not any("learning_rate" in row for row in rows)
    assert [step for step, _ in told] == [row["step"] for row in rows]
    for (_, scalars), row in zip(told, rows, strict=True):
        assert row["split"] == "roll" or scalars[f"{row['split']}/accuracy"] == row["accuracy"]
    with Checkpoints(epath.Path(tmp_path) / "run" / "checkpoints", read_only=True) as checkpoints:
        like = Experiment(config, dataset).abstract_state()
        with pytest.raises(
            CheckpointError, match="opt_state/.*trace.* is absent; allowed: float32"
        ):
            checkpoints.restore(checkpoints.steps()[0], like)


def test_a_full_disk(arrays, tmp_path, monkeypatch):
    free = iter([10**9, 10**9, 3])
    usage = type("Usage", (), {})

    def disk_usage(path):
        usage.free = next(free)
        return usage

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", disk_usage)
    config = tiny_config(arrays, **{"checkpoint.every_steps": 3})
    line = r"not saved \(No space left on device: .* and 3 are free\); the last good .* of step 6"
    with pytest.raises(CheckpointError, match=line):
        train_and_evaluate(config, tmp_path)
    assert state_at(config, tmp_path, 6)[1]["best"]["step"] == 6


class Exhausted:
    """A training step for which the memory does not suffice."""

    def __init__(self, error):
        self.error = error

    def __call__(self, *_):
        raise self.error


OUT_OF_MEMORY = "RESOURCE_EXHAUSTED: Out of memory allocating 9876543210 bytes."


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (jax.errors.JaxRuntimeError(OUT_OF_MEMORY), "allocating 9876543210 bytes"),
        (MemoryError(), "MemoryError"),
        (np._core._exceptions._ArrayMemoryError((10**9,), np.dtype("f4")), "Unable to allocate"),
    ],
    ids=["XLA", "Python", "NumPy"],
)
def test_memory_that_is_exhausted_is_one_line_and_the_folder_is_free(
    arrays, tmp_path, monkeypatch, error, reason
):
    config = tiny_config(arrays)
    init = Experiment.__init__

    def exhausted(self, *args, **options):
        init(self, *args, **options)
        self.parallel = self.parallel._replace(train_step=Exhausted(error))

    monkeypatch.setattr(Experiment, "__init__", exhausted)
    line = "memory is exhausted with config.batch_size 8 and config.model.dim 8; allowed: "
    with pytest.raises(ConfigError, match=rf"{line}.*smaller batch_size.*\(.*{reason}"):
        train_and_evaluate(config, tmp_path / "run")
    monkeypatch.undo()
    if isinstance(error, MemoryError):
        return  # what comes after is the same for all
    smaller = tiny_config(arrays, batch_size=16, **{"model.num_heads": 1})
    with pytest.raises(Interrupted):
        train_and_evaluate(smaller, tmp_path / "run", max_steps=1)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["batch_size"] == 16
    with pytest.raises(CheckpointError, match="holds another run: config.batch_size is 8 and was"):
        train_and_evaluate(config, tmp_path / "run")


def test_an_error_that_is_not_of_the_memory_stays_what_it_is(arrays, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.TrainLoop, "run", Exhausted(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        train_and_evaluate(tiny_config(arrays), tmp_path)


@pytest.mark.slow
def test_a_run_that_ended_before_its_first_checkpoint_does_not_own_its_folder(arrays, tmp_path):
    first, second = tiny_config(arrays), tiny_config(arrays, seed=5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.TrainLoop, "train", Exhausted(Interrupted()))
        with pytest.raises(Interrupted):
            train_and_evaluate(first, tmp_path)
    (tmp_path / "rotations").mkdir()
    (tmp_path / "rotations" / "6.npz").write_bytes(b"of the first run")
    with pytest.raises(Interrupted):
        train_and_evaluate(second, tmp_path, max_steps=2)
    assert json.loads((tmp_path / "config.json").read_text())["seed"] == 5
    assert not (tmp_path / "rotations").exists()
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(path.with_name(f"{path.name}.damaged"))  # what is damaged is the run's, too
    with pytest.raises(CheckpointError, match="config.seed is 0 and was 5"):
        train_and_evaluate(first, tmp_path)


@pytest.mark.parametrize("epochs", [2, 6])
def test_a_finished_run_asked_for_other_epochs_says_what_can_be_done(finished, epochs):
    config, workdir, _ = finished
    before = files(workdir)
    other = config.copy_and_resolve_references()
    other.epochs = epochs
    line = (
        f"config.epochs is {epochs} and was 3; allowed: the 3 epochs with which it began, or "
        f"another workdir, in which all {epochs} are trained from the start: a run cannot be made "
        "longer, since the learning rate falls to 0"
    )
    with pytest.raises(CheckpointError, match=line):
        train_and_evaluate(other, workdir)
    assert files(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize("stop", [9, None])
def test_data_given_by_a_relative_path_are_found_from_another_folder(tmp_path, monkeypatch, stop):
    """And the place to which they were moved is remembered, if they are the same there."""
    for name in ("here", "elsewhere"):
        (tmp_path / name).mkdir()
    write_arrays(tmp_path / "here" / "data.npz")
    monkeypatch.chdir(tmp_path / "here")
    workdir = tmp_path / "run"
    config = tiny_config("data.npz", **{"data.cache_dir": "cache"})

    def place():
        return json.loads((workdir / "config.json").read_text())["data"]["path"]

    def train(path=None):
        if path is not None:
            config.data.path = str(path)
        try:
            return train_and_evaluate(config, workdir, max_steps=stop, quiet=True)
        except Interrupted:
            return None

    made = train()
    stored = json.loads((workdir / "config.json").read_text())
    assert place() == str(tmp_path / "here" / "data.npz") and config.data.path == "data.npz"
    assert stored["data"]["cache_dir"] == str(tmp_path / "here" / "cache")
    monkeypatch.chdir(tmp_path / "elsewhere")
    stop = 12 if stop else None
    train(place())
    shutil.move(tmp_path / "here" / "data.npz", "moved.npz")
    write_arrays("other.npz", seed=1)
    before = files(workdir)
    with pytest.raises(CheckpointError, match="has other values"):
        train("other.npz")
    assert {n: v for n, v in files(workdir).items() if n != ".lock"} == {
        n: v for n, v in before.items() if n != ".lock"
    }
    stop = 14 if stop else None
    again = train("moved.npz")
    assert place() == str(tmp_path / "elsewhere" / "moved.npz")
    if made is not None:
        assert again["config"]["data"]["path"] == place()
        assert again == json.loads((workdir / "summary.json").read_text())
        assert again["test_accuracy"] == made["test_accuracy"]


@pytest.mark.slow
def test_a_workdir_whose_name_reads_as_a_pattern(finished, tmp_path):
    config, undisturbed, summary = finished
    workdir = tmp_path / "[lr=0.1]" / "a*" / "b?"
    with pytest.raises(Interrupted):
        train_and_evaluate(config, workdir, max_steps=7)
    assert train_and_evaluate(config, workdir)["test_loss"] == summary["test_loss"]
    assert_same_result(config, undisturbed, workdir)


@pytest.mark.slow
def test_a_plain_twin_is_the_same_run_without_rotations(finished, tmp_path):
    config, undisturbed, summary = finished
    beside = tiny_config(config.data.path, plain_twin=True)
    again = train_and_evaluate(beside, tmp_path / "run")
    assert read_metrics(tmp_path / "run") == read_metrics(undisturbed)
    assert again["test_accuracy"] == summary["test_accuracy"]
    plain = tiny_config(config.data.path, **{"rolling.enabled": False})
    train_and_evaluate(plain, tmp_path / "plain", test=False)
    twin = read_metrics(tmp_path / "run" / "plain")
    assert twin == read_metrics(tmp_path / "plain")
    assert {row["split"] for row in twin} == {"train", "valid"}  # no test data, no rotations
    verdicts = [line.partition("?")[0] for line in again["verdicts"]]
    assert verdicts == ["Is attention biased", "Did the rolls last", "Did accuracy follow"]
    assert "without rotations" in again["verdicts"][0]
