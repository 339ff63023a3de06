"""The scripts in benchmarks/: what each imports from the library is there; and the graph for onnxruntime-genai."""

import ast
import importlib
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tiny
from small_run import ROOT

from smallgpt.runtime import OrtGPT

SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


def test_there_are_scripts() -> None:
    assert len(SCRIPTS) > 10


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_the_library_has_what_it_imports(script: Path) -> None:
    for node in ast.walk(ast.parse(script.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("smallgpt", "stages"):
            module = importlib.import_module(node.module)
            for name in node.names:
                if not hasattr(module, name.name):
                    importlib.import_module(f"{node.module}.{name.name}")


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_the_graph_for_genai_computes_the_same(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    bundle = tiny.write_uncertified(tmp_path, tiny.random_model(), variant)
    importlib.import_module("genai_file").write_genai(bundle, tmp_path / "genai")
    session = onnxruntime.InferenceSession(tmp_path / "genai" / "model.onnx", providers=["CPUExecutionProvider"])
    model, ids = OrtGPT(bundle, threads=1, verify=False), np.arange(20, 31)[None]
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "position_ids": np.arange(ids.size)[None]}
    for value in session.get_inputs()[len(feeds) :]:
        feeds[value.name] = np.zeros((1, value.shape[1], ids.size, value.shape[3]), np.float32)
    (logits,) = session.run(["logits"], feeds)
    np.testing.assert_allclose(logits[0, 0], model.prefill(ids)[0], rtol=0, atol=1e-5)
