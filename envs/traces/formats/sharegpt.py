"""ShareGPT's json: conversations of texts. Lengths are estimated; nothing says when anybody spoke.

A message is {from, value} or, as SGLang and OpenAI have it, {role, content}, where content may be a list of parts. A
reply is a request whose prompt is all that was said before it. Conversations share nothing.
"""

import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from hbmgym.envs.traces.coding import new_ids
from hbmgym.envs.traces.formats.columns import request_columns
from hbmgym.envs.traces.formats.damage import Damage, Damaged
from hbmgym.envs.traces.formats.fields import Unused
from hbmgym.envs.traces.formats.reading import name_of, read_values
from hbmgym.envs.traces.formats.records import MAX_TOKENS, Record, refuse_value
from hbmgym.envs.traces.formats.words import RULE, count_tokens
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.trace import Trace
from hbmgym.envs.traces.validate import build_trace

BLOCK_TOKENS = 16
_MESSAGES = ("conversations", "messages")
_FIELDS = (*_MESSAGES, "id")
_REPLIES = ("gpt", "assistant", "chatgpt", "model", "bing", "bard")


def load_sharegpt(path: Path) -> Trace:
    """Read conversations as a session library without pauses. Raises `TraceError`."""
    prompts, replies, sessions = array("q"), array("q"), array("q")
    damage, unused = Damage(path, "conversations"), Unused(_FIELDS)
    for session, conversation in enumerate(read_values(path, damage)):
        try:
            requests = list(_requests(conversation, f"{path}:conversation {session}"))
        except Damaged as reason:
            damage.leave_out(path, reason)
            continue
        unused.note(conversation)
        prompts.extend(prompt for prompt, _ in requests)
        replies.extend(reply for _, reply in requests)
        sessions.extend([session] * len(requests))
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
        name=name_of(path),
        kind="session-library",
        block_size=BLOCK_TOKENS,
        path=str(path),
        where=lambda row: f"{path}:conversation {session_id[row]}",
        link=True,
        notices=(
            *damage.notices(),
            *unused.notices(path),
            f"{path}: lengths are estimated from texts: {RULE}",
            f"{path}: no times are recorded: each turn follows the one before at once",
        ),
    )


def _requests(conversation: Any, place: str) -> Iterator[tuple[int, int]]:
    """Tokens of prompt and reply for each reply that something was said before. Raises `TraceError`."""
    if type(conversation) is not dict:
        raise Damaged(f"{place}: conversation is {type(conversation).__name__!r}, expected a JSON object")
    field = next((field for field in _MESSAGES if field in conversation), _MESSAGES[0])
    messages = conversation.get(field)
    if type(messages) is not list:
        refuse_value(place, field, messages, "a list of messages")
    said = 0
    for number, message in enumerate(messages):
        value = message.get("value") if type(message) is dict else None
        tokens = count_tokens(value if type(value) is str else _text(message, f"{place}, message {number}"))
        if said and message.get("from", message.get("role")) in _REPLIES:
            yield said, max(1, tokens)
        said = min(said + tokens, MAX_TOKENS)


def _text(message: Any, place: str) -> str:
    """What a message says, calls of tools included, of images nothing. Raises `TraceError`."""
    if type(message) is not dict:
        refuse_value(place, "message", message, "a JSON object")
    field = "content" if "content" in message else "value"
    content, calls = message.get(field), message.get("tool_calls") or message.get("function_call")
    called = json.dumps(calls) if calls else ""
    if content is None and called:
        return called
    parts = content if type(content) is list else [content]
    texts = [_part_text(part, place, field) for part in parts]
    return "".join(texts) + called


def _part_text(part: str | Record | None, place: str, field: str) -> str:
    if type(part) is dict:
        part = part.get("text", None if part.get("type") == "text" else "")
    if type(part) is not str:
        refuse_value(place, field, part, "a text")
    return part


def _without_pauses(service_s: np.ndarray, first: np.ndarray) -> np.ndarray:
    """Seconds since each session's first row if every turn follows the one before at once."""
    begun_s = np.cumsum(service_s) - service_s
    return begun_s - begun_s[np.maximum.accumulate(np.where(first, np.arange(len(first)), 0))]
