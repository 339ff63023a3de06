"""Decoding speed on the CPU: our bundles against other engines, the same weights, in one run.

    python benchmarks/decode.py [MODEL] [EXPORTS] [--tokens data/tokens] [--rounds 5] [--threads N] [--engines NAMES]
                                [--work .smallgpt/bench] [--out reports/bench]

MODEL is a model folder (models/gpt), EXPORTS the folder of its bundles (exports), `tokens` the token files for the
bits per byte. Every round starts each engine and width in a process of its own, in alternating order; the tables
hold medians over the rounds. A range of contexts is timed in its middle with larger batches, and ours steps 8 and more
sequences without batch invariance. Transformers runs in the project's .venv, onnxruntime-genai in .venv-genai.
"""

import argparse
import importlib.util
import json
import math
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import engines
import numpy as np

from smallgpt import cli
from smallgpt.cli import cores
from smallgpt.files import write_atomic, write_json
from smallgpt.machine import describe_machine
from smallgpt.score import token_nats

ROOT = Path(__file__).resolve().parent.parent
# The engines by width of the weights, ours first; with each what it loads: a bundle, a GGUF type, a compute type.
WIDTHS = {
    "fp32": {
        "ours": "fp32",
        "ours, int8 cache": "fp32-kv8",
        "llama.cpp": "F32",
        "CTranslate2": "float32",
        "onnxruntime-genai": "fp32",
        "Transformers": "float32",
    },
    "int8": {
        "ours": "int8",
        "ours, int8 cache": "int8-kv8",
        "llama.cpp": "Q8_0",
        "CTranslate2": "int8",
        "onnxruntime-genai": "int8",
    },
    "int4": {"ours": "int4", "ours, int8 cache": "int4-kv8", "llama.cpp": "Q4_0", "onnxruntime-genai": "int4"},
    "16 bits": {"llama.cpp": "F16", "Transformers": "bfloat16"},
}
PACKAGES = {
    "ours": "onnxruntime",
    "ours, int8 cache": "onnxruntime",
    "llama.cpp": "llama_cpp",
    "CTranslate2": "ctranslate2",
    "onnxruntime-genai": "onnxruntime_genai",
    "Transformers": "transformers",
}
ENVIRONMENTS = {"onnxruntime-genai": ".venv-genai", "Transformers": ".venv"}
PEERS = ("llama.cpp", "CTranslate2", "onnxruntime-genai", "Transformers")
SMALL_CACHE = "ours, int8 cache"  # in the tables where its bundles are there
RANGES = ((16, 416), (600, 960))  # of contexts; a model that has neither is timed up to the end of its own
TIMED = {1: 400, 8: 60, 32: 24}  # at most so many steps, by batch
PROMPTS = (16, 512)
CHECK_PROMPTS, CHECK_TOKENS = 5, 64
MEMORY_BYTES = 2**30  # more than caches hold
SCORED = 4096  # tokens of the test split, or of valid where there is none


def python(engine: str) -> str:
    """The interpreter that has the engine's packages: this one, or that of another environment of the project."""
    if importlib.util.find_spec(PACKAGES[engine]):
        return sys.executable
    return str(ROOT / ENVIRONMENTS.get(engine, ".venv") / "bin/python")


def path_of(engine: str, kind: str, exports: Path, work: Path) -> Path:
    """The file or folder that an engine loads."""
    if engine.startswith("ours"):
        return exports / kind
    return work / {"llama.cpp": f"{kind}.gguf", "onnxruntime-genai": f"genai-{kind}"}.get(engine, engine)


def size_of(engine: str, kind: str, exports: Path, work: Path) -> int | None:
    """Bytes of the weights on disk in their width; None where the engine only narrows them in memory."""
    path = path_of(engine, kind, exports, work)
    names = {"llama.cpp": "", "CTranslate2": "model.bin", "Transformers": "model.safetensors"}
    narrowed = engine in ("CTranslate2", "Transformers") and kind != "float32"
    return None if narrowed else (path / names.get(engine, "model.onnx")).stat().st_size


def open_engine(engine: str, kind: str, path: Path, threads: int) -> engines.Engine:
    if engine.startswith("ours"):
        return engines.Ours(path, threads)
    if engine == "llama.cpp":
        return engines.LlamaCpp(path, threads)
    if engine == "onnxruntime-genai":
        return engines.Genai(path, threads)
    return getattr(engines, engine)(path, threads, kind)


