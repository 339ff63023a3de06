"""OpenAI's completions: from the JSON of a request to settings, and from what was generated to JSON."""

import codecs
import dataclasses
import difflib
import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from smallgpt.jobs import Event, Logprob, Part, Scores
from smallgpt.openapi import FIELDS, MAX_LOGPROBS
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import CONTROL_PIECES, Tokenizer

MAX_BIASES = 1024
FINISH = {"eos": "stop", "stop": "stop", "length": "length", "time": "length"}


class RequestError(ValueError):
    """What is wrong with a request: an HTTP status, a message and the parameter it is about."""

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def to_dict(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        message = str(self) if len(str(self)) <= 500 else f"{str(self)[:500]} ..."
        return {"error": {"message": message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may ask for."""

    body: int = 2**20  # bytes
    tokens: int = 4096  # max_tokens
    n: int = 16
    stop: int = 16  # stop strings, and stop token ids
    prompts: int = 64
    beams: int = 16
    time: float = 300.0  # seconds of generation


@dataclass(frozen=True, kw_only=True)
class Completion:
    """A checked request."""

    prompts: list[list[int]]
    config: GenerationConfig
    n: int
    stream: bool
    usage: bool  # a last chunk with the token counts
    echo: bool
    logprobs: int | None


def read_json(body: bytes) -> dict[str, Any]:
    """The JSON object of a request. Raises RequestError, for NaN and repeated keys too."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise ValueError(f"the key {key} stands twice")
            values[key] = value
        return values

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        values = json.loads(body.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except RecursionError:
        raise RequestError("the body is no valid JSON: it is nested too deeply") from None
    except ValueError as error:
        raise RequestError(f"the body is no valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise RequestError("the body is no JSON object")
    return values


def to_json(value: Any) -> bytes:
    """JSON in UTF-8; a lone surrogate, which an error message may quote, becomes its escape."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace")


def read_completion(values: dict[str, Any], model: OrtGPT, limits: Limits, name: str) -> Completion:
    """Check the JSON of a request; what it leaves out, or has as null, is as in the bundle's generation_config.json.

    Raises RequestError.
    """
    values = {key: value for key, value in values.items() if value is not None}
    for key in values:
        if key not in FIELDS:
            close = difflib.get_close_matches(key, FIELDS, n=1)
            raise RequestError(f"unknown parameter {key}" + (f"; did you mean {close[0]}?" if close else ""), param=key)
    check_model(values, name)
    defaults = model.bundle.generation
    n = _whole(values, "n", 1, 1, limits.n)
    tokens = _whole(values, "max_tokens", min(defaults.max_new_tokens, limits.tokens), 0, limits.tokens)
    logprobs = _whole(values, "logprobs", -1, 0, MAX_LOGPROBS)
    if values.get("best_of", n) != n:
        raise RequestError("best_of is not supported beside n; take num_beams", param="best_of")
    if values.get("suffix", ""):
        raise RequestError("suffix is not supported: the model only continues text", param="suffix")
    options = values.get("stream_options", {})
    if not isinstance(options, dict) or not isinstance(options.get("include_usage", False), bool):
        raise RequestError('stream_options must be an object such as {"include_usage": true}', param="stream_options")
    settings = defaults.to_dict()
    settings |= {key: value for key, value in values.items() if key in settings}
    if values.get("seed", -1) == -1:
        settings["seed"] = secrets.randbelow(2**32)
    try:
        config = GenerationConfig.from_dict(settings | {"max_new_tokens": tokens, "num_return_sequences": 1})
    except ValueError as error:
        word = str(error).split()[0]
        raise RequestError(str(error), param=word if word in FIELDS else None) from None
    _check(config, model, limits)
    prompts = _prompts(values.get("prompt", ""), model, limits, model.max_seq_len + (tokens == 0))
    if logprobs >= 0 and len(prompts) * n > limits.prompts:
        message = f"with logprobs there are at most {limits.prompts} choices (--max-prompts), not {len(prompts) * n}"
        raise RequestError(message, param="n")
    if config.num_beams > 1:
        if n > config.num_beams:
            raise RequestError(f"n is {n}; {config.num_beams} beams give no more than that", param="n")
        if logprobs >= 0 and tokens:
            raise RequestError("beam search has no logprobs; the choices have a score", param="logprobs")
        config = dataclasses.replace(config, num_return_sequences=n)
    return Completion(
        prompts=prompts,
        config=dataclasses.replace(config, max_time=config.max_time or limits.time),
        n=n,
        stream=_flag(values, "stream"),
        usage=options.get("include_usage", False),
        echo=_flag(values, "echo"),
        logprobs=None if logprobs < 0 else logprobs,
    )


def check_model(values: dict[str, Any], name: str) -> None:
    """Raise RequestError when a request names another model than the one that is served."""
    wanted = values.get("model", name)
    if not isinstance(wanted, str):
        raise RequestError("model must be a text", param="model")
    if wanted != name:
        message = f"there is no model {wanted!r}; this server has {name!r}"
        raise RequestError(message, status=404, param="model", code="model_not_found")


def read_ids(value: Any, param: str, vocab_size: int) -> list[int]:
    """Check a list of token ids."""
    if not isinstance(value, list) or not all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        raise RequestError(f"{param} must be a list of token ids", param=param)
    for token in value:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"{param} has the token id {token}; the vocabulary is 0 to {vocab_size - 1}", param=param
            )
    return value


def read_text(value: Any, param: str, tokenizer: Tokenizer) -> list[int]:
    """The ids of a text."""
    if not isinstance(value, str):
        raise RequestError(f"{param} must be a text", param=param)
    try:
        return tokenizer.encode(value)
    except ValueError as error:
        raise RequestError(f"{param}: {error}", param=param) from None


def _prompts(value: Any, model: OrtGPT, limits: Limits, longest: int) -> list[list[int]]:
    eos = model.tokenizer.eos_id
    several = isinstance(value, list) and any(isinstance(item, str | list) for item in value)
    prompts = value if several else [value]
    if len(prompts) > limits.prompts:
        message = f"prompt has {len(prompts)} prompts; this server takes at most {limits.prompts} (--max-prompts)"
        raise RequestError(message, param="prompt")
    found = []
    for prompt in prompts:
        if isinstance(prompt, str):
            ids = [eos, *read_text(prompt, "prompt", model.tokenizer)]
        elif isinstance(prompt, list):
            ids = read_ids(prompt, "prompt", model.vocab_size) or [eos]
        else:
            raise RequestError("prompt must be a text, a list of texts, a list of token ids or a list of such lists")
        if len(ids) > longest:
            message = f"the prompt has {len(ids)} tokens; at most {longest} fit into the context"
            raise RequestError(message, param="prompt", code="context_length_exceeded")
        found.append(ids)
    return found


def _check(config: GenerationConfig, model: OrtGPT, limits: Limits) -> None:
    """Raise RequestError for settings beyond the limits or the vocabulary."""
    sizes = {
        "stop": (len(config.stop), limits.stop, " (--max-stop)"),
        "stop_token_ids": (len(config.stop_token_ids), limits.stop, " (--max-stop)"),
        "logit_bias": (len(config.logit_bias), MAX_BIASES, ""),
        "num_beams": (config.num_beams, limits.beams, " (--max-beams)"),
        "max_time": (config.max_time, limits.time, " (--max-time)"),
    }
    for key, (size, limit, flag) in sizes.items():
        if size > limit:
            has = "is" if key in ("num_beams", "max_time") else "has"
            raise RequestError(f"{key} {has} {size}; this server allows at most {limit}{flag}", param=key)
    for key, ids in (("logit_bias", list(config.logit_bias)), ("stop_token_ids", list(config.stop_token_ids))):
        read_ids(ids, key, model.vocab_size)


def _whole(values: dict[str, Any], key: str, default: int, low: int, high: int) -> int:
    value = values.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{key} is {value!r}; it must be a whole number", param=key)
    if key in values and not low <= value <= high:
        raise RequestError(f"{key} is {value}; this server allows {low} to {high}", param=key)
    return value


def _flag(values: dict[str, Any], key: str) -> bool:
    value = values.get(key, False)
    if not isinstance(value, bool):
        raise RequestError(f"{key} is {value!r}; it must be true or false", param=key)
    return value


class Reply:
    """Turns the events of a request into chunks, and collects them to the whole response."""

    def __init__(self, completion: Completion, tokenizer: Tokenizer, model: str, fingerprint: str) -> None:
        self.completion, self.tokenizer = completion, tokenizer
        self.head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
            "seed": completion.config.seed,
        }
        self.tokens = 0
        count = len(completion.prompts) * completion.n
        self.choices: list[dict[str, Any]] = [{} for _ in range(count)]
        self._offsets = [_Offsets(tokenizer) for _ in range(count)]

    @property
    def scored(self) -> bool:
        """Whether the prompts' log-probabilities are wanted."""
        return self.completion.echo and self.completion.logprobs is not None

    def begin(self) -> list[dict[str, Any]]:
        """The chunks before the first event: the prompts, when they are echoed without log-probabilities."""
        if not self.completion.echo or self.scored:
            return []
        return [chunk for prompt in range(len(self.completion.prompts)) for chunk in self._echo(prompt, None)]

    def feed(self, events: Iterable[Event]) -> list[dict[str, Any]]:
        """The chunks of some events."""
        chunks = []
        for event in events:
            if isinstance(event, Scores):
                chunks += self._echo(event.prompt, event.logprobs)
            elif isinstance(event, Part):
                self.tokens += len(event.tokens)
                logprobs = event.logprob and self._logprobs(event.choice, event.tokens, [event.logprob])
                if event.text or logprobs or event.finish:
                    chunks.append(self._chunk(event.choice, event.text, logprobs, event))
        return chunks

    def whole(self) -> dict[str, Any]:
        """The response; choices that beam search did not find are left out."""
        return {**self.head, "choices": [c for c in self.choices if c.get("reason")], "usage": self.usage()}

    def usage(self) -> dict[str, int]:
        """Tokens that were read, the `<|eos|>` in front included, and drawn, one that ended the text included."""
        prompt = sum(map(len, self.completion.prompts))
        return {"prompt_tokens": prompt, "completion_tokens": self.tokens, "total_tokens": prompt + self.tokens}

    def _echo(self, prompt: int, logprobs: list[Logprob] | None) -> list[dict[str, Any]]:
        ids, n = self.completion.prompts[prompt], self.completion.n
        text = self.tokenizer.decode(ids)
        found: list[Logprob | None] = [None, *(logprobs or [])]
        return [
            self._chunk(i, text, None if logprobs is None else self._logprobs(i, ids, found))
            for i in range(prompt * n, (prompt + 1) * n)
        ]

    def _chunk(self, index: int, text: str, logprobs: Any, part: Part | None = None) -> dict[str, Any]:
        """A choice of a chunk, which is also added to the whole."""
        reason = part.finish if part else None
        finish = FINISH[reason] if reason else None
        chunk = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish, "reason": reason}
        if part and part.score is not None:
            chunk["score"] = part.score
        whole = self.choices[index]
        before = whole.get("logprobs")
        joined = {key: before[key] + logprobs[key] for key in before} if before and logprobs else before or logprobs
        whole.update(chunk | {"text": whole.get("text", "") + text, "logprobs": joined})
        return chunk

    def _logprobs(self, choice: int, ids: Sequence[int], found: Sequence[Logprob | None]) -> dict[str, Any]:
        """The legacy shape; an id that nothing stands before has null in place of a log-probability."""
        top: list[dict[str, float] | None] = []
        for token, entry in zip(ids, found, strict=True):
            best: dict[str, float] | None = None
            if entry is not None:
                best = {}
                for other, logprob in (*entry[1], (token, entry[0])):
                    best.setdefault(token_name(self.tokenizer, other), logprob)
            top.append(best)
        return {
            "tokens": [token_name(self.tokenizer, token) for token in ids],
            "token_logprobs": [None if entry is None else entry[0] for entry in found],
            "top_logprobs": top,
            "text_offset": [self._offsets[choice].feed(token) for token in ids],
        }


class _Offsets:
    """Where in a choice's text each token starts, in characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._length = tokenizer, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> int:
        """The offset of the next token."""
        start = self._length
        self._length += len(self._decoder.decode(self._tokenizer.token_bytes[token]))
        return start


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """A token as text; one that stands for a byte as `bytes:\\xe6`."""
    if token < len(CONTROL_PIECES):
        return CONTROL_PIECES[token]
    data = tokenizer.token_bytes[token]
    raw = tokenizer.token_bytes.index(b"\0")  # the 256 byte pieces stand together; each ASCII letter has another one
    if raw <= token < raw + 256:
        return f"bytes:\\x{data[0]:02x}"
    return data.decode("utf-8")
