"""Worker processes: answers in order, an end in one line whatever dies, and nobody left behind."""

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from hbmgym.processes import STOPPING, Stopped, WorkerDied, Workers, describe_end, stopped_by, unstopped

PATIENCE_S = 60.0
"""Whatever takes longer hangs."""


def test_answers_come_in_the_order_of_the_items():
    with Workers(2) as workers:
        assert list(workers.map(abs, range(0, -20, -1))) == list(range(20))
        assert list(workers.map(len, [b"x" * size for size in (0, 10_000_000, 1)])) == [0, 10_000_000, 1]
        assert list(workers.map(abs, [])) == []
    assert not multiprocessing.active_children()


def test_workers_get_ready_first():
    with Workers(2, os.putenv, "HBMGYM_TEST", "ready") as workers:
        assert list(workers.map(os.getenv, ["HOME"])) == [os.getenv("HOME")]
    with pytest.raises(FileNotFoundError), Workers(1, os.chdir, "/nowhere/at/all") as workers:
        list(workers.map(abs, [1]))


def test_what_a_task_raises_arrives_with_a_note_of_where_and_ends_all():
    with pytest.raises(ZeroDivisionError) as raised, Workers(2) as workers:
        list(workers.map(divmod_by, [1, 0, 2]))
    assert "in a worker process" in raised.value.__notes__[0]
    assert not multiprocessing.active_children()


class Stubborn(Exception):
    """Cannot be made again of what it was pickled to."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def raise_stubborn(_: int) -> None:
    raise Stubborn(1, 2)


def make_unpicklable(_: int) -> object:
    return lambda: None


@pytest.mark.parametrize(("task", "named"), [(raise_stubborn, "Stubborn: 1 and 2"), (make_unpicklable, "pickle")])
def test_what_cannot_be_sent_back_is_told_as_a_text(task, named):
    with pytest.raises(Exception) as raised, Workers(1) as workers:
        list(workers.map(task, [1]))
    assert not isinstance(raised.value, WorkerDied)
    assert named in f"{raised.value} {getattr(raised.value, '__notes__', '')}"


def test_after_an_error_or_an_early_end_no_answer_goes_astray():
    with Workers(2) as workers:
        with pytest.raises(ZeroDivisionError):
            list(workers.map(divmod_by, [0, 1]))
        with pytest.raises(RuntimeError, match="have ended"):
            list(workers.map(divmod_by, [1]))
    with Workers(2) as workers:
        answers = workers.map(divmod_by, [1, 1, 1])
        assert next(answers) == 1
        answers.close()
        with pytest.raises(RuntimeError, match="have ended"):
            list(workers.map(divmod_by, [1]))


def divmod_by(divisor: int) -> int:
    return 1 // divisor


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM])
def test_a_worker_that_dies_is_one_line_that_says_at_what(number):
    with pytest.raises(WorkerDied) as died, Workers(2) as workers:
        list(workers.map(signal.raise_signal, [number], lambda _: "the task"))
    message = str(died.value)
    assert message.startswith("the task: ") and number.name in message and "\n" not in message
    assert ("memory ran out; give fewer --jobs" in message) == (number == signal.SIGKILL)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_idle_is_noticed_as_well():
    with Workers(2) as workers:
        assert list(workers.map(abs, [1])) == [1]
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(WorkerDied):
            list(workers.map(time.sleep, [0.1] * 4))


def test_a_worker_that_dies_while_it_starts_is_noticed_as_well():
    """Far more is to be sent to it than a pipe holds."""
    killer = threading.Thread(target=kill_one, args=(0.0,))
    killer.start()
    with pytest.raises(WorkerDied), Workers(2, len, bytes(50_000_000)) as workers:
        list(workers.map(time.sleep, [0.1] * 1000))
    killer.join()


def kill_one(after_s: float) -> None:
    time.sleep(after_s)
    until_s = time.monotonic() + PATIENCE_S
    while not (children := multiprocessing.active_children()) and time.monotonic() < until_s:
        time.sleep(0.001)
    os.kill(random.choice(children).pid, signal.SIGKILL)


@pytest.mark.slow
def test_no_worker_that_dies_at_any_moment_leaves_the_others_waiting():
    """Tasks and answers are larger than a pipe holds, so that some die in the middle of one."""
    for seed in range(120):
        random.seed(seed)
        killer = threading.Thread(target=kill_one, args=(random.uniform(0.0, 0.5),))
        hanging = threading.Timer(PATIENCE_S, os.abort)
        killer.start()
        hanging.start()
        with pytest.raises(WorkerDied), Workers(2) as workers:
            list(workers.map(bytes.upper, [bytes(random.randrange(300_000)) for _ in range(20)] * 1000))
        hanging.cancel()
        killer.join()
        assert not multiprocessing.active_children()


def test_workers_do_not_hear_what_a_terminal_sends():
    heard = signal.getsignal(signal.SIGINT)
    with Workers(2) as workers:
        assert signal.getsignal(signal.SIGINT) is heard
        assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
        for number in (signal.SIGINT, signal.SIGHUP):
            assert set(workers.map(signal.getsignal, [number] * 8)) == {signal.SIG_IGN}
            assert list(workers.map(signal.raise_signal, [number] * 2)) == [None, None]


PARENT = """
import sys, time
from hbmgym.processes import Workers

if __name__ == "__main__":
    with Workers(2) as workers:
        list(workers.map(abs, [1, 2]))
        print("ready", flush=True)
        list(workers.map(time.sleep, [1000.0] * 2))
"""


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="children are found in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_no_process_outlives_the_first_one(number, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE) as parent:
        parent.stdout.readline()
        children = children_of(parent.pid)
        assert len(children) == 3  # workers and a tracker of resources
        parent.send_signal(number)
        assert parent.wait(PATIENCE_S) == -number
    until_s = time.monotonic() + PATIENCE_S
    while left := [child for child in children if Path(f"/proc/{child}/task").is_dir() and not is_dead(child)]:
        assert time.monotonic() < until_s, left
        time.sleep(0.01)


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_dead(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize("number", STOPPING)
def test_a_signal_stops_as_ctrl_c_does_and_a_second_one_is_not_heard(number):
    with pytest.raises(KeyboardInterrupt) as stop, stopped_by(*STOPPING):
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
    assert isinstance(stop.value, Stopped)
    assert (str(stop.value), stop.value.code) == (f"ended by {signal.Signals(number).name}", 128 + number)
    assert signal.getsignal(number) == signal.SIG_DFL


def test_where_an_exception_would_be_lost_it_comes_later():
    steps = []
    with pytest.raises(Stopped), stopped_by(signal.SIGTERM):
        with unstopped():
            with unstopped():
                signal.raise_signal(signal.SIGTERM)
                steps.append("inner")
            steps.append("outer")
        steps.append("after")
    assert steps == ["inner", "outer"]


def test_a_signal_that_is_ignored_stays_so():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with stopped_by(signal.SIGHUP):
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


def test_an_end_is_told_in_words():
    told = {0: "exit code 0", 3: "exit code 3", -9: "signal SIGKILL", -40: "signal 40"}
    assert {code: describe_end(code) for code in told} == told
