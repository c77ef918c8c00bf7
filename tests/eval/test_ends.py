"""How a command ends that is stopped, loses a worker, or cannot write: one line, an exit code, nothing left behind."""

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hbmgym.eval import compare, opportunity

from ..test_processes import PATIENCE_S, children_of, is_dead
from .traffic import HBM_GIB, MODEL, write_trace

SCRIPT = Path(__file__).resolve().parents[2] / "eval" / "compare.py"
SERVING = ("--model", MODEL, "--hbm-gib", str(HBM_GIB), "--controllers", "static-0.5", "--no-oracle")


@pytest.fixture
def short(tmp_path) -> tuple[str, ...]:
    return (*SERVING, "--seeds", "1", "--jobs", "1", "--trace", str(write_trace(tmp_path / "own.jsonl")))


@pytest.fixture
def command(short, tmp_path) -> list[str]:
    return [sys.executable, str(SCRIPT), *short, "--out", str(tmp_path / "some" / "where")]


@pytest.fixture
def environment(monkeypatch) -> None:
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)


@contextlib.contextmanager
def running(tmp_path: Path):
    """A comparison that has two workers at work for longer than anybody waits; its folder is there."""
    traffic = ("--trace", str(write_trace(tmp_path / "own.jsonl", span_s=36_000.0)))
    long = [sys.executable, str(SCRIPT), *SERVING, *traffic, "--seeds", "1000", "--jobs", "2"]
    with subprocess.Popen([*long, "--out", str(tmp_path / "a" / "b")], stderr=subprocess.PIPE, text=True) as process:
        until_s = time.monotonic() + PATIENCE_S
        while len(children := workers_of(process.pid)) < 2 or not all(map(is_busy, children)):
            assert process.poll() is None and time.monotonic() < until_s
            time.sleep(0.05)
        assert (tmp_path / "a" / "b").is_dir()
        yield process, children
    assert all(map(is_dead, children))
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


def workers_of(pid: int) -> list[int]:
    return [child for child in children_of(pid) if "spawn_main" in Path(f"/proc/{child}/cmdline").read_text()]


def is_busy(pid: int) -> bool:
    """Has it imported everything? Then it does not hear what terminals send."""
    ignored = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0]
    return bool(int(ignored, 16) >> (signal.SIGHUP - 1) & 1)


needs_proc = pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_processes_and_leaves_no_folder(number, tmp_path):
    with running(tmp_path) as (process, _):
        process.send_signal(number)
        printed = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 128 + number
    assert printed.splitlines()[-1] == f"ended by {number.name}" and "Traceback" not in printed


@needs_proc
def test_a_killed_worker_is_one_line(tmp_path):
    with running(tmp_path) as (process, workers):
        os.kill(workers[0], signal.SIGKILL)
        printed = process.communicate(timeout=PATIENCE_S)[1]
    assert process.returncode == 1
    last = printed.splitlines()[-1]
    assert last.startswith(("compare.py: static-0.5 on own, seed ", "compare.py: getting ready: "))
    assert "SIGKILL" in last and "--jobs" in last
    assert "Traceback" not in printed


def test_what_resumes_says_what_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(opportunity, "_calibrated", lambda chosen: chosen)
    monkeypatch.setattr(opportunity, "_answer", die)
    monkeypatch.setattr(opportunity, "_cases", lambda _: [Killed()])
    with pytest.raises(SystemExit) as leaving:
        opportunity.main(["--out", str(tmp_path), "--seeds", "1"])
    assert leaving.value.code == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "doomed: its process ended" in line and f"finished episodes are in {tmp_path}" in line


class Killed:
    name = "doomed"


def die(_: object) -> None:
    signal.raise_signal(signal.SIGKILL)


def small_files() -> None:
    """No file may grow, as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def test_on_a_full_disk_what_was_measured_is_printed(command, tmp_path):
    ended = subprocess.run(command, capture_output=True, text=True, preexec_fn=small_files)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last == f"compare.py: {tmp_path}/some/where/cells.json: File too large (free some space, or write elsewhere)"
    assert "best static: " in ended.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]


@pytest.mark.usefixtures("environment")
def test_a_full_stdout_is_one_line_and_what_was_written_stays(command, tmp_path):
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr.splitlines()[-1] == "stdout cannot be written: No space left on device"
    assert json.loads((tmp_path / "some" / "where" / "cells.json").read_text())


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-"])
def test_closed_streams_spoil_no_file(closed, command, tmp_path):
    ended = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *command], capture_output=True, text=True)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1:] == (
        [] if "2>" in closed else ["stdout cannot be written: Bad file descriptor"]
    )
    assert json.loads((tmp_path / "some" / "where" / "cells.json").read_text())


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_is_no_error_to_speak_of(unbuffered, short):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, str(SCRIPT), *short]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert ended.returncode == 141
    assert "rror" not in ended.stderr


def test_without_semaphores_processes_are_used_all_the_same(short, monkeypatch, capsys):
    """They need /dev/shm, which some sandboxes have not."""

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("_multiprocessing.SemLock", refuse)
    compare.main([*short, "--jobs", "2"])
    assert "best static: " in capsys.readouterr().out


def test_a_folder_that_is_gone_is_named(command, tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = 'rmdir "$PWD"; exec "$@"'
    ended = subprocess.run(["sh", "-c", script, "sh", *command], cwd=gone, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "compare.py: the current folder is gone: change to another one\n"


def test_memory_that_runs_out_is_one_line(short, monkeypatch, capsys):
    def run_out(*_: object, **__: object) -> None:
        raise MemoryError("unable to allocate 5 GiB")

    monkeypatch.setattr("hbmgym.eval.compare.compare", run_out)
    with pytest.raises(SystemExit) as leaving:
        compare.main(list(short))
    assert leaving.value.code == 1
    assert "memory ran out (unable to allocate 5 GiB): give fewer --jobs" in capsys.readouterr().err.splitlines()[-1]
