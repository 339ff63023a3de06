"""Every token once, the right sum, whatever the windows; and figures that can be checked by hand."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from smallgpt.model import SmallGPT
from smallgpt.score import Scores, score_stream, score_with, summarize, windows

pytestmark = pytest.mark.usefixtures("one_thread")
VOCABULARY = 320


def stream(length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(4, VOCABULARY, length).astype(np.uint16)


class Bigram(nn.Module):
    """Looks at the last token only."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Parameter(torch.randn(VOCABULARY, VOCABULARY))

    def forward(self, ids: Tensor) -> tuple[Tensor, None]:
        return self.table[ids], None


@given(st.integers(1, 200), st.integers(1, 60), st.data())
def test_windows_score_every_token_once(tokens: int, context: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, context))
    scored: list[int] = []
    for start, first, end in windows(tokens, context, stride):
        assert 0 <= start <= first < end < tokens
        assert end - start <= context
        scored += range(first + 1, end + 1)  # ids that the window predicts
        if first:
            assert first - start >= min(first, context - stride)  # what a score sees before its own token
    assert scored == list(range(1, tokens))


def test_windows_by_hand() -> None:
    assert list(windows(11, 4, 4)) == [(0, 0, 4), (4, 4, 8), (8, 8, 10)]
    assert list(windows(11, 4, 2)) == [(0, 0, 4), (2, 4, 6), (4, 6, 8), (6, 8, 10)]
    assert list(windows(3, 8, 4)) == [(0, 0, 2)]
    assert list(windows(1, 8, 4)) == []


@torch.inference_mode()
def one_by_one(model: nn.Module, ids: np.ndarray, context: int, stride: int) -> tuple[list[float], list[int]]:
    """Nats and ranks, each token by a call of its own on the ids of its window that stand before it."""
    nats, ranks = [], []
    for target in range(1, len(ids)):
        start = 0 if target <= context else context + (target - 1 - context) // stride * stride - (context - stride)
        logits = model(torch.from_numpy(ids[start:target].astype(np.int64))[None])[0][0, -1].double()
        nats.append(-logits.log_softmax(-1)[int(ids[target])].item())
        more_likely = np.lexsort((np.arange(len(logits)), -logits.numpy()))
        ranks.append(more_likely.tolist().index(int(ids[target])))
    return nats, ranks


@pytest.mark.parametrize(
    ("length", "context", "stride"), [(70, 32, 32), (70, 32, 16), (71, 20, 7), (20, 32, 5), (33, 32, 1), (40, 1, 1)]
)
def test_scores_equal_those_of_a_slow_loop(model: SmallGPT, length: int, context: int, stride: int) -> None:
    ids = stream(length)
    scores = score_stream(model, ids, context=context, stride=stride, batch_size=3)
    nats, ranks = one_by_one(model, ids, context, stride)
    assert scores.nats.dtype == np.float64
    assert np.abs(scores.nats - nats).max() < 1e-4
    assert scores.nats.sum() == pytest.approx(sum(nats), rel=1e-6)
    assert (scores.rank == ranks).all()


def test_of_equally_likely_tokens_the_smallest_id_comes_first() -> None:
    model = Bigram()
    with torch.no_grad():
        model.table.zero_()
        model.table[:, 7] = 1
    for token, rank in ((4, 5), (7, 0), (8, 8), (319, 319)):
        ids = np.array([5, token])
        for scores in (
            score_stream(model, ids, context=4, stride=4),
            score_with(lambda x: model.table[torch.from_numpy(x)].detach().numpy(), ids, context=4, stride=4),
        ):
            assert scores.rank.tolist() == [rank]


