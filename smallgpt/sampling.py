"""One sampler for PyTorch, ONNX Runtime, the command line and HTTP: numpy in, token ids out.

Every step takes the logits of one sequence, (V,) for a vocabulary of V, turns them into a distribution over the
tokens that are left, and draws from it with a uniform number that depends only on (seed, sequence, position). The
processors act in the order of Hugging Face Transformers: logit bias, repetition penalty, presence and frequency
penalty, n-gram block, minimum length, temperature, top-k, top-p, min-p.
"""

import difflib
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

_LARGEST = 2**31
# name: (type, smallest, largest); top_p is above 0
RANGES: dict[str, tuple[type, float, float]] = {
    "temperature": (float, 0, 100),
    "top_k": (int, 0, _LARGEST),
    "top_p": (float, 0, 1),
    "min_p": (float, 0, 1),
    "repetition_penalty": (float, 1e-3, 1e3),
    "presence_penalty": (float, -100, 100),
    "frequency_penalty": (float, -100, 100),
    "repeat_last_n": (int, -1, _LARGEST),
    "no_repeat_ngram_size": (int, 0, _LARGEST),
    "num_beams": (int, 1, 256),
    "length_penalty": (float, -10, 10),
    "num_return_sequences": (int, 1, 1024),
    "max_new_tokens": (int, 0, _LARGEST),
    "min_new_tokens": (int, 0, _LARGEST),
    "max_length": (int, 0, _LARGEST),
    "max_time": (float, 0, 1e9),
    "seed": (int, 0, 2**63 - 1),
}


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """How to continue a prompt. Raises ValueError, naming the field, for a value outside its range.

    With `num_beams` above 1 the continuation is the one that beam search finds; temperature, top_k, top_p and min_p
    do not act then.
    """

    temperature: float = 0.8  # 0 is greedy
    top_k: int = 50  # 0 is off
    top_p: float = 0.9  # 1 is off
    min_p: float = 0.0  # 0 is off
    repetition_penalty: float = 1.0  # 1 is off
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = -1  # how many of the last tokens the three penalties look at; -1 is all, 0 is off
    no_repeat_ngram_size: int = 0  # 0 is off
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these token ids
    num_beams: int = 1
    length_penalty: float = 1.0  # beams are ranked by their log-probability / length ** length_penalty
    early_stopping: bool | str = True  # True, False or "never", as in Transformers
    num_return_sequences: int = 1
    max_new_tokens: int = 128
    min_new_tokens: int = 0  # no <|eos|> and no stop token before
    max_length: int = 0  # tokens of prompt and continuation; 0 is off
    max_time: float = 0.0  # seconds; 0 is off
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        # One text is a list of one text, not its characters.
        stop = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stop, list | tuple) or not all(isinstance(text, str) and text for text in stop):
            raise ValueError(f"stop is {self.stop!r}; it must be a list of texts, none of them empty")
        if any("\ud800" <= character <= "\udfff" for text in stop for character in text):
            raise ValueError(f"stop is {stop!r}, which is no Unicode text; write it in UTF-8")
        object.__setattr__(self, "stop", tuple(stop))
        ids = self.stop_token_ids or ()
        if not isinstance(ids, list | tuple) or not all(_is_id(token) for token in ids):
            raise ValueError(f"stop_token_ids is {self.stop_token_ids!r}; it must be a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        object.__setattr__(self, "logit_bias", _bias(self.logit_bias))
        for name, (kind, low, high) in RANGES.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
                raise ValueError(f"{name} is {value!r}; it must be {'a whole number' if kind is int else 'a number'}")
            if not low <= value <= high:  # also refuses NaN
                raise ValueError(f"{name} is {value}; it must be between {low} and {high}")
        if self.top_p == 0:
            raise ValueError("top_p is 0, which keeps no token; use temperature 0 for greedy, 1 to turn top_p off")
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos is {self.ignore_eos!r}; it must be true or false")
        if not isinstance(self.early_stopping, bool) and self.early_stopping != "never":
            raise ValueError(f"early_stopping is {self.early_stopping!r}; it must be true, false or never")
        if 1 < self.num_beams < self.num_return_sequences:
            raise ValueError(
                f"num_return_sequences is {self.num_return_sequences}; {self.num_beams} beams give no more than that"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "GenerationConfig":
        """Build from plain JSON; unknown keys raise ValueError."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                close = difflib.get_close_matches(str(name), known, n=1)
                hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
                raise ValueError(f"unknown parameter {name}; {hint}")
        return cls(**values)

    def check_ids(self, vocab_size: int) -> None:
        """Raise ValueError for a token id that a vocabulary of this size does not have."""
        for name, ids in (("logit_bias", self.logit_bias), ("stop_token_ids", self.stop_token_ids)):
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"{name} names the token {max(ids)}; the vocabulary has 0 to {vocab_size - 1}")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        bias = {str(token): value for token, value in self.logit_bias.items()}
        plain = {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids), "logit_bias": bias}
        return {**asdict(self), **plain}


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _bias(values: Any) -> dict[int, float]:
    """Token ids to finite numbers; JSON has the ids as texts."""
    wrong = ValueError(f"logit_bias is {values!r}; it must give a number between -1e6 and 1e6 for each token id")
    if not isinstance(values or {}, Mapping):
        raise wrong
    result = {}
    for token, value in (values or {}).items():
        token = int(token) if isinstance(token, str) and token.isascii() and token.isdigit() else token
        number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e6
        if not _is_id(token) or not number:
            raise wrong
        result[token] = float(value)
    return result


def uniform(seed: int, sequence: int, position: int) -> float:
    """The uniform number in [0, 1) of one drawing.

    Counter-based (Philox 4x64, Salmon et al. 2011): keyed by (seed, sequence) and counted by the position in
    the continuation, so a sample depends neither on the batch it is in nor on what was drawn before it.
    """
    block, place = divmod(int(position), _BLOCK)
    return float(_uniforms(int(seed), int(sequence), block)[place])


_GROUPS = 512  # of logits: the k-th largest of their maxima is a bound for the k-th largest logit
_BLOCK = 64  # positions; starting a generator takes as long as drawing hundreds of numbers from it


@functools.lru_cache(maxsize=1024)
def _uniforms(seed: int, sequence: int, block: int) -> np.ndarray:
    """The numbers of the positions from block * _BLOCK on; a count of Philox gives four, of which the first is used."""
    philox = np.random.Philox(key=seed | (sequence << 64), counter=block * _BLOCK)
    return np.random.Generator(philox).random(4 * _BLOCK)[::4]


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64 along the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities in float64 along the last axis; -inf logits get exactly 0."""
    weights = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def penalize_repetition(logits: np.ndarray, previous: Sequence[int], penalty: float) -> None:
    """Divide positive and multiply negative logits of already seen tokens by `penalty` (CTRL, Keskar et al. 2019)."""
    seen = np.unique(np.asarray(previous, dtype=np.int64))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)


def penalize_presence(logits: np.ndarray, previous: Sequence[int], presence: float, frequency: float) -> None:
    """Subtract `presence` once, and `frequency` as often as a token was seen (the OpenAI API's two penalties)."""
    seen, counts = np.unique(np.asarray(previous, dtype=np.int64), return_counts=True)
    logits[seen] -= presence + frequency * counts


def block_ngrams(logits: np.ndarray, previous: Sequence[int], size: int) -> None:
    """Set to -inf what would repeat an n-gram of `size` tokens of `previous` (Paulus et al. 2017)."""
    ids = np.asarray(previous, dtype=np.int64)
    if len(ids) < size:
        return
    grams = np.lib.stride_tricks.sliding_window_view(ids, size)  # (n, size)
    same = (grams[:, : size - 1] == ids[len(ids) - size + 1 :]).all(axis=1)
    logits[grams[same, -1]] = -np.inf


def top_k_ids(logits: np.ndarray, top_k: int) -> np.ndarray:
    """Ascending ids of the `top_k` largest logits; ties with the k-th are kept."""
    if top_k >= logits.size:
        return np.arange(logits.size)
    if logits.size < 4 * _GROUPS or top_k > _GROUPS // 2:
        return np.flatnonzero(logits >= np.partition(logits, -top_k)[-top_k])
    # At least top_k are no smaller than the k-th largest of some groups' maxima, and few more are: partition those.
    maxima = logits[: logits.size - logits.size % _GROUPS].reshape(-1, _GROUPS).max(axis=0)
    ids = np.flatnonzero(logits >= np.partition(maxima, -top_k)[-top_k])
    largest = logits[ids]
    return ids[largest >= np.partition(largest, -top_k)[-top_k]]


def keep_top_p(logits: np.ndarray, top_p: float) -> np.ndarray:
    """Mask (n,) of the smallest set of most likely tokens whose probability reaches `top_p` (Holtzman et al. 2020)."""
    probabilities = softmax(logits)
    mask = np.zeros(logits.size, bool)
    for count in (min(256, logits.size), logits.size):  # sorting a few is enough, unless they do not reach top_p
        ids = top_k_ids(logits, count)
        ids = ids[np.argsort(-logits[ids], kind="stable")]
        ordered = probabilities[ids]
        mask[ids] = np.cumsum(ordered) - ordered < top_p
        if not mask[ids[-1]]:
            break
    return mask


def keep_min_p(logits: np.ndarray, min_p: float) -> np.ndarray:
    """Mask (n,) of the tokens at least `min_p` times as likely as the most likely one (Nguyen et al. 2024)."""
    return logits >= logits.max() + math.log(min_p)


def penalize(
    logits: np.ndarray,
    config: GenerationConfig,
    previous: Sequence[int] = (),
    *,
    position: int = 0,
    banned: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> np.ndarray:
    """Logits (V,) after all processors that come before the temperature, as a new array.

    It has float64 where a processor changes values, and the type of `logits` where some are only forbidden.
    `previous` are the token ids so far, prompt included, `position` counts the tokens already drawn; `banned` ids
    are never drawn, `ends`, the ids that end a sequence, not before config.min_new_tokens.
    """
    changed = config.logit_bias or config.repetition_penalty != 1 or config.presence_penalty or config.frequency_penalty
    logits = logits.astype(np.float64 if changed else logits.dtype)
    logits[list(banned)] = -np.inf
    if config.logit_bias:
        logits[list(config.logit_bias)] += list(config.logit_bias.values())
    seen = previous if config.repeat_last_n < 0 else previous[max(0, len(previous) - config.repeat_last_n) :]
    if len(seen):
        if config.repetition_penalty != 1.0:
            penalize_repetition(logits, seen, config.repetition_penalty)
        if config.presence_penalty or config.frequency_penalty:
            penalize_presence(logits, seen, config.presence_penalty, config.frequency_penalty)
    if config.no_repeat_ngram_size:
        block_ngrams(logits, previous, config.no_repeat_ngram_size)
    if position < config.min_new_tokens:
        logits[list(ends)] = -np.inf
    return logits


def check_finite(logits: np.ndarray) -> None:
    """Raise FloatingPointError for logits that are not finite, which is the model's fault and no setting's."""
    if not np.isfinite(logits).all():
        raise FloatingPointError("the model returned logits that are not finite")


def candidates(logits: np.ndarray, config: GenerationConfig) -> tuple[np.ndarray, np.ndarray]:
    """What temperature, top-k, top-p and min-p leave of logits (V,): ascending ids (n,) and their logits (n,)."""
    ids = top_k_ids(logits, config.top_k or logits.size)
    left = logits[ids].astype(np.float64) / max(config.temperature, 1e-290)  # below that it would overflow
    if config.top_p < 1:
        kept = keep_top_p(left, config.top_p)
        ids, left = ids[kept], left[kept]
    if config.min_p > 0:
        kept = keep_min_p(left, config.min_p)
        ids, left = ids[kept], left[kept]
    return ids, left


def sample(
    logits: np.ndarray,
    config: GenerationConfig,
    *,
    position: int,
    sequence: int = 0,
    previous: Sequence[int] = (),
    banned: Sequence[int] = (),
    ends: Sequence[int] = (),
) -> int:
    """Draw the next token id from the logits of one sequence, (V,); see `penalize` for the arguments.

    Ties of the greedy choice go to the smallest id. Raises FloatingPointError for logits that are not finite, and
    ValueError when no token is left to draw.
    """
    check_finite(logits)
    logits = penalize(logits, config, previous, position=position, banned=banned, ends=ends)
    best = int(logits.argmax())
    if logits[best] == -np.inf:
        raise ValueError("no token is left: no_repeat_ngram_size, min_new_tokens and the like forbid all of them")
    if config.temperature == 0:
        return best
    ids, left = candidates(logits, config)
    cumulative = np.exp(left - left.max()).cumsum()
    threshold = uniform(config.seed, sequence, position) * cumulative[-1]  # below the sum: uniform < 1 - 2**-54
    return int(ids[np.searchsorted(cumulative, threshold, side="right")])
