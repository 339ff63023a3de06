"""`python -m benchmarks.speculation`: what guessing ahead gives, or costs, on the first halves of 200 documents."""

import argparse
import time
from pathlib import Path

from smallgpt.files import decode_utf8
from smallgpt.generation import Batch, Piece
from smallgpt.options import json_fields
from smallgpt.runtime import OrtGPT
from smallgpt.sampling import GenerationConfig

TIE = 1e-3  # nats between two tokens that rounding may swap


def decode(model: OrtGPT, ids: list[int], config: GenerationConfig, speculate: int) -> tuple[list[Piece], Batch, float]:
    """The pieces of a greedy continuation, the batch and the seconds it took."""
    begin = time.perf_counter()
    batch = Batch(model, 1, speculate=speculate)
    batch.add(0, ids, config, logprobs=2)
    pieces = []
    while batch.busy:
        pieces += batch.step()
    return pieces, batch, time.perf_counter() - begin


def main() -> None:
    """Print how many texts are the same, how many guesses are right and how the time compares."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speculation", description=__doc__)
    parser.add_argument("bundle", nargs="?", default="exports/fp32")
    parser.add_argument("--documents", type=Path, default=Path("data/prepared/valid.jsonl"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--speculate", type=int, default=8)
    options = parser.parse_args()
    model = OrtGPT(options.bundle)
    config = GenerationConfig(temperature=0, max_new_tokens=128)
    text = decode_utf8(options.documents.read_bytes(), str(options.documents))
    documents = json_fields(text, options.documents, "text")[: options.prompts]
    same = ties = proposed = accepted = tokens = 0
    plain_seconds = guessed_seconds = 0.0
    for document in documents:
        ids = model.tokenizer.encode(document)
        ids = [model.tokenizer.eos_id, *ids[: min(len(ids) // 2, model.max_seq_len // 2)]]
        plain, _, seconds = decode(model, ids, config, 0)
        plain_seconds += seconds
        guessed, batch, seconds = decode(model, ids, config, options.speculate)
        guessed_seconds += seconds
        proposed += batch.speculation.proposed
        accepted += batch.speculation.accepted
        tokens += len(plain)
        differs = next((a for a, b in zip(plain, guessed, strict=False) if a.token != b.token), None)
        same += differs is None
        ties += differs is not None and differs.top[0][1] - differs.top[1][1] < TIE
    print(f"{len(documents)} prompts, {tokens} tokens: {same} texts the same, {ties} differ after a tie")
    share = accepted / proposed if proposed else 0.0
    print(f"{proposed} tokens guessed, {share:.1%} right, {accepted / tokens:.1%} of the text")
    print(f"{plain_seconds:.2f} s plain, {guessed_seconds:.2f} s guessing: {guessed_seconds / plain_seconds - 1:+.1%}")


if __name__ == "__main__":
    main()
