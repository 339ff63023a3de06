"""DVC stage `prepare`: build the corpus, split it, and measure the splits and their overlap."""

import logging
from pathlib import Path

from smallgpt.cli import run
from smallgpt.config import load_config
from smallgpt.corpus import SOURCES, prepare
from smallgpt.tracking import start_run


def main(params: str = "params.yaml", out: str = "data/prepared", report: str = "reports/prepare.json") -> None:
    config = load_config(params)
    with start_run("prepare") as tracker:
        prepare(config.prepare, out=Path(out), report=Path(report))
        tracker.log_params(config.model_dump(include={"prepare"}))
        tracker.log_artifact(Path(report))
    source = config.prepare.source
    if source not in SOURCES:
        logging.info("DVC does not watch %s: after a change in place run dvc repro -f prepare", source)


if __name__ == "__main__":
    run(main)
