"""How good a model is: figures, tables, samples and pictures of every split."""

import csv
import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from smallgpt.cli import MismatchError
from smallgpt.config import EvaluationConfig
from smallgpt.decode import require_tokenizer, stream_text
from smallgpt.files import to_csv, write_atomic, write_json
from smallgpt.model import SmallGPT
from smallgpt.sampling import GenerationConfig
from smallgpt.score import Scores, count_words, score_stream, summarize
from smallgpt.tokens import TokenFile

LEAK_NATS = 25.0  # further below the floor than this happens by chance with probability e^-25
LOGITS_AT_ONCE = 2**26  # numbers; bounds the memory of one batch


def evaluate_split(
    model: SmallGPT, tokens: TokenFile, config: EvaluationConfig, floor_nats: float | None
) -> tuple[dict[str, Any], Scores]:
    """All figures of one split, and the scores of its non-overlapping windows.

    Raises ValueError when the model is further below the entropy floor than chance allows: then something leaks.
    """
    context = model.config.max_seq_len
    stride = config.stride or context // 2
    batch_size = windows_at_once(model, config)
    plain = score_stream(model, tokens.ids, context=context, stride=context, batch_size=batch_size)
    sliding = score_stream(model, tokens.ids, context=context, stride=stride, batch_size=batch_size)
    figures: dict[str, Any] = {
        "tokens": len(plain.nats),
        "bytes": tokens.text_bytes,
        "words": tokens.words,
        "documents": tokens.documents,
        "context": context,
        "stride": stride,
        **summarize(plain, tokens.text_bytes, tokens.words),
        **{f"sliding_{k}": v for k, v in summarize(sliding, tokens.text_bytes, tokens.words).items()},
    }
    if floor_nats is not None:
        floor = floor_nats / math.log(2) / tokens.text_bytes
        figures["floor_bits_per_byte"] = floor
        figures["times_floor"] = figures["sliding_bits_per_byte"] / floor
        if figures["sliding_total_nats"] < floor_nats - LEAK_NATS:
            raise ValueError(
                f"the model needs {figures['sliding_total_nats']:.1f} nats for a text whose entropy is "
                f"{floor_nats:.1f}: its training data must contain the text it is measured on"
            )
    return figures, plain


