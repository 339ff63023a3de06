"""benchmarks/ablations.py at a tiny size: what it trains, what it does not train twice, and its table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from small_run import ROOT

from smallgpt.stories import generate_stories


@pytest.mark.slow
def test_changes_are_trained_once_and_compared(tmp_path: Path) -> None:
    text = "\n".join(story.text for story in generate_stories(seed=1, target_bytes=100_000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    settings = {
        "prepare.source": tmp_path / "text.txt",
        "model.vocab_size": 350,
        "model.embed_dim": 32,
        "model.num_heads": 2,
        "model.num_layers": 1,
        "model.max_seq_len": 32,
        "training.batch_size": 8,
        "training.threads": 1,
    }
    command = [sys.executable, str(ROOT / "benchmarks/ablations.py"), "--epochs", "0.2", "--seeds", "1,2"]
    command += [f"--set={key}={value}" for key, value in settings.items()]

    def call(only: str, *more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--only", only, "--out", str(tmp_path / "out.json"), *more],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

    first = call("control,vocabulary 512,squared ReLU", "--seeds", "1")
    assert first.returncode == 0, first.stderr
    before = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    second = call("control", "--seeds", "1,2")
    runs = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["runs"]
    assert runs["control"]["1"] == before["control"]["1"]  # its seconds, too
    assert runs["vocabulary 512"] == before["vocabulary 512"]
    assert list(runs["control"]) == ["1", "2"]
    one, two = runs["control"].values()
    assert one["bits_per_byte"] != two["bits_per_byte"]
    assert (
        1 < one["bits_per_byte"] == pytest.approx(one["nats_per_token"] * one["tokens_per_byte"] / 0.693147, rel=1e-5)
    )
    assert runs["vocabulary 512"]["1"]["parameters"] - one["parameters"] == 162 * 32
    assert runs["squared ReLU"]["1"]["parameters"] == one["parameters"]
    assert runs["squared ReLU"]["1"]["bits_per_byte"] != one["bits_per_byte"]
    assert one["epochs"] == pytest.approx(0.2, abs=0.01)
    table = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert table in second.stdout
    bits = runs["vocabulary 512"]["1"]["bits_per_byte"] - one["bits_per_byte"]  # of the same seed
    effect = bits * 0.693147 / one["tokens_per_byte"]
    assert f"| {effect:+.3f} |" in table
    assert call("control", "--epochs", "1").returncode == 2  # of another control
    assert "known are control, gpt2" in call("dropout").stderr
    refused = call("documents reshuffled")
    assert refused.returncode
    assert "the train split is one document" in refused.stderr
