import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smallgpt.attention import BLOCK, _ProductsBack, causal_attention, later_keys


def inputs(T: int, sharpness: float = 1.0) -> tuple[list[Tensor], Tensor]:
    """Queries, keys and values (2, 3, T, 24) in bf16, and the gradient of the result."""
    generator = torch.Generator().manual_seed(T)
    q, k, v, gradient = (torch.randn(2, 3, T, 24, generator=generator).to(torch.bfloat16) for _ in range(4))
    return [q * sharpness, k, v], gradient


def exact(tensors: list[Tensor], gradient: Tensor) -> list[Tensor]:
    """The gradients in double precision."""
    leaves = [tensor.double().requires_grad_() for tensor in tensors]
    F.scaled_dot_product_attention(*leaves, is_causal=True).backward(gradient.double())
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def products(tensors: list[Tensor], gradient: Tensor) -> tuple[Tensor, list[Tensor]]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    y = _ProductsBack.apply(*leaves, later_keys(tensors[0].shape[2]))
    y.backward(gradient)
    return y.detach(), [leaf.grad for leaf in leaves if leaf.grad is not None]


def error(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest relative error of the three gradients, in norm."""
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("T", [1, 40, BLOCK, 2 * BLOCK, 2 * BLOCK + 88])
@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_gradients_are_those_of_exact_attention(T: int, sharpness: float) -> None:
    tensors, gradient = inputs(T, sharpness)
    y, found = products(tensors, gradient)
    assert torch.equal(y, F.scaled_dot_product_attention(*tensors, is_causal=True))
    if T == 1:  # the weight is 1 whatever the scores are
        assert torch.equal(found[2], gradient)
        return
    assert error(found, exact(tensors, gradient)) < 0.015


def test_a_query_has_no_effect_on_later_keys() -> None:
    tensors, gradient = inputs(2 * BLOCK + 10)
    gradient[:, :, : BLOCK + 3] = 0
    gradient[:, :, BLOCK + 4 :] = 0  # only one query is left
    _, found = products(tensors, gradient)
    for of_keys in found[1:]:
        assert not of_keys[:, :, BLOCK + 4 :].any()
        assert of_keys[:, :, : BLOCK + 4].any(dim=-1).all()
    others = [i for i in range(2 * BLOCK + 10) if i != BLOCK + 3]
    assert not found[0][:, :, others].any()


def test_eager_attention_is_the_kernel_of_pytorch() -> None:
    tensors, gradient = inputs(40)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    same = [tensor.clone().requires_grad_() for tensor in tensors]
    causal_attention(*leaves, later_keys(64)).backward(gradient)
    F.scaled_dot_product_attention(*same, is_causal=True).backward(gradient)
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(leaves, same, strict=True))  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiled_attention_goes_back_by_products_in_bf16_alone() -> None:
    compiled = torch.compile(causal_attention)
    mask = later_keys(BLOCK + 44)
    for dtype in (torch.bfloat16, torch.float32):
        tensors, gradient = inputs(BLOCK + 44)
        leaves = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        y = compiled(*leaves, mask)
        y.backward(gradient.to(dtype))
        eager = [tensor.to(dtype, copy=True).requires_grad_() for tensor in tensors]
        F.scaled_dot_product_attention(*eager, is_causal=True).backward(gradient.to(dtype))
        found, kernel = ([leaf.grad for leaf in each if leaf.grad is not None] for each in (leaves, eager))
        assert error(found, exact(tensors, gradient)) < 0.015
        by_kernel = all(torch.equal(a, b) for a, b in zip(found, kernel, strict=True))
        assert by_kernel is (dtype == torch.float32)
