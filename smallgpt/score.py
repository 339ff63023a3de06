"""Scoring: every token of a stream once, in nats, bits per byte and perplexities."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # only `score_stream` needs PyTorch
    import torch


@dataclass(frozen=True)
class Scores:
    """Per scored token of a stream of N ids: arrays of N - 1."""

    nats: np.ndarray  # float64, -ln p of the token
    rank: np.ndarray  # int64, how many tokens were held more likely; of equal ones the smallest id comes first
    position: np.ndarray  # int64, place in its window of the id it was predicted from


def windows(tokens: int, context: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """Cut a stream of `tokens` ids into windows `(start, first, end)`.

    The model reads ids [start, end) and is scored on its predictions for ids (first, end]; each id after the first
    is scored by exactly one window. With stride = context the windows do not overlap; with a smaller stride every
    score but those of the first window sees at least context - stride ids before it.
    """
    first = 0
    while first < tokens - 1:
        length = context if first == 0 else stride
        end = min(first + length, tokens - 1)
        yield max(0, first - (context - stride)), first, end
        first = end


def score_stream(
    model: "torch.nn.Module",
    ids: np.ndarray,
    *,
    context: int,
    stride: int,
    batch_size: int = 16,
    autocast: "torch.dtype | None" = None,
) -> Scores:
    """Score ids `(N,)` with a model that maps (B, T) to logits (B, T, V); dropout is off while it runs."""
    import torch

    if not 0 < stride <= context:
        raise ValueError(f"the stride is {stride}; it must be between 1 and the context, {context}")
    device = next(model.parameters()).device
    training = model.training
    scores = _empty(len(ids) - 1)
    model.eval()
    try:
        for group in _equal_length_groups(list(windows(len(ids), context, stride)), batch_size):
            x = torch.from_numpy(np.stack([ids[start:end] for start, _, end in group]).astype(np.int64)).to(device)
            skip = group[0][1] - group[0][0]
            y = torch.from_numpy(np.stack([ids[first + 1 : end + 1] for _, first, end in group]).astype(np.int64))
            y = y.to(device)[..., None]  # (B, scored, 1)
            with (
                torch.inference_mode(),
                torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None),
            ):
                logits = model(x)[0][:, skip:].float()  # (B, scored, V)
                target = logits.gather(-1, y)
                # Not logsumexp: its exp is MKL's, whose first call in a process is now and then less exact.
                loss = -logits.log_softmax(-1).gather(-1, y)[..., 0].double().cpu().numpy()
                before = torch.arange(logits.shape[-1], device=device) < y  # (B, scored, V)
                above = ((logits > target) | ((logits == target) & before)).sum(-1).cpu().numpy()
            for row, (_, first, end) in enumerate(group):
                scores.nats[first:end] = loss[row]
                scores.rank[first:end] = above[row]
                scores.position[first:end] = np.arange(skip, skip + end - first)
    finally:
        model.train(training)
    return scores


def score_with(
    logits_of: Callable[[np.ndarray], np.ndarray], ids: Sequence[int] | np.ndarray, *, context: int, stride: int
) -> Scores:
    """Score ids `(N,)` with a function that maps (T,) to logits (T, V), in float64 and without PyTorch."""
    ids = np.asarray(ids, np.int64)
    scores = _empty(len(ids) - 1)
    for start, first, end in windows(len(ids), context, stride):
        logits = logits_of(ids[start:end])[first - start :]
        y = ids[first + 1 : end + 1, None]
        target = np.take_along_axis(logits, y, axis=1)  # (scored, 1)
        scores.nats[first:end] = token_nats(logits, y[:, 0])
        scores.rank[first:end] = ((logits > target) | ((logits == target) & (np.arange(logits.shape[1]) < y))).sum(1)
        scores.position[first:end] = np.arange(first - start, end - start)
    return scores


def token_nats(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-ln p (T,), in float64, of the targets (T,) under the logits (T, V)."""
    exact = logits.astype(np.float64)
    most = exact.max(-1)
    nats: np.ndarray = most + np.log(np.exp(exact - most[:, None]).sum(-1)) - exact[np.arange(len(targets)), targets]
    return nats


def _empty(tokens: int) -> Scores:
    return Scores(np.zeros(tokens), np.zeros(tokens, np.int64), np.zeros(tokens, np.int64))


def _equal_length_groups(spans: list[tuple[int, int, int]], batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    for _, same in groupby(spans, key=lambda span: (span[2] - span[0], span[1] - span[0])):
        group = list(same)
        yield from (group[i : i + batch_size] for i in range(0, len(group), batch_size))


def count_words(text: str) -> int:
    """Words plus line ends, as word-level perplexities on WikiText count them."""
    return len(text.split()) + text.count("\n")


def summarize(scores: Scores, text_bytes: int, words: int) -> dict[str, float]:
    """The figures of one scored split; `words` counts line ends too, the convention of word-level WikiText results."""
    total = float(scores.nats.sum())
    return {
        "nats_per_token": total / len(scores.nats),
        "perplexity": math.exp(total / len(scores.nats)),
        "bits_per_byte": total / math.log(2) / text_bytes,
        "word_perplexity": math.exp(min(total / max(words, 1), 700.0)),
        "accuracy": float((scores.rank == 0).mean()),
        "accuracy_top5": float((scores.rank < 5).mean()),
        "total_nats": total,
    }
