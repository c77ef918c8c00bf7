"""What is kept between runs lies where nobody else can write, or nowhere."""

import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from hbmgym import private
from hbmgym.private import cache_folder, private_folder, settle_matplotlib

ROOT = Path(__file__).parents[1]
STRANGERS = (54321, 54322)


@pytest.fixture
def bare(tmp_path, monkeypatch) -> Path:
    """Neither a home nor a folder for caches is named, temporary files go to tmp_path/tmp."""
    for name in ("HOME", "XDG_CACHE_HOME", "MPLCONFIGDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: os.environ.get("HOME", path))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path


def test_what_is_made_is_for_the_user_alone_whatever_the_umask(tmp_path):
    old = os.umask(0)
    try:
        folder = private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(old)
    assert [path.stat().st_mode & 0o777 for path in (folder, folder.parent)] == [0o700, 0o700]
    assert private_folder(folder) == folder


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o772, 0o722])
def test_a_folder_that_others_may_write_is_refused(mode, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(mode)
    with pytest.raises(PermissionError, match="others may write"):
        private_folder(tmp_path / "open")


def test_the_group_that_has_no_other_member_is_no_other(tmp_path, monkeypatch):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    monkeypatch.setattr(private, "_is_own_group", lambda number: True)
    assert private_folder(tmp_path / "open").name == "open"
    monkeypatch.setattr(private, "_is_own_group", lambda number: False)
    with pytest.raises(PermissionError, match="others may write"):
        private_folder(tmp_path / "open")


def test_nothing_is_made_in_a_place_that_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        private_folder(tmp_path / "open" / "cache" / "own")
    assert not list((tmp_path / "open").iterdir())


def test_so_is_one_that_others_may_put_another_one_in_the_place_of(tmp_path):
    (tmp_path / "above").mkdir()
    (tmp_path / "above" / "own").mkdir(mode=0o700)
    (tmp_path / "above").chmod(0o777)
    with pytest.raises(PermissionError, match="others may write"):
        private_folder(tmp_path / "above" / "own")
    (tmp_path / "above").chmod(0o1777)  # as /tmp
    assert private_folder(tmp_path / "above" / "own").name == "own"


def test_so_is_one_of_somebody_else_and_a_link_to_it(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path)
    monkeypatch.setattr(private, "_user", lambda: os.geteuid() + 1)
    for folder in (tmp_path, tmp_path / "link"):
        with pytest.raises(PermissionError, match="belongs to user"):
            private_folder(folder)


def test_a_link_of_ones_own_is_followed_once(tmp_path):
    (tmp_path / "real").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("real")
    assert private_folder(tmp_path / "link") == (tmp_path / "real").resolve()


def test_a_file_or_a_loop_in_its_place_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    for folder in ("file", "file/below", "loop"):
        with pytest.raises(OSError):
            private_folder(tmp_path / folder)


def test_the_caches_folder_is_asked_first_then_the_home_then_the_temporary_one(bare, monkeypatch):
    own = f"hbmgym-{os.geteuid()}"
    assert cache_folder() == (bare / "tmp" / own).resolve()
    monkeypatch.setenv("HOME", str(bare / "home"))
    assert cache_folder() == (bare / "home" / ".cache" / "hbmgym").resolve()
    monkeypatch.setenv("XDG_CACHE_HOME", str(bare / "caches"))
    assert cache_folder() == (bare / "caches" / "hbmgym").resolve()
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_folder() == (bare / "home" / ".cache" / "hbmgym").resolve()
    (bare / "home" / ".cache").chmod(0o777)
    assert cache_folder() == (bare / "tmp" / own).resolve()
    (bare / "tmp" / own).chmod(0o777)
    assert cache_folder() is None


def test_without_any_temporary_folder_nothing_is_kept(bare, monkeypatch):
    def none_is_usable() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(tempfile, "gettempdir", none_is_usable)
    assert cache_folder() is None
    settle_matplotlib()
    assert "MPLCONFIGDIR" not in os.environ


def test_matplotlib_gets_a_folder_where_there_is_no_home_and_only_there(bare, monkeypatch):
    settle_matplotlib()
    assert Path(os.environ["MPLCONFIGDIR"]).is_relative_to((bare / "tmp").resolve())
    monkeypatch.delenv("MPLCONFIGDIR")
    monkeypatch.setenv("HOME", str(bare))
    settle_matplotlib()
    assert "MPLCONFIGDIR" not in os.environ


class Planted:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A folder as /tmp is, which strangers reach."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


def as_stranger(user: int, shared: Path, *command: object) -> subprocess.CompletedProcess[str]:
    """Runs Python as another user without a name or a home; it may read everything, but write nothing of others."""
    who = ["setpriv", f"--reuid={user}", f"--regid={user}", "--clear-groups"]
    reads = ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(shared), "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = [*who, *reads, sys.executable, "-B", *map(str, command)]
    return subprocess.run(arguments, env=environment, cwd=shared, capture_output=True, text=True)


ENVIRONMENT = "import hbmgym.memory_backend.jit as jit, hbmgym.envs.serving.cost_model; print(jit.KERNEL_CACHE)"
needs_strangers = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0 or shutil.which("setpriv") is None,
    reason="only root can act as somebody else",
)


@needs_strangers
def test_a_user_without_a_name_or_a_home_keeps_kernels_in_the_temporary_folder(shared):
    ended = as_stranger(STRANGERS[0], shared, "-c", ENVIRONMENT)
    assert not ended.stderr
    folder = Path(ended.stdout.strip())
    assert folder.parent == shared / f"hbmgym-{STRANGERS[0]}"
    assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (STRANGERS[0], 0o700)


@needs_strangers
@pytest.mark.parametrize("by_link", [False, True])
def test_kernels_that_somebody_else_has_put_there_are_not_loaded(by_link, shared):
    """The other user has made the folders beforehand, and a pickle in the place of every index."""
    kernels = Path(as_stranger(STRANGERS[0], shared, "-c", ENVIRONMENT).stdout.strip())
    script = """
import numpy as np
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import Core
Core(ServingConfig())
"""
    assert not as_stranger(STRANGERS[0], shared, "-c", script).stderr
    indices = [path.relative_to(kernels.parent) for path in kernels.rglob("*.nbi")]
    assert indices
    trap = shared / f"hbmgym-{STRANGERS[1]}"
    planted = shared / "planted" if by_link else trap
    for index in indices:
        (planted / index).parent.mkdir(parents=True, exist_ok=True)
        (planted / index).write_bytes(pickle.dumps(Planted(shared / "mark")))
    for path in (planted, *planted.rglob("*")):
        os.chown(path, STRANGERS[0], STRANGERS[0])
        path.chmod(0o777)
    if by_link:
        trap.symlink_to(planted)
        os.chown(trap, STRANGERS[0], STRANGERS[0], follow_symlinks=False)
    ended = as_stranger(STRANGERS[1], shared, "-c", script)
    assert ended.returncode == 0
    assert not (shared / "mark").exists()
    assert ended.stderr.count("\n") == 1 and "compiled kernels are not kept" in ended.stderr
