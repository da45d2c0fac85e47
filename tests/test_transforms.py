"""Image transformations against plain statements of what they do."""

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageOps

from input_pipeline import transforms
from input_pipeline.in_memory import ImagesInMemory


def noise(height, width, channels=3):
    return np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def bicubic(values_N, size):
    """Keys' cubic (a = -1/2) stretched by the reduction, rows of weights summing to one: [N, ...] -> [size, ...]."""
    length = len(values_N)
    scale = length / size
    stretch = max(scale, 1.0)
    centers = (np.arange(size) + 0.5) * scale
    x = np.abs((np.arange(length) + 0.5)[None] - centers[:, None]) / stretch
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    return np.tensordot(weights, values_N, axes=1)


def resampled(image_HWC, height, width):
    """Columns first, rounded to 8 bits, then rows, as Pillow does."""
    columns = np.clip(np.round(bicubic(image_HWC.astype(np.float64).swapaxes(0, 1), width)), 0, 255).swapaxes(0, 1)
    return np.clip(np.round(bicubic(columns, height)), 0, 255)


def assert_within_one_grey_level(found, expected):
    assert found.dtype == np.uint8 and found.shape == expected.shape
    assert np.abs(found.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("height, width, size", [(13, 19, 10), (9, 21, 9), (6, 5, 8)])
def test_center_crop_without_halving(height, width, size):
    image = noise(height, width)
    scale = size / min(height, width)
    scaled = resampled(image, round(height * scale), round(width * scale))
    top, left = (scaled.shape[0] - size) // 2, (scaled.shape[1] - size) // 2
    expected = scaled[top : top + size, left : left + size]
    assert_within_one_grey_level(transforms.center_crop(image, size), expected)


def test_center_crop_halves_by_box_means_while_twice_the_size():
    image = noise(40, 80, 1)  # 40 >= 2 * 8: 20 x 40; 20 >= 16: 10 x 20; then bicubic to 8 x 16 and 4 columns off
    for _ in range(2):
        columns = np.floor((image[:, 0::2].astype(np.float64) + image[:, 1::2]) / 2 + 0.5)
        image = np.floor((columns[0::2] + columns[1::2]) / 2 + 0.5)
    expected = resampled(image, 8, 16)[:, 4:12]
    found = transforms.center_crop(noise(40, 80, 1), 8)
    assert_within_one_grey_level(found, expected)
    one_step = resampled(noise(40, 80, 1), 8, 16)[:, 4:12]  # the same without halving is another picture
    assert np.abs(found.astype(int) - one_step).max() > 10


def lanczos(values_N, size):
    """sinc(x) sinc(x / 3) for |x| < 3, stretched by the reduction, as bicubic() is."""
    scale = len(values_N) / size
    x = ((np.arange(len(values_N)) + 0.5)[None] - (np.arange(size) + 0.5)[:, None] * scale) / max(scale, 1.0)
    weights = np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)
    return np.tensordot(weights / weights.sum(1, keepdims=True), values_N, axes=1)


@pytest.mark.parametrize("height, width, size", [(13, 20, 5), (20, 13, 6), (7, 7, 9)])
def test_center_lanczos_cuts_then_resizes(height, width, size):
    image = noise(height, width)
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = image[top : (height + side) // 2, left : (width + side) // 2].astype(np.float64)  # U-ViT's slices
    assert square.shape == (side, side, 3)
    columns = np.clip(np.round(lanczos(square.swapaxes(0, 1), size)), 0, 255).swapaxes(0, 1)
    expected = np.clip(np.round(lanczos(columns, size)), 0, 255)
    assert_within_one_grey_level(transforms.center_lanczos(image, size), expected)


def test_resize_keeps_the_whole_image():
    assert_within_one_grey_level(transforms.resize(noise(12, 7), 5), resampled(noise(12, 7), 5, 5))


def test_channels():
    grey = noise(3, 4, 1)
    np.testing.assert_array_equal(transforms.to_channels(grey, 3), np.repeat(grey, 3, axis=2))
    luma = noise(3, 4).astype(np.float64) @ np.array([0.299, 0.587, 0.114])
    assert_within_one_grey_level(transforms.to_channels(noise(3, 4), 1), luma[..., None])
    np.testing.assert_array_equal(transforms.to_channels(grey, 1), grey)
    with pytest.raises(ValueError, match="channels must be 1 .grey. or 3 .RGB., found 4"):
        transforms.to_channels(grey, 4)


def test_decoding_applies_the_exif_rotation():
    upright = noise(6, 4)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to view
    turned = Image.fromarray(np.rot90(upright))
    np.testing.assert_array_equal(transforms.decode_image(encoded(turned, exif=exif)), upright)


def tiff(entries, pixels=b""):
    """A TIFF, or an EXIF block, of (tag, type, count, four bytes) after the pixels, little-endian."""
    fields = b"".join(struct.pack("<HHI", *entry) + value for *entry, value in sorted(entries))
    start = struct.pack("<I", 8 + len(pixels))
    return b"II*\0" + start + pixels + struct.pack("<H", len(entries)) + fields + bytes(4)


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))


