"""The certificate of a bundle: what its graph computes, measured against PyTorch on real text."""

import base64
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch

from smallgpt.bundle import MODEL, TOKENIZER
from smallgpt.files import sha256_file
from smallgpt.model import SmallGPT
from smallgpt.runtime import MANY_ROWS, OrtGPT, golden_logits
from smallgpt.score import token_nats
from smallgpt.tokenizer import Tokenizer

BATCHES = (1, 2, 5)
DECODE_STEPS = 32
GREEDY_PROMPTS, GREEDY_PROMPT_TOKENS, GREEDY_TOKENS = 5, 8, 64
SINGLE_TOKENS = 2000
# A token at a time; the same in two rows, as in a batch, and in so many that they go another way unless batches must
# not matter; and eight at a time, as guesses are checked.
WAYS = ("single", "paired", "many", "eight")
GOLDEN_LIMIT = 0.5  # of a quantised bundle's logits, elsewhere against here


@dataclass(frozen=True)
class Limits:
    """What a certificate must keep; differences are absolute and of logits, unless said."""

    max_difference: float
    mean_difference: float
    bits_per_byte_difference: float  # relative
    greedy_gap: float  # where the greedy texts part, how much PyTorch prefers its own token
    # Relative, of SINGLE_TOKENS tokens scored in each of WAYS: other kernels run there. None does not measure it.
    single_bits_per_byte_difference: float | None = None


@torch.inference_mode()
def certify(served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray, limits: Limits) -> dict[str, Any]:
    """Compare a bundle with the model on the text `ids` (N,) and return the certificate.

    Logits are compared over the whole text in windows of the context; for the batches of BATCHES through a prefill of
    prompts of different lengths and DECODE_STEPS single tokens up to the end of the context; and for one context cut
    into pieces. Then come greedy texts, bits per byte (for quantised graphs also in each of WAYS), and golden logits
    for machines without PyTorch.
    Raises ValueError, naming the check, its value and its limit, when a limit is broken.
    """
    name = served.bundle.config.variant
    agreement, scores, of_text = _compare_text(served, model, tokenizer, ids)
    differences = {"text": of_text, **_compare_batches(served, model, ids), "cuts": _compare_cuts(served, model, ids)}
    splits = _compare_greedy(served, model, tokenizer, ids)
    figures = {
        "max_difference": float(np.max([part["max"] for part in differences.values()])),
        "mean_difference": float(np.max([part["mean"] for part in differences.values()])),
        "greedy_gap": max([split["gap"] for split in splits], default=0.0),
        "greedy_splits": len(splits),
        "top1_agreement": agreement,
        **scores,
    }
    ways = [way for way in WAYS if way != "many" or "integers" in served.bundle.config.inputs]
    if limits.single_bits_per_byte_difference is not None:
        for way in ways:
            _, scores, _ = _compare_text(served, model, tokenizer, ids[: SINGLE_TOKENS + 1], way)
            figures |= {f"{way}_{key}": value for key, value in scores.items()}
    asked = asdict(limits)
    asked |= {f"{way}_bits_per_byte_difference": limits.single_bits_per_byte_difference for way in ways}
    for check, limit in asked.items():
        if limit is not None and not figures[check] <= limit:  # also when it is NaN
            raise ValueError(
                f"the certificate of {name} fails: {check} is {figures[check]:.3g}, the limit is {limit:g}; "
                "the exported graph does not compute what PyTorch does"
            )
    return {
        "variant": name,
        "limits": asdict(limits),
        "figures": figures,
        "differences": differences,
        "greedy_splits": splits,
        "versions": {package: _version(package) for package in ("torch", "onnx", "onnxruntime", "numpy")},
        "sha256": {
            MODEL: sha256_file(served.bundle.graph),
            "model.safetensors": served.bundle.config.lineage["model"],
            TOKENIZER: tokenizer.sha256,
        },
        "golden_limit": min(limits.max_difference, GOLDEN_LIMIT),
        "golden": list(_golden(served, model, ids)),
    }


class _Difference:
    """Largest and mean absolute difference of logits, collected over many arrays."""

    def __init__(self) -> None:
        self.largest, self.total, self.count = 0.0, 0.0, 0

    def add(self, expected: np.ndarray, actual: np.ndarray) -> None:
        difference = np.abs(expected - actual, dtype=np.float64)
        self.largest = float(np.maximum(self.largest, difference.max()))  # NaN stays
        self.total += float(difference.sum())
        self.count += difference.size

    def to_dict(self) -> dict[str, float]:
        return {"max": _rounded(self.largest), "mean": _rounded(self.total / self.count), "logits": self.count}


def _torch_logits(model: SmallGPT, ids: np.ndarray) -> np.ndarray:
    logits: np.ndarray = model(torch.from_numpy(ids[None]))[0][0].float().numpy()
    return logits  # (T, V)


def _excerpt(ids: np.ndarray, start: int, length: int) -> np.ndarray:
    """`length` ids from `start` on; a short text is read again from its beginning."""
    return ids.take(np.arange(start, start + length), mode="wrap")


