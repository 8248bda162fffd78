"""Sets of media files that are read as they lie on disk: a list and a folder of each becomes rows.

`data.name` and what `data.path` holds; a set is found by its lists, `*` is optional:

=================== ================================================================================
ave                 trainSet.txt, valSet.txt, testSet.txt (`Category&VideoID&...`) and AVE/<id>.mp4,
                    or the features of PMR's code: Audio-1004-SE/<id>.pkl, Image-01-FPS-SE/<id>/
food_101            texts/{train,test}_titles.csv (Image_path, text, label) and
                    images/{train,test}/<label>/<Image_path>
ucf_101             classInd.txt, trainlist01.txt, testlist01.txt (or 02, 03, whichever is there),
                    u/<clip>/ and v/<clip>/ with the flow, and the frames of a clip in
                    ucf101-frames-1fps/video-set/<clip>/, jpegs_256/<clip>/ or as
                    UCF-101/<class>/<clip>.avi
balance_benchmark   what the readers of github.com/GeWu-Lab/BalanceBenchmark read: its
                    food_101 and ucf_101 as above; CREMA-D, train.csv, test.csv
                    (`clip,EMO`), audio/<clip>.pt and visual/<clip>/; Kinetics-Sounds,
                    ks_{train,test}_overlap.txt, {train,test}_spec/<clip>.npy and
                    train-frames-1fps/train/<clip>/, val-frames-1fps/test/<clip>/; BalancedAV,
                    *train_test_val.json, all_spec/<clip>.pkl and all_frame/<clip>.hdf5
=================== ================================================================================

An example whose files are not all there is left out and counted in the data's description, as in
those readers. How files become arrays is said in `media_folder`. Of BalanceBenchmark's CMU-MOSEI,
`python -m rollingq_jax.prepare cmu_mosei` reads the pickle; its VGGSound has no folder of its own.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from rollingq_jax.data.dataset import Dataset
from rollingq_jax.data.options import given_path, option
from rollingq_jax.data.sources.crema_d import LABELS, read_rows, read_split_list
from rollingq_jax.data.sources.kinetics_sounds import FRAMES, SPECTROGRAMS, read_list
from rollingq_jax.data.sources.media_folder import Manifest, Row, from_manifest, is_there
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.files import reading

UCF_FRAMES = ("ucf101-frames-1fps/video-set", "jpegs_256")
AVE_SOUND = "Audio-1004-SE"


class Item(NamedTuple):
    """An example as a list has it: split, label, name, and a path or a text for each modality."""

    split: str
    label: str
    name: str
    values: Mapping[str, Path | str]


class Listing(NamedTuple):
    """A set's name, {modality: type} (see `media_folder.TYPES`), and its examples."""

    title: str
    types: dict[str, str]
    items: Iterable[Item]


def load(config_data: Any, *, seed: int) -> Dataset:
    """The set that `config_data.name` names, in the folder `config_data.path`.

    Args:
      config_data: `name`, `path`; optional `modalities`, `standardize`, `crop_per` and the fields
        of `media_folder.MediaSizes`.
      seed: of the validation split, where the set has none.

    Raises:
      DataError: the folder does not hold the set, a list is malformed, or of a split no example has
        its files.
      ConfigError: a field has the wrong type or value.
    """
    name = option(config_data, "name", "")
    root = given_path(config_data, f"the folder that holds {name}")
    listing = READERS[name](root)
    wanted = option(config_data, "modalities", ()) or tuple(listing.types)
    if odd := [m for m in wanted if m not in listing.types]:
        raise ConfigError(
            f"data.modalities: {odd[0]!r}; allowed with {name}: {', '.join(listing.types)}"
        )
    types = {m: listing.types[m] for m in sorted(wanted)}
    rows: list[Row] = []
    missing = 0
    for item in listing.items:
        values: dict[str, Path | str | None] = {m: item.values[m] for m in types}
        if all(is_there(v, types[m]) for m, v in values.items() if isinstance(v, Path)):
            rows.append(Row(len(rows), item.split, item.label, values, {}, "", item.name))
        else:
            missing += 1
    for split in ("train", "test"):
        if not any(row.split == split for row in rows):
            raise DataError(
                f"data.path: {root}: {listing.title}: of no {split} example are the files there"
            )
    manifest = Manifest(root / listing.title, types, tuple(rows), ("split", "label", "id"))
    dataset = from_manifest(manifest, config_data, seed=seed)
    description = f"{listing.title} in {root.name}; {missing} listed examples without their files"
    return dataclasses.replace(dataset, description=description)


def _ave(root: Path) -> Listing:
    prepared = (root / AVE_SOUND).is_dir()
    frames = next(iter(sorted(root.glob("Image-*-FPS-SE"))), root)

    def items() -> Iterator[Item]:
        seen = set()
        for split, file in (("train", "trainSet"), ("valid", "valSet"), ("test", "testSet")):
            for cells in _lines(root / f"{file}.txt", "&", 2):
                label, name = cells[:2]
                # A video that has two events is named twice; its files are the same.
                if label == "Category" or name in seen:
                    continue
                seen.add(name)
                values = dict.fromkeys(("audio", "visual"), root / "AVE" / f"{name}.mp4")
                if prepared:
                    sound = root / AVE_SOUND / f"{name}.pkl"
                    values = {"audio": sound, "visual": frames / name}
                yield Item(split, label, name, values)

    types = ("stored", "frames") if prepared else ("audio", "video")
    return Listing("AVE", dict(zip(("audio", "visual"), types, strict=True)), items())


