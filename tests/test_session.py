"""How sessions are opened, and that what attention needs is bounded."""

import os
from pathlib import Path

import numpy as np
import pytest
import tiny
from test_export import random_ids, torch_logits

from smallgpt import runtime, session
from smallgpt.model import SmallGPT
from smallgpt.runtime import OrtGPT, check_golden

VARIABLE = "ORT_GQA_DISABLE_FLASH_ATTENTION"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[SmallGPT, Path]:
    model = tiny.random_model("llama")
    return model, tiny.write_bundles(tmp_path_factory.mktemp("bundles"), model, ["fp32", "int8"])


def test_the_environment_is_left_as_it_was(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    load = session.onnxruntime.InferenceSession

    def watched(*arguments, **options):
        seen.append(os.environ.get(VARIABLE))
        return load(*arguments, **options)

    monkeypatch.setattr(session.onnxruntime, "InferenceSession", watched)
    monkeypatch.delenv(VARIABLE, raising=False)
    OrtGPT(pair[1] / "fp32", threads=1)
    assert VARIABLE not in os.environ
    monkeypatch.setattr(session, "SCORES_BYTES", 4 * 4 * 63 * 64)  # 4 heads, less than 64 x 64 scores
    OrtGPT(pair[1] / "fp32", threads=1)
    monkeypatch.setenv(VARIABLE, "0")
    OrtGPT(pair[1] / "fp32", threads=1)
    assert seen == ["1", "0", "0"]
    assert os.environ[VARIABLE] == "0"


@pytest.mark.parametrize("entry", [("k" * 2000, "1"), ("", "1"), ("k", "\udcff")])
def test_what_is_no_session_option_is_one_line(pair, entry: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match=r"^onnxruntime does not take '.*' as a session option$"):
        OrtGPT(pair[1] / "fp32", threads=1, session=[entry])


@pytest.mark.parametrize("flash", ["0", "1"])
def test_both_kinds_of_attention_agree_with_pytorch(pair, flash: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, bundles = pair
    monkeypatch.setenv(VARIABLE, flash)
    rows = random_ids(64)
    found = OrtGPT(bundles / "fp32", threads=1).logits(rows, range(32, 64))
    np.testing.assert_allclose(found, torch_logits(model, rows[None])[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", ["fp32", "int8"])
def test_a_large_batch_is_filled_in_even_parts(pair, variant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OrtGPT(pair[1] / variant, threads=1)
    rows, lengths = random_ids(10, 30), np.array([30, 1, 7, 30, 12, 29, 2, 3, 30, 5])
    expected = model.prefill(rows, lengths).copy()
    steps = model.step(rows[:, 0]).copy()
    sizes: list[int] = []
    run = OrtGPT._run
    monkeypatch.setattr(OrtGPT, "_run", lambda *given: sizes.append(len(given[2])) or run(*given))
    monkeypatch.setattr(runtime, "SCORES_BYTES", 5 * 4 * 4 * 64 * 30)  # five rows, of which four are taken
    found = model.prefill(rows, lengths)
    assert sizes == [4, 4, 2]
    assert np.array_equal(found, expected)
    assert np.array_equal(model.step(rows[:, 0]), steps)
    assert model.lengths.tolist() == (lengths + 1).tolist()
    monkeypatch.setattr(runtime, "SCORES_BYTES", 1)  # two rows at least
    sizes.clear()
    assert np.array_equal(model.prefill(rows, lengths), expected)
    assert sizes == [2] * 5


@pytest.mark.gpu
@pytest.mark.skipif(bool(session.missing_for_cuda()), reason="onnxruntime finds no CUDA device")
def test_on_a_gpu_the_fp16_bundle_keeps_its_certificate(tmp_path: Path) -> None:
    model = OrtGPT(tiny.write_bundles(tmp_path, tiny.random_model("llama"), ["fp16"]) / "fp16", device="cuda")
    assert model.device == "cuda"
    assert check_golden(model)[0] > 0
    rows, lengths = random_ids(3, 20), np.array([20, 5, 13])
    alone = [model.prefill(row[None, :length])[0].copy() for row, length in zip(rows, lengths, strict=True)]
    np.testing.assert_allclose(model.prefill(rows, lengths), alone, rtol=0, atol=0.05)


@pytest.mark.parametrize("device", ["tpu", "cuda:x", "cpu:1", "cuda:"])
def test_devices_that_are_none(pair, device: str) -> None:
    with pytest.raises(ValueError, match=rf"^device is '{device}'; it must be auto, cpu, cuda or cuda:N$"):
        OrtGPT(pair[1] / "fp32", device=device)


def test_integer_products_that_cannot_overflow_give_the_same_digits(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(1, 40)
    logits = OrtGPT(pair[1] / "int8", threads=1).prefill(ids).copy()
    monkeypatch.setattr(session, "products_overflow", lambda: True)
    assert np.array_equal(OrtGPT(pair[1] / "int8", threads=1).prefill(ids), logits)


def test_only_x86_processors_without_vnni_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session.platform, "machine", lambda: "aarch64")
    assert not session.products_overflow()
    monkeypatch.setattr(session.platform, "machine", lambda: "x86_64")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    assert session.products_overflow() == ("vnni" not in flags)
