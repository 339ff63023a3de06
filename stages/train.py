"""DVC stage `train`: fit the model to the token files and keep the weights that score best on valid."""

import os
from pathlib import Path

from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.tokenizer import Tokenizer
from smallgpt.train import train


def main(
    params: str = "params.yaml",
    tokens: str = "data/tokens",
    tokenizer: str = "models/tokenizer",
    out: str = "models/gpt",
    reports: str = "reports/train",
) -> None:
    # Not an out: it survives a kill, and belongs to the main workspace also in DVC's temporary copies.
    work = Path(os.environ.get("DVC_ROOT", ".")) / ".smallgpt" / "train"
    train(
        load_config(params),
        Tokenizer.load(tokenizer),
        tokens=Path(tokens),
        out=Path(out),
        reports=Path(reports),
        work=work,
    )


if __name__ == "__main__":
    run(main)