def test_every_orientation_of_exif():
    image = Image.fromarray(noise(6, 4))
    for orientation in range(10):  # 0 and 9 mean nothing
        exif = tiff([(0x112, 3, 1, struct.pack("<HH", orientation, 0))])
        expected = ImageOps.exif_transpose(Image.open(io.BytesIO(encoded(image, exif=b"Exif\0\0" + exif))))
        found = transforms.decode_image(encoded(image, exif=b"Exif\0\0" + exif))
        np.testing.assert_array_equal(found, np.asarray(expected))


@pytest.mark.filterwarnings("ignore")  # Pillow warns of damaged blocks
def test_odd_exif_is_no_bad_image():
    image = Image.fromarray(noise(6, 4))
    odd = tiff([TURNED, (0x11A, 2, 4, b"abc\0")])  # a resolution that is text: Pillow cannot write it again
    for kind in ("JPEG", "PNG", "WEBP"):
        assert transforms.decode_image(encoded(image, kind, exif=b"Exif\0\0" + odd)).shape == (4, 6, 3)
    rng = np.random.default_rng(0)
    for _ in range(300):
        block = bytearray(tiff([TURNED, (0x10F, 2, 4, b"abc\0"), (0x8769, 4, 1, bytes(4)), (0x11A, 5, 1, bytes(4))]))
        for position in rng.integers(0, len(block), rng.integers(1, 9)):
            block[position] = rng.integers(256)
        found = transforms.decode_image(encoded(image, exif=b"Exif\0\0" + bytes(block)))
        assert sorted(found.shape) == [3, 4, 6]


def test_exif_that_cannot_be_read_turns_nothing(monkeypatch):
    turned = encoded(Image.fromarray(noise(6, 4)), exif=b"Exif\0\0" + tiff([TURNED]))
    assert transforms.decode_image(turned).shape == (4, 6, 3)

    def getexif(image):
        raise KeyError("maker's note")

    monkeypatch.setattr(Image.Image, "getexif", getexif)
    np.testing.assert_array_equal(transforms.decode_image(turned), noise(6, 4))


def test_a_tiff_whose_xmp_is_no_text_is_bad():
    numbers = {256: 4, 257: 6, 258: 8, 259: 1, 262: 1, 277: 1, 278: 6}  # 4 x 6 grey pixels of 8 bits
    entries = [(tag, 3, 1, struct.pack("<HH", value, 0)) for tag, value in numbers.items()]
    entries += [(273, 4, 1, struct.pack("<I", 8)), (279, 4, 1, struct.pack("<I", 24))]
    assert transforms.decode_image(tiff(entries, bytes(24))).shape == (6, 4, 3)
    with pytest.raises(TypeError) as error:
        transforms.decode_image(tiff([*entries, TURNED, (700, 4, 1, bytes(4))], bytes(24)))
    assert isinstance(error.value, transforms.DECODE_ERRORS)


