"""Sets read as they lie on disk, from tiny copies of their layouts."""

import json
import pickle
import sys
import types

import numpy as np
import pytest

from rollingq_jax.data.dataset import ids_of, labels_of
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.preprocessing import input_spec
from rollingq_jax.data.sources.media_folder import open_manifest, read_stored
from rollingq_jax.data.video import encode_jpeg
from rollingq_jax.errors import ConfigError, DataError
from tests.data import media_files

SIZES = {"image_size": 8, "video_frames": 2, "audio_bins": 8, "audio_frames": 10}
COUNTS = {"train": 20, "test": 4}


def frames(folder, name="frame_0000{}.jpg", count=3, value=100):
    folder.mkdir(parents=True)
    for number in range(1, count + 1):
        media_files.write_jpeg(folder / name.format(number), (12, 16), value=value)


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        path.write_bytes(pickle.dumps(array))


def clips(prefix):
    """(split, number, name) of each example."""
    return [(s, n, f"{prefix}{s}{n}") for s, count in COUNTS.items() for n in range(count)]


def ave(root):
    for split, count in {"train": 20, "val": 2, "test": 4}.items():
        lines = [f"{'Bark' if n % 2 else 'Flute'}&{split}{n}&good&0&10" for n in range(count)]
        (root / f"{split}Set.txt").write_text("\n".join([*lines, lines[0], ""]))
        for n in range(count):
            save(root / "Audio-1004-SE" / f"{split}{n}.pkl", np.full((6, 9), n, np.float32))
            frames(root / "Image-01-FPS-SE" / f"{split}{n}")


def food_101(root):
    for split, count in COUNTS.items():
        rows = ["Image_path,text,label"]
        for n in range(count):
            label = ("pizza", "soup")[n % 2]
            folder = root / "images" / split / label
            folder.mkdir(parents=True, exist_ok=True)
            media_files.write_jpeg(folder / f"{n}.jpg")
            rows.append(f'{n}.jpg,"hot, no. {n}",{label}')
        (root / "texts").mkdir(exist_ok=True)
        (root / "texts" / f"{split}_titles.csv").write_text("\n".join(rows))


def ucf_101(root):
    (root / "classInd.txt").write_text("1 Archery\n2 Biking\n")
    lists = {"train": [], "test": []}
    for split, n, name in clips("v_"):
        label = ("Archery", "Biking")[n % 2]
        lists[split].append(f"{label}/{name}.avi" + (f" {n % 2 + 1}" if split == "train" else ""))
        frames(root / "ucf101-frames-1fps" / "video-set" / name)
        for part, value in (("u", 40), ("v", 200)):
            frames(root / part / name, "frame00000{}.jpg", 4, value)
    for split, lines in lists.items():
        (root / f"{split}list01.txt").write_text("\n".join(lines))


def kinetics(root):
    lists = {"train": [], "test": []}
    places = {"train": "train-frames-1fps/train", "test": "val-frames-1fps/test"}
    for split, n, name in clips("clip_"):
        lists[split].append(f"{name} {n % 2}")
        save(root / f"{split}_spec" / f"{name}.npy", np.full((16, 8), n, np.float32))
        frames(root / places[split] / name, count=7)
    for split, lines in lists.items():
        (root / f"ks_{split}_overlap.txt").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "make", "forms"),
    [
        ("ave", ave, {"audio": (6, 9, 1), "visual": (2, 8, 8, 3)}),
        ("food_101", food_101, {"image": (8, 8, 3), "text": (11,)}),
        ("ucf_101", ucf_101, {"flow": (2, 8, 8, 2), "visual": (2, 8, 8, 3)}),
        ("balance_benchmark", ucf_101, {"flow": (2, 8, 8, 2), "visual": (2, 8, 8, 3)}),
        ("balance_benchmark", kinetics, {"audio": (16, 8, 1), "visual": (2, 8, 8, 3)}),
    ],
)
def test_a_layout_is_read_as_it_lies(tmp_path, name, make, forms):
    make(tmp_path)
    data = load_dataset({"name": name, "path": str(tmp_path), **SIZES}, seed=0)
    assert {m: info.shape for m, info in data.modalities.items()} == forms
    assert len(data.splits["train"]) + len(data.splits["valid"]) == (22 if name == "ave" else 20)
    assert labels_of(data.splits["test"]).tolist() == [0, 1, 0, 1] or name == "ave"
    assert len(set(ids_of(data.splits["test"]))) == 4 and "; 0 listed" in data.description
    test = eval_batches(data.splits["test"], batch_size=4, transforms=data.eval_transforms)
    train = train_batches(
        data.splits["train"],
        batch_size=4,
        seed=0,
        num_steps=1,
        transforms=data.train_transforms,
    )
    for batch in (next(iter(train)), next(iter(test))):
        assert {m: batch[m].shape[1:] for m in forms} == forms
    if "flow" in forms:
        means = batch["flow"].astype(int).mean(axis=(0, 1, 2, 3))
        np.testing.assert_allclose(means, [40, 200], atol=3)


