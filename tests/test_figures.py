"""Pictures: every pixel of a grid, captions, curves by their figure, and files that are whole or absent."""

import os

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from configs import common
from nested import figures as pictures
from nested.modes import sample


def images_of(values, height=4, width=6, channels=3):
    """One image of a single grey per value."""
    return np.stack([np.full((height, width, channels), value, np.uint8) for value in values])


def metrics_of(levels, count, start=0, low=0.1):
    """Losses that fall as exp(-step / 100) from 1 + low to low, validation at two noise levels every tenth step."""
    lines = []
    for step in range(start, start + count):
        losses = {f"loss/{level}": low + np.exp(-step / 100) for level in levels}
        if step % 10 == 9:
            losses |= {f"validation/{level}/t{t}": low + float(t) for level in levels for t in ("0.5", "0.25")}
        lines.append({"step": step, "loss": 7.0, **losses})
    return lines


def text_lines(area):
    """How many lines of text there are: bands of rows with ink, white between them."""
    ink = np.concatenate([[False], (area < 128).any(axis=(1, 2))])
    return int((ink[1:] & ~ink[:-1]).sum())


@pytest.fixture
def figures(monkeypatch):
    """The figures that would have been rendered."""
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, file, format: drawn.append(figure))
    return drawn


def test_grid_puts_every_image_in_its_place():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    grid = pictures.image_grid(images, columns=3, scale=2, padding=1)
    assert grid.dtype == np.uint8 and grid.shape == (2 * (8 + 1) + 1, 3 * (12 + 1) + 1, 3)
    for number, image in enumerate(images):
        top, left = 1 + 9 * (number // 3), 1 + 13 * (number % 3)
        for y, x in ((0, 0), (1, 0), (0, 1), (7, 11)):
            np.testing.assert_array_equal(grid[top + y, left + x], image[y // 2, x // 2])
        np.testing.assert_array_equal(grid[top : top + 8 : 2, left : left + 12 : 2], image)
    assert (grid[10:, 27:] == 255).all()  # the sixth place
    assert (grid[9] == 255).all() and (grid[:, 13] == 255).all()  # the padding


def test_grid_by_default_is_square_and_legible():
    assert pictures.image_grid(images_of(range(5), 8, 8), padding=0).shape == (2 * 64, 3 * 64, 3)
    assert pictures.image_grid(images_of(range(4), 28, 28), padding=0).shape == (2 * 84, 2 * 84, 3)
    assert pictures.image_grid(images_of(range(1), 65, 70), padding=0).shape == (65, 70, 3)


def test_grey_images_are_grey_in_three_channels():
    grid = pictures.image_grid(images_of((10, 200), channels=1), columns=2, scale=1, padding=0)
    np.testing.assert_array_equal(grid, pictures.image_grid(images_of((10, 200)), columns=2, scale=1, padding=0))


def test_captions_stand_beside_and_above_and_move_the_images():
    images = images_of((0, 50, 100, 150), 30, 30)
    plain = pictures.image_grid(images, columns=2, scale=1)
    rows = pictures.image_grid(images, columns=2, scale=1, row_captions=("w = 0", "w = 2"))
    left = rows.shape[1] - plain.shape[1]
    assert rows.shape[0] == plain.shape[0] and left > 30
    np.testing.assert_array_equal(rows[:, left:], plain)
    for half in np.split(rows[:, :left], 2):
        assert half.min() < 50 and (half[:, :4] == 255).all()
    both = pictures.image_grid(images, columns=2, scale=1, row_captions=("w = 0", "w = 2"), column_captions=("0", "1"))
    top = both.shape[0] - rows.shape[0]
    np.testing.assert_array_equal(both[top:], rows)
    assert both[:top, left:].min() < 50 and (both[:top, :left] == 255).all()
    centre = np.flatnonzero((both[:top, left : left + 34] < 200).any(axis=(0, 2))).mean()
    assert abs(centre - 17) <= 2  # "0" stands in the middle of its column


def test_long_captions_widen_their_cells_instead_of_overlapping():
    images = images_of((0, 0), 10, 10)
    wide = pictures.image_grid(images, columns=2, scale=1, column_captions=("a rather long caption", "b"))
    assert wide.shape[1] > 2 * 120
    xs = np.flatnonzero((wide == 0).all(axis=2)[-5])
    assert len(xs) == 2 * 10 and abs(xs[:10].mean() - wide.shape[1] / 4) <= 2  # whole, in the middle of its cell
    tall = pictures.image_grid(images, columns=1, scale=1, row_captions=("three\nlines\nhere", "one"))
    assert tall.shape[0] > 2 * 50
    assert [text_lines(half[:, :-12]) for half in np.split(tall, 2)] == [3, 1]
    ys = np.flatnonzero((tall == 0).all(axis=2)[:, -5])
    assert len(ys) == 2 * 10 and abs(ys[:10].mean() - tall.shape[0] / 4) <= 2


def test_hierarchy_picture_is_a_captioned_strip_per_row():
    rows = [("data", images_of((40,), 9, 9)), ("z3 fixed", images_of((80, 90, 100), 9, 9))]
    picture = pictures.hierarchy_picture(rows, scale=3, padding=2)
    assert picture.shape[0] == 2 * (27 + 2) + 2
    strips = picture[:, -(3 * 29 + 2) :]
    assert [strips[15, 15, 0], strips[15, 44, 0]] == [40, 255]
    assert [strips[44, x, 0] for x in (15, 44, 73)] == [80, 90, 100]
    captions = picture[:, : -(3 * 29 + 2)]
    assert captions[:29].min() < 50 and captions[29:].min() < 50
    with pytest.raises(ValueError, match=r"rows of image sizes \[\(4, 6\), \(9, 9\)\]"):
        pictures.hierarchy_picture([*rows, ("z2 fixed", images_of((1,)))])
    with pytest.raises(ValueError, match="hierarchy_picture: no rows"):
        pictures.hierarchy_picture([])


def test_side_by_side_keeps_each_picture_under_its_caption():
    first, second = images_of((30,), 40, 200)[0], images_of((60,), 20, 50, channels=1)[0]
    picture = pictures.side_by_side([("L = 1", first), ("L = 3\nFD 12.3", second)])
    assert (picture == 30).all(axis=2).sum() == 40 * 200
    ys, xs = np.nonzero((picture == 60).all(axis=2) & (np.arange(picture.shape[1])[None] > 8 + 200))
    below = ys >= np.nonzero((picture == 30).all(axis=2).sum(axis=1) > 100)[0][0]  # leaves out the letters' greys
    ys, xs = ys[below], xs[below]
    assert len(ys) == 20 * 50 and xs.min() == 8 + 200 + 16
    assert (picture[ys.min() - 8 : ys.min()] == 255).all()  # the longer caption ends above
    assert text_lines(picture[: ys.min(), :200]) == 1 and text_lines(picture[: ys.min(), 224:]) == 2
    with pytest.raises(ValueError, match="side_by_side: no panels"):
        pictures.side_by_side([])


def clips_of(count, frames, height=4, width=6, channels=3):
    """Noise, so that no two frames are alike."""
    return np.random.default_rng(3).integers(0, 256, (count, frames, height, width, channels), dtype=np.uint8)


def test_clip_grid_is_a_row_per_clip_with_its_frames_from_left_to_right():
    clips = clips_of(2, 5)
    grid = pictures.clip_grid(clips, scale=2, padding=1)
    np.testing.assert_array_equal(grid, pictures.image_grid(clips.reshape(10, 4, 6, 3), 5, scale=2, padding=1))
    ends = pictures.clip_grid(clips, columns=3, scale=1)
    np.testing.assert_array_equal(ends, pictures.image_grid(clips[:, [0, 2, 4]].reshape(6, 4, 6, 3), 3, scale=1))
    np.testing.assert_array_equal(
        pictures.clip_grid(clips, columns=1, scale=1), pictures.image_grid(clips[:, 0], 1, scale=1)
    )
    captioned = pictures.clip_grid(clips, row_captions=("a cat", "a dog"))
    plain = pictures.clip_grid(clips)
    np.testing.assert_array_equal(captioned[:, -plain.shape[1] :], plain)
    assert captioned[:, : -plain.shape[1]].min() < 50


def test_what_is_no_clip_is_refused(tmp_path):
    clips = clips_of(2, 5)
    for wrong in (clips.astype(np.float32), clips[0], clips[..., :2], clips[:, :0]):
        for draw in (pictures.clip_grid, lambda wrong: pictures.save_animation(wrong, tmp_path / "a.webp")):
            with pytest.raises(ValueError, match=r"clips: found \w+ \[.*\], expected uint8 \[N, frames, height, "):
                draw(wrong)
    for columns in (0, 6):
        with pytest.raises(ValueError, match=f"clip_grid: columns is {columns}; give 1 to 5, the number of frames"):
            pictures.clip_grid(clips, columns=columns)
    for fps in (0, 1001):
        with pytest.raises(ValueError, match=rf"a\.webp: fps is {fps}; give more than 0, at most 1000"):
            pictures.save_animation(clips, tmp_path / "a.webp", fps=fps)
    with pytest.raises(ValueError, match=r"a\.gif: animations are stored as \.webp"):
        pictures.save_animation(clips, tmp_path / "a.gif")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("channels", [1, 3])
def test_animation_holds_the_pixels_of_every_frame(tmp_path, channels):
    clips, path = clips_of(3, 5, channels=channels), tmp_path / "new" / "clips.webp"
    pictures.save_animation(clips, path, columns=2, scale=3, fps=8)
    with Image.open(path) as animation:
        assert animation.format == "WEBP" and animation.n_frames == 5 and animation.info["loop"] == 0
        for number in range(5):
            animation.seek(number)
            animation.load()
            expected = pictures.image_grid(clips[:, number], columns=2, scale=3)
            np.testing.assert_array_equal(np.asarray(animation.convert("RGB")), expected)
            assert animation.info["duration"] == 125
    assert os.listdir(tmp_path / "new") == ["clips.webp"]


def test_animation_that_cannot_be_written_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "clips.webp"
    pictures.save_animation(clips_of(1, 2), path)
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"clips\.webp: not written: No space left on device"):
        pictures.save_animation(clips_of(2, 2), path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["clips.webp"]


def test_steps_picture_is_a_column_per_step_and_a_row_per_resolution():
    sizes = (16, 32, 64)
    steps = list(zip(*(clips_of(1, 2, size, 2 * size)[0] for size in sizes), strict=True))
    picture = pictures.steps_picture(steps, scale=2, padding=1, step_captions=("t = 1000", "t = 0"))
    panel = picture[-(3 * 129 + 1) :, -(2 * 257 + 1) :]
    for row, size in enumerate(sizes):
        factor = 128 // size
        for column in range(2):
            top, left = 1 + 129 * row, 1 + 257 * column
            shown = panel[top : top + 128, left : left + 256]
            for corner in (0, factor - 1):
                np.testing.assert_array_equal(shown[corner::factor, corner::factor], steps[column][row])
    above, beside = picture[: -panel.shape[0]], picture[-panel.shape[0] :, : -panel.shape[1]]
    assert text_lines(beside) == 3 and text_lines(above) == 1
    grey = [tuple(image[..., :1] for image in step) for step in steps]
    assert pictures.steps_picture(grey).shape == pictures.steps_picture(steps).shape


def test_steps_that_are_no_picture_are_refused():
    small, large, odd = (clips_of(1, 1, *size)[0, 0] for size in ((4, 4), (8, 8), (6, 4)))
    for steps in ([], [()], [(small, large), (large, small)], [(small,), (small, large)]):
        with pytest.raises(ValueError, match=r"steps_picture: found steps of images \[.*; give every step images"):
            pictures.steps_picture(steps)
    with pytest.raises(ValueError, match="steps_picture: 6 x 4 images do not enlarge to 8 x 8"):
        pictures.steps_picture([(odd, large)])
    with pytest.raises(ValueError, match="steps_picture: 4 x 4 images do not enlarge to 6 x 4"):
        pictures.steps_picture([(small, odd)])
    with pytest.raises(ValueError, match="steps_picture: 4 x 4 images do not enlarge to 8 x 6"):
        pictures.steps_picture([(small, large[:, :6])])
    with pytest.raises(ValueError, match="images: found float32"):
        pictures.steps_picture([(small.astype(np.float32),)])


def test_what_is_no_grid_is_refused():
    good = images_of((1, 2, 3))
    wrong = [good.astype(np.float32), good[0], good[..., :2], good[:0], good[:, :0]]
    for images in wrong:
        with pytest.raises(ValueError, match=r"images: found \w+ \[.*\], expected uint8 \[N, height, width, 1 or 3\]"):
            pictures.image_grid(images)
    with pytest.raises(ValueError, match="columns is 0; give 1 or more"):
        pictures.image_grid(good, columns=0)
    for scale, padding in ((0, 2), (1, -1)):
        with pytest.raises(ValueError, match=f"scale {scale}, padding {padding}; give"):
            pictures.image_grid(good, scale=scale, padding=padding)
    with pytest.raises(ValueError, match="found 1 row captions for 2 rows; give 2, or none"):
        pictures.image_grid(good, columns=2, row_captions=("a",))
    with pytest.raises(ValueError, match="found 3 column captions for 2 columns; give 2, or none"):
        pictures.image_grid(good, columns=2, column_captions=("a", "b", "c"))


def test_png_holds_the_pixels(tmp_path):
    picture = np.random.default_rng(1).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    pictures.save_png(picture, tmp_path / "new" / "picture.png")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "new" / "picture.png")), picture)
    pictures.save_png(picture[..., :1], tmp_path / "grey.png")
    grey = np.asarray(Image.open(tmp_path / "grey.png"))
    np.testing.assert_array_equal(grey, picture[..., :1].repeat(3, axis=-1))


