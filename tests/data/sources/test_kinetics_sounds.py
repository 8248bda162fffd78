"""Kinetics-Sounds from videos and from upstream's preprocessed tree, in small."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from rollingq_jax import prepare
from rollingq_jax.data.load import load_dataset
from rollingq_jax.data.pipeline import eval_batches, train_batches
from rollingq_jax.data.sources import kinetics_sounds
from rollingq_jax.data.video import read_video_audio
from rollingq_jax.errors import ConfigError
from rollingq_jax.train.cli import run_command
from tests.data import media_files
from tests.data.media_files import refuses

TRAIN = [f"train{i:06d}_{i:06d}_{i + 10:06d}" for i in range(12)]
TEST = [f"-test_{i:05d}" for i in range(4)]  # eleven characters, - and _ among them


def config(path, **fields):
    return ConfigDict({"name": "kinetics_sounds", "path": str(path), "cache_dir": "", **fields})


def write_lists(root, form="overlap", train=TRAIN, test=TEST):
    """The two lists in one of the published formats; labels count up."""
    root.mkdir(parents=True, exist_ok=True)
    if form == "overlap":
        files, line = ("ks_train_overlap.txt", "ks_test_overlap.txt"), "{} {}"
    else:
        files, line = ("my_train.txt", "my_test.txt"), "{},10,{}"
    for name, clips in zip(files, (train, test), strict=True):
        lines = [line.format(clip, i % 4) for i, clip in enumerate(clips)]
        (root / name).write_text("\n".join(lines) + "\n")


def make_preprocessed(root, num_frames=7, train=TRAIN, test=TEST):
    """train_spec/, test_spec/ and the two folders of frames; frame number n has gray level 10 n."""
    write_lists(root, train=train, test=test)
    folders = {
        "train": ("train_spec", "train-frames-1fps/train"),
        "test": ("test_spec", "val-frames-1fps/test"),
    }
    for split, clips in (("train", train), ("test", test)):
        spec, frames = (root / name for name in folders[split])
        spec.mkdir(parents=True)
        for number, clip in enumerate(clips):
            np.save(spec / f"{clip}.npy", np.full((1024, 128), number / 10, np.float32))
            (frames / clip).mkdir(parents=True)
            for n in range(1, num_frames + 1):
                media_files.write_jpeg(frames / clip / f"frame_{n:05d}.jpg", value=10 * n)
    return root


def make_videos(root, clips, num_frames=75, **options):
    for clip in clips:
        media_files.write_video(
            root / f"{clip}.mp4", num_frames=num_frames, fps=25, audio_rate=44_100, **options
        )
    return root


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ks")
    kinetics_sounds.prepare(make_preprocessed(folder / "KS"), folder / "data", strict=True)
    return folder / "data"


def test_preprocessed_tree(data_dir):
    dataset = load_dataset(config(data_dir, frame_size=16), seed=0)
    assert {s: len(d) for s, d in dataset.splits.items()} == {"train": 8, "test": 4, "valid": 4}
    assert dataset.num_classes == 31 and dataset.class_names == ()
    assert dataset.modalities["audio"].shape == (1024, 128, 1)
    assert "ks_train_overlap.txt, ks_test_overlap.txt" in dataset.description
    batch = next(
        eval_batches(dataset.splits["test"], batch_size=4, transforms=dataset.eval_transforms)
    )
    assert batch["label"].tolist() == [0, 1, 2, 3]
    assert batch["audio"].shape == (4, 1024, 128, 1)
    np.testing.assert_allclose(batch["audio"][:, 5, 5, 0], [0, 0.1, 0.2, 0.3])
    # 7 frames: upstream evaluates frames 1, 3 and 5
    for position, number in enumerate((1, 3, 5)):
        np.testing.assert_allclose(batch["visual"][:, position], 10 * number, atol=2)


def test_training_frames_come_from_their_segments(data_dir):
    dataset = load_dataset(config(data_dir, frame_size=8), seed=0)
    batches = train_batches(
        dataset.splits["train"],
        batch_size=8,
        seed=0,
        num_steps=20,
        transforms=dataset.train_transforms,
    )
    seen = [set(), set(), set()]
    for batch in batches:
        for position in range(3):
            levels = batch["visual"][:, position].mean(axis=(1, 2, 3))
            seen[position] |= set(np.rint(levels / 10).astype(int).tolist())
    assert seen == [{1, 2}, {3, 4}, {5, 6}]


def test_more_than_nine_frames(tmp_path):
    """Where upstream's evaluation opens a file that does not exist."""
    source = make_preprocessed(tmp_path / "KS", num_frames=12)
    kinetics_sounds.prepare(source, tmp_path / "data", strict=True)
    dataset = load_dataset(config(tmp_path / "data", frame_size=8), seed=0)
    video = dataset.eval_transforms[0].map(dataset.splits["test"][0])["visual"]
    for frame, number in zip(video, (2, 6, 10), strict=True):
        np.testing.assert_allclose(frame, 10 * number, atol=2)


