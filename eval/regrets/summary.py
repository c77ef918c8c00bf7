"""What the cases say together, over groups of cases, and as JSON."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from hbmgym.eval.regrets.measure import Regret
from hbmgym.eval.statics import WORST_CLASS

FAR = 0.1
"""A regret that is called far."""
REUSED = "something reused"
WITH_ROOM = "with room"
KINDS = (WITH_ROOM, REUSED, "shifting", "steady", "no reuse", "recorded")


def groups(regrets: Sequence[Regret]) -> dict[str, list[Regret]]:
    """Those with room, of one kind and of one platform, as far as they are neither none nor all."""
    found: dict[str, list[Regret]] = {kind: [] for kind in KINDS}
    for regret in regrets:
        also = [*([WITH_ROOM] if regret.has_room else []), *([REUSED] if regret.is_reused else [])]
        for title in (*also, regret.kind, regret.case.platform):
            found.setdefault(title, []).append(regret)
    return {title: own for title, own in found.items() if 0 < len(own) < len(regrets)}


def summary(regrets: Sequence[Regret], name: str) -> dict[str, Any]:
    """Over cases: median, mean and worst regret, the mean against the best split in hindsight (None where none was
    sought), by token and in p99 TTFT, the mean of the tokens left unserved, how many are FAR, and bytes."""
    values = np.array([regret.excess(name) for regret in regrets])
    hindsight = [excess for regret in regrets if (excess := regret.over_hindsight(name)) is not None]
    return {
        "cases": len(values),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "worst": float(values.max()),
        "far": int((values > FAR).sum()),
        "over_hindsight_mean": float(np.mean(hindsight)) if hindsight else None,
        "by_token_mean": float(np.mean([regret.excess(name, "token_cost") for regret in regrets])),
        "p99_median": float(np.median([regret.excess(name, "ttft_p99_s") for regret in regrets])),
        "unserved_mean": float(np.mean([regret.unserved(name) for regret in regrets])),
        "gib_migrated": float(np.mean([regret.gib_migrated(name) for regret in regrets])),
    }


def as_json(regrets: Sequence[Regret], names: Sequence[str]) -> dict[str, Any]:
    """What is kept: every case's figures, and the summaries by row."""
    return {
        "cases": [_case(regret, names) for regret in regrets],
        "summary": {name: summary(regrets, name) for name in names},
        "groups": {title: {name: summary(own, name) for name in names} for title, own in groups(regrets).items()},
    }


def _case(regret: Regret, names: Sequence[str]) -> dict[str, Any]:
    case, best = regret.case, regret.in_hindsight
    return {
        "case": case.name,
        "platform": case.platform,
        "kind": regret.kind,
        "has_room": regret.has_room,
        "load": case.traffic.load,
        "rho": case.rho,
        "episodes": len(regret.cells[case.best_static]),
        "static_share": case.best_share,
        "static_cost": regret.mean(case.best_static, "cost"),
        "hindsight_share": None if best is None else regret.mean(best, "kv_share_mean"),
        "hindsight_cost": None if best is None else regret.mean(best, "cost"),
        "regret": {name: regret.relative(name).known for name in names},
        "by_token": {name: regret.relative(name, "token_cost").known for name in names},
        "p99": {name: regret.relative(name, "ttft_p99_s").known for name in names},
        WORST_CLASS: {name: regret.mean(name, WORST_CLASS) for name in (case.best_static, *names)},
        "gib_migrated": {name: regret.gib_migrated(name) for name in names},
    }
