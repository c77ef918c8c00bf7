"""Files are whole or not there, and as private as the umask says."""

import errno
import os
from pathlib import Path

import pytest

from hbmgym.files import write_atomically


def fail(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_names_the_file_and_leaves_the_old_one(call, tmp_path, monkeypatch):
    write_atomically(tmp_path / "figures", b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(OSError) as failed:
        write_atomically(tmp_path / "figures", b"new")
    assert (failed.value.errno, failed.value.filename) == (errno.ENOSPC, str(tmp_path / "figures"))
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("figures", b"old")]


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "figures", b"new")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_umask_holds(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "figures", b"new")
    finally:
        os.umask(before)
    assert (tmp_path / "figures").stat().st_mode & 0o777 == mode


def test_a_device_is_written_to_and_not_replaced(tmp_path):
    write_atomically(Path(os.devnull), b"new")
    assert Path(os.devnull).is_char_device()
    with pytest.raises(OSError) as failed:
        write_atomically(Path("/dev/full"), b"new")
    assert failed.value.filename == "/dev/full"
    with pytest.raises(IsADirectoryError):
        write_atomically(tmp_path, b"new")
