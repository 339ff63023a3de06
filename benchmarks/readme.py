"""`python -m benchmarks.readme`: fill the marked blocks of README.md from the reports and a real command."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

from smallgpt.files import sha256_file, write_atomic

COMMAND = 'python -m smallgpt.ort_generate exports/fp32 --echo -s 1 -p "Once upon a time"'


def results() -> str:
    """The default run in figures: size, machine, time, table, certificates."""
    summary = json.loads(Path("reports/train/summary.json").read_text(encoding="utf-8"))
    bundles = json.loads(Path("reports/export.json").read_text(encoding="utf-8"))
    digest = sha256_file(Path("models/gpt/model.safetensors"))
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in Path("reports/results").glob("stories-*.json")]
    if not any((row["config"], row["model_sha256"]) == ("params.yaml", digest) for row in rows):
        raise ValueError("models/gpt is not the default run's of reports/results; python -m smallgpt.results add")
    facts = json.loads(Path(f".smallgpt/train/runs/{digest[:16]}.json").read_text(encoding="utf-8"))
    table = Path("reports/evaluate/perplexity.md").read_text(encoding="utf-8")
    single = "single_bits_per_byte_difference"
    lines = "".join(
        f"| {name} | {bundle['bytes'] / 1e6:.1f} MB | {bundle['max_difference']:.2g} | "
        f"{bundle['top1_agreement']:.4f} | {bundle['bits_per_byte_difference']:.1e} | "
        f"{format(bundle[single], '.1e') if single in bundle else '-'} |\n"
        for name, bundle in bundles.items()
    )
    size = f"{summary['parameters'] / 1e6:.1f}M"
    return f"""The default run, {size} parameters on the `stories` corpus, on {facts["hardware"]}:

{table}
The bundles against PyTorch, all computed on the CPU (each bundle's parity.json has the whole certificate):

| bundle | graph | largest difference of a logit | same top token | bits/byte, relative difference | token by token |
| --- | --- | --- | --- | --- | --- |
{lines}"""


def models() -> str:
    """A line for each trained model, from the rows of docs/results.md."""
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in Path("reports/results").glob("*.json")]
    head = "corpus, config, parameters, bits/byte, sliding, floor, word PPL (sliding), token PPL, vocab, trained, on"
    lines = [head.split(", "), ["---"] * 11]
    for row in sorted(rows, key=lambda row: (row["dataset"], row["config"], row["bits_per_byte"])):
        time = f", {row['seconds'] / 60:.0f} min" if row["seconds"] else ""
        lines.append(
            [
                f"{row['dataset']}, {row['split']}",
                f"{row['config'].removeprefix('configs/')}, seed {row['seed']}",
                f"{row['parameters'] / 1e6:.1f}M",
                f"{row['bits_per_byte']:.4f}",
                f"{row['sliding_bits_per_byte']:.4f}",
                f"{row['floor_bits_per_byte']:.4f}" if "floor_bits_per_byte" in row else "-",
                *(f"{row[n]:.{1 if row[n] >= 10 else 2}f}" for n in ("sliding_word_perplexity", "perplexity")),
                f"{row['vocab_size']:,}",
                f"{row['tokens_seen'] / 1e6:.1f}M tokens{time}",
                row["hardware"] or "-",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def sample() -> str:
    """The first of the samples that the stage evaluate drew, and how many of them the grammar could have told."""
    sys.path.insert(0, "tests")
    from story_parser import story_nats  # the independent reader of the grammar

    page = Path("reports/evaluate/samples.md").read_text(encoding="utf-8")
    samples = re.findall(r"```text\n(.*?)\n```", page, re.S)
    told = 0
    for text in samples:
        with contextlib.suppress(ValueError):
            story_nats(text)
            told += 1
    rest = "" if told == len(samples) else " The others slip in a word."
    return f"""{told} of the {len(samples)} samples are stories that the grammar could have told: names, pronouns,
objects and the weather are kept to the end.{rest} The first one (seed 0, not picked;
reports/evaluate/samples.md has all):

```text
{samples[0]}
```
"""


def generation() -> str:
    """A command and what it writes to the terminal."""
    command = [sys.executable, *shlex.split(COMMAND)[1:]]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return f"```console\n$ {COMMAND}\n{done.stdout.strip()}\n{done.stderr.strip()}\n```\n"


def main() -> None:
    path = Path("README.md")
    text = path.read_text(encoding="utf-8")
    for name, block in (("results", results), ("models", models), ("sample", sample), ("generate", generation)):
        pattern = rf"<!-- {name} -->.*?<!-- /{name} -->"
        text, count = re.subn(pattern, lambda _, b=block, n=name: f"<!-- {n} -->\n{b()}<!-- /{n} -->", text, flags=re.S)
        if count != 1:
            raise ValueError(f"README.md has {count} blocks {name}; it needs one")
    write_atomic(path, text)


if __name__ == "__main__":
    main()
