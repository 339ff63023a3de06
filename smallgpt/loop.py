"""The training loop: deterministic, stopped between two steps, and never updated with a number that is not finite."""

import ctypes
import gc
import logging
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from smallgpt.cli import StoppedError
from smallgpt.config import Config, TrainingConfig
from smallgpt.distributed import Ranks
from smallgpt.model import SmallGPT, next_token_loss
from smallgpt.optim import set_learning_rate
from smallgpt.score import score_stream
from smallgpt.state import TrainState, save_state
from smallgpt.tokens import TokenFile, batch
from smallgpt.tracking import Tracker

log = logging.getLogger(__name__)

ALONE = Ranks()
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4  # of malloc.h
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def loop(
    config: Config,
    state: TrainState,
    data: dict[str, TokenFile],
    folder: Path,
    tracker: Tracker,
    ranks: Ranks = ALONE,
) -> None:
    """Run the steps that are left; only the first of several processes validates and writes. Raises as `train`."""
    settings, begun = config.training, state.step
    rest = "the same command goes on from there" if settings.resume == "auto" else "with resume: never it starts anew"
    loss_function = compiled(state.model, config)
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * config.seq_len
    quiet = None if ranks.first else True  # None: quiet unless stderr is a terminal
    bar = tqdm(total=settings.max_steps, initial=state.step, unit="step", desc="train", disable=quiet, mininterval=0.5)
    with stop_signals() as received, bar:
        if state.step == 0 and ranks.first:
            validate(config, state, data["valid"], tracker)
        speed = Speed(folder / "speed.csv" if ranks.first else None, tokens_per_step, state.step)
        while state.step < settings.max_steps:
            try:
                loss, norm, rate = train_step(config, state, data["train"], loss_function, ranks)
            except Exception:
                # In the first step Ctrl-C has reached the compiler too, and there is nothing to save.
                if not received or state.step != begun:
                    raise
                name = signal.Signals(received[0]).name
                raise StoppedError(f"stopped by {name} after step {state.step}; {rest}", received[0]) from None
            state.step += 1
            step, last = state.step, state.step == settings.max_steps
            if step % settings.log_interval == 0 or last:
                row = {"step": step, "loss": loss, "learning_rate": rate, "gradient_norm": norm}
                state.train_rows.append(row)
                measured = speed.measure(step)
                tracker.log_metrics({f"train/{k}": v for k, v in {**row, **measured}.items() if k != "step"}, step)
                bar.set_postfix_str(f"loss {loss:.3f}, {measured['tokens_per_second']:,.0f} tokens/s")
            bar.update()
            if (step % settings.eval_interval == 0 or last) and ranks.first:
                with speed.paused():
                    validate(config, state, data["valid"], tracker)
            stopped = ranks.largest(received[0] if received else 0)  # all stop after the same step
            if (stopped or (step % settings.checkpoint_interval == 0 and not last)) and ranks.first:
                with speed.paused():
                    save_state(folder, state)
            if stopped:
                ranks.wait()  # the first process to end may take the others with it
                name = signal.Signals(stopped).name
                raise StoppedError(f"stopped by {name} after step {step}; {rest}", stopped)


def train_step(
    config: Config,
    state: TrainState,
    data: TokenFile,
    loss_function: Callable[[Tensor, Tensor], Tensor],
    ranks: Ranks = ALONE,
) -> tuple[float, float, float]:
    """One update; returns the loss in nats per token, the gradient norm before clipping and the learning rate.

    Each process takes its share of the rows of every batch.
    """
    settings = config.training
    device = next(state.model.parameters()).device
    micro_steps = settings.gradient_accumulation_steps
    total = torch.zeros((), device=device)
    rows = settings.batch_size // ranks.size
    for micro in range(micro_steps):
        index = (state.step * micro_steps + micro) * ranks.size + ranks.rank
        x, y = batch(data.ids, seed=settings.seed, step=index, batch_size=rows, seq_len=config.seq_len)
        # Dropout's masks depend on (seed, micro-step, rank) alone, so a resumed run draws the same ones. Hashed into
        # 32 bits: PyTorch's CPU generator reads no more of a seed.
        torch.manual_seed(int(np.random.SeedSequence([settings.seed, index]).generate_state(1)[0]))
        loss = loss_function(torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)) / micro_steps
        state.scaler.scale(loss).backward()
        total += loss.detach()
    total = ranks.average(state.model, total)
    for optimizer in state.optimizers:
        state.scaler.unscale_(optimizer)
    parameters = list(state.model.parameters())
    clip = settings.gradient_clip or float("inf")
    norm = torch.nn.utils.clip_grad_norm_(parameters, clip)
    # With fp16 a step whose gradients overflowed is skipped, by all optimizers, and the scaler lowers its scale; the
    # loss must be finite anyhow.
    overflow = not torch.isfinite(norm)
    if not torch.isfinite(total) or (overflow and not state.scaler.is_enabled()):
        raise FloatingPointError(
            f"step {state.step + 1}: the loss is {total.item()} and the gradient norm {norm.item()}; the weights were "
            "not updated. Lower training.learning_rate, raise warmup_steps or use precision bf16"
        )
    rate = set_learning_rate(state.optimizers, settings, state.step)
    for optimizer in () if overflow else state.optimizers:
        state.scaler.step(optimizer)
    state.scaler.update()
    state.model.zero_grad(set_to_none=True)
    if state.ema:
        # Short at first, so that the average does not remember the initial weights.
        decay = min(settings.ema_decay, (1 + state.step) / (10 + state.step))
        current = state.model.state_dict()
        torch._foreach_lerp_(list(state.ema.values()), [current[name] for name in state.ema], 1 - decay)
    return total.item(), norm.item(), rate