@pytest.mark.parametrize(("length", "context", "stride"), [(70, 32, 32), (70, 32, 16), (20, 32, 5), (40, 1, 1)])
def test_scores_without_pytorch_are_the_same(model: SmallGPT, length: int, context: int, stride: int) -> None:
    ids = stream(length)

    def logits_of(window: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return model(torch.from_numpy(window)[None])[0][0].numpy()

    ours = score_with(logits_of, ids, context=context, stride=stride)
    theirs = score_stream(model, ids, context=context, stride=stride)
    assert np.abs(ours.nats - theirs.nats).max() < 1e-4
    assert (ours.rank == theirs.rank).all()
    assert (ours.position == theirs.position).all()


def test_positions() -> None:
    scores = score_stream(Bigram(), stream(11), context=4, stride=4)
    assert scores.position.tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    scores = score_stream(Bigram(), stream(11), context=4, stride=2)
    assert scores.position.tolist() == [0, 1, 2, 3, 2, 3, 2, 3, 2, 3]


@given(st.integers(2, 90), st.integers(1, 40), st.integers(1, 5), st.data())
def test_windows_do_not_matter_to_a_model_of_the_last_token(
    length: int, context: int, batch_size: int, data: st.DataObject
) -> None:
    ids = stream(length, seed=length)
    stride = data.draw(st.integers(1, context))
    model = Bigram()
    scores = score_stream(model, ids, context=context, stride=stride, batch_size=batch_size)
    previous, target = torch.from_numpy(ids[:-1].astype(int)), torch.from_numpy(ids[1:].astype(int))
    expected = -model.table[previous].double().log_softmax(-1)[range(length - 1), target]
    assert np.allclose(scores.nats, expected.detach().numpy(), atol=1e-5)


def test_probabilities_sum_to_one(model: SmallGPT) -> None:
    total = sum(
        math.exp(-score_stream(model, np.array([5, 6, token]), context=32, stride=32).nats[-1])
        for token in range(VOCABULARY)
    )
    assert total == pytest.approx(1, abs=1e-5)


def test_the_batch_size_does_not_matter(model: SmallGPT) -> None:
    ids = stream(300)
    one, many = (score_stream(model, ids, context=32, stride=16, batch_size=size) for size in (1, 7))
    assert np.allclose(one.nats, many.nats, atol=1e-5)
    assert (one.position == many.position).all()


def test_scoring_leaves_no_trace(models: dict[str, SmallGPT]) -> None:
    quiet = models["gpt2"]
    model = SmallGPT(**{**quiet.config.model_dump(), "dropout": 0.5})
    model.load_state_dict(quiet.state_dict())
    state = torch.get_rng_state()
    for training in (True, False):
        model.train(training)
        scores = score_stream(model, stream(50), context=32, stride=16)
        assert model.training is training
        assert model.h[0].dropout.training is training
        assert (scores.nats == score_stream(quiet, stream(50), context=32, stride=16).nats).all()  # dropout was off
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_autocast(model: SmallGPT) -> None:
    ids = stream(200)
    exact = score_stream(model, ids, context=32, stride=32)
    rough = score_stream(model, ids, context=32, stride=32, autocast=torch.bfloat16)
    assert 0 < abs(rough.nats.mean() / exact.nats.mean() - 1) < 0.02
    assert (exact.nats == score_stream(model, ids, context=32, stride=32).nats).all()


@pytest.mark.parametrize("stride", [0, 33, -1])
def test_a_stride_that_would_lose_tokens(model: SmallGPT, stride: int) -> None:
    with pytest.raises(ValueError, match=f"the stride is {stride}; it must be between 1 and the context, 32"):
        score_stream(model, stream(50), context=32, stride=stride)


def test_figures_by_hand() -> None:
    nats = np.log([2.0, 4.0, 8.0, 4.0])  # 8 bits in all
    scores = Scores(nats, np.array([0, 1, 5, 4]), np.arange(4))
    figures = summarize(scores, text_bytes=16, words=2)
    assert figures == pytest.approx(
        {
            "nats_per_token": 2 * math.log(2),
            "perplexity": 4.0,
            "bits_per_byte": 0.5,
            "word_perplexity": 16.0,  # 4 bits a word
            "accuracy": 0.25,
            "accuracy_top5": 0.75,
            "total_nats": 8 * math.log(2),
        }
    )


class Operations(TorchDispatchMode):
    """Collects the names of the operations that PyTorch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("architecture", ["gpt2", "llama", "qwen3"])
def test_no_operation_of_scoring_is_one_whose_digits_change(architecture: str) -> None:
    """PyTorch gives these to MKL's vector library: its first call by several threads may differ in a last digit."""
    model = SmallGPT(
        vocab_size=VOCABULARY, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16, architecture=architecture
    )
    with Operations() as operations:
        score_stream(model, stream(60), context=16, stride=8)
    assert operations.names >= {"log_softmax", "scaled_dot_product_attention"}
    assert not operations.names & {"exp", "log", "logsumexp", "cos", "sin", "tan", "tanh", "erf", "expm1", "log1p"}
