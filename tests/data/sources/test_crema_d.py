"""CREMA-D from small trees of its layout: values, splits, and one line for each thing wrong."""

import io
import sys

import av
import numpy as np
import pytest
import soundfile
from ml_collections import ConfigDict
from PIL import Image

from rollingq_jax import prepare
from rollingq_jax.data.audio import log_stft
from rollingq_jax.data.dataset import Subset, labels_of
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.sources import crema_d
from rollingq_jax.errors import ConfigError, DataError
from rollingq_jax.train.cli import run_command
from tests.data import crema_d_tree as tree
from tests.data import media_files
from tests.data.media_files import refuses

CLIPS = tree.clip_names()


def config(path, **fields):
    return ConfigDict({"name": "crema_d", "path": str(path), "cache_dir": "", **fields})


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A whole tree from videos."""
    return tree.make_tree(tmp_path_factory.mktemp("source") / "CREMA-D")


@pytest.fixture(scope="module")
def data_dir(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    crema_d.prepare(source, folder)
    return folder


def clips_of(dataset, split):
    """Names of a split's clips, in order."""
    source = dataset.splits[split]
    indices = np.arange(len(source))
    while isinstance(source, Subset):
        source, indices = source.source, source.indices[indices]
    return [source._records[int(i)]["clip"].decode() for i in indices]


def test_an_example_of_evaluation(data_dir, source):
    dataset = load_dataset(config(data_dir), seed=0)
    assert list(dataset.modalities) == ["audio", "visual"]
    assert dataset.modalities["audio"].shape == (257, 188, 1)
    assert dataset.modalities["visual"].shape == (3, 224, 224, 3)
    assert dataset.num_classes == 6 and dataset.class_names == (
        "NEU", "HAP", "SAD", "FEA", "DIS", "ANG",
    )  # fmt: skip
    batch = next(
        eval_batches(dataset.splits["test"], batch_size=4, transforms=dataset.eval_transforms)
    )
    assert batch["audio"].shape == (4, 257, 188, 1) and batch["audio"].dtype == np.float32
    assert batch["visual"].shape == (4, 3, 224, 224, 3) and batch["visual"].dtype == np.uint8
    first = clips_of(dataset, "test")[0]
    assert batch["label"][0] == crema_d.LABELS[first.split("_")[2]]
    # frame i of the video has gray level 20 i: frames 0 and 25 are stored at 1 a second
    np.testing.assert_allclose(batch["visual"][0, 0], 0, atol=4)
    np.testing.assert_allclose(batch["visual"][0, 1:], 20 * 25 % 256, atol=4)


def test_audio_is_upstreams(data_dir, source):
    """A tone at 22,050 Hz, repeated three times, cut at three seconds."""
    dataset = load_dataset(config(data_dir), seed=0)
    clip = clips_of(dataset, "train")[0]
    waveform, rate = soundfile.read(source / "AudioWAV" / f"{clip}.wav")
    assert rate == 16_000
    # Resampled by Fourier interpolation here, and by a polyphase filter there.
    frequencies = np.fft.rfft(waveform)
    count = int(len(waveform) * 22_050 / 16_000)
    resampled = np.fft.irfft(frequencies, count) * count / len(waveform)
    expected = log_stft(np.tile(resampled, 3)[:66_150], 512, 353)
    actual = dataset.splits["train"][0]["audio"][..., 0]
    loud = expected > -3.0
    assert loud.mean() > 0.02
    np.testing.assert_allclose(actual[loud], expected[loud], atol=0.05)


def test_training_examples_change_with_the_epoch(data_dir):
    dataset = load_dataset(config(data_dir, frame_size=32), seed=0)
    batches = list(
        train_batches(
            dataset.splits["train"],
            batch_size=6,
            seed=0,
            num_steps=6,
            transforms=dataset.train_transforms,
        )
    )
    assert all(batch["visual"].shape == (6, 3, 32, 32, 3) for batch in batches)
    assert all(set(np.unique(batch["label"])) <= set(range(6)) for batch in batches)


