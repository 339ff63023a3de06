"""The options of `python -m smallgpt.ort_generate`: their names, their checks, and where each value comes from."""

import argparse
import dataclasses
import json
import os
import re
import secrets
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from smallgpt import __version__, cli
from smallgpt.files import decode_utf8
from smallgpt.sampling import GenerationConfig

SETTINGS = tuple(field.name for field in dataclasses.fields(GenerationConfig))
ENVIRONMENT = "SMALLGPT_"  # SMALLGPT_TEMPERATURE=0.5 stands for --temperature 0.5


BATCH_INVARIANT: dict[str, Any] = {
    "action": argparse.BooleanOptionalAction,
    "default": True,
    "help": "the same text in any batch; without, steps of 8 and more sequences are faster in 8 and 4 bits",
}


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; what it does not give is None for a setting of `GenerationConfig`.

    Raises ValueError for what it does not understand.
    """
    options = _parser().parse_args(arguments)
    if options.model and options.bundle:
        raise ValueError(f"the bundle is named twice: {options.bundle} and --model {options.model}")
    options.origin = {"bundle": "command line" if options.model or options.bundle else "default"}
    options.bundle = Path(options.model or options.bundle or "exports/fp32")
    for name, default in (("device", "auto"), ("threads", "0")):
        given, text = getattr(options, name), os.environ.get(ENVIRONMENT + name.upper())
        options.origin[name] = "command line" if given is not None else "environment" if text else "default"
        setattr(options, name, text or default if given is None else given)
    if not re.fullmatch(r"\d{1,9}", options.threads):
        raise ValueError(f"--threads is {options.threads}; it must be a whole number of at least 0")
    options.threads = int(options.threads)
    if not re.fullmatch(cli.DEVICES, options.device):
        raise ValueError(f"--device is {options.device!r}; it must be auto, cpu, cuda or cuda:N")
    if options.logprobs is not None and not (options.json or options.jsonl):
        raise ValueError("--logprobs needs --json or --jsonl to be written to")
    if options.interactive and (options.output or options.json or options.jsonl):
        raise ValueError("--interactive writes to the terminal; leave --output, --json and --jsonl out, or use /save")
    if options.escape:
        options.prompt = options.prompt and unescape(options.prompt)
        options.stop = options.stop and [unescape(text) for text in options.stop]
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line in place of the usage and a line."""
        raise ValueError(f"{message}; --help lists the options")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m smallgpt.ort_generate",
        description="Continue a prompt with a bundle. stdout carries the text and nothing else.",
        epilog=f"Every setting can also stand in the environment: {ENVIRONMENT}TEMPERATURE=0.5.",
    )
    parser.add_argument("bundle", nargs="?", help="default: exports/fp32")
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
    add("-e", "--escape", action="store_true", help="read \\n, \\t, \\\\ and \\uXXXX in --prompt, --stop and -i")
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
    add(
        "--speculate",
        type=_at_least(0),
        default=0,
        metavar="N",
        help="guess up to N tokens from earlier text and check them",
    )

    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--stream", action=argparse.BooleanOptionalAction, default=True, help="write the text as it comes")
    add("--echo", "--display-prompt", action="store_true", help="write the prompt before its continuation")
    add("-o", "--output", type=Path, help="write to this file in place of stdout")
    form = group.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object with texts, ids, reasons, seed and timings")
    form.add_argument("--jsonl", action="store_true", help="a line of JSON for each sequence")
    logprobs = _at_least(0)
    add("--logprobs", type=logprobs, metavar="N", help="with JSON: log-probabilities of the tokens and of the N best")
    add("-q", "--quiet", "--no-perf", action="store_true", help="no timings")
    add("-v", "--verbose", action="store_true", help="say what is loaded")

    add = parser.add_argument_group("machine").add_argument
    add("--device", help="auto, cpu, cuda or cuda:N")
    add("-t", "--threads", metavar="N", help="default: all cores, at most 8")
    add(
        "--session-option",
        action="append",
        type=session_option,
        default=[],
        metavar="KEY=VALUE",
        help="for onnxruntime, such as session.intra_op.allow_spinning=0 on a busy machine; can be repeated",
    )
    add("--warmup", action="store_true", help="run a token before the clock starts")
    add("--batch-size", type=_at_least(1), default=8, help="sequences that are decoded together (default: 8)")
    add("--batch-invariant", **BATCH_INVARIANT)
    add("--verify", action="store_true", help="first, or without -p and the like only, recompute the golden logits")
    add("--list-devices", action="store_true", help="say what this machine can run on, and leave")
    add("--print-config", action="store_true", help="say every setting and where it came from, and leave")
    return parser


