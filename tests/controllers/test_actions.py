import pytest
from hypothesis import given
from hypothesis import strategies as st

from hbmgym.controllers.actions import ShareAction

from .records import LAYOUT, SETUP, SHARES

ACTIONS = st.lists(st.floats(-1.0, 1.0), max_size=30)
LOW, HIGH = LAYOUT.share_bounds


def started(kind: str = "incremental", share: float = LAYOUT.share(50)) -> ShareAction:
    rule = ShareAction(kind)
    rule.reset(share, LAYOUT, SETUP.window_s)
    return rule


def test_a_full_action_moves_by_the_largest_step():
    share = LAYOUT.share(50)
    assert started().next_share(1.0) == pytest.approx(share + 0.1)
    assert started().next_share(-1.0) == pytest.approx(share - 0.1)


def test_a_window_twice_as_long_allows_twice_the_step():
    for window_s, step in ((1.0, 0.02), (10.0, 0.2)):
        rule = ShareAction()
        rule.reset(0.5, LAYOUT, window_s)
        assert rule.next_share(1.0) == pytest.approx(0.5 + step)


def test_the_step_of_a_very_long_window_ends_at_the_bounds():
    rule = ShareAction(max_step_per_s=0.5)
    rule.reset(0.5, LAYOUT, 3600.0)
    assert (rule.next_share(0.1 / 1800.0), rule.next_share(-1.0)) == (pytest.approx(0.6), LOW)


def test_zero_holds():
    assert started().next_share(0.0) is None


def test_small_actions_hold_until_they_add_up_to_a_slot():
    rule = started()
    small = 0.4 * LAYOUT.share_step / (rule.max_step_per_s * SETUP.window_s)
    answers = [rule.next_share(small) for _ in range(4)]
    assert answers[:3] == [None, None, None]
    assert answers[3] == pytest.approx(LAYOUT.share(50) + 1.6 * LAYOUT.share_step)


def test_actions_beyond_one_are_clipped():
    assert started().next_share(50.0) == started().next_share(1.0)


def test_absolute_actions_span_the_bounds():
    assert started("absolute").next_share(-1.0) == LOW
    assert started("absolute").next_share(1.0) == HIGH
    assert started("absolute", LOW).next_share(0.0) == pytest.approx((LOW + HIGH) / 2)


def test_absolute_actions_do_not_depend_on_the_past():
    rule = started("absolute")
    rule.next_share(1.0)
    assert rule.next_share(-0.3) == started("absolute").next_share(-0.3)


def test_narrower_bounds_are_kept():
    rule = ShareAction()
    rule.reset(0.5, LAYOUT, SETUP.window_s, (0.45, 0.55))
    assert rule.next_share(1.0) == 0.55


@pytest.mark.parametrize(("bound", "inwards"), [(HIGH, -1.0), (LOW, 1.0)])
def test_a_wanted_share_within_a_slot_and_a_chunk_of_a_bound_becomes_the_bound(bound, inwards):
    width = LAYOUT.share_step + 1 / LAYOUT.chunks
    for away, becomes_it in ((0.4 * width, True), (0.9 * width, True), (1.1 * width, False)):
        wanted = bound + inwards * away
        asked = started("absolute").next_share(2.0 * (wanted - LOW) / (HIGH - LOW) - 1.0)
        assert asked == pytest.approx(bound if becomes_it else wanted, rel=1e-12)


@given(SHARES, st.sampled_from(("incremental", "absolute")), ACTIONS)
def test_what_is_asked_for_is_within_bounds_and_changes_the_split(share, kind, actions):
    rule, slots = started(kind, share), LAYOUT.slots(share)
    for action in actions:
        wanted = rule.next_share(action)
        assert LOW <= rule.wanted <= HIGH
        if wanted is not None:
            assert LOW <= wanted <= HIGH
            assert LAYOUT.slots(wanted) != slots
            slots = LAYOUT.slots(wanted)


@pytest.mark.parametrize(
    ("kind", "max_step_per_s"), [("relative", 0.1), ("incremental", 0.0), ("incremental", float("nan"))]
)
def test_unknown_kinds_and_steps_are_refused(kind, max_step_per_s):
    with pytest.raises(ValueError, match="expected"):
        ShareAction(kind, max_step_per_s)
