"""Batches by step number: shuffle, random transformations, one slice for each process.

The batch of step k is a function of (seed, k) only. So the position in the data is the step
number, a run resumes in the middle of an epoch without any iterator state, and neither the number
of threads nor the number of processes changes what is read. An epoch is `ceil(N / batch_size)`
steps with a permutation of its own; its last batch is filled up with rows that `example_mask`
marks False, so every example counts once an epoch and no batch spans two epochs.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import grain
import numpy as np

from rollingq_jax.data.dataset import Example, Source
from rollingq_jax.errors import ConfigError, DataError

Batch = dict[str, np.ndarray]
Transform: TypeAlias = grain.transforms.Map | grain.transforms.RandomMap


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """The number of batches that hold every example once, `ceil(num_examples / batch_size)`."""
    return -(-num_examples // batch_size)


def train_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    num_steps: int,
    transforms: Sequence[Transform] = (),
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
    number_as: str = "",
) -> Iterator[Batch]:
    """Shuffled batches of the steps `start_step .. num_steps - 1`.

    Args:
      source: N examples; read from `prefetch` threads at once.
      batch_size: rows of the global batch, over all processes.
      seed: of the permutations and of the transformations; 0 or more.
      start_step: the first step, 0 or the step to resume from.
      num_steps: the step after the last, counted from 0 whatever `start_step` is.
      transforms: applied to each example in turn. A RandomMap's generator depends on (seed, epoch,
        number of the example, place in `transforms`) and on nothing else.
      process_index: this process gets rows `process_index * batch_size / process_count` and so on
        of each global batch.
      process_count: how many processes share a batch.
      prefetch: the most batches that are made ahead of the one in use, each by a thread of its own;
        0 makes each batch when it is asked for.
      number_as: name of a field for the examples' places in the source, int32; empty: none.

    Returns:
      A Grain iterator of dicts of arrays [batch_size / process_count, ...], `"example_mask"` bool
      among them. `close()` stops its threads before the end.

    Raises:
      ConfigError: a size is out of range, or `process_count` does not divide `batch_size`.
      DataError: the source is empty, or its examples differ in fields, shapes or dtypes.
    """
    rows = _BatchReader(
        source,
        batch_size,
        seed,
        transforms,
        process_index,
        process_count,
        shuffle=True,
        number_as=number_as,
    )
    return _read(rows, start_step, num_steps, prefetch)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int = 0,
    transforms: Sequence[Transform] = (),
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 2,
) -> Iterator[Batch]:
    """Every example once, in order; arguments, batches and errors as in `train_batches`.

    A random transformation draws the same for an example in every pass (its epoch is 0).
    """
    rows = _BatchReader(
        source, batch_size, seed, transforms, process_index, process_count, shuffle=False
    )
    return _read(rows, 0, steps_per_epoch(len(source), batch_size), prefetch)


def collate(examples: Sequence[Example]) -> Batch:
    """Stacks examples along a new first axis.

    Raises:
      DataError: an example differs from the first in its fields, or in a field's shape or dtype, or
        a field is not numeric.
    """
    first = {name: np.asarray(value) for name, value in examples[0].items()}
    for name, value in first.items():
        if value.dtype.kind not in "biuf":
            raise DataError(f"field {name!r}: dtype {value.dtype} is not boolean or numeric")
    columns: dict[str, list[np.ndarray]] = {name: [] for name in first}
    for example in examples:
        if example.keys() != first.keys():
            odd = ", ".join(sorted(example.keys() ^ first.keys()))
            raise DataError(f"field {odd}: some examples have it and others do not")
        for name, reference in first.items():
            value = np.asarray(example[name])
            if value.shape != reference.shape or value.dtype != reference.dtype:
                raise DataError(
                    f"field {name!r}: examples differ, {value.dtype}{list(value.shape)} and "
                    f"{reference.dtype}{list(reference.shape)}; pad or convert them to one form"
                )
            columns[name].append(value)
    return {name: np.stack(values) for name, values in columns.items()}


class _BatchReader:
    """A process's rows of the batch of any step; safe to call from several threads."""

    def __init__(
        self,
        source: Source,
        batch_size: int,
        seed: int,
        transforms: Sequence[Transform],
        process_index: int,
        process_count: int,
        *,
        shuffle: bool,
        number_as: str = "",
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size: {batch_size}; at least 1")
        if seed < 0:
            raise ConfigError(f"seed: {seed}; at least 0")
        if not 0 <= process_index < process_count:
            raise ConfigError(
                f"process_index: {process_index}; from 0 to process_count - 1 = {process_count - 1}"
            )
        if batch_size % process_count:
            raise ConfigError(
                f"batch_size: {batch_size}; a multiple of the number of processes, {process_count}"
            )
        for transform in transforms:
            if not isinstance(transform, Transform):
                raise ConfigError(f"transforms: {transform!r}; a grain.transforms.Map or RandomMap")
        if len(source) == 0:
            raise DataError("the data set has no examples; at least 1")
        self._source, self._seed, self._transforms = source, int(seed), tuple(transforms)
        self._batch_size, self._shuffle, self._number_as = batch_size, shuffle, number_as
        local = batch_size // process_count
        self._rows = np.arange(process_index * local, (process_index + 1) * local)
        # One epoch at a time is in use, two where batches are made ahead across its end.
        self._order = functools.lru_cache(maxsize=2)(self._make_order)

    def __call__(self, step: int) -> Batch:
        count = len(self._source)
        epoch, step_in_epoch = divmod(int(step), steps_per_epoch(count, self._batch_size))
        positions = step_in_epoch * self._batch_size + self._rows
        # Padding repeats the epoch's first examples rather than zeros, which a model could turn
        # into NaN; every process can tell which without seeing the others' rows.
        indices = self._order(epoch)[positions % count]
        batch = collate([self._example(epoch, int(index)) for index in indices])
        if "example_mask" in batch:
            raise DataError("field 'example_mask': reserved for the pipeline; rename it")
        batch["example_mask"] = positions < count
        if self._number_as:
            batch[self._number_as] = indices.astype(np.int32)
        return batch

    def _make_order(self, epoch: int) -> np.ndarray:
        count = len(self._source)
        if not self._shuffle:
            return np.arange(count)
        return np.random.default_rng((self._seed, epoch)).permutation(count)

    def _example(self, epoch: int, index: int) -> Example:
        example = self._source[index]
        for place, transform in enumerate(self._transforms):
            if isinstance(transform, grain.transforms.RandomMap):
                rng = np.random.default_rng((self._seed, epoch, index, place))
                example = transform.random_map(example, rng)
            else:
                example = transform.map(example)
        return example


def _read(reader: _BatchReader, start_step: int, num_steps: int, prefetch: int) -> Iterator[Batch]:
    """Calls the reader for each step, `prefetch` batches ahead."""
    if start_step < 0:
        raise ConfigError(f"start_step: {start_step}; at least 0")
    if prefetch < 0:
        raise ConfigError(f"prefetch: {prefetch}; at least 0")
    # A whole batch is Grain's element, so that its buffer is counted in batches and its cost per
    # element is paid once a batch.
    options = grain.ReadOptions(num_threads=prefetch, prefetch_buffer_size=prefetch)
    steps = grain.MapDataset.range(start_step, max(start_step, num_steps))
    return iter(steps.map(reader).to_iter_dataset(options))
