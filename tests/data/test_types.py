import numpy as np
import pytest

from rollingq_jax.data.dataset import (
    ArraySource,
    Dataset,
    ModalityInfo,
    Source,
    Subset,
    stratified_split,
)
from rollingq_jax.errors import DataError


def test_modalities_are_checked_and_in_alphabetical_order():
    with pytest.raises(DataError, match="kind 'smell' is not one of"):
        ModalityInfo("nose", "smell", (3,))
    with pytest.raises(DataError, match="'visual'.*4 axes"):
        ModalityInfo("visual", "video", (8, 8, 3))
    infos = {n: ModalityInfo(n, "vector", (3,)) for n in ("visual", "audio")}
    source = ArraySource({"label": np.zeros(2, np.int32)})
    dataset = Dataset({"train": source, "test": source}, infos, num_classes=2)
    assert list(dataset.modalities) == ["audio", "visual"]
    with pytest.raises(DataError, match="class_names: 1 names for 2 classes"):
        Dataset({}, infos, num_classes=2, class_names=("a",))


def test_sources_fit_the_protocol():
    source = ArraySource({"label": np.zeros(2, np.int32)})
    assert isinstance(source, Source)
    assert isinstance(Subset(source, [0]), Source)


@pytest.mark.parametrize("fractions", [(0.9, 0.1), (0.6, 0.15, 0.25)])
def test_a_stratified_split_divides_every_class_in_proportion(fractions):
    labels = np.random.default_rng(0).integers(0, 7, 500)
    parts = stratified_split(labels, fractions, seed=3)
    assert sorted(np.concatenate(parts)) == list(range(500))
    for part, fraction in zip(parts, fractions, strict=True):
        assert (np.diff(part) > 0).all()
        for label in range(7):
            want = fraction * (labels == label).sum()
            assert abs((labels[part] == label).sum() - want) <= 1
    again, other = (stratified_split(labels, fractions, seed=seed) for seed in (3, 4))
    assert all(np.array_equal(a, b) for a, b in zip(parts, again, strict=True))
    assert not np.array_equal(parts[0], other[0])
