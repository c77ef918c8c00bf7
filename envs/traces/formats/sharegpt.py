"""ShareGPT's json: conversations of texts. Lengths are estimated; nothing says when anybody spoke.

A reply is a request whose prompt is all that was said before it. Conversations share nothing.
"""

from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import new_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.reading import read_values
from hbmgym.envs.traces.formats.records import MAX_TOKENS
from hbmgym.envs.traces.formats.words import RULE, count_tokens
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace, refuse

BLOCK_TOKENS = 16
_REPLIES = ("gpt", "assistant", "chatgpt", "model", "bing", "bard")


def load_sharegpt(path: Path) -> Trace:
    """Read conversations as a session library without pauses. Raises `TraceError`."""
    prompts, replies, sessions = array("q"), array("q"), array("q")
    for session, conversation in enumerate(read_values(path)):
        for prompt, reply in _requests(conversation, f"{path}:conversation {session}"):
            prompts.append(prompt)
            replies.append(reply)
            sessions.append(session)
    input_tokens, output_tokens, session_id = (np.array(values, np.int64) for values in (prompts, replies, sessions))
    first = np.diff(session_id, prepend=-1) > 0
    blocks = input_tokens // BLOCK_TOKENS
    shared = np.where(first, 0, np.roll(blocks, 1))
    columns = request_columns(
        _without_pauses(unloaded_service_s(output_tokens), first),
        input_tokens,
        output_tokens,
        session_id=session_id,
        gap_s=np.where(first, np.nan, 0.0),
        **new_ids(np.arange(len(first)) - 1, shared, blocks - shared),
    )
    return build_trace(
        columns,
        name=path.stem,
        kind="session-library",
        block_size=BLOCK_TOKENS,
        path=str(path),
        where=lambda row: f"{path}:conversation {session_id[row]}",
        link=True,
        notices=(
            f"{path}: lengths are estimated from texts: {RULE}",
            f"{path}: no times are recorded: each turn follows the one before at once",
        ),
    )


def _requests(conversation: Any, place: str) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and reply for each reply that something was said before."""
    messages = conversation.get("conversations") if type(conversation) is dict else None
    if type(messages) is not list:
        refuse(place, "conversations", messages, "a list of messages", "the file is of another format")
    said = 0
    for number, message in enumerate(messages):
        text = message.get("value") if type(message) is dict else None
        if type(text) is not str:
            refuse(f"{place}, message {number}", "value", text, "a text", "the file is damaged or of another format")
        tokens = count_tokens(text)
        if said and message.get("from") in _REPLIES:
            yield said, max(1, tokens)
        said = min(said + tokens, MAX_TOKENS)


def _without_pauses(service_s: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Seconds since each session's first row if every turn follows the one before at once."""
    begun_s = np.cumsum(service_s) - service_s
    return begun_s - begun_s[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
