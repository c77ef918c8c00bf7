"""Record what SGLang's own cache reuses: `python eval/sglang_cache/record.py`, by hand, where SGLang is installed.

It needs no GPU: `pip install --no-deps sglang==0.5.23` and the small packages that its cache imports.
"""

import sys

try:
    from hbmgym.cli import command, fail, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import importlib.metadata
import json
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.eval.sglang_cache import ours
from hbmgym.eval.sglang_cache.cases import Case, Recorded, as_json, family_cases
from hbmgym.eval.sglang_cache.curve import FAMILIES, RATIOS, RECORDED, case_at
from hbmgym.eval.sglang_cache.rule_cases import rule_cases
from hbmgym.eval.sglang_cache.stand_ins import stand_in_for_gpu_packages
from hbmgym.files import write_atomically

Serve = Callable[[Case, Sequence[int]], list[int]]
HOW = "python eval/sglang_cache/record.py: strategy extra_buffer without the overlap scheduler, pages of 64, device cpu"


@dataclass(frozen=True)
class RecordOptions:
    """Where the recordings go."""

    cases: str = option(
        "tests/envs/data/sglang_cache.json", "file for the cases, '' for none: a minute", metavar="FILE"
    )
    curve: str = option(
        str(RECORDED), "file for the hit rates over the split, '' for none: ten minutes", metavar="FILE"
    )


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Serve the same requests here and there, and write what SGLang's cache reuses."""
    options = parse_options(RecordOptions, __doc__ or "", arguments)
    serve = load_sglang()
    made_with = {"sglang": importlib.metadata.version("sglang"), "how": HOW}
    if options.cases:
        recorded = [_record(case, serve) for case in [*rule_cases(), *family_cases()]]
        lines = ",\n".join(json.dumps(as_json(case), separators=(",", ":")) for case in recorded)
        _write(options.cases, f'{{"made_with": {json.dumps(made_with)},\n"cases": [\n{lines}\n]}}\n')
    if options.curve:
        rates = {family: [_hit_rate(case_at(family, ratio), serve) for ratio in RATIOS] for family in FAMILIES}
        _write(options.curve, json.dumps({"made_with": made_with, "hit_rates": rates}, indent=1) + "\n")


def load_sglang() -> Serve:
    """`theirs.serve`; where SGLang cannot be imported one line and exit code 2."""
    stand_in_for_gpu_packages()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of GPU features that are not there
            from hbmgym.eval.sglang_cache import theirs
    except ImportError as error:
        return fail(
            f"SGLang's cache cannot be imported: {error} (pip install --no-deps sglang==0.5.23, and what it asks for)"
        )
    return theirs.serve


def _record(case: Case, serve: Serve) -> Recorded:
    here = ours.serve(case)
    there = serve(case, here.order)
    print(f"{case.name}: {sum(here.reused_tokens)} tokens reused here, {sum(there)} there")
    return Recorded(case, here.order, there)


def _hit_rate(case: Case, serve: Serve) -> float:
    order = [row for row in range(len(case.requests)) for _ in range(2)]
    rate = sum(serve(case, order)) / sum(request.prompt_tokens for request in case.requests)
    print(f"{case.name}: {rate:.3f}")
    return round(rate, 4)


def _write(path: str, text: str) -> None:
    with user_errors(OSError):
        write_atomically(Path(path), text.encode())
    print(f"written: {path}")


if __name__ == "__main__":
    main()
