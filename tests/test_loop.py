"""The loop: golden losses, every part of a step against a slow recomputation, and numbers that are not finite."""

import contextlib
import logging
import math
import os
import platform
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torch.nn.functional as F
from small_run import (
    ROOT,
    SEQ_LEN,
    Watcher,
    chain,
    configure,
    copy,
    run_loop,
    same,
    streams,
    token_file,
    wait_for,
    write_project,
)
from torch import Tensor

from smallgpt.cli import StoppedError
from smallgpt.config import Config
from smallgpt.loop import Speed, compiled, stop_signals, train_step, validate
from smallgpt.model import SmallGPT
from smallgpt.state import new_state
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import batch
from smallgpt.tracking import Tracker

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
# Losses of the first steps in nats per token; whoever changes the numerics changes these on purpose.
GOLDEN = {
    ("gpt2", "adamw"): [
        5.789217,
        5.741946,
        5.691105,
        5.564469,
        5.435971,
        5.422644,
        5.328207,
        5.217539,
        5.215071,
        5.240529,
    ],
    ("gpt2", "muon"): [
        5.789217,
        5.749707,
        5.684708,
        5.550353,
        5.428365,
        5.411395,
        5.299474,
        5.203198,
        5.196704,
        5.223236,
    ],
    ("llama", "adamw"): [
        5.770209,
        5.752296,
        5.691557,
        5.538302,
        5.392029,
        5.318286,
        5.260014,
        5.190665,
        5.175797,
        5.164861,
    ],
    ("llama", "muon"): [
        5.770209,
        5.754377,
        5.6918,
        5.536963,
        5.399313,
        5.321339,
        5.240574,
        5.174665,
        5.162337,
        5.15375,
    ],
    ("qwen3", "muon"): [
        5.76842,
        5.751954,
        5.692499,
        5.524404,
        5.390575,
        5.309823,
        5.230526,
        5.168261,
        5.147354,
        5.142402,
    ],
}


def losses(config: Any, folder: Path, **options: Any) -> list[float]:
    return [row["loss"] for row in run_loop(config, folder, **options).train_rows]


@pytest.mark.parametrize(("architecture", "optimizer"), list(GOLDEN))
def test_golden_losses(tmp_path: Path, architecture: str, optimizer: str) -> None:
    config = configure({"architecture": architecture}, optimizer=optimizer, max_steps=10, weight_decay=0.1)
    found = losses(config, tmp_path)
    assert found == pytest.approx(GOLDEN[architecture, optimizer], rel=1e-4)


def test_rows_of_the_curves(tmp_path: Path) -> None:
    config = configure(max_steps=8, log_interval=3, eval_interval=5, lr_schedule="linear")
    state = run_loop(config, tmp_path)
    assert [row["step"] for row in state.train_rows] == [3, 6, 8]
    assert [row["step"] for row in state.valid_rows] == [0, 5, 8]
    assert list(state.train_rows[0]) == ["step", "loss", "learning_rate", "gradient_norm"]
    # warm-up over 2 steps, then linearly to zero at step 8
    assert [row["learning_rate"] for row in state.train_rows] == pytest.approx([3e-3, 3e-3 * 3 / 6, 3e-3 * 1 / 6])
    # before any step the model knows nothing but the size of the vocabulary
    assert state.valid_rows[0]["loss"] == pytest.approx(math.log(320), abs=0.05)


