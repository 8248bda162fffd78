"""Batches are checked before they reach a device, and read by as many threads as are asked for."""

import threading

import jax
import numpy as np
import pytest

from rollingq_jax.data.dataset import ArraySource, Dataset, ModalityInfo
from rollingq_jax.data.load import load_dataset
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.train.experiment import CheckedBatches, Experiment
from tests.train.train_cases import make_arrays, tiny_config

ROWS = 4
GOOD = {
    "a": np.zeros((ROWS, 5, 3), np.float32),
    "a_mask": np.ones((ROWS, 5), bool),
    "b": np.zeros((ROWS, 8, 8, 3), np.uint8),
    "b_mask": np.ones(ROWS, bool),
    "c": np.arange(ROWS * 2, dtype=np.int32).reshape(ROWS, 2),
    "label": np.arange(ROWS, dtype=np.int32) % 3,
    "example_mask": np.ones(ROWS, bool),
    "quality_a": np.zeros(ROWS, np.float32),
}


def feed(*batches):
    infos = {
        "a": ModalityInfo("a", "sequence", (5, 3)),
        "b": ModalityInfo("b", "image", (8, 8, 3), "uint8"),
        "c": ModalityInfo("c", "tokens", (2,), "int32", vocab_size=8),
    }
    source = ArraySource({"label": np.zeros(1, np.int32)})
    dataset = Dataset({"train": source, "test": source}, infos, num_classes=3)
    return CheckedBatches(iter(batches), dataset, ("a", "b", "c"), ROWS)


def changed(**fields):
    """The good batch with other fields; None takes one away."""
    return {name: value for name, value in (GOOD | fields).items() if value is not None}


def test_good_batches_pass_unchanged():
    batches = [changed(), changed(a=np.ones((ROWS, 5, 3), np.float32))]
    for got, given in zip(feed(*batches), batches, strict=True):
        assert got is given


def test_masks_and_quality_may_be_absent():
    assert list(feed(changed(a_mask=None, b_mask=None, quality_a=None)))


NAN = np.zeros((ROWS, 5, 3), np.float32)
NAN[1, 2, 0] = np.nan


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"a": None}, "'a' is missing; allowed: a, b, c, label and example_mask, found a_mask, b"),
        ({"label": None}, "'label' is missing"),
        ({"example_mask": None}, "'example_mask' is missing"),
        ({"a": GOOD["a"][:, :4]}, r"'a' is float32\[4, 4, 3\]; allowed: float32\[4, 5, 3\]"),
        ({"a": GOOD["a"].astype(np.float64)}, r"'a' is float64\[4, 5, 3\]; allowed: float32"),
        ({"a": NAN}, "'a' holds NaN or infinity; allowed: finite numbers"),
        ({"b": GOOD["b"].astype(np.float32)}, r"'b' is float32\[4, 8, 8, 3\]; allowed: uint8"),
        ({"a_mask": np.ones((ROWS, 4), bool)}, r"allowed: bool\[4\] or bool\[4, 5\]"),
        ({"a_mask": np.ones((ROWS, 5), np.int32)}, r"'a_mask' is int32\[4, 5\]; allowed: bool"),
        ({"b_mask": np.ones((ROWS, 8), bool)}, r"'b_mask' is bool\[4, 8\]; allowed: bool\[4\]$"),
        ({"c": GOOD["c"] + 1}, r"'c' holds 8; allowed: 0 to 7 \(vocab_size 8\)"),
        ({"c": GOOD["c"] - 1}, "'c' holds -1; allowed: 0 to 7"),
        ({"c": GOOD["c"].astype(np.int64)}, r"'c' is int64\[4, 2\]; allowed: int32"),
        ({"label": GOOD["label"][:, None]}, r"'label' is int32\[4, 1\]; allowed: int32\[4\]"),
        ({"label": GOOD["label"].astype(np.int64)}, r"'label' is int64\[4\]; allowed: int32"),
        ({"label": GOOD["label"] + 1}, r"'label' holds 3; allowed: 0 to 2 \(3 classes\)"),
        ({"label": GOOD["label"] - 1}, "'label' holds -1; allowed: 0 to 2"),
        ({"example_mask": np.ones(ROWS, np.float32)}, "'example_mask' is float32"),
        ({"quality_a": np.zeros((ROWS, 1), np.float32)}, "'quality_a' is float32"),
    ],
)
def test_the_first_batch_is_checked_whole(fields, line):
    with pytest.raises(DataError, match=line):
        next(feed(changed(**fields)))


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        (
            {"a": GOOD["a"][:3]},
            r"'a' is float32\[3, 5, 3\]; allowed: float32\[4, 5, 3\], as in the",
        ),
        ({"a_mask": None}, r"'a_mask' is absent; allowed: bool\[4, 5\]"),
        ({"extra": np.zeros(ROWS)}, r"'extra' is float64\[4\]; allowed: absent"),
        ({"label": GOOD["label"] + 5}, "'label' holds 7"),
        ({"c": GOOD["c"] + 5}, "'c' holds 12"),
    ],
)
def test_later_batches_are_like_the_first(fields, line):
    batches = feed(changed(), changed(**fields))
    next(batches)
    with pytest.raises(DataError, match=line):
        next(batches)


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (FileNotFoundError(2, "No such file or directory", "/data/1.wav"), "/data/1.wav: No such"),
        (PermissionError(13, "Permission denied", "/data/1.wav"), "/data/1.wav: Permission denied"),
        (OSError("disk is on fire"), "data: disk is on fire"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(error, line):
    def batches():
        yield changed()
        raise error

    reading = feed()
    reading._batches = batches()
    next(reading)
    with pytest.raises(DataError, match=line):
        next(reading)


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "tiny.npz", **make_arrays())
    return tmp_path / "tiny.npz"


