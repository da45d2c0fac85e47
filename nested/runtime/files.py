"""Files that are either complete or absent.

A file is written beside its place, flushed to the disk (fsync), then renamed over the old one. On a POSIX file system
the rename is atomic, so that a reader, or a run restarted after kill -9, sees the old content or the new one, never a
part of either.
"""

import contextlib
import os
import pathlib
from collections.abc import Iterable


def atomic_write(path: str | os.PathLike, content: bytes | str | Iterable[bytes]) -> None:
    """Writes a file completely or not at all; missing parent folders are made.

    Args:
      path: the file.
      content: bytes, a str (written as UTF-8), or parts that follow each other.
    Raises: OSError, in one line, if the file cannot be written (no space, no permission); the old file then stays.
    """
    path = pathlib.Path(path)
    content = content.encode() if isinstance(content, str) else content
    parts = [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.writelines(parts)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise OSError(error.errno, f"{path}: not written: {error.strerror}") from error
    except BaseException:
        _remove(temporary)
        raise


def local_path(directory: str | os.PathLike) -> pathlib.Path:
    """The absolute path of a folder, ~ expanded. Raises ValueError for an address such as gs://bucket."""
    if "://" in str(directory):
        raise ValueError(f"{directory}: not a folder; mount the bucket (gcsfuse, NFS) and give the path of the mount")
    return pathlib.Path(directory).expanduser().absolute()


def check_writable(directory: str | os.PathLike) -> pathlib.Path:
    """Makes a folder if it does not exist, proves that a file can be written there, and returns its absolute path.

    Raises OSError, in one line, if it cannot; ValueError for an address such as gs://bucket.
    """
    path = local_path(directory)
    probe = path / f".write_probe.{os.getpid()}"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"?")
    except OSError as error:
        reason = "a file of that name is in the way" if isinstance(error, FileExistsError) else error.strerror
        raise OSError(error.errno, f"{path}: not writable: {reason}; give another folder (--workdir)") from error
    finally:
        _remove(probe)
    return path


def _remove(path: pathlib.Path) -> None:
    with contextlib.suppress(OSError):  # it was never created, or its folder was not
        path.unlink()
