"""Training speed: our loop against Transformers' models in a plain loop, and against the machine's matrix products.

    python benchmarks/train.py --shape gpt2 --precision bf16            # all contenders, about 5 minutes on 2 cores
    python benchmarks/train.py --only ours --variant base,dropout,ema   # what the options cost
    python benchmarks/train.py --startup --mode compiled --only ours    # time to the first step, twice
    python benchmarks/train.py --profile --mode compiled --precision bf16    # the operators of our step

Every contender lives in a process of its own, so that peak memory is its own; after two warm-up steps they take turns,
one step each a round, and the median of the rounds counts. Same weights, batches, AdamW (fused, same groups),
clipping and precision for all. Results of several calls are merged into reports/bench/train.json, from which
reports/bench/train.md is written.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
LARGE = {"vocab_size": 10_000, "embed_dim": 512, "num_heads": 8, "num_layers": 6, "max_seq_len": 1024}
SMALL = {"vocab_size": 320, "embed_dim": 64, "num_heads": 4, "num_layers": 2, "max_seq_len": 64}
# Model, tokens in a sequence, sequences in a batch.
SHAPES: dict[str, tuple[dict[str, Any], int, int]] = {
    "gpt2": ({"architecture": "gpt2", **LARGE}, 256, 16),
    "llama": ({"architecture": "llama", **LARGE}, 256, 16),
    "default": (
        {**LARGE, "architecture": "llama", "vocab_size": 2048, "embed_dim": 256, "num_heads": 4, "num_layers": 4},
        256,
        8,
    ),
    "tiny-gpt2": ({"architecture": "gpt2", **SMALL}, 32, 4),
    "tiny-llama": ({"architecture": "llama", **SMALL}, 32, 4),
}
# What differs from AdamW without dropout on the shape's batch; peers run the first three.
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "dropout": {"dropout": 0.2},
    "long": {"longer": 4},  # four times the sequence, a quarter of the batch
    "muon": {"optimizer": "muon"},
    "ema": {"ema_decay": 0.999},
    "accumulated": {"gradient_accumulation_steps": 6},
    "accumulated-muon": {"optimizer": "muon", "gradient_accumulation_steps": 6},
}
PEER_VARIANTS = ("base", "dropout", "long")


@dataclass(frozen=True)
class Job:
    """One contender: `system` is ours, peer or products (the bare matrix products of a step)."""

    system: str
    shape: str
    precision: str
    mode: str = "eager"
    variant: str = "base"
    seq_len: int = 0  # 0: the shape's
    batch_size: int = 0
    device: str = "cpu"
    threads: int = 0

    @property
    def model(self) -> dict[str, Any]:
        return {**SHAPES[self.shape][0], "dropout": VARIANTS[self.variant].get("dropout", 0.0)}

    @property
    def size(self) -> tuple[int, int]:
        """Tokens in a sequence, sequences in a batch."""
        _, seq_len, batch_size = SHAPES[self.shape]
        longer = VARIANTS[self.variant].get("longer", 1)
        return (self.seq_len or seq_len) * longer, (self.batch_size or batch_size) // longer

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.size[0] * self.size[1] * VARIANTS[self.variant].get("gradient_accumulation_steps", 1)

    @property
    def name(self) -> str:
        seq_len, batch_size = self.size
        return f"{self.shape} T={seq_len} B={batch_size} {self.precision} {self.mode} {self.variant} {self.system}"

    def products(self) -> list[tuple[int, int, int]]:
        """The linear layers of the model: (inputs, outputs, how many of them)."""
        from smallgpt.config import ModelConfig

        c = ModelConfig(**self.model)
        gates = 1 if c.architecture == "gpt2" else 2
        qkv = (c.num_heads + 2 * c.kv_heads) * c.head_dim
        layers = [(c.embed_dim, qkv), (c.embed_dim, c.embed_dim)]
        layers += [(c.embed_dim, gates * c.hidden_dim), (c.hidden_dim, c.embed_dim)]
        return [(*layer, c.num_layers) for layer in layers] + [(c.embed_dim, c.vocab_size, 1)]

    def flops(self) -> int:
        """Of one step's matrix products, forward and twice that backward; attention with its causal half."""
        linear = sum(inputs * outputs * count for inputs, outputs, count in self.products())
        attention = self.model["num_layers"] * self.model["embed_dim"] * self.size[0]
        return 6 * self.tokens * (linear + attention)


# ------------------------------------------------------------------------------------- the process of one contender


