"""This engine's reuse beside that of SGLang's own cache, recorded by eval/sglang_cache/record.py."""

from dataclasses import fields, replace
from pathlib import Path

import pytest

from hbmgym.eval.sglang_cache import ours
from hbmgym.eval.sglang_cache.cases import Recorded, family_cases, read_cases
from hbmgym.eval.sglang_cache.rule_cases import rule_cases
from tests.envs.plain_cache import SGLANG, Rules, serve

RECORDED = read_cases(Path(__file__).with_name("data") / "sglang_cache.json")
RULE_NAMES = [field.name for field in fields(Rules)]
# Tokens that this engine reuses in a family's case, less those that SGLang reuses (docs/sglang.md).
DIFFERENCE = {
    "chats, all fits": 0,
    "agents, all fits": 0,
    "short answers, few pages": 0,
    "terse agents, few pages": 0,
    "chats, few pages": -5376,
    "chats off the grid": -4096,
    "chats, few slots": -4288,
    "chats, few of both": -768,
    "agents, few pages": -640,
    "agents in chunks": 11200,
    "branches, all fits": -64,
    "branches, few slots": -1984,
    "anything": 6208,
    "anything, tight": 6976,
    "visitors overlap, all fits": 0,
    "visitors overlap, few slots": 1280,
}


def rule_of(recorded: Recorded) -> str:
    """The rule that a case shows, '' for a case of a family."""
    name = recorded.case.name.partition(",")[0]
    return name if name in RULE_NAMES else ""


def name_of(recorded: Recorded) -> str:
    return recorded.case.name


of_rules = pytest.mark.parametrize("recorded", [case for case in RECORDED if rule_of(case)], ids=name_of)
of_families = pytest.mark.parametrize("recorded", [case for case in RECORDED if not rule_of(case)], ids=name_of)
where_nothing_differs = pytest.mark.parametrize(
    "recorded", [case for case in RECORDED if DIFFERENCE.get(case.case.name) == 0], ids=name_of
)


@where_nothing_differs
def test_reuse_equals_sglang_s_request_by_request(recorded):
    assert ours.serve(recorded.case).reused_tokens == recorded.reused_tokens


@of_rules
def test_one_rule_alone_makes_the_difference(recorded):
    case, order = recorded.case, recorded.order
    here = ours.serve(case)
    assert (here.order, here.reused_tokens) == (order, serve(case, order, Rules()))
    assert here.reused_tokens != recorded.reused_tokens
    assert serve(case, order, replace(Rules(), **{rule_of(recorded): True})) == recorded.reused_tokens


@of_families
def test_the_rules_explain_every_request(recorded):
    case, order = recorded.case, recorded.order
    here = ours.serve(case)
    assert (here.order, here.reused_tokens) == (order, serve(case, order, Rules()))
    assert recorded.reused_tokens == serve(case, order, SGLANG)


@of_families
def test_the_difference_is_the_stated_one(recorded):
    difference = sum(ours.serve(recorded.case).reused_tokens) - sum(recorded.reused_tokens)
    assert difference == DIFFERENCE[recorded.case.name]


def test_every_rule_has_a_case():
    assert {rule_of(recorded) for recorded in RECORDED} - {""} == set(RULE_NAMES)


def test_the_recorded_cases_are_those_of_the_recorder():
    assert [recorded.case for recorded in RECORDED] == [*rule_cases(), *family_cases()]
