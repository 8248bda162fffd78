"""The pipeline against a second, plain implementation, and the properties a resumed run needs."""

import collections
import itertools
import threading

import grain
import numpy as np
import pytest

from rollingq_jax.data.dataset import ArraySource, Subset
from rollingq_jax.data.pipeline import collate, eval_batches, steps_per_epoch, train_batches
from rollingq_jax.errors import ConfigError, DataError

COUNT, BATCH = 23, 6


class AddNoise(grain.transforms.RandomMap):
    def random_map(self, element, rng):
        return element | {"x": element["x"] + rng.standard_normal(3).astype(np.float32)}


class Double(grain.transforms.Map):
    def map(self, element):
        return element | {"x": 2 * element["x"]}


@pytest.fixture
def source():
    x = np.arange(COUNT * 3, dtype=np.float32).reshape(COUNT, 3)
    return ArraySource({"x": x, "label": np.arange(COUNT, dtype=np.int32)})


def options(**changes):
    return {
        "batch_size": BATCH,
        "seed": 5,
        "num_steps": 11,
        "transforms": (AddNoise(), Double(), AddNoise()),
    } | changes


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            np.testing.assert_array_equal(batch[name], other[name], strict=True)


def plain_batches(source, batch_size, seed, num_steps):
    """Written from the documentation, one row at a time, in order, without random access."""
    step = 0
    for epoch in itertools.count():
        order = list(np.random.default_rng((seed, epoch)).permutation(len(source)))
        mask = [True] * len(order)
        while len(order) % batch_size:
            order.append(order[len(order) - len(source)])
            mask.append(False)
        rows = []
        for index in order:
            x = source[index]["x"]
            x = x + np.random.default_rng((seed, epoch, index, 0)).standard_normal(3).astype("f")
            x = 2 * x
            x = x + np.random.default_rng((seed, epoch, index, 2)).standard_normal(3).astype("f")
            rows.append((x, source[index]["label"]))
        while rows:
            if step == num_steps:
                return
            (xs, labels), marks = zip(*rows[:batch_size], strict=True), mask[:batch_size]
            rows, mask = rows[batch_size:], mask[batch_size:]
            step += 1
            yield {"x": np.stack(xs), "label": np.stack(labels), "example_mask": np.array(marks)}


@pytest.mark.parametrize("batch_size", [1, 6, 23, 30])
def test_equals_a_plain_implementation(source, batch_size):
    got = train_batches(source, **options(batch_size=batch_size))
    assert_same(got, plain_batches(source, batch_size, seed=5, num_steps=11))


@pytest.mark.parametrize("start", range(12))
def test_resumes_at_any_step(source, start):
    whole = list(train_batches(source, **options()))
    assert_same(train_batches(source, **options(start_step=start)), whole[start:])


def test_nothing_is_left_after_the_last_step(source):
    assert list(train_batches(source, **options(start_step=20))) == []