def worker(job: Job) -> None:
    """Answer each line `N` on stdin with the seconds a step took, the mean of N, and the peak memory."""
    out, sys.stdout = sys.stdout, sys.stderr  # libraries that print must not speak in between
    import torch

    from smallgpt.cli import processors

    begin = time.perf_counter()
    torch.set_num_threads(job.threads or processors())
    step = {"ours": our_step, "peer": peer_step, "products": products_step}[job.system](job)
    built = time.perf_counter()
    seconds = step()
    print(json.dumps({"build": built - begin, "first": time.perf_counter() - built}), file=out, flush=True)
    for line in sys.stdin:
        times = [step() for _ in range(int(line))]
        seconds = sum(times) / len(times)
        print(json.dumps({"seconds": seconds, "memory_mib": peak_memory()}), file=out, flush=True)


def peak_memory() -> float:
    from smallgpt.loop import peak_memory_mib

    return peak_memory_mib()


def timed(step: Callable[[], Any], device: str, times: int = 1) -> Callable[[], float]:
    """A function that runs `step` so many times and returns the mean seconds."""
    import torch

    def run() -> float:
        begin = time.perf_counter()
        for _ in range(times):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / times

    return run


def our_state(job: Job) -> Any:
    """The configuration, and a fresh training state of it."""
    import torch

    from smallgpt.config import parse_config
    from smallgpt.state import new_state

    variant = {k: v for k, v in VARIANTS[job.variant].items() if k not in ("dropout", "longer")}
    seq_len, batch_size = job.size
    training = {"batch_size": batch_size, "seq_len": seq_len, "precision": job.precision, "warmup_steps": 10}
    training |= {"compile": job.mode == "compiled", "device": job.device, **variant}
    config = parse_config({"model": job.model, "training": training}, "benchmarks/train.py")
    return config, new_state(config, torch.device(job.device))


def random_tokens(job: Job) -> Any:
    """A stream of 64 batches of ids that are hard to guess."""
    import numpy as np

    from smallgpt.tokens import TokenFile

    draw = np.random.Generator(np.random.Philox(1))
    ids = draw.integers(job.model["vocab_size"], size=64 * job.tokens).astype(np.uint16)
    return TokenFile(ids, 1, len(ids), len(ids), "", "", "")


def our_step(job: Job) -> Callable[[], float]:
    import torch

    from smallgpt.loop import compiled, set_up_process, train_step

    set_up_process(torch.get_num_threads())
    config, state = our_state(job)
    data, loss_function = random_tokens(job), compiled(state.model, config)

    def step() -> None:
        train_step(config, state, data, loss_function)
        state.step += 1

    return timed(step, job.device)