def test_samples_are_what_the_adm_evaluator_reads(tmp_path):
    images = np.random.default_rng(2).integers(0, 256, (3, 8, 8, 1), dtype=np.uint8)
    pictures.save_samples(tmp_path / "new" / "samples.npz", images)
    with np.load(tmp_path / "new" / "samples.npz", allow_pickle=False) as archive:
        assert archive.files == ["arr_0"]
        samples = archive["arr_0"]
    assert samples.dtype == np.uint8 and samples.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(samples, images.repeat(3, axis=-1))
    assert os.listdir(tmp_path / "new") == ["samples.npz"]
    with pytest.raises(ValueError, match=r"samples\.bin: samples are stored as \.npz"):
        pictures.save_samples(tmp_path / "samples.bin", images)


def test_samples_that_cannot_be_written_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "samples.npz"
    pictures.save_samples(path, images_of((1, 2)))
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"samples\.npz: samples not written: No space left on device"):
        pictures.save_samples(path, images_of((3, 4)))
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["samples.npz"]


def test_curves_are_a_panel_a_level_with_their_points(figures, tmp_path):
    pictures.loss_curves(metrics_of(("z1", "z2"), 300), tmp_path / "curves.png", levels=("z2", "z1"))
    axes = figures[0].axes
    assert [axis.get_title(loc="left") for axis in axes] == ["z2", "z1"]
    for axis in axes:
        assert axis.get_xlabel() == "training step" and axis.get_yscale() == "log"
        raw, smooth, quarter, half = axis.lines
        np.testing.assert_array_equal(raw.get_xdata(), np.arange(300))
        np.testing.assert_allclose(raw.get_ydata(), 0.1 + np.exp(-np.arange(300) / 100))
        inner = slice(5, -5)  # the mean of exp over 11 points, a constant factor above its middle
        factor = np.mean(np.exp(np.arange(-5, 6) / 100))
        np.testing.assert_allclose(smooth.get_ydata()[inner] - 0.1, factor * (raw.get_ydata()[inner] - 0.1))
        assert smooth.get_ydata()[0] == pytest.approx(raw.get_ydata()[:6].mean())
        assert smooth.get_ydata()[-1] == pytest.approx(raw.get_ydata()[-6:].mean())
        np.testing.assert_array_equal(half.get_xdata(), np.arange(9, 300, 10))
        assert set(quarter.get_ydata()) == {0.35} and set(half.get_ydata()) == {0.6}
        assert raw.get_alpha() < 0.5 and smooth.get_linewidth() > raw.get_linewidth()
    texts = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert texts == ["training", "training, smoothed", "validation, t = 0.25", "validation, t = 0.5"]
    assert axes[0].get_ylabel() == "loss" and figures[0].get_suptitle() == "Loss of each level"


