"""Decoding speed on the CPU: our bundles against llama.cpp, the same weights, in one run.

    python benchmarks/decode.py [MODEL] [EXPORTS] [--rounds 5] [--threads N] [--out reports/bench]

MODEL is a model folder (models/gpt), EXPORTS the folder of its bundles (exports). Every round starts each engine and
width in a process of its own, in alternating order; the tables hold medians over the rounds. Batches 8 and 32 are
timed in the middle of a range of contexts, whose mean length is that of the range. A share of the memory limit above
1 means that the weights came from the processor's cache.
"""

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from engines import Engine, LlamaCpp, Ours
from gguf_file import write_gguf

from smallgpt.cli import processors
from smallgpt.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parent.parent
WIDTHS = {"fp32": ("fp32", "F32"), "int8": ("int8", "Q8_0"), "int4": ("int4", "Q4_0")}  # ours, llama.cpp's
RANGES = {"16-416": (16, 416), "600-960": (600, 960)}
TIMED = {1: 400, 8: 100, 32: 40}  # at most so many steps, by batch
PROMPTS = (16, 512)
CHECK_PROMPTS, CHECK_TOKENS = 5, 64


def open_engine(engine: str, width: str, exports: Path, work: Path, threads: int) -> Engine:
    ours, theirs = WIDTHS[width]
    return Ours(exports / ours, threads) if engine == "ours" else LlamaCpp(work / f"{theirs}.gguf", threads)


