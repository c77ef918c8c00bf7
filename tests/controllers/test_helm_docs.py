"""docs/helm.md says what the code says."""

import re
from pathlib import Path

from hbmgym.controllers.helm.parameters import HelmParameters

from .test_registry import constant_policy

PAGE = (Path(__file__).parents[2] / "docs" / "helm.md").read_text()


def test_the_documentations_example_runs_and_goes_on_after_a_restart(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    constant_policy(0.0).save("policy.npz")
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    (printed,) = re.findall(r"it prints:\n\n```\n(.*?)```", PAGE, re.DOTALL)
    code = compile(example, "docs/helm.md", "exec")
    for _ in range(2):
        exec(code, {})
        assert capsys.readouterr().out == printed


def test_the_page_has_the_defaults():
    p = HelmParameters()
    text = " ".join(PAGE.split())
    for words in (
        f"`most_outside` ({p.most_outside:g})".replace("0.", "."),
        f"residual <- clip(residual * exp(-w / {p.leak_s:g} s) + {p.learn_per_s:g} w gap, -+{p.most_residual:g})",
        f"average of price_p over {p.price_average_s:g} s",
        f"-+{p.most_gap:g})",
        f"exp(trim + direction * {p.trim_probe:g})",
        f"clip(trim - {p.trim_step:g} direction (cost_2 - cost_1) / (cost_2 + cost_1), -+{p.most_trim:g})",
        f"An interval is {p.interval_windows} windows",
        f"In {100 * p.forced_part:g} % of the intervals",
        f"exceeds {p.harm_errors:g} standard errors",
        f"at {p.harm_times} such in a row",
        f"The gate starts at {p.gate_start:g}",
        f"grows by {p.gate_growth:g} per interval".replace("0.", "."),
        f"averaged over {p.strange_average_s:g} s, had {p.strange_inputs:g} inputs or more outside",
        f"-+{p.most_z:g}) S <- clip(S + z - {p.cusum_slack:g}, 0, {p.cusum_alarm:g})",
        f"(not in the first {p.settle_s:g} s)",
        f"to recover after {p.hold_s:g} s",
        f"or after {p.longest_s:g} s",
        f"to normal after {p.cooldown_s:g} s",
        f"clip(v price_kv - price_ssm, -+{p.most_burst:g})",
        f"{100 * p.refill_part:g} % of the rate",
        f"averaged per request over {p.reuse_average_requests:g} requests",
        f"once that is below {p.no_reuse:g} after".replace("0.", "."),
        f"at least {p.reuse_least_requests:g} requests and {p.reuse_least_s:g} s",
        f"until it is above {p.reuse_again:g}.".replace("0.", "."),
        f"log((TTFT + .01) / ({p.cap_balance:g} TPOT + .01)), -+1)".replace("0.", "."),
        f"cap <- max(cap, {p.cap_running:g} mean running)",
        f"({p.cap_up_per_s:g} / s where g > 0, else {p.cap_down_per_s:g} / s))".replace("0.", "."),
        f"running + {p.cap_opening:g} waiting) where waiting > {p.cap_queue:g} cap",
        f"mean wait / SLO > {p.cap_wait:g} TPOT".replace("0.", "."),
    ):
        assert words in text, words
    assert p.burst_gain == p.dispersion == 1.0  # factors that the formulas leave out