def peer_step(job: Job) -> Callable[[], float]:
    """GPT2LMHeadModel or LlamaForCausalLM with our weights, as a careful user would train it."""
    import torch
    import transformers

    from smallgpt.interop import to_transformers
    from smallgpt.loop import DTYPES
    from smallgpt.tokens import batch

    config, state = our_state(job)
    values, weights = to_transformers(state.model)
    kind = getattr(transformers, values["architectures"][0])
    with torch.device(job.device):
        model = kind(kind.config_class(**values, use_cache=False, attn_implementation="sdpa"))
    missing = model.load_state_dict({**weights}, strict=False)
    assert not missing.unexpected_keys, missing
    assert set(missing.missing_keys) <= {"lm_head.weight"}, missing
    model.tie_weights()
    model.train()
    del state
    settings, data = config.training, random_tokens(job)
    groups: tuple[list[Any], list[Any]] = ([], [])
    for parameter in model.parameters():
        groups[parameter.ndim < 2].append(parameter)
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": settings.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        fused=True,
    )

    def loss_function(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        with torch.autocast(job.device, dtype=DTYPES[job.precision], enabled=job.precision != "fp32"):
            logits = model(input_ids=x).logits
        return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), y.flatten())

    call = torch.compile(loss_function) if job.mode == "compiled" else loss_function
    count = 0

    def step() -> None:
        nonlocal count
        x, y = batch(data.ids, seed=1, step=count, batch_size=job.size[1], seq_len=job.size[0])
        loss = call(torch.from_numpy(x).to(job.device), torch.from_numpy(y).to(job.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.gradient_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()
        count += 1

    return timed(step, job.device)


def products_step(job: Job) -> Callable[[], float]:
    """Only the linear layers' three products each, at the model's shapes and precision; the machine's peak."""
    import torch

    from smallgpt.loop import DTYPES

    dtype, rows = DTYPES[job.precision], job.size[0] * job.size[1]
    repeats = 10 if job.device == "cuda" else 1  # else waiting for the device would count
    layers = [
        (torch.randn(rows, i, dtype=dtype), torch.randn(o, i, dtype=dtype), torch.randn(rows, o, dtype=dtype), count)
        for i, o, count in job.products()
    ]
    layers = [(x.to(job.device), w.to(job.device), g.to(job.device), count) for x, w, g, count in layers]

    def step() -> float:
        seconds = 0.0
        for x, w, g, count in layers:
            for product in (lambda x=x, w=w: x @ w.T, lambda g=g, w=w: g @ w, lambda g=g, x=x: g.T @ x):
                seconds += count * timed(product, job.device, repeats)()
        return seconds

    return step


# ------------------------------------------------------------------------------------------------- the coordination


class Contender:
    """A running worker process."""

    def __init__(self, job: Job, **environment: str) -> None:
        self.job = job
        inherited = os.environ | {"PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"} | environment
        command = [sys.executable, __file__, "--worker", json.dumps(asdict(job))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=inherited
        )
        self.answers: list[dict[str, float]] = []
        self.first = self._read()

    def _read(self) -> dict[str, float]:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.job.name}: the process ended with {self.process.wait()}; its message is above")
        return dict(json.loads(line))

    def run(self, steps: int) -> dict[str, float]:
        assert self.process.stdin
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return self._read()

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def measure(jobs: list[Job], rounds: int, per_round: int, cache: str) -> dict[str, dict[str, Any]]:
    """Results by name of jobs that take turns; `cache` is an empty folder for what is compiled."""
    contenders: list[Contender] = []
    try:
        for job in jobs:
            print(f"starting {job.name}", file=sys.stderr)
            contenders.append(Contender(job, TORCHINDUCTOR_CACHE_DIR=cache))
        for contender in contenders:
            contender.run(1)
        for number in range(rounds):
            for contender in contenders:
                answer = contender.run(per_round)
                contender.answers.append(answer)
                print(f"round {number + 1}: {contender.job.name} {answer['seconds']:.4f} s", file=sys.stderr)
    finally:
        for contender in contenders:
            contender.close()
    results = {}
    for contender in contenders:
        job, seconds = contender.job, [answer["seconds"] for answer in contender.answers]
        middle = statistics.median(seconds)
        flops = job.flops()
        if job.system == "products":
            flops = 6 * job.size[0] * job.size[1] * sum(i * o * count for i, o, count in job.products())
        results[job.name] = {
            **{key: value for key, value in asdict(job).items() if key not in ("seq_len", "batch_size")},
            "seq_len": job.size[0],
            "batch_size": job.size[1],
            "tokens_per_step": job.tokens,
            "seconds": [round(value, 5) for value in seconds],
            "tokens_per_second": round(job.tokens / middle, 1),
            "gflops": round(flops / middle / 1e9, 1),
            "peak_memory_mib": round(contender.answers[-1]["memory_mib"], 1),
            "first_step_seconds": round(contender.first["first"], 2),
        }
    peaks = {job.size: results[job.name]["gflops"] for job in jobs if job.system == "products"}
    for job in jobs:  # against the products that took turns with them
        if job.system != "products" and job.size in peaks:
            peak, result = peaks[job.size], results[job.name]
            result |= {"products_gflops": peak, "share_of_products": round(result["gflops"] / peak, 3)}
    return results


def startup(job: Job) -> dict[str, Any]:
    """Seconds of the first step with an empty compile cache, and with the one that it left."""
    with tempfile.TemporaryDirectory() as cache:
        seconds = []
        for _ in range(2):
            contender = Contender(job, TORCHINDUCTOR_CACHE_DIR=cache)
            seconds.append(round(contender.first["first"], 2))
            contender.close()
    return {"first_start_seconds": seconds[0], "second_start_seconds": seconds[1]}


def profile(job: Job) -> str:
    """The operators of three steps, those that take the most time themselves first."""
    import torch

    from smallgpt.cli import processors

    torch.set_num_threads(job.threads or processors())
    step = our_step(job)
    step()
    step()
    with torch.profiler.profile() as recorded:
        for _ in range(3):
            step()
    order = f"self_{job.device}_time_total"
    text: str = recorded.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=60)
    return text


def machine(device: str) -> dict[str, str]:
    """What the numbers depend on, and nothing personal."""
    from smallgpt.machine import describe_machine

    facts = {"cpu": describe_machine()}
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.is_file() else set()
    facts["extensions"] = " ".join(flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags)
    # Not in this process: its memory would count as its children's.
    code = "import torch; print(torch.__version__, torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    words = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    facts["torch"] = words[0]
    return facts | ({"gpu": " ".join(words[1:])} if device == "cuda" else {})


