"""Files that are either whole or absent.

A file is written beside its place, flushed to the disk (fsync), then renamed over the old one: on a POSIX file system
the rename is atomic, so a reader, or a run restarted after kill -9, sees the old content or the new, never a half.
"""

import contextlib
import os
import pathlib


def atomic_write(path, content):
    """Writes `content` (bytes, str as UTF-8, or parts of it that follow each other, bytes each) to `path`, whole or not
    at all; missing parent folders are made.

    Raises OSError, in one line, where the file cannot be written (no space, no permission); the old file then stays.
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


def local_path(directory):
    """The absolute path of a folder (~ expanded); ValueError for an address such as gs://bucket."""
    if "://" in str(directory):
        raise ValueError(f"{directory}: not a folder; mount the bucket (gcsfuse, NFS) and give the path of the mount")
    return pathlib.Path(directory).expanduser().absolute()


def check_writable(directory):
    """Makes `directory` if need be, proves that a file can be written there, returns its absolute path (~ expanded).

    Raises OSError, in one line, where it cannot; ValueError for an address such as gs://bucket.
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


def _remove(path):
    with contextlib.suppress(OSError):  # it was never created, or its folder was not
        path.unlink()