def test_decoding_lays_transparency_over_white():
    rgba = np.zeros((1, 3, 4), np.uint8)
    rgba[0, :, 3] = 0, 128, 255  # black: clear, half, opaque
    for image in (Image.fromarray(rgba), Image.fromarray(rgba[..., [0, 3]], "LA")):
        found = transforms.decode_image(encoded(image))
        np.testing.assert_array_equal(found[0], [[255] * 3, [127] * 3, [0] * 3])
    palette = Image.new("P", (1, 1), 0)
    palette.putpalette([10, 20, 30])
    assert transforms.decode_image(encoded(palette)).tolist() == [[[10, 20, 30]]]
    assert transforms.decode_image(encoded(palette, transparency=0)).tolist() == [[[255, 255, 255]]]
    clear = Image.merge("LA", (Image.new("L", (1, 1), 7), Image.new("L", (1, 1), 0)))
    with_alpha = Image.new("PA", (1, 1))  # a palette's indices beside an alpha channel
    with_alpha.putdata([(0, 0)])
    for image in (clear, with_alpha):
        assert transforms.to_array(image, 3).tolist() == [[[255, 255, 255]]]


def test_decoding_of_modes():
    assert transforms.decode_image(encoded(Image.new("1", (2, 3), 1)), 1).tolist() == [[[255]] * 2] * 3
    red = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert transforms.decode_image(encoded(red, "TIFF"))[0, 0].tolist() == [255, 0, 0]
    inks = Image.new("CMYK", (8, 8), (100, 50, 20, 60))
    expected = [(255 - ink) * (255 - 60) / 255 for ink in (100, 50, 20)]
    for kind, within in (("TIFF", 1), ("JPEG", 4)):  # inverted in a JPEG, as Adobe writes it
        assert np.abs(transforms.decode_image(encoded(inks, kind))[3, 3] - expected).max() <= within
    jpeg = encoded(red, "JPEG")
    start = jpeg.index(b"\xff\xee")  # Adobe's own segment
    assert b"Adobe" in jpeg[start : start + 16]
    bare = jpeg[:start] + jpeg[start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big") :]
    np.testing.assert_array_equal(transforms.decode_image(bare), transforms.decode_image(jpeg))
    sixteen = Image.fromarray(np.array([[0, 255, 256, 40000, 65535]], np.uint16))
    assert transforms.decode_image(encoded(sixteen), 1)[0, :, 0].tolist() == [0, 0, 1, 156, 255]
    with pytest.raises(ValueError, match="mode F .* no defined range"):
        transforms.decode_image(encoded(Image.fromarray(np.zeros((1, 1), np.float32)), "TIFF"))
    with pytest.raises(ValueError, match="channels must be"):
        transforms.decode_image(encoded(sixteen), 2)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_decompression_bombs_are_refused(monkeypatch):
    bomb = encoded(Image.new("1", (10_000, 9000)))  # 90 million pixels in a few kilobytes
    assert len(bomb) < 20_000
    with pytest.raises(ValueError, match="10000x9000 pixels, at most 89,478,485 are read: make it smaller"):
        transforms.decode_image(bomb)
    with pytest.raises(transforms.DECODE_ERRORS, match="decompression bomb"):  # Pillow's own limit, twice as many
        transforms.decode_image(encoded(Image.new("1", (20_000, 9000))))
    monkeypatch.setattr(transforms, "MAX_PIXELS", 12)
    assert transforms.decode_image(encoded(Image.new("RGB", (4, 3)))).shape == (3, 4, 3)
    with pytest.raises(ValueError, match="4x4 pixels, at most 12"):
        transforms.decode_image(encoded(Image.new("RGB", (4, 4))))


def damaged_files():
    rng = np.random.default_rng(0)
    for kind in transforms.FORMATS:
        whole = encoded(Image.fromarray(noise(24, 20)), kind)
        for _ in range(20):
            yield whole[: rng.integers(len(whole))]
            changed = bytearray(whole)
            for position in rng.integers(0, min(len(whole), 200), 4):
                changed[position] = rng.integers(256)
            yield bytes(changed)
    yield b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"  # never handed to Ghostscript


@pytest.mark.filterwarnings("ignore")  # Pillow warns of some of these before it raises
def test_damaged_files_raise_the_errors_that_are_expected():
    refused = 0
    for data in damaged_files():
        try:
            transforms.decode_image(data)
        except transforms.DECODE_ERRORS:
            refused += 1
    assert refused > 150
    with pytest.raises(OSError, match="^cannot identify an image in its [0-9]+ bytes$"):
        transforms.decode_image(data)


def source(**options):
    images = ImagesInMemory(noise(6, 8)[None].repeat(2, 0), np.array([0, 1]), 2, ("a", "b"), "two")
    return transforms.resized(images, **{"image_size": 4, "crop": "center", "channels": 1, **options})


def test_transformed():
    center, stretch = source(), source(crop="stretch", channels=3)
    np.testing.assert_array_equal(center[1]["image"], transforms.to_channels(transforms.center_crop(noise(6, 8), 4), 1))
    np.testing.assert_array_equal(stretch[1]["image"], transforms.resize(noise(6, 8), 4))
    assert center[1]["label"] == 1 and len(center) == 2
    assert center.image_shape == (4, 4, 1) == center[0]["image"].shape
    assert (center.num_classes, center.class_names) == (2, ("a", "b"))
    assert center.describe() == "two: 2 images 6x8x3, 2 classes, center to 4x4x1"
    variants = [source(), source(crop="stretch"), source(image_size=5), source(channels=3)]
    assert len({variant.fingerprint for variant in variants}) == 4
    assert source().fingerprint == center.fingerprint


class Clips:
    """Three frames of 6 x 8 pixels."""

    num_classes, class_names, fingerprint, image_shape = 0, (), "f", (3, None, None, 3)

    def __getitem__(self, index):
        return {"image": np.stack([noise(6, 8), noise(6, 8)[::-1], 255 - noise(6, 8)]), "caption": "x"}


@pytest.mark.parametrize("crop", ["center", "stretch"])
def test_every_frame_of_a_clip_is_transformed_as_an_image(crop):
    transformed = transforms.resized(Clips(), 4, crop, 1)
    record = transformed[0]
    assert record["caption"] == "x" and record["image"].shape == transformed.image_shape == (3, 4, 4, 1)
    for found, frame in zip(record["image"], Clips()[0]["image"], strict=True):
        np.testing.assert_array_equal(found, transforms.to_channels(transforms.CROPS[crop](frame, 4), 1))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop": "centre"}, r"crop must be one of \['center', 'center_lanczos', 'stretch'\], found 'centre'"),
        ({"channels": 2}, "channels must be 1 .grey. or 3 .RGB., found 2"),
        ({"image_size": 0}, "image_size must be at least 1, found 0"),
    ],
)
def test_bad_transformations(options, message):
    with pytest.raises(ValueError, match=message):
        source(**options)


def test_small_images_are_refused_or_enlarged(monkeypatch):
    said = []
    monkeypatch.setattr(transforms.logging, "log_first_n", lambda level, text, n, *args: said.append((text % args, n)))
    enlarged = source(image_size=7)  # of 6 x 8
    assert enlarged[0]["image"].shape == (7, 7, 1)
    assert said == [("image 0 is 6x8x3, smaller than 7: it is enlarged (others may be too; only one is logged)", 1)]
    with pytest.raises(ValueError) as error:
        source(image_size=7, small="refuse")[1]
    message = "image 1 is 6x8x3, smaller than 7: remove it, or set data.small_images to 'resize' (two: 2 images 6x8x3"
    assert str(error.value).startswith(message) and "\n" not in str(error.value)
    assert source(image_size=6, small="refuse")[0]["image"].shape == (6, 6, 1) and len(said) == 1
    with pytest.raises(ValueError, match=r"small must be one of \['refuse', 'resize'\], found 'skip'"):
        source(small="skip")


def test_a_check_reaches_the_source(monkeypatch):
    asked = []
    monkeypatch.setattr(ImagesInMemory, "check", lambda images: asked.append(images))
    transformed = source()
    transformed.check()
    assert asked == [transformed.source]