def test_a_step_is_clipped_adamw(tmp_path: Path) -> None:
    """Gradient, clipping, decay and update of the first step, recomputed with formulas."""
    config = configure(gradient_clip=0.05, weight_decay=0.3, learning_rate=0.01, warmup_steps=4)
    state = new_state(config, CPU)
    before = copy(state.model.state_dict())
    x, y = batch(streams()["train"].ids, seed=1, step=0, batch_size=4, seq_len=SEQ_LEN)
    logits, _ = state.model(torch.from_numpy(x))
    expected_loss = F.cross_entropy(logits.reshape(-1, 320), torch.from_numpy(y).reshape(-1))
    expected_loss.backward()
    gradients = {name: parameter.grad.clone() for name, parameter in state.model.named_parameters()}
    expected_norm = math.sqrt(sum(float((gradient**2).sum()) for gradient in gradients.values()))
    assert expected_norm > 2 * 0.05  # else nothing is clipped
    state.model.zero_grad(set_to_none=True)

    loss, norm, rate = train_step(config, state, streams()["train"], compiled(state.model, config))
    assert (loss, norm) == (pytest.approx(expected_loss.item(), rel=1e-6), pytest.approx(expected_norm, rel=1e-5))
    assert rate == pytest.approx(0.01 / 4)
    for name, parameter in state.model.named_parameters():
        gradient = gradients[name] * (0.05 / (expected_norm + 1e-6))
        moments = state.optimizers[0].state[parameter]
        torch.testing.assert_close(moments["exp_avg"], 0.1 * gradient, rtol=1e-4, atol=1e-9)
        decay = 0.3 if parameter.ndim == 2 else 0.0
        update = gradient / (gradient.abs() + 1e-8)  # Adam's first step is the sign, but for its epsilon
        expected = before[name] * (1 - rate * decay) - rate * update
        torch.testing.assert_close(parameter.data, expected, rtol=1e-3, atol=1e-6)
        assert parameter.grad is None


def test_no_clipping(tmp_path: Path) -> None:
    state = new_state(configure(gradient_clip=0.0), CPU)
    wide = new_state(configure(gradient_clip=1e9), CPU)
    for each in (state, wide):
        config = configure(gradient_clip=0.0 if each is state else 1e9)
        train_step(config, each, streams()["train"], compiled(each.model, config))
    assert same(state.model.state_dict(), wide.model.state_dict())


def test_accumulation_sees_the_same_windows(tmp_path: Path) -> None:
    ids = streams()["train"].ids
    whole = batch(ids, seed=1, step=3, batch_size=16, seq_len=SEQ_LEN)[0]
    halves = [batch(ids, seed=1, step=6 + half, batch_size=8, seq_len=SEQ_LEN)[0] for half in range(2)]
    assert np.array_equal(np.concatenate(halves), whole)


# Muon brings all singular values to about one, the smallest too, whose directions rest on last digits.
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 2e-3)])
def test_accumulation_equals_a_large_batch(tmp_path: Path, optimizer: str, tolerance: float) -> None:
    once = run_loop(configure(optimizer=optimizer, batch_size=16), tmp_path / "once")
    twice = run_loop(configure(optimizer=optimizer, batch_size=8, gradient_accumulation_steps=2), tmp_path / "twice")
    for name in ("loss", "gradient_norm"):
        found, expected = ([row[name] for row in state.train_rows] for state in (twice, once))
        assert found[0] == pytest.approx(expected[0], rel=1e-5)
        assert found == pytest.approx(expected, rel=tolerance)
    assert twice.valid_rows[-1]["loss"] == pytest.approx(once.valid_rows[-1]["loss"], rel=tolerance)
    assert once.train_rows[-1]["loss"] < once.train_rows[0]["loss"] - 0.1  # it is not all the same anyhow


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_overfits_a_short_text(tmp_path: Path, architecture: str) -> None:
    ids = np.random.default_rng(0).permutation(300)[: 2 * SEQ_LEN].astype(np.uint16)  # no id twice
    data = {"train": token_file(ids), "valid": token_file(ids)}
    config = configure(
        {"architecture": architecture}, max_steps=150, learning_rate=0.02, log_interval=150, eval_interval=150
    )
    state = run_loop(config, tmp_path, data=data)
    assert state.train_rows[-1]["loss"] < 0.1
    assert state.valid_rows[-1]["loss"] < 0.2


