"""Which frames are used, and that one crop and flip serves all frames of a clip."""

import collections
import io

import grain
import numpy as np
import pytest
from PIL import Image

from rollingq_jax.data import video
from rollingq_jax.data.video import decode_image, encode_jpeg, resize_image
from rollingq_jax.errors import DataError


def rng(seed=0):
    return np.random.default_rng(seed)


def gradient(height=40, width=60, offset=0):
    """A smooth image whose red grows to the right and green downwards."""
    x = np.linspace(0, 200, width)[None].repeat(height, 0)
    y = np.linspace(0, 200, height)[:, None].repeat(width, 1)
    return np.stack([x, y, np.full_like(x, offset)], axis=-1).astype(np.uint8)


def jpeg(image, **options):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="JPEG", quality=95, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("count", "expected"),
    # Upstream's 1-based frames are 1, 3, 5 of 7; 1, 4, 7 of 9 and 10; 2, 6, 10 of 12, where
    # its name for frame 10 does not exist. Up to 6 frames it takes frame 1 three times.
    [
        (7, [0, 2, 4]),
        (9, [0, 3, 6]),
        (10, [0, 3, 6]),
        (12, [1, 5, 9]),
        (30, [4, 14, 24]),
        (6, [0, 2, 4]),
        (3, [0, 1, 2]),
        (2, [0, 1, 1]),
        (1, [0, 0, 0]),
    ],
)
def test_segment_frames_in_evaluation(count, expected):
    assert video.segment_frames(count, 3).tolist() == expected


@pytest.mark.parametrize("count", [3, 4, 10, 12, 31])
def test_segment_frames_in_training(count):
    draws = np.array([video.segment_frames(count, 3, rng(seed)) for seed in range(400)])
    segment = count // 3
    for i in range(3):
        assert set(draws[:, i]) == set(range(i * segment, (i + 1) * segment))


def test_random_frames_are_ascending_and_uniform():
    draws = np.array([video.random_frames(5, 3, rng(seed)) for seed in range(2000)])
    assert (np.diff(draws, axis=1) >= 0).all()
    counts = np.bincount(draws.ravel(), minlength=5)
    np.testing.assert_allclose(counts / counts.sum(), 0.2, atol=0.03)


@pytest.mark.parametrize("pick", [video.random_frames, video.segment_frames])
def test_a_clip_without_frames(pick):
    with pytest.raises(DataError, match="without frames"):
        pick(0, 3, rng())


