"""`python -m smallgpt.generate models/gpt -p "..."`: continue a prompt with PyTorch."""

import argparse
import secrets
import sys
from collections.abc import Sequence

from smallgpt.cli import run
from smallgpt.decode import stream_text
from smallgpt.model import SmallGPT
from smallgpt.sampling import GenerationConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; stdout carries the text, stderr the seed."""
    parser = argparse.ArgumentParser(prog="python -m smallgpt.generate", description="Continue a prompt with PyTorch.")
    parser.add_argument("model", nargs="?", default="models/gpt", help="model folder (default: models/gpt)")
    parser.add_argument("-p", "--prompt", default="", help="text to continue")
    parser.add_argument("-n", "--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", "--temp", type=float, default=0.8, help="0 is greedy")
    parser.add_argument("--top-k", type=int, default=50)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("-s", "--seed", type=int, help="default: a random one, reported on stderr")
    options = vars(parser.parse_args(arguments))
    folder, prompt, seed = options.pop("model"), options.pop("prompt"), options.pop("seed")
    config = GenerationConfig(**options, seed=secrets.randbits(31) if seed is None else seed)
    model = SmallGPT.from_pretrained(folder)
    if model.tokenizer is None:
        raise FileNotFoundError(f"{folder}/tokenizer.model does not exist; the train stage writes it")
    sys.stdout.write(prompt)
    for piece in stream_text(model, prompt, config):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    print(f"seed {config.seed}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
