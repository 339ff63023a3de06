"""The network: causal, cached as uncached, the shape and the initialisation it says."""

import math
from itertools import combinations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from smallgpt.model import Cache, Dropout, SmallGPT, gelu, next_token_loss, rotary_tables, rotate

pytestmark = pytest.mark.usefixtures("one_thread")
ARCHITECTURES = ["gpt2", "llama", "qwen3"]
SMALL = {"vocab_size": 300, "embed_dim": 16, "num_heads": 2, "num_layers": 2, "max_seq_len": 16}


def random_ids(model: SmallGPT, batch: int, length: int) -> Tensor:
    return torch.randint(model.config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.inference_mode()
def test_no_token_sees_the_future(model: SmallGPT) -> None:
    ids = random_ids(model, 1, 32)
    logits = model(ids)[0]
    for t in range(32):
        changed = ids.clone()
        changed[0, t] = (ids[0, t] + 1) % model.config.vocab_size
        other = model(changed)[0]
        assert torch.equal(other[:, :t], logits[:, :t])
        assert ((other - logits)[0, t:].abs().amax(-1) > 1e-4).all()  # and everything after sees it


def in_pieces(model: SmallGPT, ids: Tensor, cuts: tuple[int, ...]) -> tuple[Tensor, Cache]:
    past, parts = None, []
    for start, end in zip((0, *cuts), (*cuts, ids.shape[1]), strict=True):
        logits, past = model(ids[:, start:end], past)
        parts.append(logits)
    assert past is not None
    return torch.cat(parts, dim=1), past


@torch.inference_mode()
def test_cached_equals_uncached_for_every_cut(model: SmallGPT) -> None:
    ids = random_ids(model, 2, 12)
    logits, cache = model(ids)
    every_cut = [*combinations(range(1, 12), 1), *combinations(range(1, 12), 2), tuple(range(1, 12))]
    assert len(every_cut) == 11 + 55 + 1
    for cuts in every_cut:
        pieces, past = in_pieces(model, ids, cuts)
        assert (pieces - logits).abs().max() < 2e-5, cuts
        for (k, v), (expected_k, expected_v) in zip(past, cache, strict=True):
            assert k.shape == v.shape == (2, model.config.kv_heads, 12, 8)
            assert (k - expected_k).abs().max() < 2e-5
            assert (v - expected_v).abs().max() < 2e-5


@torch.inference_mode()
def test_cached_up_to_the_last_position(model: SmallGPT) -> None:
    ids = random_ids(model, 1, 32)
    pieces, past = in_pieces(model, ids, tuple(range(1, 32)))
    assert (pieces - model(ids)[0]).abs().max() < 2e-5
    with pytest.raises(ValueError, match="33 tokens do not fit into the context of 32"):
        model(ids[:, :1], past)
    with pytest.raises(ValueError, match="33 tokens do not fit into the context of 32"):
        model(random_ids(model, 1, 33))


@torch.inference_mode()
def test_the_past_is_not_changed(model: SmallGPT) -> None:
    ids = random_ids(model, 1, 8)
    past = model(ids[:, :5])[1]
    before = [(k.clone(), v.clone()) for k, v in past]
    first = model(ids[:, 5:], past)[0]
    assert torch.equal(model(ids[:, 5:], past)[0], first)
    for layer, expected in zip(past, before, strict=True):
        assert torch.equal(layer[0], expected[0])
        assert torch.equal(layer[1], expected[1])


def test_parameters_at_the_25m_shape() -> None:
    with torch.device("meta"):
        assert SmallGPT().num_parameters() == 24_559_616
        # 6 layers of 4 D D attention, 3 D F feed-forward (F = 1408) and two norms; embeddings; last norm
        llama = 10_000 * 512 + 6 * (4 * 512**2 + 3 * 512 * 1408 + 2 * 512) + 512
        assert SmallGPT(architecture="llama").num_parameters() == llama
        assert SmallGPT(architecture="qwen3").num_parameters() == llama + 6 * 2 * 64  # norms of queries and keys
        fewer = 6 * 2 * 6 * 64 * 512  # keys and values of 6 of 8 heads, in 6 layers
        assert SmallGPT(architecture="llama", num_kv_heads=2).num_parameters() == llama - fewer


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_initial_loss_is_that_of_guessing(architecture: str) -> None:
    torch.manual_seed(0)
    model = SmallGPT(vocab_size=5000, embed_dim=128, num_layers=3, max_seq_len=64, architecture=architecture).eval()
    ids = random_ids(model, 8, 65)
    with torch.inference_mode():
        loss = next_token_loss(model(ids[:, :-1])[0], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(5000), abs=0.1)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_initialisation(architecture: str) -> None:
    torch.manual_seed(0)
    model = SmallGPT(vocab_size=500, embed_dim=128, num_layers=8, max_seq_len=64, architecture=architecture)
    for name, parameter in model.named_parameters():
        if name.endswith(("attn.proj.weight", "mlp.down.weight")):
            assert parameter.std().item() == pytest.approx(0.02 / 4, rel=0.03), name  # sqrt(2 * 8)
        elif parameter.ndim == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.03), name
        else:
            assert (parameter == (0 if name.endswith("bias") else 1)).all(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_seed_gives_the_same_weights(architecture: str) -> None:
    def weights(seed: int) -> dict[str, Tensor]:
        torch.manual_seed(seed)
        return SmallGPT(architecture=architecture, **SMALL).state_dict()

    first, again, other = weights(1), weights(1), weights(2)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if first[name].std() > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_and_shapes(architecture: str) -> None:
    state = SmallGPT(architecture=architecture, ffn_dim=24, **SMALL).state_dict()
    gpt2 = architecture == "gpt2"
    names = ["wte.weight", "ln_f.weight", *(["wpe.weight", "ln_f.bias"] if gpt2 else [])]
    normed = ["attn.q_norm", "attn.k_norm"] if architecture == "qwen3" else []
    for part in ("ln_1", "attn.qkv", *normed, "attn.proj", "ln_2", "mlp.up", "mlp.down"):
        names += [f"h.{i}.{part}.{kind}" for i in range(2) for kind in (["weight", "bias"] if gpt2 else ["weight"])]
    assert sorted(state) == sorted(names)
    assert state["h.0.attn.qkv.weight"].shape == (48, 16)
    assert state["h.0.mlp.up.weight"].shape == (24 if gpt2 else 48, 16)
    assert state["h.1.mlp.down.weight"].shape == (16, 24)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_head_is_the_embedding(architecture: str) -> None:
    model = SmallGPT(architecture=architecture, **SMALL).eval()
    ids = random_ids(model, 1, 16)
    with torch.inference_mode():
        logits = model(ids)[0]
        unused = next(i for i in range(300) if i not in ids)
        model.wte.weight[unused] *= -3
        assert torch.allclose(model(ids)[0][..., unused], -3 * logits[..., unused])
    loss = next_token_loss(model(ids[:, :-1])[0], ids[:, 1:])
    loss.backward()
    assert model.wte.weight.grad is not None
    assert (model.wte.weight.grad.abs().sum(-1) > 0).all()  # the head reaches also the rows that were not read
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dropout_is_on_embeddings_and_residuals_alone(architecture: str) -> None:
    torch.manual_seed(0)
    model = SmallGPT(architecture=architecture, dropout=0.5, **SMALL)
    applied = []
    for module in model.modules():
        if isinstance(module, Dropout):
            module.register_forward_hook(lambda module, args, output: applied.append(output))
    ids = random_ids(model, 1, 16)
    plain = SmallGPT(architecture=architecture, dropout=0.0, **SMALL)
    plain.load_state_dict(model.state_dict())
    model.eval()
    assert torch.equal(model(ids)[0], model(ids)[0])
    assert torch.equal(model(ids)[0], plain.train()(ids)[0])
    model.train()
    applied.clear()
    assert not torch.allclose(model(ids)[0], model(ids)[0])
    assert len(applied) == 2 * (1 + 2 * 2)  # embeddings, and two branches in each of two layers
    assert all(0.3 < (output == 0).float().mean() < 0.7 for output in applied)
    x = torch.randn(1, 16, 16)
    rotary = None if architecture == "gpt2" else (model.cos[:16], model.sin[:16])
    block = model.h[0]
    assert torch.equal(block.attn(x, rotary, None)[0], block.attn(x, rotary, None)[0])
    assert not torch.equal(block(x, rotary, None)[0], block(x, rotary, None)[0])


@pytest.mark.parametrize(("p", "dropped"), [(1e-9, 1), (0.1, 26), (0.5, 128), (0.999999, 255)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dropout_keeps_the_mean_and_draws_every_number_alone(p: float, dropped: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dropout = Dropout(p)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)  # not a multiple of four
    y = dropout(x)
    y.sum().backward()
    kept = y != 0
    share = 1 - dropped / 256
    assert y.dtype == dtype
    assert y.shape == x.shape
    assert abs(kept.double().mean() - share) < 5 * (share * (1 - share) / x.numel()) ** 0.5
    assert torch.equal(y, torch.where(kept, torch.tensor(1 / share, dtype=dtype), 0))
    assert torch.equal(x.grad, y)  # the same mask on the way back
    for step in range(1, 5):  # neighbours, those of one draw and of the next, are independent
        both = (kept[:, step:] & kept[:, :-step]).double().mean()
        assert abs(both - share**2) < 5 * (share**2 * (1 - share**2) * 2 / x.numel()) ** 0.5
    assert not torch.equal(dropout(x), y)
    torch.manual_seed(0)
    assert torch.equal(dropout(x), y)
    assert dropout.eval()(x) is x


def test_rotary_tables_are_rounded_right() -> None:
    """To the bit, from the C library's functions: a table that depends on the process changes every training."""
    tables = rotary_tables(256, 64)
    angles = [[position * 10_000 ** (-2 * i / 64) for i in range(32)] for position in range(256)]
    for table, function in zip(tables, (math.cos, math.sin), strict=True):
        assert torch.equal(table, torch.tensor([[function(angle) for angle in row] for row in angles]))


def test_rotation() -> None:
    cos, sin = rotary_tables(5, 4)  # frequencies 1 and 1/100
    assert cos.shape == sin.shape == (5, 2)
    assert torch.allclose(cos[3], torch.tensor([math.cos(3), math.cos(0.03)]))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0]).expand(1, 1, 5, 4)
    turned = rotate(x, cos, sin)[0, 0]
    assert torch.equal(turned[0], x[0, 0, 0])
    # the halves are the pairs: (1, 3) turns by the angle 3, (2, 4) by 0.03
    expected = [math.cos(3) - 3 * math.sin(3), 3 * math.cos(3) + math.sin(3)]
    assert turned[3, [0, 2]].tolist() == pytest.approx(expected, rel=1e-5)
    inner = [turned[i] @ turned[i + 1] for i in range(4)]  # depends on the distance alone
    assert torch.stack(inner).tolist() == pytest.approx([inner[0].item()] * 4, rel=1e-5)


def test_the_loss() -> None:
    logits = torch.tensor([[[0.0, 0.0, math.log(2)], [math.log(8), 0.0, 0.0]]], dtype=torch.bfloat16)
    expected = (math.log(4) + math.log(10)) / 2  # probabilities 1/4 and 1/10
    assert next_token_loss(logits, torch.tensor([[0, 2]])).item() == pytest.approx(expected, rel=2e-3)
    assert next_token_loss(logits.float(), torch.tensor([[0, 2]])).dtype == torch.float32


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"num_heads": 3}, "embed_dim 16 is not divisible by num_heads 3"),
        ({"architecture": "llama", "num_heads": 4, "num_kv_heads": 3}, "num_heads 4 is not divisible by num_kv_heads"),
        ({"num_kv_heads": 1}, "num_kv_heads must be null for architecture gpt2"),
        ({"architecture": "llama", "num_heads": 16}, "must be even for rotary positions"),
        ({"heads": 2}, "heads"),
    ],
)
def test_a_wrong_shape(shape: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallGPT(**{**SMALL, **shape})


@pytest.mark.slow
def test_compiled_gelu_is_the_same_function() -> None:
    x = torch.linspace(-12, 12, 2001)
    one, other = x.clone().requires_grad_(), x.clone().requires_grad_()
    found, expected = torch.compile(gelu)(one), F.gelu(other, approximate="tanh")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    found.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=3e-6)
    assert not torch.equal(found, expected)  # it is the formula, not the eager kernel
