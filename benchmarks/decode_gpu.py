"""Decoding speed on a GPU: our PyTorch model, compiled over a cache of fixed size, Transformers, and the fp16 bundle
with each of ONNX Runtime's kernels for attention.

    python benchmarks/decode_gpu.py [--shape gpt2] [--bundle exports/fp16] [--device cuda] [--rounds 5] [--steps 400]
                                    [--out reports/bench/gpu-decode.json]

The weights are random, which changes no time; a bundle must have the shape. All decode greedily in float16, on a CPU in
float32, and take turns; the first turn, in which the compilers work, does not count. What cannot run is named with its
reason and left out. Writes a Markdown table beside the JSON, after every round.
"""

import argparse
import functools
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train import SHAPES

from smallgpt.cli import cores, run
from smallgpt.files import write_atomic, write_json
from smallgpt.interop import save_transformers
from smallgpt.machine import describe_machine, pick_device
from smallgpt.model import SmallGPT

BATCHES = (1, 8, 64)
PROMPT, LONG = 16, 512  # tokens
# ONNX Runtime's attention kernels, by the variables that it reads while a session opens; first its own choice.
KERNELS: dict[str, dict[str, str]] = {
    "ours": {},
    "ours, XQA": {"ORT_ENABLE_XQA": "1"},
    "ours, Flash": {"ORT_ENABLE_XQA": "0", "ORT_ENABLE_CUDNN_FLASH_ATTENTION": "0"},
    "ours, cuDNN": {"ORT_ENABLE_XQA": "0", "ORT_ENABLE_CUDNN_FLASH_ATTENTION": "1"},
}


class Contender(Protocol):
    """What is timed; see `engines.Engine`."""

    def first_token(self, ids: np.ndarray, capacity: int) -> float: ...
    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float: ...


