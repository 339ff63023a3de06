"""benchmarks/train.py on tiny shapes: what it counts, and that calls add up in one report. No time is asserted."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks/train.py"), "--precision", "fp32", "--mode", "eager", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
def test_calls_add_up_in_one_report(tmp_path: Path) -> None:
    out = tmp_path / "train.json"
    options = ("--threads", "1", "--steps", "2", "--out", str(out))
    for call in (("--shape", "tiny-gpt2", "--only", "products,ours,peer"), ("--shape", "tiny-llama", "--only", "peer")):
        done = bench(*call, *options)
        assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    names = [f"tiny-gpt2 T=32 B=4 fp32 eager base {system}" for system in ("products", "ours", "peer")]
    assert list(report["results"]) == [*names, "tiny-llama T=32 B=4 fp32 eager base peer"]
    # Per token 6 FLOP a weight of a linear layer and, for attention (its causal half), 6 a layer, channel and position.
    flops = 6 * 128 * (2 * 12 * 64**2 + 64 * 320 + 2 * 64 * 32)
    for name in names[1:]:
        result = report["results"][name]
        assert (result["tokens_per_step"], len(result["seconds"])) == (128, 2)
        middle = sum(result["seconds"]) / 2
        assert result["gflops"] == pytest.approx(flops / middle / 1e9, rel=0.05, abs=0.1)
        assert result["tokens_per_second"] == pytest.approx(128 / middle, rel=0.05)
        assert result["products_gflops"] == report["results"][names[0]]["gflops"]
        assert result["peak_memory_mib"] > 100
    table = (tmp_path / "train.md").read_text().splitlines()
    assert sum(line.startswith("| tiny-") for line in table) == 4
    assert set(report["machine"]) == {"cpu", "extensions", "torch"}


@pytest.mark.slow
def test_a_profile_names_the_operators_of_our_step(tmp_path: Path) -> None:
    done = bench("--profile", "--shape", "tiny-gpt2", "--threads", "1", "--out", str(tmp_path / "train.json"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("tiny-gpt2 T=32 B=4 fp32 eager base ours\n")
    assert all(name in done.stdout for name in ("aten::mm", "aten::_fused_adamw_", "Self CPU time total"))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_refusals(tmp_path: Path) -> None:
    done = bench("--shape", "huge", "--out", str(tmp_path / "train.json"))
    assert done.returncode == 2
    assert done.stderr.startswith("error: --shape huge: known are gpt2, llama, default,")
    (tmp_path / "train.json").write_text('{"machine": {"cpu": "another"}}')
    done = bench("--shape", "tiny-gpt2", "--out", str(tmp_path / "train.json"))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "holds results of another machine or PyTorch" in done.stderr
