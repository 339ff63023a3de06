"""Trained models on disk: safetensors and JSON, never a pickle."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from smallgpt.cli import MismatchError
from smallgpt.config import ModelConfig
from smallgpt.files import replace_folder, sha256_file, write_atomic, write_json
from smallgpt.tokenizer import Tokenizer

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a model folder holds: shape, weights, lineage and, where there is one, the tokenizer."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    lineage: dict[str, Any]  # tokenizer_sha256, data_sha256, step
    tokenizer: Tokenizer | None


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file; a damaged one raises MismatchError."""
    try:
        return load_tensors(path.read_bytes())
    except SafetensorError as error:
        raise MismatchError(f"{path} is damaged: {error}") from None


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file atomically; the same tensors give the same bytes."""
    write_atomic(path, save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))


def save_checkpoint(
    folder: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    lineage: dict[str, Any],
    tokenizer: Tokenizer | None,
    *,
    last: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write model.safetensors, config.json, tokenizer.model and, if given, last.safetensors, all or nothing."""
    with replace_folder(folder) as temporary:
        write_tensors(temporary / "model.safetensors", weights)
        if last is not None:
            write_tensors(temporary / "last.safetensors", last)
        if tokenizer is not None:
            write_atomic(temporary / "tokenizer.model", tokenizer.model)
        digests = {path.name: sha256_file(path) for path in sorted(temporary.glob("*.safetensors"))}
        values = {"format": FORMAT, "model": config.model_dump(), **lineage, "sha256": digests}
        write_json(temporary / "config.json", values)


def load_checkpoint(folder: str | Path, *, weights: str = "model.safetensors") -> Checkpoint:
    """Read a model folder.

    Raises:
        FileNotFoundError: the folder or one of its files is missing.
        MismatchError: a damaged file, a newer format, or a tokenizer that is not the one of the training.
    """
    folder = Path(folder)
    for name in ("config.json", weights):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} does not exist; the train stage writes it")
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        version = values.pop("format")
        if version > FORMAT:
            raise MismatchError(f"{folder} has format {version}; this smallgpt reads up to {FORMAT}: upgrade it")
        config = ModelConfig.model_validate(values.pop("model"))
        digest = values.pop("sha256", {}).get(weights)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, MismatchError):
            raise
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise MismatchError(f"{folder / 'config.json'} is no model configuration: {reason}") from None
    # safetensors has no checksum of its own: a flipped bit would pass as a weight.
    if digest not in (None, sha256_file(folder / weights)):
        raise MismatchError(f"{folder / weights} is damaged or was changed: config.json has another sha256 for it")
    tokenizer = Tokenizer.load(folder) if (folder / "tokenizer.model").is_file() else None
    if tokenizer and values.get("tokenizer_sha256") not in (None, tokenizer.sha256):
        raise MismatchError(
            f"{folder / 'tokenizer.model'} is not the tokenizer the model was trained with "
            f"(sha256 {tokenizer.sha256[:12]}, config.json says {str(values['tokenizer_sha256'])[:12]})"
        )
    return Checkpoint(config, read_tensors(folder / weights), values, tokenizer)


def model_sha256(folder: str | Path) -> str:
    """Hash of a model folder's weights, which names the model in the runs; FileNotFoundError without them."""
    if not (path := Path(folder) / "model.safetensors").is_file():
        raise FileNotFoundError(f"{path} does not exist; the train stage writes it")
    return sha256_file(path)