def _food_101(root: Path) -> Listing:
    def items() -> Iterator[Item]:
        for split in ("train", "test"):
            file = root / "texts" / f"{split}_titles.csv"
            rows = read_rows(file)
            header = next(rows, (0, []))[1]
            if missing := {"Image_path", "text", "label"} - set(header):
                raise DataError(f"{file}: no column {sorted(missing)[0]}; it has {header}")
            for _, cells in rows:
                cell = dict(zip(header, cells, strict=False))
                image = root / "images" / split / cell["label"] / cell["Image_path"]
                values: dict[str, Path | str] = {"image": image, "text": cell["text"]}
                yield Item(split, cell["label"], cell["Image_path"], values)

    return Listing("Food-101", {"image": "image", "text": "string"}, items())


def _ucf_101(root: Path) -> Listing:
    number = next((n for n in ("01", "02", "03") if (root / f"trainlist{n}.txt").is_file()), "01")
    classes = {cells[1] for cells in _lines(root / "classInd.txt", " ", 2)}
    frames = next((root / name for name in UCF_FRAMES if (root / name).is_dir()), None)

    def items() -> Iterator[Item]:
        for split in ("train", "test"):
            file = root / f"{split}list{number}.txt"
            for cells in _lines(file, " ", 1):
                label, _, video = cells[0].partition("/")
                if label not in classes:
                    raise DataError(f"{file}: class {label!r}; allowed: those of classInd.txt")
                name = video.removesuffix(".avi")
                seen = root / "UCF-101" / label / f"{name}.avi" if frames is None else frames / name
                yield Item(split, label, name, {"flow": root / "u" / name, "visual": seen})

    types = {"flow": "flow", "visual": "video" if frames is None else "frames"}
    return Listing(f"UCF-101, lists {number}", types, items())


def _crema_d(root: Path) -> Listing:
    def items() -> Iterator[Item]:
        for split in ("train", "test"):
            for clip in read_split_list(root / f"{split}.csv"):
                label = str(LABELS[clip.split("_")[2]])
                values = {"audio": root / "audio" / f"{clip}.pt", "visual": root / "visual" / clip}
                yield Item(split, label, clip, values)

    return Listing("CREMA-D", {"audio": "stored", "visual": "frames"}, items())


def _kinetics_sounds(root: Path) -> Listing:
    def items() -> Iterator[Item]:
        for split in ("train", "test"):
            for name, label in read_list(root / f"ks_{split}_overlap.txt").items():
                values = {
                    "audio": root / SPECTROGRAMS[split] / f"{name}.npy",
                    "visual": root / FRAMES[split] / name,
                }
                yield Item(split, str(label), name, values)

    return Listing("Kinetics-Sounds", {"audio": "stored", "visual": "frames"}, items())


def _balanced_av(root: Path) -> Listing:
    file = next(iter(sorted(root.glob("*train_test_val.json"))))

    def items() -> Iterator[Item]:
        with reading(file, "list"):
            entries = json.loads(file.read_text(encoding="utf-8"))["database"]
            listed = [(n, e["subset"].removesuffix("ing"), e["label"]) for n, e in entries.items()]
        for name, split, label in listed:
            values = {
                "audio": root / "all_spec" / f"{name}.pkl",
                "visual": root / "all_frame" / f"{name}.hdf5",
            }
            yield Item("valid" if split.startswith("val") else split, label, name, values)

    return Listing("BalancedAV", {"audio": "stored", "visual": "frames"}, items())


# A file that only this layout has -> its reader.
_MARKS: dict[str, Callable[[Path], Listing]] = {
    "ks_train_overlap.txt": _kinetics_sounds,
    "train.csv": _crema_d,
    "classInd.txt": _ucf_101,
    "texts/train_titles.csv": _food_101,
    "*train_test_val.json": _balanced_av,
}


def _balance_benchmark(root: Path) -> Listing:
    for mark, reader in _MARKS.items():
        if next(iter(root.glob(mark)), None) is not None:
            return reader(root)
    raise DataError(f"data.path: {root}: no layout is known; allowed: one of {', '.join(_MARKS)}")


READERS: dict[str, Callable[[Path], Listing]] = {
    "ave": _ave,
    "balance_benchmark": _balance_benchmark,
    "food_101": _food_101,
    "ucf_101": _ucf_101,
}


def _lines(file: Path, mark: str, least: int) -> Iterator[list[str]]:
    """The cells of each line that is not empty.

    Raises:
      DataError: the file is missing or not text, or a line has fewer cells.
    """
    with reading(file, "list"):
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    for number, line in enumerate(lines, 1):
        cells = [cell.strip() for cell in line.strip().split(mark)]
        if cells == [""]:
            continue
        if len(cells) < least:
            raise DataError(f"{file}, line {number}: {line[:60]!r}; allowed: {least} cells or more")
        yield cells
