"""The schedule to the exact number, who is decayed, and optimizers that resume to the bit."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from smallgpt.checkpoint import read_tensors, write_tensors
from smallgpt.config import TrainingConfig
from smallgpt.model import SmallGPT, next_token_loss
from smallgpt.optim import (
    Muon,
    build_optimizers,
    learning_rate_factor,
    load_optimizer_tensors,
    optimizer_tensors,
    orthogonalized,
    set_learning_rate,
)

pytestmark = pytest.mark.usefixtures("one_thread")
SHAPE = {"vocab_size": 300, "embed_dim": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 8, "dropout": 0.0}


def schedule(kind: str, warmup_steps: int, max_steps: int = 10) -> list[float]:
    config = TrainingConfig(lr_schedule=kind, warmup_steps=warmup_steps, max_steps=max_steps)
    return [learning_rate_factor(step, config) for step in range(max_steps + 1)]


def cosine(shares: list[float]) -> list[float]:
    return [(1 - math.cos(math.pi * share)) / 2 for share in shares]


@pytest.mark.parametrize(
    ("kind", "warmup", "expected"),
    [
        ("linear", 4, [1 / 4, 2 / 4, 3 / 4, 1, 6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]),
        ("cosine", 4, [1 / 4, 2 / 4, 3 / 4, 1, *cosine([6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0])]),
        ("linear", 0, [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0]),
        ("cosine", 0, cosine([1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0])),
        ("linear", 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 0]),
        ("cosine", 10, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1, 0]),
    ],
)
def test_the_learning_rate_of_every_step(kind: str, warmup: int, expected: list[float]) -> None:
    assert schedule(kind, warmup) == pytest.approx(expected, abs=1e-15)
    assert schedule(kind, warmup)[10] == 0


def test_known_values_of_the_cosine() -> None:
    factors = schedule("cosine", 0, 6)
    assert factors == pytest.approx([1, (2 + math.sqrt(3)) / 4, 3 / 4, 1 / 2, 1 / 4, (2 - math.sqrt(3)) / 4, 0])
    assert schedule("linear", 1, 1) == [1, 0]


def make(optimizer: str, architecture: str = "gpt2", **values: float) -> tuple[SmallGPT, TrainingConfig]:
    torch.manual_seed(0)
    config = TrainingConfig(optimizer=optimizer, warmup_steps=2, max_steps=10, **values)
    return SmallGPT(architecture=architecture, **SHAPE), config


def names(model: nn.Module, optimizer: torch.optim.Optimizer, group: int) -> set[str]:
    members = {id(parameter) for parameter in optimizer.param_groups[group]["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in members}


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_who_is_trained_by_what(architecture: str) -> None:
    model, config = make("muon", architecture)
    adamw, muon = build_optimizers(model, config)
    assert isinstance(muon, Muon)
    everything = {name for name, _ in model.named_parameters()}
    blocks = {
        f"h.{i}.{part}.weight" for i in range(2) for part in ("attn.qkv", "attn.proj", "mlp.up", "mlp.down")
    }  # fmt: skip
    embeddings = {"wte.weight", "wpe.weight"} & everything
    assert names(model, muon, 0) == blocks
    assert names(model, adamw, 0) == embeddings
    assert names(model, adamw, 1) == everything - blocks - embeddings
    model, config = make("adamw", architecture)
    (alone,) = build_optimizers(model, config)
    assert names(model, alone, 0) == blocks | embeddings
    assert names(model, alone, 1) == everything - blocks - embeddings
    assert [group["betas"] for group in alone.param_groups] == [(0.9, 0.95)] * 2


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_decay_acts_on_matrices_only(optimizer: str) -> None:
    model, config = make(optimizer, weight_decay=0.5, learning_rate=0.1, muon_learning_rate=0.2)
    before = copy.deepcopy(model.state_dict())
    optimizers = build_optimizers(model, config)
    assert set_learning_rate(optimizers, config, 0) == 0.1 / 2  # the first of two warm-up steps
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for each in optimizers:
        each.step()
    for name, parameter in model.named_parameters():
        rate = 0.2 if optimizer == "muon" and name.startswith("h.") else 0.1
        share = 1 - rate / 2 * 0.5 if parameter.ndim == 2 else 1
        assert torch.allclose(parameter, before[name] * share, rtol=1e-6, atol=0), name


def step(model: SmallGPT, optimizers: list[torch.optim.Optimizer], config: TrainingConfig, index: int) -> None:
    ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(index))
    model.zero_grad()
    next_token_loss(model(ids[:, :-1])[0], ids[:, 1:]).backward()
    set_learning_rate(optimizers, config, index)
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_saved_optimizers_go_on_to_the_bit(optimizer: str, tmp_path: Path) -> None:
    model, config = make(optimizer)
    optimizers = build_optimizers(model, config)
    for index in range(3):
        step(model, optimizers, config, index)
    write_tensors(tmp_path / "state.safetensors", optimizer_tensors(optimizers))
    twin = copy.deepcopy(model)
    resumed = build_optimizers(twin, config)
    load_optimizer_tensors(resumed, read_tensors(tmp_path / "state.safetensors"))
    fresh_model = copy.deepcopy(model)
    fresh = build_optimizers(fresh_model, config)
    for index in range(3, 7):
        for each, its in ((model, optimizers), (twin, resumed), (fresh_model, fresh)):
            step(each, its, config, index)
    saved, loaded = optimizer_tensors(optimizers), optimizer_tensors(resumed)
    assert saved.keys() == loaded.keys()
    assert len(saved) == (28 * 3 if optimizer == "adamw" else 20 * 3 + 8)
    assert all(torch.equal(saved[name], loaded[name]) for name in saved)
    for name, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[name]), name
    assert not torch.equal(model.wte.weight, fresh_model.wte.weight)  # the state does matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_move_to_one(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    for shape in ((3, 8, 8), (2, 5, 30), (2, 30, 5)):
        matrices = torch.randn(shape, generator=draw)
        result = orthogonalized(matrices, dtype).float()
        assert result.shape == shape
        assert torch.linalg.svdvals(result).min() > 0.6
        assert torch.linalg.svdvals(result).max() < 1.3
        left, _, right = torch.linalg.svd(matrices, full_matrices=False)
        assert ((left @ right) * result).sum() / result.norm() / shape[0] ** 0.5 / min(shape[1:]) ** 0.5 > 0.97


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_muon_updates_as_that_of_pytorch(dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=draw) for shape in ((24, 8), (8, 24), (8, 8), (8, 8))]
    ours, theirs = ([nn.Parameter(value.clone()) for value in values] for _ in range(2))
    settings = {"lr": 0.05, "weight_decay": 0.1, "momentum": 0.95}
    optimizers = [Muon(ours, **settings, dtype=dtype), torch.optim.Muon(theirs, **settings)]
    for _ in range(4):
        gradients = [torch.randn(value.shape, generator=draw) for value in values]
        for parameters, optimizer in zip((ours, theirs), optimizers, strict=True):
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient.clone()
            optimizer.step()
    for value, mine, other in zip(values, ours, theirs, strict=True):
        assert (mine - other).norm() < 0.02 * (value - other).norm()  # theirs iterates in bfloat16


def test_a_few_steps_lower_the_loss() -> None:
    for optimizer, architecture in (("adamw", "gpt2"), ("muon", "llama")):
        model, config = make(optimizer, architecture, learning_rate=0.01)
        optimizers = build_optimizers(model, config)
        ids = torch.randint(300, (2, 9), generator=torch.Generator().manual_seed(0))
        for _ in range(8):
            step(model, optimizers, config, 0)
        assert next_token_loss(model(ids[:, :-1])[0], ids[:, 1:]).item() < math.log(300) - 0.5
