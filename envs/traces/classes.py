"""The classes of traffic: two designed ones, and others fitted to public traces.

Fits use only the training parts of the traces that they name (Mooncake, Azure 2023, Claude Code sessions of
kv-cache-tester), or published quantiles (ShareGPT).
"""

import dataclasses

from hbmgym.envs.traces.distributions import (
    GeometricTurns,
    LogNormal,
    LogNormalTurns,
    Mixture,
    OneTurn,
    Quantiles,
    SingleOrMoreTurns,
    TabledTurns,
)
from hbmgym.envs.traces.document_class import DocumentClass
from hbmgym.envs.traces.session_class import Compaction, SessionClass
from hbmgym.envs.traces.swarm_class import SubAgent, SwarmClass

# Designed, not fitted. Chat wants slots: many sessions with little text, whose next turn comes soon. Documents want KV:
# few sessions, each as long as a small book. Sessions are short against a phase, so that a phase's demand is its own.
CHAT = SessionClass(
    name="chat",
    first_prompt=LogNormal(7.2, 0.6, 4096),
    later_text=Mixture(((0.7, LogNormal(3.06, 1.06)), (0.3, LogNormal(5.0, 1.0)))),
    output=LogNormal(3.4, 0.6, 1024),
    gap_s=LogNormal(2.7, 0.8),
    turns=GeometricTurns(4.0, 20),
)
EDITED_CHAT = dataclasses.replace(CHAT, name="edited-chat", edited=0.3)  # clients that rewrite their last turn
BOOK = SessionClass(
    name="document",
    first_prompt=LogNormal(11.0, 0.25, 131072),
    later_text=Mixture(((1.0, LogNormal(5.0, 0.8)),)),
    output=LogNormal(5.7, 0.5, 2048),
    gap_s=LogNormal(2.0, 0.7),
    turns=GeometricTurns(4.0, 20),
)

# Fitted. Mooncake's gaps run from start to start; an idle service time of some seconds is small against them.
_MOONCAKE_TURNS = SingleOrMoreTurns(0.76, 2.8, 40)
_MOONCAKE_TEXT = Mixture(((0.7, LogNormal(3.06, 1.06)), (0.3, LogNormal(7.82, 1.23, 65536))))
_MOONCAKE_GAP_S = LogNormal(4.85, 0.92, 600)
_AZURE_OUTPUT = LogNormal(4.96, 0.885, 1024)
CONVERSATION = SessionClass(  # Mooncake conversation: long contexts
    name="conversation",
    first_prompt=LogNormal(8.77, 1.21, 131072),
    later_text=_MOONCAKE_TEXT,
    output=LogNormal(5.34, 1.37, 2048),
    gap_s=_MOONCAKE_GAP_S,
    turns=_MOONCAKE_TURNS,
    system_tokens=512,
    lead_s=2400.0,
)
ASSISTANT = SessionClass(  # Azure 2023 conversation: prompts with steps at 400, 1.0k and 4.1k tokens
    name="assistant",
    first_prompt=Quantiles(((0.0, 20), (0.1, 369), (0.25, 397), (0.5, 1024), (0.75, 1234), (0.9, 4076), (1.0, 4142))),
    later_text=Mixture(((1.0, LogNormal(3.06, 1.06)),)),
    output=_AZURE_OUTPUT,
    gap_s=_MOONCAKE_GAP_S,
    turns=_MOONCAKE_TURNS,
    lead_s=2400.0,
)
SHORT_CHAT = SessionClass(  # ShareGPT's first prompts: p50 25, p95 794, mean 146 tokens
    name="short-chat",
    first_prompt=LogNormal(3.22, 2.0, 2125),
    later_text=Mixture(((1.0, LogNormal(3.06, 1.06)),)),
    output=_AZURE_OUTPUT,
    gap_s=_MOONCAKE_GAP_S,
    turns=_MOONCAKE_TURNS,
    system_tokens=64,
    lead_s=2400.0,
)
DOCUMENTS = DocumentClass(  # Mooncake synthetic: L-Eval and LooGLE
    name="documents",
    document=LogNormal(9.84, 0.80, 57344),
    question=LogNormal(5.93, 0.87, 4096),
    output=LogNormal(2.63, 1.48, 2048),
    questions=LogNormalTurns(LogNormal(1.79, 0.47, 24)),  # p50 6, p90 11
    between_s=LogNormal(4.55, 0.89, 1200),  # p50 95 s, p90 297 s
    lead_s=4800.0,
)
CODE = SessionClass(  # Azure 2023 code: completions without a second turn
    name="code",
    first_prompt=LogNormal(7.0, 1.36, 7437),
    later_text=LogNormal(0.0, 1.0),
    output=LogNormal(2.78, 0.84, 2048),
    gap_s=LogNormal(0.0, 1.0),
    turns=OneTurn(),
)
AGENT = SessionClass(  # Claude Code sessions; 43 % resume an earlier one; 15 % of steps wait for a human
    name="agent",
    first_prompt=Mixture(((0.57, LogNormal(8.3, 1.0, 65536)), (0.43, LogNormal(11.68, 0.75, 180_000)))),
    later_text=Mixture(((0.985, LogNormal(6.77, 1.21, 65536)), (0.015, LogNormal(10.8, 0.6, 100_000)))),
    output=LogNormal(5.58, 0.89, 8192),
    gap_s=Mixture(((0.85, LogNormal(2.55, 1.26, 600)), (0.15, LogNormal(4.95, 1.74, 600)))),
    turns=LogNormalTurns(LogNormal(3.69, 1.14, 400)),
    system_tokens=14_080,
    compaction=Compaction(per_turn=0.005, kept=LogNormal(-1.31, 0.5), most_tokens=200_000),
    lead_s=57_600.0,
)
# Claude Code's sub-agents: 28 forks of 11 sessions, 46 sub-agents, 488 of their turns. The steps that a root takes
# between forks are left out: they are class agent. In the recordings sub-agents share 8.7k to 10k tokens with each
# other and, as far as ids tell, none with their root; here the root has them too.
SWARM = SwarmClass(
    name="swarm",
    system_tokens=8192,
    task=LogNormal(6.23, 0.80, 8192),
    context=LogNormal(10.45, 0.90, 131_072),  # prompts of first forks: p50 51k, p90 109k
    output=LogNormal(6.35, 0.52, 4096),
    forks=GeometricTurns(2.65, 8),  # mean 2.5, most 8
    forked=TabledTurns((0.54, 0.28, 0.18)),
    offset_s=LogNormal(1.27, 0.50, 60),
    agent=SubAgent(
        brief=LogNormal(7.30, 0.70, 8192),  # first prompts: p50 10.2k, p95 13.4k
        later_text=LogNormal(7.55, 1.55, 24_576),
        output=LogNormal(5.35, 0.39, 2048),
        answer=LogNormal(7.92, 0.50, 10_240),
        gap_s=Mixture(((0.75, LogNormal(1.22, 0.45)), (0.25, LogNormal(3.09, 0.80, 600)))),
        turns=LogNormalTurns(LogNormal(2.24, 0.51, 24)),
    ),
    gap_s=LogNormal(3.01, 0.88, 600),
    lead_s=3600.0,
)
