"""Trainings of a second or less for the tests of the loop, its state and the whole of train."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from smallgpt.config import Config, parse_config
from smallgpt.files import sha256_bytes
from smallgpt.loop import loop
from smallgpt.state import TrainState, new_state
from smallgpt.tokenizer import Tokenizer
from smallgpt.tokens import TokenFile
from smallgpt.tracking import Tracker

ROOT = Path(__file__).parent.parent
SEQ_LEN = 16


def configure(model: dict[str, Any] | None = None, **training: Any) -> Config:
    """Two layers of 32, eager, in float32 on one CPU thread; what is given replaces that."""
    shape = {
        "vocab_size": 320,
        "embed_dim": 32,
        "num_heads": 2,
        "num_layers": 2,
        "max_seq_len": SEQ_LEN,
        "dropout": 0.0,
    }
    recipe = {
        "batch_size": 4,
        "learning_rate": 3e-3,
        "warmup_steps": 2,
        "max_steps": 8,
        "precision": "fp32",
        "compile": False,
        "device": "cpu",
        "threads": 1,
        "eval_interval": 3,
        "log_interval": 1,
        "checkpoint_interval": 2,
    }
    return parse_config({"model": shape | (model or {}), "training": recipe | training}, "the test")


def chain(seed: int, tokens: int) -> np.ndarray:
    """Ids from 4 to 67 in which each has three successors, so that there is something to learn."""
    draw = np.random.Generator(np.random.Philox(seed))
    ids = [0]
    for step in draw.choice([1, 5, 23], size=tokens - 1).tolist():
        ids.append((5 * ids[-1] + step) % 64)
    return np.array(ids, dtype=np.uint16) + 4


def token_file(ids: np.ndarray, tokenizer_sha256: str = "ab" * 32) -> TokenFile:
    digest = sha256_bytes(ids.tobytes())
    return TokenFile(ids, 1, len(ids), len(ids), digest, digest, tokenizer_sha256)


# 13 windows of the smallest length: an epoch has 12 of them, three steps of batch size 4.
def streams() -> dict[str, TokenFile]:
    return {"train": token_file(chain(1, 13 * SEQ_LEN)), "valid": token_file(chain(2, 100))}


def write_tokens(folder: Path, tokenizer: Tokenizer, data: dict[str, TokenFile] | None = None) -> None:
    """The files of `streams`, as if `tokenizer` had written them."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, file in (data or streams()).items():
        (folder / f"{split}.bin").write_bytes(file.ids.tobytes())
        header = {name: getattr(file, name) for name in ("documents", "text_bytes", "words", "sha256", "text_sha256")}
        header |= {"dtype": "uint16", "tokens": len(file.ids), "tokenizer_sha256": tokenizer.sha256}
        (folder / f"{split}.json").write_text(json.dumps(header))


class Watcher(Tracker):
    """Calls a function with every point of the curves: (names and values, step)."""

    def __init__(self, call: Callable[[dict[str, float], int], None]) -> None:
        super().__init__()
        self.call = call

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.call(dict(metrics), step)


def run_loop(config: Config, folder: Path, *, state: TrainState | None = None, **options: Any) -> TrainState:
    """All steps that are left; returns the state. Options: `data`, `tracker`."""
    state = state or new_state(config, torch.device("cpu"))
    folder.mkdir(parents=True, exist_ok=True)
    loop(config, state, options.get("data") or streams(), folder, options.get("tracker") or Tracker())
    return state


def copy(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in weights.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    """Whether two sets of tensors have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())


def contents(*folders: Path) -> dict[str, bytes]:
    """The bytes of every file below the folders."""
    files = [(folder.name, path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()]
    return {f"{name}/{path.name}": path.read_bytes() for name, path in files}


def write_project(folder: Path, config: Config, tokenizer: Tokenizer) -> None:
    """A project before its stage train: params.yaml, data/tokens and models/tokenizer."""
    write_tokens(folder / "data" / "tokens", tokenizer)
    (folder / "models" / "tokenizer").mkdir(parents=True)
    (folder / "models" / "tokenizer" / "tokenizer.model").write_bytes(tokenizer.model)
    (folder / "params.yaml").write_text(yaml.safe_dump(config.model_dump(include={"model", "training"})))


def start(folder: Path, module: str = "stages.train", *arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Start `python -m module` in the folder, without tracking."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=inherited | {"PYTHONPATH": str(ROOT), "SMALLGPT_TRACKING": "off"} | environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def steps_done(folder: Path) -> list[int]:
    """The steps in the speed logs below the folder; a folder that is renamed meanwhile is left out."""
    logs = [Path(place) / "speed.csv" for place, _, names in os.walk(folder) if "speed.csv" in names]
    return [int(line.split(",")[0]) for log in logs for line in log.read_text().splitlines()[1:]]


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Until something has happened; the process must not end before."""
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
