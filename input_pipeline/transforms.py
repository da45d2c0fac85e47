"""Turns image files into arrays of one size: decoding, crops, resizing, channels. numpy and Pillow only.

An image is uint8 [H, W, C] with C = 1 (grey) or 3 (RGB), a clip (clips.py) uint8 [T, H, W, C]. Resampling is Pillow's,
which filters before it reduces (antialiasing), on 8-bit values: the images from which the papers' encoder features and
FID references were computed.
"""

import io
import pathlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from absl import logging
from PIL import ExifTags, Image, UnidentifiedImageError

from input_pipeline.composition import Mapped, RecordMap
from input_pipeline.sources import ImageSource, Record, Source

MODE_OF_CHANNELS = {1: "L", 3: "RGB"}
# Formats people keep pictures in. Pillow knows more, and runs Ghostscript for one of them (EPS).
FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "PPM")
# EXIF's orientation -> what makes the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MAX_PIXELS = 89_478_485  # of one image or frame, 1 GiB / 4 / 3: where Pillow begins to warn of decompression bombs
# What Pillow raises on files of these formats with random bytes changed or cut off, on a TIFF whose XMP is no text
# (TypeError), and on more than 2 MAX_PIXELS.
DECODE_ERRORS = (OSError, SyntaxError, ValueError, RuntimeError, TypeError, Image.DecompressionBombError)


def check_channels(channels: int) -> None:
    """Raises ValueError if channels is neither 1 nor 3."""
    if channels not in MODE_OF_CHANNELS:
        raise ValueError(f"channels must be 1 (grey) or 3 (RGB), found {channels}")


def decode_image(file: str | pathlib.Path | bytes, channels: int = 3) -> np.ndarray:
    """Decodes a file, or a file's bytes, of one of FORMATS in any mode.

    The camera's EXIF rotation is applied, unless EXIF cannot be read. Transparent pixels, also of palettes, are laid
    over white. 16-bit grey keeps its high byte. CMYK, which JPEG files hold inverted as Adobe writes it, becomes RGB by
    (255 - ink)(255 - black) / 255 without a colour profile. Of an animation the first frame is decoded.

    Returns: uint8 [H, W, channels].

    Raises: one of DECODE_ERRORS for data that are not a whole image, and for an image of more than MAX_PIXELS.
    """
    check_channels(channels)
    with open_image(file, FORMATS) as opened:
        return to_array(opened, channels)


def open_image(file: str | pathlib.Path | bytes, formats: tuple[str, ...]) -> Image.Image:
    """Opens a file, or a file's bytes, of one of Pillow's formats. Raises: one of DECODE_ERRORS."""
    if not isinstance(file, bytes):
        return Image.open(file, formats=formats)
    try:
        return Image.open(io.BytesIO(file), formats=formats)
    except UnidentifiedImageError as error:  # its message is an address in memory
        raise UnidentifiedImageError(f"cannot identify an image in its {len(file):,} bytes") from error


def to_array(opened: Image.Image, channels: int) -> np.ndarray:
    """The current frame of an open file, converted as decode_image describes, as uint8 [H, W, channels]."""
    if opened.width * opened.height > MAX_PIXELS:
        raise ValueError(f"{opened.width}x{opened.height} pixels, at most {MAX_PIXELS:,} are read: make it smaller")
    opened.load()
    turn = _to_upright(opened)
    image = opened if turn is None else opened.transpose(turn)
    if image.mode.startswith("I;16"):  # Pillow's own conversion clips at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"mode {image.mode} (32-bit) has no defined range of grey levels; convert the file to 8 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    mode = MODE_OF_CHANNELS[channels]
    return _to_array(image if image.mode == mode else image.convert(mode))


def _to_upright(opened: Image.Image) -> Image.Transpose | None:
    """What turns the image upright, from EXIF or XMP; None if it is upright, or if they cannot be read."""
    try:
        return UPRIGHT.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged block raises errors of every kind, although the image is whole
        return None


def _to_array(image: Image.Image) -> np.ndarray:
    array = np.array(image)
    return array[..., None] if array.ndim == 2 else array


def _to_pillow(image_HWC: np.ndarray) -> Image.Image:
    return Image.fromarray(image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC)


def to_channels(image_HWC: np.ndarray, channels: int) -> np.ndarray:
    """Converts grey [H, W, 1] to RGB by repetition, or RGB to grey by ITU-R 601 luma (.299 R + .587 G + .114 B)."""
    check_channels(channels)
    if image_HWC.shape[-1] == channels:
        return image_HWC
    return _to_array(_to_pillow(image_HWC).convert(MODE_OF_CHANNELS[channels]))


