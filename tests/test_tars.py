"""Tars: where their members lie, whole, damaged and malicious; the folder of indexes."""

import os
import tarfile
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.tar_files import tar

from input_pipeline import tars

FILES = {"a/1.jpg": b"one", "folder": None, "b.txt": b"", "c" * 150: b"long name", "ü.jpg": b"x" * 1000}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_found_and_read_at_their_places(tmp_path, format):
    files = {name: data for name, data in FILES.items() if len(name) < 100 or format != tarfile.USTAR_FORMAT}
    (tmp_path / "a.tar").write_bytes(tar(files, format))
    found = tars.members(tmp_path / "a.tar")
    assert [name for name, *_ in found] == [name for name, data in files.items() if data is not None]
    for name, offset, size in found:
        assert tars.read(tmp_path / "a.tar", offset, size) == files[name]
    (tmp_path / "outer").write_bytes(b"?" * 512 + (tmp_path / "a.tar").read_bytes() + b"!" * 700)
    inner = tars.members(tmp_path / "outer", 512, (tmp_path / "a.tar").stat().st_size)
    assert inner == [(name, offset + 512, size) for name, offset, size in found]


def test_damaged_tars_are_refused_in_one_line(tmp_path):
    whole, path = tar({"a": b"1" * 600, "b": b"2" * 600}), tmp_path / "a.tar"
    # header a, 2 blocks, header b at 1536, 2 blocks, zeros from 3072
    changed = whole[: 1536 + 148] + b"9" + whole[1536 + 149 :]
    cases = [whole[:cut] for cut in (0, 100, 512, 1000, 1536, 1600, 2048, 3071, 3072, 3500)]
    for data in (*cases, changed, b"<html>not found</html>" * 100, b"\x1f\x8b" + whole):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"^{path} (is not a whole tar|is cut off or damaged at byte)") as error:
            tars.members(path)
        assert "\n" not in str(error.value)
    path.write_bytes(whole[: 3072 + 512])
    assert len(tars.members(path)) == 2
    path.write_bytes(whole + bytes(3 * tars.CHUNK))  # any number of zeros may follow
    assert len(tars.members(path)) == 2
    for more in (tar({"c": b"3"}), b"\0" * 600 + b"x", bytes(tars.CHUNK) + whole):
        path.write_bytes(whole + more)
        with pytest.raises(ValueError, match=f"^{path} goes on after its end at byte 3,072: several tars were joined"):
            tars.members(path)
    path.write_bytes(whole[: 3072 + 512])
    with pytest.raises(ValueError, match="cut off or damaged at byte 3,072 of 3,072"):
        tars.members(path, 0, 3072)  # an inner tar that runs over its end
    path.write_bytes(whole[:1000])
    with pytest.raises(OSError, match="488 bytes at 512, expected 600: it was changed while it was in use"):
        tars.read(path, 512, 600)


@pytest.mark.parametrize("name", ["../x.jpg", "/etc/x.jpg", "a/../../x.jpg"])
def test_paths_that_climb_out_are_refused_by_name(tmp_path, name):
    (tmp_path / "a.tar").write_bytes(tar({"a.jpg": b"", name: b""}))
    with pytest.raises(ValueError, match=f"a.tar has a member '{name}', which is not a path below its folder"):
        tars.members(tmp_path / "a.tar")


def test_members_that_come_twice_are_refused_by_name(tmp_path):
    for names in (("a.jpg", "a.jpg"), ("a.jpg", "./a.jpg")):
        (tmp_path / "a.tar").write_bytes(tar([(names[0], b"1"), ("b.jpg", b""), (names[1], b"2")]))
        with pytest.raises(ValueError, match=f"^{tmp_path}/a.tar has two members '{names[1]}': make the tar again"):
            tars.members(tmp_path / "a.tar")


def test_errors_of_reading_name_the_tar(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"No such file or directory at byte 512: '{tmp_path}/a.tar'"):
        tars.read(tmp_path / "a.tar", 512, 3)


def test_links_and_devices_are_no_members(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    assert tars.members(tmp_path / "a.tar") == []


@pytest.fixture
def warnings_logged(monkeypatch):
    lines = []
    monkeypatch.setattr(tars.logging, "warning", lambda form, *values: lines.append(form % values))
    return lines


def test_an_index_is_made_once(tmp_path, warnings_logged):
    made = []

    def make():
        made.append(1)
        return {"names": tars.names_array(["a", "bü"]), "sizes": np.array([3, 2**40])}

    folder = str(tmp_path / "new" / "index")
    for _ in range(3):
        found = tars.read_or_make_index(folder, ("x", "y"), make)
        assert [name.decode() for name in found["names"]] == ["a", "bü"] and found["sizes"].tolist() == [3, 2**40]
    kept = sorted(os.path.splitext(name)[1] for name in os.listdir(folder))
    assert len(made) == 1 and kept == [".lock", ".npz"]  # nothing temporary stays
    tars.read_or_make_index(folder, ("x", "z"), make)
    assert len(made) == 2 and warnings_logged == []
    for path in (tmp_path / "new" / "index").glob("*.npz"):
        path.write_bytes(path.read_bytes()[:-30])
    assert tars.read_or_make_index(folder, ("x", "y"), make)["sizes"][1] == 2**40 and len(made) == 3
    assert "is damaged" in warnings_logged[0] and "and is made again" in warnings_logged[0]
    tars.read_or_make_index(folder, ("x", "y"), make)
    assert len(made) == 3


def test_a_folder_that_cannot_be_written_is_said(tmp_path, warnings_logged):
    (tmp_path / "file").write_text("")
    assert tars.read_or_make_index(str(tmp_path / "file"), ("x",), lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
    assert "the index cannot be kept (" in warnings_logged[0] and "set data.index_dir" in warnings_logged[0]


def test_one_process_makes_an_index_and_the_others_wait(tmp_path, monkeypatch):
    begun, go_on, waits = threading.Event(), threading.Event(), threading.Event()
    made = []

    def make():
        made.append(1)
        begun.set()
        assert go_on.wait(10)
        return {"a": np.arange(3)}

    monkeypatch.setattr(tars.logging, "info", lambda *line: waits.set())
    with ThreadPoolExecutor(2) as pool:  # a lock is of an open file: threads stand for processes
        found = [pool.submit(tars.read_or_make_index, str(tmp_path), ("x",), make) for _ in range(2)]
        assert begun.wait(10) and waits.wait(10)
        go_on.set()
        assert [each.result()["a"].tolist() for each in found] == [[0, 1, 2]] * 2
    assert made == [1]


def test_a_file_system_without_locks_is_said(tmp_path, warnings_logged, monkeypatch):
    def no_locks(file, how):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(tars.fcntl, "flock", no_locks)
    assert tars.read_or_make_index(str(tmp_path), ("x",), lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
    assert "cannot be locked (No locks available)" in warnings_logged[0] and len(warnings_logged) == 1


def test_an_index_that_cannot_be_finished_leaves_nothing(tmp_path, warnings_logged, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tars.os, "fsync", full)
    assert tars.read_or_make_index(str(tmp_path), ("x",), lambda: {"a": np.arange(2)})["a"].tolist() == [0, 1]
    assert "cannot be kept (No space left on device)" in warnings_logged[0]
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_where_indexes_are(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tars.index_folder("") == tmp_path / "nested" and tars.index_folder("/a") == tars.pathlib.Path("/a")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tars.index_folder("") == tmp_path / ".cache" / "nested"


def test_what_an_index_depends_on(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"1")
    os.utime(path, ns=(5, 5))
    assert tars.state_of(path) == "a.tar:1:5"