def make_run(path, **fields):
    config = tiny_config(path, **fields)
    dataset = load_dataset(config.data, seed=config.seed)
    return Experiment(config, dataset)


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"micro_batches": 2}, "micro_batches is 2; allowed: a divisor of the .* which are 1"),
        (
            {"micro_batches": 3, "batch_size": 24, "baseline.name": "pmr"},
            "micro_batches is 3; allowed with baseline.name 'pmr': 1, since it compares",
        ),
        (
            {
                "micro_batches": 3,
                "batch_size": 24,
                "model.quality_bias": 1.0,
                "model.quality_shuffled": True,
            },
            "micro_batches is 3; allowed with model.quality_shuffled True: 1",
        ),
        ({"class_weights": (1.0, 2.0)}, "class_weights has 2 numbers; allowed: .* which is 3, or"),
    ],
)
def test_parts_and_weights_that_do_not_fit_are_refused(path, fields, line):
    with pytest.raises(ConfigError, match=line):
        make_run(path, **fields).prepare()


def test_balanced_weights_are_inverse_frequencies(path):
    """44 labels of three classes: 15, 15, 14; of a fourth that the model has, none."""
    run = make_run(path, class_weights=("balanced",), **{"model.num_classes": 4})
    np.testing.assert_allclose(run.class_weights, [44 / 60, 44 / 60, 44 / 56, 1.0], rtol=1e-6)
    assert make_run(path).class_weights is None
    run = make_run(path, class_weights=(1, 2, 0.5))
    np.testing.assert_array_equal(run.class_weights, [1, 2, 0.5])


class Meeting:
    """A source that a thread's first read leaves only when `count` threads have come."""

    def __init__(self, source, count):
        self.source, self.threads, self.barrier = source, set(), threading.Barrier(count)

    def __len__(self):
        return len(self.source)

    def __getitem__(self, index):
        if threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self.barrier.wait(60)
        return self.source[index]


def test_eight_threads_read_at_the_same_time_what_one_reads(path):
    one, eight = (make_run(path, **{"data.prefetch": number}) for number in (1, 8))
    meeting = Meeting(eight.dataset.splits["train"], 8)
    eight.dataset.splits["train"] = meeting
    batches = [list(run.batches(0, 18)) for run in (one, eight)]
    assert len(meeting.threads) == 8 and len(batches[0]) == 18
    for first, second in zip(*batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("task", "fields", "line"),
    [
        ("regression", {"baseline.name": "ogm"}, "config.baseline.name is 'ogm', which needs the "),
        ("multi_label", {"baseline.name": "pmr"}, "allowed there: an empty name or one of "),
        ("regression", {"best_by": "accuracy"}, "config.best_by is 'accuracy'; allowed with the "),
        (
            "regression",
            {"best_by": "acc7"},
            "config.best_by is 'acc7', which is of one value in -3",
        ),
        ("single_label", {"best_by": "map"}, "config.best_by is 'map'; allowed with the task sin"),
        ("multi_label", {"label_smoothing": 0.1}, "config.label_smoothing is 0.1, and the data's "),
        ("regression", {"class_weights": ("balanced",)}, "config.class_weights is ('balanced',),"),
        ("multi_label", {"regression_loss": "mse"}, "config.regression_loss is 'mse', and the da"),
        (
            "multi_label",
            {"model.fusion": "qmf"},
            "model.fusion is 'qmf', which reads probabiliti",
        ),
        ("regression", {"model.num_classes": 5}, "model.num_classes is 5; allowed with the task "),
        (
            "regression",
            {"model.quality_bias": 0.5, "model.quality_signal": "energy"},
            "model.quality_signal is 'energy', of class probabilities, and the data's task is reg",
        ),
    ],
)
def test_what_a_task_gives_no_meaning_is_refused(tmp_path, task, fields, line):
    arrays = make_arrays()
    if task != "single_label":
        labels = {k: a for k, a in arrays.items() if k.endswith("label")}
        of_task = {
            "regression": lambda a: 9 * a + 0.5,
            "multi_label": lambda a: a[:, None] < [1, 2],
        }
        arrays |= {k: of_task[task](a) for k, a in labels.items()}
    np.savez(tmp_path / "d.npz", **arrays)
    config = tiny_config(tmp_path / "d.npz", **{"model.fusion": "concat"} | fields)
    if "model.quality_bias" in fields:
        config.model.fusion = "attention"
    with pytest.raises(ConfigError) as error:
        Experiment(config, load_dataset(config.data, seed=0))
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["", "joint", "mmpareto", "gblend", "dgl"])
def test_methods_that_ask_for_losses_train_on_values(tmp_path, name):
    """One step; its reported loss is the task's, whatever the method adds."""
    arrays = make_arrays()
    arrays |= {k: a - 1.5 for k, a in arrays.items() if k.endswith("label")}
    np.savez(tmp_path / "d.npz", **arrays)
    fields = {"model.fusion": "concat", "baseline.name": name, "baseline.drop_rate": 0.0}
    config = tiny_config(tmp_path / "d.npz", **fields)
    experiment = Experiment(config, load_dataset(config.data, seed=0))
    state = experiment.parallel.put_state(experiment.initial_state())
    batch = next(experiment.batches(0, 1))
    logits, _ = experiment.model.apply({"params": state.params}, batch)
    expected = np.abs(experiment.task.answer(logits) - batch["label"]).mean()
    placed = experiment.parallel.put_batch(batch)
    after, sums, _ = experiment.parallel.train_step(state, placed)
    np.testing.assert_allclose(sums["mae"] / sums["weight"], expected, rtol=1e-4)
    assert np.isfinite(jax.tree.leaves(after.params)[0]).all()