def write_models(model: Path, exports: Path, work: Path, names: set[str]) -> None:
    """The weights in the format of every peer."""
    work.mkdir(parents=True, exist_ok=True)
    if "llama.cpp" in names:
        from gguf_file import write_gguf

        for kinds in WIDTHS.values():
            write_gguf(model, work / f"{kinds['llama.cpp']}.gguf", kinds["llama.cpp"])
    if "CTranslate2" in names:
        from ct2_file import write_ct2

        write_ct2(model, work / "CTranslate2")
    if "onnxruntime-genai" in names:
        from genai_file import write_genai

        for kinds in WIDTHS.values():
            if kind := kinds.get("onnxruntime-genai"):
                write_genai(exports / kind, path_of("onnxruntime-genai", kind, exports, work))
    if "Transformers" in names:
        command = [python("Transformers"), "-m", "smallgpt.interop", model, "--out", work / "Transformers"]
        subprocess.run(command, cwd=ROOT, check=True)


def measure(model: engines.Engine, ids: np.ndarray, context: int) -> dict[str, float]:
    """Seconds to the first token and tokens per second of one engine, as far as the model's context goes."""
    result = {}
    for length in (n for n in PROMPTS if n < context):
        times = [model.first_token(ids[:length], context) for _ in range(4)]
        result[f"first token, prompt {length}"] = statistics.median(times[1:])
    fitting = [(first, last) for first, last in RANGES if last < context] or [(16, context - 2)]
    for batch in TIMED:
        for first, last in fitting:
            steps = min(TIMED[batch], last - first)
            prompt = ids[: (first + last - steps) // 2]
            seconds = model.decode(prompt, batch, steps, last + 1)
            result[f"batch {batch}, context {first}-{last}"] = batch * steps / seconds
        if batch == 1:  # with more some engines read the prompt once, others for every sequence
            peak = peak_memory()
    return result | {"peak memory, batch 1": peak}


def peak_memory() -> int:
    """Bytes, of this process; `resource` would tell those of its parent, where they were more."""
    return int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


def greedy(model: engines.Engine, ids: np.ndarray, context: int) -> list[list[int]]:
    """Texts that start at several places of `ids`."""
    return [model.text(ids[i : i + 16], CHECK_TOKENS, context) for i in range(0, CHECK_PROMPTS * 16, 16)]


def last_logits(model: engines.Engine, ids: np.ndarray, context: int) -> list[float]:
    """Logits (V,) after all ids."""
    found: list[float] = model.logits(ids.astype(np.int64))[-1].tolist()
    return found


def nats(model: engines.Engine, ids: np.ndarray, context: int) -> float:
    """Sum of the negative log-probabilities of all ids but the first of each window of the context."""
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1].astype(np.int64)
        total += float(token_nats(model.logits(window[:-1]), window[1:]).sum())
    return total