def resize(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """Resizes the whole image to a square [size, size, C], bicubic. The aspect ratio is not kept."""
    return _to_array(_to_pillow(image_HWC).resize((size, size), Image.Resampling.BICUBIC))


def center_crop(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The central square [size, size, C] of the image scaled until its shorter side is `size`.

    This is ADM's crop (guided-diffusion image_datasets.py, center_crop_arr), which U-ViT, DiT and the FID references
    use: halve both sides by box averages while the shorter one is at least twice `size`, then scale by bicubic
    interpolation, with sides rounded half to even, and cut at floor((side - size) / 2). Departure: images are upright
    here (decode_image), while ADM takes them as their files store them, so that there the photographs of a camera held
    sideways stay sideways.
    """
    image = _to_pillow(image_HWC)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return _to_array(image.crop((left, top, left + size, top + size)))


def center_lanczos(image_HWC: np.ndarray, size: int) -> np.ndarray:
    """The central square of the image, as U-ViT crops COCO (datasets.py, center_crop).

    It is cut first, at floor((side - shorter side) / 2), then resized to [size, size, C] by Lanczos' filter.
    """
    height, width, _ = image_HWC.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = _to_pillow(image_HWC[top : top + side, left : left + side])
    return _to_array(square.resize((size, size), Image.Resampling.LANCZOS))


CROPS = {"center": center_crop, "center_lanczos": center_lanczos, "stretch": resize}
SMALL = ("resize", "refuse")


@dataclass(frozen=True)
class Resize(RecordMap):
    """Brings "image" to image_shape[-3:], (size, size, channels), and every frame of a clip [T, H, W, C] too.

    image_shape: of the images that it returns; resized() finds it.
    crop: "center" keeps the aspect ratio and loses the margins (ADM), "center_lanczos" too (U-ViT on COCO), "stretch"
    keeps the whole image.
    small: what becomes of an image with a side below the size: "resize" enlarges it, and the first one of a process is
    logged; "refuse" is an error that names it.
    The fingerprint covers the crop and the shape, as latents of other crops are other latents.
    """

    image_shape: tuple[int | None, ...]
    crop: str
    small: str = "resize"

    def __post_init__(self) -> None:
        check_channels(self.channels)
        for name, value, allowed in (("crop", self.crop, CROPS), ("small", self.small, SMALL)):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {sorted(allowed)}, found {value!r}")
        if self.size < 1:
            raise ValueError(f"image_size must be at least 1, found {self.size}")

    @property
    def size(self) -> int:
        return self.image_shape[-2] or 0

    @property
    def channels(self) -> int:
        return self.image_shape[-1] or 0

    def __call__(self, record: Record, index: int, generator: np.random.Generator | None) -> Record:
        image = record["image"]
        self._check_size(index, image)
        changed = np.stack([self._frame(frame) for frame in image]) if image.ndim == 4 else self._frame(image)
        return {**record, "image": changed}

    def _check_size(self, index: int, image: np.ndarray) -> None:
        if min(image.shape[-3:-1]) >= self.size:
            return
        found = f"image {index} is {'x'.join(map(str, image.shape))}, smaller than {self.size}"
        if self.small == "refuse":
            raise ValueError(f"{found}: remove it, or set data.small_images to 'resize'")
        logging.log_first_n(logging.WARNING, "%s: it is enlarged (others may be too; only one is logged)", 1, found)

    def _frame(self, image_HWC: np.ndarray) -> np.ndarray:
        return to_channels(CROPS[self.crop](image_HWC, self.size), self.channels)

    def image_shape_after(self, image_shape: tuple[int | None, ...]) -> tuple[int | None, ...]:
        return self.image_shape

    def fingerprint_parts(self) -> Iterable[str]:
        return (f"{self.crop} {self.image_shape}",)

    def describe(self) -> str:
        return f"{self.crop} to {'x'.join(map(str, self.image_shape))}"

    def check(self, source: Source) -> None:
        if self.small == "refuse":
            for index in range(len(source)):
                self._check_size(index, source[index]["image"])


def resized(source: ImageSource, image_size: int, crop: str, channels: int, *, small: str = "resize") -> Mapped:
    """The source with all images brought to one size (see Resize); labels and captions pass through.

    Args:
      source: of images, or of clips.
      image_size: height and width in pixels.
      crop: a name in CROPS.
      channels: 1 (grey) or 3 (RGB).
      small: "resize" or "refuse", for images with a side below image_size.

    Raises: ValueError (one line) for values that are not allowed.
    """
    image_shape = (*source.image_shape[:-3], image_size, image_size, channels)
    return Mapped(source, (Resize(image_shape, crop, small),))
