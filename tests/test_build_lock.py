"""Builds in one folder wait for each other, also for the compilers of one whose Python was killed."""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from build_support import extension
from build_support.settings import ROOT

BUILD = """
import subprocess, sys
from pathlib import Path
from build_support import extension
with extension.only_build(Path(sys.argv[1])) as lock:
    program = subprocess.Popen(["sh", "-c", "echo begun; cat"], stdin=0, pass_fds=[lock])
    program.wait()
"""


def is_free(folder: Path) -> bool:
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def test_a_killed_build_is_over_when_its_compilers_are(tmp_path: Path) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, stdin=pipe, stdout=pipe) as build:
        assert build.stdin is not None
        assert build.stdout is not None
        assert build.stdout.readline() == b"begun\n"
        build.kill()
        build.wait()
        assert not is_free(tmp_path)
        build.stdin.close()  # the program ends
        assert build.stdout.read() == b""
    with extension.only_build(tmp_path):
        pass


def test_what_a_build_leaves_running_holds_no_lock(tmp_path: Path) -> None:
    with extension.only_build(tmp_path) as lock:
        left = subprocess.Popen(["sleep", "60"], pass_fds=[lock])
        assert not is_free(tmp_path)
    try:
        assert is_free(tmp_path)
    finally:
        left.kill()
        left.wait()


def test_a_build_that_waits_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with extension.only_build(tmp_path):
        waiting = subprocess.Popen([sys.executable, "-c", BUILD, tmp_path], cwd=ROOT, stdin=subprocess.DEVNULL)
        with pytest.raises(subprocess.TimeoutExpired):
            waiting.wait(timeout=3)
    assert waiting.wait() == 0
    assert f"waiting for another build in {tmp_path}" in capfd.readouterr().out
