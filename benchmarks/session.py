"""Which settings of ONNX Runtime decode faster: every setting against the defaults, in one run.

    python benchmarks/session.py [BUNDLE] [--rounds 5] [--threads N] [--only "no spinning"]
    python benchmarks/session.py --profile [BUNDLE] [--threads N] [--batch 1]  # the operators of a prompt and a step

The defaults are those of onnxruntime; steps of 8 and more sequences go without batch invariance, which is one of the
settings. Each setting runs in a process of its own, in alternating order. Printed are the ratios of the medians to
those of the defaults, above 1 where the setting is faster; two runs of the defaults show what the machine's noise alone
does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import onnxruntime
from engines import Ours

from smallgpt.cli import cores

ROOT = Path(__file__).resolve().parent.parent
INVARIANT = "batch invariant"
SETTINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # configuration entries, environment
    "defaults": ({}, {}),
    "defaults again": ({}, {}),
    "no spinning": ({"session.intra_op.allow_spinning": "0"}, {}),
    "dynamic blocks": ({"session.dynamic_block_base": "4"}, {}),
    "denormals are zero": ({"session.set_denormal_as_zero": "1"}, {}),
    "no prepacking": ({"session.disable_prepacking": "1"}, {}),
    "flash attention": ({}, {"ORT_GQA_DISABLE_FLASH_ATTENTION": "0"}),
    "approximate int8 keys": ({}, {"ORT_MLAS_QKGEMM_S8_APPROX_VNNI": "1"}),
    "pauses while spinning": ({"session.intra_op.spin_backoff_max": "8"}, {}),
    "huge pages": ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}),
    INVARIANT: ({}, {}),
}
# Name: prompt, batch, steps; with no step the time to the first token is taken.
CASES = {
    "first token, 512": (512, 1, 0),
    "batch 1, from 16": (16, 1, 200),
    "batch 1, from 700": (700, 1, 200),
    "batch 8, from 200": (200, 8, 60),
    "batch 32, from 200": (200, 32, 30),
    "batch 32, from 700": (700, 32, 20),
}


def worker(bundle: str, threads: str, name: str) -> dict[str, float]:
    """Seconds of every case that fits into the context, with one setting."""
    model = Ours(Path(bundle), int(threads), tuple(SETTINGS[name][0].items()))
    model.model.batch_invariant = name == INVARIANT
    context, result = model.model.max_seq_len, {}
    ids = np.random.default_rng(0).integers(260, model.model.vocab_size, context)
    for case, (prompt, batch, steps) in CASES.items():
        if prompt + steps + 2 <= context:
            call = (ids[:prompt], batch, steps, prompt + steps + 2)
            times = [model.decode(*call) if steps else model.first_token(ids[:prompt], context) for _ in range(3)]
            result[case] = min(times[1:])
    return result


def profile(bundle: str, threads: int, batch: int) -> None:
    """Print where a prompt of 512 tokens, or what the context holds, and a batch's step after it spend their time."""
    calls = 20
    with tempfile.TemporaryDirectory() as folder:

        class Options(onnxruntime.SessionOptions):  # type: ignore[misc]
            def __init__(self) -> None:
                super().__init__()
                self.enable_profiling = True
                self.profile_file_prefix = f"{folder}/profile"

        with mock.patch.object(onnxruntime, "SessionOptions", Options):
            model = Ours(Path(bundle), threads)
        prompt = min(512, model.model.max_seq_len - calls)
        ids = np.random.default_rng(0).integers(260, model.model.vocab_size, prompt)
        for _ in range(calls):
            model.prefill(ids, batch, prompt + calls)
        for i in range(calls):
            model.step(np.full(batch, ids[i]))
        events = json.loads(Path(model.model.session.end_profiling()).read_text(encoding="utf-8"))
    runs = [event for event in events if event["name"] == "model_run"]
    nodes = [event for event in events if event["cat"] == "Node" and event["name"].endswith("_kernel_time")]
    print(f"| {bundle}, {threads} threads, batch {batch} | ms | share |\n|---|---:|---:|")
    for case, chosen in ((f"prompt of {prompt}", runs[2:calls]), ("step", runs[calls + 2 :])):  # the first ones warm up
        total = sum(run["dur"] for run in chosen)
        spent: dict[str, float] = {}
        for node in nodes:
            inside = any(run["ts"] <= node["ts"] < run["ts"] + run["dur"] for run in chosen)
            if inside and node["args"]["op_name"] != "If":  # it holds the others
                name = node["args"]["op_name"]
                spent[name] = spent.get(name, 0.0) + node["dur"]
        spent["between operators"] = total - sum(spent.values())
        print(f"| {case} | {total / len(chosen) / 1000:.2f} | 100 % |")
        for name, microseconds in sorted(spent.items(), key=lambda item: -item[1]):
            if microseconds >= 0.01 * total:
                print(f"| {name} | {microseconds / len(chosen) / 1000:.2f} | {microseconds / total:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="exports/fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", action="append", choices=SETTINGS, help="beside the defaults; can be repeated")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--profile", action="store_true", help="print the operators' times instead")
    parser.add_argument("--batch", type=int, default=1, help="sequences of a step that is profiled")
    options = parser.parse_args()
    if options.profile:
        profile(options.bundle, options.threads, options.batch)
        return
    names = [name for name in SETTINGS if not options.only or name in ("defaults", *options.only)]
    found: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for number in range(options.rounds):
        for name in names if number % 2 == 0 else reversed(names):
            command = [sys.executable, __file__, "--worker", options.bundle, str(options.threads), name]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | SETTINGS[name][1]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for case, seconds in json.loads(done.stdout).items():
                found[name].setdefault(case, []).append(seconds)
    base = {case: statistics.median(times) for case, times in found["defaults"].items()}
    print(f"| {options.bundle} | " + " | ".join(f"{case}" for case in base) + " |")
    print("|---" + "|---:" * len(base) + "|")
    for name, cases in found.items():
        ratios = [f"{base[case] / statistics.median(times):.2f}" for case, times in cases.items()]
        print(f"| {name} | " + " | ".join(ratios) + " |")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        print(json.dumps(worker(*sys.argv[2:])))
    else:
        main()
