"""`python -m smallgpt.ort_generate exports/fp32 -p "Once upon a time"`: text from a bundle, without PyTorch.

stdout carries the generated text and nothing else; timings, the seed and warnings go to stderr.
"""

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from smallgpt import cli
from smallgpt.beams import beam_search
from smallgpt.bundle import load_bundle
from smallgpt.files import decode_text, to_lf, write_atomic
from smallgpt.generation import Batch, Finish, Piece, check_prompt
from smallgpt.options import json_fields, parse, read_prompts, settings
from smallgpt.runtime import OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig
from smallgpt.score import count_words, score_with, summarize
from smallgpt.session import missing_for_cuda


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see `--help`."""
    options = parse(arguments)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    if options.list_devices:
        print(f"cpu: {cli.processors()} processors\ncuda: {missing_for_cuda() or 'available'}")
        return 0
    if options.output:
        _check_writable(options.output)
    if options.print_config:
        _deliver(_described_settings(options), options)
        return 0
    if options.interactive and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("--interactive needs a terminal; give a prompt with -p, with -f FILE or on stdin")
    from_stdin = options.prompt is None and options.file is None and options.batch_file is None
    without = options.interactive or options.score or (options.verify and from_stdin)
    prompts = [] if without else read_prompts(options)
    started = time.perf_counter()
    model = OrtGPT(
        options.bundle,
        device=options.device,
        threads=options.threads,
        session=options.session_option,
        batch_invariant=options.batch_invariant,
    )
    if options.verify:
        count, difference = check_golden(model)
        print(f"verified: {count} golden logits, largest difference {difference:.2g}", file=sys.stderr)
    if options.warmup:
        model.logits([model.tokenizer.eos_id])
    load = time.perf_counter() - started
    if options.verbose:
        print(_described(model), file=sys.stderr)
    if options.score:
        _deliver(json.dumps(score_file(model, options.score), indent=2) + "\n", options)
        return 0
    config, origin = settings(options, model.bundle.generation)
    if options.interactive:
        from smallgpt.repl import Session

        _check(options, Work(model, config, []))
        slide = options.context_overflow == "slide"
        return Session(model, config, slide=slide, speculate=options.speculate, escape=options.escape).run()
    if not prompts:
        return 0
    work = Work(model, config, [Prompt(text, _ids(model, text, config, options)) for text in prompts])
    _check(options, work)
    if config.temperature and config.num_beams == 1 and (origin["seed"] == "random" or not options.quiet):
        print(f"seed: {config.seed}", file=sys.stderr)
    live = options.stream and not (options.json or options.jsonl or options.output) and work.total == 1
    if live and options.echo:
        _write(prompts[0])
    code = work.run(options, _write if live else None)
    if live and sys.stdout.isatty():
        _write("\n")
    elif not live:
        _deliver(_render(work, options, load), options)
    if work.error:
        raise work.error
    if not options.quiet and not code:
        print(work.report(load), file=sys.stderr)
    return code


def _check_writable(path: Path) -> None:
    """Raise ValueError before any work is done for a file that cannot be written after it."""
    device = path.exists() and not (path.is_file() or path.is_dir())  # as /dev/null, or a pipe
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path if device else path.parent, os.W_OK):
        raise ValueError(f"--output is {path}, which cannot be written; name another file")


def _check(options: argparse.Namespace, work: "Work") -> None:
    """Raise ValueError for settings that do not fit the model, and options that do not act together."""
    work.config.check_ids(work.model.vocab_size)
    if work.config.num_beams > 1:
        slide = options.context_overflow == "slide"
        names = {"--speculate": options.speculate, "--context-overflow slide": slide}
        names["--logprobs"] = options.logprobs is not None
        for name in (name for name, given in names.items() if given):
            raise ValueError(f"{name} does not act in beam search; leave it out, or set --num-beams 1")
    if options.speculate and work.total > 1 and options.batch_size > 1:
        raise ValueError("--speculate works on one sequence at a time; set --batch-size 1")


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and its ids."""

    text: str
    ids: list[int]


@dataclass
class Result:
    """What became of one sequence."""

    prompt: Prompt
    index: int
    text: str = ""
    finish: Finish = "interrupted"
    pieces: list[Piece] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    score: float | None = None


