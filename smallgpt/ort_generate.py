"""`python -m smallgpt.ort_generate exports/fp32 -p "Once upon a time"`: text from a bundle, without PyTorch.

stdout carries the generated text and nothing else; timings, the seed and warnings go to stderr.
"""

import argparse
import json
import logging
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from smallgpt import cli
from smallgpt.beams import beam_search
from smallgpt.files import write_atomic
from smallgpt.generation import Batch, Finish, Piece, check_prompt
from smallgpt.options import parse, settings
from smallgpt.runtime import OrtGPT, check_golden, missing_for_cuda
from smallgpt.sampling import GenerationConfig
from smallgpt.score import count_words, score_with, summarize

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see `--help`."""
    options = parse(arguments)
    if options.list_devices:
        print(f"cpu: {cli.processors()} processors\ncuda: {missing_for_cuda() or 'available'}")
        return 0
    prompts = None if options.interactive or options.score or options.print_config else _prompts(options)
    if options.interactive and not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise ValueError("--interactive needs a terminal; give a prompt with -p, with -f FILE or on stdin")
    started = time.perf_counter()
    model = OrtGPT(options.bundle, device=options.device, threads=options.threads)
    if options.verify:
        count, difference = check_golden(model)
        print(f"verified: {count} golden logits, largest difference {difference:.2g}", file=sys.stderr)
    if options.warmup:
        model.logits([model.tokenizer.eos_id])
    load = time.perf_counter() - started
    if options.verbose:
        print(_described(model), file=sys.stderr)
    config, origin = settings(options, model.bundle.generation())
    if options.print_config:
        values = config.to_dict()
        _deliver("".join(f"{name} = {json.dumps(values[name])}  ({origin[name]})\n" for name in values), options)
        return 0
    if options.score:
        _deliver(json.dumps(score_file(model, options.score), indent=2) + "\n", options)
        return 0
    if options.interactive:
        from smallgpt.repl import Session

        return Session(model, config, slide=options.context_overflow == "slide").run()
    if prompts is None:
        return 0
    work = Work(model, config, [Prompt(text, _ids(model, text, config, options)) for text in prompts])
    needs_seed = config.temperature and config.num_beams == 1
    if needs_seed and (origin["seed"] == "random" or options.seed is None or not options.quiet):
        print(f"seed: {config.seed}", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    live = options.stream and not (options.json or options.jsonl or options.output) and work.total == 1
    if live and options.echo:
        _write(prompts[0])
    code = work.run(options, _write if live else None)
    if live and sys.stdout.isatty():
        _write("\n")
    elif not live:
        _deliver(_render(work, options, load), options)
    if not options.quiet and not code:
        print(work.report(load), file=sys.stderr)
    return code


@dataclass(frozen=True)
class Prompt:
    """A text to continue, and its ids."""

    text: str
    ids: list[int]


@dataclass
class Result:
    """What became of one sequence."""

    prompt: int
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
        self.results = [Result(p, i) for p in range(len(prompts)) for i in range(count)]
        self.total = len(self.results)
        self.tokens = self.prompt_tokens = 0
        self.first = self.seconds = 0.0
        self.speculation = ""

    def run(self, options: argparse.Namespace, write: Any = None) -> int:
        """Decode everything; 130 after Ctrl-C, with what there is until then."""
        begun = time.perf_counter()
        self.prompt_tokens = sum(len(prompt.ids) for prompt in self.prompts)
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
            speculate=options.speculate,
            slide=options.context_overflow == "slide",
        )
        for key, result in enumerate(self.results):
            batch.add(key, self.prompts[result.prompt].ids, self.config, number=result.index, logprobs=options.logprobs)
        while batch.busy:
            for piece in batch.step():
                self.first = self.first or time.perf_counter() - begun
                result = self.results[piece.sequence]
                result.text += piece.text
                if piece.token is not None:
                    self.tokens += 1
                    result.ids.append(piece.token)
                    result.pieces.append(piece)
                result.finish = piece.finish or result.finish
                if write:
                    write(piece.text)
        if options.speculate and batch.speculation.proposed:
            share = batch.speculation.accepted / batch.speculation.proposed
            self.speculation = f" | {batch.speculation.proposed} tokens guessed, {share:.0%} right"

    def _beams(self, begun: float, write: Any) -> None:
        count = self.config.num_return_sequences
        for p, prompt in enumerate(self.prompts):
            for step in beam_search(self.model, prompt.ids, self.config):
                self.first = self.first or time.perf_counter() - begun
                if write:
                    write(step.text)
                for result, found in zip(self.results[p * count : (p + 1) * count], step.done, strict=False):
                    result.text, result.ids, result.finish = found.text, list(found.ids), found.finish
                    result.score = found.score
                    self.tokens += len(found.ids)

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
    """The figures of a text file, or of the documents of a .jsonl, as the evaluate stage computes them.

    Each document is followed by `<|eos|>`, which is scored too; windows do not overlap, the `sliding_` figures have a
    stride of half the context. Raises ValueError for an empty file.
    """
    text = _read(path)
    documents = _fields(text, path, "text") if path.suffix == ".jsonl" else [text]
    if not any(documents):
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


def _prompts(options: argparse.Namespace) -> list[str] | None:
    """The prompts from -p, -f, --batch-file or a stdin that is no terminal; None where only --verify is wanted."""
    if options.batch_file is not None:
        text = _read(options.batch_file)
        jsonl = options.batch_file.suffix == ".jsonl"
        prompts = _fields(text, options.batch_file, "prompt") if jsonl else text.splitlines()
        if not prompts:
            raise ValueError(f"{options.batch_file} holds no prompt")
        return prompts
    if options.prompt is not None and options.prompt != "-":
        return [options.prompt]
    if options.file is not None:
        return [_read(options.file)]
    if sys.stdin is None or sys.stdin.isatty() or (options.verify and options.prompt is None):
        if options.verify:
            return None
        raise ValueError("there is no prompt; give one with -p, with -f FILE or on stdin")
    # One newline at the end of stdin is not part of the prompt.
    return [_decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")]


def _ids(model: OrtGPT, text: str, config: GenerationConfig, options: argparse.Namespace) -> list[int]:
    """A prompt's ids: a text starts after `<|eos|>`, as in training. Raises ValueError when it does not fit."""
    ids, limit = model.tokenizer.encode(text), model.max_seq_len
    if options.truncate and len(ids) + 1 > limit:
        kept = max(limit // 2, limit - config.max_new_tokens) - 1
        print(f"the prompt has {len(ids)} tokens; only the last {kept} are read", file=sys.stderr)
        ids = ids[-kept:]
    ids = [model.tokenizer.eos_id, *ids]
    try:
        check_prompt(model, ids)
    except ValueError as error:
        raise ValueError(f"{error}; --truncate left cuts its beginning off") from None
    return ids


def _render(work: Work, options: argparse.Namespace, load: float) -> str:
    """The results as text, as lines of JSON or as one JSON object."""
    prompts = work.prompts
    if not (options.json or options.jsonl):
        texts = [(prompts[r.prompt].text if options.echo else "") + r.text for r in work.results]
        return texts[0] if len(texts) == 1 else "\n---\n".join(texts) + "\n"
    rows = []
    for result in work.results:
        row: dict[str, Any] = {
            "prompt": prompts[result.prompt].text,
            "index": result.index,
            "text": result.text,
            "token_ids": result.ids,
            "finish_reason": result.finish,
            "seed": work.config.seed,
        }
        if result.score is not None:
            row["score"] = result.score
        if options.logprobs is not None and result.pieces:
            row["logprobs"] = [
                {"id": piece.token, "logprob": piece.logprob, "top": [list(pair) for pair in piece.top]}
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
        "model_sha256": bundle.config.lineage.get("model_sha256"),
        "prompt_tokens": work.prompt_tokens,
        "tokens": work.tokens,
        "seconds": {name: round(value, 4) for name, value in timings.items()},
    }
    return json.dumps(whole, ensure_ascii=False, indent=2) + "\n"


def _described(model: OrtGPT) -> str:
    shape, bundle = model.bundle.config.model, model.bundle
    size = bundle.graph.stat().st_size / 2**20
    return (
        f"{bundle.folder}: {bundle.config.variant}, {shape['architecture']}, {shape['num_layers']} layers, vocabulary "
        f"{model.vocab_size}, context {model.max_seq_len}, {size:.1f} MiB on {model.device}"
    )


def _deliver(text: str, options: argparse.Namespace) -> None:
    """Write the product to stdout or to the file of --output."""
    if options.output:
        write_atomic(options.output, text)
    else:
        sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
        _write(text)


def _fields(text: str, path: Path, name: str) -> list[str]:
    """One text from each line of a .jsonl."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)[name]
            except (ValueError, KeyError, TypeError):
                value = None
            if not isinstance(value, str):
                raise ValueError(f"{path}, line {number}: expected a JSON object with a text `{name}`")
            found.append(value)
    return found


def _read(path: Path) -> str:
    return _decode(path.read_bytes(), str(path))


def _decode(data: bytes, origin: str) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{origin} is not UTF-8: byte {data[error.start]:#04x} at offset {error.start}") from None


def _write(text: str) -> None:
    if text:
        sys.stdout.write(text)
        sys.stdout.flush()


def run() -> NoReturn:
    """Entry point of the `smallgpt-generate` script."""
    cli.run(main)


if __name__ == "__main__":
    run()
