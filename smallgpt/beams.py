"""Beam search: the most likely continuations, with stop strings and with streaming.

The rules are those of Transformers' beam search, so sequences and scores agree with it: log-probabilities pass the
processors that come before the temperature, a finished beam is ranked by its sum / length ** length_penalty, and
`early_stopping` says when no better one is expected.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from smallgpt.generation import Decoder, Finish, check_prompt, new_tokens
from smallgpt.sampling import GenerationConfig, check_finite, log_softmax, penalize
from smallgpt.tokenizer import TextStream


@dataclass(frozen=True)
class Hypothesis:
    """A finished continuation: its ids (the token that ended it included), text, score and why it ended."""

    ids: tuple[int, ...]
    text: str
    score: float  # sum of the log-probabilities / length ** length_penalty
    finish: Finish


@dataclass(frozen=True)
class BeamStep:
    """What a step made certain: `text` that all beams agree on, and at the end the best hypotheses, best first."""

    text: str
    done: tuple[Hypothesis, ...] = ()


@dataclass(frozen=True)
class _Beam:
    """A continuation in work."""

    ids: tuple[int, ...]
    logprob: float  # sum over ids
    row: int  # whose cache it continues
    text: str  # of ids, as far as it is certain
    stream: TextStream  # has the rest
    finish: Finish | None = None

    def then(self, token: int, logprob: float, ends: Sequence[int]) -> "_Beam":
        """This beam with one more token, which ends it if it is one of `ends` or completes a stop string."""
        stream = self.stream.copy()
        text = self.text if token in ends else self.text + stream.feed(token)
        finish: Finish | None = "stop" if token in ends or stream.stopped else None
        finish = "eos" if token == ends[0] else finish
        return _Beam((*self.ids, token), logprob, self.row, text, stream, finish)


def beam_search(model: Decoder, prompt: Sequence[int], config: GenerationConfig) -> Iterator[BeamStep]:
    """Continue a prompt (ids) with the config.num_beams best continuations; the last step has the results.

    Beams do not draw: temperature, top_k, top_p, min_p and the seed do not act. Each step's text is the part that
    running beams and finished hypotheses share, so it is never taken back. Results are at most
    config.num_return_sequences. The model's rows are taken over. Raises ValueError for an empty prompt, one that does
    not fit into the context, ids outside the vocabulary, and when the settings forbid every token, FloatingPointError
    for logits that are not finite.
    """
    check_prompt(model, prompt)
    config.check_ids(model.tokenizer.vocab_size)
    tokenizer, beams = model.tokenizer, config.num_beams
    banned = [*tokenizer.banned_ids, *([tokenizer.eos_id] if config.ignore_eos else [])]
    ends = [tokenizer.eos_id, *config.stop_token_ids]
    # The context holds the prompt and all tokens but the last.
    limit = min(new_tokens(config, prompt, tokenizer), model.max_seq_len + 1 - len(prompt))
    if limit == 0:
        yield BeamStep("", (Hypothesis((), "", 0.0, "length"),))
        return
    deadline = time.perf_counter() + config.max_time if config.max_time else float("inf")
    model.reserve(beams, min(model.max_seq_len, len(prompt) + limit))
    logits = model.fill(0, np.array([prompt]), np.array([len(prompt)]))
    model.select([0] * beams)
    running = [_Beam((), 0.0, 0, "", tokenizer.stream(config.stop))]
    finished: list[tuple[float, _Beam]] = []  # best first
    shown = tokenizer.stream(config.stop)
    agreed = 0
    for length in range(1, limit + 1):
        last: Finish | None = "length" if length == limit else "time" if time.perf_counter() > deadline else None
        candidates = []
        check_finite(logits)
        for beam in running:
            scores = penalize(
                log_softmax(logits[beam.row]),
                config,
                [*prompt, *beam.ids],
                position=length - 1,
                banned=banned,
                ends=ends,
            )
            candidates.append(scores + beam.logprob)
        pool = np.concatenate(candidates)  # (running beams * vocabulary,)
        # So many that num_beams of them go on even if all others end.
        count = min(max(2, len(ends) + 1) * beams, int((pool > -np.inf).sum()))
        if not count:
            raise ValueError("no token is left: no_repeat_ngram_size, min_new_tokens and the like forbid all of them")
        best = np.argpartition(-pool, count - 1)[:count]
        best = best[np.lexsort((best, -pool[best]))]
        going: list[_Beam] = []
        for rank, index in enumerate(best.tolist()):
            if rank >= beams and len(going) == beams:
                break
            parent, token = running[index // logits.shape[-1]], index % logits.shape[-1]
            beam = parent.then(token, float(pool[index]), ends)
            beam = replace(beam, finish=beam.finish or last)
            if beam.finish is None:
                going.append(beam)
            elif rank < beams:  # lower ones are only there to replace those that end
                finished.append((beam.logprob / length**config.length_penalty, beam))
        finished = sorted(finished, key=lambda item: -item[0])[:beams]
        if not going or _settled(going, finished, config, length, limit):
            break
        prefix = _shared([beam.ids for beam in going] + [beam.ids for _, beam in finished])
        yield BeamStep("".join(shown.feed(token) for token in prefix[agreed:]))
        agreed = len(prefix)
        model.select([beam.row for beam in going])
        running = [replace(beam, row=row) for row, beam in enumerate(going)]
        logits = model.step(np.array([beam.ids[-1] for beam in running]))
    done = tuple(
        Hypothesis(beam.ids, beam.text + beam.stream.finish(), score, beam.finish or "length")
        for score, beam in finished[: config.num_return_sequences]
    )
    rest = finished[0][1].ids[agreed:]
    text = "".join(shown.feed(token) for token in rest if token not in ends)
    yield BeamStep(text + shown.finish(), done)


def _settled(
    going: list[_Beam], finished: list[tuple[float, _Beam]], config: GenerationConfig, length: int, limit: int
) -> bool:
    """Whether the search is over: there are num_beams results, and no better one is expected."""
    if len(finished) < config.num_beams:
        return False
    if config.early_stopping is True:
        return True
    # Transformers' estimates of the best score that a running beam can still reach.
    longest = limit if config.early_stopping == "never" and config.length_penalty > 0 else length
    return going[0].logprob / longest**config.length_penalty <= finished[-1][0]


def _shared(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The longest common beginning."""
    first, last = min(sequences), max(sequences)
    same = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
    return first[:same]
