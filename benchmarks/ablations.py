"""What each part of the recipe is worth: one change at a time to a small model, at equal data, on the valid split.

    python benchmarks/ablations.py [--only NAMES] [--seeds 1,2] [--epochs 10] [--set KEY=VALUE ...]
                                   [--out reports/bench/ablations.json]

The control is configs/shakespeare-25m.yaml at 4 layers of 256. Changes are of its settings or, by variants.py, of the
library. Every run is prepare, tokenize and train in a folder and in processes of its own, sees the text as often as the
others and is judged by its best bits per byte. Runs that stand in the output are not repeated, so a stopped call goes
on. Writes a Markdown table beside the JSON.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from variants import VARIANTS

from smallgpt.cli import run
from smallgpt.files import write_atomic, write_json
from smallgpt.machine import describe_machine, pick_device
from smallgpt.train import pick_precision

ROOT = Path(__file__).resolve().parent.parent
CONTROL = {"model.embed_dim": 256, "model.num_heads": 4, "model.num_layers": 4, "model.dropout": 0.1}
CHANGES: dict[str, dict[str, Any]] = {
    "control": {},
    "gpt2": {"model.architecture": "gpt2"},
    "llama": {"model.architecture": "llama"},
    "AdamW 3e-3": {"training.optimizer": "adamw"},
    "AdamW 1e-3": {"training.optimizer": "adamw", "training.learning_rate": 1e-3},
    "weight decay 0.1": {"training.weight_decay": 0.1},
    "weight decay 0.4": {"training.weight_decay": 0.4},
    "weight decay 0.8": {"training.weight_decay": 0.8},
    "weight decay 1.6": {"training.weight_decay": 1.6},
    "dropout 0": {"model.dropout": 0.0},
    "dropout 0.1": {"model.dropout": 0.1},
    "dropout 0.2": {"model.dropout": 0.2},
    "dropout 0.3": {"model.dropout": 0.3},
    "dropout 0.4": {"model.dropout": 0.4},
    "no EMA": {"training.ema_decay": 0.0},
    "vocabulary 512": {"model.vocab_size": 512},
    "vocabulary 2048": {"model.vocab_size": 2048},
    "vocabulary 4096": {"model.vocab_size": 4096},
    "context 512": {"model.max_seq_len": 512, "training.batch_size": 8},
    "cosine schedule": {"training.lr_schedule": "cosine"},
    **{name: {} for name in VARIANTS},
    "mean of the last weights": {"training.ema_decay": 0.0},
}
ASKED = {"documents reshuffled"}  # by --only: the control's corpus is one document
NOISE = 0.005  # nats a token; smaller effects are none


def settings_with(changes: dict[str, Any]) -> dict[str, Any]:
    """The preset, changed."""
    params: dict[str, Any] = yaml.safe_load((ROOT / "configs/shakespeare-25m.yaml").read_text(encoding="utf-8"))
    for key, value in changes.items():
        section, _, name = key.partition(".")
        if name not in params.get(section, {}):
            raise ValueError(f"there is no setting {key}; settings are named as in training.weight_decay")
        params[section][name] = value
    return params


def measure(changes: dict[str, Any], variant: str | None, seed: int, epochs: float) -> dict[str, Any]:
    """Train once, as the variant if one is named, and return what the table needs."""
    params = settings_with(changes | {"training.seed": seed})
    with tempfile.TemporaryDirectory() as folder:

        def run(*command: str) -> None:
            (Path(folder) / "params.yaml").write_text(yaml.safe_dump(params), encoding="utf-8")
            places = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = os.environ | {"PYTHONPATH": os.pathsep.join(places), "SMALLGPT_TRACKING": "off"}
            if subprocess.run([sys.executable, *command], cwd=folder, env=environment).returncode:
                sys.exit(f"python {' '.join(command)} failed")

        run("-m", "stages.prepare")
        run("-m", "stages.tokenize")
        text = json.loads((Path(folder) / "reports/tokenize.json").read_text(encoding="utf-8"))
        training = params["training"]
        tokens = training["batch_size"] * (training["seq_len"] or params["model"]["max_seq_len"])
        tokens *= training["gradient_accumulation_steps"]
        steps = max(1, round(epochs * text["train"]["tokens"] / tokens))
        training |= {"max_steps": steps, "eval_interval": max(1, steps // 10)}
        training["warmup_steps"] = min(training["warmup_steps"], steps)
        started = time.perf_counter()
        run(*([str(ROOT / "benchmarks/variants.py"), variant] if variant else ["-m", "stages.train"]))
        seconds = time.perf_counter() - started
        summary = json.loads((Path(folder) / "reports/train/summary.json").read_text(encoding="utf-8"))
    valid = text["valid"]
    nats = summary["valid"]["best_loss"] * (valid["tokens"] - 1)
    return {
        "parameters": summary["parameters"],
        "epochs": round(summary["epochs"], 2),
        "best_epoch": round(summary["epochs"] * summary["valid"]["best_step"] / steps, 2),
        "nats_per_token": summary["valid"]["best_loss"],
        "bits_per_byte": nats / math.log(2) / valid["text_bytes"],
        "tokens_per_byte": (valid["tokens"] - 1) / valid["text_bytes"],
        "seconds": round(seconds, 1),
    }


def to_markdown(report: dict[str, Any]) -> str:
    """One row for each change; its effect is in nats for a token of the control."""
    lines = [
        f"{report['machine']}, {report['precision']}. Control: {report['control']}. Effects above zero are "
        f"worse; those below {NOISE} nats a token are noise, and so are those of one sign with one seed and of the "
        "other with another.",
        "",
        "| change | parameters | bits/byte, best of valid | mean | effect, nats | by seed | best after epoch |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    runs: dict[str, dict[str, Any]] = report["runs"]
    means = {name: statistics.mean(run["bits_per_byte"] for run in seeds.values()) for name, seeds in runs.items()}
    for name, seeds in runs.items():
        found = list(seeds.values())
        effect, by_seed = "", ""
        if name != "control" and "control" in runs:
            control = runs["control"]
            both = [seed for seed in seeds if seed in control]  # seeds differ by more than many changes
            bits = [seeds[seed]["bits_per_byte"] - control[seed]["bits_per_byte"] for seed in both]
            per_token = next(iter(control.values()))["tokens_per_byte"]
            nats = [value * math.log(2) / per_token for value in bits]
            mean = statistics.mean(nats) if nats else math.nan
            noise = abs(mean) < NOISE or min(nats, default=0) < 0 < max(nats, default=0)
            effect = f"{mean:+.3f}" + (" (noise)" if noise else "")
            by_seed = ", ".join(f"{value:+.3f}" for value in nats)
        shown = ", ".join(f"{run['bits_per_byte']:.4f}" for run in found)
        epochs = ", ".join(f"{run['best_epoch']:.1f}" for run in found)
        row = [name, f"{found[0]['parameters']:,}", shown, f"{means[name]:.4f}", effect, by_seed, epochs]
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {', '.join(CHANGES)} (default: all that change the control)")
    parser.add_argument("--seeds", default="1,2")
    parser.add_argument("--epochs", type=float, default=10.0)
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of the control, paths absolute; repeatable"
    )
    parser.add_argument("--out", type=Path, default=Path("reports/bench/ablations.json"))
    options = parser.parse_args()
    control = CONTROL | {key: yaml.safe_load(value) for key, _, value in (item.partition("=") for item in options.set)}
    settings = settings_with(control)
    known = [
        name
        for name, changes in CHANGES.items()
        if name == "control" or name in VARIANTS or settings_with(control | changes) != settings
    ]
    names = options.only.split(",") if options.only else [name for name in known if name not in ASKED]
    if unknown := set(names) - set(known):
        parser.error(f"--only names {', '.join(sorted(unknown))}; known are {', '.join(known)}")
    training = settings["training"]
    device = pick_device(training["device"])
    report: dict[str, Any] = {
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else describe_machine(),
        "precision": pick_precision(training["precision"], device),
        "control": ", ".join(f"{key} {value}" for key, value in control.items()) + f", {options.epochs:g} epochs",
        "settings": {part: settings[part] for part in ("prepare", "tokenizer", "model", "training")},
        "runs": {},
    }
    if options.out.is_file():
        before = json.loads(options.out.read_text(encoding="utf-8"))
        for key in ("machine", "precision", "control", "settings"):
            if before.get(key) != report[key]:
                parser.error(f"{options.out} is of another {key}; name another file with --out")
        report["runs"] = before["runs"]
    for seed in options.seeds.split(","):  # all changes with one seed first
        for name in names:
            if seed not in report["runs"].get(name, {}):
                print(f"{name}, seed {seed}", file=sys.stderr)
                found = measure(control | CHANGES[name], name if name in VARIANTS else None, int(seed), options.epochs)
                report["runs"].setdefault(name, {})[seed] = found
                write_json(options.out, report)
                write_atomic(options.out.with_suffix(".md"), to_markdown(report))
    print(to_markdown(report))


if __name__ == "__main__":
    run(main)
