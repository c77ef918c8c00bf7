"""A user's mistake is one line on stderr and exit code 2; nothing is written, nothing is half done."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hbmgym.eval import bench, compare, opportunity, regret, rivals, rules, tune
from hbmgym.train import ppo

from .traffic import HBM_GIB, MODEL, write_trace

MAINS = {
    module.__name__.rpartition(".")[2]: module.main
    for module in (bench, compare, opportunity, ppo, regret, rivals, rules, tune)
}
TRAIN_TRACE = Path(__file__).resolve().parents[3] / "shared" / "traces" / "train" / "mooncake_synthetic.train.npz"


@pytest.fixture(scope="session")
def good_trace(tmp_path_factory) -> Path:
    return write_trace(tmp_path_factory.mktemp("good") / "good.jsonl")


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """An empty current directory, which has to stay as the test left it."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refusal(workplace, capsys) -> Callable[..., str]:
    """Runs a script that has to refuse its arguments, and returns its one line."""

    def run(script: str, *arguments: object) -> str:
        before = sorted(workplace.rglob("*"))
        with pytest.raises(SystemExit) as leaving:
            MAINS[script]([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert leaving.value.code == 2
        assert printed.err.count("\n") == 1, printed.err
        assert not printed.out
        assert sorted(workplace.rglob("*")) == before
        return printed.err

    return run


both = pytest.mark.parametrize("script", ["compare", "ppo"])


@both
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "the file is empty"),
        (b"\n\n", "the file is empty"),
        (b"arrival,tokens\n0,1\n", "columns is 'arrival, tokens', expected those of a known csv"),
        (pickle.dumps([1, 2]), "format is not recognised"),
        (b"PK\x03\x04 and no more", "damaged, pickled"),
        (b'{"timestamp": 0', "bad:1: line is not JSON"),
        (b'{"timestamp": 0}\xff', "not UTF-8"),
        (b'{"timestamp": 0}', "bad:1: input_length is None"),
    ],
)
def test_what_is_no_trace_is_refused(script, content, named, workplace, refusal):
    (workplace / "bad").write_bytes(content)
    line = refusal(script, "--trace", "bad")
    assert "bad" in line and named in line


@both
@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"input_length": -5}, "input_length is -5"),
        ({"input_length": 10**12}, "input_length is 1000000000000"),
        ({"input_length": 1.5}, "input_length is 1.5"),
        ({"output_length": "many"}, "output_length is 'many'"),
        ({"timestamp": float("nan")}, "timestamp is None"),
        ({"timestamp": float("inf")}, "timestamp is inf"),
        ({"timestamp": -1}, "timestamp is -1"),
        ({"hash_ids": ["a", "b", None]}, "hash_ids"),
        ({"input_length": 1500, "hash_ids": [1]}, "number of block ids is 1, expected 2 or 3"),
        ({"input_length": 1500, "hash_ids": [1, 2, 3, 4]}, "number of block ids is 4, expected 2 or 3"),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(script, change, named, workplace, refusal):
    path = write_trace(workplace / "bad.jsonl", span_s=20.0, **change)
    line = refusal(script, "--trace", path)
    assert f"bad.jsonl:10: {named}" in line


@both
def test_a_trace_of_empty_requests_only_is_refused(script, workplace, refusal):
    row = {"timestamp": 0, "input_length": 0, "output_length": 0, "hash_ids": []}
    (workplace / "bad.jsonl").write_text(json.dumps(row))
    assert "bad.jsonl: 0 rows are left" in refusal(script, "--trace", "bad.jsonl")


@both
def test_a_pickle_inside_an_archive_is_not_opened(script, workplace, refusal):
    np.savez(workplace / "bad.npz", meta=np.array([print], dtype=object))
    assert "bad.npz: cannot be read as a compact npz: Object arrays" in refusal(script, "--trace", "bad.npz")


