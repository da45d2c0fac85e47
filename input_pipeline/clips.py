"""Folders of short video clips: sources of images with a time axis, whose record["image"] is uint8 [T, H, W, C].

Animated WebP, GIF and PNG files are read through Pillow, .mp4 and .avi files through OpenCV, which is optional
(pip install opencv-python-headless). A record has `frames` frames of the clip, every
`frame_stride`-th from the first one: Matryoshka's video model (arXiv 2310.15111, appendix E) has 16 frames, every
fourth of WebVid's. The start is not drawn at random, so that a record is the same each time it is read. How long a file
shows each frame is ignored.

The field is called "image" so that crops, flips and batches are those of images (transforms.py, augment.py, loader.py).
"""

import pathlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from input_pipeline.image_files import Folder
from input_pipeline.options import ClipOptions
from input_pipeline.transforms import DECODE_ERRORS, check_channels, open_image, to_array, to_channels

ANIMATION_FORMATS = ("WEBP", "GIF", "PNG")
VIDEO_SUFFIXES = (".mp4", ".avi")  # other files are read through Pillow
CLIP_ERRORS = (*DECODE_ERRORS, EOFError, IndexError, struct.error)  # the last three: Pillow's GIF and PNG readers


def is_video(name: str) -> bool:
    """Whether a file of this name is read through OpenCV."""
    return pathlib.PurePath(name).suffix.lower() in VIDEO_SUFFIXES


def decode_clip(clip: bytes | pathlib.Path, frames: int, stride: int, channels: int) -> np.ndarray:
    """Decodes the frames 0, stride, ..., (frames - 1) * stride. Transparent pixels are laid over white.

    clip: the bytes of an animation, or the path of a video.

    Returns: uint8 [frames, H, W, channels].

    Raises: ValueError if the clip has fewer frames; one of CLIP_ERRORS for data that are not a whole clip.
    """
    if isinstance(clip, pathlib.Path):
        return _decode_video(clip, frames, stride, channels)
    with open_image(clip, ANIMATION_FORMATS) as opened:
        first = int(getattr(opened, "default_image", False))  # of a PNG file, for viewers that show no animations
        found, images = getattr(opened, "n_frames", 1) - first, []
        if found < _length(frames, stride):
            raise _too_short(found, frames, stride)
        for number in range(frames):
            opened.seek(first + number * stride)
            images.append(to_array(opened, channels))
    return np.stack(images)


def _decode_video(path: pathlib.Path, frames: int, stride: int, channels: int) -> np.ndarray:
    import cv2  # pyright: ignore[reportMissingImports]  optional

    video, clip = cv2.VideoCapture(str(path)), []
    for number in range(_length(frames, stride)):
        whole, image_BGR = video.read()
        if not whole:  # a file's own count of its frames is often wrong
            raise _too_short(number, frames, stride)
        if number % stride == 0:
            clip.append(to_channels(image_BGR[..., ::-1], channels))
    return np.stack(clip)


def check_clips(options: ClipOptions) -> tuple[int, int, int]:
    """(frames, stride, channels). Raises: ValueError for other channels than 1 and 3, frames or a stride below 1."""
    check_channels(options.channels)
    for name, value in (("frames", options.frames), ("frame_stride", options.frame_stride)):
        if value < 1:
            raise ValueError(f"clips: {name} must be at least 1, found {value}")
    return options.frames, options.frame_stride, options.channels


def fingerprint_parts(options: ClipOptions) -> tuple[str, ...]:
    """What the decoding of clips depends on, for the fingerprints of their sources."""
    return ("clips", str(options.frames), str(options.frame_stride), str(options.channels))


def require_opencv(files: Sequence[str], root: pathlib.Path) -> None:
    """Raises ImportError (one line) if some of the files need OpenCV and it is not installed."""
    videos = [file for file in files if is_video(file)]
    if videos:
        try:
            import cv2  # noqa: F401  # pyright: ignore[reportMissingImports]  optional, required before training starts
        except ImportError as error:
            raise ImportError(
                f"{len(videos)} of {len(files)} clips in {root} need OpenCV to be read, such as {videos[0]}: "
                "pip install opencv-python-headless"
            ) from error


def _length(frames: int, stride: int) -> int:
    """How many frames a file must have at least."""
    return (frames - 1) * stride + 1


def _too_short(found: int, frames: int, stride: int) -> ValueError:
    return ValueError(f"{found} frames, {_length(frames, stride)} are needed for {frames} at stride {stride}")


@dataclass(frozen=True, kw_only=True)
class ClipFolder(ClipOptions):
    """The clips below a directory, in one of the layouts of image_files.Folder: with captions, plain, or in classes.

    A file is bad if it is damaged or has fewer than (frames - 1) * frame_stride + 1 frames: see decoded.py.

    open() raises: as Folder; ValueError for other channels, frames or strides; ImportError (one line) for .mp4 or .avi
      files if OpenCV is not installed.
    """

    def open(self) -> "ClipFolderSource":
        return ClipFolderSource(self)


class ClipFolderSource(Folder):
    """An opened ClipFolder."""

    NOUN, A_NOUN = "clip", "a clip"
    ERRORS = CLIP_ERRORS

    def __init__(self, options: ClipFolder):
        self.frames, self.stride, self.channels = check_clips(options)
        super().__init__(options, fingerprint_parts(options))
        require_opencv(self._files, self.root)

    @property
    def image_shape(self) -> tuple[int, None, None, int]:
        return (self.frames, None, None, self.channels)

    def data(self, index: int) -> bytes | pathlib.Path:
        """The bytes of an animation, or the path of a video, which OpenCV opens itself."""
        if not is_video(self.name(index)):
            return super().data(index)
        path = self.root / self.name(index)
        with open(path, "rb"):  # raises OSError if it cannot be opened; OpenCV does not say why
            return path

    def decode(self, data: bytes | pathlib.Path) -> np.ndarray:
        return decode_clip(data, self.frames, self.stride, self.channels)

    def describe(self) -> str:
        return f"{super().describe()}, {self.frames} frames at stride {self.stride}"
