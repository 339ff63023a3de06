"""Generation with a PyTorch model: the engine of `generation` on rows that are kept as tensors."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from smallgpt.beams import beam_search
from smallgpt.config import ModelConfig
from smallgpt.generation import generate
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import Tokenizer


class Model(Protocol):
    """What generation needs of a model: SmallGPT has it."""

    config: ModelConfig
    tokenizer: Tokenizer | None

    def __call__(self, ids: torch.Tensor, past: Any = None) -> tuple[torch.Tensor, Any]: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


class TorchDecoder:
    """A PyTorch model as the `generation.Decoder` that `OrtGPT` is for a bundle.

    Rows of equal length are run together. Raises ValueError for a model without a tokenizer.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.tokenizer = require_tokenizer(model)
        self.max_seq_len = model.config.max_seq_len
        self.lengths = np.zeros(0, np.int64)  # (R,) tokens in the cache of each row
        self._device = next(model.parameters()).device
        self._past: list[Any] = []  # for each row and layer keys and values, each (1, kv_heads, tokens, head_dim)

    def reserve(self, rows: int, capacity: int | None = None) -> None:
        """Start with `rows` empty rows."""
        self.lengths, self._past = np.zeros(rows, np.int64), [None] * rows

    def fill(self, first: int, ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Start the rows from `first` on with prompts (B, S), padded on the right; logits after each, (B, V)."""
        self.lengths[first : first + len(ids)] = 0
        rows = [row[:length] for row, length in zip(ids, lengths, strict=True)]
        return np.stack([self.extend(first + i, row)[-1] for i, row in enumerate(rows)])

    def extend(self, row: int, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Add tokens (S,) to one row; logits after each, (S, V)."""
        return self._run([row], np.asarray(ids)[None])[0]

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Add one token to each of the first B rows, (B,); logits after each, (B, V)."""
        logits: list[np.ndarray] = [np.zeros(0)] * len(tokens)
        lengths = self.lengths[: len(tokens)].copy()
        for length in np.unique(lengths):
            rows = np.flatnonzero(lengths == length).tolist()
            for row, result in zip(rows, self._run(rows, tokens[rows, None]), strict=True):
                logits[row] = result[-1]
        return np.stack(logits)

    def select(self, sources: Sequence[int]) -> None:
        """Let row i hold what row `sources[i]` held."""
        self._past[: len(sources)] = [self._past[source] for source in sources]
        self.lengths[: len(sources)] = self.lengths[list(sources)]

    @torch.inference_mode()
    def _run(self, rows: list[int], ids: np.ndarray) -> np.ndarray:
        """Add (B, S) tokens to rows of equal length; logits (B, S, V)."""
        length = int(self.lengths[rows[0]])
        past = None
        if length:
            layers = zip(*(self._past[row] for row in rows), strict=True)
            past = [
                tuple(torch.cat([row[kind][:, :, :length] for row in layer]) for kind in (0, 1)) for layer in layers
            ]
        logits, present = self.model(torch.from_numpy(ids.astype(np.int64)).to(self._device), past)
        for i, row in enumerate(rows):
            self._past[row] = [(keys[i : i + 1], values[i : i + 1]) for keys, values in present]
            self.lengths[row] = length + ids.shape[1]
        return logits.float().cpu().numpy()


def stream_text(
    model: Model, prompt: str | Sequence[int], config: GenerationConfig, *, sequence: int = 0
) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece: whole characters, nothing from a stop string on.

    A text starts after `<|eos|>`, as documents do in training; a prompt of ids is taken as it is. Raises ValueError
    for a model without a tokenizer and for a prompt that does not fit into the context.
    """
    decoder = TorchDecoder(model)
    ids = [decoder.tokenizer.eos_id, *decoder.tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
    if config.num_beams > 1:
        for step in beam_search(decoder, ids, config):
            yield step.text
        return
    for pieces in generate(decoder, [ids], config, sequences=[sequence]):
        yield "".join(piece.text for piece in pieces)


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

    `settings` are further fields of `GenerationConfig`: top_k, top_p, seed, num_beams, ... Dropout is off while it
    runs.
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
