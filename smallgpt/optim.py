"""Optimizers and the learning rate as a pure function of the step."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from smallgpt.config import TrainingConfig

NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al. 2024: steep at zero, all values end near 1


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): momentum whose singular values are set to about 1, for the matrices of the blocks.

    Same updates as torch.optim.Muon, faster: equal shapes go through one batched product, of matrices in `dtype`,
    float32 or bfloat16.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all parameters that have a gradient."""
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[torch.Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape.setdefault(parameter.shape, []).append(parameter)
                    if not self.state[parameter]:
                        self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
            for (rows, columns), parameters in by_shape.items():
                gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
                buffers = [self.state[parameter]["momentum_buffer"] for parameter in parameters]
                torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
                nesterov = torch._foreach_lerp(gradients, buffers, group["momentum"])
                updates = orthogonalized(torch.stack(nesterov), self.dtype).to(parameters[0].dtype)
                torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(parameters, updates.unbind(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def orthogonalized(matrices: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Matrices (N, R, C) with their singular values moved to about 1 by Newton-Schulz steps in `dtype`."""
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    if tall := x.shape[-2] > x.shape[-1]:
        x = x.mT
    if dtype == torch.float32:
        x = _on_gram_matrices(x.float())
    else:
        a, b, c = NEWTON_SCHULZ
        x = x.to(dtype)
        for _ in range(NEWTON_SCHULZ_STEPS):
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _on_gram_matrices(x: torch.Tensor) -> torch.Tensor:
    """The same with fewer products, for wide matrices and a type that leaves room for squared condition numbers.

    Each step multiplies X by a polynomial of G = X X^T, and all those polynomials commute. So the steps only update
    G and the product Q of the polynomials, both min(R, C) squared, and X is multiplied once at the end.
    """
    a, b, c = NEWTON_SCHULZ
    gram = x @ x.mT  # (N, S, S), as all that follow
    identity = torch.eye(gram.shape[-1], device=x.device)
    product: torch.Tensor | None = None
    for left in reversed(range(NEWTON_SCHULZ_STEPS)):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c) + a * identity
        product = polynomial if product is None else polynomial @ product
        if left:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product @ x


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
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    return [adamw, Muon(matrices, config.muon_learning_rate, config.weight_decay, dtype=dtype)]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], config: TrainingConfig, step: int) -> float:
    """Set the learning rate of every group for `step` and return AdamW's."""
    factor = learning_rate_factor(step, config)
    for optimizer in optimizers:
        peak = config.muon_learning_rate if isinstance(optimizer, Muon) else config.learning_rate
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
    """Put back what `optimizer_tensors` returned; other names among the `tensors` are left alone."""
    for i, optimizer in enumerate(optimizers):
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key, value in tensors.items():
            kind, number, *rest = key.split(".", 3)
            if kind == "optimizer" and int(number) == i:
                state.setdefault(int(rest[0]), {})[rest[1]] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
