"""SmallGPT: a GPT-2, a LLaMA or a Qwen3 in one file.

B batch, T positions, D embed_dim, H heads, K key/value heads, d head_dim, F hidden_dim, V vocabulary, P past.
The architectures map one to one onto Transformers' GPT2LMHeadModel, LlamaForCausalLM and Qwen3ForCausalLM.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smallgpt.attention import causal_attention, later_keys
from smallgpt.checkpoint import load_checkpoint, save_checkpoint
from smallgpt.cli import MismatchError
from smallgpt.config import ModelConfig
from smallgpt.decode import generate_text
from smallgpt.tokenizer import Tokenizer

Cache = list[tuple[Tensor, Tensor]]  # for every layer the keys and values so far, each (B, K, P, d)
NORM_EPS = 1e-5
ROPE_THETA = 10_000.0


class Attention(nn.Module):
    """Causal self-attention with a cache; rotary positions and grouped heads but for gpt2.

    qwen3 brings queries and keys of each head to one length (Henry et al. 2020, arXiv 2010.04245).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_heads, config.kv_heads, config.head_dim
        bias = config.architecture == "gpt2"
        self.qkv = nn.Linear(config.embed_dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=bias)
        self.proj = nn.Linear(config.embed_dim, config.embed_dim, bias=bias)
        normed = config.architecture == "qwen3"
        self.q_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS) if normed else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=NORM_EPS) if normed else None
        self.later: Tensor
        self.register_buffer("later", later_keys(config.max_seq_len), persistent=False)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        B, T, _ = x.shape
        q, k, v = self.project(x, rotary)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)  # (B, K, P + T, d)
        present = (k, v)
        if self.kv_heads != self.heads:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, dim=1) for t in (k, v))  # (B, H, P + T, d)
        if past is None:
            y = causal_attention(q, k, v, self.later)  # (B, H, T, d)
        else:
            # is_causal aligns to the top left corner, which is wrong with a past; one query sees everything.
            P = k.shape[2] - T
            mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P) if T > 1 else None
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(y.transpose(1, 2).reshape(B, T, -1)), present

    def project(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, T, d), keys and values (B, K, T, d) of `x` (B, T, D), normed and rotated."""
        B, T, _ = x.shape
        q, k, v = self.qkv(x).split([n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)], dim=-1)
        q = q.view(B, T, self.heads, self.head_dim).transpose(1, 2)
        k = k.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        v = v.view(B, T, self.kv_heads, self.head_dim).transpose(1, 2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q.float()), self.k_norm(k.float())  # with bf16 the weights are still in fp32
        if rotary is not None:
            q, k = rotate(q, *rotary).to(v.dtype), rotate(k, *rotary).to(v.dtype)
        return q, k, v


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) on the two halves of each head, as LLaMA does; `x` is (B, H, T, d)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rotary_tables(max_seq_len: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles, each `(max_seq_len, head_dim / 2)`, computed in float64 by NumPy.

    PyTorch's come from MKL, which in some processes rounds one of them the other way.
    """
    frequencies = ROPE_THETA ** (-np.arange(0, head_dim, 2) / head_dim)  # (d / 2,)
    angles = np.outer(np.arange(max_seq_len), frequencies)  # (S, d / 2)
    return torch.from_numpy(np.cos(angles)).float(), torch.from_numpy(np.sin(angles)).float()


class GeluMLP(nn.Module):
    """GPT-2's feed-forward layer."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.embed_dim, config.hidden_dim)
        self.down = nn.Linear(config.hidden_dim, config.embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))  # (B, T, D)


def gelu(x: Tensor) -> Tensor:
    """GELU in the tanh form, 0.5 x (1 + tanh u); compiled as x sigmoid(2 u), whose exp is cheaper than a tanh."""
    if torch.compiler.is_compiling():
        return x * torch.sigmoid(2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    return F.gelu(x, approximate="tanh")


class SwiGLU(nn.Module):
    """LLaMA's feed-forward layer (Shazeer 2020); the gate's rows stand before those of the values."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.embed_dim, 2 * config.hidden_dim, bias=False)
        self.down = nn.Linear(config.hidden_dim, config.embed_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.up(x).chunk(2, dim=-1)  # (B, T, F) each
        return self.down(F.silu(gate) * value)  # (B, T, D)


class Dropout(nn.Module):
    """Dropout that spends 8 random bits on a number, so the probability is a multiple of 1/256, at least one.

    A draw of its own for each number, as in nn.Dropout, takes 18 % of a training step on 2 cores.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.dropped = min(max(1, round(256 * p)), 255) if p else 0  # values of a byte, out of 256

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.dropped:
            return x
        draws = torch.randint(-(2**63), 2**63 - 1, (math.ceil(x.numel() / 8),), device=x.device)
        byte = draws.view(torch.uint8)[: x.numel()].view(x.shape)
        # Compared as floats: the compiler turns a mask of bytes into one of floats slowly.
        return torch.where(byte.float() >= self.dropped, x * (256 / (256 - self.dropped)), 0.0)


class Block(nn.Module):
    """Pre-norm transformer block with dropout on both residual branches."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm, mlp = (nn.LayerNorm, GeluMLP) if config.architecture == "gpt2" else (nn.RMSNorm, SwiGLU)
        self.ln_1 = norm(config.embed_dim, eps=NORM_EPS)
        self.attn = Attention(config)
        self.ln_2 = norm(config.embed_dim, eps=NORM_EPS)
        self.mlp = mlp(config)
        self.dropout = Dropout(config.dropout)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor] | None, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, present = self.attn(self.ln_1(x), rotary, past)
        x = x + self.dropout(y)  # (B, T, D)
        return x + self.dropout(self.mlp(self.ln_2(x))), present


