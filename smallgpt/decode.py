"""Decoding with a PyTorch model: one token at a time, through the cache."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from smallgpt.config import ModelConfig
from smallgpt.sampling import GenerationConfig, sample
from smallgpt.tokenizer import Tokenizer


class Model(Protocol):
    """What generation needs of a model: SmallGPT has it."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    def __call__(self, ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


@torch.inference_mode()
def generate_ids(
    model: Model, prompt: Sequence[int], config: GenerationConfig, *, tokenizer: Tokenizer, sequence: int = 0
) -> Iterator[int]:
    """Yield the ids that continue `prompt` (ids, at least one) until `<|eos|>`, which is not yielded.

    Ends also after config.max_new_tokens and where the context is full; `sequence` tells samples of one seed apart.
    Raises ValueError for an empty prompt or one that leaves no room in the context.
    """
    limit = model.config.max_seq_len
    if not 0 < len(prompt) <= limit:
        raise ValueError(f"the prompt has {len(prompt)} tokens; between 1 and {limit} fit into the context")
    ids = list(prompt)
    new, past = ids, None
    device = next(model.parameters()).device
    for position in range(config.max_new_tokens):
        logits, past = model(torch.tensor([new], device=device), past)
        token = sample(
            logits[0, -1].float().cpu().numpy(),
            config,
            position=position,
            sequence=sequence,
            previous=ids,
            banned=tokenizer.banned_ids,
        )
        if token == tokenizer.eos_id:
            return
        ids.append(token)
        yield token
        if len(ids) > limit:
            return
        new = [token]


def stream_text(
    model: Model, prompt: str, config: GenerationConfig, *, sequence: int = 0, prompt_ids: Sequence[int] | None = None
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece: whole characters, nothing from a stop string on.

    A text starts after `<|eos|>`, as documents do in training. Raises ValueError for a model without a tokenizer.
    """
    tokenizer = require_tokenizer(model)
    ids = [tokenizer.eos_id, *tokenizer.encode(prompt)] if prompt_ids is None else prompt_ids
    stream = tokenizer.stream(config.stop)
    for token in generate_ids(model, ids, config, tokenizer=tokenizer, sequence=sequence):
        yield stream.feed(token)
        if stream.stopped:
            return
    yield stream.finish()


def require_tokenizer(model: Model) -> Tokenizer:
    """The model's tokenizer, or a ValueError that says how to attach one."""
    if model.tokenizer is None:
        raise ValueError(
            "this model has no tokenizer: set model.tokenizer = Tokenizer.load('models/tokenizer'), "
            "or load a model folder with SmallGPT.from_pretrained('models/gpt')"
        )
    return model.tokenizer


def generate_text(model: Model, prompt: str, max_length: int = 50, temperature: float = 0.8, **settings: Any) -> str:
    """`prompt` and its continuation, together at most `max_length` tokens (the leading `<|eos|>` not counted).

    `settings` are further fields of `GenerationConfig`: top_k, top_p, seed, stop, ... Dropout is off while it runs.
    """
    tokenizer = require_tokenizer(model)
    new_tokens = max(0, max_length - len(tokenizer.encode(prompt)))
    config = GenerationConfig.from_dict({"temperature": temperature, "max_new_tokens": new_tokens, **settings})
    training = getattr(model, "training", False)
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        return prompt + "".join(stream_text(model, prompt, config))
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]