def measure(model: Engine, ids: np.ndarray, context: int) -> dict[str, float]:
    """Seconds to the first token and tokens per second of one engine; contexts beyond the model's are left out."""
    result = {}
    for length in (n for n in PROMPTS if n < context):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            model.prefill(ids[:length], 1, context).argmax()
            times.append(time.perf_counter() - start)
        result[f"first token, prompt {length}"] = statistics.median(times[1:])
    for batch, (name, (first, last)) in itertools.product(TIMED, RANGES.items()):
        if last > context:
            continue
        steps = min(TIMED[batch], last - first)
        start_length = (first + last - steps) // 2
        tokens = np.full(batch, model.prefill(ids[:start_length], batch, last + 1).argmax())
        model.step(tokens)  # binds, or plans, once
        start = time.perf_counter()
        for _ in range(steps):
            tokens = model.step(tokens).argmax(-1)
        result[f"batch {batch}, context {name}"] = batch * steps / (time.perf_counter() - start)
    result["peak memory"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return result


def greedy(model: Engine, ids: np.ndarray, context: int) -> list[list[int]]:
    """Texts that start at several places of `ids`."""
    texts = []
    for start in range(0, CHECK_PROMPTS * 16, 16):
        token = int(model.prefill(ids[start : start + 16], 1, context).argmax())
        text = [token]
        while len(text) < CHECK_TOKENS:
            text.append(int(model.step(np.array(text[-1:]))[0].argmax()))
        texts.append(text)
    return texts


def bandwidth(threads: int) -> float:
    """Bytes per second of reading memory, by BLAS dot products of long vectors, the best of several."""
    vectors = [np.ones(2**26, np.float32) for _ in range(threads)]
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            start = time.perf_counter()
            list(pool.map(lambda vector: vector @ vector, vectors))
            best = max(best, sum(vector.nbytes for vector in vectors) / (time.perf_counter() - start))
    return best


def cold_start(bundle: Path) -> float:
    """Seconds from starting the process to the end of a one-token answer."""
    command = [sys.executable, "-m", "smallgpt.ort_generate", str(bundle), "-p", "Once", "-n", "1", "-q"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def worker(task: str, *arguments: str) -> object:
    """What one process of the run does; the arguments are those of `start`."""
    if task == "bandwidth":
        return bandwidth(int(arguments[0]))
    engine, width, exports, work, threads, ids, context = arguments
    model = open_engine(engine, width, Path(exports), Path(work), int(threads))
    function = {"measure": measure, "greedy": greedy}[task]
    return function(model, np.load(ids), int(context))


def start(*arguments: object) -> Any:
    """Run `worker` in a new process; BLAS gets one thread, the engines have their own."""
    command = [sys.executable, __file__, "--worker", *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def machine(threads: int) -> dict[str, object]:
    """Processor, cores and system."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return {"processor": names[0], "cores": os.cpu_count(), "threads": threads, "system": platform.system()}


def run(model: Path, exports: Path, rounds: int, threads: int, out: Path) -> None:
    work = ROOT / ".smallgpt" / "bench"
    work.mkdir(parents=True, exist_ok=True)
    config = json.loads((model / "config.json").read_text())["model"]
    context, ids = config["max_seq_len"], work / "ids.npy"
    np.save(ids, np.random.default_rng(0).integers(260, config["vocab_size"], context))
    for _, kind in WIDTHS.values():
        write_gguf(model, work / f"{kind}.gguf", kind)
    common = (exports, work, threads, ids, context)
    texts = [start("greedy", engine, "fp32", *common) for engine in ("ours", "llama.cpp")]
    same = sum(one == other for one, other in zip(*texts, strict=True))
    speed = start("bandwidth", threads)
    cells: dict[str, dict[str, list[float]]] = {}
    cold = []
    for number in range(rounds):
        pairs = list(itertools.product(WIDTHS, ("ours", "llama.cpp")))
        for width, engine in pairs if number % 2 == 0 else reversed(pairs):
            for row, value in start("measure", engine, width, *common).items():
                cells.setdefault(row, {}).setdefault(f"{engine} {width}", []).append(value)
        cold.append(cold_start(exports / "int8"))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    files = {f"ours {width}": exports / ours / "model.onnx" for width, (ours, _) in WIDTHS.items()}
    files |= {f"llama.cpp {width}": work / f"{kind}.gguf" for width, (_, kind) in WIDTHS.items()}
    report = {
        "machine": machine(threads),
        "model": config,
        "versions": {name: _version(name) for name in ("onnxruntime", "llama_cpp", "numpy")},
        "rounds": rounds,
        "greedy texts that are equal": f"{same} of {CHECK_PROMPTS}",
        "memory bytes per second": speed,
        "cold start of int8, seconds": statistics.median(cold),
        "file bytes": {name: path.stat().st_size for name, path in files.items()},
        "median": {row: {name: statistics.median(v) for name, v in cell.items()} for row, cell in cells.items()},
        "all": cells,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "decode.json", report)
    write_atomic(out / "decode.md", to_markdown(report))
    print(to_markdown(report))


def to_markdown(report: dict) -> str:
    """The medians, with the ratio to llama.cpp and the share of the memory limit at batch 1."""
    shape, machine = report["model"], report["machine"]
    lines = [
        f"{shape['architecture']}, {shape['num_layers']} layers of {shape['embed_dim']}, vocabulary "
        f"{shape['vocab_size']}, on {machine['processor']}, {machine['threads']} threads; medians of "
        f"{report['rounds']} rounds; tokens/s unless said. Memory reads {report['memory bytes per second'] / 1e9:.1f} "
        f"GB/s. Equal greedy fp32 texts: {report['greedy texts that are equal']}. "
        f"Cold start of int8: {report['cold start of int8, seconds']:.2f} s.",
        "",
        "| | " + " | ".join(f"{width} ours | llama.cpp | ratio" for width in WIDTHS) + " |",
        "|---" * (1 + 3 * len(WIDTHS)) + "|",
    ]
    rows = report["median"] | {"file size": report["file bytes"]}
    for row, cell in rows.items():
        parts = []
        for width in WIDTHS:
            ours, theirs = cell[f"ours {width}"], cell[f"llama.cpp {width}"]
            faster = theirs / ours if row.startswith(("first", "peak", "file")) else ours / theirs
            parts += [_shown(row, ours), _shown(row, theirs), f"{faster:.2f}"]
        lines.append(f"| {row} | " + " | ".join(parts) + " |")
    name = "batch 1, context 16-416"
    if name in report["median"]:
        shares = {
            width: report["median"][name][f"ours {width}"]
            * report["file bytes"][f"ours {width}"]
            / report["memory bytes per second"]
            for width in WIDTHS
        }
        text = ", ".join(f"{width} {share:.0%}" for width, share in shares.items())
        lines += ["", f"Share of the memory limit (tokens/s times file size over bandwidth) at {name}: {text}."]
    return "\n".join(lines) + "\n"


def _shown(row: str, value: float) -> str:
    if row.startswith("first"):
        return f"{value * 1000:.1f} ms"
    return f"{value / 1e6:.1f} MB" if row.startswith(("peak", "file")) else f"{value:.0f}"


def _version(name: str) -> str:
    return str(__import__(name).__version__)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/gpt"))
    parser.add_argument("exports", nargs="?", type=Path, default=Path("exports"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--out", type=Path, default=Path("reports/bench"))
    options = parser.parse_args()
    run(options.model.resolve(), options.exports.resolve(), options.rounds, options.threads, options.out)