class Work:
    """The prompts of a call, decoded to results; with one sequence its text can be written as it comes."""

    def __init__(self, model: OrtGPT, config: GenerationConfig, prompts: Sequence[Prompt]) -> None:
        self.model, self.config, self.prompts = model, config, prompts
        count = config.num_return_sequences
        self.results = [Result(prompt, i) for prompt in prompts for i in range(count)]
        self.total = len(self.results)
        self.tokens, self.prompt_tokens = 0, sum(len(prompt.ids) for prompt in prompts)
        self.first = self.seconds = 0.0
        self.speculation = ""
        self.error: Exception | None = None  # of the first sequence that could not go on

    def run(self, options: argparse.Namespace, write: Any = None) -> int:
        """Decode everything; 130 after Ctrl-C, with what there is until then."""
        begun = time.perf_counter()
        try:
            if self.config.num_beams > 1:
                self._beams(begun, write)
            else:
                self._samples(options, begun, write)
            return 0
        except KeyboardInterrupt:
            return 130
        finally:
            self.seconds = time.perf_counter() - begun

    def _samples(self, options: argparse.Namespace, begun: float, write: Any) -> None:
        longest = max(len(prompt.ids) for prompt in self.prompts)
        batch = Batch(
            self.model,
            min(options.batch_size, self.total),
            capacity=min(self.model.max_seq_len, longest + self.config.max_new_tokens),
            even=self.model.pairs and self.total > 1,
            speculate=options.speculate,
            slide=options.context_overflow == "slide",
            tolerant=True,
        )

        def take(piece: Piece) -> None:
            result = self.results[piece.sequence]
            result.text += piece.text
            result.finish = piece.finish or result.finish
            self.error = self.error or piece.error
            if piece.token is not None:
                self.first = self.first or time.perf_counter() - begun
                self.tokens += 1
                result.ids.append(piece.token)
                result.pieces.append(piece)
            if write:
                write(piece.text)

        for key, result in enumerate(self.results):
            batch.add(key, result.prompt.ids, self.config, number=result.index, logprobs=options.logprobs)
        with cli.interrupts() as pressed:
            while batch.busy and not pressed:
                for piece in batch.step():
                    take(piece)
            for piece in filter(None, map(batch.cancel, range(self.total))):  # the text that was held back
                take(piece)
        if pressed:
            raise KeyboardInterrupt
        if options.speculate:
            guesses = batch.speculation
            share = f", {guesses.accepted / guesses.proposed:.0%} right" if guesses.proposed else ""
            self.speculation = f" | {guesses.proposed} tokens guessed{share}"

    def _beams(self, begun: float, write: Any) -> None:
        self.results = []
        for prompt in self.prompts:
            result = Result(prompt, 0)  # what all beams agree on so far; the others exist from the end on
            self.results.append(result)
            for step in beam_search(self.model, prompt.ids, self.config):
                self.first = self.first or time.perf_counter() - begun
                result.text += step.text
                if write:
                    write(step.text)
            self.results[-1:] = [
                Result(prompt, i, found.text, found.finish, ids=list(found.ids), score=found.score)
                for i, found in enumerate(step.done)
            ]
            self.tokens += sum(len(found.ids) for found in step.done)

    def report(self, load: float) -> str:
        """The figures of the call in one line."""
        rate = (self.tokens - self.total) / max(self.seconds - self.first, 1e-9) if self.tokens > self.total else 0.0
        reasons = ", ".join(sorted({result.finish for result in self.results}))
        return (
            f"load {load:.2f} s | prefill {self.prompt_tokens} tokens, first text after {self.first:.3f} s | "
            f"decode {self.tokens} tokens, {rate:.1f} tokens/s | ended by {reasons} | "
            f"{self.model.bundle.config.variant} on {self.model.device}{self.speculation}"
        )