def test_dropout_masks_depend_on_seed_and_step_alone(tmp_path: Path) -> None:
    def first_loss(seed: int, step: int, noise: int) -> float:
        config = configure({"dropout": 0.5}, seed=seed)
        state = new_state(configure({"dropout": 0.5}, seed=1), CPU)  # the same weights for all
        state.step = step
        torch.manual_seed(noise)
        x, y = batch(streams()["train"].ids, seed=1, step=0, batch_size=4, seq_len=SEQ_LEN)

        def loss_function(ids: Tensor, targets: Tensor) -> Tensor:  # the same batch for all
            logits, _ = state.model(torch.from_numpy(x))
            return F.cross_entropy(logits.flatten(0, 1), torch.from_numpy(y).flatten())

        return train_step(config, state, streams()["train"], loss_function)[0]

    assert first_loss(1, 5, noise=1) == first_loss(1, 5, noise=2)
    found = [first_loss(seed, step, noise=1) for seed in (1, 2, 3) for step in (0, 1, 2)]
    assert len(set(found)) == 9


def test_validation_scores_the_whole_split_without_dropout(tmp_path: Path) -> None:
    config = configure({"dropout": 0.5}, batch_size=3)
    state = new_state(config, CPU)
    state.model.train()
    ids = chain(2, 100)
    validate(config, state, token_file(ids), Tracker())
    total = 0.0
    model = SmallGPT(**config.model.model_dump()).eval().requires_grad_(False)
    model.load_state_dict(state.model.state_dict())
    for target in range(1, len(ids)):  # one token at a time, from the start of its window
        start = (target - 1) // SEQ_LEN * SEQ_LEN
        logits, _ = model(torch.from_numpy(ids[start:target].astype(np.int64))[None])
        total -= float(F.log_softmax(logits[0, -1], dim=-1)[int(ids[target])])
    assert state.valid_rows == [{"step": 0, "loss": pytest.approx(total / 99, rel=1e-6)}]
    assert state.model.training


def test_best_weights_are_those_of_the_lowest_validation_loss(tmp_path: Path) -> None:
    snapshots: dict[int, dict[str, Tensor]] = {}

    def watch(metrics: dict[str, float], step: int) -> None:
        if "valid/loss" in metrics:
            snapshots[step] = copy(state.model.state_dict())

    # On a text with the same ids in an order of its own the loss first falls and then rises.
    data = streams() | {"valid": token_file(np.random.default_rng(0).permutation(chain(2, 100)))}
    config = configure(max_steps=60, eval_interval=5, learning_rate=0.02)
    state = new_state(config, CPU)
    run_loop(config, tmp_path, state=state, tracker=Watcher(watch), data=data)
    curve = {row["step"]: row["loss"] for row in state.valid_rows}
    assert list(curve) == list(range(0, 61, 5))
    best = min(curve, key=lambda step: curve[step])
    assert 0 < best < 60
    assert (state.best_step, state.best_loss) == (best, curve[best])
    assert same(state.best, snapshots[best])
    assert same(state.weights(), snapshots[60])


@pytest.mark.parametrize("decay", [0.5, 0.97])
def test_moving_average(tmp_path: Path, decay: float) -> None:
    weights: list[dict[str, Tensor]] = []
    averages: list[dict[str, Tensor]] = []

    def watch(metrics: dict[str, float], step: int) -> None:
        if "train/loss" in metrics:
            weights.append(copy(state.model.state_dict()))
            averages.append(copy(state.ema))

    config = configure(max_steps=12, ema_decay=decay, learning_rate=0.02)
    state = new_state(config, CPU)
    expected = {name: value.double() for name, value in state.model.state_dict().items()}
    run_loop(config, tmp_path, state=state, tracker=Watcher(watch))
    for step in range(12):
        share = min(decay, (1 + step) / (10 + step))
        for name in expected:
            expected[name] = share * expected[name] + (1 - share) * weights[step][name].double()
            torch.testing.assert_close(averages[step][name].double(), expected[name], rtol=1e-5, atol=1e-7)
    # The average is what is validated and kept, and training goes on from the weights themselves.
    assert same(state.weights(), averages[-1])
    assert state.best_step == 12
    assert same(state.best, averages[-1])
    assert same(state.model.state_dict(), weights[-1])
    again = new_state(configure(), CPU)
    again.model.load_state_dict(averages[-1])
    validate(configure(), again, streams()["valid"], Tracker())
    assert again.best_loss == state.valid_rows[-1]["loss"]


