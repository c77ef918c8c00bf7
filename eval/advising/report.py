"""Advice in words, for a terminal."""

import textwrap
from collections.abc import Iterator

import numpy as np

from hbmgym.envs.serving.config import GIB, SGLANG_SLOTS
from hbmgym.eval.advising.advice import FLAT, WORTH, Advice, Row, pays
from hbmgym.eval.statics import UNSERVED

LABEL = 15
_BOUNDS = {"pages": "KV pages", "max_running_requests": "--max-running-requests"}
WIDTH, TITLE, COLUMN = 120, 23, 9
_HEADERS = ("kv_share", "cost", "p99 TTFT", "hit rate", "late", "unserved")
_LEGEND = (
    "cost: mean of TTFT or time per token over its SLO, whichever is worse, at most 10; late: requests that miss one; "
    "unserved: part of the tokens of the class that is served least; hit rate: of prompt tokens; floating pool: no "
    "split, free memory serves both (SGLang's --enable-unified-memory); guide: SGLang's sizing rule for the mean "
    "request. Behind: cost against this split, 95 % interval over the episodes."
)


def report(advice: Advice) -> str:
    """The whole of it; what cannot be served comes first."""
    return "\n".join(_lines(advice))


def _lines(advice: Advice) -> Iterator[str]:
    yield from _alarms(advice)
    yield from _question(advice)
    yield ""
    yield from _settings(advice)
    yield ""
    yield from _snapshots(advice)
    yield ""
    yield from _concurrency(advice)
    yield ""
    yield from _costs(advice)
    yield ""
    yield from _moving(advice)


def _alarms(advice: Advice) -> Iterator[str]:
    """What no split can mend."""
    if advice.is_served:
        return
    if advice.rho >= 1.0:
        longer = f"{advice.rho:.2f} times as long as they take to come" if np.isfinite(advice.rho) else "for ever"
        load = f": multiply --load by {advice.load_factor:.2g}, or add GPUs" if advice.load_factor else ""
        yield _folded(f"THE LOAD CANNOT BE SERVED: with a full queue these requests take {longer}, at any split{load}.")
    if advice.best.worst_class_unserved > UNSERVED:
        yield _folded(
            f"{advice.best.worst_class_unserved:.1%} OF A CLASS'S TOKENS ARE NOT SERVED, even at the best split: "
            "requests that outgrow the KV pool, or wait ten times their SLO."
        )
    yield _folded("What follows says which split is the least bad one; conclude nothing from TTFT.")
    yield ""


def _question(advice: Advice) -> Iterator[str]:
    config, traffic = advice.config, advice.traffic
    gpus = f" x {config.tensor_parallel}" if config.tensor_parallel > 1 else ""
    yield _labelled(
        "deployment",
        f"{config.model} on {config.gpu}{gpus}, {config.engine.name}: {advice.layout.budget_bytes / GIB:.1f} GiB per "
        f"GPU for KV and {_records(advice)}; weights {config.weight_dtype}, KV {config.kv_dtype}, state "
        f"{config.state_dtype}; {config.running_slots} slots of {_size(advice.layout.slot_bytes)} per request",
    )
    yield _labelled(
        "traffic",
        f"{traffic.source}: {len(traffic.episodes)} episodes, {traffic.requests:,} measured requests, "
        f"{traffic.rate_per_s:.3g}/s; prompts {traffic.mean('input_tokens'):,.0f} tokens, outputs "
        f"{traffic.mean('output_tokens'):,.0f}; rho {advice.rho:.2f}",
    )
    for note in traffic.notes:
        yield _labelled("", note)


