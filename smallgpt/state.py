"""What a training run carries from step to step, and how it survives a kill."""

import json
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from smallgpt.checkpoint import read_tensors, write_tensors
from smallgpt.cli import MismatchError
from smallgpt.config import Config
from smallgpt.files import replace_folder, sha256_bytes, sha256_file, write_atomic, write_json
from smallgpt.model import SmallGPT
from smallgpt.optim import build_optimizers, load_optimizer_tensors, optimizer_tensors
from smallgpt.tokens import TokenFile

log = logging.getLogger(__name__)

SOURCES = ("attention", "distributed", "loop", "model", "optim", "score", "state", "tokens")  # what it computes with


@dataclass
class TrainState:
    """Everything that changes while training; what it holds is what a resumed run needs."""

    model: SmallGPT
    optimizers: list[torch.optim.Optimizer]
    scaler: torch.amp.GradScaler
    step: int = 0
    best_loss: float = float("inf")
    best_step: int = 0
    best: dict[str, Tensor] = field(default_factory=dict)  # weights with the lowest validation loss
    ema: dict[str, Tensor] = field(default_factory=dict)  # moving average of the weights; empty when it is off
    train_rows: list[dict[str, Any]] = field(default_factory=list)
    valid_rows: list[dict[str, Any]] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """The weights that are validated and kept: the moving average where there is one."""
        return self.ema or self.model.state_dict()


def new_state(config: Config, device: torch.device) -> TrainState:
    """A freshly initialised model; the weights are drawn on the CPU, so they do not depend on the device."""
    torch.manual_seed(config.training.seed)
    model = SmallGPT(**config.model.model_dump()).to(device)
    scaler = torch.amp.GradScaler(device.type, enabled=config.training.precision == "fp16")
    state = TrainState(model, build_optimizers(model, config.training), scaler)
    if config.training.ema_decay:
        state.ema = {name: value.clone() for name, value in model.state_dict().items()}
    return state


def fingerprint(config: Config, data: dict[str, TokenFile], device: torch.device, threads: int) -> str:
    """Hash of all that shapes the result: settings, data, tokenizer, source, versions, threads, device."""
    parts = {
        "source": [sha256_file(Path(__file__).with_name(f"{name}.py")) for name in SOURCES],
        "model": config.model.model_dump(),
        "shape": [config.model.kv_heads, config.model.hidden_dim, config.seq_len],  # what is null above
        "training": config.training.shaping(),
        "data": {split: file.sha256 for split, file in data.items()},
        "tokenizer": data["train"].tokenizer_sha256,
        "versions": [torch.__version__, np.__version__],  # NumPy's permutations are those of its version
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "threads": threads,
    }
    return sha256_bytes(json.dumps(parts, sort_keys=True).encode())


def save_state(folder: Path, state: TrainState) -> None:
    """Write the resumable state, and keep of the others the one before: no half-written, damaged or older ones."""
    tensors = {f"model.{name}": value for name, value in state.model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in state.ema.items()}
    tensors |= {f"best.{name}": value for name, value in state.best.items()}
    tensors |= optimizer_tensors(state.optimizers)
    current = folder / f"state-{state.step:09d}"
    with replace_folder(current) as temporary:
        write_tensors(temporary / "state.safetensors", tensors)
        values = {
            "step": state.step,
            "best_loss": state.best_loss,
            "best_step": state.best_step,
            "scaler": state.scaler.state_dict(),
            "train_rows": state.train_rows,
            "valid_rows": state.valid_rows,
        }
        write_atomic(temporary / "state.json", json.dumps(values))  # a gradient norm may be infinite with fp16
        hashes = {name: sha256_file(temporary / name) for name in ("state.safetensors", "state.json")}
        write_json(temporary / "hashes.json", hashes)
    # Those of later steps were damaged, or the training would have gone on from them.
    kept = [saved for saved in sorted(folder.glob("state-*")) if saved <= current][-2:]
    for saved in [*folder.glob("state-*"), *folder.glob(".state-*")]:
        if saved not in kept:
            shutil.rmtree(saved)


def load_state(folder: Path, state: TrainState) -> None:
    """Go on from the newest state in `folder` that is whole; without one, `state` stays as it is."""
    for saved in sorted(folder.glob("state-*"), reverse=True):
        try:
            hashes = json.loads((saved / "hashes.json").read_text(encoding="utf-8"))
            for name in ("state.safetensors", "state.json"):
                if sha256_file(saved / name) != hashes[name]:
                    raise MismatchError(f"the sha256 of {name} is another one")
            values = json.loads((saved / "state.json").read_text(encoding="utf-8"))
            tensors = read_tensors(saved / "state.safetensors")
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is damaged and left aside: %s", saved, error)
            continue

        def part(kind: str, tensors: dict[str, Tensor] = tensors) -> dict[str, Tensor]:
            device = next(state.model.parameters()).device
            return {k.removeprefix(f"{kind}."): v.to(device) for k, v in tensors.items() if k.startswith(f"{kind}.")}

        state.model.load_state_dict(part("model"))
        state.ema, state.best = part("ema"), part("best")
        load_optimizer_tensors(state.optimizers, tensors)
        state.scaler.load_state_dict(values["scaler"])
        state.step, state.best_loss, state.best_step = values["step"], values["best_loss"], values["best_step"]
        state.train_rows, state.valid_rows = values["train_rows"], values["valid_rows"]
        log.info("resumed after step %d", state.step)
        return


def clear_states(folder: Path) -> None:
    """Delete all states, those that a kill left half written too."""
    for saved in [*folder.glob("state-*"), *folder.glob(".state-*")]:
        shutil.rmtree(saved)