@pytest.mark.parametrize("num_frames", [1, 2, 3])
def test_few_frames_are_kept_and_repeated(tmp_path, num_frames):
    """Upstream drops clips of up to three frames."""
    source = make_preprocessed(tmp_path / "KS", num_frames=num_frames)
    kinetics_sounds.prepare(source, tmp_path / "data", strict=True)
    dataset = load_dataset(config(tmp_path / "data", frame_size=8), seed=0)
    example = dataset.splits["test"][0]
    assert dataset.eval_transforms[0].map(example)["visual"].shape == (3, 8, 8, 3)
    drawn = dataset.train_transforms[0].random_map(example, np.random.default_rng(0))
    assert drawn["visual"].shape == (3, 8, 8, 3)


def test_videos_with_names_of_the_kinetics_distribution(tmp_path):
    """Lists in the second format; test names carry the start second without zeros."""
    test = ["-3Mwkq-7TV4_2", "0BSttGHc6jw_15"]
    train = TRAIN[:6]
    source = tmp_path / "KS"
    write_lists(source, "my", train, test)
    (source / "videos" / "val").mkdir(parents=True)
    make_videos(source / "videos", train)
    names = ["-3Mwkq-7TV4_000002_000012", "0BSttGHc6jw_000015_000025", "0BSttGHc6jw_000099_000109"]
    make_videos(source / "videos" / "val", names)
    records = kinetics_sounds.prepare(source, tmp_path / "data", strict=True, workers=2)
    assert len(records.rows) == 8
    dataset = load_dataset(config(tmp_path / "data", frame_size=8), seed=0)
    assert "my_train.txt, my_test.txt" in dataset.description
    example = dataset.splits["test"][0]
    assert len(example["visual"]) == 3  # 75 frames at 25 a second, one for each second
    audio = example["audio"]
    assert audio.shape == (1024, 128, 1) and audio.dtype == np.float32
    np.testing.assert_allclose(audio[310:], 0.438, atol=1e-3)  # three seconds give 298 frames
    loudest = audio[50:250, :, 0].argmax(axis=1)
    # 440 Hz on the scale 1127 ln(1 + f / 700) from 20 to 8000 Hz in 128 filters
    low, high = (1127 * np.log1p(f / 700) for f in (20, 8000))
    expected = (1127 * np.log1p(440 / 700) - low) / (high - low) * 129 - 1
    np.testing.assert_allclose(loudest, expected, atol=1.5)


def test_the_mean_of_the_channels_is_used(tmp_path):
    make_videos(tmp_path, ["a"], num_frames=25)
    waveform, rate = read_video_audio(tmp_path / "a.mp4")
    assert rate == 44_100 and waveform.ndim == 1


def test_class_names_of_ones_own(tmp_path):
    source = make_preprocessed(tmp_path / "KS", num_frames=3)
    names = [f"action {i}" for i in range(31)]
    (source / "classes.txt").write_text("\n".join(names) + "\n")
    kinetics_sounds.prepare(source, tmp_path / "data")
    assert load_dataset(config(tmp_path / "data"), seed=0).class_names == tuple(names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("-3Mwkq-7TV4_000002_000012", ("-3Mwkq-7TV4", 2)),
        ("0HQsAGUnQ_0_6", ("0HQsAGUnQ_0", 6)),
        ("0HQsAGUnQ_0", ("0HQsAGUnQ_0", None)),
        ("short", ("short", None)),
    ],
)
def test_names(name, expected):
    assert kinetics_sounds.split_name(name) == expected


def test_missing_folder_lists_or_media(tmp_path):
    prepare_it = lambda: kinetics_sounds.prepare(tmp_path / "KS", tmp_path / "data")  # noqa: E731
    refuses(prepare_it, "no such folder", "ks_train_overlap.txt", "cvdfoundation/kinetics-dataset")
    (tmp_path / "KS").mkdir()
    refuses(prepare_it, "holds no lists", "--source")
    write_lists(tmp_path / "KS")
    refuses(prepare_it, "neither videos nor train_spec/ but ks_test_overlap.txt")
    refuses(lambda: load_dataset(config(""), seed=0), "data.path: not given")
    refuses(
        lambda: load_dataset(config(tmp_path), seed=0),
        "python -m rollingq_jax.prepare kinetics_sounds",
    )


BAD_LISTS = {
    "label out of range": ("a 31", "line 1: label 31; allowed: from 0 to 30"),
    "negative label": ("a -1", "label -1"),
    "no label": ("abc", "allowed: `name label`"),
    "name as label": ("a drumming", "allowed: `name label`"),
    "four cells": ("a,b,10,3", "allowed: `name label`"),
    "duplicate": ("a 1\na 2", "line 2: duplicate clip 'a'"),
    "path": ("../../etc/passwd 1", "is not a clip's name"),
    "empty": ("\n\n", "lists no clips"),
    "binary": (b"\xff\xfe\x00", "cannot be read"),
}