def windows_at_once(model: SmallGPT, config: EvaluationConfig) -> int:
    """The batch size of the settings, smaller where its logits would not fit into memory."""
    return max(1, min(config.batch_size, LOGITS_AT_ONCE // (model.config.max_seq_len * model.config.vocab_size)))


def evaluate_train(model: SmallGPT, tokens: TokenFile, config: EvaluationConfig) -> dict[str, Any]:
    """The first `train_tokens` tokens of the train split, not sliding, to compare with valid and test."""
    ids = tokens.ids[: config.train_tokens + 1]
    assert model.tokenizer is not None
    lengths = np.array([len(piece) for piece in model.tokenizer.token_bytes])
    documents = np.split(ids[1:], np.flatnonzero(ids[1:] == model.tokenizer.eos_id))
    words = sum(count_words(model.tokenizer.decode(document.tolist())) for document in documents)
    context = model.config.max_seq_len
    scores = score_stream(model, ids, context=context, stride=context, batch_size=windows_at_once(model, config))
    figures = summarize(scores, max(1, int(lengths[ids[1:]].sum())), words)
    return {"tokens": len(scores.nats), "bytes": int(lengths[ids[1:]].sum()), "context": context, **figures}


def evaluate(
    model: SmallGPT,
    tokens: Path,
    config: EvaluationConfig,
    generation: GenerationConfig,
    *,
    digest: str,
    out: Path,
    floors: dict[str, float],
    train_reports: Path | None = None,
) -> dict[str, dict[str, Any]]:
    """Score valid, test and a part of train, draw samples and pictures, and write everything to `out`.

    Writes perplexity.json (keyed by split), perplexity.md, position.csv, samples.md, loss.png and position.png.
    `digest` is the sha256 of the weights, by which samples.md names the model; `floors` maps a split to the nats of its
    text under the source that made it, where that is known. Raises ValueError for a model without a tokenizer, and
    MismatchError for tokens of another one.
    """
    names = ("valid", "test") if (tokens / "test.bin").is_file() else ("valid",)
    files = {split: TokenFile.load(tokens, split) for split in (*names, *(["train"] if config.train_tokens else []))}
    for split, file in files.items():
        if file.tokenizer_sha256 != require_tokenizer(model).sha256:
            raise MismatchError(f"the {split} tokens were written by another tokenizer than the model's")
    results: dict[str, dict[str, Any]] = {}
    scores: dict[str, Scores] = {}
    for split in names:
        results[split], scores[split] = evaluate_split(model, files[split], config, floors.get(split))
    if "train" in files:
        results["train"] = evaluate_train(model, files["train"], config)
    write_json(out / "perplexity.json", results)
    write_atomic(out / "perplexity.md", perplexity_table(results))
    reach = min(int(s.position.max()) + 1 for s in scores.values())  # a short split does not fill the context
    losses = {split: loss_by_position(s, reach) for split, s in scores.items()}
    rows = [
        {"position": bucket, **{split: round(float(loss[i]), 5) for split, loss in losses.items()}}
        for i, bucket in enumerate(position_buckets(reach))
    ]
    write_atomic(out / "position.csv", to_csv(rows))
    write_atomic(out / "samples.md", samples_page(model, config, generation, digest))
    draw_pictures(out, rows, train_reports)
    return results


def read_floors(report: Path) -> dict[str, float]:
    """The entropy in nats of each split that has one, from the report of the stage prepare."""
    splits = json.loads(report.read_text(encoding="utf-8")).items()
    return {split: part["floor_nats"] for split, part in splits if isinstance(part, dict) and "floor_nats" in part}


def position_buckets(context: int) -> list[int]:
    """First positions of up to 32 equal parts of the context."""
    return list(range(0, context, -(-context // 32)))


def loss_by_position(scores: Scores, context: int) -> np.ndarray:
    """Mean nats in each bucket of `position_buckets(context)`, all of which must be reached."""
    inside = scores.position < context
    bucket = np.searchsorted(position_buckets(context), scores.position[inside], side="right") - 1
    return np.bincount(bucket, scores.nats[inside]) / np.bincount(bucket)


def perplexity_rows(results: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """One row of text per split, for the Markdown table and for MLflow."""

    def show(figures: dict[str, Any], key: str, digits: int) -> str:
        return f"{figures[key]:.{digits}f}" if key in figures else "-"

    return [
        {
            "split": split,
            "bits/byte": show(figures, "bits_per_byte", 4),
            "sliding": show(figures, "sliding_bits_per_byte", 4),
            "floor": show(figures, "floor_bits_per_byte", 4),
            "times floor": show(figures, "times_floor", 4),
            "token PPL": show(figures, "perplexity", 3),
            "word PPL": show(figures, "word_perplexity", 3),
            "top-1": show(figures, "accuracy", 4),
            "top-5": show(figures, "accuracy_top5", 4),
            "tokens": str(figures["tokens"]),
            "bytes": str(figures["bytes"]),
            "context/stride": f"{figures['context']}/{figures.get('stride', figures['context'])}",
        }
        for split, figures in results.items()
    ]


def perplexity_table(results: dict[str, dict[str, Any]]) -> str:
    """The results as a Markdown table."""
    rows = perplexity_rows(results)
    cells = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "".join(f"| {' | '.join(row)} |\n" for row in cells)


def samples_page(model: SmallGPT, config: EvaluationConfig, generation: GenerationConfig, digest: str) -> str:
    """`config.samples` continuations of the sample prompt, none picked by hand: sample i has sequence number i."""
    page = (
        f"# Samples\n\nPrompt {config.sample_prompt!r}, temperature {generation.temperature}, "
        f"top-k {generation.top_k}, top-p {generation.top_p}; sample i is sequence i of seed {generation.seed}.\n\n"
        f"The model's weights have the sha256 {digest}.\n"
    )
    generation = replace(generation, max_time=0.0)  # a clock would end them in another place each time
    for sequence in range(config.samples):
        text = "".join(stream_text(model, config.sample_prompt, generation, sequence=sequence))
        page += f"\n## {sequence}\n\n```text\n{config.sample_prompt}{text}\n```\n"
    return page


def draw_pictures(out: Path, positions: list[dict[str, Any]], train_reports: Path | None) -> None:
    """Draw position.png and, where the CSV files of the training are given, loss.png."""
    from matplotlib.figure import Figure

    def save(name: str, curves: dict[str, tuple[list[float], list[float]]], xlabel: str) -> None:
        figure = Figure(figsize=(7, 4.2), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel="nats per token")
        for label, (x, y) in curves.items():
            axes.plot(x, y, label=label, linewidth=1.4)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=110, metadata={"Software": None})
        write_atomic(out / name, buffer.getvalue())

    x = [row["position"] for row in positions]
    by_split = {split: (x, [row[split] for row in positions]) for split in positions[0] if split != "position"}
    save("position.png", by_split, "position in the context")
    if train_reports is not None:
        curves = {}
        for name in ("train", "valid"):
            rows = list(csv.DictReader((train_reports / f"{name}.csv").read_text(encoding="utf-8").splitlines()))
            curves[name] = ([float(row["step"]) for row in rows], [float(row["loss"]) for row in rows])
        save("loss.png", curves, "step")