def test_examples_without_their_files_are_left_out_and_counted(tmp_path):
    kinetics(tmp_path)
    (tmp_path / "train_spec" / "clip_train3.npy").unlink()
    config = {"name": "balance_benchmark", "path": str(tmp_path), **SIZES}
    data = load_dataset(config, seed=0)
    assert "; 1 listed examples without" in data.description
    with pytest.raises(ConfigError, match="data.modalities: 'smell'; allowed with"):
        load_dataset(config | {"modalities": "smell"}, seed=0)
    alone = load_dataset(config | {"modalities": "visual"}, seed=0)
    assert list(alone.modalities) == ["visual"] and "; 0 listed" in alone.description
    for file in (tmp_path / "test_spec").iterdir():
        file.unlink()
    with pytest.raises(DataError, match="of no test example are the files there"):
        load_dataset(config, seed=0)
    with pytest.raises(DataError, match="no layout is known"):
        load_dataset(config | {"path": str(tmp_path / "train_spec")}, seed=0)


def test_cremas_tensors_come_through_torchs_safe_reader(tmp_path, monkeypatch):
    rows = {"train": [], "test": []}
    for split, n, _ in clips(""):
        actor = 1001 + n + (50 if split == "test" else 0)
        rows[split].append(f"{actor}_DFA_{('ANG', 'SAD')[n % 2]}_XX")
        (tmp_path / "audio").mkdir(exist_ok=True)
        (tmp_path / "audio" / f"{rows[split][-1]}.pt").write_bytes(b"tensor")
        frames(tmp_path / "visual" / rows[split][-1])
    for split, names in rows.items():
        lines = (f"{name},{name.split('_')[2]}" for name in names)
        (tmp_path / f"{split}.csv").write_text("\n".join(lines))
    torch = types.ModuleType("torch")
    torch.__version__ = "2.8.0"
    asked = []

    def read(path, **options):
        asked.append(options)
        return np.ones((1, 5, 7), np.float32)

    torch.load = read
    monkeypatch.setitem(sys.modules, "torch", torch)
    data = load_dataset({"name": "balance_benchmark", "path": str(tmp_path), **SIZES}, seed=0)
    assert data.modalities["audio"].shape == (5, 7, 1) and asked[0]["weights_only"]
    assert labels_of(data.splits["test"]).tolist() == [5, 2, 5, 2]


def balanced_av(root, jpegs):
    """`jpegs` writes an .hdf5 file."""
    entries = {}
    for split, n, name in clips("x"):
        entries[name] = {"subset": f"{split}ing", "label": ("bark", "bell")[n % 2]}
        save(root / "all_spec" / f"{name}.pkl", np.zeros((4, 6), np.float32))
        (root / "all_frame").mkdir(exist_ok=True)
        jpegs(root / "all_frame" / f"{name}.hdf5")
    listed = {"labels": ["bark", "bell"], "database": entries}
    (root / "Imbalance_train_test_val.json").write_text(json.dumps(listed))