def bandwidth(threads: int, size: int) -> float:
    """Bytes per second of reading the same `size` bytes again and again, in a share for each thread; best of several.

    From memory or from a cache, wherever so many bytes stay, as weights of that size are.
    """
    vectors = [np.ones(size // threads // 4, np.int32) for _ in range(threads)]
    times, best = max(1, 2**29 // size), 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            start = time.perf_counter()
            list(pool.map(lambda vector: [vector.max() for _ in range(times)], vectors))
            best = max(best, times * sum(vector.nbytes for vector in vectors) / (time.perf_counter() - start))
    return best


def cold_start(bundle: Path) -> float:
    """Seconds from starting the process to the end of a one-token answer."""
    command = [sys.executable, "-m", "smallgpt.ort_generate", str(bundle), "-p", "Once", "-n", "1", "-q"]
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def imports() -> float:
    """Seconds of that which are imports."""
    code = "import time; start = time.perf_counter(); import smallgpt.ort_generate; print(time.perf_counter() - start)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    return float(done.stdout)


def worker(task: str, *arguments: str) -> object:
    """What one process of the run does; the arguments are those of `start`."""
    if task == "bandwidth":
        return bandwidth(*map(int, arguments))
    engine, kind, path, threads, ids, context = arguments
    model = open_engine(engine, kind, Path(path), int(threads))
    tasks = {"measure": measure, "greedy": greedy, "last_logits": last_logits, "nats": nats}
    return tasks[task](model, np.load(ids), int(context))


def start(task: str, *arguments: object) -> Any:
    """Run `worker` in a new process; BLAS gets one thread, the engines have their own."""
    interpreter = sys.executable if task == "bandwidth" else python(str(arguments[0]))
    command = [interpreter, __file__, "--worker", task, *map(str, arguments)]
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def run(
    model: Path, exports: Path, tokens: Path, rounds: int, threads: int, names: set[str], work: Path, out: Path
) -> None:
    write_models(model, exports, work, names)
    config = json.loads((model / "config.json").read_text())["model"]
    context, random, text = config["max_seq_len"], work / "random.npy", work / "text.npy"
    np.save(random, np.random.default_rng(0).integers(260, config["vocab_size"], context))
    split = "test" if (tokens / "test.json").is_file() else "valid"
    kind = json.loads((tokens / f"{split}.json").read_text())["dtype"]
    scored = np.fromfile(tokens / f"{split}.bin", kind)[: SCORED + 1]
    np.save(text, scored)
    pairs = [(width, engine) for width, kinds in WIDTHS.items() for engine in kinds if engine in names]
    pairs = [pair for pair in pairs if pair[1] != SMALL_CACHE or (exports / WIDTHS[pair[0]][pair[1]]).is_dir()]
    loaded = {(w, e): (e, WIDTHS[w][e], path_of(e, WIDTHS[w][e], exports, work), threads) for w, e in pairs}
    exact = [pair for pair in pairs if pair[0] == "fp32" and pair[1] != SMALL_CACHE]
    texts = {engine: start("greedy", *loaded[width, engine], random, context) for width, engine in exact}
    prompts = np.load(random)[: 16 * CHECK_PROMPTS].reshape(CHECK_PROMPTS, 16)

    def gap(number: int, other: list[int]) -> float:
        """How much ours prefers its own id where another engine's text parts from it."""
        own = texts["ours"][number]
        i = next(i for i in range(CHECK_TOKENS) if own[i] != other[i])
        np.save(work / "parted.npy", np.concatenate([prompts[number], own[:i]]))
        logits = start("last_logits", *loaded["fp32", "ours"], work / "parted.npy", context)
        return float(logits[own[i]] - logits[other[i]])

    same = {}
    for engine in [engine for engine in texts if engine != "ours"]:
        gaps = [gap(i, text) for i, text in enumerate(texts[engine]) if text != texts["ours"][i]]
        apart = f" (logits {', '.join(f'{value:.1g}' for value in gaps)} apart where texts part)" if gaps else ""
        same[engine] = f"{CHECK_PROMPTS - len(gaps)} of {CHECK_PROMPTS}{apart}"
    size = len(text_of(scored[1:], exports / "fp32"))
    bits = {pair: start("nats", *loaded[pair], text, context) / math.log(2) / size for pair in pairs}
    found: dict[tuple[str, str], dict[str, list[float]]] = {pair: {} for pair in pairs}
    cold, importing = [], []
    sizes = {"memory": MEMORY_BYTES}
    sizes |= {w: size_of(e, WIDTHS[w][e], exports, work) for w, e in pairs if e == "ours"}
    speed: dict[str, list[float]] = {name: [] for name in sizes}
    for number in range(rounds):
        for pair in pairs if number % 2 == 0 else reversed(pairs):
            for row, value in start("measure", *loaded[pair], random, context).items():
                found[pair].setdefault(row, []).append(value)
        cold.append(cold_start(exports / "int8"))
        importing.append(imports())
        for name, count in sizes.items():
            speed[name].append(start("bandwidth", threads, count))
        print(f"round {number + 1} of {rounds}", file=sys.stderr)
    report: dict[str, Any] = {
        "machine": {"cpu": describe_machine(), "threads": threads},
        "model": config,
        "versions": {name: _version(python(engine), name) for engine, name in PACKAGES.items() if engine in names},
        "rounds": rounds,
        "greedy fp32 texts equal to ours": same,
        "bytes per second of reading as many": {name: statistics.median(values) for name, values in speed.items()},
        "cold start of int8, seconds": statistics.median(cold),
        "imports of it, seconds": statistics.median(importing),
        "median": {},
        "all": {},
    }
    for (width, engine), rows in found.items():
        cell = {row: statistics.median(values) for row, values in rows.items()}
        cell |= {
            "file size": size_of(engine, WIDTHS[width][engine], exports, work),
            "bits per byte": bits[width, engine],
        }
        report["median"].setdefault(width, {})[engine] = cell
        report["all"].setdefault(width, {})[engine] = rows
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "decode.json", report)
    write_atomic(out / "decode.md", to_markdown(report))
    print(to_markdown(report))


def text_of(ids: np.ndarray, bundle: Path) -> bytes:
    """The text of ids; an end of a text has none."""
    from smallgpt.tokenizer import Tokenizer

    token_bytes = Tokenizer.load(bundle).token_bytes
    return b"".join(token_bytes[i] for i in ids.tolist())


def to_markdown(report: dict[str, Any]) -> str:
    """A table for each width, with the ratios to the peers, and at batch 1 the share of the speed of reading.

    onnxruntime-genai has a ratio of its own: it runs our graph, so only what drives it is compared.
    """
    shape, machine, speed = report["model"], report["machine"], report["bytes per second of reading as many"]
    same = ", ".join(f"{engine} {count}" for engine, count in report["greedy fp32 texts equal to ours"].items())
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"{shape['architecture']}, {shape['num_layers']} layers of {shape['embed_dim']}, vocabulary "
        f"{shape['vocab_size']}, context {shape['max_seq_len']}, on {machine['cpu']}, {machine['threads']} "
        f"threads; medians of {report['rounds']} rounds, tokens/s unless said, of batches in the middle of a range; "
        f"{versions}. Memory reads {speed['memory'] / 1e9:.1f} GB/s. "
        f"Greedy fp32 texts equal to ours: {same}. "
        f"Cold start of int8: {report['cold start of int8, seconds']:.2f} s, of which imports "
        f"{report['imports of it, seconds']:.2f} s.",
    ]
    for width, cells in report["median"].items():
        peers = [engine for engine in cells if not engine.startswith("ours")]
        own = [engine for engine in peers if engine != "onnxruntime-genai"]
        rivals = {
            "ours to the best": ("ours", own),
            "int8 cache to the best": (SMALL_CACHE, own),
            "ours to genai on our graph": ("ours", [peer for peer in peers if peer not in own]),
        }
        rivals = {title: (engine, names) for title, (engine, names) in rivals.items() if engine in cells and names}
        lines += ["", f"| {width} | " + " | ".join([*cells, *rivals]) + " |"]
        lines += ["|---" + "|---:" * (len(cells) + len(rivals)) + "|"]
        for row in next(iter(cells.values())):
            values = {engine: cell[row] for engine, cell in cells.items()}
            parts = [_shown(row, value) for value in values.values()]
            for engine, names in rivals.values():
                parts.append(_ratio(row, values[engine], [values[name] for name in names if values[name] is not None]))
            lines.append(f"| {row} | " + " | ".join(parts) + " |")
    ours = {width: cells["ours"] for width, cells in report["median"].items() if "ours" in cells}
    if ours:
        name = next(row for row in next(iter(ours.values())) if row.startswith("batch 1, "))
        shares = [
            f"{width} {cell[name] * cell['file size'] / speed[width]:.0%} of {speed[width] / 1e9:.1f} GB/s"
            for width, cell in ours.items()
        ]
        lines += [
            "",
            f"Ours at {name}, file size times tokens/s, as a share of the speed at which {machine['threads']} threads "
            f"read as many bytes again and again: {', '.join(shares)}.",
        ]
    return "\n".join(lines) + "\n"


def _ratio(row: str, ours: float, others: list[float]) -> str:
    """Above 1 where ours is better than the best of the others."""
    if row == "bits per byte" or not others:
        return ""
    less = row.startswith(("first", "peak", "file"))
    return f"{min(others) / ours if less else ours / max(others):.2f}"


def _shown(row: str, value: float | None) -> str:
    if value is None:
        return ""
    if row.startswith("first"):
        return f"{value * 1000:.1f} ms"
    if row.startswith("bits"):
        return f"{value:.4f}"
    return f"{value / 1e6:.1f} MB" if row.startswith(("peak", "file")) else f"{value:,.0f}"


def _version(interpreter: str, name: str) -> str:
    code = f"import {name} as p; print(getattr(p, '__version__', ''))"
    if name == "onnxruntime_genai":
        code += "; import onnxruntime; print(f'(onnxruntime {onnxruntime.__version__})')"
    done = subprocess.run([interpreter, "-c", code], check=True, capture_output=True, text=True)
    return " ".join(done.stdout.split())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=Path("models/gpt"))
    parser.add_argument("exports", nargs="?", type=Path, default=Path("exports"))
    parser.add_argument("--tokens", type=Path, default=Path("data/tokens"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--engines", default=",".join(PEERS), help=f"of {', '.join(PEERS)} (default: all)")
    parser.add_argument("--work", type=Path, default=ROOT / ".smallgpt" / "bench", help="for the peers' files")
    parser.add_argument("--out", type=Path, default=Path("reports/bench"))
    options = parser.parse_args()
    chosen = {"ours", SMALL_CACHE, *options.engines.split(",")}
    if unknown := chosen - set(PACKAGES):
        parser.error(f"--engines names {', '.join(sorted(unknown))}; known are {', '.join(PEERS)}")
    bundles = [options.exports / kinds["ours"] for kinds in WIDTHS.values() if "ours" in kinds]
    for path in (options.model / "config.json", *bundles, options.tokens):
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; `make repro` makes model, bundles and tokens")
    paths = (options.model.resolve(), options.exports.resolve(), options.tokens.resolve())
    run(*paths, options.rounds, options.threads, chosen, options.work.resolve(), options.out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
    else:
        cli.run(main)