def test_without_lists_no_speaker_is_in_two_splits(data_dir):
    dataset = load_dataset(config(data_dir), seed=0)
    assert "speaker-disjoint by ActorID, seed 0, 3/1/1 actors" in dataset.description
    actors = {s: {c[:4] for c in clips_of(dataset, s)} for s in ("train", "valid", "test")}
    assert sum(map(len, actors.values())) == 5
    assert set.union(*actors.values()) == {str(actor) for actor in tree.ACTORS}
    again = load_dataset(config(data_dir), seed=7)
    assert clips_of(again, "test") == clips_of(dataset, "test")  # the run's seed plays no part
    others = [load_dataset(config(data_dir, split_seed=s), seed=0) for s in range(1, 6)]
    assert any(clips_of(o, "test") != clips_of(dataset, "test") for o in others)


def test_labels_without_reading_the_records(data_dir):
    dataset = load_dataset(config(data_dir), seed=0)
    expected = [crema_d.LABELS[c.split("_")[2]] for c in clips_of(dataset, "train")]
    assert labels_of(dataset.splits["train"]).tolist() == expected


@pytest.mark.parametrize("form", [{}, {"header": True}, {"bom": True}, {"line_end": "\r\n"}])
def test_published_lists(data_dir, tmp_path, form):
    tree.write_list(tmp_path / "train.csv", CLIPS[:24], **form)
    tree.write_list(tmp_path / "test.csv", CLIPS[24:], **form)
    dataset = load_dataset(config(data_dir, splits=str(tmp_path)), seed=0)
    assert clips_of(dataset, "test") == CLIPS[24:]
    train, valid = clips_of(dataset, "train"), clips_of(dataset, "valid")
    assert valid and not set(train) & set(valid) and set(train) | set(valid) == set(CLIPS[:24])
    assert "published lists train.csv, test.csv" in dataset.description
    assert "valid a tenth of train" in dataset.description


def test_published_validation_list_is_preferred(data_dir, tmp_path):
    tree.write_list(tmp_path / "train.csv", CLIPS[:24])
    tree.write_list(tmp_path / "my_train.csv", CLIPS[:18])
    tree.write_list(tmp_path / "val.csv", CLIPS[18:24])
    tree.write_list(tmp_path / "test.csv", CLIPS[24:])
    dataset = load_dataset(config(data_dir, splits=str(tmp_path)), seed=0)
    assert clips_of(dataset, "train") == CLIPS[:18] and clips_of(dataset, "valid") == CLIPS[18:24]
    assert "my_train.csv, val.csv, test.csv" in dataset.description


def test_lists_in_the_source_are_kept_with_the_records(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", frames=2)
    tree.write_list(source / "train.csv", CLIPS[:24], bom=True, line_end="\r\n")
    tree.write_list(source / "test.csv", CLIPS[24:])
    crema_d.prepare(source, tmp_path / "data")
    dataset = load_dataset(config(tmp_path / "data"), seed=0)
    assert clips_of(dataset, "test") == CLIPS[24:]
    assert "published lists" in dataset.description


def test_extracted_frames(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", frames=5)
    crema_d.prepare(source, tmp_path / "data")
    dataset = load_dataset(config(tmp_path / "data", frame_size=16), seed=0)
    example = dataset.eval_transforms[0].map(dataset.splits["train"][0])
    for frame, value in zip(example["visual"], (0, 20, 40), strict=True):
        np.testing.assert_allclose(frame, value, atol=2)


def test_stored_frames_are_the_files_byte_for_byte(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=2)
    records = crema_d.prepare(source, tmp_path / "data")
    stored = records.source()[3]
    assert stored["clip"].decode() == records.rows[3]["clip"]
    files = sorted((source / "Image-01-FPS" / records.rows[3]["clip"]).iterdir())
    assert list(stored["frames"]) == [path.read_bytes() for path in files]


def test_large_frames_are_stored_at_short_side_256(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:1], size=(360, 480), num_frames=3)
    frame = crema_d.prepare(source, tmp_path / "data").source()[0]["frames"][0]
    assert Image.open(io.BytesIO(frame)).size == (341, 256)


def test_fps(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:1], num_frames=50)
    assert len(crema_d.prepare(source, tmp_path / "1", fps=1).source()[0]["frames"]) == 2
    assert len(crema_d.prepare(source, tmp_path / "5", fps=5).source()[0]["frames"]) == 10
    with pytest.raises(DataError, match="another fps"):
        crema_d.prepare(source, tmp_path / "5", fps=2)