def test_hdf5_needs_a_package_and_says_so(tmp_path, monkeypatch):
    balanced_av(tmp_path, lambda file: file.write_bytes(b"hdf"))
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(DataError, match="reading it needs the package h5py"):
        load_dataset({"name": "balance_benchmark", "path": str(tmp_path), **SIZES}, seed=0)


def test_frames_in_hdf5(tmp_path):
    h5py = pytest.importorskip("h5py")
    jpeg = encode_jpeg(np.zeros((4, 4, 3), np.uint8))

    def write(path):
        with h5py.File(path, "w") as file:
            stored = file.create_dataset("video", (2,), dtype=h5py.vlen_dtype(np.uint8))
            stored[0] = stored[1] = np.frombuffer(jpeg, np.uint8)

    balanced_av(tmp_path, write)
    data = load_dataset({"name": "balance_benchmark", "path": str(tmp_path), **SIZES}, seed=0)
    assert data.class_names == ("bark", "bell") and len(data.splits["test"]) == 4
    assert list(data.splits["test"][0]["visual"]) == [jpeg, jpeg]


def test_a_stored_array_is_two_dimensional_and_finite(tmp_path):
    file = tmp_path / "x.npy"
    np.save(file, np.ones((1, 2, 3)))
    assert read_stored(file).shape == (2, 3, 1) and read_stored(file).dtype == np.float32
    for odd in (np.ones(3), np.full((2, 2), np.nan), np.array([["a"]])):
        np.save(file, odd)
        with pytest.raises(DataError, match="allowed: finite numbers"):
            read_stored(file)
    with pytest.raises(DataError, match="no such file"):
        read_stored(tmp_path / "y.npy")


def test_a_manifest_may_name_frames_flow_and_arrays_and_serves_new_data(tmp_path):
    kinetics(tmp_path)
    rows = ["split,label,audio:stored,visual:frames"]
    for split, n, name in clips("clip_"):
        place = {"train": "train-frames-1fps/train", "test": "val-frames-1fps/test"}[split]
        seen = "" if n == 1 else f"{place}/{name}"
        rows.append(f"{split},{n % 2},{split}_spec/{name}.npy,{seen}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows))
    config = {"name": "folder", "path": str(tmp_path), **SIZES}
    data = load_dataset(config, seed=0)
    test = eval_batches(data.splits["test"], batch_size=4, transforms=data.eval_transforms)
    batch = next(iter(test))
    assert batch["visual_mask"].tolist() == [True, False, True, True]
    new, ids, _ = open_manifest(tmp_path, input_spec(data).modalities, split="test")
    assert len(ids) == 4
    np.testing.assert_array_equal(new[0]["visual"], batch["visual"][0])
    np.save(tmp_path / "test_spec" / "clip_test0.npy", np.ones((3, 3)))
    with pytest.raises(DataError, match=r"\[3, 3\]; allowed: \[16, 8\]"):
        data.splits["test"][0]


def test_av_mnist_is_divided_as_multibench_has_it(tmp_path):
    for split, count in {"train": 24, "test": 5}.items():
        for name, width in (("image", (784,)), ("audio", (112, 112))):
            save(tmp_path / name / f"{split}_data.npy", np.full((count, *width), 7, np.uint8))
        save(tmp_path / f"{split}_labels.npy", np.arange(count) % 3)
    data = load_dataset({"name": "av_mnist", "path": str(tmp_path)}, seed=0)
    assert {m: (i.kind, i.shape) for m, i in data.modalities.items()} == {
        "audio": ("spectrogram", (112, 112, 1)),
        "image": ("image", (28, 28, 1)),
    }
    assert [len(data.splits[s]) for s in ("train", "valid", "test")] == [22, 2, 5]
    assert labels_of(data.splits["valid"]).tolist() == [1, 2]
    save(tmp_path / "image" / "test_data.npy", np.zeros((5, 700)))
    with pytest.raises(DataError, match=r"\[28, 28\] for each of the 5 labels"):
        load_dataset({"name": "av_mnist", "path": str(tmp_path)}, seed=0)