def settings(options: argparse.Namespace, bundle: GenerationConfig) -> tuple[GenerationConfig, dict[str, str]]:
    """The bundle's defaults, overridden by the environment and then by the command line; and each value's origin.

    A seed that is not given, or -1, is drawn. Raises ValueError for a value out of range.
    """
    values = {**bundle.to_dict(), "seed": -1}
    origin = {name: "bundle" for name in SETTINGS}
    for name in SETTINGS:
        text = os.environ.get(ENVIRONMENT + name.upper())
        if text:
            values[name], origin[name] = _from_text(name, text, ENVIRONMENT + name.upper()), "environment"
        given = getattr(options, name)
        if given is not None:
            values[name], origin[name] = dict(given) if name == "logit_bias" else given, "command line"
    if values["seed"] == -1:
        origin["seed"] = "random"
    return GenerationConfig.from_dict({name: _meant(name, value) for name, value in values.items()}), origin


def convert(name: str, text: str) -> Any:
    """A setting's value from text; ValueError names the setting."""
    if name not in SETTINGS:
        GenerationConfig.from_dict({name: text})  # raises with the closest name
    return _meant(name, _from_text(name, text))


def _meant(name: str, value: Any) -> Any:
    """-1 new tokens are as many as fit, the seed -1 is a random one."""
    if value == -1 and name == "max_new_tokens":
        return 2**31
    return secrets.randbelow(2**32) if value == -1 and name == "seed" else value


def _from_text(name: str, text: str, origin: str = "") -> Any:
    default = getattr(GenerationConfig(), name)
    try:
        if name == "early_stopping":
            return _early_stopping(text)
        if name == "logit_bias":
            return dict(_bias(part) for part in text.split(",") if part)
        if name == "stop":
            return [text] if text else []
        if name == "stop_token_ids":
            return [int(part) for part in text.split(",") if part]
        if isinstance(default, bool):
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return type(default)(text)
    except (ValueError, KeyError, argparse.ArgumentTypeError):
        raise ValueError(f"{origin or name} is {text!r}, which is no value for it") from None


def _at_least(low: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {low}")
        return int(text)

    return read


def _bias(text: str) -> tuple[int, float]:
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not ID=BIAS, such as 17=-2.5") from None


def session_option(text: str) -> tuple[str, str]:
    """KEY=VALUE as a configuration entry of onnxruntime's session."""
    key, sign, value = text.partition("=")
    if not (key and sign and value):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE, such as session.intra_op.allow_spinning=0")
    return key, value


def _early_stopping(text: str) -> bool | str:
    try:
        values: dict[str, bool | str] = {"true": True, "false": False, "never": "never"}
        return values[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not true, false or never") from None


def unescape(text: str) -> str:
    """Read the escapes of JSON strings."""
    known = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}

    def read(match: re.Match[str]) -> str:
        return chr(int(match[1], 16)) if match[1] else known.get(match[2], match[0])

    text = re.sub(r"\\(?:u([0-9a-fA-F]{4})|(.))", read, text, flags=re.S)
    # Two escapes can stand for one character beyond the first 65,536.
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


def read_prompts(options: argparse.Namespace) -> list[str]:
    """The prompts from -p, -f, --batch-file or a stdin that is no terminal; ValueError where there is none."""
    if options.batch_file is not None:
        text = _read_text(options.batch_file).removeprefix("\ufeff")
        if options.batch_file.suffix.lower() == ".jsonl":
            prompts = json_fields(text, options.batch_file, "prompt")
        else:
            prompts = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")] if text else []
        if not prompts:
            raise ValueError(f"{options.batch_file} holds no prompt")
        return prompts
    if options.prompt is not None and options.prompt != "-":
        return [options.prompt]
    if options.file is not None:
        return [_read_text(options.file)]
    if sys.stdin is None or sys.stdin.isatty():
        raise ValueError("there is no prompt; give one with -p, with -f FILE or on stdin")
    # One newline at the end of stdin is not part of the prompt.
    return [decode_utf8(sys.stdin.buffer.read(), "stdin").removesuffix("\n")]


def _read_text(path: Path) -> str:
    return decode_utf8(path.read_bytes(), str(path))


def json_fields(text: str, path: Path, name: str) -> list[str]:
    """The text `name` of each line of a .jsonl; empty lines are passed over."""
    found = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                value = json.loads(line)[name]
            except (ValueError, KeyError, TypeError, RecursionError):
                value = None
            if not isinstance(value, str):
                raise ValueError(f"{path}, line {number}: expected a JSON object with a text `{name}`")
            found.append(value)
    return found
