"""`python -m hbmgym.advise`: flags in; words, JSON and a picture out."""

import dataclasses
import json
import re
import subprocess
import sys

import numpy as np
import pytest

from hbmgym.envs.serving.config import with_policies
from hbmgym.envs.serving.core import make_layout
from hbmgym.envs.traces.load import load_trace
from hbmgym.envs.traces.seeds import seeds_for
from hbmgym.envs.workload import TraceWorkload
from hbmgym.eval.advise import AdviseOptions, main
from hbmgym.eval.advising.settings import pools_of_state_ratio
from hbmgym.eval.cells import Bench
from hbmgym.eval.comparison import compare
from hbmgym.eval.intervals import relative_difference

from ..traffic import CONFIG, HBM_GIB, MODEL, write_trace
from .pages import sglang_scrapes

SERVING = ("--model", MODEL, "--hbm-gib", str(HBM_GIB))
LAYOUT = make_layout(CONFIG)


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    return write_trace(tmp_path_factory.mktemp("own") / "own.jsonl")


@pytest.fixture(scope="module")
def found(trace, tmp_path_factory):
    """Folder, and what was written there."""
    folder = tmp_path_factory.mktemp("out") / "new"
    main([*SERVING, "--trace", str(trace), "--episodes", "2", "--out", str(folder), "--max-running-requests", "3"])
    return folder, json.loads((folder / "advice.json").read_text())