def test_crop_boxes_fit_and_cover_the_range():
    width, height = 341, 256
    boxes = [video.random_crop_box(width, height, rng(seed)) for seed in range(2000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= width and 0 <= top < bottom <= height
    areas = np.array([(r - x) * (b - y) for x, y, r, b in boxes]) / (width * height)
    ratios = np.array([(r - x) / (b - y) for x, y, r, b in boxes])
    assert 0.07 < areas.min() < 0.12 and 0.9 < areas.max() <= 1.0
    assert 0.74 < ratios.min() < 0.78 and 1.28 < ratios.max() < 1.35


def test_crop_box_of_an_image_that_no_draw_fits():
    assert video.random_crop_box(1000, 10, rng()) == (493, 0, 506, 10)
    assert video.random_crop_box(10, 1000, rng()) == (0, 493, 10, 506)


def clip(number):
    return {"visual": [jpeg(gradient(offset=10 * i)) for i in range(number)], "label": np.int32(1)}


def test_evaluation_takes_whole_frames():
    example = clip(5)
    result = video.EvalFrames("visual", 3, 24).map(example)
    assert result["visual"].shape == (3, 24, 24, 3) and result["visual"].dtype == np.uint8
    assert result["label"] == 1 and isinstance(example["visual"], list)
    for frame, index in zip(result["visual"], [0, 2, 4], strict=True):
        whole = resize_image(decode_image(example["visual"][index]), (24, 24))
        np.testing.assert_array_equal(frame, whole)


@pytest.mark.parametrize("count", [1, 2])
def test_short_clips_repeat_frames(count):
    result = video.EvalFrames("visual", 3, 16).map(clip(count))["visual"]
    assert result.shape == (3, 16, 16, 3)
    assert len({frame.tobytes() for frame in result}) == count


def test_training_crops_all_frames_of_a_clip_alike():
    """Frames differ in blue alone, so red and green show the crop."""
    transform = video.TrainFrames("visual", 3, 32)
    same = {"visual": [jpeg(gradient())] * 4}
    seen = []
    for seed in range(30):
        clip_frames = transform.random_map(same, rng(seed))["visual"]
        assert clip_frames.shape == (3, 32, 32, 3) and clip_frames.dtype == np.uint8
        np.testing.assert_array_equal(clip_frames[0], clip_frames[1])
        np.testing.assert_array_equal(clip_frames[0], clip_frames[2])
        seen.append(clip_frames[0])
    flipped = [int(image[:, 0, 0].mean()) > int(image[:, -1, 0].mean()) for image in seen]
    assert 5 < sum(flipped) < 25
    assert len({image.tobytes() for image in seen}) == 30


def test_training_crop_is_the_box_that_was_drawn():
    image = gradient()
    data = jpeg(image)
    box, generator = None, rng(3)
    video.random_frames(1, 2, generator)
    flip = generator.random() < 0.5
    box = video.random_crop_box(60, 40, generator)
    transform = video.TrainFrames("visual", 2, 20)
    clip_frames = transform.random_map({"visual": [data]}, rng(3))["visual"]
    left, top, right, bottom = box
    expected = resize_image(decode_image(data)[top:bottom, left:right], (20, 20))
    expected = expected[:, ::-1] if flip else expected
    # Pillow filters with pixels outside of the box where there are some: only borders differ.
    np.testing.assert_allclose(
        clip_frames[0, 2:-2, 2:-2].astype(int), expected[2:-2, 2:-2].astype(int), atol=3
    )


def test_training_draws_depend_on_the_generator_alone():
    transform = video.TrainFrames("visual", 3, 16)
    first = transform.random_map(clip(6), rng(1))["visual"]
    np.testing.assert_array_equal(first, transform.random_map(clip(6), rng(1))["visual"])
    assert isinstance(transform, grain.transforms.RandomMap)


def test_training_uses_every_frame_in_time():
    transform = video.TrainFrames("visual", 1, 8)
    example = clip(4)
    blues = collections.Counter(
        int(round(transform.random_map(example, rng(seed))["visual"][0, :, :, 2].mean() / 10))
        for seed in range(200)
    )
    assert set(blues) == {0, 1, 2, 3}


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
def test_grey_and_cmyk_jpegs_become_rgb(mode):
    image = Image.fromarray(gradient()).convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=95)
    clip_frames = video.decode_frames([buffer.getvalue()], np.array([0]), 16)
    assert clip_frames.shape == (1, 16, 16, 3)
    if mode == "L":
        np.testing.assert_array_equal(clip_frames[..., 0], clip_frames[..., 2])
    else:
        expected = resize_image(gradient(), (16, 16)).astype(int)
        np.testing.assert_allclose(clip_frames[0].astype(int), expected, atol=12)


def test_grey_frames_equal_their_rgb_copies():
    gray = gradient()[:, :, 0]
    box = (5, 3, 40, 33)
    data = jpeg(gray)
    rgb = decode_image(data)
    expected = Image.fromarray(rgb).resize((16, 16), Image.Resampling.BILINEAR, box=box)
    np.testing.assert_array_equal(
        video.decode_frames([data], np.array([0]), 16, lambda w, h: box)[0], np.asarray(expected)
    )


def test_stored_frames_have_short_side_256():
    stored = video.stored_jpeg(jpeg(gradient(360, 480)))
    assert decode_image(stored).shape == (256, 341, 3)
    stored = video.stored_jpeg(jpeg(gradient(480, 360)))
    assert decode_image(stored).shape == (341, 256, 3)


def test_small_jpegs_are_stored_byte_for_byte():
    data = jpeg(gradient(40, 60))
    assert video.stored_jpeg(data) is data
    gray = jpeg(gradient()[:, :, 0])
    assert video.stored_jpeg(gray) is gray
    buffer = io.BytesIO()
    Image.fromarray(gradient()).save(buffer, format="PNG")
    stored = video.stored_jpeg(buffer.getvalue())
    assert stored[:2] == b"\xff\xd8"


def test_turned_photographs_are_stored_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to see it upright
    stored = video.stored_jpeg(jpeg(gradient(40, 60), exif=exif))
    assert decode_image(stored).shape == (60, 40, 3)
    assert not Image.open(io.BytesIO(stored)).getexif()


def test_damaged_frames_are_named():
    data = encode_jpeg(gradient())
    with pytest.raises(DataError, match="00001.jpg"):
        video.stored_clip([("00000.jpg", data), ("00001.jpg", data[:200])])
    with pytest.raises(DataError, match="40 x 60|60 x 40"):
        video.stored_clip([("a", data), ("b", encode_jpeg(gradient(60, 40)))])
    with pytest.raises(DataError, match="without frames"):
        video.stored_clip([])


def test_frames_of_a_folder_come_in_the_order_of_their_numbers(tmp_path):
    for number in (10, 9, 100, 1):
        (tmp_path / f"frame_{number}.jpg").write_bytes(jpeg(gradient(offset=2 * number)))
    (tmp_path / "notes.txt").write_text("x")
    stored = video.clip_from_folder(tmp_path)
    blues = [decode_image(data)[:, :, 2].mean() for data in stored]
    np.testing.assert_allclose(blues, [2, 18, 20, 200], atol=1)


def test_evenly_spaced_is_the_evaluation_default():
    assert video.EvalFrames("visual", 3, 8).pick is video.evenly_spaced_frames