def test_without_an_average_the_weights_are_kept(tmp_path: Path) -> None:
    state = run_loop(configure(), tmp_path)
    assert state.ema == {}
    assert state.weights().keys() == state.model.state_dict().keys()


@pytest.mark.filterwarnings("error:Mismatch dtype")  # a norm of half precision with weights that are not
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(("architecture", "optimizer"), [("gpt2", "adamw"), ("gpt2", "muon"), ("qwen3", "muon")])
def test_half_precisions_train_on_the_cpu(tmp_path: Path, precision: str, architecture: str, optimizer: str) -> None:
    model = {"architecture": architecture}
    expected = run_loop(configure(model, optimizer=optimizer), tmp_path / "fp32")
    state = run_loop(configure(model, optimizer=optimizer, precision=precision), tmp_path / precision)
    assert {parameter.dtype for parameter in state.model.parameters()} == {torch.float32}
    found = [row["loss"] for row in state.train_rows]
    assert found == pytest.approx([row["loss"] for row in expected.train_rows], rel=5e-3)
    assert found != [row["loss"] for row in expected.train_rows]
    norms = [row["gradient_norm"] for row in state.train_rows]
    assert norms == pytest.approx([row["gradient_norm"] for row in expected.train_rows], rel=0.05)
    assert state.scaler.is_enabled() == (precision == "fp16")


def infinite_gradient(state: Any) -> Any:
    """A loss of exactly 0 whose gradient is infinite."""
    parameter = next(state.model.parameters())
    return lambda ids, targets: (parameter - parameter.detach()).abs().pow(0.5).sum() + 0 * parameter.sum()


