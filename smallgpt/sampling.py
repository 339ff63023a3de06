"""One sampler for PyTorch, ONNX Runtime, the command line and HTTP: numpy in, token ids out.

Every step takes the logits of one sequence, `(vocab_size,)`, turns them into a probability distribution and
draws from it with a uniform number that depends only on (seed, sequence index, position). The order of the
processors is that of Hugging Face Transformers: repetition penalty, temperature, top-k, top-p, min-p.
"""

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError, naming the field, for a value outside its range."""

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 50  # 0 is off
    top_p: float = 0.9  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    max_new_tokens: int = 128
    stop: tuple[str, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        # One text is a list of one text, not its characters.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of texts, none of them empty")
        object.__setattr__(self, "stop", tuple(stop))
        ranges: dict[str, tuple[type, float, float]] = {
            "temperature": (float, 0, 100),
            "top_k": (int, 0, 2**31),
            "top_p": (float, 0, 1),
            "min_p": (float, 0, 1),
            "repetition_penalty": (float, 1e-3, 1e3),
            "max_new_tokens": (int, 0, 2**31),
            "seed": (int, 0, 2**63 - 1),
        }
        for name, (kind, low, high) in ranges.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
                raise ValueError(f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}")
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; use temperature 0 for greedy, 1 to turn top_p off")

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "GenerationConfig":
        """Build from plain JSON; unknown keys raise ValueError."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise ValueError(f"unknown parameter {name}; {hint}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {**asdict(self), "stop": list(self.stop)}


def uniform(seed: int, sequence: int, position: int) -> float:
    """The uniform number in [0, 1) of one drawing.

    Counter-based (Philox 4x64, Salmon et al. 2011): keyed by (seed, sequence) and counted by the position in
    the continuation, so a sample depends neither on the batch it is in nor on what was drawn before it.
    """
    key = (int(seed) & (2**64 - 1)) | (int(sequence) << 64)
    return float(np.random.Generator(np.random.Philox(key=key, counter=int(position))).random())


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64 along the last axis; -inf logits get exactly 0."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    weights = np.exp(shifted)
    return weights / weights.sum(axis=-1, keepdims=True)


def penalize_repetition(logits: np.ndarray, previous: Sequence[int], penalty: float) -> np.ndarray:
    """Divide positive and multiply negative logits of already seen tokens by `penalty` (CTRL, Keskar et al. 2019)."""
    seen = np.unique(np.asarray(previous, dtype=np.int64))
    result = logits.copy()
    result[seen] = np.where(result[seen] > 0, result[seen] / penalty, result[seen] * penalty)
    return result


def keep_top_k(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Set all but the `top_k` largest logits to -inf; ties with the k-th are kept."""
    if top_k >= logits.size:
        return logits
    threshold = np.partition(logits, -top_k)[-top_k]
    return np.where(logits < threshold, -np.inf, logits)


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Keep the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    kept = np.flatnonzero(logits > -np.inf)  # after top-k a few, and sorting all would be the slowest step
    order = kept[np.argsort(-logits[kept], kind="stable")]
    probabilities = softmax(logits[order])
    before = np.cumsum(probabilities) - probabilities
    result = logits.copy()
    result[order[before >= top_p]] = -np.inf
    return result


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    """Drop tokens less likely than `min_p` times the most likely one (Nguyen et al. 2024)."""
    return np.where(logits < logits.max() + math.log(min_p), -np.inf, logits)


def process_logits(logits: np.ndarray, config: GenerationConfig, previous: Sequence[int] = ()) -> np.ndarray:
    """Apply the processors of `config` to the logits of one sequence, `(vocab_size,)`.

    `previous` are the token ids so far, prompt included. With temperature 0 only the repetition penalty acts.
    """
    logits = logits.astype(np.float64)
    if config.repetition_penalty != 1.0 and len(previous):
        logits = penalize_repetition(logits, previous, config.repetition_penalty)
    if config.temperature == 0:
        return logits
    logits = logits / config.temperature
    if config.top_k:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p > 0:
        logits = keep_min_p(logits, config.min_p)
    return logits


def sample(
    logits: np.ndarray,
    config: GenerationConfig,
    *,
    position: int,
    sequence: int = 0,
    previous: Sequence[int] = (),
    banned: Iterable[int] = (),
) -> int:
    """Draw the next token id from the logits of one sequence, `(vocab_size,)`.

    `position` counts the tokens already drawn for this sequence, `banned` are ids that are never drawn
    (pad, unk and bos). Ties of the greedy choice go to the smallest id. Raises ValueError for logits that
    are not finite.
    """
    if not np.isfinite(logits).all():
        raise ValueError("the model returned logits that are not finite")
    logits = logits.astype(np.float64)
    logits[list(banned)] = -np.inf
    logits = process_logits(logits, config, previous)
    if config.temperature == 0:
        return int(logits.argmax())
    cumulative = np.cumsum(softmax(logits))
    threshold = uniform(config.seed, sequence, position) * cumulative[-1]
    return int(np.searchsorted(cumulative, threshold, side="right"))
