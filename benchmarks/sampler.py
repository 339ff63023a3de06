"""`python -m benchmarks.sampler`: microseconds that the sampler takes for a token, at a vocabulary of 10,000."""

import argparse
import statistics
import time

import numpy as np

from smallgpt.sampling import GenerationConfig, sample

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.1, "frequency_penalty": 0.1}
CASES: dict[str, dict[str, float | int]] = {
    "greedy": {"temperature": 0},
    "default (temperature 0.8, top-k 50, top-p 0.9)": {},
    "default and min-p 0.05": {"min_p": 0.05},
    "default and all penalties": PENALTIES,
    "default and no-repeat n-gram 3": {"no_repeat_ngram_size": 3},
    "all tokens (no top-k, no top-p)": {"top_k": 0, "top_p": 1.0},
    "top-p 0.9 alone": {"top_k": 0},
}


def measure(settings: dict[str, float | int], vocabulary: int, tokens: int) -> float:
    """Median microseconds of a draw after 300 tokens."""
    draw = np.random.default_rng(0)
    rows = (3 * draw.normal(size=(16, vocabulary))).astype(np.float32)
    previous = draw.integers(4, vocabulary, size=300).tolist()
    config = GenerationConfig(**settings)  # type: ignore[arg-type]
    seconds = []
    for position in range(tokens):
        begin = time.perf_counter()
        sample(rows[position % 16], config, position=position, previous=previous, banned=(0, 1, 2), ends=(3,))
        seconds.append(time.perf_counter() - begin)
    return 1e6 * statistics.median(seconds)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sampler", description=__doc__)
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--tokens", type=int, default=3000)
    options = parser.parse_args()
    for name, settings in CASES.items():
        print(f"{measure(settings, options.vocabulary, options.tokens):8.1f} us  {name}")


if __name__ == "__main__":
    main()
