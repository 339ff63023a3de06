"""DVC stage `tokenize`: train the tokenizer on the train split and encode every split."""

from pathlib import Path

from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.corpus import read_splits
from smallgpt.files import write_json
from smallgpt.tokens import tokenize
from smallgpt.tracking import start_run


def main(
    params: str = "params.yaml",
    prepared: str = "data/prepared",
    tokenizer: str = "models/tokenizer",
    tokens: str = "data/tokens",
    report: str = "reports/tokenize.json",
) -> None:
    config = load_config(params)
    with start_run("tokenize") as tracker:
        trained, headers = tokenize(
            read_splits(Path(prepared)),
            vocab_size=config.model.vocab_size,
            options=config.tokenizer,
            tokenizer=Path(tokenizer),
            tokens=Path(tokens),
        )
        figures = {
            split: {**header, "bytes_per_token": int(header["text_bytes"]) / int(header["tokens"])}
            for split, header in headers.items()
        }
        write_json(Path(report), {"vocab_size": trained.vocab_size, "sha256": trained.sha256, **figures})
        tracker.log_params(config.model_dump(include={"tokenizer": True, "model": {"vocab_size"}}))
        tracker.log_artifact(Path(report))


if __name__ == "__main__":
    run(main)