@both
@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weather": np.zeros(3)}, "column is 'weather'"),
        ({"arrival_s": None}, "column is 'arrival_s'"),
        ({"arrival_s": np.array([0.0, 1.0, np.inf])}, "row 2: arrival_s is inf"),
        ({"output_tokens": np.array([1, -2, 3], np.int32)}, "row 1: output_tokens is -2"),
        ({"meta": np.array("{}")}, "block_size is None"),
        ({"meta": np.array('{"block_size": 0}')}, "exactly one to be true"),
    ],
)
def test_a_bad_column_is_named(script, changes, named, workplace, refusal):
    columns = {
        "meta": np.array('{"block_size": 0, "open_loop": true}'),
        "arrival_s": np.arange(3.0),
        **{name: np.ones(3, np.int32) for name in ("input_tokens", "output_tokens", "session_id", "turn")},
        "parent": np.full(3, -1, np.int32),
        **{name: np.full(3, np.nan, np.float32) for name in ("gap_s", "service_s")},
        "kind": np.zeros(3, np.uint8),
        **changes,
    }
    np.savez(workplace / "bad.npz", **{name: values for name, values in columns.items() if values is not None})
    line = refusal(script, "--trace", "bad.npz")
    assert "bad.npz" in line and named in line


@both
def test_a_damaged_real_trace_is_refused(script, workplace, refusal):
    if not TRAIN_TRACE.is_file():
        pytest.skip("shared/traces is not beside the repository")
    whole = TRAIN_TRACE.read_bytes()
    (workplace / "half.npz").write_bytes(whole[: len(whole) // 2])
    assert "half.npz" in refusal(script, "--trace", "half.npz")


@both
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--trace", "nowhere.jsonl"), "nowhere.jsonl: cannot be read: No such file"),
        (("--trace", "."), "holds no session files"),
        (("--scenario", "rush-hour"), "expected one of mix-shift, "),
        (("--scenario", "mix-shift", "--scenario", "mix-shift"), "mix-shift is given twice"),
        (("--model", "gpt-2"), "unknown model 'gpt-2'"),
        (("--gpu", "h20"), "unknown GPU 'h20' (did you mean 'h200'?): known are h200, h100, a100, "),
        (("--gpu", "rtx3060"), "exceeds the 12 GB of rtx3060: lower hbm_gib"),
        (("--tensor-parallel", "0"), "tensor_parallel is 0"),
        (("--tensor-parallel", "3"), "tensor_parallel is 3, but qwen3-next-80b-a3b has 16 query heads"),
        (("--tensor-parallel", "x"), "--tensor-parallel: invalid integer value: 'x'"),
        (("--expert-parallel", "0"), "expert_parallel is 0, expected an integer >= 1"),
        (("--expert-parallel", "x"), "--expert-parallel: invalid integer value: 'x'"),
        (("--expert-parallel", "2"), "has 512 experts and tensor_parallel is 1: choose a number that divides both"),
        (
            ("--model", "qwen3.5-27b", "--tensor-parallel", "2", "--expert-parallel", "2"),
            "qwen3.5-27b has no experts and tensor_parallel is 2",
        ),
        (("--engine", "vllm-grap"), "unknown engine 'vllm-grap' (did you mean 'vllm-graph'?): known are vllm-graph, "),
        (("--engine", ""), "unknown engine ''"),
        (("--engine", "nowhere.json"), "nowhere.json: cannot be read: No such file"),
        (("--long-prefill-tokens", "-1"), "long_prefill_tokens is -1, expected an integer >= 0"),
        (("--costs", "nowhere.json"), "nowhere.json: cannot be read: No such file"),
        (("--costs", "."), "Is a directory"),
        (("--hbm-gib", "0.1"), "hbm_gib is 0.1, but qwen3-next-80b-a3b needs 0.34 GiB"),
        (("--hbm-gib", "0"), "hbm_gib is 0.0"),
        (("--hbm-gib", "-4"), "hbm_gib is -4.0"),
        (("--hbm-gib", "nan"), "hbm_gib is nan"),
        (("--hbm-gib", "much"), "--hbm-gib: invalid float value: 'much'"),
        (("--hbm-gib", "100"), "lower hbm_gib"),
        (("--window-s", "0"), "window_s is 0.0, expected a finite number > 0"),
        (("--kv-dtype", "int3"), "choose one of fp32, bf16, fp16, fp8"),
        (("--state-dtype", "int3"), "choose one of fp32, bf16, fp16, fp8, int8"),
        (("--draft-tokens", "-1"), "draft_tokens is -1, expected 0 to 32"),
        (
            ("--draft-tokens", "3", "--slots-per-request", "no_buffer"),
            "slots_per_request is no_buffer, with which SGLang drafts no tokens, but draft_tokens is 3",
        ),
        (
            ("--model", "gpt-oss-20b", "--hbm-gib", "0.1"),
            "but gpt-oss-20b needs 0.39 GiB for one request of 2 slots and 8192 prompt tokens",
        ),
        (("--policies", "eviction=random"), "policy eviction is 'random'"),
        (("--policies", "layout=padded"), "layout=padded is one pool, which on_shortage=evict would divide"),
        (("--policies", "layout=padded,on_shortage=float", "--model", "gpt-oss-20b"), "12 window layers: choose"),
        (("--transfers", "never"), "--transfers"),
        (("--policies", "eviction=lru,eviction=lpb"), "policies: eviction is given twice: lru and lpb"),
        (
            ("--policies", "on_shortage=cheapest"),
            "policy on_shortage is 'cheapest', expected one of: evict, migrate, float, float-lru, priced",
        ),
        (
            ("--policies", "admission=first"),
            "expected one of: fcfs, lpm, slo, past-future",
        ),
        (("--policies", "admission=past-future,on_shortage=priced"), "both say whether the queue's head gets in"),
        (("--max-long-prefills", "-1"), "max_long_prefills is -1, expected an integer >= 0"),
        (("--max-long-prefills", "1"), "no prompt counts as long: set long_prefill_tokens"),
        (("--policies", "pin=forever"), "policy pin is 'forever', expected one of: none, ttl"),
        (("--policies", "preemption=swap"), "policy preemption is 'swap', expected one of: recompute, offload"),
        (("--host-gib", "0"), "host_gib is 0.0, expected a number above 0"),
        (("--host-gib", "nan"), "host_gib is nan"),
        (("--policies", "luck=good"), "'luck=good'"),
        (("--policies", "retention=newest"), "policy retention is 'newest', expected one of: all, latest, interval-N"),
        (("--policies", "retention=interval-0"), "policy retention is 'interval-0', expected interval- and an integer"),
        (("--policies", "retention=path-cap-2.5"), "expected path-cap- and an integer from 1 to"),
        (("--policies", "retention=optimal-65"), "expected optimal- and an integer from 1 to 64"),
        (("--slots-per-request", "0"), "slots_per_request is 0"),
        (("--slots-per-request", "9"), "slots_per_request is 9, expected 1 to 8"),
        (("--slots-per-request", "some"), "presets: off, no_buffer, extra_buffer_lazy, extra_buffer"),
        (("--policies", "eviction"), "'eviction'"),
        (("--backend", "paper"), "--backend: invalid choice: 'paper'"),
        (("--unheard-of", "1"), "unrecognized arguments: --unheard-of"),
        (("--trace",), "--trace: expected one argument"),
        (("positional",), "unrecognized arguments: positional"),
        (("--jobs", "0"), "--jobs"),
        (("--jobs", "inf"), "--jobs: invalid integer value: 'inf'"),
    ],
)
def test_a_bad_flag_is_named(script, arguments, named, refusal):
    assert named in refusal(script, *arguments)


