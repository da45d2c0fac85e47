"""nested/runtime/writers.py and nested/runtime/files.py: metrics that stay readable, progress lines, files whole or
absent."""

import io
import json
import os
import re

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from nested.runtime import writers
from nested.runtime.files import atomic_write, check_writable


def tensorboard_events(workdir):
    """Every event under workdir/tensorboard, read from TensorBoard's record format (length, crc, bytes, crc)."""
    events = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            length = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + length]))
            at += 16 + length
    return events


def test_lines_are_valid_json_and_read_back(tmp_path):
    writer = writers.MetricWriter(tmp_path, 0, 0)
    writer.scalars(1, {"loss": np.float32(0.5), "images/s": 7})
    writer.scalars(2, {"loss": np.nan, "up": np.inf, "down": -np.inf})
    writer.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = [json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) for line in lines]
    assert strict[0] == {"step": 1, "loss": 0.5, "images/s": 7.0}
    assert strict[1] == {"step": 2, "loss": "nan", "up": "inf", "down": "-inf"}
    read = writers.read_metrics(tmp_path)
    assert read[0] == strict[0] and np.isnan(read[1]["loss"]) and read[1]["up"] == -read[1]["down"] == np.inf


def test_tensorboard_holds_scalars_and_images(tmp_path):
    writer = writers.MetricWriter(tmp_path, 0, 0)
    writer.scalars(3, {"loss": 0.25})
    writer.images(4, {"samples": np.full((4, 6, 3), 200, np.uint8)})
    writer.close()
    found = {value.tag: (event.step, value) for event in tensorboard_events(tmp_path) for value in event.summary.value}
    assert found["loss"][0] == 3 and found["loss"][1].simple_value == 0.25
    assert found["samples"][0] == 4 and (found["samples"][1].image.height, found["samples"][1].image.width) == (4, 6)


def test_resumed_curves_do_not_double_back(tmp_path):
    first = writers.MetricWriter(tmp_path, 0, 0)
    for step in (10, 20, 30, 40):
        first.scalars(step, {"loss": step})
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 50, "lo')  # killed while writing
    second = writers.MetricWriter(tmp_path, 0, 20)
    second.scalars(30, {"loss": -30})
    second.close()
    assert [(line["step"], line["loss"]) for line in writers.read_metrics(tmp_path)] == [(10, 10), (20, 20), (30, -30)]
    restarts = [e.step for e in tensorboard_events(tmp_path) if e.session_log.status == e.session_log.START]
    assert restarts == [21]  # TensorBoard hides what came at this step or later in earlier files


def test_a_new_run_in_an_old_folder_starts_clean(tmp_path):
    first = writers.MetricWriter(tmp_path, 0, 0)
    first.scalars(0, {"loss": 1})
    first.close()
    writers.MetricWriter(tmp_path, 0, 0).close()
    assert writers.read_metrics(tmp_path) == []
    assert all(e.step == 0 for e in tensorboard_events(tmp_path) if e.session_log.status == e.session_log.START)


def test_only_process_0_writes(tmp_path):
    writer = writers.MetricWriter(tmp_path / "run", 1, 0)
    writer.scalars(1, {"loss": 1})
    writer.images(1, {"samples": np.zeros((2, 2, 3), np.uint8)})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_pictures_must_be_bytes(tmp_path):
    with pytest.raises(ValueError, match=r"picture 'x': found float32 \(2, 2, 3\), expected uint8 \[h, w, c\]"):
        writers.MetricWriter(tmp_path, 1, 0).images(1, {"x": np.zeros((2, 2, 3), np.float32)})


def test_unreadable_metrics_say_where(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl: no metrics here"):
        writers.read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": nonsense}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2: not JSON"):
        writers.read_metrics(tmp_path)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: now[0])
    return now


def test_progress_in_a_log_comes_at_intervals(clock):
    stream = io.StringIO()
    progress = writers.Progress("step", 100, start=20, interval=30.0, stream=stream)
    for step in range(21, 101):
        clock[0] += 1.0
        progress.update(step, f"loss {step}")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "step 21/100 (21%)  ETA 1:19  loss 21"  # the first at once; 1 step took 1 s and 79 remain
    assert lines[1:] == [f"step {s}/100 ({s}%)  ETA 0:{100 - s:02}  loss {s}" for s in (51, 81, 100)]


def test_progress_on_a_terminal_rewrites_one_line(clock):
    stream = Terminal()
    progress = writers.Progress("step", 3, stream=stream)
    for step, text in ((0, "compiling the step"), (1, "loss 1"), (2, ""), (3, "done")):
        clock[0] += 1.0
        progress.update(step, text)
    assert stream.getvalue().count("\n") == 1 and stream.getvalue().endswith("done\n")
    first, second, third, _ = stream.getvalue()[1:].split("\r")
    assert first == "step 0/3 (0%)  ETA ?  compiling the step"
    assert len(second) == len(first) and len(third) >= len(second.rstrip())  # spaces wipe the longer line before


def test_progress_without_a_text_says_the_rate(clock):
    stream = io.StringIO()
    progress = writers.Progress("images", 2000, stream=stream)
    clock[0] = 4.0
    progress.update(1000)
    assert stream.getvalue() == "images 1000/2000 (50%)  ETA 0:04  250.0/s\n"


def test_durations():
    assert [writers.duration(s) for s in (4.4, 184, 7384)] == ["0:04", "3:04", "2:03:04"]


def test_atomic_write_replaces_whole(tmp_path, monkeypatch):
    path = tmp_path / "new" / "config.json"
    atomic_write(path, "old")
    atomic_write(path, b"new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["config.json"]

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match=re.escape(f"{path}: not written: No space left on device")):
        atomic_write(path, "half")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["config.json"]

    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        atomic_write(path, "interrupted")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["config.json"]


def test_check_writable(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_writable("~/runs/a") == tmp_path / "runs" / "a"
    monkeypatch.chdir(tmp_path)
    assert check_writable("runs/a") == tmp_path / "runs" / "a" and os.listdir("runs/a") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"file: not writable: a file of that name is in the way; give another folder"):
        check_writable(tmp_path / "file")
    with pytest.raises(OSError, match=r"/proc/nested/run: not writable: .*; give another folder \(--workdir\)"):
        check_writable("/proc/nested/run")
    with pytest.raises(ValueError, match="gs://bucket/run: not a folder; mount the bucket"):
        check_writable("gs://bucket/run")