def test_human_ratings_become_qualities(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", frames=1)
    tree.write_ratings(source / "processedResults" / "summaryTable.csv", CLIPS[:-1])
    crema_d.prepare(source, tmp_path / "data")
    dataset = load_dataset(config(tmp_path / "data"), seed=0)
    assert "human ratings as quality, 2 missing" in dataset.description
    qualities = [dataset.splits[s][0] for s in ("train", "valid", "test")]
    for example in qualities:  # voice: 60 of 100; face: 80 of 100, tied with one other emotion
        assert example["quality_audio"] == pytest.approx(0.6)
        assert example["quality_visual"] == pytest.approx(0.4)
        assert example["quality_audio"].dtype == np.float32


@pytest.mark.parametrize(
    ("votes", "levels", "expected"),
    [
        ("A", "75", 0.75),
        ("H", "75", 0.0),
        ("A:H", "50:90", 0.25),
        ("H:A:S", "10:60:20", 0.2),
        ("A", "NA", None),
        ("A:H", "50", None),
        ("", "", None),
        ("A", "130", 1.0),
    ],
)
def test_rating_rule(tmp_path, votes, levels, expected):
    (tmp_path / "t.csv").write_text(
        "FileName,VoiceVote,VoiceLevel,FaceVote,FaceLevel\n"
        f"1001_DFA_ANG_XX,{votes},{levels},A,100\n"
    )
    assert crema_d.read_ratings(tmp_path / "t.csv") == {
        "1001_DFA_ANG_XX": (expected and pytest.approx(expected), 1.0)
    }


def test_missing_ratings_get_the_mean():
    values, missing = crema_d.fill_ratings([0.25, None, 0.75])
    assert values.tolist() == [0.25, 0.5, 0.75] and missing == 1
    assert crema_d.fill_ratings([None, None])[0].tolist() == [0, 0]


# What can be wrong, each with its line.


def test_missing_folder_says_what_to_get_and_where(tmp_path):
    refuses(
        lambda: crema_d.prepare(tmp_path / "none", tmp_path / "data"),
        "none: no such folder", "git clone https://github.com/CheyneyComputerScience/CREMA-D",
        "AudioWAV/", "VideoFlash/", "--source",
    )  # fmt: skip


def test_wrong_folder_says_what_it_holds(tmp_path):
    (tmp_path / "photos").mkdir()
    refuses(lambda: crema_d.prepare(tmp_path, tmp_path / "data"), "no AudioWAV/ but photos")
    (tmp_path / "AudioWAV").mkdir()
    refuses(
        lambda: crema_d.prepare(tmp_path, tmp_path / "data"), "neither VideoFlash/ nor Image-01"
    )
    (tmp_path / "Image-05-FPS").mkdir()
    refuses(lambda: crema_d.prepare(tmp_path, tmp_path / "data"), "Image-05-FPS", "--fps")


def test_nothing_prepared(tmp_path):
    refuses(lambda: load_dataset(config(""), seed=0), "data.path: not given")
    refuses(
        lambda: load_dataset(config(tmp_path), seed=0),
        "no records", "python -m rollingq_jax.prepare crema_d --source CREMA-D --data_dir",
    )  # fmt: skip


DAMAGE = {
    "truncated WAV": lambda root, clip: truncate(root / "AudioWAV" / f"{clip}.wav", 3000),
    "empty WAV": lambda root, clip: truncate(root / "AudioWAV" / f"{clip}.wav", 0),
    "no frames": lambda root, clip: truncate(root / "VideoFlash" / f"{clip}.flv", 0),
    "truncated FLV": lambda root, clip: truncate(root / "VideoFlash" / f"{clip}.flv", 60),
    "video missing": lambda root, clip: (root / "VideoFlash" / f"{clip}.flv").unlink(),
    "sound missing": lambda root, clip: (root / "AudioWAV" / f"{clip}.wav").unlink(),
    "NaN in sound": lambda root, clip: soundfile.write(
        root / "AudioWAV" / f"{clip}.wav", np.full(16_000, np.nan), 16_000, subtype="FLOAT"
    ),
    "Git LFS pointer": lambda root, clip: (root / "AudioWAV" / f"{clip}.wav").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
}


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:size])