@both
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is no costs.json"),
        (b"\xff", "is no costs.json"),
        (b"[]", "is no costs.json"),
        (b'{"constants": 3, "measured_on": {"name": "x"}}', "is no costs.json"),
        (b'{"constants": {"chunk_move_s": 1e-4}}', "is no costs.json"),
        (b'{"constants": {}, "measured_on": {"name": "x"}}', "has no constants"),
        (
            b'{"constants": {"e_w": 1}, "measured_on": {"name": "x"}}',
            "constant is 'e_w', expected one of: chunk_move_s",
        ),
        *(
            (b'{"constants": {"chunk_move_s": %s}, "measured_on": {"name": "x"}}' % value, "chunk_move_s is ")
            for value in (b"0", b"-1", b"NaN", b"Infinity", b"true", b"null", b'"1"', b"[]")
        ),
    ],
)
def test_bad_costs_are_named(script, content, named, workplace, refusal):
    (workplace / "costs.json").write_bytes(content)
    line = refusal(script, "--costs", "costs.json")
    assert "costs.json: " in line and named in line


@both
@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"", "is not JSON"),
        (b"\xff", "is not JSON"),
        (b"[]", "is no engine profile: expected an object with the fields name, kernels, "),
        (b'{"name": "mine"}', "is no engine profile"),
    ],
)
def test_a_bad_engine_profile_is_named(script, content, named, workplace, refusal):
    (workplace / "engine.json").write_bytes(content)
    line = refusal(script, "--engine", "engine.json")
    assert "engine.json: " in line and named in line


