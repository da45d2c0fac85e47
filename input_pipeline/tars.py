"""Tars as random access files: the places of their members are found once, and the index is kept.

A tar has no table of contents: there is a header before each member, so that finding all members takes one seek for
each. The index is kept as one .npz in a folder of indexes. Its name covers the tars' names, sizes and times of change,
so that 1.28 million records open in a moment, and a tar that has changed is walked again. A member is then read at its
place, without state: any thread or process can read any member.
"""

import contextlib
import fcntl
import hashlib
import os
import pathlib
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
from absl import logging

BLOCK, CHUNK = 512, 1 << 20
VERSION = "2"  # of the indexes; an index of another version is not read
INDEX_ERRORS = (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile)  # of a damaged .npz


def members(path: str | pathlib.Path, start: int = 0, size: int | None = None) -> list[tuple[str, int, int]]:
    """(name, offset, size in bytes) of the regular files of a tar, in order. Offsets count from the start of the file.

    Args:
      path: a file.
      start, size: where the tar lies in the file, if it is itself a member of a tar; size None: up to the end.

    Raises: ValueError, one line that names the file, if it is not a tar (or a compressed one); if it is cut off or
      damaged, which shows in the missing block of zeros at the end; if several tars were joined, which shows in other
      bytes than zeros after that block; if the name of a member leads out of the folder that it would be unpacked into,
      or comes twice.
    """
    with open(path, "rb") as file:
        stop = os.fstat(file.fileno()).st_size if size is None else start + size
        file.seek(start)
        try:
            with tarfile.TarFile(fileobj=file, encoding="utf-8", errors="replace") as tar:
                found = [(info.name, info.offset_data, info.size) for info in tar if info.isreg()]
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError) as error:
            raise ValueError(f"{path} is not a whole tar ({error}): copy it again, uncompressed") from error
        file.seek(end)
        if file.read(BLOCK) != bytes(BLOCK) or end + BLOCK > stop:
            raise ValueError(f"{path} is cut off or damaged at byte {end:,} of {stop:,}: copy the tar again")
        for position in range(end + BLOCK, stop, CHUNK):
            rest = file.read(min(CHUNK, stop - position))
            if rest.count(0) != len(rest):
                raise ValueError(f"{path} goes on after its end at byte {end:,}: several tars were joined, split them")
    _check_names(path, [name for name, *_ in found])
    return found


def _check_names(path: str | pathlib.Path, names: Sequence[str]) -> None:
    seen = set()
    for name in names:
        place = pathlib.PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            raise ValueError(f"{path} has a member {name!r}, which is not a path below its folder: make the tar again")
        if place in seen:
            raise ValueError(f"{path} has two members {name!r}: make the tar again, with one of each name")
        seen.add(place)


def read(path: str | pathlib.Path, offset: int, size: int) -> bytes:
    """The bytes of a member. Raises: OSError, which names the file, if it cannot be read or has become shorter."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = os.pread(file.fileno(), size, offset)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror} at byte {offset:,}", str(path)) from error
    if len(data) != size:
        raise OSError(f"{path}: {len(data)} bytes at {offset:,}, expected {size}: it was changed while it was in use")
    return data


def names_array(names: Iterable[str]) -> np.ndarray:
    """The names as bytes S[longest], which are small and fast to pickle."""
    return np.array([name.encode() for name in names], dtype=np.bytes_)


def index_folder(folder: str) -> pathlib.Path:
    """The folder of indexes: the folder itself, or nested/ in the user's cache folder if it is ''."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return (pathlib.Path(folder) if folder else pathlib.Path(cache) / "nested").expanduser().absolute()


def state_of(path: str | pathlib.Path) -> str:
    """The name, size and time of change of a file, on which an index depends."""
    status = os.stat(path)
    return f"{pathlib.Path(path).name}:{status.st_size}:{status.st_mtime_ns}"


def read_or_make_index(
    folder: str, made_from: Sequence[str], make: Callable[[], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """The arrays that make() returns, read from the folder of indexes if they were made before.

    Args:
      folder: data.index_dir, see index_folder.
      made_from: everything that the arrays depend on.
      make: makes the arrays, which takes long.

    One process makes an index, and the others that use the folder wait for its file. If the folder cannot be written,
    this is logged, and the index is made at every start. A damaged file is replaced.
    """
    key = hashlib.sha256("\n".join((VERSION, *made_from)).encode()).hexdigest()[:24]
    path = index_folder(folder) / f"index-{key}.npz"
    with _locked(path.with_suffix(".lock")):
        if path.exists():
            try:
                with np.load(path, allow_pickle=False) as archive:
                    return {name: archive[name] for name in archive.files}
            except INDEX_ERRORS as error:
                logging.warning("%s is damaged (%s) and is made again", path, error)
        arrays = make()
        try:
            _write(path, arrays)
        except OSError as error:
            form = "%s: the index cannot be kept (%s) and is made at every start; set data.index_dir to a folder for it"
            logging.warning(form, path, error.strerror)
    return arrays


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    """Holds the lock of a file, and waits for it while another process holds it.

    The lock is released when its holder exits, even by a crash. If the folder cannot be written, or its file system has
    no locks, nothing is locked.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "w")  # noqa: SIM115  closed below
    except OSError:
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logging.info("another process is making the index %s: waiting for it", path.with_suffix(".npz"))
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            logging.warning("%s cannot be locked (%s): every process makes its own index", path, error.strerror)
        yield


def _write(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Writes the file under another name first, so that it is whole or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)  # pyright: ignore[reportArgumentType]  no array is called allow_pickle
            file.flush()
            os.fchmod(handle, 0o644)  # others may read the folder
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
