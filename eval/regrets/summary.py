"""What the cases say together: the marks that a controller is judged by, over groups of cases, and as JSON."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from hbmgym.eval.regrets.measure import Regret

FAR = 0.1
"""A regret that is called far from the best static."""
COST_ROOM, P99_ROOM = 0.05, 0.22
"""What the dynamic oracle saves where there is a gap worth closing, in cost and in p99 TTFT."""
DEFAULT = "sglang-0.9"
BEST_STATIC = "best static"
"""Stands for a static split of its own in every case."""
REUSED = "something reused"
KINDS = (REUSED, "shifting", "steady", "no reuse", "recorded")


def with_cost_room(regrets: Sequence[Regret]) -> list[Regret]:
    return [regret for regret in regrets if regret.case.cost_room >= COST_ROOM]


def with_moving_room(regrets: Sequence[Regret]) -> list[Regret]:
    return [regret for regret in regrets if regret.case.moving_room >= COST_ROOM]


def with_p99_room(regrets: Sequence[Regret]) -> list[Regret]:
    return [regret for regret in regrets if regret.case.p99_room >= P99_ROOM]


def groups(regrets: Sequence[Regret]) -> dict[str, list[Regret]]:
    """Those of one kind and of one platform, as far as they are neither none nor all."""
    found: dict[str, list[Regret]] = {kind: [] for kind in KINDS}
    for regret in regrets:
        for title in (regret.kind, regret.case.platform, *([REUSED] if regret.is_reused else [])):
            found.setdefault(title, []).append(regret)
    return {title: own for title, own in found.items() if 0 < len(own) < len(regrets)}


def summary(regrets: Sequence[Regret], name: str) -> dict[str, Any]:
    """Over cases: worst, median and mean regret, its mean by token, the mean of the tokens left unserved, how many are
    FAR, the part of the oracle's gap closed, bytes, and the mean share error (None where it was not asked for)."""
    values = np.array([regret.excess(name) for regret in regrets])
    room, moving = with_cost_room(regrets), with_moving_room(regrets)
    shares = [regret.share_errors[name] for regret in regrets if regret.share_errors]
    return {
        "worst": float(values.max()),
        "median": float(np.median(values)),
        "mean": float(values.mean()),
        "by_token_mean": float(np.mean([regret.excess(name, "token_cost") for regret in regrets])),
        "unserved_tokens_mean": float(np.mean([regret.unserved(name) for regret in regrets])),
        "far": int((values > FAR).sum()),
        "cases": len(values),
        "gap_closed_median": median_gap_closed(room, name),
        "gap_closed_median_where_moving_saves": median_gap_closed(moving, name),
        "gib_migrated": float(np.mean([regret.gib_migrated(name) for regret in regrets])),
        "price_of_saving": {title: price_of_saving(room, title, name) for title in (BEST_STATIC, DEFAULT)},
        "share_error": float(np.mean([share.error for share in shares])) if shares else None,
        "share_mae": float(np.mean([share.mae for share in shares])) if shares else None,
    }


def median_gap_closed(regrets: Sequence[Regret], name: str) -> float | None:
    """None where there is no case."""
    return float(np.median([regret.gap_closed(name) for regret in regrets])) if regrets else None


def price_of_saving(regrets: Sequence[Regret], reference: str, name: str) -> dict[str, float | None] | None:
    """GiB migrated and per cent of cost saved, each summed over the cases (losses count against), and their ratio: None
    where nothing is saved on the whole. None where the reference was not run."""
    references = [regret.case.best_static if reference == BEST_STATIC else reference for regret in regrets]
    if not all(other in regret.cells for regret, other in zip(regrets, references, strict=True)):
        return None
    gib = sum(regret.gib_migrated(name) for regret in regrets)
    saved = sum(regret.saved(name, other) for regret, other in zip(regrets, references, strict=True))
    return {"gib": gib, "saved_percent": saved, "gib_per_percent": gib / saved if saved > 0.0 else None}


def as_json(regrets: Sequence[Regret], names: Sequence[str]) -> dict[str, Any]:
    """What is kept: every case's figures, and the summaries by controller."""
    return {
        "cases": [_case(regret, names) for regret in regrets],
        "summary": {name: summary(regrets, name) for name in names},
        "groups": {title: {name: summary(own, name) for name in names} for title, own in groups(regrets).items()},
    }


def _case(regret: Regret, names: Sequence[str]) -> dict[str, Any]:
    case = regret.case
    return {
        "case": case.name,
        "platform": case.platform,
        "kind": regret.kind,
        "load": case.traffic.load,
        "rho": case.rho,
        "best_static_share": case.best_share,
        "best_static_cost": regret.mean(case.best_static, "cost"),
        "cost_room": case.cost_room,
        "chosen_room": case.chosen_room,
        "p99_room": case.p99_room,
        "regret": {name: regret.relative(name) for name in names},
        "by_token": {name: regret.relative(name, "token_cost") for name in names},
        "unserved_tokens": {name: regret.mean(name, "unserved_tokens") for name in (case.best_static, *names)},
        "worst_seed": {name: regret.worst_seed(name, "cost") for name in names},
        "p99": {name: regret.relative(name, "ttft_p99_s") for name in names},
        "p99_worst_seed": {name: regret.worst_seed(name, "ttft_p99_s") for name in names},
        "gib_migrated": {name: regret.gib_migrated(name) for name in names},
        "share_error": {name: asdict(share) for name, share in regret.share_errors.items()},
    }
