"""Which split of GPU memory to set for a model, a GPU and traffic: `python -m hbmgym.advise --help`.

Traffic is one of --trace PATH, --scenario NAME and --from-prometheus BEFORE,AFTER. It prints the split in the engine's
own flags, how many requests then run at once and what bounds them, what the default and a split that is off would cost,
and whether a moving split would pay.
"""

import sys

try:
    from hbmgym.cli import command, in_one_line, option, parse_options, user_errors
except ModuleNotFoundError as error:
    print(f"{error}: run `make train` once, or use .venv/bin/python {__file__}", file=sys.stderr)
    raise SystemExit(2) from None

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hbmgym.envs.platforms import hbm_gib_left
from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.scenarios import SCENARIOS
from hbmgym.envs.traces.trace import TraceError
from hbmgym.envs.workload import PaperTrafficWorkload, ScenarioWorkload, TraceWorkload
from hbmgym.eval.advising.advice import MOVERS, Advice, advise
from hbmgym.eval.advising.metered import of_scrapes, read_metered
from hbmgym.eval.advising.report import report
from hbmgym.eval.advising.traffic import Traffic, of_scenario, of_trace
from hbmgym.eval.cells import Bench, Runner, UnusableFolder, check_folder, claimed, shown_anyway, write_json
from hbmgym.eval.options import ServingOptions, say_notices
from hbmgym.eval.rows import usual_rows
from hbmgym.memory_backend.geometry import find_model

SOURCES = ("trace", "scenario", "from_prometheus")
FLAGS = ("--trace PATH", "--scenario NAME", "--from-prometheus BEFORE,AFTER")


@dataclass(frozen=True)
class AdviseOptions(ServingOptions):
    """The deployment, the traffic, and where the advice goes."""

    trace: tuple[str, ...] = option((), "recorded trace, in any format that eval/compare.py reads", metavar="PATH")
    scenario: tuple[str, ...] = option((), f"generated scenario: {', '.join(SCENARIOS)}", metavar="NAME")
    hbm_gib: float = option(
        0.0, "GiB of HBM for KV and states, on each GPU; 0: what weights leave of .875 of its memory"
    )
    from_prometheus: tuple[str, ...] = option(
        (), "two scrapes of a running engine's /metrics, saved with `curl -si`", metavar="BEFORE,AFTER"
    )
    served_name: str = option("", "model_name of the scrapes, if the server has several", metavar="NAME")
    max_running_requests: int = option(0, "the engine's own bound on running requests; 0: none")
    episodes: int = option(8, "episodes of a scenario, or of a trace that is replayed whole")
    oracle: bool = option(False, "also search the dynamic oracle: what moving could bring at most, minutes")
    jobs: int = option(1, "processes")
    json: bool = option(False, "print JSON instead of words")
    out: str = option("", "new folder for advice.json and advice.png", metavar="DIR")
    progress: bool = option(True, "show progress bars")

    def __post_init__(self) -> None:
        given = [f"--{name.replace('_', '-')}" for name in SOURCES for _ in getattr(self, name)]
        if len(given) != 1:
            said = " and ".join(given) or "none"
            raise ValueError(f"one source of traffic is expected, given is {said}: give {' or '.join(FLAGS)}")
        for name, least in (("episodes", 1), ("jobs", 1), ("max_running_requests", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected an integer >= {least}")
        if self.from_prometheus and self.loop == "closed":
            raise ValueError("--loop is closed, but scrapes do not tell who waits for whom: leave it out")
        if self.served_name and not self.from_prometheus:
            raise ValueError("--served-name is only for --from-prometheus")

    def serving_config(self) -> ServingConfig:
        """With the memory that is left where none is given; ValueError where there is nothing to split."""
        gib = self.hbm_gib or hbm_gib_left(self.model, self.gpu, self.weight_dtype, self.tensor_parallel)
        config = ServingOptions.serving_config(dataclasses.replace(self, hbm_gib=gib))
        model = find_model(config.model)
        if not model.slot_bytes(config.state_dtype):
            raise ValueError(f"{model.slug} keeps nothing but KV: there is nothing to split")
        if not model.attention_layers:
            raise ValueError(f"{model.slug} keeps no KV that grows: there is nothing to split")
        if config.policies.on_shortage != "evict":
            raise ValueError(
                f"--policies on_shortage={config.policies.on_shortage} moves the split itself: leave it out, fixed "
                "splits are compared (and pools without a split beside them)"
            )
        return config

    def traffic(self, config: ServingConfig) -> Traffic:
        """Raises ValueError with one line."""
        if self.from_prometheus:
            return of_scrapes(read_metered(self.from_prometheus[0], self.served_name), config, self.load)
        (workload,) = self.workloads(config)
        for notice in self._notices_of_times():
            print(notice, file=sys.stderr)
        if isinstance(workload, TraceWorkload):
            say_notices([workload.trace])
            return of_trace(workload, self.episodes)
        assert isinstance(workload, ScenarioWorkload | PaperTrafficWorkload)
        return of_scenario(workload, self.episodes)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    """Read, replay, print, write."""
    options = parse_options(AdviseOptions, __doc__ or "", arguments)
    with user_errors(OSError, UnusableFolder):
        if options.out:
            check_folder(Path(options.out))  # before traffic is read
        config = options.serving_config()
        make_layout(config)  # weights that do not fit are refused first
        movers = usual_rows(MOVERS, config)
        traffic = options.traffic(config)
    bench = Bench(config, traffic.workloads, "all")
    progress = options.progress and sys.stderr.isatty()
    with in_one_line(TraceError, UnusableFolder), claimed(options.out):
        with Runner(bench, options.jobs, progress) as runner:
            told = options.max_running_requests or None
            found = advise(bench, traffic, runner, movers, told=told, oracle=options.oracle)
        text = json.dumps(found.as_json(), indent=1, allow_nan=False) if options.json else report(found)
        if options.out:
            with shown_anyway(lambda: print(text)):
                _write(Path(options.out), found)
    print(text)
    if options.out and not options.json:
        print(f"\nadvice.json and advice.png are in {options.out}")


def _write(folder: Path, found: Advice) -> None:
    from hbmgym.eval.advising.figure import draw_advice  # matplotlib takes half a second

    write_json(folder / "advice.json", found.as_json())
    draw_advice(folder / "advice.png", found)


if __name__ == "__main__":
    main()
