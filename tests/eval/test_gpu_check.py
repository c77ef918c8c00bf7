"""`python eval/gpu_check.py`: every part runs, on the double of libcuda here; figures are of real GPUs only."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.memory_backend.vmm.cuda_double.processes import ROOT, build_or_skip, run_on_double

pytest.importorskip("cuda.bindings.driver", exc_type=ImportError)

from hbmgym.eval import gpu_check
from hbmgym.eval.gpu.isolation import Failed, isolated
from hbmgym.eval.gpu.plan import Plan
from hbmgym.eval.gpu.report import Report, conclusions, cost_constants, slug, table
from hbmgym.eval.gpu.suite import run_suite

SCRIPT = "eval/gpu_check.py"
TRIED_ALONE = ("replay", "bad_calls", "conformance")
DEVICE = {"name": "NVIDIA H200", "driver": "13.0", "fake": False}
FOUND: dict[str, dict[str, Any]] = {
    "blocking": {"rule": "r", "map": {"waits": "no (0 of 5)"}, "unmap": {"waits": "yes (5 of 5)"}},
    "bulk": {"128_chunks": {"one_unmap_code": "CUDA_ERROR_INVALID_VALUE"}},
    "fresh": {"always": True},
    "copies": {"128_chunks": {"p50_us": 128.0}},
    "migrations": {"128_chunks": {"p50_us": 8960.0, "per_chunk_us": 70.0}},
}


@pytest.fixture(scope="session")
def double_folder(tmp_path_factory) -> Path:
    return build_or_skip(tmp_path_factory.mktemp("double"))


def test_on_the_double_parts_run_and_no_figure_is_written(double_folder, tmp_path):
    parts = [part for part in gpu_check.PARTS if part not in TRIED_ALONE]
    out = tmp_path / "out"
    ended = run_on_double(double_folder, SCRIPT, "--quick", "--gib", "1", "--out", str(out), *parts)
    assert ended.returncode == 3, ended.stdout + ended.stderr
    lines = ended.stdout.splitlines()
    assert [line.split(":")[0] for line in lines[:-1]] == parts
    assert all(" ... done (" in line for line in lines[:-1])
    assert lines[-1] == "FAKE (no GPU) is a double of libcuda for tests: no figure is written"
    assert not out.exists()


@pytest.mark.slow
def test_on_the_double_an_episode_gives_the_metrics_of_accounting(double_folder):
    ended = run_on_double(double_folder, SCRIPT, "--quick", "replay")
    assert ended.returncode == 3, ended.stdout + ended.stderr


def test_on_the_double_every_bad_call_is_answered(double_folder):
    print_answers = (
        "import json; from hbmgym.eval.gpu.plan import Plan; from hbmgym.eval.gpu.refusals import check_bad_calls\n"
        "if __name__ == '__main__': print(json.dumps(check_bad_calls(Plan(1.0))))"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(double_folder)}
    command = [sys.executable, "-c", print_answers]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    answers = json.loads(ended.stdout)
    codes = {name: answer["code"] for name, answer in answers.items()}
    assert codes["create_out_of_memory"] == "CUDA_ERROR_OUT_OF_MEMORY"
    assert codes["release_while_mapped"] == "CUDA_SUCCESS"
    assert codes["unmap_half"] == codes["map_twice"] == codes["access_unmapped"] == "CUDA_ERROR_INVALID_VALUE"


def test_more_memory_than_is_free_is_refused(double_folder):
    ended = run_on_double(double_folder, SCRIPT, "--gib", "64")
    assert ended.returncode == 2
    assert ended.stderr == "gpu_check.py: --gib is 64, but FAKE (no GPU) has 4.0 GiB free\n"


def test_without_a_gpu_one_line_says_what_to_do(tmp_path):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(ROOT / SCRIPT), "--out", str(tmp_path / "out")]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("\n") == 1 and "no GPU can be used here" in ended.stderr and "nvidia-smi" in ended.stderr
    assert not ended.stdout and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--gib", "0.5"), "--gib is 0.5"),
        (("--gib", "nan"), "--gib is nan"),
        (("--gib", "inf"), "--gib is inf"),
        (("luck",), "part luck is unknown"),
        (("--repeats", "3"), "unrecognized arguments"),
    ],
)
def test_a_bad_flag_is_one_line(flags, named, capsys):
    with pytest.raises(SystemExit) as leaving:
        gpu_check.main(flags)
    printed = capsys.readouterr()
    assert leaving.value.code == 2
    assert printed.err.count("\n") == 1 and named in printed.err and not printed.out


def test_a_part_that_fails_is_reported_and_the_next_one_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    report = Report(DEVICE, {}, tmp_path)
    for part in ("alias", "fresh"):
        gpu_check.run_part(part, Plan(1.0, quick=True), report)
    assert capsys.readouterr().out.count("failed") == 2
    written = json.loads(report.partial.read_text())["parts"]
    assert [written[part]["status"] for part in ("alias", "fresh")] == ["failed", "failed"]
    assert written["alias"]["error"].startswith("NoGpu: no GPU can be used here")


@pytest.mark.parametrize(
    ("function", "arguments", "reason"),
    [
        (int, ("x",), "ValueError: invalid literal for int"),
        (os._exit, (7,), "its process died: exit code 7"),
        (signal.raise_signal, (signal.SIGKILL,), "its process died: signal SIGKILL"),
    ],
)
def test_what_goes_wrong_in_another_process_is_one_line(function, arguments, reason):
    with pytest.raises(Failed, match=reason):
        isolated(function, *arguments, limit_s=60)


def test_what_hangs_in_another_process_is_given_up():
    with pytest.raises(Failed, match="no answer within 1 s"):
        isolated(time.sleep, 60, limit_s=1)


def test_what_another_process_finds_comes_back():
    assert isolated(divmod, 7, 2, limit_s=60) == (3, 1)


def add_all(report: Report) -> None:
    for part, found in FOUND.items():
        report.add(part, "done", 0.5, found)


def test_figures_are_on_disk_after_every_part_and_get_their_name_at_the_end(tmp_path):
    report = Report(DEVICE, {"git": "abc"}, tmp_path)
    for count, (part, found) in enumerate(FOUND.items(), start=1):
        report.add(part, "done", 0.5, found)
        assert [path.name for path in tmp_path.iterdir()] == ["gpu_nvidia_h200.partial.json"]
        assert len(json.loads(report.partial.read_text())["parts"]) == count
    files = report.finish()
    assert [path.name for path in files] == ["gpu_nvidia_h200.json", "costs.json"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    whole, costs = (json.loads(path.read_text()) for path in files)
    assert whole["git"] == costs["measured_on"]["git"] == "abc" and whole["device"] == DEVICE
    assert costs["constants"] == pytest.approx({"chunk_move_s": 70e-6, "block_copy_s_per_byte": 1e-6 / 2**21})


def test_measured_constants_are_names_of_the_cost_model():
    from hbmgym.envs.serving.cost_model import COST

    assert COST.names is not None
    parts = {part: {"status": "done", **found} for part, found in FOUND.items()}
    assert set(cost_constants(parts)) <= set(COST.names)
    assert cost_constants({"migrations": {"status": "failed", "error": "x"}}) == {}


def test_conclusions_say_what_was_found_and_nothing_else():
    report = Report(DEVICE, {}, None)
    add_all(report)
    report.add("alias", "failed", 0.1, {"error": "x"})
    assert conclusions(report.parts) == [
        "calls that wait for a running kernel: unmap (of map, unmap)",
        "one unmap over 128 chunks that were mapped one by one: CUDA_ERROR_INVALID_VALUE",
        "a chunk that is created again is zero: always",
        "moving 128 chunks takes 8,960 us, copying their bytes 128 us",
    ]


def test_the_table_has_a_line_for_every_group_of_figures():
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table(DEVICE, {"blocking": {"status": "done", "seconds": 0.5, **FOUND["blocking"]}}))
    lines = console.export_text().splitlines()
    assert sum("│" in line for line in lines) == 4
    for words in (("device", "name NVIDIA H200"), ("blocking", "rule r"), ("unmap", "waits yes (5 of 5)")):
        assert any(all(word in line for word in words) for line in lines)


def test_the_name_of_a_gpu_becomes_part_of_a_file_name():
    assert slug("NVIDIA A100-SXM4-80GB") == "nvidia_a100_sxm4_80gb"


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ("@pytest.mark.gpu\ndef test_one(): pass", "1 passed"),
        ("def test_one(): pass", "no test is marked gpu"),
        (None, "there is no folder tests"),
    ],
)
def test_the_suite_that_is_run_is_the_one_marked_gpu(body, found, tmp_path):
    if body is not None:
        write_suite(tmp_path, body)
    facts = run_suite(tmp_path)
    assert found in str(facts["summary" if body and "mark" in body else "not_run"])


def test_a_failing_suite_is_named_test_by_test(tmp_path):
    write_suite(tmp_path, "@pytest.mark.gpu\ndef test_one(): assert False")
    with pytest.raises(Failed, match=r"ended with 1: 1 failed.*; tests/test_it.py::test_one"):
        run_suite(tmp_path)


def write_suite(root: Path, body: str) -> None:
    (root / "tests").mkdir()
    (root / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    (root / "tests" / "test_it.py").write_text(f"import pytest\n{body}\n")
