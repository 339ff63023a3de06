"""benchmarks/decode.py on a tiny model: the peers say the same text, and the table follows from the figures."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from small_run import ROOT

SHAPE = {"embed_dim": 64, "num_heads": 2, "max_seq_len": 424}


@pytest.mark.slow
def test_report_and_table(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    exports = tiny.write_bundles(tmp_path, tiny.random_model(**SHAPE), ["fp32", "fp32-kv8", "int8", "int8-kv8", "int4"])
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), str(tmp_path / "model"), str(exports)]
    command += ["--tokens", str(tmp_path / "tokens"), "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]
    command += ["--engines", "Transformers", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out" / "decode.json").read_text())
    assert report["greedy fp32 texts equal to ours"] == {"Transformers": "5 of 5"}
    fp32, half = report["median"]["fp32"], report["median"]["16 bits"]
    assert list(fp32) == ["ours", "ours, int8 cache", "Transformers"]
    assert list(half) == ["Transformers"]
    assert list(report["median"]["int8"]) == ["ours", "ours, int8 cache"]
    assert list(report["median"]["int4"]) == ["ours"]
    assert fp32["ours"]["bits per byte"] == pytest.approx(fp32["Transformers"]["bits per byte"], rel=1e-5)
    assert half["Transformers"]["bits per byte"] == pytest.approx(fp32["ours"]["bits per byte"], rel=0.05)
    rows = [
        "first token, prompt 16",
        *(f"batch {batch}, context 16-416" for batch in (1, 8, 32)),
        "peak memory, batch 1",
    ]
    for cell in (*fp32.values(), *half.values()):
        assert list(cell) == [*rows, "file size", "bits per byte"]
        assert all(cell[row] > 0 for row in rows)
    assert fp32["ours"]["file size"] == (exports / "fp32" / "model.onnx").stat().st_size
    table = (tmp_path / "out" / "decode.md").read_text()
    assert table in done.stdout
    name = "batch 8, context 16-416"
    ours, small, theirs = (fp32[engine][name] for engine in fp32)
    figures = f"{ours:,.0f} | {small:,.0f} | {theirs:,.0f} | {ours / theirs:.2f} | {small / theirs:.2f}"
    assert f"| {name} | {figures} |" in table
    assert "int8 cache to the best" in table
    assert "threads; medians of 1 rounds" in table


def test_without_a_model(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), str(tmp_path / "gpt")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    expected = f"error: {tmp_path / 'gpt/config.json'} does not exist; `make repro` makes model, bundles and tokens\n"
    assert (done.returncode, done.stderr) == (2, expected)


def test_engines_that_nobody_knows() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/decode.py"), "--engines", "vLLM"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--engines names vLLM; known are llama.cpp, CTranslate2, onnxruntime-genai, Transformers" in done.stderr
