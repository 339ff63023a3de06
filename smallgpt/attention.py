"""Causal self-attention for training, whose way back is made of matrix products where a CPU multiplies in bf16."""

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 256  # keys whose weights are computed at once


def causal_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention (B, H, T, d) of queries, keys and values of that shape, each to itself and what stands before it.

    `mask` is `later_keys`. The result is PyTorch's in all cases. So are the gradients, but in a compiled training on a
    CPU in bf16: those of `_ProductsBack` come from products that use the matrix units, and PyTorch's kernel does not.
    """
    compiled_training = torch.compiler.is_compiling() and torch.is_grad_enabled()
    if compiled_training and q.dtype == torch.bfloat16 and q.device.type == "cpu":
        return _ProductsBack.apply(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def later_keys(max_seq_len: int) -> Tensor:
    """What is added to the scores of a block of keys (rows) and the queries from its first one on: -inf where the key
    is the later of the two, else 0; (BLOCK, max_seq_len) or smaller."""
    return torch.full((min(BLOCK, max_seq_len), max_seq_len), -torch.inf, dtype=torch.bfloat16).tril(-1)


class _ProductsBack(torch.autograd.Function):
    """PyTorch's kernel forward; back, the weights once more, a block of keys at a time (Dao et al. 2022, section 3.2).

    With scores S, their log-sums L and delta = sum(gradient * output) of each query, the weights are exp(S - L), and
    the gradient of the scores is weights * (gradient V^T - delta). Both differences are taken inside of the products,
    before they are rounded to bf16: the queries have -L as two more columns, the gradient -delta, the keys and values
    ones. So a weight near 1 has no error, and one of exp(-8) at most 3 %.
    """

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        y, log_sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, True)
        ctx.save_for_backward(q, k, v, y, log_sums, mask)
        return y

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
        q, k, v, y, log_sums, mask = ctx.saved_tensors
        B, H, T, d = q.shape
        q, k, v, y, g = (x.reshape(B * H, T, d) for x in (q, k, v, y, gradient))
        ones = q.new_ones(B * H, T, 2)
        scale = d**-0.5
        q_, k_ = _minus(q, log_sums.reshape(B * H, T, 1) / scale), torch.cat([k, ones], dim=-1)  # (B H, T, d + 2)
        g_, v_ = _minus(g, (g.float() * y.float()).sum(-1, keepdim=True)), torch.cat([v, ones], dim=-1)
        of_q = torch.zeros_like(q, dtype=torch.float32)
        of_k, of_v = [], []
        for first in range(0, T, BLOCK):
            block, rest = slice(first, first + BLOCK), slice(first, T)
            scores = k_[:, block] @ q_[:, rest].mT  # (B H, block, rest), minus the log-sums, as all of these
            weights = torch.exp(scale * scores.float() + mask[: scores.shape[1], : scores.shape[2]])
            of_scores = (scale * weights * (v_[:, block] @ g_[:, rest].mT).float()).to(q.dtype)
            of_v.append(weights.to(q.dtype) @ g[:, rest])
            of_k.append(of_scores @ q[:, rest])
            of_q = of_q + F.pad((of_scores.mT @ k[:, block]).float(), (0, 0, first, 0))
        parts = of_q.to(q.dtype), torch.cat(of_k, dim=1), torch.cat(of_v, dim=1)
        return *(x.view(B, H, T, d) for x in parts), None


def _minus(x: Tensor, subtracted: Tensor) -> Tensor:
    """`x` (N, T, d) in bf16 with two more columns that add up to `-subtracted` (N, T, 1, fp32)."""
    high = subtracted.to(x.dtype)
    return torch.cat([x, -high, (high.float() - subtracted).to(x.dtype)], dim=-1)
