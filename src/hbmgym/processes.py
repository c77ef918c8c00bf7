"""Worker processes, and how a command and all its workers end.

Workers share nothing but a pipe each with the first process: whoever is killed holds no lock that others wait for.
"""

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_KILLED = getattr(signal, "SIGKILL", 9)
_OF_TERMINALS = (signal.SIGINT, *STOPPING[1:])
LEAVING_S = 10.0
"""A process that is told to end may take so long to save what it has; then it is killed."""


class Stopped(KeyboardInterrupt):
    """SIGTERM or SIGHUP, which stop a command as Ctrl-C does; `code` is its exit code, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def stopped_by(*numbers: int) -> Iterator[None]:
    """The first of these signals raises Stopped, further ones are not heard; those that are ignored (nohup) stay so."""
    heard = [number for number in numbers if signal.getsignal(number) == signal.SIG_DFL]

    def stop(number: int, _: FrameType | None) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_IGN)  # `timeout` sends its signal twice
        if _held_back is not None:
            _held_back.append(number)
        else:
            raise Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        heard = []  # only the main thread may listen
    for number in heard:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in heard:
            signal.signal(number, signal.SIG_DFL)


_held_back: list[int] | None = None
"""Signals that came while `unstopped` lasts."""


@contextmanager
def unstopped() -> Iterator[None]:
    """Stopped comes after the block, not within it: raised in what C code calls back, it would be printed and lost."""
    global _held_back
    if _held_back is not None or threading.current_thread() is not threading.main_thread():
        yield
        return
    _held_back = []
    try:
        yield
    finally:
        came, _held_back = _held_back, None
        if came:
            raise Stopped(came[0])


class WorkerDied(RuntimeError):
    """A worker process ended before it had answered; the message is one line: at which task, how, what to do."""


class Workers:
    """As many processes as there are tasks, at most `count`, each of which calls `prepare(*arguments)` first; a context
    manager.

    They end with it, when the first process ends in whatever way, and on SIGTERM, which raises Stopped in them. They do
    not hear Ctrl-C and SIGHUP, which reach every process of a terminal: the first one ends the others.
    """

    def __init__(self, count: int, prepare: Callable[..., object] = int, *arguments: object) -> None:
        self._count, self._prepare = count, (prepare, arguments)
        self._workers: list[_Worker] = []
        self._has_ended = False

    def _start(self, count: int) -> None:
        """Have so many processes."""
        new = range(len(self._workers), min(count, self._count))
        self._workers += [_Worker() for _ in new]  # all of them import while the first ones get ready
        for place in new:
            self._workers[place].begin(*self._prepare, "getting ready")

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def map(self, function: Callable[[T], R], items: Sequence[T], name: Callable[[T], str] = str) -> Iterator[R]:
        """`function(item)` of each, in their order. Raises what `function` or `prepare` raises, with a note of where,
        and WorkerDied, which calls the task by its `name`. Whoever does not take all results ends the workers."""
        try:
            yield from self._map(function, items, name)
        except BaseException:
            self.close()  # some still work on what nobody waits for
            raise

    def _map(self, function: Callable[[T], R], items: Sequence[T], name: Callable[[T], str]) -> Iterator[R]:
        if self._has_ended:
            raise RuntimeError("these workers have ended")
        self._start(len(items))
        waiting, found = deque(range(len(items))), dict[int, R]()
        for place in range(len(items)):
            while place not in found:
                for worker in self._workers:
                    if waiting and not worker.is_busy:
                        worker.begin(function, (items[waiting[0]],), name(items[waiting[0]]), waiting.popleft())
                for worker in self._with_news():
                    answered = worker.place
                    answer = worker.answer()
                    if answered is not None:
                        found[answered] = answer
            yield found.pop(place)

    def _with_news(self) -> list["_Worker"]:
        """Wait until some have answered or ended."""
        ready = wait([handle for worker in self._workers for handle in (worker.pipe, worker.process.sentinel)])
        return [worker for worker in self._workers if worker.pipe in ready or worker.process.sentinel in ready]

    def close(self) -> None:
        """End all, at the latest after LEAVING_S; again: nothing."""
        workers, self._workers, self._has_ended = self._workers, [], True
        try:
            for worker in workers:
                worker.process.terminate()
            until_s = time.monotonic() + LEAVING_S
            for worker in workers:
                worker.process.join(max(until_s - time.monotonic(), 0.0))
        finally:
            for worker in workers:
                worker.process.kill()
                worker.process.join(LEAVING_S)
                worker.pipe.close()


class _Worker:
    """One process as the first one sees it."""

    def __init__(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, end = spawn.Pipe()
        # What it is to do comes through the pipe: whoever starts a process with much more waits for it to read that,
        # and would wait for good if it were killed before.
        self.process = spawn.Process(target=_serve, args=(end,), daemon=True)
        with _deaf_children():
            self.process.start()
        end.close()  # so that the end of the process is the end of the pipe
        self.is_busy = False
        self.place: int | None = None
        self._task = ""

    def begin(
        self, function: Callable[..., Any], arguments: Sequence[Any], task: str, place: int | None = None
    ) -> None:
        """Let it call a function; `place` is where the answer belongs."""
        self.is_busy, self.place, self._task = True, place, task
        try:
            self.pipe.send((function, arguments))
        except OSError:
            raise self._died() from None

    def answer(self) -> Any:
        """What the function returned; raises what it raised."""
        try:
            good, answer = self.pipe.recv()
        except (EOFError, OSError):
            raise self._died() from None
        self.is_busy = False
        if not good:
            raise answer
        return answer

    def _died(self) -> WorkerDied:
        self.process.join(LEAVING_S)
        how = f"its process ended with {describe_end(self.process.exitcode)}"
        if self.process.exitcode == -_KILLED:
            how += ", perhaps as memory ran out; give fewer --jobs, or more memory"
        return WorkerDied(f"{self._task if self.is_busy else 'waiting'}: {how}")


@contextmanager
def _deaf_children() -> Iterator[None]:
    """Processes that are started meanwhile inherit deafness to what a terminal sends; `_serve` makes it last."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # else the first process starts it, which makes everybody hear again
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_TERMINALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, heard)


def _serve(pipe: Connection) -> None:
    """In a worker: call what comes through the pipe until it is closed."""
    for number in _OF_TERMINALS:
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_TERMINALS)
    try:
        with contextlib.suppress(EOFError, OSError), stopped_by(signal.SIGTERM):
            end_with_parent()
            while True:
                pipe.send_bytes(_answer(*pipe.recv()))
    except Stopped:
        os.kill(os.getpid(), signal.SIGTERM)  # so that its end says what ended it


def _answer(function: Callable[..., Any], arguments: Sequence[Any]) -> bytes:
    """Whether all went well, and what the function returned or raised, as a pickle."""
    try:
        return pickle.dumps((True, function(*arguments)))
    except Exception as error:
        where = f"in a worker process:\n{traceback.format_exc()}"
        error.add_note(where)
        return _pickled_error(error, where)


def _pickled_error(error: Exception, where: str) -> bytes:
    """Some errors cannot be pickled, or not be made again of what was."""
    try:
        answer = pickle.dumps((False, error))
        pickle.loads(answer)
    except Exception:
        answer = pickle.dumps((False, RuntimeError(where)))
    return answer


def end_with_parent() -> None:
    """Have this process get SIGTERM once the one that started it has ended in whatever way; LEAVING_S later it ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LEAVING_S)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def describe_end(code: int | None) -> str:
    """A process's exit code in words; below 0 it is a signal."""
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name if -code in set(signal.Signals) else -code}"
