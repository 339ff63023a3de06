"""Small models, token files and bundles for the tests of export and serving."""

import functools
import random
from pathlib import Path

import torch

from smallgpt.bundle import write_config
from smallgpt.config import ExportConfig
from smallgpt.export import export, write_bundle
from smallgpt.files import write_json
from smallgpt.model import SmallGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.tokenizer import Tokenizer, train_tokenizer
from smallgpt.tokens import write_tokens

WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "under",
    "mat",
    "and",
    "happy",
    "sad",
    "café",
    "naïve",
    "𝄞",
    "über",
]
SHAPE = {"embed_dim": 64, "num_heads": 4, "num_layers": 2, "max_seq_len": 64, "dropout": 0.0}


def text(seed: int, words: int) -> str:
    """Random words in lines."""
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", ", ", ".\n"]) for _ in range(words))


@functools.cache
def tokenizer() -> Tokenizer:
    """A vocabulary of 320 pieces."""
    return Tokenizer(train_tokenizer([text(0, 2000)], vocab_size=320))


def random_model(architecture: str = "gpt2", **shape: int) -> SmallGPT:
    """Random weights, large enough for logits of several units and for attention that looks far back."""
    torch.manual_seed(0)
    vocabulary = tokenizer()
    settings = {**SHAPE, "vocab_size": vocabulary.vocab_size, "architecture": architecture, **shape}
    model = SmallGPT(tokenizer=vocabulary, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.15 * torch.randn_like(parameter)
    return model


def parrot(words: str) -> SmallGPT:
    """A gpt2 that, after the first token of its prompt, says `words` and then `<|eos|>`, whatever it has read.

    All layers add nothing, and each position's embedding points at the token that is to come.
    """
    model = random_model()
    assert model.tokenizer is not None
    assert model.wpe is not None
    ids = [*model.tokenizer.encode(words), model.tokenizer.eos_id]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.ln_f.weight.fill_(4.0)
        model.wte.weight.copy_(torch.nn.functional.normalize(torch.randn(model.wte.weight.shape)))
        for position in range(model.config.max_seq_len):
            model.wpe.weight[position] = 20 * model.wte.weight[ids[min(position, len(ids) - 1)]]
    return model


def write_project(folder: Path, model: SmallGPT) -> tuple[Path, Path]:
    """A model folder and a folder with token files: (model, tokens)."""
    assert model.tokenizer is not None
    model.save_pretrained(folder / "model")
    write_tokens(folder / "tokens", "train", [text(0, 400)], model.tokenizer)
    write_tokens(folder / "tokens", "valid", [text(1, 100)], model.tokenizer)
    write_tokens(folder / "tokens", "test", [text(seed, 60) for seed in range(2, 6)], model.tokenizer)
    return folder / "model", folder / "tokens"


def write_bundles(folder: Path, model: SmallGPT, variants: list[str], **generation: object) -> Path:
    """Export a model; returns the folder that holds the bundles."""
    model_dir, tokens = write_project(folder, model)
    settings = ExportConfig(variants=variants, certificate_tokens=300, threads=1)
    config = GenerationConfig.from_dict(dict(generation))
    export(model_dir, tokens, settings, config, out=folder / "exports", report=folder / "export.json")
    return folder / "exports"


def write_uncertified(folder: Path, model: SmallGPT, variant: str, **generation: object) -> Path:
    """A bundle without a certificate, which a random model of some width does not get in 8 bits."""
    model_dir, _ = write_project(folder, model)
    settings = write_bundle(
        folder / variant, variant, model, model_dir, GenerationConfig.from_dict(dict(generation)), {}
    )
    write_json(folder / variant / "parity.json", {})
    write_config(folder / variant, settings)
    return folder / variant


def write_endless(folder: Path) -> Path:
    """A bundle with room for more text than a test waits for."""
    return write_uncertified(folder, random_model(max_seq_len=50_000), "fp32", max_new_tokens=50_000)
