"""Manifests and media files: what is read, and one clear line for each mistake."""

import csv
import dataclasses
import json
import logging
import os
import sys

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from rollingq_jax import check
from rollingq_jax.data.dataset import groups_of, ids_of, infer_model, labels_of
from rollingq_jax.data.pipeline import eval_batches
from rollingq_jax.data.preprocessing import InputSpec, input_spec
from rollingq_jax.data.sources.arrays import load as load_arrays
from rollingq_jax.data.sources.media_folder import (
    MediaSizes,
    load,
    open_manifest,
    open_tokenizer,
    read_manifest,
    sound_features,
    text_pieces,
)
from rollingq_jax.errors import ConfigError, DataError
from tests.data import media_files
from tests.data.media_files import refuses

SMALL = {"image_size": 16, "audio_bins": 8, "audio_frames": 10, "video_frames": 3}


def write_csv(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A folder of media files of each type; and rows that name them."""
    folder = tmp_path_factory.mktemp("tree")
    (folder / "media").mkdir()
    rows = []
    for number in range(12):
        name = f"media/{number}"
        media_files.write_wav(folder / f"{name}.wav", 0.1 + 0.02 * number, 8000, 300 + 100 * number)
        media_files.write_jpeg(
            folder / f"{name}.jpg", (20, 30), "L" if number % 3 == 0 else "RGB", 20 * number
        )
        (folder / f"{name}.txt").write_text("ab" * (1 + number % 4))
        if number < 4:
            media_files.write_video(folder / f"{name}.mp4", 2 + number, audio_rate=8000)
        rows.append(
            {
                "split": "train" if number < 8 else "test",
                "label": ["dog", "cat"][number % 2],
                "sound": f"{name}.wav",
                "picture": f"{name}.jpg",
                "words": f"{name}.txt",
                "clip": f"media/{number % 4}.mp4",
            }
        )
    return folder, rows


@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_every_type_of_file(tree, form):
    folder, rows = tree
    path = folder / f"manifest.{form}"
    (write_csv if form == "csv" else write_jsonl)(path, rows)
    dataset = load({"path": str(path), **SMALL}, seed=0)
    kinds = {name: (info.kind, info.shape) for name, info in dataset.modalities.items()}
    assert kinds == {
        "clip": ("video", (3, 16, 16, 3)),
        "picture": ("image", (16, 16, 3)),
        "sound": ("spectrogram", (8, 10, 1)),
        "words": ("tokens", (8,)),
    }
    assert dataset.class_names == ("cat", "dog")
    assert [len(dataset.splits[s]) for s in ("train", "valid", "test")] == [6, 2, 4]
    example = dataset.splits["test"][1]  # number 9
    assert example["label"] == 0
    assert np.abs(example["picture"].astype(int) - 180).max() <= 1
    assert example["words"].tolist() == [98, 99, 98, 99, 0, 0, 0, 0]
    assert [round(frame.mean() / 20) for frame in example["clip"]] == [0, 1, 2]
    batch = next(iter(eval_batches(dataset.splits["test"], batch_size=4)))
    assert batch["sound"].dtype == np.float32 and np.isfinite(batch["sound"]).all()
    assert infer_model(dataset)["encoders"]["words"] == {"kind": "tokens", "vocab_size": 257}
    # A manifest can be given where arrays are expected, and by its folder.
    assert load_arrays({"path": str(path), **SMALL}, seed=0).modalities == dataset.modalities
    assert load({"path": str(folder), **SMALL}, seed=0).num_classes == 2


WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "ab", "cat", "dog")


def save_tokenizer(path, model=None):
    """A tokenizer of whole words that puts [CLS] and [SEP] around a text."""
    made = tokenizers.Tokenizer(
        model or tokenizers.models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="[UNK]")
    )
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    path.write_text(made.to_str())
    return str(path)


@pytest.fixture
def texts(tmp_path):
    """A manifest of texts, in files and in cells."""
    rows = []
    for number in range(12):
        (tmp_path / f"{number}.txt").write_text("dog cat ab\n"[: 3 + 4 * (number % 3)])
        said = "" if number == 11 else "cat bird" + number % 2 * " dog"
        row = {"split": "test" if number > 7 else "train", "label": number % 2, "said:string": said}
        rows.append({**row, "read": f"{number}.txt"})
    write_csv(tmp_path / "manifest.csv", rows)
    return str(tmp_path / "manifest.csv")


def test_texts_through_a_tokenizer(texts, tmp_path):
    """1 + each id, special tokens kept where a text is cut, 0 behind the last."""
    config = {"path": texts, "tokenizer": save_tokenizer(tmp_path / "t.json")}
    dataset = load(config, seed=0)
    assert {m.shape: m.vocab_size for m in dataset.modalities.values()} == {(5,): 1 + len(WORDS)}
    first, second, *_, last = (dataset.splits["test"][i] for i in range(4))
    assert first["read"].tolist() == [3, 7, 6, 5, 4]  # number 8: all of "dog cat ab"
    assert first["said"].tolist() == [3, 6, 2, 4, 0] and second["said"].tolist() == [3, 6, 2, 7, 4]
    assert last["said"].tolist() == [0] * 5 and not last["said_mask"]
    tokenizer = dataset.preprocessing["said"].media["tokenizer"]
    pieces = text_pieces(first["said"], tokenizer)  # "bird" is not in the vocabulary
    assert pieces == ("[CLS]", " cat", " [UNK]", " [SEP]", "")
    short = load({**config, "text_length": 4}, seed=0).splits["test"][1]
    assert short["said"].tolist() == [3, 6, 2, 4]
    assert infer_model(dataset)["encoders"]["said"]["vocab_size"] == 8
    # Elsewhere, as in a run's folder, by its checksum; another file of that name is refused.
    inputs = input_spec(dataset).with_tokenizer(save_tokenizer(tmp_path / "copy.json"))
    again = InputSpec.from_json(json.loads(json.dumps(inputs.to_json())))
    source, _, _ = open_manifest(tmp_path / "manifest.csv", again.modalities, split="test")
    np.testing.assert_array_equal(source[1]["said"], second["said"])
    (tmp_path / "other.json").write_text((tmp_path / "copy.json").read_text() + " ")
    other = again.with_tokenizer(str(tmp_path / "other.json")).modalities
    source, _, _ = open_manifest(tmp_path / "manifest.csv", other, split="test")
    refuses(lambda: source[1], "other.json: its sha256 is", "as in training")


def test_tokenizers_that_cannot_be_used(texts, tree, tmp_path, monkeypatch):
    def loaded(tokenizer, **fields):
        return lambda: load({"path": texts, "tokenizer": str(tokenizer), **fields}, seed=0)

    good = save_tokenizer(tmp_path / "t.json")
    refuses(loaded(tmp_path / "none.json"), "data.tokenizer", "no such file")
    (tmp_path / "bad.json").write_text("{}")
    refuses(loaded(tmp_path / "bad.json"), "bad.json: damaged or not supported")
    drawn = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")], dropout=0.5)
    refuses(loaded(save_tokenizer(tmp_path / "d.json", drawn)), "its dropout is 0.5")
    refuses(loaded(good, text_length=2), "at least 3", error=ConfigError)
    sounds = {"path": str(tree[0] / "sound.csv"), "tokenizer": good}
    rows = [{k: row[k] for k in ("split", "label", "sound")} for row in tree[1]]
    write_csv(tree[0] / "sound.csv", rows)
    refuses(lambda: load(sounds, seed=0), "without a modality of text", error=ConfigError)
    np.savez(tmp_path / "d.npz", x=np.zeros(3))
    arrays = {"path": str(tmp_path / "d.npz"), "tokenizer": good}
    refuses(lambda: load_arrays(arrays, seed=0), "allowed with arrays", error=ConfigError)
    open_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    refuses(loaded(good), "'tokenizers' is not installed", '"rollingq-jax[text]"')


def test_standardization_and_its_switch(tree, tmp_path):
    folder, rows = tree
    write_csv(folder / "sound.csv", [{k: r[k] for k in ("split", "label", "sound")} for r in rows])
    config = {"path": str(folder / "sound.csv"), **SMALL}
    train = load(config, seed=0).splits["train"]
    values = np.stack([train[index]["sound"] for index in range(len(train))])
    assert values.mean() == pytest.approx(0, abs=1e-5)
    assert values.std() == pytest.approx(1, abs=1e-5)
    raw = load(config | {"standardize": False}, seed=0).splits["train"][0]["sound"]
    assert raw.max() == 0 and raw.min() >= -80
    stft = load(config | {"audio_features": "stft"}, seed=0).splits["train"][0]["sound"]
    assert stft.shape == (8, 10, 1)
    refuses(
        lambda: load(config | {"audio_features": "mfcc"}, seed=0), "mel, stft", error=ConfigError
    )
    refuses(lambda: load(config | {"audio_bins": 1}, seed=0), "at least 2", error=ConfigError)


def test_a_tone_is_where_it_should_be():
    time = np.arange(16000) / 16000
    tone = np.sin(2 * np.pi * 2000 * time).astype(np.float32)
    sizes = MediaSizes(audio_features="stft", audio_seconds=1.0, audio_bins=65, audio_frames=20)
    features = sound_features(tone, 16000, sizes)
    assert features.shape == (65, 20, 1)
    assert set(features[:, 1:-1, 0].argmax(axis=0).tolist()) == {16}  # 2000 / 8000 * 64
    half = sound_features(tone[:8000], 16000, sizes)  # padded with silence
    assert half[:, -1, 0].max() == -80
    silence = sound_features(np.zeros(10, np.float32), 16000, sizes)
    assert (silence == -80).all()


def test_text_in_the_cell_and_sound_of_a_video(tree):
    folder, rows = tree
    rows = [
        {"split": r["split"], "label": n % 2, "sound:audio": r["clip"], "title:string": "héé" * n}
        for n, r in enumerate(rows)
    ]
    write_jsonl(folder / "typed.jsonl", rows)
    dataset = load({"path": str(folder / "typed.jsonl"), **SMALL}, seed=0)
    assert dataset.class_names == () and dataset.num_classes == 2
    assert dataset.modalities["sound"].kind == "spectrogram"
    assert dataset.modalities["title"].shape == (35,)  # 5 bytes, 7 times
    ids = dataset.splits["test"][0]["title"]
    assert bytes((ids[ids > 0] - 1).astype(np.uint8)) == ("héé" * 8).encode()[:35]


def test_missing_modalities_and_quality(tree):
    folder, rows = tree
    rows = [{k: row[k] for k in ("split", "label", "sound", "picture")} for row in rows]
    for number, row in enumerate(rows):
        row["quality_picture"] = -0.5 * number
        row["sound"] = "" if number in (2, 9) else row["sound"]
    write_csv(folder / "holes.csv", rows)
    dataset = load({"path": str(folder / "holes.csv"), **SMALL}, seed=0)
    missing, whole = dataset.splits["test"][1], dataset.splits["test"][2]
    assert not missing["sound_mask"] and not missing["sound"].any()
    assert whole["sound_mask"] and whole["sound"].any() and "picture_mask" not in whole
    assert whole["quality_picture"] == np.float32(-5)


def row(**changes):
    return {"split": "train", "label": "0", "picture": "a.png"} | changes


def write_rows(folder, *rows):
    media_files.write_jpeg(folder / "a.png")
    path = folder / "m.csv"
    write_csv(path, list(rows) or [row()])
    return {"path": str(path), **SMALL}


def test_paths_may_not_leave_the_folder(tmp_path):
    secret = tmp_path / "secret.png"
    media_files.write_jpeg(secret)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "link.png").symlink_to(secret)
    (folder / "out").symlink_to(tmp_path)
    (folder / "inner.png").symlink_to("a.png")
    outside = ["../secret.png", "x/../../secret.png", str(secret), "C:\\secret.png", "..\\s.png"]
    for name in outside:
        config = write_rows(folder, row(picture=name))
        refuses(lambda c=config: load(c, seed=0), "m.csv line 2", "refused", "picture")
    for name in ("link.png", "out/secret.png"):
        config = write_rows(folder, row(picture=name))
        refuses(lambda c=config: load(c, seed=0), repr(name), "link", "refused")
    config = write_rows(folder, row(picture="inner.png"))
    assert read_manifest(folder / "m.csv").missing == ()


def test_a_manifest_reached_through_a_link_is_fine(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    write_rows(folder)
    (tmp_path / "alias").symlink_to(folder)
    assert len(read_manifest(tmp_path / "alias" / "m.csv").rows) == 1


def test_missing_files_are_listed(tmp_path):
    rows = [row(picture=f"{number}.png") for number in range(5)]
    config = write_rows(tmp_path, *rows)
    refuses(lambda: load(config, seed=0), "5 missing files: '0.png', '1.png', '2.png', ...")


GOOD = [row(), row(label="1"), row(split="test"), row(), row(label="1")]
BAD = [
    ([*GOOD, row(split="dev")], "line 7", "split 'dev'", "valid"),
    ([*GOOD, row(label="")], "line 7", "label"),
    ([*GOOD, row(label="-1")], "train/label", "-1"),
    ([*GOOD, row(split="test", label="7")], "test/label", "7 never occurs"),
    ([*GOOD, row(split="test", label="dog")], "test/label", "'dog' never occurs"),
    ([row(), row(), row(split="test")], "only the label 0"),
    ([*GOOD[:2], row(split="valid")], "no rows of split 'test'"),
    ([*GOOD[2:3], row(split="valid")], "no rows of split 'train'"),
    (GOOD[:2], "every class has a single example"),
    ([row(picture="a.xyz")], "line 2", "no known suffix", "picture:string"),
    ([{"split": "train", "label": "0"}], "wanted label and one column"),
    ([{"split": "train", "picture": "a.png"}], "wanted label"),
    ([row(**{"bad name": "a.png"})], "'bad name'"),
    ([row(**{"p:movie": "a.png"})], "'movie'", "audio, image"),
    ([row(**{"picture:image": "a.png"})], "two columns", "picture"),
    ([row(quality_sound="1")], "quality_sound"),
    ([row(quality_picture="good")], "line 2", "quality_picture", "number"),
    ([row(quality_picture="nan")], "line 2", "quality_picture", "number"),
    ([row(picture="")], "'picture' is empty in every row"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda case: case[1])
@pytest.mark.parametrize("form", ["csv", "jsonl"])
def test_mistakes_are_named(tmp_path, case, form):
    rows, *words = case
    media_files.write_jpeg(tmp_path / "a.png")
    path = tmp_path / f"m.{form}"
    (write_csv if form == "csv" else write_jsonl)(path, rows)
    words = [word.replace("line 7", "line 6").replace("line 2", "line 1") if form == "jsonl"
             else word for word in words]  # fmt: skip
    refuses(lambda: load({"path": str(path), **SMALL}, seed=0), *words)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.csv", b"", "no rows"),
        ("m.csv", b"split,label,p\n", "no rows"),
        ("m.csv", b"split,label,label,p\n", "same name"),
        ("m.csv", b"split,label,p\ntrain,0\n", "line 2: 2 cells"),
        ("m.csv", b'split,label,p\ntrain,0,"a', "not CSV"),
        ("m.csv", b"\xff\xfe", "no rows"),
        ("m.csv", b"\xff\xfea", "not UTF-16"),
        ("m.csv", "split,label,p\ntrain,é,a.png\n".encode("latin-1"), "line 2 is not UTF-8"),
        ("m.csv", "split,label\n".encode("utf-16-le"), "zero bytes"),
        ("m.csv", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("m.jsonl", b"version https://git-lfs.github.com/spec/v1\noid x\n", "git lfs pull"),
        ("m.csv", b"a;b,c\n1;2,3\n", "between ',' or ';'"),
        ("m.csv", b"sep=x\nsplitxlabel\n", "sep='x'"),
        ("m.csv", b"split,label,p,\ntrain,0,a.png,b.png\n", "without a name"),
        ("m.tsv", b"split\tlabel\tp\ntrain\t0\n", "line 2: 2 cells"),
        ("m.csv", b"sep=;\nsplit;label;p\ntrain;0\n", "line 3: 2 cells"),
        ("m.jsonl", b"{\n", "line 1: not JSON"),
        ("m.jsonl", b"\n[1]\n", "line 2 is no object"),
        ("m.jsonl", b"[" * 100_000, "not JSON"),
        ("m.jsonl", b'{"split": "train", "label": true, "p": "a.png"}', "label 'True'"),
        ("m.jsonl", b'{"split": "train", "label": 0, "p": 3}', "p: '3'; allowed: a string"),
        ("m.jsonl", b'{"split": "train", "label": 0, "p": "a\\u0000.png"}', "refused"),
    ],
)
def test_malformed_manifests(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    refuses(lambda: load({"path": str(tmp_path / name)}, seed=0), words, name)


def test_no_manifest(tmp_path):
    refuses(lambda: load({}, seed=0), "data.path: not given")
    refuses(lambda: load({"path": str(tmp_path)}, seed=0), "manifest.csv", "no such")
    refuses(lambda: load({"path": str(tmp_path / "m.csv")}, seed=0), "no such")


def test_a_file_that_breaks_later_is_named(tmp_path):
    config = write_rows(tmp_path, *GOOD)
    dataset = load(config, seed=0)
    (tmp_path / "a.png").write_bytes(b"not an image")
    refuses(lambda: dataset.splits["test"][0], "a.png", "damaged")
    refuses(lambda: load(config, seed=0), "a.png", "damaged")
    os.remove(tmp_path / "a.png")
    refuses(lambda: dataset.splits["test"][0], "a.png", "no such file")


def test_modalities_can_be_picked(tree):
    folder, rows = tree
    write_csv(folder / "picked.csv", rows)
    config = {"path": str(folder / "picked.csv"), **SMALL}
    picked = load(config | {"modalities": ("words", "sound")}, seed=0)
    assert list(picked.modalities) == ["sound", "words"]
    refuses(lambda: load(config | {"modalities": ("smell",)}, seed=0), "'smell'", "picture")


# Manifests as spreadsheets and other people write them.

TABLE = """split;label;words:string;quality_words;group
train;cat;"a; b, c";-0,5;Ann
train;dog;d;-1;Bob
test;cat;e;0;Cleo
test;dog;f;-2,25;Dan
train;cat;g;0;Eve
train;dog;h;0;Finn
"""


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text,
        lambda text: "sep=;\n" + text,
        lambda text: "\ufeff" + text.replace("\n", "\r\n"),
        lambda text: text.replace("\n", "\r"),
        lambda text: text.replace("a; b, c", "a# b, c").replace(";", "\t").replace("#", ";"),
        lambda text: text.replace("a; b, c", "a# b, c").replace(";", "|").replace("#", ";"),
        lambda text: text.replace("\n", ";;\n") + ";;;;;;\n",  # empty columns, an empty row
    ],
    ids=["plain", "sep", "Windows", "Mac", "tabs", "bars", "padded"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le", "utf-32"])
def test_delimiters_and_encodings(tmp_path, write, encoding):
    text = write(TABLE)
    if encoding == "utf-16-le":
        text = "\ufeff" + text.removeprefix("\ufeff")
    elif encoding != "utf-8":
        text = text.removeprefix("\ufeff")  # these codecs write one themselves
    suffix = "tsv" if "\t" in text else "csv"
    (tmp_path / f"manifest.{suffix}").write_bytes(text.encode(encoding))
    manifest = read_manifest(tmp_path)
    assert [row.values["words"] for row in manifest.rows] == ["a; b, c", *"defgh"]
    assert [row.qualities["words"] for row in manifest.rows] == [-0.5, -1, 0, -2.25, 0, 0]
    assert [row.label for row in manifest.rows] == ["cat", "dog"] * 3
    assert manifest.rows[3].group == "Dan" and manifest.rows[3].split == "test"


def test_a_decimal_comma_needs_another_delimiter(tmp_path):
    text = TABLE.replace(";", ",").replace("a, b, c", "a").replace("-0,5", '"-0,5"')
    (tmp_path / "m.csv").write_text(text.replace("-2,25", "-2.25"))
    refuses(lambda: read_manifest(tmp_path / "m.csv"), "line 2", "'-0,5'", "number")


def test_a_manifest_with_tabs_where_arrays_are_expected(tmp_path):
    (tmp_path / "m.tsv").write_text(TABLE.replace('"a; b, c"', "a").replace(";", "\t"))
    config = {"path": str(tmp_path / "m.tsv"), "standardize": False}
    assert load_arrays(config, seed=0).class_names == ("cat", "dog")


def test_names_in_data_columns_tell_the_delimiter(tmp_path):
    (tmp_path / "m.csv").write_text("class;said, in words\na;x\nb;y\n")
    columns = {"label": "class", "words:string": "said, in words"}
    manifest = read_manifest(tmp_path / "m.csv", columns=columns)
    assert [row.values["words"] for row in manifest.rows] == ["x", "y"]


@pytest.mark.parametrize("suffix", ["csv", "tsv", "jsonl"])
def test_missing_files_are_listed_whatever_the_columns_are_called(tmp_path, capsys, suffix):
    records = [{"emotion": str(n % 2), "pic": f"{n}.png", "age": "7"} for n in range(9)]
    path = tmp_path / f"m.{suffix}"
    if suffix == "jsonl":
        write_jsonl(path, records)
    else:
        mark = "\t" if suffix == "tsv" else ";"
        lines = [mark.join(record.values()) for record in records]
        path.write_text("\n".join([mark.join(records[0]), *lines]))
    with pytest.raises(DataError, match="9 missing files: '0.png'"):
        check.command(
            ["check", "--config=configs/own_data.py", f"--config.data.path={path}",
             "--config.data.columns=label=emotion, picture=pic",
             "--config.data.modalities=('picture',)"]
        )  # fmt: skip
    assert "missing: '3.png'" in capsys.readouterr().out


# Columns that are called something else, or are no modality.


def people(folder, **changes):
    """A table of a survey: 4 people of 6 sounds each."""
    media_files.write_wav(folder / "a.wav", 0.1, 8000)
    rows = []
    for number in range(24):
        rows.append(
            {
                "clip id": f"c{number}",
                "speaker": f"p{number // 6}",
                "age": str(20 + number // 6),
                "emotion": ["calm", "angry"][number % 2],
                "wav_path": "a.wav",
                **changes,
            }
        )
    write_csv(folder / "people.csv", rows)
    return {"path": str(folder / "people.csv"), **SMALL}


COLUMNS = "label=emotion, sound=wav_path, group=speaker, id=clip id"


def test_columns_can_have_other_names(tmp_path):
    config = people(tmp_path) | {"columns": COLUMNS, "modalities": ("sound",)}
    dataset = load(config, seed=0)
    assert list(dataset.modalities) == ["sound"] and dataset.class_names == ("angry", "calm")
    seen = {}
    for split, source in dataset.splits.items():
        numbers = [int(name[1:]) for name in ids_of(source)]
        assert groups_of(source).tolist() == [f"p{number // 6}" for number in numbers]
        assert labels_of(source).tolist() == [1 - number % 2 for number in numbers]
        assert set(source[0]) == {"label", "sound"}
        seen[split] = {number // 6 for number in numbers}
    assert sorted(sum(map(list, seen.values()), [])) == [0, 1, 2, 3]  # each person in one split
    assert set(seen) == {"train", "valid", "test"}
    mapping = {"label": "emotion", "sound:audio": "wav_path", "group": "speaker"}
    assert len(load(config | {"columns": mapping}, seed=0).splits["train"]) == 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"columns": "label=emotion, sound=wav"}, ["sound=wav", "no such column", "'wav_path'"]),
        ({"columns": "sound=wav_path"}, ["wanted label", "data.columns"]),
        ({"columns": "label=emotion"}, ["age", "data.columns", "data.modalities"]),
        (
            {"columns": "label=emotion, id=clip id, group=speaker"},
            ["age", "'20'", "age:string", "data.columns", "data.modalities"],
        ),
        ({"columns": "label=age, sound=emotion", "modalities": ("sound",)}, ["sound", "'calm'"]),
        ({"columns": COLUMNS, "modalities": ("sound", "face")}, ["'face'", "people.csv"]),
        ({"columns": "label"}, ["data.columns", "name=value"]),
    ],
    ids=lambda value: str(value)[:40],
)
def test_columns_of_no_use_are_refused(tmp_path, changes, words):
    config = people(tmp_path) | changes
    refuses(lambda: load(config, seed=0), *words, error=(DataError, ConfigError))


@pytest.mark.parametrize("value", [34, 0.5, None, [1], {"a": 1}, True])
def test_json_values_that_are_no_modality(tmp_path, value):
    media_files.write_jpeg(tmp_path / "a.png")
    write_jsonl(tmp_path / "m.jsonl", [row(age=value) for _ in range(3)])
    shown = "empty in every row" if value is None else "data.columns"
    refuses(lambda: load({"path": str(tmp_path / "m.jsonl")}, seed=0), "age", shown)


def test_a_column_keeps_no_meaning_beside_the_one_that_replaces_it(tmp_path):
    config = people(tmp_path, label="wrong") | {"columns": COLUMNS, "modalities": ("sound",)}
    assert load(config, seed=0).class_names == ("angry", "calm")


# Groups.


def test_groups_in_two_of_the_user_s_splits_are_counted(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "rollingq_jax")
    rows = [row(label=str(n % 2), split="train" if n < 6 else "test", group=n % 4, id=n)
            for n in range(12)]  # fmt: skip
    media_files.write_jpeg(tmp_path / "a.png")
    write_jsonl(tmp_path / "m.jsonl", rows)
    dataset = load({"path": str(tmp_path / "m.jsonl"), **SMALL}, seed=0)
    assert "4 groups stand in both train and test" in caplog.text
    parts = [set(groups_of(dataset.splits[split])) for split in ("train", "valid")]
    assert not parts[0] & parts[1] and parts[0] | parts[1] == set("0123")
    assert ids_of(dataset.splits["test"]).tolist() == [str(n) for n in range(6, 12)]


def test_a_table_without_splits(tmp_path):
    rows = [{"label": n % 2, "words:string": f"no. {n}"} for n in range(50)]
    write_jsonl(tmp_path / "m.jsonl", rows)
    path = {"path": str(tmp_path / "m.jsonl")}
    sizes, tests = [], []
    for seed in (0, 1):
        dataset = load(path, seed=seed)
        sizes.append([len(dataset.splits[s]) for s in ("train", "valid", "test")])
        test = dataset.splits["test"]
        tests.append([test[index]["words"].tolist() for index in range(len(test))])
    assert sizes == [[36, 4, 10]] * 2 and tests[0] == tests[1]
    assert groups_of(dataset.splits["train"]) is None and ids_of(dataset.splits["train"]) is None


@pytest.mark.parametrize("name", ["group", "id"])
@pytest.mark.parametrize("value", ["", " ", None, 1.5, True, [1]])
def test_odd_groups_and_ids(tmp_path, name, value):
    media_files.write_jpeg(tmp_path / "a.png")
    write_jsonl(tmp_path / "m.jsonl", [row(**{name: "a"}), row(**{name: value})])
    refuses(lambda: load({"path": str(tmp_path / "m.jsonl")}, seed=0), "line 2", name)


# Labels of other tasks.


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (["1.0", "2.0", "3.0"], ["'1.0'", "data.task regression"]),
        ([[0, 1, 1], [1, 0, 0]], ["line 1", "[0, 1, 1]", "names"]),
        ([["a|b"], ["a"]], ["line 1", "a|b", "names without"]),
        ([{"a": 1}, "b"], ["line 1", "{'a': 1}"]),
        (["  ", "a"], ["line 1", "label"]),
        ([None, "a"], ["line 1", "label"]),
    ],
)
def test_labels_of_no_task(tmp_path, labels, words):
    media_files.write_jpeg(tmp_path / "a.png")
    rows = [row(label=label) for label in labels for _ in range(4)]
    write_jsonl(tmp_path / "m.jsonl", rows)
    refuses(lambda: load({"path": str(tmp_path / "m.jsonl")}, seed=0), *words)


@pytest.mark.parametrize(
    ("labels", "task", "expected"),
    [
        (["0.5", "1", "2"], "auto", [[0.5], [1], [2]]),
        (["-1e3", "2", ".5"], "auto", [[-1000.0], [2], [0.5]]),
        (["0,5", "1", "2"], "auto", [[0.5], [1], [2]]),
        ([0.5, 1, 2], "auto", [[0.5], [1], [2]]),
        (["1.0", "2.0", "3.0"], "regression", [[1], [2], [3]]),
        (["1|2", "2;0,5"], "regression", [[1, 2], [2, 0.5]]),
        ([["a", "b"], ["b"], []], "auto", [[1, 1], [0, 1], [0, 0]]),
        (["a|b", "a", "b"], "auto", [[1, 1], [1, 0], [0, 1]]),
        (["a; b", "|", "b"], "multi_label", [[1, 1], [0, 0], [0, 1]]),
    ],
)
def test_labels_of_other_tasks(tmp_path, labels, task, expected):
    media_files.write_jpeg(tmp_path / "a.png")
    rows = [row(label=label) for label in labels for _ in range(10)]
    write_jsonl(tmp_path / "m.jsonl", rows)
    dataset = load({"path": str(tmp_path / "m.jsonl"), "task": task, **SMALL}, seed=0)
    values = isinstance(expected[0][0], float) or task == "regression"
    assert dataset.task == ("regression" if values else "multi_label")
    found = labels_of(dataset.splits["train"])
    assert found.dtype == (np.float32 if values else np.int32)
    np.testing.assert_array_equal(np.unique(found, axis=0), np.unique(expected, axis=0))


def test_odd_names_of_classes(tmp_path):
    media_files.write_jpeg(tmp_path / "a.png")
    names = ["rock, pop", "a|b", "nan", "1st", "0.5 mm", "\x1b[31m", "日本"]
    rows = [row(label=label) for label in names for _ in range(10)]
    write_jsonl(tmp_path / "m.jsonl", rows)
    dataset = load({"path": str(tmp_path / "m.jsonl"), **SMALL}, seed=0)
    assert dataset.class_names == tuple(sorted(names))


@pytest.mark.parametrize(("labels", "count"), [((1, 2, 3), 4), ((0, 99_999), 100_000)])
def test_class_numbers_with_gaps_get_a_warning(tmp_path, caplog, labels, count):
    caplog.set_level(logging.WARNING, "rollingq_jax")
    media_files.write_jpeg(tmp_path / "a.png")
    write_jsonl(tmp_path / "m.jsonl", [row(label=label) for label in labels for _ in range(9)])
    assert load({"path": str(tmp_path / "m.jsonl"), **SMALL}, seed=0).num_classes == count
    assert "never occur" in caplog.text and f"{count:,} outputs" in caplog.text


# New data for a trained model.


def test_new_data_is_read_as_in_training(tree, tmp_path):
    folder, rows = tree
    write_csv(folder / "trained.csv", rows)
    dataset = load({"path": str(folder / "trained.csv"), **SMALL, "audio_rate": 8000}, seed=0)
    modalities = dataset.preprocessing
    # As in training; the modalities are read raw, and standardizing them gives the training's.
    path = folder / "trained.csv"
    source, ids, labels = open_manifest(path, modalities, split="test")
    assert ids == ["8", "9", "10", "11"] and labels == ["dog", "cat", "dog", "cat"]
    for index in range(4):
        example, trained = source[index], dataset.splits["test"][index]
        assert set(example) == {*modalities, *(f"{m}_mask" for m in modalities)}
        for name, one in modalities.items():
            assert example[f"{name}_mask"] == np.True_
            assert example[name].dtype == one.raw_dtype and example[name].shape == one.raw_shape
            np.testing.assert_allclose(one.apply(example[name]), trained[name], atol=1e-5)
    assert source[0]["sound"].max() == 0  # decibels under the loudest, not standardized
    assert open_manifest(path, modalities)[1] == ids  # of several splits, test
    assert len(open_manifest(path, modalities, split="train")[0]) == 8
    refuses(lambda: open_manifest(path, modalities, split="valid"), "'valid'", "test, train")


def test_new_data_may_lack_almost_everything(tree):
    folder, rows = tree
    write_csv(folder / "trained.csv", rows)
    trained = load({"path": str(folder / "trained.csv"), **SMALL}, seed=0).preprocessing
    trained = {name: trained[name] for name in ("picture", "sound", "words")}
    (folder / "new.csv").write_text(
        "name;sound file;age;group;label\nx;media/3.mp4;30;;\ny;;31;g;cat\nz;media/1.wav;32;;7\n"
    )
    columns = {"sound": "sound file", "id": "name", "words": "no such column"}
    source, ids, labels = open_manifest(folder / "new.csv", trained, columns=columns)
    assert ids == ["x", "y", "z"] and labels == ["", "cat", "7"]
    masks = [[bool(source[i].get(f"{m}_mask", False)) for m in trained] for i in range(3)]
    assert masks == [[False, True, False], [False] * 3, [False, True, False]]
    for index in range(3):
        for name, array in source[index].items():
            if not name.endswith("_mask"):
                assert array.shape == trained[name].raw_shape
    assert "label" not in source[0]
    _, ids, _ = open_manifest(folder / "new.csv", trained, columns={"sound": "sound file"})
    assert ids == ["0", "1", "2"]


def test_new_data_that_cannot_be_read(tree):
    folder, rows = tree
    write_csv(folder / "trained.csv", rows)
    trained = load({"path": str(folder / "trained.csv"), **SMALL}, seed=0).preprocessing
    arrays = {"sound": dataclasses.replace(trained["sound"], media=None)}
    path = folder / "new.csv"
    path.write_text("face\na.png\n")
    refuses(lambda: open_manifest(path, arrays), "'sound'", "trained on arrays")
    refuses(lambda: open_manifest(path, trained), "at least one of", "picture", "face")
    path.write_text("picture\nmedia/0.jpg\nmedia/none.jpg\n")
    refuses(lambda: open_manifest(path, trained), "1 missing file", "media/none.jpg")
    path.write_text("picture:audio\nmedia/0.jpg\n")
    refuses(lambda: open_manifest(path, trained), "'audio' of 'picture'", "'image'")
    path.write_text("picture\n../a.jpg\n")
    refuses(lambda: open_manifest(path, trained), "refused")
    path.write_text("picture\n")
    refuses(lambda: open_manifest(path, trained), "no rows")


@pytest.mark.parametrize(
    "media", [{}, {"type": "smell"}, {"type": "image", "image_size": 17}, {"type": "image", "x": 1}]
)
def test_a_record_that_says_something_else(tree, media):
    folder, rows = tree
    write_csv(folder / "trained.csv", rows)
    trained = load({"path": str(folder / "trained.csv"), **SMALL}, seed=0).preprocessing
    odd = {"picture": dataclasses.replace(trained["picture"], media=media)}
    refuses(lambda: open_manifest(folder / "trained.csv", odd), "'picture'", "record")


def test_words_of_a_model_come_from_files_or_cells(tree):
    folder, rows = tree
    write_csv(folder / "trained.csv", rows)
    trained = load({"path": str(folder / "trained.csv"), **SMALL}, seed=0).preprocessing
    words = {"words": trained["words"]}
    (folder / "cells.csv").write_text("words:string\nababab\n")
    (folder / "files.csv").write_text("words\nmedia/2.txt\n")
    examples = [open_manifest(folder / name, words)[0][0] for name in ("cells.csv", "files.csv")]
    np.testing.assert_array_equal(examples[0]["words"], examples[1]["words"])
    assert examples[0]["words"].tolist() == [98, 99, 98, 99, 98, 99, 0, 0]


@settings(max_examples=200, deadline=None)
@given(
    data=st.binary(max_size=200),
    start=st.sampled_from(
        [
            b"",
            b"sep=",
            b"split,label,p\n",
            b"split,label,p\ntrain,0,",
            b"\xff\xfe",
            b'{"split": "train", "label": 0, ',
        ]
    ),
    suffix=st.sampled_from(["csv", "jsonl", "tsv"]),
)
def test_any_bytes_raise_only_data_errors(tmp_path_factory, data, start, suffix):
    folder = tmp_path_factory.getbasetemp() / "fuzz"
    folder.mkdir(exist_ok=True)
    path = folder / f"m.{suffix}"
    path.write_bytes(start + data)
    with pytest.raises(DataError) as caught:
        load({"path": str(path)}, seed=0)
    assert "\n" not in str(caught.value)


CELLS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["a.png", "../a.png", "train", "test", "0", "/etc/passwd"]),
)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["split", "label", "p", "q:string", "r:audio", "quality_p", "group", "id"]
            ),
            st.one_of(CELLS, st.integers(), st.floats(), st.none(), st.lists(CELLS, max_size=2)),
        ),
        max_size=6,
    )
)
def test_any_rows_raise_only_data_errors(tmp_path_factory, rows):
    folder = tmp_path_factory.getbasetemp() / "rows"
    folder.mkdir(exist_ok=True)
    write_jsonl(folder / "m.jsonl", rows)
    try:
        manifest = read_manifest(folder / "m.jsonl")
    except DataError as error:
        assert "\n" not in str(error)
    else:
        assert len(manifest.rows) == len(rows)