def set_up_process(threads: int) -> None:
    """CPU threads, deterministic results, and memory that stays with the process until it ends."""
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # It only shows errors of PyTorch, and takes 3 % of an eager step.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    # glibc gives every large tensor back to the system when it is freed, and has the next one's pages cleared again.
    for name, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 2**26)):
        glibc("mallopt", name, value)


def return_memory() -> None:
    """Give unused memory to the system once: what compiling leaves is too scattered for large tensors."""
    gc.collect()
    glibc("malloc_trim", 0)


def glibc(function: str, *arguments: int) -> None:
    """Call a function that only glibc has; elsewhere nothing happens."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found:
        found(*arguments)


def pick_compile(settings: TrainingConfig) -> bool:
    """Whether to compile: `auto` does where there is a C++ compiler and enough steps.

    Raises ValueError when it must and cannot.
    """
    if settings.compile is False:
        return False
    if not any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++")):
        if settings.compile is True:
            raise ValueError(
                "training.compile is true, but no C++ compiler was found; install g++ or set compile to auto"
            )
        log.info("training is not compiled: no C++ compiler found (install g++ to train faster)")
        return False
    return settings.compile is True or settings.max_steps >= 200  # with fewer it takes longer than it saves


def compiled(model: SmallGPT, config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of (ids, targets), both (B, T); compiled as training.compile says."""
    settings = config.training
    device = next(model.parameters()).device.type

    def loss_function(ids: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(device, dtype=DTYPES[settings.precision], enabled=settings.precision != "fp32"):
            logits, _ = model(ids)
        return next_token_loss(logits, targets)

    model.train()
    if not pick_compile(settings):
        return loss_function
    # PyTorch's own generator for dropout: on a CPU the compiler's draws one number at a time.
    fast_function = torch.compile(loss_function, options={"fallback_random": True})
    calls = count()

    def after_compiling(ids: Tensor, targets: Tensor) -> Tensor:
        if next(calls) == 1:  # the first call and its way back have compiled everything
            return_memory()
        return fast_function(ids, targets)

    return after_compiling


def validate(config: Config, state: TrainState, data: TokenFile, tracker: Tracker) -> None:
    """Score the whole valid split and keep the weights if they are the best so far."""
    current = {name: value.clone() for name, value in state.model.state_dict().items()} if state.ema else None
    if current:
        state.model.load_state_dict(state.ema)
    precision = config.training.precision
    scores = score_stream(
        state.model,
        data.ids,
        context=config.seq_len,
        stride=config.seq_len,
        batch_size=config.training.batch_size,
        autocast=None if precision == "fp32" else DTYPES[precision],
    )
    if current:
        state.model.load_state_dict(current)
    loss = float(scores.nats.mean())
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"step {state.step}: the validation loss is {loss}. Lower training.learning_rate or raise warmup_steps"
        )
    state.valid_rows.append({"step": state.step, "loss": loss})
    tracker.log_metrics({"valid/loss": loss}, state.step)
    if loss < state.best_loss:
        state.best_loss, state.best_step = loss, state.step
        state.best = {name: value.clone() for name, value in state.weights().items()}


class Speed:
    """Tokens per second and memory, kept out of the reproducible outputs: a CSV in the work folder and MLflow."""

    def __init__(self, path: Path | None, tokens_per_step: int, step: int) -> None:
        self.path, self.tokens_per_step, self.step = path, tokens_per_step, step
        self.start = time.perf_counter()
        if path and not path.exists():
            path.write_text("step,tokens_per_second,peak_memory_mib\n", encoding="utf-8")

    def measure(self, step: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (step - self.step) * self.tokens_per_step / max(now - self.start, 1e-9)
        self.step, self.start = step, now
        memory = peak_memory_mib()
        if self.path:
            with suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk ends no training here
                file.write(f"{step},{rate:.1f},{memory:.1f}\n")
        return {"tokens_per_second": rate, "peak_memory_mib": memory}

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time of the block."""
        begin = time.perf_counter()
        yield
        self.start += time.perf_counter() - begin


def peak_memory_mib() -> float:
    """Peak memory of the process, or of the CUDA device if one is in use, in MiB."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM into a list, so that the loop stops between two steps; a second one stops at once."""
    received: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if received:
            raise StoppedError(f"stopped at once by a second {signal.Signals(signum).name}", signum)
        received.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    heeded = [name for name in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(name) != signal.SIG_IGN]
    old = {name: signal.signal(name, handler) for name in heeded}  # a job in the background ignores Ctrl-C
    try:
        yield received
    finally:
        for name, previous in old.items():
            signal.signal(name, previous)