def test_curves_are_linear_over_a_small_range_and_unsmoothed_when_short(figures, tmp_path):
    pictures.loss_curves(metrics_of(("z1",), 300, low=1.0), tmp_path / "curves.png")
    pictures.loss_curves(metrics_of(("z1",), 9), tmp_path / "curves.png")
    negative = metrics_of(("z1",), 300) + [{"step": 300, "loss/z1": -1.0}]
    pictures.loss_curves(negative, tmp_path / "curves.png")
    assert [figure.axes[0].get_yscale() for figure in figures] == ["linear"] * 3
    assert len(figures[1].axes[0].lines) == 1
    assert [text.get_text() for text in figures[1].legends[0].get_texts()] == ["training"]


def test_five_levels_take_two_rows_and_leave_no_empty_axes(figures, tmp_path):
    levels = tuple(f"z{number}" for number in range(5, 0, -1))
    pictures.loss_curves(metrics_of(levels, 20), tmp_path / "curves.png")
    assert [axis.get_title(loc="left") for axis in figures[0].axes if axis.get_visible()] == list(levels)
    assert len(figures[0].axes) == 6


def test_losses_that_are_not_finite_are_left_out_and_no_losses_are_an_error(figures, tmp_path):
    metrics = metrics_of(("z1",), 20) + [{"step": 20, "loss/z1": float("nan")}, {"step": 21, "loss/z1": float("inf")}]
    pictures.loss_curves(metrics, tmp_path / "curves.png")
    np.testing.assert_array_equal(figures[0].axes[0].lines[0].get_xdata(), np.arange(20))
    with pytest.raises(ValueError, match=r"curves\.png: not drawn: no finite loss/z9 in 22 lines of metrics"):
        pictures.loss_curves(metrics, tmp_path / "curves.png", levels=("z1", "z9"))
    with pytest.raises(ValueError, match="no finite loss/LEVEL in 1 lines"):
        pictures.loss_curves([{"step": 1, "images_per_second": 3.0}], tmp_path / "curves.png")