@both
@pytest.mark.parametrize("load", ["0", "-1", "nan", "inf", "x"])
def test_a_bad_load_is_named(script, load, good_trace, refusal):
    assert "load" in refusal(script, "--trace", good_trace, "--load", load)


@both
def test_a_part_that_is_too_short_is_named_with_the_load_that_would_do(script, good_trace, refusal):
    line = refusal(script, "--trace", good_trace, "--load", "9")
    assert "good: part" in line and "expected at least 300 s (load <= " in line


@both
def test_a_trace_of_which_no_row_follows_another_has_no_closed_loop(script, good_trace, refusal):
    line = refusal(script, "--trace", good_trace, "--loop", "closed")
    assert "good: loop is 'closed', but no row follows another one (take loop 'open')" in line
    assert "--loop" in refusal(script, "--trace", good_trace, "--loop", "half")


@both
def test_one_trace_cannot_be_given_twice(script, good_trace, refusal):
    assert "good is given twice" in refusal(script, "--trace", good_trace, "--trace", good_trace)


@both
@pytest.mark.parametrize("taken", ["folder", "folder/file"])
def test_an_output_folder_in_use_is_refused_and_kept(script, taken, good_trace, workplace, refusal):
    (workplace / "folder").mkdir()
    (workplace / "folder" / "file").write_text("mine")
    assert f"--out {taken} is in use" in refusal(script, "--trace", good_trace, "--out", taken)
    assert (workplace / "folder" / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("controllers", "named"),
    [
        ("nobody", "'nobody' is unknown"),
        ("", "--controllers is empty"),
        ("static-1.5", "1.5"),
        ("static-nan", "nan"),
        ("static-x", "'x' is not a number"),
        ("sglang--1", "-1"),
        ("threshold,threshold", "threshold twice"),
        ("ppo:nowhere", "nowhere: no such file"),
        ("ppo:", "'ppo:' is unknown"),
    ],
)
def test_a_bad_controller_is_named(controllers, named, refusal):
    assert named in refusal("compare", "--controllers", controllers)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", pickle.dumps(print), b"\x93NUMPY"])
def test_a_corrupt_or_pickled_policy_is_refused(content, workplace, refusal):
    (workplace / "policy.npz").write_bytes(content)
    for path in ("policy.npz", "."):
        assert "policy.npz: is damaged or no archive" in refusal("compare", "--controllers", f"ppo:{path}")


