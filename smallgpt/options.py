"""The options of `python -m smallgpt.ort_generate`: their names, their checks, and where each value comes from."""

import argparse
import dataclasses
import os
import re
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from smallgpt import __version__
from smallgpt.sampling import GenerationConfig

SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
ENVIRONMENT = "SMALLGPT_"  # SMALLGPT_TEMPERATURE=0.5 stands for --temperature 0.5


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what it does not give is None for a setting of `GenerationConfig`."""
    options = _parser().parse_args(arguments)
    options.bundle = Path(options.model or options.bundle)
    for name in ("device", "threads"):
        if getattr(options, name) is None:
            value = os.environ.get(f"{ENVIRONMENT}{name.upper()}") or {"device": "auto", "threads": "0"}[name]
            setattr(options, name, value if name == "device" else _whole(value, f"{ENVIRONMENT}THREADS"))
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", options.device):
        raise ValueError(f"--device is {options.device!r}; it must be auto, cpu, cuda or cuda:N")
    if options.max_new_tokens is not None and options.max_new_tokens < 0:
        if options.max_new_tokens != -1:
            raise ValueError(f"--max-new-tokens is {options.max_new_tokens}; it must be at least 0, or -1 for no limit")
        options.max_new_tokens = 2**31
    if options.seed == -1:
        options.seed = secrets.randbelow(2**32)
    if options.escape and options.prompt is not None:
        options.prompt = _unescape(options.prompt)
    if options.speculate and (options.batch_file or (options.num_beams or 1) > 1):
        raise ValueError("--speculate works for one sequence at a time: leave out --batch-file and --num-beams")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m smallgpt.ort_generate",
        description="Continue a prompt with a bundle. stdout carries the text and nothing else.",
        epilog=f"Every setting can also stand in the environment: {ENVIRONMENT}TEMPERATURE=0.5.",
    )
    parser.add_argument("bundle", nargs="?", default="exports/fp32", help="default: exports/fp32")
    parser.add_argument("-m", "--model", metavar="BUNDLE", help="the same")
    parser.add_argument("--version", action="version", version=f"smallgpt {__version__}")

    group = parser.add_argument_group("prompt (without any of these it is read from stdin, unless that is a terminal)")
    source = group.add_mutually_exclusive_group()
    source.add_argument("-p", "--prompt", help="text to continue; - is stdin")
    source.add_argument("-f", "--file", type=Path, help="read the prompt from a UTF-8 file")
    source.add_argument("--batch-file", type=Path, help=".txt with a prompt on each line, or .jsonl with `prompt`")
    source.add_argument("-i", "--interactive", action="store_true", help="a session in the terminal; /help lists more")
    source.add_argument("--score", type=Path, metavar="FILE", help="nats, bits/byte and perplexity of a text or .jsonl")
    add = group.add_argument
    add("-e", "--escape", action="store_true", help="read \\n, \\t, \\\\ and \\uXXXX in --prompt")
    add("--truncate", choices=["left"], help="cut the beginning off a prompt that does not fit; else it is an error")

    add = parser.add_argument_group("settings (defaults: the bundle's generation_config.json)").add_argument
    add("-n", "--max-new-tokens", "--n-predict", "--predict", type=int, help="-1: until the text or the context ends")
    add("--min-new-tokens", type=int)
    add("--max-length", type=int, help="tokens of prompt and continuation; 0 is off")
    add("--temperature", "--temp", type=float, help="0 is greedy")
    add("--greedy", "--no-sample", action="store_const", const=0.0, dest="temperature", help="--temperature 0")
    add("--top-k", type=int, help="0 is off")
    add("--top-p", type=float, help="1 is off")
    add("--min-p", type=float, help="0 is off")
    add("--repetition-penalty", "--repeat-penalty", type=float, help="1 is off")
    add("--presence-penalty", type=float)
    add("--frequency-penalty", type=float)
    add("--repeat-last-n", type=int, help="tokens that the penalties look at; -1 is all")
    add("--no-repeat-ngram-size", type=int, help="0 is off")
    add("--logit-bias", action="append", metavar="ID=BIAS", type=_bias, help="can be repeated")
    add("--num-beams", type=int, help="beam search; 1 is off")
    add("--length-penalty", type=float, help="beams are ranked by log-probability / length ** penalty")
    add("--early-stopping", type=_early_stopping, metavar="true|false|never")
    add("--stop", "-r", "--reverse-prompt", action="append", metavar="TEXT", help="end before it; can be repeated")
    add("--stop-token-id", action="append", type=int, dest="stop_token_ids", metavar="ID", help="can be repeated")
    add("--ignore-eos", action="store_const", const=True, help="never draw <|eos|>")
    add("--max-time", type=float, metavar="SECONDS")
    add("--num-return-sequences", "--num-samples", type=int)
    add("-s", "--seed", type=int, help="-1, the default, is a random one, reported on stderr")
    add("--context-overflow", choices=["stop", "slide"], default="stop", help="slide: read the last half again")
    add("--speculate", type=int, default=0, metavar="N", help="guess up to N tokens from earlier text and check them")

    add = parser.add_argument_group("output").add_argument
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="write the text as it comes")
    add("--echo", "--display-prompt", action="store_true", help="write the prompt before its continuation")
    add("-o", "--output", type=Path, help="write to this file in place of stdout")
    add("--json", action="store_true", help="one JSON object with texts, ids, reasons, seed and timings")
    add("--jsonl", action="store_true", help="a line of JSON for each sequence")
    add("--logprobs", type=int, metavar="N", help="with --json or --jsonl: log-probabilities, also of the N best")
    add("-q", "--quiet", action="store_true", help="no timings")
    add("--no-perf", action="store_true", dest="quiet", help="the same")
    add("-v", "--verbose", action="store_true", help="say what is loaded")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="auto, cpu, cuda or cuda:N")
    add("-t", "--threads", type=int, help="default: all processors, at most 8")
    add("--warmup", action="store_true", help="run a token before the clock starts")
    add("--batch-size", type=int, default=8, help="sequences that are decoded together (default: 8)")
    add("--verify", action="store_true", help="first recompute the certificate's golden logits")
    add("--list-devices", action="store_true", help="say what this machine can run on, and leave")
    add("--print-config", action="store_true", help="say every setting and where it came from, and leave")
    return parser


def settings(options: argparse.Namespace, bundle: GenerationConfig) -> tuple[GenerationConfig, dict[str, str]]:
    """The bundle's defaults, overridden by the environment and then by the command line; and each value's origin.

    A seed that is not given is drawn. Raises ValueError for a value out of range.
    """
    values = {**bundle.to_dict(), "seed": secrets.randbelow(2**32)}
    origin = {name: "bundle" for name in SETTINGS} | {"seed": "random"}
    for name in SETTINGS:
        text = os.environ.get(ENVIRONMENT + name.upper())
        if text is not None:
            values[name], origin[name] = _from_text(name, text), "environment"
        given = getattr(options, name)
        if given is not None:
            values[name], origin[name] = dict(given) if name == "logit_bias" else given, "command line"
    return GenerationConfig.from_dict(values), origin


def convert(name: str, text: str) -> Any:
    """A setting's value from text; ValueError names the setting."""
    if name not in SETTINGS:
        GenerationConfig.from_dict({name: text})  # raises with the closest name
    return _from_text(name, text)


def _from_text(name: str, text: str) -> Any:
    default = getattr(GenerationConfig(), name)
    try:
        if name == "early_stopping":
            return _early_stopping(text)
        if name == "logit_bias":
            return dict(_bias(part) for part in text.split(",") if part)
        if name == "stop":
            return [text]
        if name == "stop_token_ids":
            return [int(part) for part in text.split(",")]
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError, argparse.ArgumentTypeError):
        raise ValueError(f"{name} is {text!r}, which is no value for it") from None


def _whole(text: str, name: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError(f"{name} is {text!r}; it must be a whole number")
    return int(text)


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 17=-2.5") from None


def _early_stopping(text: str) -> bool | str:
    try:
        values: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not true, false or never") from None


def _unescape(text: str) -> str:
    """Read the escapes of JSON strings."""
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

    def read(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else known.get(match[2], match[0])

    return re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", read, text, flags=re.S)
