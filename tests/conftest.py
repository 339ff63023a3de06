"""What several tests share. torch is imported inside the fixtures: some tests run without it."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    from smallgpt.model import SmallGPT
    from smallgpt.tokenizer import Tokenizer

# Tests write no runs into the repository; those that want runs say so.
os.environ["SMALLGPT_TRACKING"] = "off"

# A job in the background ignores Ctrl-C, and so would the processes that tests start and stop with it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every run, no clock, and no database of examples beside the tests.
settings.register_profile("default", deadline=None, derandomize=True, database=None)
settings.load_profile("default")

NAMES = ["Ann", "Ben", "Zoë", "李雷"]
THINGS = ["a red ball", "7 eggs", "the old café", "\tnotes", "a 🐈", "nothing"]
VERBS = ["saw", "lost", "found", "drew", "wanted"]


def make_corpus(seed: int, documents: int) -> list[str]:
    """Short documents of a few lines, with non-ASCII text, tabs and digits."""
    draw = random.Random(seed)
    return [
        "\n".join(
            f"{draw.choice(NAMES)} {draw.choice(VERBS)} {draw.choice(THINGS)}." for _ in range(draw.randint(1, 5))
        )
        for _ in range(documents)
    ]


@pytest.fixture
def one_thread() -> Iterator[None]:
    """PyTorch on one thread: for tiny models threads only wait for each other, long so on a busy machine."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def corpus() -> dict[str, list[str]]:
    """Documents by split."""
    return {"train": make_corpus(1, 300), "valid": make_corpus(2, 20), "test": make_corpus(3, 20)}


@pytest.fixture(scope="session")
def tokenizer(corpus: dict[str, list[str]]) -> Tokenizer:
    """A vocabulary of 320 pieces, trained on the corpus."""
    from smallgpt.tokenizer import Tokenizer, train_tokenizer

    return Tokenizer(train_tokenizer(corpus["train"], vocab_size=320))


@pytest.fixture(scope="session")
def models(tokenizer: Tokenizer) -> dict[str, SmallGPT]:
    """Seeded models of 32 positions with logits of several units: gpt2, llama and qwen3 with grouped heads."""
    import torch

    from smallgpt.model import SmallGPT

    shape = {"vocab_size": tokenizer.vocab_size, "embed_dim": 32, "num_heads": 4, "num_layers": 2, "max_seq_len": 32}
    kinds = {"gpt2": {}, "llama": {}, "grouped": {"architecture": "qwen3", "num_kv_heads": 2}}
    models = {}
    for kind, more in kinds.items():
        torch.manual_seed(0)
        model = SmallGPT(tokenizer=tokenizer, **{"architecture": kind, **shape, **more}).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        models[kind] = model
    return models


@pytest.fixture(scope="session", params=["gpt2", "llama", "grouped"])
def model(request: pytest.FixtureRequest, models: dict[str, SmallGPT]) -> SmallGPT:
    """Each of `models`; read only."""
    return models[request.param]


@pytest.fixture(scope="session")
def project(
    tmp_path_factory: pytest.TempPathFactory,
    corpus: dict[str, list[str]],
    tokenizer: Tokenizer,
    models: dict[str, SmallGPT],
) -> Path:
    """A folder as after the stage train: models/gpt and data/tokens, of the tiny llama; read only."""
    from smallgpt.checkpoint import save_checkpoint
    from smallgpt.tokens import write_tokens

    folder = tmp_path_factory.mktemp("project")
    for split, texts in corpus.items():
        write_tokens(folder / "data" / "tokens", split, texts, tokenizer)
    model = models["llama"]
    lineage = {"tokenizer_sha256": tokenizer.sha256, "data_sha256": {"train": "ab" * 32}, "step": 7, "last_step": 9}
    save_checkpoint(folder / "models" / "gpt", model.config, model.state_dict(), lineage, tokenizer)
    return folder
