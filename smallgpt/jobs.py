"""Requests, their events, and the jobs that run beside the batch: beam searches, scores of prompts, probes.

A job yields after each piece of work, on a fork of the model that it has for itself.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np

from smallgpt.beams import beam_search
from smallgpt.generation import Finish, logprobs_of
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig, check_finite

Logprob = tuple[float, tuple[tuple[int, float], ...]]  # of a token, and the most likely tokens with theirs
Kind = Literal["batch", "beams", "score", "probe"]
SCORED_AT_ONCE = 64  # tokens; what the batch waits for


@dataclass(frozen=True)
class Part:
    """What a step gave to one choice: text that became certain, drawn tokens, and at the end why it ended."""

    choice: int
    text: str = ""
    tokens: tuple[int, ...] = ()
    logprob: Logprob | None = None  # of the only token
    finish: Finish | None = None
    score: float | None = None  # of a beam


@dataclass(frozen=True)
class Scores:
    """The log-probability of every id of a prompt but the first."""

    prompt: int
    logprobs: list[Logprob]


@dataclass(frozen=True)
class End:
    """The last event of a request; with an `error` if it failed, by the caller's settings or not."""

    error: Exception | None = None


Event = Part | Scores | End


@dataclass(eq=False)
class Request:
    """Prompts (ids) to be continued `n` times each; choice p * n + j is sequence j of prompt p.

    `deliver` is called in the scheduler's thread: with the events of each step if `live`, else once with all of them.
    The prompts must fit into the context; with config.max_new_tokens 0 they may be one token longer.
    """

    prompts: list[list[int]]
    config: GenerationConfig
    deliver: Callable[[list[Event]], None]
    n: int = 1
    logprobs: int | None = None
    score: bool = False  # give the log-probabilities of the prompts first
    live: bool = False
    probe: bool = False  # only run a token; never refused
    submitted: float = field(default_factory=time.perf_counter)
    events: list[Event] = field(default_factory=list)  # not delivered yet
    open: set[int] = field(default_factory=set)  # choices for the batch that have not ended
    rest: deque[int] = field(default_factory=deque)  # those that wait for a row
    joined: float = 0.0  # when the first of them could have had one; config.max_time counts from here
    started: bool = False

    @property
    def kind(self) -> Kind:
        """Where its work begins."""
        if self.probe:
            return "probe"
        if self.score or not self.config.max_new_tokens:
            return "score"
        return "beams" if self.config.num_beams > 1 else "batch"


def search(model: OrtGPT, request: Request) -> Iterator[list[Event]]:
    """Beam search for one prompt after the other; what all beams share is the beginning of every choice."""
    begun = time.perf_counter()
    for p, prompt in enumerate(request.prompts):
        sent, config = 0, request.config
        if config.max_time:  # of all prompts together
            config = replace(config, max_time=max(1e-9, config.max_time - (time.perf_counter() - begun)))
        for step in beam_search(model, prompt, config):
            choices = range(p * request.n, (p + 1) * request.n)
            if not step.done:
                sent += len(step.text)
                yield [Part(choice, step.text) for choice in choices if step.text]
                continue
            yield [
                Part(choice, found.text[sent:], found.ids, None, found.finish, found.score)
                for choice, found in zip(choices, step.done, strict=False)
            ]


def score(model: OrtGPT, request: Request) -> Iterator[list[Event]]:
    """The log-probabilities of every prompt, some tokens at a time."""
    for p, ids in enumerate(request.prompts if request.score else []):
        model.reserve(1)
        logprobs: list[Logprob] = []
        # Pieces of nearly one size: quantised kernels compute a single token in another way than several.
        pieces = -(-(len(ids) - 1) // SCORED_AT_ONCE)
        for part in np.array_split(np.arange(len(ids) - 1), pieces) if pieces else []:
            logits = model.extend(0, [ids[i] for i in part])
            check_finite(logits)
            logprobs += [
                logprobs_of(logits[i], ids[at + 1], request.logprobs or 0) for i, at in enumerate(part.tolist())
            ]
            yield []
        yield [Scores(p, logprobs)]


def probe(model: OrtGPT, request: Request) -> Iterator[list[Event]]:
    """Run one token. Raises FloatingPointError when its logits are not finite."""
    check_finite(model.logits([model.tokenizer.eos_id]))
    yield []


JOBS: dict[Kind, Callable[[OrtGPT, Request], Iterator[list[Event]]]] = {
    "beams": search,
    "score": score,
    "probe": probe,
}