def test_a_folder_without_a_policy_is_refused(workplace, refusal):
    (workplace / "run").mkdir()
    assert "run: holds neither" in refusal("compare", "--controllers", "ppo:run")


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "nan", "inf", "1e9"])
def test_a_bad_number_of_seeds_is_refused(value, refusal):
    assert "seeds" in refusal("compare", "--seeds", value)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--seeds", "often"), "--seeds is 'often', expected an integer >= 1 or auto"),
        (("--seeds", "auto", "--within", "0"), "--within is 0, expected a number above 0"),
        (("--seeds", "auto", "--within", "nan"), "--within is nan, expected a number above 0"),
        (("--seeds", "auto", "--within", "narrow"), "--within: invalid float value: 'narrow'"),
        (("--within", "0.03"), "--within 0.03 needs --seeds auto"),
        (("--seeds", "auto", "--controllers", "sglang-0.9,helm"), "needs a static-<kv_share> and one that moves"),
        (("--seeds", "auto", "--controllers", "static-grid"), "needs a static-<kv_share> and one that moves"),
    ],
)
def test_bad_flags_of_adding_episodes_are_refused(flags, said, refusal):
    assert said in refusal("compare", *flags)


def test_an_unknown_split_is_refused(refusal):
    assert "--split: invalid choice: 'final'" in refusal("compare", "--split", "final")


COUNTS = (
    *("total-timesteps", "n-envs", "n-steps", "batch-size", "n-epochs", "seeds", "eval-freq", "save-freq"),
    *("eval-episodes", "table-episodes"),
)


@pytest.mark.parametrize("flag", COUNTS)
@pytest.mark.parametrize("value", ["0", "-1", "1.5", "x", "nan", "inf"])
def test_a_bad_count_of_the_trainer_is_named(flag, value, refusal):
    assert f"--{flag}" in refusal("ppo", f"--{flag}", value)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--gamma", "1"), "--gamma is 1.0"),
        (("--gamma", "nan"), "--gamma is nan"),
        (("--learning-rate", "0"), "--learning-rate is 0.0"),
        (("--learning-rate", "nan"), "--learning-rate is nan"),
        (("--seed", "x"), "--seed: invalid integer value: 'x'"),
        (("--seed", "-1"), "--seed is -1"),
        (("--seed", "1e12"), "--seed is 1000000000000"),
        (("--batch-size", "1"), "--batch-size is 1"),
        (("--n-envs", "1", "--n-steps", "1"), "--n-steps is 1"),
        (("--eval-episodes", "600", "--table-episodes", "600"), "1000 validation seeds"),
    ],
)
def test_a_bad_setting_of_the_trainer_is_named(arguments, named, refusal):
    assert named in refusal("ppo", *arguments)


@pytest.mark.parametrize(
    "content",
    [
        *(None, b"", b"[]", b"{}", b"\xff", b'{"options": null}'),
        *(b'{"options": {"moons": 1}}', b'{"options": {"n_envs": "x"}}', b'{"options": {"gamma": 7}}'),
    ],
)
def test_only_a_run_can_be_resumed(content, workplace, refusal):
    (workplace / "run").mkdir()
    if content is not None:
        (workplace / "run" / "config.json").write_bytes(content)
    line = refusal("ppo", "--resume", "run")
    assert "--resume run: config.json cannot be read" in line and "name the folder of a run" in line


def test_a_run_that_does_not_exist_cannot_be_resumed(refusal):
    assert "--resume nowhere" in refusal("ppo", "--resume", "nowhere")


evaluators = pytest.mark.parametrize("script", ["compare", "opportunity", "regret", "rivals", "rules", "tune"])


@evaluators
@pytest.mark.parametrize(
    ("flag", "value"),
    [(flag, value) for flag in ("--seeds", "--jobs") for value in ("0", "-1", "1.5", "x", "nan")]
    + [("--seeds", "1e9")],
)
def test_a_bad_number_of_an_evaluation_is_named(script, flag, value, refusal):
    assert flag.strip("-") in refusal(script, flag, value)


@pytest.mark.parametrize("script", ["opportunity", "regret", "rivals", "rules", "tune"])
def test_a_trace_that_is_not_there_is_named(script, refusal):
    assert "nowhere.jsonl: cannot be read: No such file" in refusal(script, "--trace", "nowhere.jsonl")


def test_a_reference_that_moves_the_split_is_named(refusal):
    assert "--statics names gradient, expected static-<kv_share>" in refusal("rivals", "--statics", "gradient")


