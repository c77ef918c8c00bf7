"""A function in a process of its own: if it fails, hangs or dies, only its own answer is lost."""

import multiprocessing
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from hbmgym.processes import describe_end, end_with_parent

LEAVING_S = 10.0
"""A process that has answered may take so long to end: the driver gives its memory back."""


class Failed(RuntimeError):
    """The function gave no result; the message is one line that says why."""


def isolated(function: Callable[..., Any], *arguments: Any, limit_s: float) -> Any:
    """What `function(*arguments)` returns in a new process; all of it must be picklable.

    Raises Failed when it raises (`Kind: message`), dies, or has not answered after `limit_s` seconds.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=_answer, args=(sender, function, arguments), daemon=True)
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    try:
        if not receiver.poll(limit_s):
            raise Failed(f"no answer within {limit_s:g} s")
        good, answer = receiver.recv()
        process.join(LEAVING_S)
    except EOFError:
        process.join(LEAVING_S)
        raise Failed(f"its process died: {describe_end(process.exitcode)}") from None
    finally:
        process.kill()
        process.join()
        receiver.close()
    if not good:
        raise Failed(answer)
    return answer


def _answer(sender: Connection, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    # Ctrl-C reaches every process of the terminal; the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with_parent()
    try:
        sender.send((True, function(*arguments)))
    except Exception as error:
        sender.send((False, f"{type(error).__name__}: {' '.join(str(error).split())}"))
