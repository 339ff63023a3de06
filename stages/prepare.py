"""Stage prepare: build the corpus, split it and measure the splits."""

from pathlib import Path

from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.corpus import prepare


def main(params: str = "params.yaml", out: str = "data/prepared", report: str = "reports/prepare.json") -> None:
    """Read the `prepare` section of `params` and write the splits and their report."""
    prepare(load_config(params).prepare, out=Path(out), report=Path(report))


if __name__ == "__main__":
    run(main)
