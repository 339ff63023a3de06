"""benchmarks/decode_gpu.py on a CPU: the cache of fixed size says what the model says, and the table follows."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from small_run import ROOT

from smallgpt.model import SmallGPT

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import decode_gpu

    sys.path.remove(str(ROOT / "benchmarks"))
    return decode_gpu


def test_steps_over_a_fixed_cache_give_the_logits_of_the_model(bench: ModuleType, model: SmallGPT) -> None:
    ids = torch.from_numpy(np.random.default_rng(0).integers(4, 320, (2, 32)))
    static, positions = bench.Static(model, 2, 32), torch.arange(32)
    with torch.inference_mode():
        expected = model(ids)[0]
        found = [static(ids[:, :7], positions[:7])]
        found += [static(ids[:, i : i + 1], positions[i : i + 1]) for i in range(7, 32)]
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 6:], atol=2e-5, rtol=1e-5)


@pytest.mark.slow
def test_report_and_table(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    command = [sys.executable, str(ROOT / "benchmarks/decode_gpu.py"), "--device", "cpu", "--shape", "tiny-gpt2"]
    command += ["--rounds", "1", "--steps", "6", "--out", str(tmp_path / "d.json"), "--bundle", str(tmp_path / "none")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads((tmp_path / "d.json").read_text())
    assert list(report["failed"]) == ["ours", "ours, XQA", "ours, Flash", "ours, cuDNN"]
    assert "does not exist" in report["failed"]["ours"]
    assert list(report["median"]) == ["PyTorch, compiled", "Transformers"]
    assert report["greedy ids, compiled as uncompiled"] == "6 of 6"
    for rows in report["median"].values():
        batches = [f"batch {batch}, context 16-22" for batch in (1, 8, 64)]
        assert list(rows) == ["first token, prompt 63", *batches]
        assert all(value > 0 for value in rows.values())
    first, second = (rows["batch 8, context 16-22"] for rows in report["median"].values())
    row = f"| batch 8, context 16-22 | {first:,.0f} | {second:,.0f} | {first / second:.2f} |"
    assert row in (tmp_path / "d.md").read_text()
    assert (tmp_path / "d.md").read_text() in done.stdout


def test_the_ratio_is_to_what_is_not_ours(bench: ModuleType) -> None:
    rows = {"ours": 300.0, "ours, XQA": 900.0, "PyTorch, compiled": 100.0, "Transformers": 200.0}
    report = {
        "model": {"architecture": "gpt2", "num_layers": 1, "embed_dim": 8, "vocab_size": 9},
        "precision": "fp16",
        "machine": "a GPU",
        "torch": "2",
        "rounds": 1,
        "greedy ids, compiled as uncompiled": "32 of 32",
        "median": {name: {"first token, prompt 9": 1 / value, "batch 1": value} for name, value in rows.items()},
        "failed": {},
    }
    lines = bench.to_markdown(report).splitlines()
    assert lines[-2] == "| first token, prompt 9 | 3.33 ms | 1.11 ms | 10.00 ms | 5.00 ms | 1.50 |"
    assert lines[-1] == "| batch 1 | 300 | 900 | 100 | 200 | 1.50 |"


def test_each_kernel_is_asked_for_while_its_session_opens(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, models: dict[str, SmallGPT]
) -> None:
    names = ("ORT_ENABLE_XQA", "ORT_ENABLE_CUDNN_FLASH_ATTENTION")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import engines

    seen = []
    monkeypatch.setattr(engines, "Ours", lambda *_, **__: seen.append(tuple(map(os.environ.get, names))))
    monkeypatch.delattr(engines, "Transformers")  # it turns gradients off for the whole process
    found, _ = bench.contenders(models["gpt2"], torch.device("cpu"), Path("fp16"))
    assert list(found)[:4] == list(bench.KERNELS)
    assert seen == [(None, None), ("1", None), ("0", "0"), ("0", "1")]
    assert not any(name in os.environ for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu() -> None:
    command = [sys.executable, str(ROOT / "benchmarks/decode_gpu.py")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (4, "")
    assert done.stderr.startswith("error: --device is cuda")
    assert done.stderr.count("\n") == 1


def test_texts_are_those_of_the_model(bench: ModuleType, models: dict[str, SmallGPT], monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    ids = np.array([3, 9, 40])
    for model in models.values():
        assert bench.agreement(model, torch.device("cpu"), ids, 8) == "8 of 8"
        text = bench.Compiled(model, torch.device("cpu")).text(ids, 8, 16)
        expected = ids.tolist()
        with torch.inference_mode():
            for _ in range(8):
                expected.append(int(model(torch.tensor([expected]))[0][0, -1].argmax()))
        assert text == expected[3:]
