"""Folders of short video clips, as sources of images with a time axis: record["image"] is uint8 [T, H, W, C].

Read are animated WebP, GIF and PNG files through Pillow, and .mp4 and .avi files through OpenCV, which is optional
(pip install opencv-python-headless). Of a clip every `stride`-th frame is taken, `frames` of them from its first one:
Matryoshka's video model (arXiv 2310.15111, appendix E) has 16 frames, every fourth of WebVid's. The start is not drawn
at random, so that a record is the same each time it is read. How long a file shows each frame is not looked at.

The field is called "image" so that crops, flips and batches are those of images (transforms.py, augment.py, loader.py).
"""

import pathlib
import struct
from collections.abc import Sequence

import numpy as np

from input_pipeline.image_files import Folder
from input_pipeline.transforms import DECODE_ERRORS, check_channels, open_image, to_array, to_channels

ANIMATION_FORMATS = ("WEBP", "GIF", "PNG")
VIDEO_SUFFIXES = (".mp4", ".avi")  # others are handed to Pillow
CLIP_ERRORS = (*DECODE_ERRORS, EOFError, IndexError, struct.error)  # the last three: Pillow's GIF and PNG readers


def is_video(name: str) -> bool:
    """Whether a file of this name is read through OpenCV."""
    return pathlib.PurePath(name).suffix.lower() in VIDEO_SUFFIXES


def decode_clip(clip: bytes | pathlib.Path, frames: int, stride: int, channels: int) -> np.ndarray:
    """The frames 0, stride, ..., (frames - 1) * stride -> uint8 [frames, H, W, channels].

    clip: the bytes of an animation, or a video's file. Transparency is laid over white.

    Raises: ValueError where there are fewer frames; one of CLIP_ERRORS for what is not a whole clip.
    """
    if isinstance(clip, pathlib.Path):
        return _decode_video(clip, frames, stride, channels)
    with open_image(clip, ANIMATION_FORMATS) as opened:
        first = int(getattr(opened, "default_image", False))  # of a PNG file, for viewers that show no animations
        found, images = opened.n_frames - first, []
        if found < _length(frames, stride):
            raise _too_short(found, frames, stride)
        for number in range(frames):
            opened.seek(first + number * stride)
            images.append(to_array(opened, channels))
    return np.stack(images)


def _decode_video(path: pathlib.Path, frames: int, stride: int, channels: int) -> np.ndarray:
    import cv2

    video, clip = cv2.VideoCapture(str(path)), []
    for number in range(_length(frames, stride)):
        whole, image_BGR = video.read()
        if not whole:  # a file's own count of its frames is often wrong
            raise _too_short(number, frames, stride)
        if number % stride == 0:
            clip.append(to_channels(image_BGR[..., ::-1], channels))
    return np.stack(clip)


def check_frames(frames: int, stride: int) -> None:
    """Raises ValueError unless both are 1 or more."""
    for name, value in (("frames", frames), ("stride", stride)):
        if value < 1:
            raise ValueError(f"clips: {name} must be at least 1, found {value}")


def require_opencv(files: Sequence[str], root: pathlib.Path) -> None:
    """Raises ImportError (one line) where some of the files need OpenCV and it is not installed."""
    videos = [file for file in files if is_video(file)]
    if videos:
        try:
            import cv2  # noqa: F401  optional, asked for before training starts
        except ImportError as error:
            raise ImportError(
                f"{len(videos)} of {len(files)} clips in {root} need OpenCV to be read, such as {videos[0]}: "
                "pip install opencv-python-headless"
            ) from error


def _length(frames: int, stride: int) -> int:
    """How many frames a file must have."""
    return (frames - 1) * stride + 1


def _too_short(found: int, frames: int, stride: int) -> ValueError:
    return ValueError(f"{found} frames, {_length(frames, stride)} are needed for {frames} at stride {stride}")


class ClipFolder(Folder):
    """The clips below a directory, in one of the layouts of image_files.Folder: with captions, plain, or in classes.

    A file that is damaged or has fewer than (frames - 1) * stride + 1 frames is bad: see decoded.py.

    Args:
      path: the directory. frames: T of a record, at least 1. stride: 1 takes successive frames, 4 every fourth.
      channels: 3 (RGB) or 1 (grey), whatever the files hold. max_bad_clips: how many bad files are passed over.

    Raises: as Folder; ValueError for other channels, frames or strides; ImportError (one line) where there are .mp4 or
      .avi files but OpenCV is not installed.
    """

    NOUN, A_NOUN = "clip", "a clip"
    ERRORS = CLIP_ERRORS

    def __init__(
        self,
        path: str | pathlib.Path,
        *,
        frames: int = 16,
        stride: int = 4,
        channels: int = 3,
        max_bad_clips: int = 0,
    ):
        check_channels(channels)
        check_frames(frames, stride)
        self.frames, self.stride, self.channels = frames, stride, channels
        reading = ("clips", str(frames), str(stride), str(channels))
        super().__init__(path, max_bad=max_bad_clips, reading=reading)
        require_opencv(self._files, self.root)

    @property
    def image_shape(self) -> tuple[int, None, None, int]:
        return (self.frames, None, None, self.channels)

    def data(self, index: int) -> bytes | pathlib.Path:
        if not is_video(self.name(index)):
            return super().data(index)
        path = self.root / self.name(index)
        with open(path, "rb"):  # OSError where it cannot be; OpenCV says only that nothing opened
            return path

    def decode(self, data: bytes | pathlib.Path) -> np.ndarray:
        return decode_clip(data, self.frames, self.stride, self.channels)

    def describe(self) -> str:
        return f"{super().describe()}, {self.frames} frames at stride {self.stride}"
