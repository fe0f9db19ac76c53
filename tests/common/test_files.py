# SPDX-License-Identifier: Apache-2.0
"""Whole files and locks between processes."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading

import helpers_runs as runs
import pytest

from common import files

HOLD = """
import sys, time
from pathlib import Path
from common import files
lock = files.try_lock(Path(sys.argv[1]))
print("held" if lock else "taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other(tmp_path):
    """A process that holds the lock `x.lock`."""
    words = [sys.executable, "-c", HOLD, str(tmp_path / "x.lock")]
    environment = runs.environment(tmp_path)
    process = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_is_taken_until_its_process_dies(tmp_path, other):
    path = tmp_path / "x.lock"
    assert files.try_lock(path) is None
    other.send_signal(signal.SIGKILL)
    other.wait()
    lock = files.try_lock(path)
    assert lock is not None and files.try_lock(path) is None
    lock.release()
    assert files.try_lock(path) is not None


def test_who_waits_says_so_and_goes_on_after_a_death(tmp_path, other, capsys):
    timer = threading.Timer(0.5, other.kill)
    timer.start()
    with files.locked(tmp_path / "x.lock"):
        assert capsys.readouterr().out == "another process is at work on x: waiting\n"
        assert other.wait() == -signal.SIGKILL
    assert not (tmp_path / "x.lock").exists()


def test_never_two_at_once_although_the_file_is_removed(tmp_path):
    """Whoever waits for a lock file that is then removed must not take the removed one."""
    path, inside, most = tmp_path / "x.lock", [], []

    def work():
        for _ in range(5):
            with files.locked(path):
                inside.append(1)
                most.append(len(inside))
                inside.pop()

    workers = [threading.Thread(target=work) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert most == [1] * 20 and not path.exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO])
def test_a_disk_without_locks_is_a_warning(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / "x.lock").touch()  # left by an earlier run
    lock = files.try_lock(tmp_path / "x.lock")
    assert lock is not None
    lock.release()  # as after a real one
    error = capsys.readouterr().err
    assert error == f"WARNING: {tmp_path}: this disk has no locks ({os.strerror(number)})\n"
    with files.locked(tmp_path / "y.lock"):
        pass


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.txt"
    files.write(path, "before")

    def full(out):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sync", full)
        with pytest.raises(OSError, match="No space"):
            files.write(path, "after")
    assert path.read_text() == "before"
    files.write(path, "after")
    assert path.read_text() == "after" and os.listdir(tmp_path) == ["x.txt"]
