"""The OpenAPI description of the server, and with it the fields of a request."""

from typing import Any

from smallgpt import __version__
from smallgpt.sampling import RANGES

MAX_LOGPROBS = 20

_WHOLE, _FLAG = {"type": "integer"}, {"type": "boolean"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_TEXT = {"type": "string"}
_TEXTS = {"type": "array", "items": _TEXT}
_NOTES = {
    "temperature": "0 is greedy",
    "top_k": "0 is off",
    "repeat_last_n": "tokens that the penalties look at; -1 is all",
    "max_length": "tokens of prompt and continuation; 0 is off",
    "max_time": "seconds",
}


def _number(name: str) -> dict[str, Any]:
    """The schema of a number of GenerationConfig."""
    kind, low, high = RANGES[name]
    schema: dict[str, Any] = {"type": "integer" if kind is int else "number", "minimum": low, "maximum": high}
    return schema | ({"description": _NOTES[name]} if name in _NOTES else {})


# Every field of a request: its JSON schema. Those after `user` are fields of GenerationConfig.
FIELDS: dict[str, dict[str, Any]] = {
    "model": {"type": "string", "description": "the name that /v1/models gives; may be left out"},
    "prompt": {
        "anyOf": [{"type": "string"}, _TEXTS, _IDS, {"type": "array", "items": _IDS}],
        "description": "texts, which start after <|eos|>, or token ids, which are taken as they are",
    },
    "max_tokens": {**_WHOLE, "minimum": 0},
    "n": {**_WHOLE, "minimum": 1},
    "stream": _FLAG,
    "stream_options": {"type": "object", "properties": {"include_usage": _FLAG}},
    "echo": _FLAG,
    "logprobs": {**_WHOLE, "minimum": 0, "maximum": MAX_LOGPROBS},
    "best_of": {**_WHOLE, "description": "only n itself"},
    "suffix": {"type": "string", "description": "only an empty one"},
    "user": {"type": "string", "description": "not used"},
    **{name: _number(name) for name in RANGES if name not in ("max_new_tokens", "num_return_sequences")},
    "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    "seed": {**_WHOLE, "minimum": -1, "description": "-1, as none at all, draws one, which the response names"},
    "logit_bias": {"type": "object", "additionalProperties": {"type": "number"}, "description": "by token id"},
    "early_stopping": {"anyOf": [_FLAG, {"const": "never"}]},
    "stop": {"anyOf": [{"type": "string"}, _TEXTS]},
    "stop_token_ids": _IDS,
    "ignore_eos": _FLAG,
}


def openapi(name: str) -> dict[str, Any]:
    """The OpenAPI description of the server."""

    def route(summary: str, fields: dict[str, Any] | None = None) -> dict[str, Any]:
        operation: dict[str, Any] = {"summary": summary, "responses": {"200": {"description": "done"}}}
        if fields is None:
            return {"get": operation}
        schema = {"type": "object", "properties": fields, "additionalProperties": False}
        operation["requestBody"] = {"required": True, "content": {"application/json": {"schema": schema}}}
        for code, text in (
            ("400", "a wrong parameter"),
            ("413", "too large"),
            ("429", "queue full"),
            ("503", "stopping"),
        ):
            operation["responses"][code] = {"description": text}
        return {"post": operation}

    return {
        "openapi": "3.1.0",
        "info": {"title": f"smallgpt: {name}", "version": __version__},
        "paths": {
            "/v1/completions": route("Continue prompts", FIELDS),
            "/v1/models": route("The model that is served"),
            "/health": route("Run a token"),
            "/metrics": route("Counts and durations for Prometheus"),
            "/tokenize": route("Text to token ids", {"content": _TEXT, "prompt": _TEXT, "add_special_tokens": _FLAG}),
            "/detokenize": route("Token ids to text", {"tokens": _IDS}),
            "/tokenizer_info": route("The names of the control tokens"),
        },
    }
