"""The table of other engines' rules: who is in it, under which settings, and that all serve the same traffic."""

from hbmgym.envs.serving.config import ServingConfig
from hbmgym.envs.workload import open_workloads
from hbmgym.eval.rivals import BEST_STATIC, RIVALS, main

from .traffic import HBM_GIB, MODEL, write_trace


def test_each_rival_differs_from_every_other():
    given = ServingConfig()
    assert len({(rival.controller, repr(rival.config(given))) for rival in RIVALS}) == len(RIVALS)


def test_what_a_rival_leaves_open_is_as_given():
    given = ServingConfig(model="qwen3.5-27b", gpu="h100", slots_per_request=3, prefill_budget=2048)
    for rival in RIVALS:
        config = rival.config(given)
        assert (config.model, config.slots_per_request, config.prefill_budget) == ("qwen3.5-27b", 3, 2048)


def test_rivals_serve_the_same_requests_at_the_same_rate():
    """Pages of another size are pages of the same traffic, and rates are those of the default rules."""
    episodes = [open_workloads(rival.config(ServingConfig()))[0].episode("validation", 10_000) for rival in RIVALS]
    for field in ("arrival_s", "input_tokens", "output_tokens", "needs"):
        assert all((episode.rows[field] == episodes[0].rows[field]).all() for episode in episodes), field
    assert {episode.page_tokens for episode in episodes} == {64, 1056}


def test_the_table_has_a_row_for_each_and_for_the_best_static(tmp_path, capsys):
    trace = write_trace(tmp_path / "trace.jsonl", span_s=1200.0)
    statics = "static-0.400,static-0.600"
    main(["--trace", str(trace), "--model", MODEL, "--hbm-gib", str(HBM_GIB), "--seeds", "1", "--jobs", "1",
          "--split", "all", "--statics", statics])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split("│") for line in lines if "│" in line]
    assert [row[1].strip() for row in rows] == [BEST_STATIC, *(rival.title for rival in RIVALS)]
    assert rows[0][2].strip() in statics and rows[-1][2].strip() == rows[0][2].strip()
