"""Multi-turn sessions: each turn's prompt is the previous prompt, its output and new text."""

from dataclasses import dataclass

import numpy as np

from hbmgym.envs.traces.distributions import Distribution, LogNormal, Turns, whole
from hbmgym.envs.traces.generators import NO_ROW, Rows
from hbmgym.envs.traces.service import unloaded_service_s


@dataclass(frozen=True)
class Compaction:
    """Now and then a session replaces its prompt by a summary of it."""

    per_turn: float
    """Probability, at every turn but the first."""
    kept: LogNormal
    """Length of the summary / length of the prompt that it replaces."""
    most_tokens: int
    """A prompt that would be longer is compacted in any case."""


@dataclass(frozen=True)
class SessionClass:
    """How the sessions of one kind of user look. Lengths in tokens, gaps in seconds."""

    name: str
    first_prompt: Distribution
    later_text: Distribution
    """What is added in a later turn."""
    output: Distribution
    gap_s: Distribution
    """Idle time between a turn's end and the next turn."""
    turns: Turns
    system_tokens: int = 0
    """Leading tokens that every session of the class shares, on top of the first prompt."""
    compaction: Compaction | None = None
    edited: float = 0.0
    """Probability that a turn takes the last question back: its own text replaces it, and the answer is gone."""
    lead_s: float = 0.0
    """Sessions are drawn from so many seconds before time 0 on; what they had said by then is in their prompts."""

    @property
    def mean_requests(self) -> float:
        """Turns per session."""
        return self.turns.mean

    def draw(self, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> Rows:
        """A turn arrives one unloaded service time and one gap after the previous turn."""
        turns = self.turns.draw(rng, len(starts_s))
        first = np.cumsum(turns) - turns
        session = np.repeat(np.arange(len(starts_s)), turns)
        turn = np.arange(len(session)) - first[session]
        output = whole(self.output.draw(rng, len(session)))
        text = whole(self.later_text.draw(rng, len(session)))
        text[first] = whole(self.first_prompt.draw(rng, len(starts_s))) + self.system_tokens
        gap_s = self.gap_s.draw(rng, len(session))
        edits = np.zeros(len(session), bool)
        if self.edited:
            edits = (turn > 1) & (rng.random(len(session)) < self.edited)
        added = text + np.where(turn > 0, np.where(edits, -previous(text), previous(output)), 0)
        wait_s = np.where(turn > 0, previous(unloaded_service_s(output)) + gap_s, starts_s[session])
        arrival_s = running_sum(wait_s, first, session)
        if self.compaction is None:
            input_tokens = running_sum(added, first, session)
            compacted = np.zeros(len(session), bool)
        else:
            input_tokens, compacted = _compact(self.compaction, added, text, turn, self.system_tokens, rng)
        # Prompts before time 0 are not seen; what is repeated of them is new to the trace.
        seen = (arrival_s >= 0.0) & (arrival_s < span_s)
        continues = (turn > 0) & previous(seen) & ~compacted
        follows = (turn > 0) & previous(seen)
        rows = np.cumsum(seen) - 1
        shared = np.minimum(self.system_tokens, input_tokens) // block_size
        repeated = np.where(continues, previous(input_tokens) // block_size, shared)
        # What is taken back ends in another block, even where both texts are short.
        kept = np.minimum(
            (previous(input_tokens) - previous(text)) // block_size, previous(input_tokens) // block_size - 1
        )
        repeated = np.where(continues & edits, np.maximum(kept, 0), repeated)
        return Rows(
            arrival_s=arrival_s[seen],
            input_tokens=input_tokens[seen],
            output_tokens=output[seen],
            gap_s=np.where(follows, gap_s, np.nan)[seen],
            session=session[seen],
            turn=turn[seen],
            parent=np.where(follows, rows - 1, NO_ROW)[seen],
            source=np.where(continues, rows - 1, NO_ROW)[seen],
            repeated=repeated[seen],
        )


def _compact(
    rule: Compaction,
    added: np.ndarray,
    text: np.ndarray,
    turn: np.ndarray,
    system_tokens: int,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt lengths, and whether each prompt begins anew after the system prompt."""
    chosen = rng.random(len(turn)) < rule.per_turn
    share = np.minimum(rule.kept.draw(rng, len(turn)), 1.0)
    lengths, compacted = np.empty(len(turn), np.int64), np.zeros(len(turn), bool)
    room = rule.most_tokens - system_tokens
    length = 0
    for row in range(len(turn)):
        if turn[row] == 0:
            length = min(int(added[row]), rule.most_tokens)
        elif chosen[row] or length + added[row] > rule.most_tokens:
            summary = int(share[row] * (length - system_tokens))
            length = system_tokens + min(summary + int(text[row]), room)
            compacted[row] = True
        else:
            length += int(added[row])
        lengths[row] = length
    return lengths, compacted


def previous(values: np.ndarray) -> np.ndarray:
    """The value of the row before; row 0 gets a value that nobody uses."""
    return np.roll(values, 1)


def running_sum(values: np.ndarray, first: np.ndarray, session: np.ndarray) -> np.ndarray:
    """Cumulative sum that starts anew at each session's first row."""
    total = np.cumsum(values)
    return np.asarray(total - (total[first] - values[first])[session])
