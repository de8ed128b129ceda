"""Files: what is read is bounded and regular, what is written is whole, what was killed is gone."""

import fcntl
import multiprocessing
import os
import socket
import subprocess
import sys
import time

import pytest

from megamoe import files
from megamoe.files import (
    FileError,
    clear_leftovers,
    digest_bounded,
    folder_lock,
    parse_json,
    read_bounded,
    write_atomically,
)

# --- reading ----------------------------------------------------------------------------------


def test_a_file_up_to_the_limit_is_read_and_no_larger_one(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(FileError, match=r"/a has more than 4 bytes, the most that is read"):
        read_bounded(path, 4)
    with pytest.raises(FileError, match="more than 4 bytes"):
        digest_bounded(path, 4)


def test_a_file_that_grows_while_it_is_read_is_refused_all_the_same(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"12345")
    monkeypatch.setattr(files, "_check", lambda *arguments: None)
    with pytest.raises(FileError, match="more than 4 bytes"):
        read_bounded(path, 4)


def _fifo(path):
    os.mkfifo(path)


def _socket(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))


@pytest.mark.parametrize(
    ("create", "message"),
    [
        (_fifo, "is a fifo, no regular file"),
        (_socket, "is a socket, no regular file"),
        (lambda path: path.mkdir(), "is a directory, no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is a device, no regular file"),
    ],
)
@pytest.mark.timeout(20)
def test_what_is_no_file_is_one_line_and_no_wait(tmp_path, create, message):
    create(tmp_path / "a")
    with pytest.raises(FileError, match=message):
        read_bounded(tmp_path / "a", 10)


@pytest.mark.timeout(20)
def test_a_fifo_that_takes_the_files_place_after_it_was_asked_is_no_wait(tmp_path, monkeypatch):
    path, real = tmp_path / "a", files._check
    path.write_bytes(b"1")

    def swap(name, status, limit):
        real(name, status, limit)
        if path.is_file():
            path.unlink()
            os.mkfifo(path)

    monkeypatch.setattr(files, "_check", swap)
    with pytest.raises(FileError, match="is a fifo"):
        read_bounded(path, 10)


def test_a_link_is_followed_or_not(tmp_path):
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").symlink_to("a")
    assert read_bounded(tmp_path / "b", 10) == b"1"
    with pytest.raises(FileError, match="is a symbolic link, no regular file"):
        read_bounded(tmp_path / "b", 10, follow=False)


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 200_000, b"1" * 5000, b""])
def test_what_is_no_json_is_a_value_error(content):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_json(content)


# --- writing ----------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_bytes(b"old")

    def fail(handle):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, sys
from pathlib import Path
from megamoe import files
os.fsync = lambda handle: os.kill(os.getpid(), 9)
files.write_atomically(Path(sys.argv[1]) / "deep" / "a", b"half")
"""


def test_what_a_killed_write_left_is_cleared(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False, timeout=60)
    (leftover,) = (tmp_path / "deep").iterdir()
    assert clear_leftovers(tmp_path, deep=False) == [] and leftover.exists()
    assert clear_leftovers(tmp_path) == [leftover] and not leftover.exists()


def test_only_our_own_leftovers_of_dead_processes_are_cleared(tmp_path):
    live = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    names = (
        f".megamoe-{live.pid}-abc.tmp",
        ".abc.tmp",
        "megamoe-1-a.tmp",
        f".megamoe-{10**30}-a.tmp",
    )
    for name in names:
        (tmp_path / name).write_bytes(b"")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / ".megamoe-999999999-a.tmp").write_bytes(b"")
    (tmp_path / "link").symlink_to(outside)
    assert clear_leftovers(tmp_path) == []
    assert {p.name for p in tmp_path.iterdir()} == {*names, "link"}
    assert (outside / ".megamoe-999999999-a.tmp").exists()
    live.communicate(b"\n")
    assert [p.name for p in clear_leftovers(tmp_path)] == [names[0]]


# --- the lock ---------------------------------------------------------------------------------


def _hold(folder, signal):
    with folder_lock(folder):
        signal.set()
        time.sleep(60)


def test_a_lock_excludes_and_whoever_is_killed_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LOCK_SECONDS", 0.1)
    context = multiprocessing.get_context("spawn")
    signal = context.Event()
    other = context.Process(target=_hold, args=(tmp_path, signal))
    other.start()
    assert signal.wait(60)
    with pytest.raises(FileError, match="is held by another golden record, bless or import; wait"):
        folder_lock(tmp_path).__enter__()
    other.kill()
    other.join()
    with folder_lock(tmp_path):
        assert list(tmp_path.iterdir()) == []  # the lock itself is no file


def test_a_folder_that_was_removed_meanwhile_is_locked_anew(tmp_path, monkeypatch):
    """Between its opening and its locking another process may remove it."""
    folder, real, calls = tmp_path / "a", fcntl.flock, []

    def flock(handle, how):
        if not calls:
            folder.rmdir()
        calls.append(handle)
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with folder_lock(folder):
        assert folder.is_dir() and len(calls) == 2