def _settings(advice: Advice) -> Iterator[str]:
    low, high = advice.flat
    flat = f"; from {low:.3f} to {high:.3f} it costs at most {FLAT:.0%} more" if low < high else ""
    share = f"kv_share {advice.best.kv_share:.3f}: {advice.slots:,} slots beside {advice.kv_tokens:,} tokens of KV"
    yield _labelled("set", share + flat)
    if advice.config.engine.kernels == "vllm":
        own = advice.default.over_best.text("+.1%")
        yield _labelled("", f"vLLM divides by itself: {advice.default.name} costs {own} against that")
    elif advice.floating_pays:
        less = advice.floating.over_best.text("+.1%")
        yield _labelled("", f"but better no split: a floating pool (SGLang: --enable-unified-memory) costs {less}")
    flags = advice.sglang
    if "--mamba-full-memory-ratio" in flags:
        ratio, slots, tokens = flags.values()
        yield _labelled("", f"SGLang: --mamba-full-memory-ratio {ratio:g} or, pinned, --max-mamba-cache-size {slots}")
        runs = slots // advice.config.running_slots
        yield _labelled(
            "", f"        its log then says max_total_num_tokens={tokens}, max_running_requests={runs} at most"
        )
    elif flags:
        ratio, tokens = flags.values()
        yield _labelled("", f"SGLang: --swa-full-tokens-ratio {ratio:g} (its log then says full_layer_tokens={tokens})")
    else:
        yield _labelled("", "SGLang: no flag gives this split")
    config = advice.config
    if (
        config.engine.kernels == "sglang"
        and _records(advice) == "states"
        and config.slots_per_request not in SGLANG_SLOTS.values()
    ):
        names = ", ".join(f"{name} {slots}" for name, slots in SGLANG_SLOTS.items())
        yield _labelled("", f"but SGLang reckons other slots per request; --slots-per-request: {names}")
    pool = advice.vllm
    if pool is not None:
        yield _labelled(
            "",
            f"vLLM: no split to set: one pool of {pool.blocks:,} blocks; a state takes {pool.blocks_per_state}, "
            f"{pool.block_tokens} tokens of KV {pool.blocks_per_page}",
        )


def _snapshots(advice: Advice) -> Iterator[str]:
    """What the replay kept, and what other rules would do at the same split."""
    kept = advice.config.policies.retention
    yield _labelled("snapshots kept", f"retention={kept}: {_flag(kept)}")
    for row in advice.retentions:
        better = "better: " if pays(row.over_best) else ""
        cost = f"{row.name}: cost {row.over_best.text('+.1%')}; "
        yield _labelled("", better + cost + _flag(row.name))


def _flag(retention: str) -> str:
    """How an engine is told to keep these."""
    rule, _, number = retention.rpartition("-")
    return {
        "latest": "vLLM's default, --prefix-cache-retention-interval 0",
        "all": "SGLang's default",
        f"interval-{number}": f"vLLM, --prefix-cache-retention-interval {number}",
        f"path-cap-{number}": f"SGLang, --mamba-max-states-per-path {number}",
    }.get(retention, f"no engine has {rule or retention}")


def _concurrency(advice: Advice) -> Iterator[str]:
    caps, seen, records = advice.caps, advice.seen, _records(advice)
    late = f"; {caps.holds:,} of them within the SLO of time per token" if caps.holds < caps.admitted else ""
    yield _labelled("runs at once", f"{caps.admitted:,} requests, bound by {_BOUNDS.get(caps.binding, records)}{late}")
    bounds = f"{records} allow {caps.slots:,} ({advice.slots:,} / {advice.config.running_slots}), KV pages "
    yield _labelled(
        "", f"{bounds}{caps.pages:,} of the mean context, {advice.context_tokens:,.0f} tokens{_told(advice)}"
    )
    yield _labelled(
        "",
        f"in the replay {seen.mean_running:.1f} ran on average{_elsewhere(advice)}, {seen.most_running:,} at most; the "
        f"queue's head waited for {records} {seen.waited_for_slots:.1%} of the time, for KV pages "
        f"{seen.waited_for_pages:.1%}",
    )


def _elsewhere(advice: Advice) -> str:
    """How many ran on the server that was scraped."""
    ran = advice.traffic.running
    if ran is None:
        return ""
    return f" (on the server {ran:.1f}: `eval/calibrate.py --from-prometheus` fits an --engine to it)"


