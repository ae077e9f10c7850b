"""The benchmark on an accelerator, at its smallest, on a CPU."""

import json
import subprocess
import sys

from conftest import ROOT


def test_a_small_run_gives_a_table_and_its_json(tmp_path):
    words = ["--small", "--cases", "torch", "--folder", str(tmp_path)]
    command = [sys.executable, "-m", "tests.benchmarks.gpu", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "gpu.json").read_text())
    loading, case = results["cases"]
    assert results["flops_per_token"] == 2 * 64 * 512 + 8 * 8 * 64
    assert loading["who"] == "loader" and loading["tokens_per_second"] > 0
    assert (case["who"], case["batch_size"]) == ("torch", 256) and "failed" not in case
    rate = case["tokens_per_second"]
    assert rate == case["batch_size"] / case["step_seconds_from_device"] > 0
    last = done.stdout.splitlines()[-1].split(" | ")
    assert last[0] == "| 256" and last[1] == "torch"
    assert last[4] == f"{rate:,.0f}" and last[6] == "1.00"
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".json"] == ["gpu.json"]
