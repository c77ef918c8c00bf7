"""What loaders mend in recordings with sub-agents."""

import pytest

from hbmgym.envs.traces.load import load_trace

from .test_traces_compose import SHARED, recording

SERVED_S = 0.3


def test_a_sub_agent_stamped_with_its_end_is_moved_to_its_start():
    starts_s, runs_s = 50.0 + SERVED_S + 3.0, 20.0 + SERVED_S
    stamped = recording((starts_s + runs_s, starts_s + runs_s + 20.0))
    assert stamped.arrival_s[4:].tolist() == pytest.approx([starts_s, starts_s + 20.0])
    assert stamped.notices == ("made: 1 sub-agents were stamped with the time of their end, moved to their start",)


@pytest.mark.parametrize("first_s", [51.0, 55.0, 89.0])
def test_other_sub_agents_stay_where_they_are(first_s):
    trace = recording((first_s, first_s + 20.0))
    assert trace.arrival_s[4:].tolist() == [first_s, first_s + 20.0]
    assert trace.notices == ()


def test_claude_code_repairs_are_counted():
    path = SHARED / "agentic_claude_code_weka.train.npz"
    if not path.is_file():
        pytest.skip("public traces are not beside the repository")
    outputs, agents = load_trace(path).notices
    assert "17 rows had output_tokens 0, set to 1" in outputs
    assert "40 sub-agents were stamped with the time of their end" in agents
