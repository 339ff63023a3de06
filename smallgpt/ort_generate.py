"""`python -m smallgpt.ort_generate exports/fp32 -p "Once upon a time"`: text from a bundle, without PyTorch.

stdout carries the generated text and nothing else; timings, the seed and warnings go to stderr.
"""

import argparse
import dataclasses
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np

from smallgpt import cli
from smallgpt.runtime import OrtGPT, check_golden
from smallgpt.sampling import GenerationConfig, sample


@dataclass(frozen=True)
class Piece:
    """What one step gave to one sequence: its token, the text that became certain, and at the end why it ended."""

    sequence: int
    token: int
    text: str
    finish: Literal["eos", "stop", "length"] | None = None


def generate(
    model: OrtGPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    *,
    sequences: Sequence[int] | None = None,
    ignore_eos: bool = False,
) -> Iterator[list[Piece]]:
    """Continue prompts (ids) as one batch; each step yields a piece for every sequence that is not finished.

    A sequence ends at `<|eos|>`, at a stop string (which is held back and cut off, also across tokens), after
    config.max_new_tokens, or where the context is full ("length"). `sequences` are the numbers that, with the seed,
    determine the samples; by default they count from 0. On fp32 bundles a sample does not depend on its batch.
    A model works on one batch at a time: a second call ends the first one's.
    Raises ValueError for an empty prompt or one longer than the context.
    """
    limit = model.max_seq_len
    for prompt in prompts:
        if not 0 < len(prompt) <= limit:
            raise ValueError(f"the prompt has {len(prompt)} tokens; between 1 and {limit} fit into the context")
    if not prompts or not config.max_new_tokens:
        return iter([])
    banned = [*model.tokenizer.banned_ids, *([model.tokenizer.eos_id] if ignore_eos else [])]
    return _generate(model, prompts, config, range(len(prompts)) if sequences is None else sequences, banned)


def _generate(
    model: OrtGPT,
    prompts: Sequence[Sequence[int]],
    config: GenerationConfig,
    numbers: Sequence[int],
    banned: Sequence[int],
) -> Iterator[list[Piece]]:
    limit = model.max_seq_len
    streams = [model.tokenizer.stream(config.stop) for _ in prompts]
    ids = [list(prompt) for prompt in prompts]
    lengths = np.array([len(prompt) for prompt in prompts])
    padded = np.zeros((len(prompts), lengths.max()), np.int64)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    active = np.ones(len(prompts), bool)
    tokens = np.zeros(len(prompts), np.int64)
    logits = model.prefill(padded, lengths, capacity=min(limit, int(lengths.max()) + config.max_new_tokens))
    for position in range(config.max_new_tokens):
        pieces = []
        for i in np.flatnonzero(active).tolist():
            token = sample(logits[i], config, position=position, sequence=numbers[i], previous=ids[i], banned=banned)
            ids[i].append(token)
            tokens[i] = token
            finish: Literal["eos", "stop", "length"] | None = None
            text = "" if token == model.tokenizer.eos_id else streams[i].feed(token)
            if token == model.tokenizer.eos_id:
                finish = "eos"
            elif streams[i].stopped:
                finish = "stop"
            elif len(ids[i]) > limit or position + 1 == config.max_new_tokens:
                finish = "length"
            active[i] = finish is None
            pieces.append(Piece(i, token, text if active[i] else text + streams[i].finish(), finish))
        yield pieces
        if not active.any():
            return
        logits = model.step(tokens, active)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line: see `--help`."""
    options = _parser().parse_args(arguments)
    prompt = _prompt(options)
    if prompt is None and not options.verify:
        raise ValueError("there is no prompt; give one with -p, with -f FILE or on stdin")
    started = time.perf_counter()
    model = OrtGPT(options.bundle, device=options.device, threads=options.threads)
    loaded = time.perf_counter()
    if options.verify:
        count, difference = check_golden(model)
        print(f"verified: {count} golden logits, largest difference {difference:.2g}", file=sys.stderr)
    if prompt is None:
        return 0
    config = _settings(options, model.bundle.generation())
    ids = [model.tokenizer.eos_id, *model.tokenizer.encode(prompt)]  # a text starts after <|eos|>, as in training
    steps = generate(model, [ids], config, ignore_eos=options.ignore_eos)
    if config.temperature and (options.seed is None or not options.quiet):
        print(f"seed: {config.seed}", file=sys.stderr)
    sys.stdout.reconfigure(encoding="utf-8", newline="\n")  # type: ignore[union-attr]
    if options.echo:
        _write(prompt)
    begun = first = time.perf_counter()
    pieces = 0
    finish: str | None = "length"
    for step in steps:
        first = time.perf_counter() if pieces == 0 else first
        pieces += 1
        finish = step[0].finish
        _write(step[0].text)
    ended = time.perf_counter()
    if sys.stdout.isatty():
        _write("\n")
    if not options.quiet:
        rate = (pieces - 1) / max(ended - first, 1e-9) if pieces > 1 else 0.0
        print(
            f"load {loaded - started:.2f} s | prefill {len(ids)} tokens, first text after {first - begun:.3f} s | "
            f"decode {pieces} tokens, {rate:.1f} tokens/s | ended by {finish} | "
            f"{model.bundle.config.variant} on {model.device}",
            file=sys.stderr,
        )
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m smallgpt.ort_generate", description="Continue a prompt.")
    parser.add_argument("bundle", nargs="?", default="exports/fp32", type=Path, help="default: exports/fp32")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="text to continue; without it stdin is read, unless that is a terminal")
    source.add_argument("-f", "--file", type=Path, help="read the prompt from a UTF-8 file")
    add = parser.add_argument_group("sampling (defaults: the bundle's generation_config.json)").add_argument
    add("-n", "--max-new-tokens", type=int)
    add("--temperature", "--temp", type=float, help="0 is greedy")
    add("--greedy", action="store_const", const=0.0, dest="temperature", help="the same as --temperature 0")
    add("--top-k", type=int, help="0 is off")
    add("--top-p", type=float, help="1 is off")
    add("--min-p", type=float, help="0 is off")
    add("--repetition-penalty", "--repeat-penalty", type=float, help="1 is off")
    add("--stop", action="append", metavar="TEXT", help="end before this text; can be repeated")
    add("-s", "--seed", type=int, help="default: a random one, reported on stderr")
    add("--ignore-eos", action="store_true", help="never draw <|eos|>")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("-t", "--threads", type=int, default=0, help="default: all processors, at most 8")
    parser.add_argument("--verify", action="store_true", help="first recompute the certificate's golden logits")
    parser.add_argument("--echo", action="store_true", help="write the prompt before its continuation")
    parser.add_argument("-q", "--quiet", action="store_true", help="no timings")
    return parser


def _settings(options: argparse.Namespace, defaults: GenerationConfig) -> GenerationConfig:
    """The bundle's defaults, overridden by what the command line gives; an unset seed is drawn."""
    names = [field.name for field in dataclasses.fields(GenerationConfig)]
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return GenerationConfig.from_dict({**defaults.to_dict(), "seed": secrets.randbelow(2**32), **given})


def _prompt(options: argparse.Namespace) -> str | None:
    """The prompt from -p, -f or a stdin that is no terminal; one newline at the end of stdin is not part of it."""
    if options.prompt is not None:
        return str(options.prompt)
    if options.file is not None:
        return _decode(options.file.read_bytes(), str(options.file))
    if options.verify or sys.stdin is None or sys.stdin.isatty():
        return None
    return _decode(sys.stdin.buffer.read(), "stdin").removesuffix("\n")


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