@pytest.mark.parametrize(
    ("script", "flag"), [("regret", "--controllers"), ("rules", "--moving"), ("tune", "--controller")]
)
def test_an_unknown_controller_is_named(script, flag, refusal):
    assert "controller 'nobody' " in refusal(script, flag, "nobody")


@pytest.mark.parametrize(
    "flags",
    [
        ("compare", "--controllers", "static-0.5,helm-base@float"),
        ("rules", "--moving", "helm"),
        ("rules", "--at", "helm"),
    ],
)
def test_windows_that_a_policy_was_not_trained_on_are_named(flags, refusal):
    assert "was trained on windows of 5 s, window_s is 30: leave it out, " in refusal(*flags, "--window-s", "30")


CASE = ("--scenario", "steady-chat", "--platform", "qwen3-next-80b-a3b@h200")


@pytest.mark.parametrize(
    ("script", "arguments"),
    [("compare", ("--scenario", "steady-chat")), ("opportunity", CASE), ("regret", CASE), ("ppo", ())],
)
@pytest.mark.parametrize("out", ["file", "file/below"])
def test_an_output_folder_that_cannot_be_made_is_named(script, arguments, out, workplace, refusal):
    (workplace / "file").write_text("mine")
    assert f"--out {out}" in refusal(script, *arguments, "--out", out)
    assert (workplace / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("vary", "line"),
    [
        ("luck=good,bad", "'luck' is none of eviction, admission"),
        ("retention=", "expected different values: FIELD=A,B"),
        ("retention=all,all", "expected different values"),
        ("retention=newest", "policy retention is 'newest'"),
        ("long_prefill_tokens=many", "'many' is no int"),
        ("layout=separate,padded", "layout=padded is one pool, which on_shortage=evict would divide"),
    ],
)
def test_what_cannot_be_varied_is_named(vary, line, refusal):
    assert line in refusal("rules", "--vary", vary)


def test_a_table_that_cannot_be_written_is_named(refusal):
    assert "--out nowhere/tuned.json: nowhere is no folder" in refusal("tune", "--out", "nowhere/tuned.json")


def interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


@pytest.fixture
def interrupted(workplace, monkeypatch, capsys) -> Callable[..., None]:
    """Runs a script that hears Ctrl-C where it calls `place`: it has to say so in one line, and to leave nothing."""

    def run(script: str, place: str, *arguments: object) -> None:
        monkeypatch.setattr(place, interrupt)
        with pytest.raises(SystemExit) as leaving:
            MAINS[script]([str(argument) for argument in arguments])
        assert leaving.value.code == 130
        assert capsys.readouterr().err.splitlines()[-1] == "interrupted"
        assert not list(workplace.rglob("*"))

    return run


@pytest.mark.parametrize("script", ["compare", "opportunity", "ppo", "regret", "rivals", "rules", "tune"])
def test_ctrl_c_while_it_gets_ready_leaves_nothing(script, interrupted):
    interrupted(script, f"{MAINS[script].__module__}.{'fresh_seeds' if script == 'regret' else 'seeds_for'}")


@pytest.mark.parametrize(
    ("script", "place", "arguments"),
    [
        ("compare", "write_cells", ("--controllers", "static-0.5", "--model", MODEL, "--hbm-gib", HBM_GIB)),
        ("regret", "as_json", ("--controllers", "static-0.5", *CASE)),
    ],
)
def test_ctrl_c_while_it_writes_leaves_nothing(script, place, arguments, good_trace, interrupted):
    traffic = ("--trace", good_trace) if script == "compare" else ()
    arguments = (*arguments, *traffic, "--seeds", "1", "--jobs", "1", "--out", "new")
    interrupted(script, f"{MAINS[script].__module__}.{place}", *arguments)


def test_the_bench_reads_its_trace_before_it_measures(refusal, workplace):
    assert "missing.npz: cannot be read" in refusal("bench", "engine", "--trace", workplace / "missing.npz")
    assert "part speed is unknown" in refusal("bench", "engine", "speed")
