"""Questions about shared documents: every prompt is a document and a question of its own."""

from dataclasses import dataclass

import numpy as np

from hbmgym.envs.traces.distributions import Distribution, Turns, whole
from hbmgym.envs.traces.generators import NO_ROW, Rows


@dataclass(frozen=True)
class DocumentClass:
    """How documents are asked about. Lengths in tokens, times in seconds."""

    name: str
    document: Distribution
    question: Distribution
    output: Distribution
    questions: Turns
    """Per document."""
    between_s: Distribution
    """From one question about a document to the next."""
    lead_s: float = 0.0

    @property
    def mean_requests(self) -> float:
        """Questions per document."""
        return self.questions.mean

    def draw(self, starts_s: np.ndarray, rng: np.random.Generator, span_s: float, block_size: int) -> Rows:
        """Questions come from different people: each is a session of its own, and none waits for another."""
        asked = self.questions.draw(rng, len(starts_s))
        first = np.cumsum(asked) - asked
        group = np.repeat(np.arange(len(starts_s)), asked)
        tokens = whole(self.document.draw(rng, len(starts_s)))[group]
        input_tokens = tokens + whole(self.question.draw(rng, len(group)))
        output = whole(self.output.draw(rng, len(group)))
        wait_s = self.between_s.draw(rng, len(group))
        total_s = np.cumsum(wait_s)
        arrival_s = total_s - (total_s[first] - starts_s)[group]
        seen = (arrival_s >= 0.0) & (arrival_s < span_s)
        rows = np.cumsum(seen) - 1
        # The first question that is seen brings the document; later ones repeat it from there.
        before = np.concatenate(([0], np.cumsum(seen)))[first][group]
        brings = rows == before
        return Rows(
            arrival_s=arrival_s[seen],
            input_tokens=input_tokens[seen],
            output_tokens=output[seen],
            gap_s=np.full(int(seen.sum()), np.nan),
            session=np.arange(int(seen.sum())),
            turn=np.zeros(int(seen.sum()), np.int64),
            parent=np.full(int(seen.sum()), NO_ROW),
            source=np.where(brings, NO_ROW, before)[seen],
            repeated=np.where(brings, 0, tokens // block_size)[seen],
        )
