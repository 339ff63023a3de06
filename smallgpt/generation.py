"""Continuing prompts: sequences that join a batch, grow and leave it, on any model that fills and steps rows.

`generate` is the simple call, `Batch` the engine below it, which the HTTP server drives too. Every sequence has its own
settings and its own random numbers, so what it says does not depend on its company.
"""

import time
from collections import deque
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from smallgpt.sampling import GenerationConfig, log_softmax, sample
from smallgpt.speculation import Speculation
from smallgpt.tokenizer import TextStream, Tokenizer

MANY_TOKENS = 9  # from so many new tokens of a sequence on a graph with quantised weights or cache goes another way

Finish = Literal["eos", "stop", "length", "time", "interrupted"]


class Decoder(Protocol):
    """A model with rows of cached tokens: `OrtGPT` and `decode.TorchDecoder`. B rows, S tokens, V vocabulary."""

    tokenizer: Tokenizer
    max_seq_len: int
    lengths: np.ndarray  # tokens in the cache of each row

    def reserve(self, rows: int, capacity: int | None = None) -> None: ...
    def fill(self, first: int, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray: ...  # (B, S) -> (B, V)
    def extend(self, row: int, ids: Sequence[int]) -> np.ndarray: ...  # (S,) -> (S, V)
    def step(self, tokens: np.ndarray) -> np.ndarray: ...  # (B,) -> (B, V)
    def select(self, sources: Sequence[int]) -> None: ...


@dataclass(frozen=True)
class Piece:
    """What one token gave to one sequence: the text that became certain, and at the end why it ended."""

    sequence: Any  # the key it was added under
    token: int | None  # None when the sequence was interrupted
    text: str
    finish: Finish | None = None
    logprob: float | None = None  # of the token, by the model itself, before penalties and temperature
    top: tuple[tuple[int, float], ...] = ()  # the most likely tokens and their log-probabilities
    error: Exception | None = None  # why nothing could be drawn, in a tolerant batch


@dataclass
class _Row:
    """A sequence in work."""

    key: Hashable
    ids: list[int]  # prompt and continuation; the last one is not in the cache yet
    config: GenerationConfig
    number: int
    logprobs: int | None
    stream: TextStream
    banned: list[int]
    ends: list[int]
    limit: int  # tokens it may still get at most, at its start
    started: float | None  # time.perf_counter, for config.max_time
    position: int = 0  # tokens drawn so far


def check_prompt(model: Decoder, prompt: Sequence[int]) -> None:
    """Raise ValueError when a prompt is empty, does not fit into the context or holds an unknown id."""
    if not 0 < len(prompt) <= model.max_seq_len:
        raise ValueError(f"the prompt has {len(prompt)} tokens; between 1 and {model.max_seq_len} fit into the context")
    if min(prompt) < 0 or max(prompt) >= model.tokenizer.vocab_size:
        raise ValueError(
            f"the prompt has ids from {min(prompt)} to {max(prompt)}; the vocabulary has 0 to "
            f"{model.tokenizer.vocab_size - 1}"
        )


def new_tokens(config: GenerationConfig, prompt: Sequence[int], tokenizer: Tokenizer) -> int:
    """How many tokens may follow a prompt; max_length counts it too, without the `<|eos|>` in front."""
    if not config.max_length:
        return config.max_new_tokens
    return max(0, min(config.max_new_tokens, config.max_length - len(prompt) + (prompt[0] == tokenizer.eos_id)))


def generate(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    sequences: Sequence[int] | None = None,
    logprobs: int | None = None,
    even: bool = False,
    speculate: int = 0,
    slide: bool = False,
) -> Iterator[list[Piece]]:
    """Continue prompts (ids) as one batch; each step yields the pieces of the sequences that grew.

    A sequence ends at `<|eos|>`, at a stop string (which is held back and cut off, also across tokens) or a stop
    token, after config.max_new_tokens or max_time, or where the context is full ("length"), unless it may `slide`:
    then the last half of the context is read again and it goes on. The numbers in `sequences`, from 0 on by default,
    determine the samples together with the seed. A model works on one batch at a time: a second call ends the
    first one's. See `Batch` for `logprobs`, `even` and `speculate`.

    Raises ValueError for an empty prompt, one longer than the context, and ids outside the vocabulary.
    """
    if not prompts:
        return iter([])
    for prompt in prompts:
        check_prompt(model, prompt)
    capacity = min(model.max_seq_len, max(map(len, prompts)) + config.max_new_tokens)
    batch = Batch(model, len(prompts), capacity=capacity, even=even, speculate=speculate, slide=slide)
    for i, prompt in enumerate(prompts):
        batch.add(i, prompt, config, number=i if sequences is None else sequences[i], logprobs=logprobs)
    return _steps(batch)


def _steps(batch: "Batch") -> Iterator[list[Piece]]:
    while batch.busy:
        yield batch.step()


class Batch:
    """Up to `rows` sequences that are decoded together; more of them wait.

    Args:
        capacity: tokens of the longest sequence, the context's size by default.
        even: run an even number of rows, always, and short prompts apart from long ones: quantised kernels compute
            rows in pairs, an odd last one in another way, and long prompts in yet another.
        speculate: while one sequence is alone, guess up to so many tokens ahead by looking for its last words in what
            stands before (prompt lookup), and check them in one run. The text stays what it would have been; on a
            quantised graph, up to the last digits of several tokens that are computed together.
        slide: at the end of the context, read its last half again and go on.
        tolerant: a sequence for which no token can be drawn is interrupted, with the error in its piece; else `step`
            raises, and the batch cannot go on.
    """

    def __init__(
        self,
        model: Decoder,
        rows: int,
        *,
        capacity: int | None = None,
        even: bool = False,
        speculate: int = 0,
        slide: bool = False,
        tolerant: bool = False,
    ) -> None:
        self.model, self.even, self.slide, self.capacity = model, even, slide, capacity or model.max_seq_len
        self.tolerant = tolerant
        self.rows = rows
        self.speculation = Speculation(speculate)
        self._waiting: deque[_Row] = deque()
        self._empty: deque[_Row] = deque()  # those that may not get a single token
        self._running: list[_Row] = []  # the i-th one is row i of the model
        model.reserve(rows + even, self.capacity)

    @property
    def busy(self) -> int:
        """Number of sequences that wait or run."""
        return len(self._empty) + len(self._waiting) + len(self._running)

    def add(
        self,
        key: Hashable,
        prompt: Sequence[int],
        config: GenerationConfig,
        *,
        number: int = 0,
        logprobs: int | None = None,
        started: float | None = None,
    ) -> None:
        """Let a sequence wait for a row: a `key` no other has, `prompt` ids, `number` for its random numbers.

        `logprobs` asks for the token's log-probability and those of so many most likely tokens. config.max_time
        counts from where it gets a row, or from `started` (time.perf_counter). config.num_beams and
        num_return_sequences do not act here.
        """
        check_prompt(self.model, prompt)
        config.check_ids(self.model.tokenizer.vocab_size)
        if len(prompt) > self.capacity:
            raise ValueError(f"the prompt has {len(prompt)} tokens; this batch has room for {self.capacity}")
        tokenizer = self.model.tokenizer
        banned = [*tokenizer.banned_ids, *([tokenizer.eos_id] if config.ignore_eos else [])]
        ends = [tokenizer.eos_id, *config.stop_token_ids]
        limit = new_tokens(config, prompt, tokenizer)
        stream = tokenizer.stream(config.stop)
        row = _Row(key, list(prompt), config, number, logprobs, stream, banned, ends, limit, started)
        (self._waiting if limit else self._empty).append(row)

    def cancel(self, key: Hashable) -> Piece | None:
        """Take a sequence out; its last piece has the text that was held back. None if it is not here."""
        for queue in (self._empty, self._waiting):
            for row in queue:
                if row.key == key:
                    queue.remove(row)
                    return Piece(key, None, "", "interrupted")
        for i, row in enumerate(self._running):
            if row.key == key:
                self._leave([i])
                return Piece(key, None, row.stream.finish(), "interrupted")
        return None

    def step(self) -> list[Piece]:
        """Give every running sequence a token (or, when it guessed right, several), and let waiting ones start."""
        pieces = [Piece(row.key, None, "", "length") for row in self._empty]
        self._empty.clear()
        running = len(self._running)
        joining = [self._waiting.popleft() for _ in range(min(self.rows - running, len(self._waiting)))]
        if running == 1 and not joining and self.speculation.size:
            pieces += self._speculative_step(self._running[0])
        elif running:
            pieces += self._plain_step()
        joining.sort(key=lambda row: len(row.ids), reverse=True)
        while joining:  # at most half of what is computed together is padding
            longest = len(joining[0].ids)
            least = longest / 2
            if self.even and longest >= MANY_TOKENS:  # quantised graphs read shorter prompts in another way
                least = max(least, MANY_TOKENS)
            alike = [row for row in joining if len(row.ids) >= least]
            joining = joining[len(alike) :]
            pieces += self._fill(alike)
        ended = {piece.sequence for piece in pieces if piece.finish}
        self._leave([i for i, row in enumerate(self._running) if row.key in ended])
        return pieces

    def _fill(self, rows: list[_Row]) -> list[Piece]:
        lengths = np.array([len(row.ids) for row in rows] + [1] * (self.even and len(rows) % 2))
        padded = np.zeros((len(lengths), lengths.max()), np.int64)
        for ids, row in zip(padded, rows, strict=False):
            ids[: len(row.ids)] = row.ids
            row.started = time.perf_counter() if row.started is None else row.started
        logits = self.model.fill(len(self._running), padded, lengths)
        self._running += rows
        return [self._draw(row, logits[i]) for i, row in enumerate(rows)]

    def _plain_step(self) -> list[Piece]:
        rows = self._running
        for i, row in enumerate(rows):
            if self.model.lengths[i] >= self.capacity:  # it may slide, or it would have ended
                tail = np.array([row.ids[-max(2, self.capacity // 2) : -1]])
                self.model.fill(i, tail, np.array([tail.shape[1]]))
        count = len(rows) + (len(rows) % 2 if self.even else 0)
        tokens = np.zeros(count, np.int64)
        tokens[: len(rows)] = [row.ids[-1] for row in rows]
        if count > len(rows):
            self.model.lengths[len(rows)] = 0  # the row that only makes the number even
        logits = self.model.step(tokens)
        return [self._draw(row, logits[i]) for i, row in enumerate(rows)]

    def _speculative_step(self, row: _Row) -> list[Piece]:
        begin = time.perf_counter()
        before = int(self.model.lengths[0])
        guess = self.speculation.propose(row.ids, min(self.capacity - before, row.limit - row.position) - 1)
        if not guess:
            pieces = self._plain_step()
            self.speculation.plain(time.perf_counter() - begin)
            return pieces
        few = MANY_TOKENS - 1  # at a time, as quantised graphs multiply a single token
        guess = guess[: len(guess) - (len(guess) % few == 0)]  # the token after it would be a call of its own
        tokens = [row.ids[-1], *guess]
        pieces = []
        for i, guessed in enumerate([*guess, None]):
            if i % few == 0:
                logits = self.model.extend(0, tokens[i : i + few])
            pieces.append(self._draw(row, logits[i % few]))
            if pieces[-1].finish or pieces[-1].token != guessed:
                break
        self.model.lengths[0] = before + len(pieces)
        self.speculation.checked(len(guess), len(pieces) - 1, time.perf_counter() - begin)
        return pieces

    def _draw(self, row: _Row, logits: np.ndarray) -> Piece:
        """Draw one token for a sequence from its logits (V,)."""
        config, tokenizer = row.config, self.model.tokenizer
        try:
            token = sample(
                logits,
                config,
                position=row.position,
                sequence=row.number,
                previous=row.ids,
                banned=row.banned,
                ends=row.ends,
            )
        except (ValueError, FloatingPointError) as error:
            if not self.tolerant:
                raise
            return Piece(row.key, None, row.stream.finish(), "interrupted", error=error)
        row.ids.append(token)
        row.position += 1
        finish: Finish | None = None
        text = ""
        if token == tokenizer.eos_id:
            finish = "eos"
        elif token in config.stop_token_ids:
            finish = "stop"
        else:
            text = row.stream.feed(token)
            if row.stream.stopped:
                finish = "stop"
            elif row.position >= row.limit or (len(row.ids) > self.capacity and not self.slide):
                finish = "length"
            elif config.max_time and time.perf_counter() - (row.started or 0.0) > config.max_time:
                finish = "time"
        logprob: float | None = None
        top: tuple[tuple[int, float], ...] = ()
        if row.logprobs is not None:
            logprob, top = logprobs_of(logits, token, row.logprobs)
        return Piece(row.key, token, text + row.stream.finish() if finish else text, finish, logprob, top)

    def _leave(self, ended: list[int]) -> None:
        """Free rows: those at the end move into the holes."""
        sources = list(range(len(self._running)))
        for i in sorted(ended, reverse=True):
            sources[i] = sources[-1]
            sources.pop()
        self.model.select(sources)
        self._running = [self._running[i] for i in sources]


def logprobs_of(logits: np.ndarray, token: int, count: int) -> tuple[float, tuple[tuple[int, float], ...]]:
    """The log-probability of a token, and the `count` most likely tokens with theirs, from logits (V,)."""
    logprobs = log_softmax(logits)
    count = min(count, logprobs.size)
    best = np.argpartition(-logprobs, count - 1)[:count] if count else np.zeros(0, np.int64)
    best = best[np.lexsort((best, -logprobs[best]))]
    return float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in best)