@pytest.mark.parametrize("kind", DAMAGE)
def test_unreadable_clips_are_left_out_by_name(tmp_path, kind, capsys):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:18])
    DAMAGE[kind](source, CLIPS[4])
    command = ["crema_d", "--source", str(source), "--data_dir", str(tmp_path / "data")]
    assert run_command(prepare.command, ["prepare", *command]) == 0
    printed = capsys.readouterr()
    assert "17 clips" in printed.out and "1 unreadable" in printed.out
    lines = printed.err.splitlines()
    assert sum(line.startswith(f"unreadable: {CLIPS[4]}: ") for line in lines) == 1
    assert lines[-1] == "1 unreadable, left out"
    assert "crema_d: 100%" in printed.err  # progress
    dataset = load_dataset(config(tmp_path / "data"), seed=0)
    assert sum(map(len, dataset.splits.values())) == 17

    strict = ["crema_d", "--source", str(source), "--data_dir", str(tmp_path / "b"), "--strict"]
    assert run_command(prepare.command, ["prepare", *strict]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and CLIPS[4] in last
    assert not (tmp_path / "b" / "crema_d").exists()


def test_a_zero_length_video(tmp_path):
    """A header and a video track, and no frame in it."""
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6])
    path = source / "VideoFlash" / f"{CLIPS[0]}.flv"
    path.unlink()
    with av.open(str(path), "w") as container:
        stream = container.add_stream("flv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        container.start_encoding()
    records = crema_d.prepare(source, tmp_path / "data")
    assert list(records.unreadable) == [CLIPS[0]]
    assert str(path) in records.unreadable[CLIPS[0]]


def test_grey_frames_are_handled(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:18], frames=2)
    for path in (source / "Image-01-FPS" / CLIPS[0]).iterdir():
        media_files.write_jpeg(path, mode="L", size=(48, 64), value=77)
    records = crema_d.prepare(source, tmp_path / "data", strict=True)
    number = [row["clip"] for row in records.rows].index(CLIPS[0])
    example = {"visual": list(records.source()[number]["frames"])}
    dataset = load_dataset(config(tmp_path / "data", frame_size=8), seed=0)
    drawn = dataset.train_transforms[0].random_map(example, np.random.default_rng(0))
    for result in (dataset.eval_transforms[0].map(example), drawn):
        np.testing.assert_allclose(result["visual"], tree.flat(77, size=8), atol=2)


def test_too_few_frames_are_repeated(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:18], frames=1)
    crema_d.prepare(source, tmp_path / "data", strict=True)
    dataset = load_dataset(config(tmp_path / "data", num_frames=5, frame_size=8), seed=0)
    example = dataset.splits["train"][0]
    assert dataset.eval_transforms[0].map(example)["visual"].shape == (5, 8, 8, 3)
    drawn = dataset.train_transforms[0].random_map(example, np.random.default_rng(0))
    assert drawn["visual"].shape == (5, 8, 8, 3)


def test_frames_folder_without_frames_or_of_mixed_sizes(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=2)
    for path in (source / "Image-01-FPS" / CLIPS[0]).iterdir():
        path.unlink()
    media_files.write_jpeg(source / "Image-01-FPS" / CLIPS[1] / "00000.jpg", size=(10, 10))
    records = crema_d.prepare(source, tmp_path / "data")
    assert "holds no .jpg file" in records.unreadable[CLIPS[0]]
    assert "different sizes" in records.unreadable[CLIPS[1]]


def test_unknown_emotion_code(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=[*CLIPS[:6], "1001_DFA_JOY_XX", "notes"])
    records = crema_d.prepare(source, tmp_path / "data")
    assert "emotion code 'JOY'; allowed: one of NEU, HAP" in records.unreadable["1001_DFA_JOY_XX"]
    assert "not a name of CREMA-D" in records.unreadable["notes"]


def test_duplicate_clip_in_the_tree(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=1)
    copy = source / "AudioWAV" / f"{CLIPS[0]}.WAV"
    copy.write_bytes((source / "AudioWAV" / f"{CLIPS[0]}.wav").read_bytes())
    refuses(lambda: crema_d.prepare(source, tmp_path / "data"), "duplicate clip", CLIPS[0], ".WAV")