@pytest.mark.parametrize("count", [2, 3, 6])
def test_slices_of_all_processes_make_the_global_batch(source, count):
    parts = [
        list(train_batches(source, **options(process_index=index, process_count=count)))
        for index in range(count)
    ]
    joined = [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(joined, train_batches(source, **options()))


@pytest.mark.parametrize("prefetch", [0, 1, 5, 16])
def test_how_far_ahead_does_not_matter(source, prefetch):
    got = train_batches(source, **options(prefetch=prefetch))
    assert_same(got, train_batches(source, **options()))


def test_every_example_counts_once_an_epoch_in_an_order_of_its_own(source):
    steps = steps_per_epoch(COUNT, BATCH)
    assert steps == 4
    batches = list(train_batches(source, **options(num_steps=3 * steps)))
    orders = []
    for epoch in range(3):
        rows = [b["label"][b["example_mask"]] for b in batches[epoch * steps : (epoch + 1) * steps]]
        orders.append(tuple(np.concatenate(rows).tolist()))
        assert sorted(orders[-1]) == list(range(COUNT))
    assert len(set(orders)) == 3
    other = next(train_batches(source, **options(seed=6)))
    assert other["label"].tolist() != batches[0]["label"].tolist()


def test_random_transformations_depend_on_the_epoch_and_not_on_the_batch(source):
    steps = steps_per_epoch(COUNT, BATCH)

    def by_example(batch_size, epochs):
        seen = collections.defaultdict(list)
        per_epoch = steps_per_epoch(COUNT, batch_size)
        chosen = options(batch_size=batch_size, num_steps=epochs * per_epoch)
        for batch in train_batches(source, **chosen):
            for x, label, real in zip(*(batch[k] for k in ("x", "label", "example_mask"))):  # noqa: B905
                if real:
                    seen[int(label)].append(x)
        return seen

    ours, others = by_example(BATCH, 2), by_example(4, 2)
    assert steps != steps_per_epoch(COUNT, 4)
    for label in range(COUNT):
        np.testing.assert_array_equal(ours[label], others[label])
        assert not np.array_equal(ours[label][0], ours[label][1])


def test_evaluation_reads_every_example_once_in_order(source):
    batches = list(eval_batches(source, batch_size=BATCH))
    rows = [batch["label"][batch["example_mask"]] for batch in batches]
    assert np.concatenate(rows).tolist() == list(range(COUNT))
    assert all(len(batch["label"]) == BATCH for batch in batches)
    assert np.isfinite(batches[-1]["x"]).all()


def test_evaluation_draws_the_same_in_every_pass_and_process(source):
    chosen = {"batch_size": BATCH, "seed": 3, "transforms": (AddNoise(),)}
    whole = list(eval_batches(source, **chosen))
    assert_same(eval_batches(source, **chosen), whole)
    parts = [
        list(eval_batches(source, process_index=i, process_count=2, **chosen)) for i in range(2)
    ]
    joined = [
        {name: np.concatenate([left[name], right[name]]) for name in left}
        for left, right in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)
    different = next(eval_batches(source, **(chosen | {"seed": 4})))
    assert not np.array_equal(different["x"], whole[0]["x"])


def test_no_more_than_the_prefetched_batches_are_read_ahead(source):
    read = []
    full = threading.Event()

    class Counting:
        def __len__(self):
            return len(source)

        def __getitem__(self, index):
            read.append(index)
            if len(read) == (1 + 2) * BATCH:
                full.set()
            return source[index]

    batches = train_batches(Counting(), **options(prefetch=2, num_steps=50))
    next(batches)
    assert full.wait(10)
    assert not threading.Event().wait(0.1)  # time enough for a batch too many
    assert len(read) == (1 + 2) * BATCH
    batches.close()


def test_collation_names_the_field_that_differs():
    def example(**changes):
        return {"audio": np.zeros((2, 3), np.float32), "label": np.int32(0)} | changes

    good = collate([example(), example()])
    assert good["audio"].shape == (2, 2, 3) and good["label"].dtype == np.int32
    with pytest.raises(DataError, match=r"'audio'.*float32\[4, 3\].*float32\[2, 3\]"):
        collate([example(), example(audio=np.zeros((4, 3), np.float32))])
    with pytest.raises(DataError, match="'audio'.*float64.*float32"):
        collate([example(), example(audio=np.zeros((2, 3)))])
    with pytest.raises(DataError, match="audio_mask"):
        collate([example(), example(audio_mask=np.ones(2, bool))])
    with pytest.raises(DataError, match="'label'.*not boolean or numeric"):
        collate([example(label="seven")])


def test_an_error_in_the_source_reaches_the_caller(source):
    ragged = [{"x": np.zeros(1 + i)} for i in range(4)]
    with pytest.raises(DataError, match="'x'"):
        list(eval_batches(ragged, batch_size=2))
    reserved = [{"x": np.zeros(1), "example_mask": np.bool_(True)}]
    with pytest.raises(DataError, match="example_mask"):
        list(eval_batches(reserved, batch_size=1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0"),
        ({"seed": -1}, "seed: -1"),
        ({"start_step": -1}, "start_step: -1"),
        ({"process_count": 4}, "batch_size: 6; a multiple of the number of processes, 4"),
        ({"process_index": 2, "process_count": 2}, "process_index: 2"),
        ({"prefetch": -1}, "prefetch"),
        ({"transforms": (len,)}, "transforms"),
    ],
)
def test_mistakes_are_named(source, changes, message):
    with pytest.raises(ConfigError, match=message):
        train_batches(source, **options(**changes))


def test_an_empty_source_is_an_error():
    with pytest.raises(DataError, match="no examples"):
        eval_batches(ArraySource({"label": np.zeros(0, np.int32)}), batch_size=2)


def test_columns_must_agree_and_a_subset_keeps_its_order(source):
    with pytest.raises(DataError, match="x 3, label 2"):
        ArraySource({"x": np.zeros(3), "label": np.zeros(2)})
    part = Subset(source, [4, 1, 9])
    assert [int(part[i]["label"]) for i in range(len(part))] == [4, 1, 9]
