"""Which settings of ONNX Runtime decode faster: every setting against the defaults, in one run.

    python benchmarks/session.py [BUNDLE] [--rounds 5] [--threads N]

Each setting runs in a process of its own, in alternating order. Printed are the ratios of the medians to those of the
defaults, above 1 where the setting is faster; two runs of the defaults show what the machine's noise alone does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from engines import Ours

from smallgpt.cli import processors

ROOT = Path(__file__).resolve().parent.parent
SETTINGS: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # configuration entries, environment
    "defaults": ({}, {}),
    "defaults again": ({}, {}),
    "no spinning": ({"session.intra_op.allow_spinning": "0"}, {}),
    "dynamic blocks": ({"session.dynamic_block_base": "4"}, {}),
    "denormals are zero": ({"session.set_denormal_as_zero": "1"}, {}),
    "no prepacking": ({"session.disable_prepacking": "1"}, {}),
    "flash attention": ({}, {"ORT_GQA_DISABLE_FLASH_ATTENTION": "0"}),
    "approximate int8 keys": ({}, {"ORT_MLAS_QKGEMM_S8_APPROX_VNNI": "1"}),
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
    context, result = model.model.max_seq_len, {}
    ids = np.random.default_rng(0).integers(260, model.model.vocab_size, context)
    for case, (prompt, batch, steps) in CASES.items():
        if prompt + steps + 2 <= context:
            call = (ids[:prompt], batch, steps, prompt + steps + 2)
            times = [model.decode(*call) if steps else model.first_token(ids[:prompt], context) for _ in range(3)]
            result[case] = min(times[1:])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", nargs="?", default="exports/fp32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=processors())
    options = parser.parse_args()
    found: dict[str, dict[str, list[float]]] = {name: {} for name in SETTINGS}
    for number in range(options.rounds):
        for name in SETTINGS if number % 2 == 0 else reversed(SETTINGS):
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