def test_names_that_some_copies_misspell_and_hidden_files(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=1)
    wav = source / "AudioWAV" / f"{CLIPS[0]}.wav"
    wav.rename(wav.with_name(f"{CLIPS[0][:-1]}.wav"))
    (source / "AudioWAV" / "._1001_DFA_ANG_XX.wav").write_bytes(b"")
    records = crema_d.prepare(source, tmp_path / "data", strict=True)
    assert len(records.rows) == 6


BAD_LISTS = {
    "absent clip": ("1001_DFA_NEU_XX,NEU\n9999_DFA_NEU_XX,NEU", "not among the prepared ones"),
    "unknown code": ("1001_DFA_NEU_XX,JOY", "line 1: emotion code 'JOY'"),
    "unknown code after a header": ("name,label\n1001_DFA_NEU_XX,3", "line 2: emotion code '3'"),
    "contradiction": ("1001_DFA_NEU_XX,HAP", "is listed as 'HAP'"),
    "duplicate": ("1001_DFA_NEU_XX,NEU\n1001_DFA_NEU_XX,NEU", "line 2: duplicate clip"),
    "duplicate over lists": (f"{CLIPS[24]},NEU", "duplicate clip"),
    "one column": ("1001_DFA_NEU_XX", "line 1: 1 cells"),
    "other names": ("1001_DFA_NEU_XX.wav,NEU", "not a name of CREMA-D"),
    "empty": ("", "lists no clips"),
    "binary": (b"\xff\xfe\x00\x01", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_split_lists(data_dir, tmp_path, kind):
    content, message = BAD_LISTS[kind]
    (tmp_path / "train.csv").write_bytes(
        content if isinstance(content, bytes) else content.encode()
    )
    tree.write_list(tmp_path / "test.csv", CLIPS[24:])
    refuses(lambda: load_dataset(config(data_dir, splits=str(tmp_path)), seed=0), message)


def test_split_folder_without_lists(data_dir, tmp_path):
    refuses(lambda: load_dataset(config(data_dir, splits=str(tmp_path)), seed=0), "no split lists")


def test_absent_clips_are_found_before_the_preparation(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:6], frames=1)
    tree.write_list(source / "train.csv", CLIPS[:7])
    tree.write_list(source / "test.csv", CLIPS[7:8])
    refuses(lambda: crema_d.prepare(source, tmp_path / "data"), "2 of 8 listed clips", CLIPS[6])


def test_listed_clips_that_were_unreadable_are_left_out(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", frames=1)
    truncate(source / "AudioWAV" / f"{CLIPS[0]}.wav", 3000)
    tree.write_list(source / "train.csv", CLIPS[:24])
    tree.write_list(source / "test.csv", CLIPS[24:])
    crema_d.prepare(source, tmp_path / "data")
    dataset = load_dataset(config(tmp_path / "data"), seed=0)
    assert sum(map(len, dataset.splits.values())) == 29
    assert "1 listed clips unreadable" in dataset.description


def test_too_few_speakers(tmp_path):
    source = tree.make_tree(tmp_path / "CREMA-D", clips=CLIPS[:12], frames=1)
    crema_d.prepare(source, tmp_path / "data")
    refuses(lambda: load_dataset(config(tmp_path / "data"), seed=0), "2 actors", "at least 3")


def test_bad_ratings(tmp_path):
    table = tmp_path / "summaryTable.csv"
    table.write_text("a,b\n1,2\n")
    refuses(lambda: crema_d.read_ratings(table), "no column FileName", "summaryTable.csv?")
    tree.write_ratings(table, [CLIPS[0], CLIPS[0]])
    refuses(lambda: crema_d.read_ratings(table), "line 3: duplicate clip")
    table.write_text(table.read_text().splitlines()[0] + "\nx\n")
    refuses(lambda: crema_d.read_ratings(table), "line 2: 1 cells, 7 in the header")


@pytest.mark.parametrize(
    ("field", "value"), [("num_frames", 0), ("frame_size", "big"), ("split_seed", -1)]
)
def test_bad_fields(data_dir, field, value):
    with pytest.raises(ConfigError, match=f"data.{field}"):
        load_dataset(config(data_dir, **{field: value}), seed=0)


def test_no_tensorflow(data_dir):
    load_dataset(config(data_dir), seed=0).splits["train"][0]
    assert "tensorflow" not in sys.modules