@pytest.mark.parametrize("kind", BAD_LISTS)
def test_bad_lists(tmp_path, kind):
    content, message = BAD_LISTS[kind]
    path = tmp_path / "ks_train_overlap.txt"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refuses(lambda: kinetics_sounds.read_list(path), message)


def test_lists_with_marks_line_ends_and_suffixes(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes(b"\xef\xbb\xbfa_1.mp4,10,3\r\nb 30\r\n")
    assert kinetics_sounds.read_list(path) == {"a_1": 3, "b": 30}


def test_a_clip_in_both_lists(tmp_path):
    write_lists(tmp_path, train=TRAIN, test=[TRAIN[0]])
    refuses(
        lambda: kinetics_sounds.prepare(tmp_path, tmp_path / "data"), "duplicate clip", TRAIN[0]
    )


def test_class_names_must_be_31(tmp_path):
    source = make_preprocessed(tmp_path / "KS", num_frames=1)
    (source / "classes.txt").write_text("a\nb\n")
    refuses(lambda: kinetics_sounds.prepare(source, tmp_path / "data"), "2 different names", "31")


def damage_tree(root, kind):
    """Damages the first training clip of a preprocessed tree."""
    spec = root / "train_spec" / f"{TRAIN[0]}.npy"
    frames = root / "train-frames-1fps" / "train" / TRAIN[0]
    if kind == "no npy":
        spec.unlink()
    elif kind == "truncated npy":
        spec.write_bytes(spec.read_bytes()[:1000])
    elif kind == "wrong shape":
        np.save(spec, np.zeros((128, 1024), np.float32))
    elif kind == "NaN":
        np.save(spec, np.full((1024, 128), np.nan, np.float32))
    elif kind == "pickled":
        np.save(spec, np.array([{}], dtype=object), allow_pickle=True)
    elif kind == "no folder":
        for path in frames.iterdir():
            path.unlink()
        frames.rmdir()
    else:
        (frames / "frame_00001.jpg").write_bytes(b"\xff\xd8")


@pytest.mark.parametrize(
    "kind", ["no npy", "truncated npy", "wrong shape", "NaN", "pickled", "no folder", "bad JPEG"]
)
def test_damaged_clips_are_left_out_by_name(tmp_path, kind, capsys):
    source = make_preprocessed(tmp_path / "KS", num_frames=2)
    damage_tree(source, kind)
    command = ["kinetics_sounds", "--source", str(source), "--data_dir"]
    assert run_command(prepare.command, ["prepare", *command, str(tmp_path / "a")]) == 0
    printed = capsys.readouterr()
    assert "15 clips" in printed.out and "1 unreadable, left out" in printed.err
    assert f"unreadable: train/{TRAIN[0]}" in printed.err
    assert run_command(prepare.command, ["prepare", *command, str(tmp_path / "b"), "--strict"]) == 2
    assert TRAIN[0] in capsys.readouterr().err.splitlines()[-1]


def test_videos_that_cannot_be_used(tmp_path):
    source = tmp_path / "KS"
    write_lists(source)
    make_videos(source, TRAIN[:3], num_frames=25)
    make_videos(source, TEST[:1], num_frames=25)
    media_files.write_video(source / f"{TRAIN[3]}.mp4", num_frames=25)  # without sound
    (source / f"{TRAIN[4]}.mp4").write_bytes(b"")
    make_videos(source, [TRAIN[5]], num_frames=25)
    whole = (source / f"{TRAIN[5]}.mp4").read_bytes()
    (source / f"{TRAIN[5]}.mp4").write_bytes(whole[: len(whole) // 2])
    make_videos(source, [f"{TEST[1]}_000001_000011", f"{TEST[1]}_000050_000060"], num_frames=25)
    records = kinetics_sounds.prepare(source, tmp_path / "data")
    assert [row["clip"] for row in records.rows] == [*TRAIN[:3], TEST[0]]
    reasons = records.unreadable
    assert "has no audio track" in reasons[f"train/{TRAIN[3]}"]
    assert "empty" in reasons[f"train/{TRAIN[4]}"]
    assert f"{TRAIN[5]}.mp4" in reasons[f"train/{TRAIN[5]}"]
    assert "no video of that name" in reasons[f"train/{TRAIN[6]}"]
    assert "duplicate clip" in reasons[f"test/{TEST[1]}"]


def test_no_readable_test_clip(tmp_path):
    source = tmp_path / "KS"
    write_lists(source)
    make_videos(source, TRAIN[:3], num_frames=25)
    kinetics_sounds.prepare(source, tmp_path / "data")
    refuses(lambda: load_dataset(config(tmp_path / "data"), seed=0), "no clip of test is readable")


def test_bad_fields(data_dir):
    with pytest.raises(ConfigError, match="data.num_frames"):
        load_dataset(config(data_dir, num_frames=0), seed=0)