def _told(advice: Advice) -> str:
    told = advice.caps.max_running_requests
    if told is None:
        return ""
    return f"; --max-running-requests {told:,} takes {advice.slots_for_told:,} slots, and is not in the replay"


def _costs(advice: Advice) -> Iterator[str]:
    yield _row("what it costs", ["", *_HEADERS])
    for row in (advice.best, *advice.others):
        more = "" if row is advice.best else f"  {row.over_best.text('+.1%')}"
        yield _row("", [_title(row), *_figures(row)]) + more
    yield _labelled("", _LEGEND)
    yield _labelled("", _plainly(advice))
    if len({own.name for own in advice.episodes}) > 1:
        yield from (_labelled("", line) for line in _each(advice))


def _each(advice: Advice) -> Iterator[str]:
    """What is best in every episode."""
    for own in advice.episodes:
        yield f"{own.name}: best at kv_share {own.kv_share:.3f}, cost {own.cost:.3f}, hit rate {own.hit_rate:.3f}"


def _title(row: Row) -> str:
    ratio = row.controller.partition("-")[2] if row.controller.startswith("sglang-") else ""
    return f"{row.name}{f', {ratio}' if ratio else ''}"


def _figures(row: Row) -> list[str]:
    return [
        f"{row.kv_share:.3f}",
        f"{row.cost:.3f}",
        f"{row.ttft_p99_s:.2f} s",
        f"{row.hit_rate:.3f}",
        f"{row.slo_violation_rate:.1%}",
        f"{row.worst_class_unserved:.1%}",
    ]


def _plainly(advice: Advice) -> str:
    """The default against the best split, in a sentence."""
    default, best = advice.default, advice.best
    value = default.over_best[0]
    if abs(value) < 0.005:
        return f"Where nothing is set ({_title(default)}) it costs the same."
    return (
        f"Where nothing is set ({_title(default)}) it costs {abs(value):.0%} "
        f"{'more' if value > 0 else 'less'}: p99 TTFT "
        f"{default.ttft_p99_s:.2f} s instead of {best.ttft_p99_s:.2f} s, hit rate {default.hit_rate:.2f} instead of "
        f"{best.hit_rate:.2f}."
    )


def _moving(advice: Advice) -> Iterator[str]:
    row = advice.best_mover
    names = ", ".join(mover.name for mover in advice.movers)
    over_split, over_pool = (own.text("+.1%") for own in (row.over_best, advice.mover_over_floating))
    against = f"{over_split} against this split, {over_pool} against a floating pool"
    yield _labelled("a moving split", f"{_verdict(advice)}: {row.name}, the best of {names}, costs {against}")
    if advice.oracle is not None:
        yield _labelled("", f"the dynamic oracle, which knows what comes: {advice.oracle.over_best.text('+.1%')}")
    if advice.traffic.shared_rows:
        yield _labelled("", "the episodes share most of their rows: intervals say little")


def _verdict(advice: Advice) -> str:
    if not advice.moving_pays:
        saves = advice.best_mover.over_best.value <= -WORTH
        return "may pay, which more episodes would show" if saves else "does not pay"
    return "pays" if advice.moving_pays_more else "pays, but a floating pool does as well"


def _records(advice: Advice) -> str:
    """What a slot is."""
    return "windows" if "--swa-full-tokens-ratio" in advice.sglang else "states"


def _size(count: int) -> str:
    return f"{count / 2**20:.1f} MiB"


def _labelled(label: str, text: str) -> str:
    """Folded where it is too long."""
    lines = textwrap.wrap(text, WIDTH - LABEL, break_long_words=False, break_on_hyphens=False)
    labels = [label] + [""] * (len(lines) - 1)
    return "\n".join(f"{first:<{LABEL}}{line}" for first, line in zip(labels, lines, strict=True))


def _folded(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_long_words=False, break_on_hyphens=False)


def _row(label: str, cells: list[str]) -> str:
    """Of the table, which is never folded."""
    title, *figures = cells
    return f"{label:<{LABEL}}{title:<{TITLE}}" + "".join(f"{text:>{COLUMN}}" for text in figures)
