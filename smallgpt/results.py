"""`python -m smallgpt.results add`: one row of the results table, from the files that a run left behind.

Rows are written by this module and never by hand: reports/results/*.json, one for each trained model, and from all of
them docs/results.md. What depends on the machine (hardware, time, speed) stands in a file that training leaves outside
of DVC; a model that DVC restored from its cache has none, and its row says so.
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallgpt.cli import MismatchError, run
from smallgpt.config import load_config
from smallgpt.files import sha256_file, write_atomic, write_json

COLUMNS = {
    "dataset": "dataset",
    "split": "split",
    "architecture": "model",
    "parameters": "parameters",
    "vocab_size": "vocab",
    "epochs": "epochs",
    "bits_per_byte": "bits/byte",
    "sliding_bits_per_byte": "sliding",
    "floor_bits_per_byte": "floor",
    "word_perplexity": "word PPL",
    "perplexity": "token PPL",
    "nats_per_token": "nats/token",
    "context": "context",
    "stride": "stride",
    "seed": "seed",
    "hardware": "hardware",
    "seconds": "training s",
    "tokens_per_second": "tokens/s",
}
INTRODUCTION = """# Results

One row for each trained model, written by `python -m smallgpt.results add` from the files of its run. Bits per byte do
not depend on the tokenizer and lead; *sliding* windows move by *stride*. *Training s* is the time of the whole
training, compilation and validation included; a dash means that the figure is not known.

"""


def add(project: Path, config_file: str, out: Path) -> Path:
    """Write the row of the model that stands in `project` and return its path.

    The reported split is test, or valid where the corpus has no test split. Raises FileNotFoundError when a stage has
    not run, and MismatchError when `config_file` is not what the model was trained with or the reports are another
    model's.
    """
    config = load_config(project / config_file)
    if config != load_config(project / "params.yaml"):
        raise MismatchError(f"{config_file} differs from params.yaml, which is what was run")
    prepared = _read(project / "reports/prepare.json", "prepare")
    summary = _read(project / "reports/train/summary.json", "train")
    scored = _read(project / "reports/evaluate/perplexity.json", "evaluate")
    model = _read(project / "models/gpt/config.json", "train")
    digest = sha256_file(project / "models/gpt/model.safetensors")
    if model["model"] != config.model.model_dump() or summary["steps"] != model["last_step"]:
        raise MismatchError("models/gpt, reports/ and params.yaml belong to different runs; run dvc repro first")
    split = "test" if "test" in scored else "valid"
    machine = project / ".smallgpt/train/runs" / f"{digest[:16]}.json"
    facts = json.loads(machine.read_text(encoding="utf-8")) if machine.is_file() else {}
    row: dict[str, Any] = {
        "dataset": prepared["source"] if "/" not in prepared["source"] else Path(prepared["source"]).name,
        "split": split,
        "split_sha256": prepared[split]["sha256"],
        "config": config_file,
        "architecture": config.model.architecture,
        "parameters": summary["parameters"],
        "vocab_size": config.model.vocab_size,
        "tokens_seen": summary["tokens_seen"],
        "epochs": round(summary["epochs"], 3),
        "seed": config.training.seed,
        **scored[split],
        **{name: facts.get(name) for name in ("hardware", "seconds", "tokens_per_second")},
        "model_sha256": digest,
    }
    path = out / f"{row['dataset']}-{row['architecture']}-{digest[:8]}.json"
    write_json(path, row)
    return path


def table(rows: Sequence[dict[str, Any]]) -> str:
    """All rows as a Markdown table, ordered by dataset and then by bits per byte."""
    ordered = sorted(rows, key=lambda row: (row["dataset"], row["sliding_bits_per_byte"]))
    cells = [list(COLUMNS.values()), ["---"] * len(COLUMNS)]
    cells += [[_show(row.get(name)) for name in COLUMNS] for row in ordered]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def _show(value: Any) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}" if value >= 10 else f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


def _read(path: Path, stage: str) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; the {stage} stage writes it")
    values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m smallgpt.results add [--config FILE]` and `python -m smallgpt.results table`."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.results", description="The table of trained models.")
    parser.add_argument("action", choices=["add", "table"], help="add: this project's model; table: docs/results.md")
    parser.add_argument("--config", default="params.yaml", help="the parameter file the run was made with")
    parser.add_argument("--project", type=Path, default=Path(), help="folder with params.yaml, models and reports")
    parser.add_argument("--out", type=Path, default=Path("reports/results"))
    parser.add_argument("--page", type=Path, default=Path("docs/results.md"))
    options = parser.parse_args(arguments)
    if options.action == "add":
        print(add(options.project, options.config, options.out))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob("*.json"))]
    if not rows:
        raise FileNotFoundError(f"{options.out} holds no rows; python -m smallgpt.results add writes one")
    write_atomic(
        options.page,
        INTRODUCTION + table(rows),
    )
    return 0


if __name__ == "__main__":
    run(main)
