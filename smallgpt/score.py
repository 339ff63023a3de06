"""Scoring: every token of a stream once, in nats, bits per byte and perplexities."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Scores:
    """Per scored token of a stream of N ids: arrays of N - 1."""

    nats: np.ndarray  # float64, -ln p of the token
    rank: np.ndarray  # int64, how many tokens were held more likely
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


@torch.inference_mode()
def score_stream(
    model: torch.nn.Module,
    ids: np.ndarray,
    *,
    context: int,
    stride: int,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
) -> Scores:
    """Score ids `(N,)` with a model that maps (B, T) to logits (B, T, V); dropout is off while it runs."""
    if not 0 < stride <= context:
        raise ValueError(f"the stride is {stride}; it must be between 1 and the context, {context}")
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    nats = np.zeros(len(ids) - 1)
    rank = np.zeros(len(ids) - 1, dtype=np.int64)
    position = np.zeros(len(ids) - 1, dtype=np.int64)
    for group in _equal_length_groups(list(windows(len(ids), context, stride)), batch_size):
        x = torch.from_numpy(np.stack([ids[start:end] for start, _, end in group]).astype(np.int64)).to(device)
        skip = group[0][1] - group[0][0]
        y = torch.from_numpy(np.stack([ids[first + 1 : end + 1] for _, first, end in group]).astype(np.int64))
        y = y.to(device)[..., None]  # (B, scored, 1)
        with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
            logits = model(x)[0][:, skip:].float()  # (B, scored, V)
        target = logits.gather(-1, y)
        loss = (logits.logsumexp(-1, keepdim=True) - target)[..., 0].double().cpu().numpy()
        above = (logits > target).sum(-1).cpu().numpy()
        for row, (_, first, end) in enumerate(group):
            nats[first:end] = loss[row]
            rank[first:end] = above[row]
            position[first:end] = np.arange(skip, skip + end - first)
    model.train(training)
    return Scores(nats, rank, position)


def _equal_length_groups(spans: list[tuple[int, int, int]], batch_size: int) -> Iterator[list[tuple[int, int, int]]]:
    group: list[tuple[int, int, int]] = []
    for span in spans:
        same = group and (span[2] - span[0], span[1] - span[0]) == (
            group[0][2] - group[0][0],
            group[0][1] - group[0][0],
        )
        if group and (not same or len(group) == batch_size):
            yield group
            group = []
        group.append(span)
    if group:
        yield group


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