class Static(nn.Module):
    """A model with a cache of fixed size: each step has the same shapes and addresses, as a CUDA graph needs them."""

    keys: Tensor
    values: Tensor

    def __init__(self, model: SmallGPT, batch: int, capacity: int) -> None:
        super().__init__()
        self.model, c, weight = model, model.config, model.wte.weight
        for name in ("keys", "values"):
            cache = weight.new_zeros((c.num_layers, batch, c.kv_heads, capacity, c.head_dim))
            self.register_buffer(name, cache, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        """Logits (B, V) after ids (B, T) at positions (T,); earlier ones must be in the cache."""
        model, rotary = self.model, None
        x = model.wte(ids)  # (B, T, D)
        if model.wpe is not None:
            x = x + model.wpe(positions)
        else:
            rotary = (model.cos[positions], model.sin[positions])
        mask = torch.arange(self.keys.shape[3], device=ids.device) <= positions[:, None]  # (T, capacity)
        grouped = model.config.kv_heads != model.config.num_heads
        for keys, values, block in zip(self.keys, self.values, model.h, strict=True):
            q, k, v = block.attn.project(block.ln_1(x), rotary)
            keys.index_copy_(2, positions, k)
            values.index_copy_(2, positions, v)
            y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, enable_gqa=grouped)  # (B, H, T, d)
            x = x + block.attn.proj(y.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
        return F.linear(model.ln_f(x[:, -1]), model.wte.weight)


class Compiled:
    """Our model in PyTorch; a step is compiled, into a CUDA graph where there is a GPU, and so is the choice."""

    def __init__(self, model: SmallGPT, device: torch.device, *, compiled: bool = True) -> None:
        self.compiled = compiled
        self.model, self.device = model.to(device, torch.float16 if device.type == "cuda" else torch.float32), device
        self.mode = "reduce-overhead" if device.type == "cuda" else "default"
        self.positions = torch.arange(model.config.max_seq_len, device=device)
        self.made: dict[tuple[int, int], tuple[Static, Callable[[Tensor, Tensor], Tensor]]] = {}

    @torch.inference_mode()
    def prefill(self, ids: np.ndarray, batch: int, capacity: int) -> Tensor:
        """Feed one prompt to `batch` sequences and make `step` theirs; their next ids (B, 1)."""
        if (batch, capacity) not in self.made:
            static = Static(self.model, batch, capacity)

            def step(token: Tensor, position: Tensor) -> Tensor:
                return static(token, position).argmax(-1, keepdim=True)

            self.made[batch, capacity] = static, torch.compile(step, mode=self.mode) if self.compiled else step
        static, self.step = self.made[batch, capacity]
        prompt = torch.from_numpy(np.tile(ids, (batch, 1))).to(self.device)
        return static(prompt, self.positions[: len(ids)]).argmax(-1, keepdim=True)

    def first_token(self, ids: np.ndarray, capacity: int) -> float:
        start = time.perf_counter()
        self.prefill(ids, 1, capacity).tolist()
        return time.perf_counter() - start

    @torch.inference_mode()
    def decode(self, ids: np.ndarray, batch: int, steps: int, capacity: int) -> float:
        token = self.prefill(ids, batch, capacity)
        token = self.step(token, self.positions[len(ids) : len(ids) + 1]).clone()
        token.tolist()
        start = time.perf_counter()
        for i in range(len(ids) + 1, len(ids) + 1 + steps):
            token = self.step(token, self.positions[i : i + 1]).clone()  # a graph's output is overwritten by the next
        token.tolist()
        return time.perf_counter() - start

    @torch.inference_mode()
    def text(self, ids: np.ndarray, count: int, capacity: int) -> list[int]:
        tokens = [self.prefill(ids, 1, capacity)]
        for i in range(len(ids), len(ids) + count - 1):
            tokens.append(self.step(tokens[-1], self.positions[i : i + 1]).clone())
        return [int(token) for token in torch.cat(tokens)]


def agreement(model: SmallGPT, device: torch.device, ids: np.ndarray, count: int = 32) -> str:
    """How many greedy ids the compiled steps choose as the same steps do uncompiled, before the first other one."""
    texts = [Compiled(model, device, compiled=kind).text(ids, count, len(ids) + count) for kind in (True, False)]
    same = next((i for i, (one, other) in enumerate(zip(*texts, strict=True)) if one != other), count)
    return f"{same} of {count}"


def contenders(
    model: SmallGPT, device: torch.device, bundle: Path | None
) -> tuple[dict[str, Contender], dict[str, str]]:
    """All that can run here, and why the others cannot."""
    import engines

    def transformers() -> Contender:
        with tempfile.TemporaryDirectory() as folder:
            save_transformers(model, folder)
            kind = "float16" if device.type == "cuda" else "float32"
            return engines.Transformers(Path(folder), cores(), kind, device.type)

    def ours(variables: dict[str, str]) -> Contender:
        assert bundle is not None
        with mock.patch.dict(os.environ, variables):
            return engines.Ours(bundle, cores(), device=device.type)

    makers: dict[str, Any] = {name: functools.partial(ours, kernel) for name, kernel in KERNELS.items() if bundle}
    makers |= {"PyTorch, compiled": lambda: Compiled(model, device), "Transformers": transformers}
    found: dict[str, Contender] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        try:
            found[name] = make()
        except Exception as error:
            failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
    return found, failed


def measure(contender: Contender, ids: np.ndarray, steps: int) -> dict[str, float]:
    """Seconds to the first token of a long prompt and tokens per second by batch."""
    long = ids[: min(LONG, len(ids) - 1)]
    result = {f"first token, prompt {len(long)}": contender.first_token(long, len(ids))}
    for batch in BATCHES:
        seconds = contender.decode(ids[:PROMPT], batch, steps, PROMPT + steps + 2)
        result[f"batch {batch}, context {PROMPT}-{PROMPT + steps}"] = batch * steps / seconds
    return result


def to_markdown(report: dict[str, Any]) -> str:
    """The medians, and the ratio of the first contender to the best that is not ours, above 1 where it is faster."""
    shape, cells = report["model"], report["median"]
    lines = [
        f"{shape['architecture']}, {shape['num_layers']} layers of {shape['embed_dim']}, vocabulary "
        f"{shape['vocab_size']}, {report['precision']}, on {report['machine']}; torch {report['torch']}, medians of "
        f"{report['rounds']} rounds, tokens/s unless said. Greedy ids that PyTorch chooses compiled as uncompiled: "
        f"{report['greedy ids, compiled as uncompiled']}.",
        "",
        f"| | {' | '.join(cells)} | the first to the best other |",
        "|---" + "|---:" * (len(cells) + 1) + "|",
    ]
    for row in next(iter(cells.values()), {}):
        first, *rest = cells
        others = [cells[name][row] for name in rest if not name.startswith("ours")]
        less = row.startswith("first")
        best = cells[first][row]
        ratio = f"{min(others) / best if less else best / max(others):.2f}" if others else ""
        shown = [f"{cell[row] * 1000:.2f} ms" if less else f"{cell[row]:,.0f}" for cell in cells.values()]
        lines.append(f"| {row} | {' | '.join(shown)} | {ratio} |")
    lines += ["", *(f"Not measured: {name} ({reason})." for name, reason in report["failed"].items())]
    return "\n".join(lines).rstrip() + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="gpt2")
    parser.add_argument("--bundle", type=Path, help="an fp16 bundle of that shape, for onnxruntime with CUDA")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=400, help="tokens of a text (default: 400)")
    parser.add_argument("--out", type=Path, default=Path("reports/bench/gpu-decode.json"))
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds is {options.rounds}; it must be at least 1")
    device, shape = pick_device(options.device, "--device"), SHAPES[options.shape][0]
    torch.manual_seed(0)
    model = SmallGPT(**shape, dropout=0.0).eval()
    context = model.config.max_seq_len
    if PROMPT + options.steps + 2 > context:
        parser.error(f"--steps is {options.steps}; with the prompt of {PROMPT} at most {context - PROMPT - 2} fit")
    ids = np.random.default_rng(0).integers(4, shape["vocab_size"], context)
    running, failed = contenders(model, device, options.bundle)
    try:
        same = agreement(model, device, ids[:PROMPT], min(32, options.steps))
    except Exception as error:
        same = " ".join(f"none ({type(error).__name__}: {error})".split())[:300]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in running}
    for number in range(options.rounds + 1):
        for name in [*running] if number % 2 else reversed([*running]):
            try:
                for row, value in measure(running[name], ids, options.steps).items():
                    found[name].setdefault(row, []).append(value)
            except Exception as error:
                failed[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
                del running[name], found[name]
        print(f"round {number} of {options.rounds}", file=sys.stderr)
        if number == 0 and running:
            continue
        # After every round: what a call that runs out of time has measured is kept.
        report = {
            "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine(),
            "torch": torch.__version__,
            "precision": "fp16" if device.type == "cuda" else "fp32",
            "model": model.config.model_dump(),
            "greedy ids, compiled as uncompiled": same,
            "rounds": number,
            "median": {
                name: {row: statistics.median(values[1:]) for row, values in rows.items()}
                for name, rows in found.items()
            },
            "all": found,
            "failed": failed,
        }
        write_json(options.out, report)
        write_atomic(options.out.with_suffix(".md"), to_markdown(report))
    print(to_markdown(report))
    return int(not running)


if __name__ == "__main__":
    run(main)