def test_curves_are_rendered_as_a_png(tmp_path):
    pictures.loss_curves(metrics_of(("z1",), 60), tmp_path / "curves.png")
    picture = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB"))
    assert min(picture.shape[:2]) > 400
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (border == 255).all()  # nothing, such as a wide legend, runs over the edge


def test_samples_of_clips_keep_their_frames(tmp_path):
    clips = np.random.default_rng(0).integers(0, 255, (3, 4, 5, 6, 1), dtype=np.uint8)
    pictures.save_samples(tmp_path / "clips.npz", clips)
    saved = np.load(tmp_path / "clips.npz")["arr_0"]
    np.testing.assert_array_equal(saved, np.repeat(clips, 3, axis=-1))


def test_pictures_of_clips_and_their_prompts(tmp_path):
    """What sample.py writes of clips: rows of frames, an animation of all, a line per prompt."""
    config = common.default()
    config.sample.update(columns=2, scale=2)
    clips = np.random.default_rng(0).integers(0, 255, (3, 4, 8, 8, 3), dtype=np.uint8)
    paths = sample.save_sample_pictures(config, clips, ("a cat", "a dog"), str(tmp_path / "clips"))
    assert [path.rpartition(".")[2] for path in paths] == ["png", "webp", "txt"]
    assert (tmp_path / "clips.txt").read_text().splitlines() == ["0\ta cat", "1\ta dog", "2\ta cat"]
    with Image.open(paths[1]) as animation:
        assert animation.n_frames == 4
    assert Image.open(paths[0]).height < Image.open(paths[1]).height * 3
