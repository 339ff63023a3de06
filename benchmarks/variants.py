"""Trainings that no setting asks for: each replaces one part of the library in its process, then runs the stage train.

    python benchmarks/variants.py NAME    # in place of python -m stages.train; the names are those of VARIANTS

What they write is there to be compared by `benchmarks/ablations.py`; nothing else can read their models.
"""

import functools
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import smallgpt.model
import smallgpt.train
from smallgpt import loop, state, tokens
from smallgpt.cli import run
from smallgpt.config import Config, ModelConfig, load_config
from smallgpt.files import sha256_bytes
from smallgpt.model import Block, SmallGPT

Pair = tuple[Tensor, Tensor]


class SquaredReLU(nn.Module):
    """A feed-forward layer with max(0, x)^2 (So et al. 2021, arXiv 2109.08668), of as many parameters as SwiGLU."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = 3 * config.hidden_dim // 2  # two matrices in place of three
        self.up = nn.Linear(config.embed_dim, width, bias=False)
        self.down = nn.Linear(width, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)).square())  # (B, T, D)


class LayerDrop(Block):
    """A layer that some sequences pass by while it is trained (stochastic depth, Huang et al. 2016)."""

    rate = 0.05

    def forward(self, x: Tensor, rotary: Pair | None, past: Pair | None) -> tuple[Tensor, Pair]:
        y, present = super().forward(x, rotary, past)
        if self.training:
            kept = torch.rand(len(x), 1, 1, device=x.device) >= self.rate
            y = torch.where(kept, x + (y - x) / (1 - self.rate), x)  # (B, T, D)
        return y, present


class TwoTokens(SmallGPT):
    """One more layer, of training only, predicts the token after the next (Gloeckle et al. 2024, arXiv 2404.19737).

    While it is trained its logits are those of the next token, those of the one after it, each (B, T, V), and the
    weight of the second loss. The rest begins as in SmallGPT; the additional layer counts as parameters.
    """

    weight: Tensor

    def __init__(self, **shape: Any) -> None:
        super().__init__(**shape)
        begins = {name: value.clone() for name, value in self.state_dict().items()}
        self.h.append(Block(self.config))
        self.register_buffer("weight", torch.zeros(()), persistent=False)
        self._initialise()
        self.load_state_dict(begins, strict=False)

    def forward(self, ids: Tensor, past: Any = None) -> tuple[Any, list[Pair]]:
        rotary = (self.cos[: ids.shape[1]], self.sin[: ids.shape[1]])
        x = self.dropout(self.wte(ids))  # (B, T, D)
        *layers, last = self.h
        for block in layers:
            x, _ = block(x, rotary, None)
        logits = F.linear(self.ln_f(x), self.wte.weight)
        if not self.training:
            return logits, []
        return (logits, F.linear(self.ln_f(last(x, rotary, None)[0]), self.wte.weight), self.weight), []


def two_token_loss(logits: tuple[Tensor, Tensor, Tensor], targets: Tensor) -> Tensor:
    """The loss of the next token and, weighted, of the one after it, where the targets (B, T) have that one."""
    following, second, weight = logits
    one = F.cross_entropy(following.float().flatten(0, 1), targets.flatten())
    return one + weight * F.cross_entropy(second[:, :-1].float().flatten(0, 1), targets[:, 1:].flatten())


def shuffle_documents(ids: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """The stream (N,), `<|eos|> doc <|eos|> doc <|eos|> ...`, with its documents in another order for each epoch."""
    documents = np.split(ids[1:], np.flatnonzero(ids[1:] == ids[0])[:-1] + 1)
    if len(documents) < 2:
        raise ValueError("the train split is one document, which has no order; take another corpus")
    order = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 1, epoch])).permutation(len(documents))
    return np.concatenate([ids[:1], *(documents[place] for place in order)])


def squared_relu() -> None:
    smallgpt.model.SwiGLU = SquaredReLU


def layer_drop(rate: float) -> None:
    LayerDrop.rate = rate
    smallgpt.model.Block = LayerDrop


def reshuffle_documents() -> None:
    """The windows of an epoch, their offset and their order stay as `tokens.batch` has them."""
    streams: dict[int, np.ndarray] = {}

    def batch(ids: np.ndarray, *, seed: int, step: int, batch_size: int, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
        rows = []
        for row in range(step * batch_size, (step + 1) * batch_size):
            epoch = row // ((len(ids) - seq_len) // seq_len)
            if epoch not in streams:
                streams.pop(epoch - 2, None)
                streams[epoch] = shuffle_documents(ids, seed, epoch)
            rows.append(tokens.batch(streams[epoch], seed=seed, step=row, batch_size=1, seq_len=seq_len))
        return np.concatenate([x for x, _ in rows]), np.concatenate([y for _, y in rows])

    loop.batch = batch


def predict_two_tokens(weight: float = 0.3) -> None:
    """The weight of the second loss falls to zero with the steps."""
    one_step = loop.train_step

    def step(config: Config, at: state.TrainState, *rest: Any) -> tuple[float, float, float]:
        at.model.weight.fill_(weight * (1 - at.step / config.training.max_steps))
        return one_step(config, at, *rest)

    state.SmallGPT = TwoTokens
    loop.next_token_loss = two_token_loss
    loop.train_step = step


def average_last(count: int = 5, marks: int = 50) -> None:
    """Keep and validate the mean of the weights at the last `count` of `marks` even steps (Kaddour 2022, arXiv
    2209.14981), where training.ema_decay is 0."""
    kept: deque[dict[str, Tensor]] = deque(maxlen=count)
    one_step, one_validation = loop.train_step, loop.validate

    def step(config: Config, at: state.TrainState, *rest: Any) -> tuple[float, float, float]:
        result = one_step(config, at, *rest)
        taken, steps = at.step + 1, config.training.max_steps
        if taken % max(1, steps // marks) == 0 or taken == steps:
            kept.append({name: value.clone() for name, value in at.model.state_dict().items()})
        return result

    def validate(config: Config, at: state.TrainState, *rest: Any) -> None:
        if kept:
            at.ema = {name: torch.stack([weights[name] for weights in kept]).mean(0) for name in kept[0]}
        one_validation(config, at, *rest)
        at.ema = {}

    loop.train_step, loop.validate = step, validate


VARIANTS: dict[str, Callable[[], None]] = {
    "squared ReLU": squared_relu,
    "layer drop 0.05": functools.partial(layer_drop, 0.05),
    "layer drop 0.1": functools.partial(layer_drop, 0.1),
    "mean of the last weights": average_last,
    "two tokens": predict_two_tokens,
    "documents reshuffled": reshuffle_documents,
}


def main() -> None:
    if len(sys.argv) != 2 or sys.argv[1] not in VARIANTS:
        sys.exit(f"name one of {', '.join(VARIANTS)}")
    if load_config("params.yaml").model.architecture == "gpt2":
        raise ValueError("the variants are of llama and qwen3; set model.architecture to one of them")
    name, fingerprint = sys.argv[1], smallgpt.train.fingerprint
    # A variant goes on from its own states alone.
    smallgpt.train.fingerprint = lambda *settings: sha256_bytes(f"{name} {fingerprint(*settings)}".encode())
    VARIANTS[name]()
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from stages import train

    train.main()


if __name__ == "__main__":
    run(main)
