"""The benchmark on an accelerator, at its smallest, on a CPU."""

import json
import subprocess
import sys

from conftest import ROOT

CASES = ("torch", "million", "extraction", "folder", "measuring", "pass", "steering", "loader")


def test_a_small_run_gives_a_table_and_its_json(tmp_path):
    words = ["--small", "--k", "4", "--cases", *CASES[:-1], "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    assert results["flops_per_token"] == 2 * 64 * 512 + 8 * 4 * 64
    cases = {case["who"]: case for case in results["cases"]}
    assert tuple(cases) == CASES
    failed = {who: case for who, case in cases.items() if "failed" in case}
    assert not failed
    assert all(case["tokens_per_second"] > 0 for case in cases.values())
    torch, million = cases["torch"], cases["million"]
    assert torch["tokens_per_second"] == 256 / torch["step_seconds_from_device"]
    assert all("Memory: 0.0" in case["plan"] for case in (torch, million, cases["folder"]))
    lines = [line.split(" | ") for line in done.stdout.strip().splitlines()[-len(CASES) :]]
    assert tuple(line[1] for line in lines) == CASES
    assert lines[0][0] == "| 256" and lines[0][7] == "1.00"
    assert lines[0][5] == f"{torch['tokens_per_second']:,.0f}"
    assert {path.name for path in tmp_path.iterdir()} == {"gpu.json", ".checksums.jsonl"}
