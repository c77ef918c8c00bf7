"""Agent swarms: a root forks sub-agents, they work side by side, and its next turn waits for all of them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from hbmgym.envs.traces.distributions import Distribution, Turns, whole
from hbmgym.envs.traces.generators import NO_ROW, Rows
from hbmgym.envs.traces.service import unloaded_service_s
from hbmgym.envs.traces.session_class import previous, running_sum


class Work(NamedTuple):
    """All turns of several sub-agents, those of one together and in order; times count from its start."""

    agent: np.ndarray
    turn: np.ndarray
    arrival_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray
    gap_s: np.ndarray
    runs_s: np.ndarray
    """Shape (agents,): until its last turn has ended."""
    answer: np.ndarray
    """Shape (agents,): output tokens of that turn."""


@dataclass(frozen=True)
class SubAgent:
    """How a sub-agent works. Lengths in tokens, gaps in seconds."""

    brief: Distribution
    """What it alone is told, after the prefix that it shares."""
    later_text: Distribution
    output: Distribution
    """Of every turn but the last."""
    answer: Distribution
    """Output of the last turn, which goes to the root."""
    gap_s: Distribution
    turns: Turns

    def draw(self, prefix: np.ndarray, rng: np.random.Generator) -> Work:
        """One sub-agent for each length of `prefix`."""
        turns = self.turns.draw(rng, len(prefix))
        first = np.cumsum(turns) - turns
        agent = np.repeat(np.arange(len(prefix)), turns)
        turn = np.arange(len(agent)) - first[agent]
        last = first + turns - 1
        output = whole(self.output.draw(rng, len(agent)))
        output[last] = whole(self.answer.draw(rng, len(prefix)))
        text = whole(self.later_text.draw(rng, len(agent)))
        text[first] = prefix + whole(self.brief.draw(rng, len(prefix)))
        gap_s = self.gap_s.draw(rng, len(agent))
        served_s = unloaded_service_s(output)
        arrival_s = running_sum(np.where(turn > 0, previous(served_s) + gap_s, 0.0), first, agent)
        input_tokens = running_sum(text + np.where(turn > 0, previous(output), 0), first, agent)
        return Work(
            agent,
            turn,
            arrival_s,
            input_tokens,
            output,
            gap_s,
            runs_s=(arrival_s + served_s)[last],
            answer=output[last],
        )


@dataclass(frozen=True)
class SwarmClass:
    """How the swarms of one kind look: every turn of the root but its last forks. Lengths in tokens, times in s."""

    name: str
    system_tokens: int
    """Leading tokens of every prompt of the class."""
    task: Distribution
    """What follows in all prompts of a swarm, the root's and its sub-agents'."""
    context: Distribution
    """What the root alone has read by its first turn."""
    output: Distribution
    """The root's; its next prompt adds this and the answers of the sub-agents."""
    forks: Turns
    """Per root."""
    forked: Turns
    """Sub-agents per fork."""
    offset_s: Distribution
    """From the end of the turn that forks to a sub-agent's start."""
    agent: SubAgent
    gap_s: Distribution
    """From the end of the last sub-agent to the root's next turn."""
    lead_s: float = 0.0

    @property
    def mean_requests(self) -> float:
        """Turns per swarm, the root's and its sub-agents'."""
        return 1.0 + self.forks.mean * (1.0 + self.forked.mean * self.agent.turns.mean)

    def draw(self, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> Rows:
        """Every turn arrives as if those that it waits for met an idle engine."""
        turns = self.forks.draw(rng, len(starts_s)) + 1
        first = np.cumsum(turns) - turns
        root = np.repeat(np.arange(len(starts_s)), turns)
        turn = np.arange(len(root)) - first[root]
        prefix = self.system_tokens + whole(self.task.draw(rng, len(starts_s)))
        output = whole(self.output.draw(rng, len(root)))
        forked = self.forked.draw(rng, len(root))
        forked[first + turns - 1] = 0
        fork = np.repeat(np.arange(len(root)), forked)
        offset_s = self.offset_s.draw(rng, len(fork))
        work = self.agent.draw(prefix[root[fork]], rng)
        served_s, joined_s = unloaded_service_s(output), np.zeros(len(root))
        np.maximum.at(joined_s, fork, offset_s + work.runs_s)
        gap_s = previous(joined_s) + self.gap_s.draw(rng, len(root))
        answers = np.bincount(fork, work.answer, len(root)).astype(np.int64)
        text = np.where(turn > 0, previous(output + answers), 0)
        text[first] = prefix + whole(self.context.draw(rng, len(starts_s)))
        arrival_s = running_sum(np.where(turn > 0, previous(served_s) + gap_s, starts_s[root]), first, root)
        begin_s = arrival_s[fork] + served_s[fork] + offset_s
        return _rows(
            arrival_s=np.concatenate((arrival_s, begin_s[work.agent] + work.arrival_s)),
            input_tokens=np.concatenate((running_sum(text, first, root), work.input_tokens)),
            output_tokens=np.concatenate((output, work.output_tokens)),
            gap_s=np.concatenate((gap_s, work.gap_s)),
            session=np.concatenate((root, len(starts_s) + work.agent)),
            turn=np.concatenate((turn, work.turn)),
            starter=np.concatenate((np.full(len(root), NO_ROW), root[fork][work.agent])),
            system_blocks=self.system_tokens // block_size,
            prefix=prefix,
            span_s=span_s,
            block_size=block_size,
        )


def _rows(
    *,
    arrival_s: np.ndarray,
    input_tokens: np.ndarray,
    output_tokens: np.ndarray,
    gap_s: np.ndarray,
    session: np.ndarray,
    turn: np.ndarray,
    starter: np.ndarray,
    system_blocks: int,
    prefix: np.ndarray,
    span_s: float,
    block_size: int,
) -> Rows:
    """The rows that arrive in [0, span_s); `prefix`: tokens that all prompts of a root's swarm share, one per root."""
    swarm = np.where(starter == NO_ROW, session, starter)
    seen = (arrival_s >= 0.0) & (arrival_s < span_s)
    rows = np.cumsum(seen) - 1
    follows = (turn > 0) & previous(seen)
    # Whoever of a swarm comes first brings what all of it share; prompts before time 0 are not seen.
    latest_first = np.flatnonzero(seen)[np.argsort(arrival_s[seen], kind="stable")][::-1]
    brings = np.full(len(prefix), NO_ROW)
    brings[swarm[latest_first]] = latest_first
    begins = brings[swarm] == np.arange(len(swarm))
    source = np.where(follows, rows - 1, np.where(begins, NO_ROW, rows[brings[swarm]]))
    shared = np.where(begins, system_blocks, prefix[swarm] // block_size)
    repeated = np.where(follows, previous(input_tokens) // block_size, shared)
    return Rows(
        arrival_s=arrival_s[seen],
        input_tokens=input_tokens[seen],
        output_tokens=output_tokens[seen],
        gap_s=np.where(follows, gap_s, np.nan)[seen],
        session=session[seen],
        turn=turn[seen],
        parent=np.where(follows, rows - 1, NO_ROW)[seen],
        source=source[seen],
        repeated=repeated[seen],
        starter=starter[seen],
    )
