"""The quality report: known figures of known models, a leak that is found, and the same bytes twice."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from smallgpt.cli import MismatchError
from smallgpt.config import EvaluationConfig
from smallgpt.decode import stream_text
from smallgpt.evaluate import (
    evaluate,
    evaluate_split,
    evaluate_train,
    loss_by_position,
    perplexity_rows,
    perplexity_table,
    position_buckets,
    read_floors,
    windows_at_once,
)
from smallgpt.model import SmallGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.score import Scores, score_stream
from smallgpt.tokenizer import Tokenizer, train_tokenizer
from smallgpt.tokens import TokenFile, write_tokens

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = EvaluationConfig(samples=2, train_tokens=500, sample_prompt="Ann", batch_size=4)
GENERATION = GenerationConfig(max_new_tokens=6)
NAMES = ["loss.png", "perplexity.json", "perplexity.md", "position.csv", "position.png", "samples.md"]


@pytest.fixture
def uniform(models: dict[str, SmallGPT]) -> SmallGPT:
    """A model that holds all 320 tokens equally likely."""
    model = SmallGPT(tokenizer=models["gpt2"].tokenizer, **models["gpt2"].config.model_dump()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


@pytest.fixture
def curves(tmp_path: Path) -> Path:
    (tmp_path / "train").mkdir()
    for name in ("train", "valid"):
        (tmp_path / "train" / f"{name}.csv").write_text("step,loss,learning_rate\n1,5.5,0.1\n2,4.25,0.05\n")
    return tmp_path / "train"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.slow
def test_everything_is_written_the_same_twice(project: Path, curves: Path, tmp_path: Path) -> None:
    tokens = project / "data/tokens"
    results = []
    for name in ("a", "b"):
        model = SmallGPT.from_pretrained(project / "models/gpt")
        floors = {"valid": 100.0}
        out = tmp_path / name
        results.append(
            evaluate(model, tokens, CONFIG, GENERATION, digest="ab12", out=out, floors=floors, train_reports=curves)
        )
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    assert list(contents(tmp_path / "a")) == NAMES
    assert json.loads((tmp_path / "a/perplexity.json").read_text()) == results[0]
    assert list(results[0]) == ["valid", "test", "train"]
    for name in ("loss.png", "position.png"):
        assert contents(tmp_path / "a")[name].startswith(b"\x89PNG\r\n\x1a\n")


def test_figures_belong_to_the_split(project: Path, tmp_path: Path) -> None:
    tokens = project / "data/tokens"
    model = SmallGPT.from_pretrained(project / "models/gpt")
    floor = {"test": 1234.5}
    results = evaluate(model, tokens, CONFIG, GENERATION, digest="ab12", out=tmp_path, floors=floor)
    for split in ("valid", "test"):
        file, figures = TokenFile.load(tokens, split), results[split]
        plain = score_stream(model, file.ids, context=32, stride=32, batch_size=4).nats.sum()
        sliding = score_stream(model, file.ids, context=32, stride=16, batch_size=4).nats.sum()
        assert sliding != plain
        assert (figures["context"], figures["stride"], figures["documents"]) == (32, 16, 20)
        assert (figures["tokens"], figures["bytes"]) == (len(file.ids) - 1, file.text_bytes)
        assert figures["perplexity"] == pytest.approx(math.exp(plain / (len(file.ids) - 1)))
        assert figures["bits_per_byte"] == pytest.approx(plain / math.log(2) / file.text_bytes)
        assert figures["sliding_bits_per_byte"] == pytest.approx(sliding / math.log(2) / file.text_bytes)
        assert figures["word_perplexity"] == pytest.approx(math.exp(min(plain / file.words, 700)))
    assert "times_floor" not in results["valid"]
    assert results["test"]["floor_bits_per_byte"] == pytest.approx(
        1234.5 / math.log(2) / TokenFile.load(tokens, "test").text_bytes
    )
    assert results["test"]["times_floor"] == pytest.approx(results["test"]["sliding_total_nats"] / 1234.5)
    train = TokenFile.load(tokens, "train").ids[:501]
    assert results["train"]["tokens"] == 500
    nats = score_stream(model, train, context=32, stride=32, batch_size=4).nats
    assert results["train"]["nats_per_token"] == pytest.approx(nats.mean())


def test_the_stride_of_the_settings_counts(project: Path, models: dict[str, SmallGPT]) -> None:
    file = TokenFile.load(project / "data/tokens", "test")
    figures, _ = evaluate_split(models["llama"], file, EvaluationConfig(stride=32), None)
    assert figures["sliding_total_nats"] == figures["total_nats"]


def test_word_perplexity_counts_words_and_line_ends(uniform: SmallGPT, tmp_path: Path) -> None:
    assert uniform.tokenizer is not None
    write_tokens(tmp_path, "test", ["Ann saw\n 7  eggs.\n", "Ben drew"], uniform.tokenizer)
    file = TokenFile.load(tmp_path, "test")
    figures, _ = evaluate_split(uniform, file, CONFIG, None)
    assert figures["words"] == 4 + 2 + 2
    assert figures["nats_per_token"] == pytest.approx(math.log(320), rel=1e-6)
    assert figures["word_perplexity"] == pytest.approx(320 ** (figures["tokens"] / 8), rel=1e-5)
    # The train split is a prefix of a stream: words are those of its documents, not of one glued text.
    train = evaluate_train(uniform, file, EvaluationConfig(train_tokens=10**6))
    assert train["word_perplexity"] == pytest.approx(figures["word_perplexity"])
    assert (train["tokens"], train["bytes"]) == (figures["tokens"], figures["bytes"])


def test_a_leak_is_an_error(uniform: SmallGPT, project: Path, tmp_path: Path) -> None:
    file = TokenFile.load(project / "data/tokens", "test")
    total = (len(file.ids) - 1) * math.log(320)
    figures, _ = evaluate_split(uniform, file, CONFIG, total + 24.9)
    assert figures["times_floor"] == pytest.approx(total / (total + 24.9))
    with pytest.raises(ValueError, match=r"^[^\n]*training data must contain the text it is measured on$"):
        evaluate_split(uniform, file, CONFIG, total + 25.1)
    with pytest.raises(ValueError, match=f"{total:.1f} nats for a text whose entropy is {total + 99:.1f}"):
        evaluate(
            uniform,
            project / "data/tokens",
            CONFIG,
            GENERATION,
            digest="ab12",
            out=tmp_path / "out",
            floors={"test": total + 99},
        )
    assert not (tmp_path / "out").exists()


def test_a_corpus_without_a_test_split(models: dict[str, SmallGPT], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", "valid", ["Ann saw 7 eggs."] * 9, tokenizer)
    config = EvaluationConfig(samples=0, train_tokens=0)
    results = evaluate(
        models["gpt2"], tmp_path / "tokens", config, GENERATION, digest="ab12", out=tmp_path / "out", floors={}
    )
    assert list(results) == ["valid"]
    assert sorted(contents(tmp_path / "out")) == NAMES[1:]
    (tmp_path / "tokens/valid.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"valid\.bin does not exist"):
        evaluate(
            models["gpt2"], tmp_path / "tokens", config, GENERATION, digest="ab12", out=tmp_path / "out", floors={}
        )


def test_splits_shorter_than_the_context(models: dict[str, SmallGPT], tokenizer: Tokenizer, tmp_path: Path) -> None:
    write_tokens(tmp_path / "tokens", "valid", ["Ann"], tokenizer)
    write_tokens(tmp_path / "tokens", "test", ["Ann saw 7 eggs.\n" * 50], tokenizer)
    config = EvaluationConfig(samples=0, train_tokens=0)
    model = models["gpt2"]
    results = evaluate(model, tmp_path / "tokens", config, GENERATION, digest="ab12", out=tmp_path / "out", floors={})
    lines = (tmp_path / "out/position.csv").read_text().splitlines()
    assert lines[0] == "position,valid,test"
    assert len(lines) == 1 + results["valid"]["tokens"]
    valid = [float(line.split(",")[1]) for line in lines[1:]]
    assert np.mean(valid) == pytest.approx(results["valid"]["nats_per_token"], abs=1e-5)


def test_loss_by_position() -> None:
    assert position_buckets(256) == list(range(0, 256, 8))
    for context in (1, 5, 32, 33, 63, 100, 1000, 1024):
        starts = position_buckets(context)
        assert 1 <= len(starts) <= 32
        assert starts[0] == 0
        assert starts[-1] < context
    scores = Scores(np.array([1.0, 2, 3, 4, 5, 6]), np.zeros(6, dtype=int), np.array([0, 1, 39, 0, 1, 2]))
    assert loss_by_position(scores, 2).tolist() == [2.5, 3.5]
    full = Scores(np.arange(64.0), np.zeros(64, dtype=int), np.arange(64))
    assert loss_by_position(full, 64).tolist() == [2 * i + 0.5 for i in range(32)]


def test_the_table() -> None:
    figures = {"bits_per_byte": 1.23456, "sliding_bits_per_byte": 1.2, "floor_bits_per_byte": 1.15, "times_floor": 1.05}
    figures |= {"perplexity": 9.87654, "word_perplexity": 99.5, "accuracy": 0.5, "accuracy_top5": 0.75}
    figures |= {"tokens": 1000, "bytes": 4000, "context": 32, "stride": 16}
    train = {"bits_per_byte": 1.0, "perplexity": 8.0, "word_perplexity": 90.0, "accuracy": 0.6, "accuracy_top5": 0.8}
    train |= {"tokens": 500, "bytes": 2000, "context": 32}
    results = {"test": figures, "train": train}
    header, rule, *rows = perplexity_table(results).splitlines()
    assert header.startswith("| split | bits/byte | sliding | floor | times floor | token PPL | word PPL |")
    assert rule == "|" + " --- |" * 12
    assert rows == [
        "| test | 1.2346 | 1.2000 | 1.1500 | 1.0500 | 9.877 | 99.500 | 0.5000 | 0.7500 | 1000 | 4000 | 32/16 |",
        "| train | 1.0000 | - | - | - | 8.000 | 90.000 | 0.6000 | 0.8000 | 500 | 2000 | 32/32 |",
    ]
    assert [row["split"] for row in perplexity_rows(results)] == ["test", "train"]


def test_samples_are_numbered_and_reproducible(project: Path, tmp_path: Path) -> None:
    model = SmallGPT.from_pretrained(project / "models/gpt")
    evaluate(model, project / "data/tokens", CONFIG, GENERATION, digest="ab12", out=tmp_path, floors={})
    page = (tmp_path / "samples.md").read_text()
    samples = re.findall(r"\n## (\d)\n\n```text\nAnn(.*?)\n```\n", page, flags=re.DOTALL)
    assert [number for number, _ in samples] == ["0", "1"]
    drawn = ["".join(stream_text(model, "Ann", GENERATION, sequence=sequence)) for sequence in (0, 1)]
    assert [text for _, text in samples] == drawn
    assert drawn[0] != drawn[1]
    assert "temperature 0.8, top-k 50, top-p 0.9; sample i is sequence i of seed 0" in page

    assert "The model's weights have the sha256 ab12.\n" in page
    hasty = replace(GENERATION, max_time=1e-9)  # a limit for serving; no clock acts on a report
    evaluate(model, project / "data/tokens", CONFIG, hasty, digest="ab12", out=tmp_path, floors={})
    assert (tmp_path / "samples.md").read_text() == page


def test_tokens_of_another_tokenizer_are_refused(
    project: Path, corpus: dict[str, list[str]], models: dict[str, SmallGPT], tmp_path: Path
) -> None:
    for split, texts in corpus.items():
        write_tokens(tmp_path / "tokens", split, texts, Tokenizer(train_tokenizer(corpus["train"], vocab_size=300)))
    model = SmallGPT.from_pretrained(project / "models/gpt")
    with pytest.raises(MismatchError, match="the valid tokens were written by another tokenizer than the model's"):
        evaluate(model, tmp_path / "tokens", CONFIG, GENERATION, digest="ab12", out=tmp_path / "out", floors={})
    model.tokenizer = None
    with pytest.raises(ValueError, match="this model has no tokenizer"):
        evaluate(model, project / "data/tokens", CONFIG, GENERATION, digest="ab12", out=tmp_path / "out", floors={})
    assert not (tmp_path / "out").exists()


def test_floors_are_those_of_the_report(tmp_path: Path) -> None:
    (tmp_path / "prepare.json").write_text('{"source": "a", "valid": {"floor_nats": 2.5}, "test": {"bytes": 3}}')
    assert read_floors(tmp_path / "prepare.json") == {"valid": 2.5}


def test_memory_is_bounded(models: dict[str, SmallGPT]) -> None:
    assert windows_at_once(models["gpt2"], EvaluationConfig(batch_size=16)) == 16
    with torch.device("meta"):
        large = SmallGPT(embed_dim=8, num_heads=1, num_layers=1, vocab_size=50_000, max_seq_len=1024)
    assert windows_at_once(large, EvaluationConfig(batch_size=16)) == 1
