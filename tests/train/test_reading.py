"""The threads that read a run's input: how many there are, and that they change no batch."""

import threading

import jax
import numpy as np
import pytest
from etils import epath
from train_cases import make_arrays, tiny_config

from rollingq_jax.data.load import load_dataset
from rollingq_jax.train import run as run_module
from rollingq_jax.train.config import differing_fields
from rollingq_jax.train.run import Run


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "tiny.npz", **make_arrays())
    return tmp_path / "tiny.npz"


def make_run(path, **fields):
    config = tiny_config(path, **fields)
    dataset = load_dataset(config.data, seed=config.seed)
    return Run(config, dataset, epath.Path(path.parent / "run"))


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
    one, eight = (make_run(path, **{"data.num_threads": number}) for number in (1, 8))
    meeting = Meeting(eight.dataset.splits["train"], 8)
    eight.dataset.splits["train"] = meeting
    batches = [list(run.batches(0, 18)) for run in (one, eight)]
    assert len(meeting.threads) == 8 and len(batches[0]) == 18
    for first, second in zip(*batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, first, second)


@pytest.mark.parametrize(
    ("prefetch", "num_threads", "cores", "expected"),
    [
        (2, 0, 4, (2, 4)),
        (8, 0, 64, (8, 8)),
        (2, 0, None, (2, 1)),
        (2, 12, 4, (12, 12)),
        (16, 12, 4, (16, 12)),
        (0, 8, 4, (0, 8)),
    ],
)
def test_what_the_readers_are_asked_for(path, monkeypatch, prefetch, num_threads, cores, expected):
    asked = []

    def reader(source, **options):
        asked.append((options["prefetch"], options["num_threads"]))

    monkeypatch.setattr(run_module.os, "cpu_count", lambda: cores)
    monkeypatch.setattr(run_module, "train_batches", reader)
    monkeypatch.setattr(run_module, "eval_batches", reader)
    monkeypatch.setattr(run_module, "evaluate", lambda *arguments: None)
    run = make_run(path, **{"data.prefetch": prefetch, "data.num_threads": num_threads})
    run.batches(0, 18)
    run.evaluate(None, "test")
    assert asked == [expected, expected]


def test_the_number_of_threads_makes_no_other_run(path):
    ours, theirs = (tiny_config(path, **{"data.num_threads": number}) for number in (0, 8))
    assert differing_fields(ours, theirs) == {}
    theirs.seed = 1
    assert list(differing_fields(ours, theirs)) == ["seed"]
