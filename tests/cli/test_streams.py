"""Printing decides nothing: no stream, a full or a broken one, names that cannot be encoded."""

import io
import os
import subprocess
import sys

import numpy as np
import PIL.Image
import pytest

from ipt_fast.cli import main
from ipt_fast.cli._streams import Stream

COMMAND = [sys.executable, "-m", "ipt_fast.cli"]


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in (b"a.png", b"\xff.png"):  # the second is no UTF-8
        with open(os.path.join(os.fsencode(folder), name), "wb") as file:
            PIL.Image.fromarray(np.full((8, 9, 3), 99, np.uint8)).save(file, "PNG")
    return folder


@pytest.fixture
def restore(photos, tmp_path):
    def call(*arguments):
        return main(["restore", str(photos), str(tmp_path / "out"), "--device", "cpu", *arguments])

    return call


def results(tmp_path):
    return sum(name.endswith(".png") for name in os.listdir(tmp_path / "out"))


class Broken(io.StringIO):
    """A stream that fails to write or to flush."""

    def __init__(self, error, when):
        super().__init__()
        self.failure, self.when = error, when

    def write(self, text):
        return self.fail("write") or super().write(text)

    def flush(self):
        self.fail("flush")

    def fail(self, what):
        if what == self.when:
            raise self.failure


@pytest.mark.parametrize("when", ["write", "flush"])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), BrokenPipeError(32, "Broken pipe")])
def test_a_full_or_broken_stream_changes_nothing(restore, tmp_path, monkeypatch, error, when):
    err = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Broken(error, when))
    monkeypatch.setattr(sys, "stderr", err)
    assert restore() == 0 and results(tmp_path) == 2
    told = "ipt-fast: warning: standard output could not be written: [Errno 28] No space left on device\n"
    assert err.getvalue() == ("" if isinstance(error, BrokenPipeError) else told)
    monkeypatch.setattr(sys, "stderr", Broken(error, when))
    assert restore("--overwrite") == 0
    assert restore("--noise", "-1") == 2  # what goes wrong is in the status still


def test_no_streams(restore, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert restore() == 0 and results(tmp_path) == 2
    assert restore("--noise", "-1") == 2
    assert (sys.stdout, sys.stderr) == (None, None)
    with pytest.raises(SystemExit) as stopped:
        main(["restore", "--help"])
    assert stopped.value.code == 0


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_names_that_cannot_be_encoded(restore, photos, tmp_path, monkeypatch, encoding):
    streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict") for _ in range(2)]
    monkeypatch.setattr(sys, "stdout", streams[0])
    monkeypatch.setattr(sys, "stderr", streams[1])
    assert restore() == 0 and results(tmp_path) == 2
    assert "\\udcff.png -> " in streams[0].buffer.getvalue().decode(encoding)
    for path in photos.iterdir():
        path.write_bytes(b"")
    assert restore() == 1
    assert "\\udcff.png: error: " in streams[1].buffer.getvalue().decode(encoding)


def test_names_that_cannot_be_encoded_in_reports(photos, tmp_path):
    folder = os.fsdecode(os.path.join(os.fsencode(tmp_path), b"\xe9"))
    os.rename(photos, folder)
    table, report = tmp_path / "table.csv", tmp_path / "report.json"
    options = ["--sigma", "25", "--device", "cpu", "--csv", str(table), "--json", str(report)]
    for status in (1, 0):  # too small for SSIM, then right
        assert main(["eval", "--data", folder, *options]) == status
        for name in os.listdir(folder):
            with open(os.path.join(folder, name), "wb") as file:
                PIL.Image.new("RGB", (11, 11)).save(file, "PNG")
    assert b",\xe9,rgb,25,2," in table.read_bytes() and "\\udce9" in report.read_text()


def test_a_stream_stays_what_it_is_otherwise():
    inner = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    stream = Stream(inner)
    assert stream.encoding == "utf-8" and not stream.isatty() and stream.write("ab") == 2
    inner.close()
    assert stream.write("dropped") == 7 and isinstance(stream.error, ValueError)


@pytest.mark.parametrize("redirect", ["", ">/dev/full", "<&- >&- 2>&-"])
def test_a_whole_process(photos, tmp_path, redirect):
    """Its end, too, at which Python flushes the streams; "" stands for a reader that is gone."""
    arguments = " ".join([*COMMAND, "restore", str(photos), str(tmp_path / "out"), "--device", "cpu"])
    process = ended(f"{arguments} {redirect}")
    assert process.returncode == 0 and results(tmp_path) == 2
    assert process.stderr.count("\n") == (redirect == ">/dev/full"), process.stderr


@pytest.mark.parametrize("redirect", ["", ">/dev/full"])
def test_help_that_nobody_reads(redirect):
    assert ended(f"{' '.join(COMMAND)} --help {redirect}").returncode == 0


def ended(command):
    """A process with buffered streams, as users have it, whose output nobody reads."""
    read, write = os.pipe()
    os.close(read)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    try:
        return subprocess.run(
            command, shell=True, stdout=write, stderr=subprocess.PIPE, text=True, timeout=120, env=environment
        )
    finally:
        os.close(write)
