"""Data sets that are not the demo's: what their docstring promises of the disturbances."""

import numpy as np
import pytest

from benchmarks.other_data import make


@pytest.mark.parametrize(("name", "modalities"), [("halves", 3), ("streams", 3)])
def test_each_example_has_its_own_disturbance_in_each_modality(name, modalities):
    arrays = make(name, 0)
    again = make(name, 0)
    assert all(np.array_equal(arrays[key], again[key]) for key in arrays)
    for split in ("train", "valid", "test"):
        qualities = [v for k, v in arrays.items() if k.startswith(f"{split}/quality_")]
        assert len(qualities) == modalities
        largest = np.abs(np.corrcoef(qualities) - np.eye(modalities)).max()
        assert largest < 0.2  # independent: 3 standard errors at the 270 examples of validation
        assert {len(v) for k, v in arrays.items() if k.startswith(f"{split}/")} == {
            len(arrays[f"{split}/label"])
        }
