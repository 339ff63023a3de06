"""Optimizers and the learning rate as a pure function of the step."""

import math

import torch
from torch import nn

from smallgpt.config import TrainingConfig


def learning_rate_factor(step: int, config: TrainingConfig) -> float:
    """Share of the peak learning rate at `step` (from 0): linear warm-up, then a decay that reaches zero at the end.

    Decay to zero, linear or cosine, beats a decay to a tenth (Bergsma et al. 2025, arXiv 2502.15938).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    left = (config.max_steps - step) / max(1, config.max_steps - config.warmup_steps)  # from 1 down to 0
    return left if config.lr_schedule == "linear" else 0.5 * (1 - math.cos(math.pi * left))


def build_optimizers(model: nn.Module, config: TrainingConfig) -> list[torch.optim.Optimizer]:
    """AdamW for everything, or Muon (Jordan et al. 2024) for the matrices of the blocks and AdamW for the rest.

    Weight decay acts on matrices only, embeddings included; norms and biases are left alone.
    """
    matrices: list[nn.Parameter] = []
    embeddings: list[nn.Parameter] = []
    vectors: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        group = vectors if parameter.ndim < 2 else matrices if name.startswith("h.") else embeddings
        group.append(parameter)
    muon = config.optimizer == "muon"
    adamw = torch.optim.AdamW(
        [
            {"params": embeddings if muon else [*embeddings, *matrices], "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    if not muon:
        return [adamw]
    return [adamw, torch.optim.Muon(matrices, lr=config.muon_learning_rate, weight_decay=config.weight_decay)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], config: TrainingConfig, step: int) -> float:
    """Set the learning rate of every group for `step` and return AdamW's."""
    factor = learning_rate_factor(step, config)
    for optimizer in optimizers:
        peak = config.muon_learning_rate if isinstance(optimizer, torch.optim.Muon) else config.learning_rate
        for group in optimizer.param_groups:
            group["lr"] = peak * factor
    return config.learning_rate * factor


def optimizer_tensors(optimizers: list[torch.optim.Optimizer]) -> dict[str, torch.Tensor]:
    """The state of all optimizers as flat, named tensors."""
    return {
        f"optimizer.{i}.{index}.{name}": value
        for i, optimizer in enumerate(optimizers)
        for index, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def load_optimizer_tensors(optimizers: list[torch.optim.Optimizer], tensors: dict[str, torch.Tensor]) -> None:
    """Put back what `optimizer_tensors` returned."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            kind, number, *rest = key.split(".", 3)
            if kind == "optimizer" and int(number) == i:
                state.setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