def _compare_text(
    served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray, way: str = ""
) -> tuple[float, dict[str, float], dict[str, float]]:
    """Over windows of the context: how often both hold the same token most likely, bits per byte, and differences.

    The bundle reads a window at once, or in one of WAYS.
    """
    context = served.max_seq_len
    difference, same, nats = _Difference(), 0, np.zeros(2)
    for start in range(0, len(ids) - 1, context):
        window = ids[start : start + context + 1]
        expected, actual = _torch_logits(model, window[:-1]), _served_logits(served, window[:-1], way)
        difference.add(expected, actual)
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        nats += [token_nats(logits, window[1:]).sum() for logits in (expected, actual)]
    text_bytes = sum(len(tokenizer.token_bytes[i]) for i in ids[1:])
    of_torch, of_onnx = (nats / math.log(2) / text_bytes).tolist()
    scores = {
        "bits_per_byte_torch": of_torch,
        "bits_per_byte_onnx": of_onnx,
        "bits_per_byte_difference": _rounded(abs(of_onnx / of_torch - 1)),
    }
    return _rounded(same / (len(ids) - 1)), scores, difference.to_dict()


def _served_logits(served: OrtGPT, ids: np.ndarray, way: str) -> np.ndarray:
    """The bundle's logits (T, V) of ids (T,), which it reads at once or in one of WAYS."""
    if way in ("paired", "many"):
        served, rows = served.fork(), 2 if way == "paired" else MANY_ROWS
        served.batch_invariant = way == "paired"
        served.reserve(rows)
        return np.stack([served.step(np.repeat(token, rows))[0].copy() for token in ids])
    size = {"single": 1, "eight": 8}.get(way, len(ids))
    return served.logits(ids, range(size, len(ids), size))


def _compare_batches(served: OrtGPT, model: SmallGPT, ids: np.ndarray) -> dict[str, dict[str, float]]:
    """Ragged prompts, the longest of which ends DECODE_STEPS before the end of the context, and then those steps."""
    context = served.max_seq_len
    steps = min(DECODE_STEPS, context - 1)
    result = {}
    for batch in BATCHES:
        lengths = np.linspace(context - steps, 1, batch).astype(np.int64)
        rows = np.stack([_excerpt(ids, i * context, context) for i in range(batch)])
        expected = np.stack(
            [
                _torch_logits(model, row[: length + steps])[length - 1 :]
                for row, length in zip(rows, lengths, strict=True)
            ]
        )  # (B, steps + 1, V)
        prefill, decode = _Difference(), _Difference()
        prefill.add(expected[:, 0], served.prefill(rows[:, : lengths.max()], lengths))
        for step in range(steps):
            decode.add(expected[:, step + 1], served.step(rows[np.arange(batch), lengths + step]))
        result[f"batch_{batch}_prefill"] = prefill.to_dict()
        result[f"batch_{batch}_decode"] = decode.to_dict()
    return result


def _compare_cuts(served: OrtGPT, model: SmallGPT, ids: np.ndarray) -> dict[str, float]:
    """One whole context, fed in two pieces or in many."""
    context = served.max_seq_len
    row = _excerpt(ids, 0, context)
    expected, difference = _torch_logits(model, row), _Difference()
    cuts: list[Sequence[int]] = [(1,), (context // 2,), (context - 1,), range(37, context, 37)]
    for cut in cuts:
        difference.add(expected, served.logits(row, cut))
    return difference.to_dict()


def _compare_greedy(
    served: OrtGPT, model: SmallGPT, tokenizer: Tokenizer, ids: np.ndarray
) -> list[dict[str, int | float]]:
    """Where PyTorch would not have chosen the token that the bundle chose, in the bundle's own greedy texts."""
    context = served.max_seq_len
    start = min(GREEDY_PROMPT_TOKENS, context // 2)
    banned = list(tokenizer.banned_ids)
    prompts = np.stack([_excerpt(ids, i * context, start) for i in range(GREEDY_PROMPTS)])
    texts, logits = prompts, served.prefill(prompts)
    for _ in range(min(GREEDY_TOKENS, context - start)):
        logits[:, banned] = -np.inf
        texts = np.concatenate([texts, logits.argmax(-1)[:, None]], axis=1)
        logits = served.step(texts[:, -1])
    splits: list[dict[str, int | float]] = []
    for i, row in enumerate(texts):
        expected = _torch_logits(model, row)[start - 1 : -1]
        expected[:, banned] = -np.inf
        gaps = expected.max(-1) - expected[np.arange(len(row) - start), row[start:]]
        splits += [{"prompt": i, "position": int(j), "gap": _rounded(gaps[j])} for j in np.flatnonzero(gaps)]
    return splits


def _golden(served: OrtGPT, model: SmallGPT, ids: np.ndarray) -> Iterator[dict[str, Any]]:
    """Logits after short, longer and context-long excerpts, for `check_golden`: PyTorch's, or of a quantised bundle
    its own, which are further from PyTorch's than a wrong computation may be from them."""
    context = model.config.max_seq_len
    for length in (1, min(16, context), context):
        row = _excerpt(ids, length, length)
        logits = golden_logits(served, row)
        if not served.pairs:
            logits = [_torch_logits(model, row)[-1]] * len(logits)
        texts = [base64.b64encode(part.astype("<f4").tobytes()).decode("ascii") for part in logits]
        yield {"ids": row.tolist(), "logits": texts}


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def _version(package: str) -> str:
    """Installed version; ONNX Runtime has one of two names."""
    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-gpu")