def score_file(model: OrtGPT, path: Path) -> dict[str, Any]:
    """The figures of a text file, or of the documents of a .jsonl, as the pipeline reads and computes them.

    Each document is followed by `<|eos|>`, which is scored too; windows do not overlap, the `sliding_` figures have a
    stride of half the context. Documents without text are left out; ValueError where no other is.
    """
    text = decode_text(path.read_bytes(), str(path))
    documents = [text]
    if path.suffix.lower() == ".jsonl":
        documents = [to_lf(document) for document in json_fields(text, path, "text")]
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"{path} holds no text")
    eos, context = model.tokenizer.eos_id, model.max_seq_len
    ids = [eos]
    for encoded in model.tokenizer.encode_documents(documents):
        ids += [*encoded, eos]
    size = len("".join(documents).encode("utf-8"))
    words = sum(count_words(document) for document in documents)
    figures: dict[str, Any] = {"tokens": len(ids) - 1, "bytes": size, "words": words, "documents": len(documents)}
    figures |= {"context": context, "stride": context // 2}
    for prefix, stride in (("", context), ("sliding_", context // 2)):
        scores = score_with(model.logits, ids, context=context, stride=stride)
        figures |= {f"{prefix}{name}": value for name, value in summarize(scores, size, words).items()}
    return figures


def _ids(model: OrtGPT, text: str, config: GenerationConfig, options: argparse.Namespace) -> list[int]:
    """A prompt's ids: a text starts after `<|eos|>`, as in training. Raises ValueError when it does not fit."""
    ids, limit = model.tokenizer.encode(text), model.max_seq_len
    if options.truncate and len(ids) + 1 > limit:
        kept = max(limit // 2, limit - config.max_new_tokens) - 1
        print(f"the prompt has {len(ids) + 1} tokens; only <|eos|> and the last {kept} are read", file=sys.stderr)
        ids = ids[len(ids) - kept :]
    ids = [model.tokenizer.eos_id, *ids]
    try:
        check_prompt(model, ids)
    except ValueError as error:
        raise ValueError(f"{error}; --truncate left cuts its beginning off") from None
    return ids


def _render(work: Work, options: argparse.Namespace, load: float) -> str:
    """The results as text, as lines of JSON or as one JSON object."""
    if not (options.json or options.jsonl):
        texts = [(r.prompt.text if options.echo else "") + r.text for r in work.results]
        return texts[0] if len(texts) == 1 else "\n---\n".join(texts) + "\n"
    rows = []
    for result in work.results:
        row: dict[str, Any] = {
            "prompt": result.prompt.text,
            "index": result.index,
            "text": result.text,
            "token_ids": result.ids,
            "finish_reason": result.finish,
            "seed": work.config.seed,
        }
        if result.score is not None:
            row["score"] = round(result.score, 6)
        if options.logprobs is not None and result.pieces:
            row["logprobs"] = [
                {
                    "id": piece.token,
                    "logprob": round(piece.logprob or 0.0, 6),
                    "top": [[token, round(logprob, 6)] for token, logprob in piece.top],
                }
                for piece in result.pieces
            ]
        rows.append(row)
    if options.jsonl:
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    bundle = work.model.bundle
    timings = {"load": load, "first": work.first, "total": work.seconds}
    whole = {
        "sequences": rows,
        "settings": work.config.to_dict(),
        "variant": bundle.config.variant,
        "device": work.model.device,
        "model_sha256": bundle.config.lineage.get("model"),
        "prompt_tokens": work.prompt_tokens,
        "tokens": work.tokens,
        "seconds": {name: round(value, 4) for name, value in timings.items()},
    }
    # Lists of numbers on one line; a line break in JSON is never inside a text.
    lines = json.dumps(whole, ensure_ascii=False, indent=2)
    return re.sub(r"\[\n[^\[\]{}\"]*\]", lambda match: " ".join(match[0].split()), lines) + "\n"


def _described(model: OrtGPT) -> str:
    shape, bundle = model.bundle.config.model, model.bundle
    size = bundle.graph.stat().st_size / 2**20
    return (
        f"{bundle.folder}: {bundle.config.variant}, {shape['architecture']}, {shape['num_layers']} layers, vocabulary "
        f"{model.vocab_size}, context {model.max_seq_len}, {size:.1f} MiB on {model.device}"
    )


def _described_settings(options: argparse.Namespace) -> str:
    """A line for each setting, with its origin."""
    config, origin = settings(options, load_bundle(options.bundle, verify=False).generation)
    values = {"bundle": str(options.bundle), "device": options.device, "threads": options.threads}
    origins = options.origin | origin
    rows = (values | config.to_dict()).items()
    return "".join(f"{name} = {json.dumps(value, ensure_ascii=False)}  ({origins[name]})\n" for name, value in rows)


def _deliver(text: str, options: argparse.Namespace) -> None:
    """Write the product to stdout or to the file of --output."""
    if options.output:
        write_atomic(options.output, text)
    else:
        _write(text)


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def run() -> NoReturn:
    """Entry point of the `smallgpt-generate` script."""
    cli.run(main)


if __name__ == "__main__":
    run()