@pytest.fixture
def refusal(capsys, tmp_path, monkeypatch):
    """Its one line."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> str:
        with pytest.raises(SystemExit) as leaving:
            main([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert leaving.value.code == 2
        assert printed.err.count("\n") == 1 and not printed.out, printed
        return printed.err

    return run


def test_the_figures_are_those_of_a_comparison(found, trace):
    _, advice = found
    rows = [advice["best"], *advice["others"], *advice["moving"]["rows"]]
    names = list(dict.fromkeys(row["controller"] for row in rows if row["controller"]))
    names += [f"static-{point['kv_share']:.3f}" for point in advice["curve"]]
    workload = TraceWorkload(load_trace(trace), 1.0, CONFIG.page_tokens)
    bench, seeds = Bench(CONFIG, (workload,), "all"), seeds_for("validation", 2)
    result = compare(bench, list(dict.fromkeys(names)), seeds, jobs=1, oracle=False, progress=False).results[0]
    for row in rows:
        if row["controller"]:
            for figure in ("cost", "ttft_p99_s", "hit_rate", "worst_class_unserved", "slo_violation_rate"):
                assert row[figure] == result.mean(row["controller"], figure)
            columns = (result.column(name, "cost") for name in (row["controller"], result.best_static))
            assert row["over_best"] == list(relative_difference(*columns))
    assert advice["rho"] == result.rho
    assert advice["best"]["controller"] == result.best_static


def test_the_settings_give_the_split(found):
    split = found[1]["split"]
    pools = pools_of_state_ratio(LAYOUT, CONFIG.page_tokens, split["sglang"]["--mamba-full-memory-ratio"])
    assert pools.slots == split["slots"] == split["sglang"]["--max-mamba-cache-size"]
    assert split["kv_share"] == LAYOUT.share(split["slots"])
    assert split["kv_tokens"] == LAYOUT.pages(split["slots"]) * CONFIG.page_tokens
    assert split["kv_share_from"] <= split["kv_share"] <= split["kv_share_to"]


def test_json_has_these_fields(found):
    advice = found[1]
    assert set(advice) == {
        *("model", "gpu", "engine", "tensor_parallel", "hbm_gib", "dtypes", "slots_per_request", "policies"),
        *("slot_bytes", "kv_token_bytes", "traffic", "rho", "is_served", "split", "concurrency", "best", "default"),
        *("others", "moving", "retentions", "curve"),
    }
    others = {row["name"]: row for row in advice["others"]}
    assert {"SGLang's default", "SGLang's guide", "one floating pool", "vLLM's padded pool", "off by -0.1"} <= set(
        others
    )
    assert others["off by -0.1"]["kv_share"] == pytest.approx(advice["best"]["kv_share"] - 0.1, abs=0.05)
    assert advice["default"] == "vLLM's padded pool"
    assert [row["name"] for row in advice["moving"]["rows"]] == ["gradient", "convex", "helm"]
    assert set(advice["curve"][0]) == {
        *("kv_share", "slots", "cost", "hit_rate", "worst_class_unserved", "admitted", "binding")
    }
    assert [own["seed"] for own in advice["traffic"]["episodes"]] == seeds_for("validation", 2)


def test_other_rules_of_retention_are_tried_at_the_same_split(found, trace):
    advice = found[1]
    assert [row["name"] for row in advice["retentions"]] == ["interval-4096", "all", "path-cap-4"]
    workload = TraceWorkload(load_trace(trace), 1.0, CONFIG.page_tokens)
    config = dataclasses.replace(CONFIG, policies=dataclasses.replace(CONFIG.policies, retention="all"))
    name, seeds = advice["best"]["controller"], seeds_for("validation", 2)
    bench = Bench(config, (workload,), "all")
    result = compare(bench, [name], seeds, jobs=1, oracle=False, progress=False).results[0]
    assert advice["retentions"][1]["cost"] == result.mean(name, "cost")


def test_vllm_s_pool_is_replayed_in_its_own_pages(found, trace):
    row = next(row for row in found[1]["others"] if row["name"] == "vLLM's padded pool")
    config = with_policies(CONFIG, dataclasses.replace(CONFIG.policies, on_shortage="float-lru", layout="padded"))
    assert config.page_tokens == found[1]["split"]["vllm"]["block_tokens"] > CONFIG.page_tokens
    bench = Bench(config, (TraceWorkload(load_trace(trace), 1.0, config.page_tokens),), "all")
    seeds = seeds_for("validation", 2)
    result = compare(bench, ["static-0.5"], seeds, jobs=1, oracle=False, progress=False).results[0]
    assert row["cost"] == result.mean("static-0.500", "cost")


def test_concurrency_is_the_least_bound(found):
    concurrency = found[1]["concurrency"]
    caps = concurrency["caps"]
    assert caps["slots"] == found[1]["split"]["slots"] // CONFIG.slots_per_request
    assert concurrency["admitted"] == min(caps["slots"], caps["pages"], 3) == caps[concurrency["binding"]]
    assert concurrency["slots_for_max_running_requests"] == 3 * CONFIG.slots_per_request + 1
    assert 0 < concurrency["replayed"]["mean_running"] <= concurrency["replayed"]["most_running"]


def test_the_picture_is_one(found):
    folder, _ = found
    assert (folder / "advice.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {path.name for path in folder.iterdir()} == {"advice.json", "advice.png"}


def test_words_and_json_say_the_same(trace, capsys):
    arguments = [*SERVING, "--trace", str(trace), "--episodes", "2"]
    main([*arguments, "--json"])
    advice = json.loads(capsys.readouterr().out)
    main(arguments)
    words = capsys.readouterr().out
    ratio = advice["split"]["sglang"]["--mamba-full-memory-ratio"]
    assert f"--mamba-full-memory-ratio {ratio:g} or, pinned, --max-mamba-cache-size {advice['split']['slots']}" in words
    assert re.search(rf"this split +{advice['best']['kv_share']:.3f} +{advice['best']['cost']:.3f} ", words)
    assert f"a moving split {'pays' if advice['moving']['pays'] else 'does not pay'}" in words
    assert "vLLM divides by itself: vLLM's padded pool costs" in words
    assert not words.startswith("THE LOAD")
    assert max(map(len, words.splitlines())) <= 120


def test_a_load_that_cannot_be_served_is_said_first(tmp_path, capsys):
    busy = write_trace(tmp_path / "busy.jsonl", rate_per_s=2.0)
    main([*SERVING, "--gpu", "rtx3060", "--trace", str(busy), "--episodes", "1"])
    words = capsys.readouterr().out
    first = " ".join(words.split())
    assert re.match(r"THE LOAD CANNOT BE SERVED: .* multiply --load by 0\.\d+, or add GPUs\.", first)
    assert "(one episode) against this split" in first


def test_the_oracle_is_searched_if_it_is_asked_for(trace, capsys):
    main([*SERVING, "--trace", str(trace), "--episodes", "1", "--oracle", "--json"])
    advice = json.loads(capsys.readouterr().out)
    assert advice["moving"]["oracle"]["cost"] <= advice["best"]["cost"] + 1e-12, "to hold the best split is a path too"


def test_scrapes_have_the_present_split_beside_the_best_one(tmp_path, capsys):
    tokens = 0.4 * LAYOUT.budget_bytes / LAYOUT.page_bytes * CONFIG.page_tokens
    main([*SERVING, "--from-prometheus", sglang_scrapes(tmp_path, 0.1, max_total_num_tokens=tokens), "--json"])
    advice = json.loads(capsys.readouterr().out)
    now = next(row for row in advice["others"] if row["name"] == "as it is now")
    assert now["kv_share"] == pytest.approx(0.4, abs=LAYOUT.share_step)
    assert any(note.startswith("assumed:") for note in advice["traffic"]["notes"])


def test_windows_are_split_by_their_own_ratio(tmp_path, capsys):
    serving = ("--model", "gpt-oss-20b", "--weight-dtype", "mxfp4", "--gpu", "h100", "--hbm-gib", "0.5")
    main([*serving, "--trace", str(write_trace(tmp_path / "own.jsonl")), "--episodes", "1", "--json"])
    advice = json.loads(capsys.readouterr().out)
    assert 0.0 < advice["split"]["sglang"]["--swa-full-tokens-ratio"] <= 1.0
    assert "SGLang's guide" not in {row["name"] for row in advice["others"]}, "it is about states"


def test_memory_is_what_weights_leave():
    options = AdviseOptions(trace=("own",))
    assert options.serving_config().hbm_gib == 40.0, "Qwen3-Next in fp8 on an H200"
    shared = AdviseOptions(trace=("own",), tensor_parallel=2)
    assert shared.serving_config().hbm_gib == pytest.approx(0.875 * 141e9 / 2**30 - 80e9 / 2 / 2**30, abs=1.0)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "given is none: give --trace PATH or --scenario NAME or --from-prometheus BEFORE,AFTER"),
        (("--trace", "a", "--scenario", "mix-shift"), "given is --trace and --scenario"),
        (("--scenario", "mix-shift", "--scenario", "trend"), "given is --scenario and --scenario"),
        (("--trace", "missing.npz"), "missing.npz"),
        (("--scenario", "mix"), "scenario is 'mix', expected one of"),
        (("--scenario", "mix-shift", "--model", "qwen"), "unknown model 'qwen'"),
        (("--scenario", "mix-shift", "--model", "qwen3.5-397b-a17b"), "has 397.0 GB of weights per GPU"),
        (("--scenario", "mix-shift", "--policies", "on_shortage=float"), "on_shortage=float moves the split itself"),
        (("--scenario", "mix-shift", "--policies", "eviction=mru"), "policy eviction is 'mru'"),
        (("--scenario", "mix-shift", "--episodes", "0"), "--episodes is 0, expected an integer >= 1"),
        (("--scenario", "mix-shift", "--max-running-requests", "-1"), "--max-running-requests is -1"),
        (("--scenario", "mix-shift", "--served-name", "x"), "--served-name is only for --from-prometheus"),
        (("--from-prometheus", "a,b", "--loop", "closed"), "scrapes do not tell who waits for whom"),
        (("--from-prometheus", "a"), "expected two files: BEFORE,AFTER"),
        (("--from-prometheus", "a,b"), "a: cannot be read"),
    ],
)
def test_a_user_s_mistake_is_one_line(arguments, named, refusal):
    assert named in refusal(*arguments)


def test_an_empty_scrape_is_refused(refusal, tmp_path):
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("")
    assert "a.txt: has metrics of neither engine" in refusal("--from-prometheus", "a.txt,b.txt")


def test_a_model_with_nothing_but_kv_is_refused(refusal, tmp_path):
    dense = {"model_type": "gpt_oss", "layer_types": ["full_attention"] * 4, "num_hidden_layers": 4}
    config = {**dense, "hidden_size": 512, "vocab_size": 1000, "num_attention_heads": 8, "num_key_value_heads": 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 512, "sliding_window": 128}
    (tmp_path / "config.json").write_text(json.dumps({**config, **experts, "head_dim": 64}))
    line = refusal("--scenario", "mix-shift", "--model", tmp_path / "config.json")
    assert "keeps nothing but KV: there is nothing to split" in line


def test_a_folder_that_is_in_use_is_left_alone(refusal, trace, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "of").write_text("it")
    assert "is in use" in refusal(*SERVING, "--trace", trace, "--out", "full")
    assert (tmp_path / "full" / "of").read_text() == "it"


def test_it_runs_as_a_module_of_the_package(tmp_path):
    asked = [sys.executable, "-m", "hbmgym.advise", "--scenario", "nowhere"]
    run = subprocess.run(asked, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("advise.py: scenario is 'nowhere'") and run.stderr.count("\n") == 1


def test_static_splits_lie_on_the_curve_in_order(found):
    shares = [point["kv_share"] for point in found[1]["curve"]]
    assert (np.diff(shares) > 0).all()
    assert found[1]["best"]["cost"] == min(point["cost"] for point in found[1]["curve"])


def test_sglang_is_told_of_its_one_buffer_where_that_pays(trace, capsys):
    arguments = [*SERVING, "--trace", str(trace), "--episodes", "2", "--engine", "sglang-graph"]
    main([*arguments, "--json"])
    advice = json.loads(capsys.readouterr().out)
    assert advice["default"] == "SGLang's default"
    main(arguments)
    words = capsys.readouterr().out
    assert ("but better no split: a floating pool" in words) == advice["moving"]["floating_pays"]
    assert "but SGLang reckons other slots per request" in words, "2 is nobody's number"
