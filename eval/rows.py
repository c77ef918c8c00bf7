"""A row of a table by its name: a controller, and rules of the engine that differ from the table's.

| name | controller | rules |
|---|---|---|
| helm | helm | the table's |
| helm@priced, helm@on_shortage=priced | helm | on_shortage=priced |
| sglang-0.9@float+retention=all | sglang-0.9 | both |
| default | SGLang's default split for the model | the table's |
| float, float-lru, priced, migrate | none: that split to begin with | that on_shortage |

Traffic, memory and all else are the table's, so that rows compare rules as well as controllers.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from hbmgym.controllers.base import Controller
from hbmgym.controllers.helm.policy import OtherWindows
from hbmgym.controllers.registry import is_static, make_controller
from hbmgym.envs.serving.config import Policies, ServingConfig, with_policies
from hbmgym.envs.serving.shortage import SHORTAGE_RULES
from hbmgym.eval.advising.settings import default_controller
from hbmgym.streams import say

RULES = tuple(rule for rule in SHORTAGE_RULES if rule != "evict")
"""Those that move the split themselves, so that they need no controller."""
DEFAULT = "default"
FIELDS = tuple(field.name for field in dataclasses.fields(Policies) if field.name != "layout")
"""Policies that a row may have of its own; another layout has pages of another size, which is other traffic."""


@dataclass(frozen=True)
class Row:
    """Who decides, under which rules."""

    name: str
    controller: str
    policies: tuple[tuple[str, str], ...] = ()
    """Those that differ from the table's, by field."""

    def config(self, table: ServingConfig) -> ServingConfig:
        """The engine of this row; ValueError when its rules do not go together."""
        return with_policies(table, dataclasses.replace(table.policies, **dict(self.policies)))

    def make(self) -> Controller:
        """Its controller, which has the row's name."""
        controller = make_controller(self.controller)
        if self.policies:
            controller.name = self.name
        return controller

    @property
    def is_static(self) -> bool:
        return is_split(self.name)


def is_split(name: str) -> bool:
    """Whether the row of that name is nothing but a split, under the table's rules."""
    return name == DEFAULT or ("@" not in name and is_static(name))


def find_row(name: str, table: ServingConfig) -> Row:
    """The row that `name` stands for; ValueError in one line when there is none, or none for the table's windows."""
    if name == DEFAULT:
        row = Row(name, default_controller(table))
    elif name in RULES:
        row = Row(name, default_controller(table), (("on_shortage", name),))
    else:
        controller, at, rules = name.rpartition("@")
        # A path may have an @ as well.
        policies = _policies(name, rules) if at and _look_like_rules(rules) else ()
        controller = controller if policies else name
        title = make_controller(controller, table.window_s).name
        row = Row(f"{title}@{rules}" if policies else title, controller, policies)
    row.config(table)
    return row


def usual_rows(names: Sequence[str], table: ServingConfig) -> list[str]:
    """Of rows that nobody has named those that can decide in the table's windows; each other one leaves a line."""
    found = []
    for name in names:
        try:
            find_row(name, table)
        except OtherWindows as reason:
            say(f"{name} is left out: {reason}")
        else:
            found.append(name)
    return found


def _look_like_rules(text: str) -> bool:
    return all("=" in part or part in SHORTAGE_RULES for part in text.split("+"))


def _policies(name: str, text: str) -> tuple[tuple[str, str], ...]:
    found: dict[str, str] = {}
    for part in text.split("+"):
        field, _, value = part.rpartition("=")
        field = field or "on_shortage"
        if field not in FIELDS:
            raise ValueError(f"row {name!r}: {field!r} is none of {', '.join(FIELDS)}")
        if field in found:
            raise ValueError(f"row {name!r}: {field} is given twice")
        found[field] = value
    return tuple(found.items())
