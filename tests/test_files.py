"""Atomic writing, through links and into what is no plain file."""

import os
import shlex
import stat
import subprocess
import sys
import threading

import pytest

from ipt_fast._files import atomic_write, is_stream


def put(path, content):
    with atomic_write(path) as temporary:
        assert temporary.suffix == path.suffix
        temporary.write_text(content)


def test_a_link_is_followed(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "real.txt").write_text("before")
    (tmp_path / "link.csv").symlink_to("far/real.txt")
    (tmp_path / "dangling.csv").symlink_to("far/new.txt")
    for name, real in (("link.csv", "real.txt"), ("dangling.csv", "new.txt")):
        put(tmp_path / name, "after")
        assert (tmp_path / name).is_symlink() and (tmp_path / "far" / real).read_text() == "after"
    assert sorted(os.listdir(tmp_path / "far")) == ["new.txt", "real.txt"]


def test_a_fifo_is_written_to(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    got = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe.csv").read_text()))
    reader.start()
    put(tmp_path / "pipe.csv", "content")
    reader.join(10)
    assert got == ["content"] and stat.S_ISFIFO(os.stat(tmp_path / "pipe.csv").st_mode)
    assert os.listdir(tmp_path) == ["pipe.csv"]


def test_a_device_is_written_to(tmp_path):
    (tmp_path / "null.csv").symlink_to(os.devnull)
    put(tmp_path / "null.csv", "content")
    assert (tmp_path / "null.csv").is_symlink() and stat.S_ISCHR(os.stat(os.devnull).st_mode)
    with pytest.raises(OSError, match="No space left"):
        (tmp_path / "full.csv").symlink_to("/dev/full")
        put(tmp_path / "full.csv", "content")


def test_a_file_that_is_open_as_a_stream_is_added_to(tmp_path):
    """As with ``--csv /dev/stdout > file``: what is in the file already stays."""
    with (tmp_path / "log").open("w") as log:
        log.write("before\n")
        log.flush()
        with atomic_write(f"/dev/fd/{log.fileno()}") as temporary:
            temporary.write_text("content\n")
        log.write("after\n")
        log.flush()
        assert (tmp_path / "log").read_text() == "before\ncontent\nafter\n"


def test_a_report_comes_between_what_is_printed(tmp_path):
    """Without the environment's PYTHONUNBUFFERED, as users have it."""
    (tmp_path / "link").symlink_to("/dev/stdout")
    program = """
from ipt_fast._files import atomic_write
for name in ("/dev/stdout", "/dev/stderr", "/dev/fd/1", "table", "link"):
    print("before", name)
    with atomic_write(name) as path:
        path.write_text("report\\n")
    print("after")
"""
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(program)} > table 2>&1; echo end >> table"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [os.getcwd(), *sys.path]))
    subprocess.run(command, shell=True, cwd=tmp_path, env=environment, check=True, timeout=60)
    names = ("/dev/stdout", "/dev/stderr", "/dev/fd/1", "table", "link")
    expected = "".join(f"before {name}\nreport\nafter\n" for name in names) + "end\n"
    assert (tmp_path / "table").read_text() == expected


@pytest.mark.parametrize("mode", [0o600, 0o664])
def test_the_mode_and_the_owner_of_a_file_are_kept(tmp_path, mode):
    (tmp_path / "file.csv").write_text("before")
    (tmp_path / "file.csv").chmod(mode)
    (tmp_path / "link.csv").symlink_to("file.csv")
    if os.getuid() == 0:
        os.chown(tmp_path / "file.csv", 12, 34)
    before = (tmp_path / "file.csv").stat()
    put(tmp_path / "link.csv", "after")
    after = (tmp_path / "file.csv").stat()
    assert (tmp_path / "file.csv").read_text() == "after" and stat.S_IMODE(after.st_mode) == mode
    assert (after.st_uid, after.st_gid) == (before.st_uid, before.st_gid)
    put(tmp_path / "new.csv", "")
    (tmp_path / "other.csv").write_text("")
    assert (tmp_path / "new.csv").stat().st_mode == (tmp_path / "other.csv").stat().st_mode


def test_what_is_a_stream(tmp_path):
    (tmp_path / "file").write_text("")
    assert is_stream(os.devnull)
    assert not any(is_stream(path) for path in (tmp_path, tmp_path / "file", tmp_path / "none"))