@pytest.mark.parametrize("poison", ["weight", "gradient"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stops_before_an_update_that_is_not_finite(optimizer: str, poison: str) -> None:
    config = configure(optimizer=optimizer, ema_decay=0.9)
    state = new_state(config, CPU)
    state.step = 4
    loss_function = compiled(state.model, config)
    if poison == "weight":
        with torch.no_grad():
            state.model.h[1].mlp.up.weight[3, 3] = float("nan")
    else:
        loss_function = infinite_gradient(state)
    before, average = copy(state.model.state_dict()), copy(state.ema)
    with pytest.raises(FloatingPointError, match=r"^step 5: the loss is .* the weights were not updated\. Lower train"):
        train_step(config, state, streams()["train"], loss_function)
    after = state.model.state_dict()
    assert all(torch.equal(value.nan_to_num(7), after[name].nan_to_num(7)) for name, value in before.items())
    assert same(state.ema, average)
    assert all(not optimizer.state for optimizer in state.optimizers)


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_fp16_overflow_skips_the_whole_step(clip: float) -> None:
    config = configure(optimizer="muon", precision="fp16", gradient_clip=clip)
    state = new_state(config, CPU)
    loss_function = compiled(state.model, config)
    train_step(config, state, streams()["train"], loss_function)  # fills the optimizers' moments
    before = copy(state.model.state_dict())
    scale = state.scaler.get_scale()
    # Only the embedding, AdamW's, overflows; Muon's matrices must stay as well.
    loss, norm, _ = train_step(config, state, streams()["train"], infinite_gradient(state))
    assert (loss, math.isfinite(norm)) == (0.0, False)
    assert same(state.model.state_dict(), before)
    assert state.scaler.get_scale() == scale / 2
    _, norm, _ = train_step(config, state, streams()["train"], loss_function)
    assert math.isfinite(norm)
    assert not same(state.model.state_dict(), before)


def test_a_learning_rate_far_too_high_stops_the_run(tmp_path: Path) -> None:
    snapshots: list[dict[str, Tensor]] = []

    def watch(metrics: dict[str, float], step: int) -> None:
        snapshots.append(copy(state.model.state_dict()))

    config = configure(learning_rate=1e20, warmup_steps=0, eval_interval=100)
    state = new_state(config, CPU)
    with pytest.raises(FloatingPointError, match=r"^step 2: the loss is (nan|inf)"):
        run_loop(config, tmp_path, state=state, tracker=Watcher(watch))
    assert same(state.model.state_dict(), snapshots[-1])
    assert state.step == 1
    assert state.best_step == 0


def test_a_validation_that_is_not_finite_stops_the_run(tmp_path: Path) -> None:
    config = configure(learning_rate=1e20, warmup_steps=0, eval_interval=1)
    state = new_state(config, CPU)
    with pytest.raises(FloatingPointError, match=r"^step 1: the validation loss is (nan|inf)\. Lower training\.l"):
        run_loop(config, tmp_path, state=state)
    assert [row["step"] for row in state.valid_rows] == [0]
    assert list(tmp_path.glob("state-*")) == []


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_between_two_steps_with_the_state_saved(tmp_path: Path, signum: signal.Signals) -> None:
    def watch(metrics: dict[str, float], step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signum)

    before = signal.getsignal(signum)
    config = configure(checkpoint_interval=100, eval_interval=100)
    state = new_state(config, CPU)
    expected = f"^stopped by {signum.name} after step 5; the same command goes on from there$"
    with pytest.raises(StoppedError, match=expected) as caught:
        run_loop(config, tmp_path, state=state, tracker=Watcher(watch))
    assert caught.value.signum == signum
    assert state.step == 5
    assert [path.name for path in tmp_path.glob("state-*")] == ["state-000000005"]
    assert signal.getsignal(signum) is before


@pytest.mark.parametrize(("pressed", "step"), [(True, 0), (False, 0), (True, 2)])
def test_an_error_in_the_first_step_is_the_signals_where_there_was_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pressed: bool, step: int
) -> None:
    steps = iter(range(9))

    def compiled_for_a_while(model: SmallGPT, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
        eager = compiled(model, config)

        def loss_function(ids: Tensor, targets: Tensor) -> Tensor:
            if next(steps) < step:
                return eager(ids, targets)
            if pressed:
                os.kill(os.getpid(), signal.SIGINT)
            raise RuntimeError("g++ was stopped")

        return loss_function

    monkeypatch.setattr("smallgpt.loop.compiled", compiled_for_a_while)
    stopped = pressed and step == 0
    expected = "^stopped by SIGINT after step 0; the same" if stopped else r"^g\+\+ was stopped$"
    with pytest.raises(StoppedError if stopped else RuntimeError, match=expected):
        run_loop(configure(), tmp_path)


@pytest.mark.slow
def test_ctrl_c_while_the_step_is_compiled(tmp_path: Path, tokenizer: Tokenizer) -> None:
    write_project(tmp_path, configure(compile=True), tokenizer)
    command = [sys.executable, "-m", "stages.train"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    # Ctrl-C in a terminal goes to a process and to all that it started.
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True
    )

    def compiles_a_kernel() -> bool:
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended
                if child.name() == "cc1plus" and any(word.endswith(".main.cpp") for word in child.cmdline()):
                    return True
        return False

    wait_for(compiles_a_kernel, process)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 130
    assert stderr.splitlines()[-1] == "error: stopped by SIGINT after step 0; the same command goes on from there"
    assert "Traceback" not in stderr


def test_second_signal_stops_at_once() -> None:
    with stop_signals() as received:
        os.kill(os.getpid(), signal.SIGTERM)
        assert received == [signal.SIGTERM]
        with pytest.raises(StoppedError, match="stopped at once by a second SIGTERM") as caught:
            os.kill(os.getpid(), signal.SIGTERM)
        assert caught.value.signum == signal.SIGTERM  # exit code 143
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    try:
        with stop_signals() as received:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
            assert received == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_signals_are_left_alone_outside_the_main_thread() -> None:
    seen: list[Any] = []

    def work() -> None:
        with stop_signals() as received:
            seen.extend([received, signal.getsignal(signal.SIGTERM)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[], signal.SIG_DFL]


def test_compiles_only_where_told_and_able(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    asked: list[Any] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: asked.append(function) or function)
    model = new_state(configure(), CPU).model
    compiled(model, configure(compile=False, max_steps=1000))
    compiled(model, configure(compile="auto", max_steps=199))
    assert (len(asked), caplog.text) == (0, "")
    compiled(model, configure(compile=True, max_steps=2))
    assert len(asked) == 1
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    compiled(model, configure(compile="auto", max_steps=200))
    assert len(asked) == 2
    (tmp_path / "g++").unlink()
    compiled(model, configure(compile="auto", max_steps=200))
    assert len(asked) == 2
    assert "training is not compiled: no C++ compiler found" in caplog.text
    with pytest.raises(ValueError, match=r"training\.compile is true, but no C\+\+ compiler was found; install g\+\+"):
        compiled(model, configure(compile=True))


@pytest.mark.slow
def test_compiled_equals_eager(tmp_path: Path) -> None:
    shape = {"architecture": "llama", "num_layers": 1}
    eager = losses(configure(shape), tmp_path / "eager")
    found = losses(configure(shape, compile=True), tmp_path / "compiled")
    assert found == pytest.approx(eager, rel=1e-5)


def test_speed_is_written_beside_the_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("smallgpt.loop.time.perf_counter", lambda: now[0])
    speed = Speed(tmp_path / "speed.csv", tokens_per_step=100, step=0)
    now[0] += 5.0
    assert speed.measure(10)["tokens_per_second"] == 200
    with speed.paused():
        now[0] += 60.0
    now[0] += 1.0
    assert speed.measure(12)["tokens_per_second"] == 200
    assert speed.measure(13)["peak_memory_mib"] > 10
    resumed = Speed(tmp_path / "speed.csv", tokens_per_step=100, step=50)  # adds to the file
    now[0] += 2.0
    assert resumed.measure(60)["tokens_per_second"] == 500
    lines = (tmp_path / "speed.csv").read_text().splitlines()
    assert lines[0] == "step,tokens_per_second,peak_memory_mib"
    assert [line.split(",")[0] for line in lines[1:]] == ["10", "12", "13", "60"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="only glibc has these settings")
def test_freed_memory_stays_with_the_process() -> None:
    """Pages of a large tensor are not cleared again for the next one: counted as page faults, in a process apart."""
    code = """
import resource, sys, torch
from smallgpt.loop import set_up_process
if sys.argv[1] == "kept":
    set_up_process(1)
for _ in range(12):  # glibc reuses the first ones only after some rounds
    torch.ones(2**24).sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**24).sum()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    kept, returned = (
        int(subprocess.check_output([sys.executable, "-c", code, word], env=os.environ | {"PYTHONPATH": str(ROOT)}))
        for word in ("kept", "returned")
    )
    assert kept < 100 <= 1000 < returned


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="only glibc has these settings")
def test_unused_memory_is_returned_once_everything_is_compiled() -> None:
    """Resident MiB after each call of a compiled loss, 200 MiB of small objects in a cycle being freed in the first."""
    code = """
import gc, torch
from smallgpt.config import parse_config
from smallgpt.loop import compiled, set_up_process
from smallgpt.model import SmallGPT

def resident():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) // 1024 for line in lines if line.startswith("VmRSS"))

def compile(function, **_):
    def first_leaves_objects(*arguments):
        global kept
        if kept is None:
            garbage = [bytes(1000) for _ in range(200_000)]
            kept = bytes(1000)  # behind them, so that they are not at the end of the heap
            garbage.append(garbage)
        return function(*arguments)
    return first_leaves_objects

gc.disable()
set_up_process(1)
torch.compile, kept = compile, None
shape = {"vocab_size": 300, "embed_dim": 32, "num_heads": 2, "num_layers": 1, "max_seq_len": 16}
config = parse_config({"model": shape, "training": {"compile": True, "precision": "fp32"}}, "a test")
loss_function = compiled(SmallGPT(**config.model.model_dump()), config)
for _ in range(3):
    loss_function(torch.zeros(1, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)).backward()
    print(resident())
"""
    output = subprocess.check_output([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(ROOT)})
    first, second, third = (int(line) for line in output.split())
    assert second < first - 150
    assert abs(third - second) < 50
