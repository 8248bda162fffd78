"""The threads that read a run's input are as many as `data.prefetch` says, and change no batch."""

import threading

import jax
import numpy as np
import pytest
from etils import epath
from train_cases import make_arrays, tiny_config

from rollingq_jax.data.load import load_dataset
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
    one, eight = (make_run(path, **{"data.prefetch": number}) for number in (1, 8))
    meeting = Meeting(eight.dataset.splits["train"], 8)
    eight.dataset.splits["train"] = meeting
    batches = [list(run.batches(0, 18)) for run in (one, eight)]
    assert len(meeting.threads) == 8 and len(batches[0]) == 18
    for first, second in zip(*batches, strict=True):
        jax.tree.map(np.testing.assert_array_equal, first, second)