class SmallGPT(nn.Module):
    """A decoder-only transformer with tied embeddings.

    The arguments are the fields of `ModelConfig`; the defaults give a GPT-2 of 24.6M parameters. `tokenizer` is
    needed only to generate from text. A wrong shape raises ValueError.
    """

    def __init__(self, *, tokenizer: Tokenizer | None = None, **shape: Any) -> None:
        super().__init__()
        self.config = config = ModelConfig(**shape)
        self.tokenizer = tokenizer
        gpt2 = config.architecture == "gpt2"
        self.wte = nn.Embedding(config.vocab_size, config.embed_dim)
        self.wpe = nn.Embedding(config.max_seq_len, config.embed_dim) if gpt2 else None
        self.dropout = Dropout(config.dropout)
        self.cos: Tensor
        self.sin: Tensor
        self.h = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.ln_f = (nn.LayerNorm if gpt2 else nn.RMSNorm)(config.embed_dim, eps=NORM_EPS)
        if not gpt2:
            cos, sin = rotary_tables(config.max_seq_len, config.head_dim)
            self.register_buffer("cos", cos, persistent=False)
            self.register_buffer("sin", sin, persistent=False)
        self._initialise()

    def _initialise(self) -> None:
        """GPT-2's initialisation: normal 0.02, smaller by sqrt(2 layers) where a branch joins the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("attn.proj.weight", "mlp.down.weight"))
                std = 0.02 / math.sqrt(2 * self.config.num_layers) if residual else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, ids: Tensor, past: Cache | None = None) -> tuple[Tensor, Cache]:
        """Logits for the next token at every position.

        Args:
            ids: token ids, (B, T).
            past: what an earlier call returned for the positions before these; it is not changed.

        Returns:
            Logits (B, T, V), and the cache of P + T positions. Raises ValueError beyond max_seq_len positions.
        """
        start = past[0][0].shape[2] if past else 0
        T = ids.shape[1]
        if start + T > self.config.max_seq_len:
            raise ValueError(f"{start + T} tokens do not fit into the context of {self.config.max_seq_len}")
        x = self.wte(ids)  # (B, T, D)
        rotary = None
        if self.wpe is not None:
            x = x + self.wpe(torch.arange(start, start + T, device=ids.device))
        else:
            rotary = (self.cos[start : start + T], self.sin[start : start + T])  # (T, d / 2) each
        x = self.dropout(x)
        present: Cache = []
        for i, block in enumerate(self.h):
            x, layer = block(x, rotary, past[i] if past else None)
            present.append(layer)
        return F.linear(self.ln_f(x), self.wte.weight), present  # (B, T, V)

    def num_parameters(self) -> int:
        """Trainable numbers; the tied embedding counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def generate(self, prompt: str, max_length: int = 50, **settings: Any) -> str:
        """Continue `prompt` to at most `max_length` tokens, prompt included; see `generate_text`."""
        return generate_text(self, prompt=prompt, max_length=max_length, **settings)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, weights: str = "model.safetensors") -> "SmallGPT":
        """Load a model folder in evaluation mode, its tokenizer attached; errors as `load_checkpoint`'s."""
        checkpoint = load_checkpoint(folder, weights=weights)
        model = cls(tokenizer=checkpoint.tokenizer, **checkpoint.config.model_dump())
        try:
            model.load_state_dict(checkpoint.weights)
        except RuntimeError as error:
            raise MismatchError(
                f"{folder}: {weights} does not fit config.json: {' '.join(str(error).split())}"
            ) from None
        return model.eval()

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a model folder that `from_pretrained` reads."""
        lineage = {"tokenizer_sha256": self.tokenizer.sha256} if self.tokenizer else {}
        save_checkpoint(Path(folder), self.config, self.state_dict(), lineage, self.tokenizer)


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats per token: logits (B, T, V), targets (B, T)."""
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