def table(report: dict[str, Any]) -> str:
    """reports/bench/train.md: one row a result."""
    lines = ["# Training speed", "", ", ".join(f"{key} {value}" for key, value in report["machine"].items()), ""]
    lines += [
        "`benchmarks/train.py` wrote this; medians, contenders taking turns. The share is that of the rate of the",
        "bare matrix products at the model's own shapes, measured in the same turns.",
        "",
    ]
    lines += [
        "| shape | T x B | precision | mode | variant | system | tokens/s | GFLOP/s | share | peak MiB | first step s |"
    ]
    lines += ["|---|---|---|---|---|---|---:|---:|---:|---:|---:|"]
    for result in report["results"].values():
        share = f"{result['share_of_products']:.0%}" if "share_of_products" in result else ""
        cells = [result["shape"], f"{result['seq_len']} x {result['batch_size']}"]
        cells += [result[key] for key in ("precision", "mode", "variant", "system")]
        cells += [f"{result['tokens_per_second']:,.0f}", f"{result['gflops']:,.0f}", share]
        cells += [f"{result['peak_memory_mib']:,.0f}", f"{result['first_step_seconds']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    if report.get("startup"):
        lines += ["", "| start of | empty compile cache, s | the second start, s |", "|---|---:|---:|"]
        lines += [
            f"| {n} | {r['first_start_seconds']:.1f} | {r['second_start_seconds']:.1f} |"
            for n, r in report["startup"].items()
        ]
    return "\n".join(lines) + "\n"


def choices(text: str, allowed: Any, option: str) -> list[str]:
    found = text.split(",")
    for value in found:
        if value not in allowed:
            raise ValueError(f"{option} {value}: known are {', '.join(allowed)}")
    return found


def main(arguments: list[str] | None = None) -> int:
    from smallgpt.files import write_atomic, write_json

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="gpt2", help=f"comma-separated: {', '.join(SHAPES)}")
    parser.add_argument("--only", default="products,ours,peer", help="comma-separated: products, ours, peer")
    parser.add_argument("--precision", default="fp32,bf16", help="comma-separated: fp32, bf16")
    parser.add_argument("--mode", default="eager,compiled", help="comma-separated: eager, compiled")
    parser.add_argument("--variant", default="base", help=f"comma-separated: {', '.join(VARIANTS)}")
    parser.add_argument("--seq-len", type=int, default=0, help="tokens in a sequence (default: the shape's)")
    parser.add_argument("--batch-size", type=int, default=0, help="sequences in a batch (default: the shape's)")
    parser.add_argument("--steps", type=int, default=5, help="rounds, of which the median counts")
    parser.add_argument("--per-round", type=int, default=1, help="steps a contender takes in a round")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=0, help="CPU threads (default: all)")
    parser.add_argument("--startup", action="store_true", help="measure the time to the first step, twice, instead")
    parser.add_argument("--profile", action="store_true", help="print the operators of our step instead")
    parser.add_argument("--out", type=Path, default=ROOT / "reports/bench/train.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker:
        worker(Job(**json.loads(options.worker)))
        return 0
    systems = choices(options.only, ("products", "ours", "peer"), "--only")
    shapes = choices(options.shape, SHAPES, "--shape")
    variants = choices(options.variant, VARIANTS, "--variant")
    modes = choices(options.mode, ("eager", "compiled"), "--mode")
    if min(options.steps, options.per_round) < 1:
        raise ValueError("--steps and --per-round must be at least 1")
    common = {key: getattr(options, key) for key in ("seq_len", "batch_size", "device", "threads")}
    precisions = choices(options.precision, ("fp32", "bf16"), "--precision")
    if options.profile:
        for shape, precision, mode, variant in itertools.product(shapes, precisions, modes, variants):
            job = Job("ours", shape, precision, mode, variant, **common)
            print(job.name, profile(job), sep="\n")
        return 0
    report = json.loads(options.out.read_text()) if options.out.is_file() else {}
    described = machine(options.device)
    if report.get("machine", described) != described:
        raise ValueError(
            f"{options.out} holds results of another machine or PyTorch; move it away or name another --out"
        )
    report = {"machine": described, "results": report.get("results", {}), "startup": report.get("startup", {})}
    for precision in precisions:
        for shape in shapes:
            jobs = []
            for variant in variants:
                jobs += [
                    Job(system, shape, precision, mode, variant, **common)
                    for system in systems
                    for mode in modes
                    if system != "products" and (system == "ours" or variant in PEER_VARIANTS)
                ]
            if options.startup:
                report["startup"] |= {job.name: startup(job) for job in jobs}
            else:
                products = [Job("products", shape, precision, "eager", variant, **common) for variant in variants]
                sizes = {job.size: job for job in products} if "products" in systems else {}
                jobs = [*sizes.values(), *jobs]
                with tempfile.TemporaryDirectory() as cache:
                    report["results"] |= measure(jobs, options.steps, options.per_round, cache)
            write_json(options.out, report)
            write_atomic(options.out.with_suffix(".md"), table(report))
    print(table(report))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from smallgpt.cli import run

    run(main)
